// The backward goes over the tokens in windows, from the last to the first; each is worked on by
// three kernels, which hand each other the rounded states around every segment through scratch
// memory that all windows share. It is this memory's size, not the number of tokens, that says how
// many chunks a window has.
//
// Chunks are counted along a row of the batch: a sequence's first is slot 0, or with packed
// sequences start / chunk_size + 2 n for sequence n, which leaves room for any lengths and
// positions.
#pragma once
#include "titans/titans_pipeline.cuh"

namespace hope {

// Before the segment, and gradients after it.
enum StateKind { kWeights, kMomenta, kWeightsGradient, kMomentaGradient, kStateKinds };

// The states' inner products are taken of the rounded states, which adds to the errors of the
// products that made them: in 16 bits the gates' gradients err by somewhat more than torch's. A
// sequence's first state is what was given; there they are taken in float.
template <class E, int D>
struct TitansWindow {
    static constexpr int kRows = kTokens<E, D>;
    E* scratch;      // [row][slot][part][H][kStateKinds][V, D], then anchors [N][H][V, D], then
                     // float products [N][H][V / 16][kProducts]
    int begin, end;  // slots
    int capacity;    // slots

    // What a window has of a sequence: chunks [first, last), which may be none.
    struct Chunks {
        int first, last;
        bool starts, ends;  // its start is in the window, its end
        DEVICE bool any() const { return starts || first < last; }  // also an empty sequence
    };

    __host__ __device__ static int rows(const TitansParams& p) {
        return p.cu_seqlens ? 1 : static_cast<int>(p.sequences);
    }
    __host__ __device__ static int slots(const TitansParams& p) {
        const int64_t sequences_of_row = p.cu_seqlens ? p.sequences : 1;
        return static_cast<int>(p.tokens / p.chunk_size + 2 * sequences_of_row);
    }
    __host__ __device__ static int64_t elements_of_a_slot(const TitansParams& p) {
        return rows(p) * p.heads * Sequence<kRows>::segments_of_chunk(p) * kStateKinds * p.key_dim *
               p.value_dim;
    }
    // What stays in the device's cache; more if a single chunk of every sequence needs more. Whole
    // distances between checkpoints, if that makes a difference, since states are computed from a
    // checkpoint on.
    static int capacity_for(const TitansParams& p) {
        const int64_t cached = device_attribute(cudaDevAttrL2CacheSize) / 3 * 2;
        const int64_t bytes = elements_of_a_slot(p) * static_cast<int64_t>(sizeof(E)),
                      all = slots(p), every = p.checkpoint_every;
        int64_t fitting = bytes ? cached / bytes : 1;
        if (fitting > every) fitting -= fitting % every;
        return static_cast<int>(fitting < 1 ? 1 : fitting < all ? fitting : all);
    }
    __host__ __device__ static int64_t elements_of_anchors(const TitansParams& p) {
        return p.position ? p.sequences * p.heads * p.key_dim * p.value_dim : int64_t{0};
    }
    static int64_t bytes_of_scratch(const TitansParams& p) {
        const int64_t states = capacity_for(p) * elements_of_a_slot(p) + elements_of_anchors(p);
        const int64_t products = p.sequences * p.heads * (p.value_dim / 16) * kProducts;
        return states * static_cast<int64_t>(sizeof(E)) +
               products * static_cast<int64_t>(sizeof(float));
    }

    DEVICE static int first_slot(const TitansParams& p, const Sequence<kRows>& in) {
        return p.cu_seqlens ? static_cast<int>(in.start / p.chunk_size) + 2 * in.index : 0;
    }
    DEVICE Chunks chunks_of(const TitansParams& p, const Sequence<kRows>& in) const {
        const int base = first_slot(p, in), last = base + max(in.chunks(), 1) - 1;
        return {max(0, begin - base), min(in.chunks(), end - base), begin <= base && base < end,
                begin <= last && last < end};
    }
    // The sequence whose slot this is, if it is anybody's.
    DEVICE static int sequence_of(const TitansParams& p, int row, int slot) {
        if (!p.cu_seqlens) return row;
        int low = 0, high = static_cast<int>(p.sequences);  // low: starts at this slot or before
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (first_slot(p, Sequence<kRows>(p, middle, 0)) <= slot)
                low = middle;
            else
                high = middle;
        }
        return low;
    }
    DEVICE E* tile(const TitansParams& p, const Sequence<kRows>& in, int chunk, int part,
                   int kind) const {
        const int64_t slot = first_slot(p, in) + chunk - begin + in.batch * capacity;
        return scratch + (((slot * in.parts + part) * p.heads + in.head) * kStateKinds + kind) *
                             p.key_dim * p.value_dim;
    }
    // W_anchor^T of a chunk's tokens. A sequence that starts inside a chunk has brought it along.
    DEVICE E* anchor(const TitansParams& p, const Sequence<kRows>& in, int chunk) const {
        if (chunk > 0 || in.offset == 0) return tile(p, in, chunk, 0, kWeights);
        return scratch + capacity * elements_of_a_slot(p) +
               (in.index * p.heads + in.head) * p.key_dim * p.value_dim;
    }
    // Of a sequence's first segment, a row for every 16 value columns.
    DEVICE float* products(const TitansParams& p, const Sequence<kRows>& in) const {
        E* const end = scratch + capacity * elements_of_a_slot(p) + elements_of_anchors(p);
        return reinterpret_cast<float*>(end) +
               (in.index * p.heads + in.head) * (p.value_dim / 16) * kProducts;
    }
};

}  // namespace hope
