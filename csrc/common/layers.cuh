// Memories whose layers are kept as matrices, on CUDA: a block's tiles and states, and the products
// that its kernels are made of.
//
// A layer is a linear memory of inputs and errors (docs/derivations.md). Its states lie as float
// matrices [out][in], in shared memory as far as there is room, else in scratch memory that stays
// in the device's cache; they are rounded when a product takes them. What a product gives is
// transposed, [rows of the state][tokens], so states are always left operands, read once for all
// tokens. Rows are dealt out to the warps in *slices* of 16.
//
//   ByToken   [tokens][D]       rows as they come
//   ByFeature [F][tokens]       of a hidden dimension, as products leave them
//   Square    [tokens][tokens]  scores and the like, lower triangles
#pragma once
#include "common/activation.cuh"
#include "common/recurrence.cuh"
#include "common/sequence.cuh"

namespace hope {

constexpr int kLayerWarps = 8, kLayerThreads = kLayerWarps * 32;

// ---- tiles -------------------------------------------------------------------------------------

// Features of tokens in shared memory: a row for each token, or for each feature.
template <class E, bool ByToken, int Stride>
struct Features {
    E* data;

    DEVICE E* at(int feature, int token) const {
        E* const element = data + (ByToken ? token * Stride + feature : feature * Stride + token);
        if constexpr (sizeof(E) == 2) assume_shared(element);  // of float it may be anywhere
        return element;
    }
    // Blocks of left operands: 16 tokens by 16 features, or the other way round.
    DEVICE void load_tokens(Block<E>& to, int token, int feature) const {
        load_block<!ByToken, Stride>(to, at(feature, token));
    }
    DEVICE void load_features(Block<E>& to, int feature, int token) const {
        load_block<ByToken, Stride>(to, at(feature, token));
    }
    // sums[.., tokens] += left[.., features] * these, and with tokens and features exchanged.
    template <int Tiles>
    DEVICE void multiply_features(Accumulator<Tiles>& sums, const Left<E>& left, int feature,
                                  int token, int first = 0, int last = Tiles) const {
        multiply<!ByToken, Stride>(sums, left, at(feature, token), first, last);
    }
    template <int Tiles>
    DEVICE void multiply_tokens(Accumulator<Tiles>& sums, const Left<E>& left, int token,
                                int feature, int first = 0, int last = Tiles) const {
        multiply<ByToken, Stride>(sums, left, at(feature, token), first, last);
    }
};

template <class E, int D, int Tokens>
struct LayerTiles {
    using ByToken = Features<E, true, D + kRowPadding>;          // [Tokens][D]
    using ByFeature = Features<E, false, Tokens + kRowPadding>;  // [F][Tokens]
    using Square = Features<E, true, Tokens + kRowPadding>;      // [Tokens][Tokens]
    static constexpr int kScoreStride = Tokens + kRowPadding;
    static constexpr int kSumStride = D + 4;  // two tokens' sums are 8 banks apart
    static constexpr int kTokenTiles = Tokens / 8;
    // Of a product with as many rows as a token has features, a warp has one slice and so many
    // tokens.
    static constexpr int kPart =
        D * Tokens / (kLayerWarps * 16) > 16 ? D * Tokens / (kLayerWarps * 16) : 16;
    static constexpr int kPartTiles = kPart / 8;
    static_assert(Tokens <= 64 && Tokens % kPart == 0);

