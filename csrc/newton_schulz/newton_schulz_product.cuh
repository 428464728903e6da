// Products of the Newton-Schulz iteration on CUDA: to = scale * left right + keep * from.
//
// A block of 8 warps has 128 x 128 numbers of the result, a warp 64 x 32 of them in registers:
//
//        right, kDepth rows at a time          Operands come through shared memory by asynchronous
//              +--+--+--+--+                   copies, three slabs in turn: one is multiplied, one
//              | 0| 1| 2| 3| 64 rows           has come, one is on its way. The accumulators then
//        left  +--+--+--+--+                   go through shared memory once more, so that memory
//              | 4| 5| 6| 7|                   sees whole rows.
//              +--+--+--+--+
//
// Of a symmetric result only the blocks on or below the diagonal are there, and each is written
// twice, as it is and mirrored; on the diagonal, the part above it is mirrored from the part below,
// and warps that would have nothing else skip their products. So the result is symmetric bit by
// bit, and as an operand its rows can stand for its columns.
//
// Matrices have rows of a multiple of kRowUnit elements, the last of them zeros; products keep
// them.
#pragma once
#include "common/tile.cuh"

namespace hope {
namespace {

constexpr int kTile = 128, kThreads = 256, kWarpRows = 64, kWarpColumns = 32, kSlabs = 3;
constexpr int kRowUnit = 16, kQuad = 4;

template <class E>
constexpr int kDepth = 64 / sizeof(E);

// A batch of matrices of rows of `stride` elements. Sides are ints, which halves their registers.
template <class E>
struct Matrices {
    E* data;
    int rows, stride;
    __host__ __device__ int64_t elements() const { return static_cast<int64_t>(rows) * stride; }
    DEVICE E* at(int64_t index) const { return data + index * elements(); }
};

template <class E>
struct Product {
    Matrices<E> left, right, to, from;  // from: null data if keep is 0
    int depth;
    float scale, keep;
    bool symmetric;
    int blocks, across;  // of a matrix; in a row of blocks
};

// An operand's slab in shared memory. Rows of the result's side, kDepth long each; or, if the
// operand lies across, kDepth rows along the result's side.
template <class E, bool kAcross>
struct Slab {
    static constexpr int kRows = kAcross ? kDepth<E> : kTile, kLength = kAcross ? kTile : kDepth<E>;
    static constexpr int kStride = kLength + kRowPadding, kElements = kRows * kStride;

    // Starts copies of what there is at `side` of the result's side and `depth`; zeros beyond.
    static DEVICE void copy(E* slab, const E* matrix, const Matrices<E>& of, int side, int depth) {
        constexpr int kCopies = kLength / kPerCopy<E>;
        const int first_row = kAcross ? depth : side, first_column = kAcross ? side : depth;
        for (int i = static_cast<int>(threadIdx.x); i < kRows * kCopies; i += kThreads) {
            const int row = i / kCopies, column = i % kCopies * kPerCopy<E>;
            const bool inside = first_row + row < of.rows && first_column + column < of.stride;
            const E* const source = inside ? matrix +
                                                 static_cast<int64_t>(first_row + row) * of.stride +
                                                 first_column + column
                                           : matrix;
            cp_async_16(slab + row * kStride + column, source, inside ? 16 : 0);
        }
    }
    // The first element of a 16x16 block, for load_block and load_right.
    static DEVICE const E* block(const E* slab, int side, int depth) {
        return slab + (kAcross ? depth * kStride + side : side * kStride + depth);
    }
};

// Accumulators in shared memory; an odd distance between rows, for reads along columns.
constexpr int kStageStride = kTile + 1;

template <class E, bool kLeftAcross, bool kRightAcross>
struct ProductLayout {
    using LeftSlab = Slab<E, kLeftAcross>;
    using RightSlab = Slab<E, kRightAcross>;
    static constexpr int kSlabElements = LeftSlab::kElements + RightSlab::kElements;
    E* slabs;      // [kSlabs][kSlabElements]
    float* stage;  // [kTile][kStageStride], in the same place
    size_t bytes;

