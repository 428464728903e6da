// Products of large matrices: a block makes a tile of the result, all of its depth, and then hands
// out the sums for whatever is elementwise in the same place.
//
//     left  [rows][depth]  or turned     kDepth at a time, by cp.async
//     right [depth][columns] or turned  ------------------------------>  ring of kStages pairs of
//                                                                        tiles in shared memory
//     warp (i, j) of 4 x 2: Tile / 4 rows and Tile / 2 columns of the result in registers  <---'
//
// One barrier for each step: with it, tiles have arrived that were asked for kStages - 1 steps ago,
// and the tiles of the step before are free. What lies outside the matrices arrives as zeros and is
// not read, so rows, columns and, along the matrices' rows, depth have to be multiples of 8 (of 4
// for float) where they are neighbours in memory, and any number where they are not.
#pragma once
#include "common/tile.cuh"

namespace hope {

constexpr int kProductWarps = 8, kProductThreads = kProductWarps * 32;

// A matrix whose rows lie `stride` elements apart.
template <class E>
struct RowMajor {
    E* data;
    int64_t stride;

    DEVICE E* at(int row, int column) const { return data + row * stride + column; }
};

template <class E>
struct Factors {
    RowMajor<E> left, right;
    int depth;  // 0: nothing to add
};

// Tiles of one factor in shared memory, in the order in which the matrix lies: with Outer rows of
// kDepth elements if its rows run along the depth, else with kDepth rows of Outer.
template <class E, int Outer, bool AlongDepth>
struct FactorRing {
    static constexpr int kDepth = sizeof(E) == 4 ? 16 : 32, kStages = 3;
    static constexpr int kRows = AlongDepth ? Outer : kDepth;
    static constexpr int kColumns = AlongDepth ? kDepth : Outer;
    // Fragments of float want other rows in other banks than ldmatrix does.
    static constexpr int kStride = kColumns + (sizeof(E) == 4 && !AlongDepth ? 4 : kRowPadding);
    static constexpr int kSize = kRows * kStride;
    E* const tiles;

    __host__ __device__ explicit FactorRing(SharedCarver& shared)
        : tiles(shared.take<E>(kStages * kSize)) {}

    // Starts the copy of a step's tile; `outer` and `depth` from its corner to the matrix's end.
    DEVICE void start(int stage, const E* corner, int64_t stride, int outer, int depth) const {
        constexpr int kCopies = kColumns / kPerCopy<E>;
        const int rows = AlongDepth ? outer : depth, columns = AlongDepth ? depth : outer;
#pragma unroll
        for (int i = 0; i < kRows * kCopies / kProductThreads; i++) {
            const int copy = i * kProductThreads + static_cast<int>(threadIdx.x);
            const int row = copy / kCopies, column = copy % kCopies * kPerCopy<E>;
            const bool inside = row < rows && column < columns;
            cp_async_16(tiles + stage * kSize + row * kStride + column,
                        corner + (inside ? row * stride + column : 0), inside ? 16 : 0);
        }
    }
    DEVICE const E* at(int stage, int outer, int depth) const {
        return tiles + stage * kSize +
               (AlongDepth ? outer * kStride + depth : depth * kStride + outer);
    }
};

// sums = the sum of some products, Tile x Tile of it. LeftTurned: the left factors are given as
// [depth][rows]; RightTurned: the right ones as [columns][depth].
template <class E, int Tile, bool LeftTurned, bool RightTurned>
class BlockProduct {
    using LeftRing = FactorRing<E, Tile, !LeftTurned>;
    using RightRing = FactorRing<E, Tile, RightTurned>;
    static constexpr int kDepth = LeftRing::kDepth, kStages = LeftRing::kStages;
    static constexpr int kWarpRows = Tile / 4, kWarpColumns = Tile / 2;
    static constexpr int kBlocks = kWarpRows / 16, kTiles = kWarpColumns / 8;
    static constexpr int kMostProducts = 2;

 public:
    // The tile with this corner, of a result of so many rows and columns.
    DEVICE BlockProduct(SharedCarver& shared, int row, int column, int rows, int columns)
        : left_(shared),
          right_(shared),
          factors_(shared.take<Factors<E>>(kMostProducts)),
          row_(row),
          column_(column),
          rows_(rows),
          columns_(columns) {}

