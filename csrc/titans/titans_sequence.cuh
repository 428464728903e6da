// The gates of a Titans memory's tokens, and a linear one's state in registers.
#pragma once
#include "common/sequence.cuh"
#include "titans/titans.h"

namespace hope {

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

// Checkpoints: weights, then momenta if there are any.
DEVICE int64_t checkpoint_floats(const TitansParams& p) {
    const int64_t weights =
        p.hidden_dim ? (p.key_dim + p.value_dim) * p.hidden_dim : p.key_dim * p.value_dim;
    return weights * (p.momentum.data ? 2 : 1);
}
// Of the chunk's start; null where none is taken.
template <int Tokens>
DEVICE float* checkpoint(const TitansParams& p, const Sequence<Tokens>& in, int chunk) {
    return checkpoint(p, in, chunk, checkpoint_floats(p));
}
template <int Tokens>
DEVICE void clear_unused_checkpoints(const TitansParams& p, const Sequence<Tokens>& in) {
    clear_unused_checkpoints(p, in, checkpoint_floats(p));
}

}  // namespace hope