    __host__ __device__ explicit ProductLayout(SharedCarver carver) {
        constexpr size_t kOfSlabs = kSlabs * kSlabElements * sizeof(E),
                         kOfStage = kTile * kStageStride * sizeof(float);
        char* const piece = carver.take<char>(kOfSlabs > kOfStage ? kOfSlabs : kOfStage);
        slabs = reinterpret_cast<E*>(piece), stage = reinterpret_cast<float*>(piece);
        bytes = carver.used();
    }
};

template <class E>
DEVICE void load_quad(float (&to)[kQuad], const E* from) {
#pragma unroll
    for (int i = 0; i < kQuad; i += 2) {
        const float2 pair = unpack<E>(pair_at(from + i));
        to[i] = pair.x, to[i + 1] = pair.y;
    }
}

// Writes the staged block to its place, or mirrored to its other one.
template <class E>
DEVICE void write_block(const Product<E>& p, int64_t matrix, const float* stage, int row0,
                        int column0, bool mirrored) {
    const bool on_diagonal = p.symmetric && row0 == column0;
    E* const to = p.to.at(matrix);
    const E* const from = p.from.data ? p.from.at(matrix) : nullptr;
    constexpr int kQuads = kTile / kQuad;
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kQuads; i += kThreads) {
        const int r = i / kQuads, c = i % kQuads * kQuad;
        const int row = (mirrored ? column0 : row0) + r, column = (mirrored ? row0 : column0) + c;
        if (row >= p.to.rows || column >= p.to.stride) continue;
        const int64_t place = static_cast<int64_t>(row) * p.to.stride + column;
        float old[kQuad] = {}, x[kQuad];
        if (from) load_quad(old, from + place);
#pragma unroll
        for (int j = 0; j < kQuad; j++) {
            const bool turned = mirrored || (on_diagonal && c + j > r);
            const float sum =
                turned ? stage[(c + j) * kStageStride + r] : stage[r * kStageStride + c + j];
            x[j] = fmaf(p.scale, sum, p.keep * old[j]);
        }
#pragma unroll
        for (int j = 0; j < kQuad; j += 2) pair_at(to + place + j) = pack<E>(x[j], x[j + 1]);
    }
}

template <class E, bool kLeftAcross, bool kRightAcross>
__global__ void __launch_bounds__(kThreads, sizeof(E) == 2 ? 2 : 1)
    newton_schulz_product_kernel(Product<E> p) {
    using Layout = ProductLayout<E, kLeftAcross, kRightAcross>;
    using LeftSlab = typename Layout::LeftSlab;
    using RightSlab = typename Layout::RightSlab;
    const Layout shared{SharedCarver(dynamic_shared())};
    const int64_t matrix = blockIdx.x / p.blocks;
    int i = 0, j = static_cast<int>(blockIdx.x % p.blocks);
    if (p.symmetric) {
        for (; j > i; i++) j -= i + 1;
    } else {
        i = j / p.across, j %= p.across;
    }
    const int row0 = i * kTile, column0 = j * kTile;
    const E *const left = p.left.at(matrix), *const right = p.right.at(matrix);

    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int warp_row = warp / 4 * kWarpRows, warp_column = warp % 4 * kWarpColumns;
    const bool wanted = row0 + warp_row < p.to.rows && column0 + warp_column < p.to.stride &&
                        !(p.symmetric && i == j && warp_column >= warp_row + kWarpRows);

    const auto slab = [&](int step) {
        return shared.slabs + step % kSlabs * Layout::kSlabElements;
    };
    const auto copy = [&](int step) {
        if (step * kDepth<E> < p.depth) {
            LeftSlab::copy(slab(step), left, p.left, row0, step * kDepth<E>);
            RightSlab::copy(slab(step) + LeftSlab::kElements, right, p.right, column0,
                            step * kDepth<E>);
        }
        cp_async_commit();  // a group for every step, empty after the last
    };
    constexpr int kBlocks = kWarpRows / 16, kTiles = kWarpColumns / 8;
    float sums[kBlocks][kTiles][4] = {};
    for (int step = 0; step < kSlabs - 1; step++) copy(step);
    for (int step = 0; step * kDepth<E> < p.depth; step++) {
        cp_async_wait<kSlabs - 2>();
        __syncthreads();  // all have this slab, and are done with the one before
        copy(step + kSlabs - 1);
        if (!wanted) continue;
        const E *const rows = slab(step), *const columns = slab(step) + LeftSlab::kElements;
#pragma unroll
        for (int k = 0; k < kDepth<E>; k += 16) {
            Right<E> rights[kTiles / 2][2];
#pragma unroll
            for (int t = 0; t < kTiles / 2; t++)
                load_right<kRightAcross, RightSlab::kStride>(
                    rights[t], RightSlab::block(columns, warp_column + t * 16, k));
#pragma unroll
            for (int b = 0; b < kBlocks; b++) {
                Block<E> block;
                load_block<kLeftAcross, LeftSlab::kStride>(
                    block, LeftSlab::block(rows, warp_row + b * 16, k));
                Left<E> of_block;
                make_left<E>(of_block, block);
#pragma unroll
                for (int t = 0; t < kTiles; t++) mma<E>(sums[b][t], of_block, rights[t / 2][t % 2]);
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int b = 0; b < kBlocks; b++)
#pragma unroll
        for (int t = 0; t < kTiles; t++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int r = warp_row + b * 16 + lane / 4 + e / 2 * 8,
                          c = warp_column + t * 8 + lane % 4 * 2 + e % 2;
                shared.stage[r * kStageStride + c] = sums[b][t][e];
            }
    __syncthreads();
    write_block(p, matrix, shared.stage, row0, column0, false);
    if (p.symmetric && i != j) write_block(p, matrix, shared.stage, row0, column0, true);
}

}  // namespace
}  // namespace hope
