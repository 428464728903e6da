// Where the tokens of a sequence are, and where its state is kept: the geometry that all CUDA
// kernels of memories share. A chunk is worked through in segments of at most Tokens tokens; they
// end where the chunk ends. Params: those of an operator, with tokens, chunk_size, position,
// cu_seqlens and checkpoints as memories have them.
#pragma once
#include "common/element.h"
#include "common/memory.h"
#include "common/tile.cuh"

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

    template <class Params>
    DEVICE Sequence(const Params& p, int sequence, int of_head)
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
    template <class Params>
    __host__ __device__ static int segments_of_chunk(const Params& p) {
        const int64_t longest = p.chunk_size < p.tokens ? p.chunk_size : p.tokens;
        return longest > Tokens ? static_cast<int>((longest + Tokens - 1) / Tokens) : 1;
    }

    // Position of the sequence's end within its first chunk, or beyond. Chunks may have almost 2^31
    // tokens and sequences 2^30: unsigned numbers hold the end of the last chunk.
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

// ---- states ------------------------------------------------------------------------------------

DEVICE float* matrix(const MatrixTensor& tensor, int sequence, int head) {
    return tensor.data
               ? static_cast<float*>(tensor.data) + sequence * tensor.batch + head * tensor.head
               : nullptr;
}

// ---- checkpoints ----
// Of `floats` numbers for each head; memory.h says where each has its slot.

template <class Params, int Tokens>
DEVICE int64_t first_checkpoint_slot(const Params& p, const Sequence<Tokens>& in) {
    const int64_t first = p.cu_seqlens ? in.start : in.index * p.tokens;
    return first / (p.chunk_size * p.checkpoint_every) + in.index;
}
// Of the chunk's start; null where none is taken.
template <class Params, int Tokens>
DEVICE float* checkpoint(const Params& p, const Sequence<Tokens>& in, int chunk, int64_t floats) {
    if (!p.checkpoint_every || chunk == 0 || chunk % p.checkpoint_every) return nullptr;
    const int64_t slot = first_checkpoint_slot(p, in) + chunk / p.checkpoint_every - 1;
    return static_cast<float*>(p.checkpoints) + (slot * p.heads + in.head) * floats;
}
// Clears the slots that no chunk of this sequence uses, so that every element of the tensor is
// written. For a warp.
template <class Params, int Tokens>
DEVICE void clear_unused_checkpoints(const Params& p, const Sequence<Tokens>& in, int64_t size) {
    const int64_t span = p.chunk_size * p.checkpoint_every;
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