    static size_t shared_bytes() {
        SharedCarver shared(nullptr);
        const LeftRing left(shared);
        const RightRing right(shared);
        shared.take<Factors<E>>(kMostProducts);
        return shared.used();
    }

    template <int Count>
    DEVICE void add(const Factors<E> (&products)[Count]) {
        static_assert(Count <= kMostProducts);
        int steps = 0;
#pragma unroll
        for (int i = 0; i < Count; i++) {
            steps += steps_of(products[i]);
            if (threadIdx.x == 0) factors_[i] = products[i];
        }
        __syncthreads();
#pragma unroll
        for (int stage = 0; stage < kStages - 1; stage++) start<Count>(stage, steps, stage);
        // A warp beyond the result's edge keeps the others company.
        const bool works = row_ + warp_row() < rows_ && column_ + warp_column() < columns_;
        int stage = 0;
        for (int step = 0; step < steps; step++) {
            cp_async_wait<kStages - 2>();
            __syncthreads();
            start<Count>(step + kStages - 1, steps, stage == 0 ? kStages - 1 : stage - 1);
            if (works) multiply(stage);
            stage = stage == kStages - 1 ? 0 : stage + 1;
        }
    }

    // body(row, column, sum, sum in the next column) for this thread's part of the result.
    template <class Body>
    DEVICE void for_pairs(const Body& body) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int block = 0; block < kBlocks; block++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = row_ + warp_row() + block * 16 + half * 8 + lane / 4;
                if (row >= rows_) continue;
#pragma unroll
                for (int tile = 0; tile < kTiles; tile++) {
                    const int column = column_ + warp_column() + tile * 8 + lane % 4 * 2;
                    if (column < columns_)
                        body(row, column, sums_[block][tile][half * 2],
                             sums_[block][tile][half * 2 + 1]);
                }
            }
    }

 private:
    LeftRing left_;
    RightRing right_;
    Factors<E>* const factors_;  // in shared memory: registers are for sums
    const int row_, column_, rows_, columns_;
    Accumulator<kTiles> sums_[kBlocks] = {};

    // Of this warp's part in the tile.
    DEVICE static int warp_row() { return static_cast<int>(threadIdx.x) / 64 * kWarpRows; }
    DEVICE static int warp_column() {
        return static_cast<int>(threadIdx.x) / 32 % 2 * kWarpColumns;
    }
    DEVICE static int steps_of(const Factors<E>& product) {
        return (product.depth + kDepth - 1) / kDepth;
    }
    // Starts the copies of a step, of whichever product it belongs to; a group of none after the
    // last, so that the wait counts steps.
    template <int Count>
    DEVICE void start(int step, int steps, int stage) const {
        if (step < steps) {
            int product = 0;
#pragma unroll
            for (int i = 0; i + 1 < Count; i++) {
                const int before = steps_of(factors_[i]);
                if (product == i && step >= before) step -= before, product = i + 1;
            }
            const Factors<E>& of = factors_[product];
            const int depth = step * kDepth;
            left_.start(stage, LeftTurned ? of.left.at(depth, row_) : of.left.at(row_, depth),
                        of.left.stride, rows_ - row_, of.depth - depth);
            right_.start(stage,
                         RightTurned ? of.right.at(column_, depth) : of.right.at(depth, column_),
                         of.right.stride, columns_ - column_, of.depth - depth);
        }
        cp_async_commit();
    }
    DEVICE void multiply(int stage) {
#pragma unroll
        for (int depth = 0; depth < kDepth; depth += 16) {
            Left<E> left[kBlocks];
#pragma unroll
            for (int block = 0; block < kBlocks; block++) {
                Block<E> elements;
                load_block<LeftTurned, LeftRing::kStride>(
                    elements, left_.at(stage, warp_row() + block * 16, depth));
                make_left<E>(left[block], elements);
            }
#pragma unroll
            for (int tile = 0; tile < kTiles; tile += 2) {
                Right<E> right[2];
                load_right<!RightTurned, RightRing::kStride>(
                    right, right_.at(stage, warp_column() + tile * 8, depth));
#pragma unroll
                for (int block = 0; block < kBlocks; block++) {
                    mma<E>(sums_[block][tile], left[block], right[0]);
                    mma<E>(sums_[block][tile + 1], left[block], right[1]);
                }
            }
        }
    }
};

}  // namespace hope
