// Products of small tiles by one warp on the tensor cores, under the same names for 16-bit elements
// and for float, which goes through 3xTF32: x = big + small, a b = big big + big small + small big,
// about as accurate as float arithmetic. Sums are float.
//
// A matrix is a "left" operand in 16x16 blocks and a "right" one in 16x8 blocks. A lane's share of
// either, and of a result, is made of pairs of neighbouring columns (mma's layout, row = lane / 4,
// column = lane % 4 * 2). tf32 products want columns c and c + 4 in a lane instead; since the order
// of a sum's terms is free, they are given columns 2c and 2c + 1, of both operands.
#pragma once
#include <type_traits>

#include "common/primitives.cuh"

namespace hope {

// ---- elements ----------------------------------------------------------------------------------

template <class E>
struct PairOf {
    using type = uint32_t;
};
template <>
struct PairOf<float> {
    using type = float2;
};
// Two neighbouring elements, as they lie in memory.
template <class E>
using Pair = typename PairOf<E>::type;

template <class E>
DEVICE Pair<E> pack(float low, float high);
template <>
DEVICE uint32_t pack<bf16>(float low, float high) {
    return pack_bf16(low, high);
}
template <>
DEVICE uint32_t pack<fp16>(float low, float high) {
    return pack_fp16(low, high);
}
template <>
DEVICE float2 pack<float>(float low, float high) {
    return make_float2(low, high);
}

template <class E>
DEVICE float2 unpack(Pair<E> pair);
template <>
DEVICE float2 unpack<bf16>(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
DEVICE float2 unpack<fp16>(uint32_t pair) {
    const __half2_raw halves{static_cast<unsigned short>(pair),
                             static_cast<unsigned short>(pair >> 16)};
    return __half22float2(halves);
}
template <>
DEVICE float2 unpack<float>(float2 pair) {
    return pair;
}

template <class E>
DEVICE Pair<E>& pair_at(E* first) {
    return *reinterpret_cast<Pair<E>*>(first);
}
template <class E>
DEVICE const Pair<E>& pair_at(const E* first) {
    return *reinterpret_cast<const Pair<E>*>(first);
}

template <class E>
DEVICE float to_float(E x) {
    if constexpr (sizeof(E) == 4)
        return x;
    else if constexpr (std::is_same_v<E, bf16>)
        return __bfloat162float(x);
    else
        return __half2float(x);
}
template <class E>
DEVICE E from_float(float x) {
    if constexpr (sizeof(E) == 4)
        return x;
    else if constexpr (std::is_same_v<E, bf16>)
        return __float2bfloat16(x);
    else
        return __float2half(x);
}

// Elements that one 16-byte copy moves.
template <class E>
constexpr int kPerCopy = 16 / sizeof(E);

// Rows of a tile in shared memory lie this much further apart than they are long: then the eight
// rows of an ldmatrix, and the pairs of a float fragment, are in different banks.
constexpr int kRowPadding = 8;

// ---- operands ----------------------------------------------------------------------------------

// A warp's 16 rows of a result, 8 columns a tile.
template <int Tiles>
using Accumulator = float[Tiles][4];

// 16x16 elements in the layout of a result's two tiles: [column half * 2 + row half].
template <class E>
using Block = Pair<E>[4];

template <class E>
struct Left {
    uint32_t bits[4];
};
template <class E>
struct Right {
    uint32_t bits[2];
};
template <>
struct Left<float> {
    uint32_t big[2][4], small[2][4];  // [column half]
};
template <>
struct Right<float> {
    uint32_t big[2][2], small[2][2];  // [row half]
};

DEVICE void split_tf32(float x, uint32_t& big, uint32_t& small) {
    big = to_tf32(x);
    small = to_tf32(x - __uint_as_float(big));
}

template <class E>
DEVICE void make_left(Left<E>& left, const Block<E>& block) {
    if constexpr (sizeof(E) == 4) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            split_tf32(block[i].x, left.big[i / 2][i % 2], left.small[i / 2][i % 2]);
            split_tf32(block[i].y, left.big[i / 2][i % 2 + 2], left.small[i / 2][i % 2 + 2]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) left.bits[i] = block[i];
    }
}

// d += left * right
template <class E>
DEVICE void mma(float (&d)[4], const Left<E>& left, const Right<E>& right CALL_SITE) {
    if constexpr (sizeof(E) == 4) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            mma_tf32(d, left.small[half], right.big[half] PASS_SITE);
            mma_tf32(d, left.big[half], right.small[half] PASS_SITE);
            mma_tf32(d, left.big[half], right.big[half] PASS_SITE);
        }
    } else if constexpr (std::is_same_v<E, bf16>) {
        mma_bf16(d, left.bits, right.bits PASS_SITE);
    } else {
        mma_fp16(d, left.bits, right.bits PASS_SITE);
    }
}

// ---- from registers ----------------------------------------------------------------------------

