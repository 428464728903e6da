// A memory of two layers, or with a norm, on CUDA: a block's tiles and states, and the products
// that its kernels are made of.
//
// Both layers are the same linear memory (docs/derivations.md): of keys K and errors G the first,
// of keys H and errors E the second. A memory of one layer (with a norm) has the second only, and
// then H is K and HQ is Q. States lie as float matrices [out][in], in shared memory as far as there
// is room, else in scratch memory that stays in the device's cache; they are rounded when a product
// takes them. What a product gives is transposed, [rows of the state][tokens], so states are always
// left operands, read once for all tokens. Rows are dealt out to the warps in *slices* of 16.
//
//   tile            rows    columns   read by all warps
//   k, q, e, ..     tokens  D         as they come; e: V, then the error E
//   h, hq, ..       F       tokens    of the hidden dimension, as products leave them
//   scores          tokens  tokens    A * QK^T and A * HQ H^T, lower triangles
#pragma once
#include "titans/titans_pipeline.cuh"

namespace hope {

constexpr int kNetworkWarps = 8, kNetworkThreads = kNetworkWarps * 32;
constexpr int kMostLayers = 2;

// ---- tiles -------------------------------------------------------------------------------------

// Features of tokens in shared memory: a row for each token, or for each feature.
template <class E, bool ByToken, int Stride>
struct Features {
    E* data;

    DEVICE E* at(int feature, int token) const {
        return data + (ByToken ? token * Stride + feature : feature * Stride + token);
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
struct NetworkTiles {
    using ByToken = Features<E, true, D + kRowPadding>;          // [Tokens][D]
    using ByFeature = Features<E, false, Tokens + kRowPadding>;  // [F][Tokens]
    using Square = Features<E, true, Tokens + kRowPadding>;      // [Tokens][Tokens]
    static constexpr int kScoreStride = Tokens + kRowPadding;
    static constexpr int kSumStride = D + 4;  // two tokens' sums are 8 banks apart
    static constexpr int kTokenTiles = Tokens / 8;
    // Of a product with as many rows as a token has features, a warp has one slice and so many
    // tokens.
    static constexpr int kPart =
        D * Tokens / (kNetworkWarps * 16) > 16 ? D * Tokens / (kNetworkWarps * 16) : 16;
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
             slice += kNetworkWarps * 16)
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
        for (int i = static_cast<int>(threadIdx.x) / 32; i < pieces; i += kNetworkWarps)
            body(i / in_row * 16, i % in_row * width, width);
    }
    // body(row, column) for this warp's share of the 16x16 blocks on and below a diagonal.
    template <class Body>
    DEVICE static void for_lower_blocks(const Body& body) {
        for (int block = static_cast<int>(threadIdx.x) / 32; block < kLowerBlocks<Tokens>;
             block += kNetworkWarps)
            body(block_row(block) * 16, block_column(block) * 16);
    }
    // Every token has a group of neighbouring threads. Whole warps come here.
    static constexpr int kGroup = kNetworkThreads / Tokens;
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
                scratch_ += count;
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

// A memory's weights or momenta.
struct LayerMatrices {
    StateMatrix layer[kMostLayers];
};

struct NetworkState {
    LayerMatrices weights, momenta;
};

constexpr int kStateStride = 8;  // rows lie this much further apart than they are long

__host__ __device__ inline int network_layers(const TitansParams& p) {
    return p.hidden_dim ? 2 : 1;
}
__host__ __device__ inline int rows_of_layer(const TitansParams& p, int layer) {
    return static_cast<int>(layer + 1 < network_layers(p) ? p.hidden_dim : p.value_dim);
}
__host__ __device__ inline int columns_of_layer(const TitansParams& p, int layer) {
    return static_cast<int>(layer ? p.hidden_dim : p.key_dim);
}
__host__ __device__ inline int64_t floats_of_layer(const TitansParams& p, int layer) {
    return static_cast<int64_t>(rows_of_layer(p, layer)) *
           (columns_of_layer(p, layer) + kStateStride);
}
__host__ __device__ inline int64_t floats_of_network(const TitansParams& p) {
    int64_t floats = 0;
    for (int layer = 0; layer < network_layers(p); layer++) floats += floats_of_layer(p, layer);
    return floats;
}

DEVICE StateMatrix state_matrix(const TitansParams& p, int layer, float* data) {
    const int columns = columns_of_layer(p, layer);
    return {data, rows_of_layer(p, layer), columns, columns + kStateStride};
}

template <class Body>
DEVICE void for_layers(const TitansParams& p, const Body& body) {
#pragma unroll
    for (int layer = 0; layer < kMostLayers; layer++)
        if (layer < network_layers(p)) body(layer);
}

// Hands out the state's matrices: the first `resident` of them lie in shared memory, the others in
// scratch memory.
class StateCarver {
 public:
    __host__ __device__ StateCarver(SharedCarver& shared, float* scratch, int resident)
        : shared_(shared), scratch_(scratch), resident_(resident) {}

