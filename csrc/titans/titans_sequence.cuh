// Where the tokens of a sequence are, and where its state is kept: the geometry that all CUDA
// kernels of the linear memory share. A chunk is worked through in segments of at most Tokens
// tokens; they end where the chunk ends.
#pragma once
#include "common/tile.cuh"
#include "titans/titans.h"

namespace hope {

struct Segment {
    int first, rows;  // tokens, counted within the sequence
    int chunk, part;  // the segment is part `part` of its chunk
    bool new_chunk;   // begins at the chunk's start, where the anchor is the state itself
};

template <int Tokens>
struct Sequence {
    int index, head;
    int64_t batch, start;  // row of the batch, first token in it
    int length, offset;    // tokens, position of the first one within its chunk
    int chunk_size;
    int parts;  // segments of a whole chunk

    DEVICE Sequence(const TitansParams& p, int sequence, int of_head)
        : index(sequence),
          head(of_head),
          batch(p.cu_seqlens ? 0 : sequence),
          start(0),
          length(static_cast<int>(p.tokens)),
          chunk_size(static_cast<int>(p.chunk_size)),
          parts(segments_of_chunk(p)) {
        if (p.cu_seqlens) {  // nobody has looked at their values: stay within the tensors
            const int tokens = length;
            start = min(max(p.cu_seqlens[sequence], 0), tokens);
            length = max(min(p.cu_seqlens[sequence + 1], tokens) - static_cast<int>(start), 0);
        }
        const int64_t position = p.position ? p.position[sequence] % chunk_size : 0;
        offset = static_cast<int>(position < 0 ? position + chunk_size : position);
    }
    __host__ __device__ static int segments_of_chunk(const TitansParams& p) {
        const int64_t longest = p.chunk_size < p.tokens ? p.chunk_size : p.tokens;
        return longest > Tokens ? static_cast<int>((longest + Tokens - 1) / Tokens) : 1;
    }

    // Position of the sequence's end within its first chunk, or beyond. Chunks may have up to 2^31
    // - 1 tokens and sequences 2^30: unsigned numbers hold the end of the last chunk.
    DEVICE unsigned end() const {
        return static_cast<unsigned>(offset) + static_cast<unsigned>(length);
    }
    DEVICE int chunks() const {
        return length ? static_cast<int>((end() - 1) / chunk_size) + 1 : 0;
    }
    DEVICE int chunk_begin(int chunk) const {
        return chunk ? static_cast<int>(static_cast<unsigned>(chunk) * chunk_size - offset) : 0;
    }
    DEVICE int chunk_end(int chunk) const {
        const unsigned at = (static_cast<unsigned>(chunk) + 1) * chunk_size - offset;
        return at < static_cast<unsigned>(length) ? static_cast<int>(at) : length;
    }
    DEVICE bool ends_inside_chunk() const { return end() % chunk_size != 0; }

    // Segments from the start of the sequence to the start of a chunk.
    DEVICE int segments_before(int chunk) const {
        if (chunk == 0) return 0;
        const int first = (chunk_end(0) + Tokens - 1) / Tokens;
        if (chunk < chunks()) return first + (chunk - 1) * parts;
        const int last = chunk - 1;
        const int in_last = (chunk_end(last) - chunk_begin(last) + Tokens - 1) / Tokens;
        return last == 0 ? first : first + (last - 1) * parts + in_last;
    }
    DEVICE Segment segment(int index_in_sequence) const {
        Segment at;
        const int first = (chunk_end(0) + Tokens - 1) / Tokens;
        if (index_in_sequence < first) {
            at.chunk = 0, at.part = index_in_sequence;
        } else if (parts == 1) {
            at.chunk = index_in_sequence - first + 1, at.part = 0;
        } else {
            at.chunk = (index_in_sequence - first) / parts + 1;
            at.part = (index_in_sequence - first) % parts;
        }
        at.first = chunk_begin(at.chunk) + at.part * Tokens;
        at.rows = min(Tokens, chunk_end(at.chunk) - at.first);
        at.new_chunk = at.part == 0 && (at.chunk > 0 || offset == 0);
        return at;
    }
};

// ---- tokens ------------------------------------------------------------------------------------

// First element of the sequence's token t.
template <class E, int Tokens>
DEVICE E* token(const TokenTensor& tensor, const Sequence<Tokens>& in, int t) {
    return static_cast<E*>(tensor.data) + in.batch * tensor.batch + (in.start + t) * tensor.token +
           in.head * tensor.head;
}

struct Gates {
    float lr, momentum, keep;  // keep = 1 - decay
};

// A token past the segment learns nothing and leaves nothing behind.
template <int Tokens>
DEVICE Gates load_gates(const TitansParams& p, const Sequence<Tokens>& in, int t, bool valid) {
    if (!valid) return {0, 0, 0};
    return {*token<const float>(p.lr, in, t),
            p.momentum.data ? *token<const float>(p.momentum, in, t) : 0,
            p.decay.data ? 1 - *token<const float>(p.decay, in, t) : 1};
}

// ---- states ------------------------------------------------------------------------------------
// A state is kept transposed in a warp's accumulators: 16 value columns are the rows, the key
// dimension runs over the columns.

DEVICE float* matrix(const MatrixTensor& tensor, int sequence, int head) {
    return tensor.data
               ? static_cast<float*>(tensor.data) + sequence * tensor.batch + head * tensor.head
               : nullptr;
}

// The columns of one (sequence, head)'s states that a warp has in its registers.
struct StateColumns {
    int sequence, head, first;  // first value column
    int value_dim;