    // body(slice, token) for this warp's share of `rows` rows and all tokens, at most once.
    template <class Body>
    DEVICE static void for_part(int rows, const Body& body) {
        constexpr int kParts = Tokens / kPart;
        const int item = static_cast<int>(threadIdx.x) / 32;
        if (item < rows / 16 * kParts) body(item / kParts * 16, item % kParts * kPart);
    }
    // body(slice) for this warp's share of `rows` rows.
    template <class Body>
    DEVICE static void for_slices(int rows, const Body& body) {
        for (int slice = static_cast<int>(threadIdx.x) / 32 * 16; slice < rows;
             slice += kLayerWarps * 16)
            body(slice);
    }
    // body(row, column, width) for this warp's share of a state's matrix, cut into pieces of 16
    // rows and `width` columns, a constant.
    template <int Widest, class Body>
    DEVICE static void for_pieces(int rows, int columns, const Body& body) {
        if (columns % Widest == 0)
            for_pieces_of(rows, columns, body, std::integral_constant<int, Widest>());
        else
            for_pieces_of(rows, columns, body, std::integral_constant<int, 16>());
    }
    template <class Body, class Width>
    DEVICE static void for_pieces_of(int rows, int columns, const Body& body, Width width) {
        const int in_row = columns / width, pieces = rows / 16 * in_row;
        for (int i = static_cast<int>(threadIdx.x) / 32; i < pieces; i += kLayerWarps)
            body(i / in_row * 16, i % in_row * width, width);
    }
    // body(row, column) for this warp's share of the 16x16 blocks on and below a diagonal.
    template <class Body>
    DEVICE static void for_lower_blocks(const Body& body) {
        for (int block = static_cast<int>(threadIdx.x) / 32; block < kLowerBlocks<Tokens>;
             block += kLayerWarps)
            body(block_row(block) * 16, block_column(block) * 16);
    }
    // Every token has a group of neighbouring threads. Whole warps come here.
    static constexpr int kGroup = kLayerThreads / Tokens;
    DEVICE static int token_of_group() { return static_cast<int>(threadIdx.x) / kGroup; }
    DEVICE static int rank_in_group() { return static_cast<int>(threadIdx.x) % kGroup; }
    DEVICE static float sum_of_group(float x) {
#pragma unroll
        for (int distance = kGroup / 2; distance; distance /= 2)
            x += __shfl_xor_sync(~0u, x, distance);
        return x;
    }
};

// Hands out shared memory; where that does not suffice, what is of float comes from scratch memory:
// floats are read without ldmatrix, from anywhere. scratch: null if it suffices.
class TileCarver {
 public:
    __host__ __device__ TileCarver(SharedCarver& shared, float* scratch)
        : shared_(shared), scratch_(scratch) {}

    template <class T>
    __host__ __device__ T* take(int64_t count) {
        if constexpr (std::is_same_v<T, float>)
            if (scratch_) {
                float* const piece = scratch_;
                scratch_ += (count + 3) / 4 * 4;  // pieces begin at multiples of 16 bytes
                return piece;
            }
        return shared_.take<T>(count);
    }
    __host__ __device__ SharedCarver& shared() const { return shared_; }
    // Scratch memory that is left.
    __host__ __device__ float* rest() const { return scratch_; }

 private:
    SharedCarver& shared_;
    float* scratch_;
};

// ---- states ------------------------------------------------------------------------------------

// W^T of a layer, or S^T: [rows][columns] of [out][in].
struct StateMatrix {
    float* data;
    int rows, columns, stride;

    DEVICE float* at(int row, int column) const { return data + row * stride + column; }
};

constexpr int kStatePadding = 8;  // rows lie this much further apart than they are long

__host__ __device__ inline int64_t floats_of_matrix(int64_t rows, int64_t columns) {
    return rows * (columns + kStatePadding);
}
DEVICE StateMatrix state_matrix(float* data, int rows, int columns) {
    return {data, rows, columns, columns + kStatePadding};
}

// A layer's weights and momenta; the latter without data where there are none.
struct LayerState {
    StateMatrix w, s;
};

// Hands out states' matrices: the first `resident` of them lie in shared memory, the others in
// scratch memory.
class StateCarver {
 public:
    __host__ __device__ StateCarver(SharedCarver& shared, float* scratch, int resident)
        : shared_(shared), scratch_(scratch), resident_(resident) {}

    DEVICE StateMatrix take(int rows, int columns) {
        return state_matrix(take(floats_of_matrix(rows, columns)), rows, columns);
    }
    // Scratch memory that is left.
    DEVICE float* rest() const { return scratch_; }

 private:
    DEVICE float* take(int64_t floats) {
        if (resident_ > 0) {
            resident_--;
            return shared_.take<float>(floats);
        }
        float* const piece = scratch_;
        scratch_ += floats;
        return piece;
    }