    DEVICE LayerMatrices take(const TitansParams& p) {
        LayerMatrices matrices{};
        for_layers(p, [&](int layer) {
            matrices.layer[layer] = state_matrix(p, layer, take(floats_of_layer(p, layer)));
        });
        return matrices;
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

// A state in scratch memory.
__host__ __device__ inline int64_t floats_of_state(const TitansParams& p) {
    return floats_of_network(p) * (p.has_momentum ? 2 : 1);
}
DEVICE NetworkState network_state(const TitansParams& p, float* data) {
    NetworkState state{};
    for_layers(p, [&](int layer) {
        state.weights.layer[layer] = state_matrix(p, layer, data);
        data += floats_of_layer(p, layer);
    });
    if (p.has_momentum)
        for_layers(p, [&](int layer) {
            state.momenta.layer[layer] = state_matrix(p, layer, data);
            data += floats_of_layer(p, layer);
        });
    return state;
}

// From a [in, out] matrix of the call, or zero if there is none; and to one.
DEVICE void load_matrix(const StateMatrix& to, const float* from) {
    for (int i = static_cast<int>(threadIdx.x); i < to.rows * to.columns; i += kNetworkThreads)
        *to.at(i % to.rows, i / to.rows) = from ? from[i] : 0;
}
DEVICE void store_matrix(float* to, const StateMatrix& from) {
    for (int i = static_cast<int>(threadIdx.x); i < from.rows * from.columns; i += kNetworkThreads)
        to[i] = *from.at(i % from.rows, i / from.rows);
}
DEVICE void clear_matrix(float* to, int size) {
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kNetworkThreads) to[i] = 0;
}
DEVICE void add_matrix(const StateMatrix& to, const float* from) {
    for (int i = static_cast<int>(threadIdx.x); i < to.rows * to.columns; i += kNetworkThreads)
        *to.at(i % to.rows, i / to.rows) += from[i];
}
DEVICE void load_matrices(const TitansParams& p, const LayerMatrices& to,
                          const MatrixTensor (&from)[kMostLayers], int sequence, int head) {
    for_layers(p, [&](int i) { load_matrix(to.layer[i], matrix(from[i], sequence, head)); });
}
DEVICE void store_matrices(const TitansParams& p, const MatrixTensor (&to)[kMostLayers],
                           const LayerMatrices& from, int sequence, int head) {
    for_layers(p, [&](int i) {
        if (to[i].data) store_matrix(matrix(to[i], sequence, head), from.layer[i]);
    });
}
DEVICE void add_matrices(const TitansParams& p, const LayerMatrices& to,
                         const MatrixTensor (&from)[kMostLayers], int sequence, int head) {
    for_layers(p, [&](int i) {
        if (from[i].data) add_matrix(to.layer[i], matrix(from[i], sequence, head));
    });
}
// A checkpoint has the matrices as they lie, without padding.
DEVICE float* copy_to_checkpoint(float* to, const StateMatrix& from) {
    const int size = from.rows * from.columns;
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kNetworkThreads)
        to[i] = *from.at(i / from.columns, i % from.columns);
    return to + size;
}
DEVICE const float* copy_from_checkpoint(const StateMatrix& to, const float* from) {
    const int size = to.rows * to.columns;
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kNetworkThreads)
        *to.at(i / to.columns, i % to.columns) = from[i];
    return from + size;
}

DEVICE float* copy_to_checkpoint(const TitansParams& p, float* to, const NetworkState& from) {
    for_layers(p, [&](int i) { to = copy_to_checkpoint(to, from.weights.layer[i]); });
    if (p.has_momentum)
        for_layers(p, [&](int i) { to = copy_to_checkpoint(to, from.momenta.layer[i]); });
    return to;
}
DEVICE void copy_from_checkpoint(const TitansParams& p, const NetworkState& to, const float* from) {
    for_layers(p, [&](int i) { from = copy_from_checkpoint(to.weights.layer[i], from); });
    if (p.has_momentum)
        for_layers(p, [&](int i) { from = copy_from_checkpoint(to.momenta.layer[i], from); });
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
                            const StateMatrix& w, const StateMatrix& s, int row, const F& features,
                            int token) {
    using E = std::remove_pointer_t<decltype(features.data)>;
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
    multiply_states<Transposed>(sums, none, w, StateMatrix{}, row, features, token);
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

// ---- activations -------------------------------------------------------------------------------

struct Activated {
    float value, slope, curve;  // act, act', act''
};

// z s(g(z)) with the sigmoid s: docs/derivations.md.
DEVICE Activated activate(TitansActivation activation, float z) {
    float g = z, slope = 1, curve = 0;
    if (activation == TitansActivation::gelu) {
        constexpr float kScale = 1.5957691216057308f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
        g = kScale * (z + kCubic * z * z * z);
        slope = kScale * (1 + 3 * kCubic * z * z);
        curve = kScale * 6 * kCubic * z;
    }
    const float s = 1 / (1 + expf(-g)), spread = s / (1 + expf(g));  // s (1 - s)
    const float s1 = spread * slope;
    return {z * s, s + z * s1, 2 * s1 + z * (s1 * (1 - 2 * s) * slope + spread * curve)};
}

}  // namespace hope