    // The lane's first element in a [D, value_dim] matrix.
    DEVICE int lane() const {
        const int lane = threadIdx.x % 32;
        return first + lane / 4 + lane % 4 * 2 * value_dim;
    }
    DEVICE float* own(const MatrixTensor& tensor) const {
        float* const data = matrix(tensor, sequence, head);
        return data ? data + lane() : nullptr;
    }
};

// body(tile, i, element) for the lane's elements of a [D, value_dim] matrix, in the places of a
// state's accumulator; `first` is the lane's first element. One pointer goes along: with an address
// for each element the compiler would run out of registers.
template <int D, class T, class Body>
DEVICE void for_elements(T* first, int value_dim, const Body& body) {
#pragma unroll
    for (int tile = 0; tile < D / 8; tile++) {
#pragma unroll
        for (int i = 0; i < 4; i++) body(tile, i, first[i % 2 * value_dim + i / 2 * 8]);
        first += 8 * value_dim;
    }
}
// `from` is the lane's first element, or null: zero.
template <int D>
DEVICE void load_state(Accumulator<D / 8>& to, const float* from, int value_dim) {
    if (from) {
        for_elements<D>(from, value_dim, [&](int tile, int i, float x) { to[tile][i] = x; });
        return;
    }
#pragma unroll
    for (int tile = 0; tile < D / 8; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) to[tile][i] = 0;
}
template <int D>
DEVICE void store_state(float* to, const Accumulator<D / 8>& from, int value_dim) {
    for_elements<D>(to, value_dim, [&](int tile, int i, float& x) { x = from[tile][i]; });
}

// Rounded, to a [value_dim, D] matrix.
template <int D, class E>
DEVICE void store_rounded_state(E* to, const Accumulator<D / 8>& from, int first_value) {
    const int lane = threadIdx.x % 32;
    E* const own = to + static_cast<int64_t>(first_value + lane / 4) * D + lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < D / 8; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            pair_at(own + half * 8 * D + tile * 8) =
                pack<E>(from[tile][half * 2], from[tile][half * 2 + 1]);
}

// Checkpoints (titans.h says where each has its slot): weights, then momenta if there are any.
DEVICE int64_t checkpoint_floats(const TitansParams& p) {
    const int64_t weights =
        p.hidden_dim ? (p.key_dim + p.value_dim) * p.hidden_dim : p.key_dim * p.value_dim;
    return weights * (p.momentum.data ? 2 : 1);
}
template <int Tokens>
DEVICE int64_t first_checkpoint_slot(const TitansParams& p, const Sequence<Tokens>& in) {
    const int64_t first = p.cu_seqlens ? in.start : in.index * p.tokens;
    return first / (p.chunk_size * p.checkpoint_every) + in.index;
}
// Of the chunk's start; null where none is taken.
template <int Tokens>
DEVICE float* checkpoint(const TitansParams& p, const Sequence<Tokens>& in, int chunk) {
    if (!p.checkpoint_every || chunk == 0 || chunk % p.checkpoint_every) return nullptr;
    const int64_t slot = first_checkpoint_slot(p, in) + chunk / p.checkpoint_every - 1;
    return static_cast<float*>(p.checkpoints) + (slot * p.heads + in.head) * checkpoint_floats(p);
}

// Clears the slots that no chunk of this sequence uses, so that every element of the tensor is
// written. For a warp.
template <int Tokens>
DEVICE void clear_unused_checkpoints(const TitansParams& p, const Sequence<Tokens>& in) {
    const int64_t size = checkpoint_floats(p), span = p.chunk_size * p.checkpoint_every;
    const int64_t first = p.cu_seqlens ? in.start : in.index * p.tokens;
    const int64_t used = in.chunks() ? (in.chunks() - 1) / p.checkpoint_every : 0;
    const int64_t begin = first_checkpoint_slot(p, in) + used,
                  end = (first + in.length) / span + in.index + 1;
    for (int64_t slot = begin; slot < end; slot++) {
        float* const kept = static_cast<float*>(p.checkpoints) + (slot * p.heads + in.head) * size;
        for (int64_t i = threadIdx.x; i < size; i += 32) kept[i] = 0;
    }
}

}  // namespace hope