    SharedCarver& shared_;
    float* scratch_;
    int resident_;
};

// From a [in, out] matrix of the call, or zero if there is none; and to one.
DEVICE void load_matrix(const StateMatrix& to, const float* from) {
    for (int i = static_cast<int>(threadIdx.x); i < to.rows * to.columns; i += kLayerThreads)
        *to.at(i % to.rows, i / to.rows) = from ? from[i] : 0;
}
DEVICE void store_matrix(float* to, const StateMatrix& from) {
    for (int i = static_cast<int>(threadIdx.x); i < from.rows * from.columns; i += kLayerThreads)
        to[i] = *from.at(i % from.rows, i / from.rows);
}
DEVICE void clear_matrix(float* to, int size) {
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kLayerThreads) to[i] = 0;
}
DEVICE void add_matrix(const StateMatrix& to, const float* from) {
    for (int i = static_cast<int>(threadIdx.x); i < to.rows * to.columns; i += kLayerThreads)
        *to.at(i % to.rows, i / to.rows) += from[i];
}
// A checkpoint has the matrices as they lie, without padding.
DEVICE float* copy_to_checkpoint(float* to, const StateMatrix& from) {
    const int size = from.rows * from.columns;
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kLayerThreads)
        to[i] = *from.at(i / from.columns, i % from.columns);
    return to + size;
}
DEVICE const float* copy_from_checkpoint(const StateMatrix& to, const float* from) {
    const int size = to.rows * to.columns;
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kLayerThreads)
        *to.at(i / to.columns, i % to.columns) = from[i];
    return from + size;
}

// ---- products ----------------------------------------------------------------------------------

// A block of a state, or of its transpose, rounded.
template <bool Transposed, class E>
DEVICE void load_state_block(Block<E>& to, const StateMatrix& from, int row, int column) {
    const int lane = threadIdx.x % 32;
    const float* const own = Transposed ? from.at(column + lane % 4 * 2, row + lane / 4)
                                        : from.at(row + lane / 4, column + lane % 4 * 2);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (Transposed) {
            const float* const x = own + i / 2 * 8 * from.stride + i % 2 * 8;
            to[i] = pack<E>(x[0], x[from.stride]);
        } else {
            const float2 x = pair_at(own + i % 2 * 8 * from.stride + i / 2 * 8);
            to[i] = pack<E>(x.x, x.y);
        }
    }
}

// of_w += (rows of W) * features, of_s the same of S if it has data: 16 rows of W^T's matrix, or of
// W's if Transposed, and tokens from `token` on.
template <bool Transposed, class F, int Tiles>
DEVICE void multiply_states(Accumulator<Tiles>& of_w, Accumulator<Tiles>& of_s,
                            const LayerState& state, int row, const F& features, int token) {
    using E = std::remove_pointer_t<decltype(features.data)>;
    const StateMatrix &w = state.w, &s = state.s;
    const int terms = Transposed ? w.rows : w.columns;
#pragma unroll 2
    for (int step = 0; step < terms; step += 16) {
        Block<E> block;
        Left<E> left;
        load_state_block<Transposed, E>(block, w, row, step);
        make_left(left, block);
        features.multiply_features(of_w, left, step, token);
        if (!s.data) continue;
        load_state_block<Transposed, E>(block, s, row, step);
        make_left(left, block);
        features.multiply_features(of_s, left, step, token);
    }
}
template <bool Transposed, class F, int Tiles>
DEVICE void multiply_state(Accumulator<Tiles>& sums, const StateMatrix& w, int row,
                           const F& features, int token) {
    Accumulator<Tiles> none;
    multiply_states<Transposed>(sums, none, LayerState{w, {}}, row, features, token);
}

// sums = of_w * x + of_s * y, columns scaled by the tokens' factors.
template <int Tiles>
DEVICE void combine(Accumulator<Tiles>& sums, const Accumulator<Tiles>& of_w,
                    const Accumulator<Tiles>& of_s, const float* x, const float* y) {
#pragma unroll
    for (int tile = 0; tile < Tiles; tile++) {
        const int token = tile * 8 + threadIdx.x % 4 * 2;
        const float2 of_x = pair_at(x + token), of_y = pair_at(y + token);
#pragma unroll
        for (int i = 0; i < 4; i++)
            sums[tile][i] = (i % 2 ? of_x.y : of_x.x) * of_w[tile][i] +
                            (i % 2 ? of_y.y : of_y.x) * of_s[tile][i];
    }
}

// body(feature, token, element, element of the next token) over a slice's sums.
template <int Tiles, class Body>
DEVICE void for_pairs(Accumulator<Tiles>& sums, int slice, int token, const Body& body) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int tile = 0; tile < Tiles; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            body(slice + lane / 4 + half * 8, token + tile * 8 + lane % 4 * 2, sums[tile][half * 2],
                 sums[tile][half * 2 + 1]);
}

}  // namespace hope