// Columns 16 * step.. of a result, rounded to E.
template <class E, int Tiles>
DEVICE void round_block(Block<E>& block, const Accumulator<Tiles>& from, int step) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        block[i] =
            pack<E>(from[step * 2 + i / 2][i % 2 * 2], from[step * 2 + i / 2][i % 2 * 2 + 1]);
}

// The same with column c multiplied by factor[c].
template <class E, int Tiles>
DEVICE void round_scaled(Block<E>& block, const Accumulator<Tiles>& from, int step,
                         const float* factor) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float2 f = pair_at(factor + step * 16 + half * 8 + threadIdx.x % 4 * 2);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float* const x = &from[step * 2 + half][i * 2];
            block[half * 2 + i] = pack<E>(x[0] * f.x, x[1] * f.y);
        }
    }
}

// The block with column c multiplied by factor[c].
template <class E>
DEVICE void scale_columns(Block<E>& to, const Block<E>& from, const float* factor) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float2 f = pair_at(factor + half * 8 + threadIdx.x % 4 * 2);
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; i++) {
            const float2 x = unpack<E>(from[i]);
            to[i] = pack<E>(x.x * f.x, x.y * f.y);
        }
    }
}

// ---- from shared memory ------------------------------------------------------------------------
// `block` is the first element of a 16x16 block of a row-major matrix M with `Stride` elements from
// row to row.

// Where this lane's row of a block starts for ldmatrix: one pattern for every operand.
template <int Stride>
DEVICE int lane_offset() {
    const int lane = threadIdx.x % 32;
    return (lane % 8 + lane / 16 * 8) * Stride + lane / 8 % 2 * 8;
}

// The block of M, or of M^T if Transposed.
template <bool Transposed, int Stride, class E>
DEVICE void load_block(Block<E>& to, const E* block CALL_SITE) {
    if constexpr (sizeof(E) == 4) {
        const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = row + i % 2 * 8, c = column + i / 2 * 8;
            if constexpr (Transposed)
                to[i] = make_float2(block[c * Stride + r], block[(c + 1) * Stride + r]);
            else
                to[i] = pair_at(block + r * Stride + c);
        }
    } else {
        uint32_t r[4];
        ldmatrix<4, Transposed>(r, block + lane_offset<Stride>() PASS_SITE);
        to[0] = r[0], to[3] = r[3];
        to[1] = r[Transposed ? 1 : 2], to[2] = r[Transposed ? 2 : 1];
    }
}

// Right operand M^T, or M if Transposed: two tiles of 8 columns.
template <bool Transposed, int Stride, class E>
DEVICE void load_right(Right<E> (&to)[2], const E* block CALL_SITE) {
    if constexpr (sizeof(E) == 4) {
        const int k = threadIdx.x % 4 * 2, column = threadIdx.x % 32 / 4;
#pragma unroll
        for (int tile = 0; tile < 2; tile++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int c = column + tile * 8, r = k + half * 8;
                float2 x;
                if constexpr (Transposed)
                    x = make_float2(block[r * Stride + c], block[(r + 1) * Stride + c]);
                else
                    x = pair_at(block + c * Stride + r);
                split_tf32(x.x, to[tile].big[half][0], to[tile].small[half][0]);
                split_tf32(x.y, to[tile].big[half][1], to[tile].small[half][1]);
            }
    } else {
        uint32_t r[4];
        ldmatrix<4, Transposed>(r, block + lane_offset<Stride>() PASS_SITE);
#pragma unroll
        for (int i = 0; i < 4; i++)
            to[Transposed ? i % 2 : i / 2].bits[Transposed ? i / 2 : i % 2] = r[i];
    }
}

// result[tile] += left * (columns 8 * tile.. of M^T, or of M if Transposed), in pairs of the tiles
// from first on, before last; `block` is the one of tile 0.
template <bool Transposed, int Stride, int Tiles, class E>
DEVICE void multiply(Accumulator<Tiles>& result, const Left<E>& left, const E* block, int first = 0,
                     int last = Tiles) {
#pragma unroll
    for (int tile = 0; tile < Tiles; tile += 2)
        if (tile >= first && tile < last) {
            Right<E> right[2];
            load_right<Transposed, Stride>(right, block + tile * 8 * (Transposed ? 1 : Stride));
            mma<E>(result[tile], left, right[0]);
            mma<E>(result[tile + 1], left, right[1]);
        }
}

// ---- to shared memory --------------------------------------------------------------------------

// Writes the transpose of a tile (16 rows, 8 columns, in a result's layout) to 8 rows of 16.
template <int Stride, class E>
DEVICE void store_transposed(E* to, const float (&tile)[4] CALL_SITE) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float low = tile[half * 2], high = tile[half * 2 + 1];
        if constexpr (sizeof(E) == 4) {
            E* const column = to + lane % 4 * 2 * Stride + half * 8 + lane / 4;
            column[0] = low, column[Stride] = high;
        } else {
            const uint32_t turned = transpose_8x8(pack<E>(low, high) PASS_SITE);
            pair_at(to + lane / 4 * Stride + half * 8 + lane % 4 * 2) = turned;
        }
    }
}

}  // namespace hope
