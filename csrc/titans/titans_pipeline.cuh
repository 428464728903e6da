// What the kernels that walk a sequence have in common: a block's shared memory, and its helper
// warps, which prepare one segment ahead all that does not depend on the state.
//
//   helper warps (4), segment i + 1                state warps (16 value columns each), segment i
//     wait until the state warps are done with       wait for segment i
//       i - 1, store their result of i - 1           products with the state, which stays in
//     start copies ahead                               registers; the result goes where V's rows
//     A, b, c, m by the gates' recurrences             were
//     scores = QK^T (lower triangle) * A             the state after the segment
//     say that i + 1 is ready                        say that i is done
//
// The only barriers of a state warp are the two of each segment, and it touches global memory at
// chunk boundaries alone. Row recurrences (docs/derivations.md), a thread per column s of A:
//
//   N[t, s] = momentum_t N[t-1, s] + lr_t [t = s]        A[t, s] = keep_t A[t-1, s] + N[t, s]
//
// and two more columns: N = 1 before the first token gives m and c, A = 1 gives b.
#pragma once
#include "common/recurrence.cuh"
#include "titans/titans_sequence.cuh"

namespace hope {

constexpr int kHelperWarps = 4, kHelpers = kHelperWarps * 32;
constexpr int kMostColumns = 64;  // value columns of a block; a state warp has 16 of them
constexpr int kMostThreads = kHelpers + kMostColumns / 16 * 32;

// Tokens of a segment: what the state leaves of a thread's registers, and what fits the 99 KB of
// shared memory that the smaller GPUs have.
template <class E, int D>
constexpr int kTokens = sizeof(E) == 4 ? (D <= 64 ? 32 : 16) : (D <= 64 ? 64 : 32);

template <class E, int D>
struct PipelineLayout {
    static constexpr int kRows = kTokens<E, D>, kStride = D + kRowPadding,
                         kValueStride = kMostColumns + kRowPadding,
                         kScoreStride = kRows + kRowPadding;
    static constexpr int kTile = kRows * kStride, kValueTile = kRows * kValueStride,
                         kScoreTile = kRows * kScoreStride;
    int stages;
    E *k, *q, *x;             // [stages] tiles; x: V or dO, and the result of its rows
    E* scores;                // [2] tiles
    Vectors<kRows>* vectors;  // [2]
    float* coefficients;      // A; the helpers' own
    float2* gates;            // [2][kRows] momentum and keep; the helpers' own
    Pair<E>* anchor;          // [D / 16][state thread] blocks, each its thread's own
    size_t bytes;

    __host__ __device__ PipelineLayout(SharedCarver carver, int stages_, int columns)
        : stages(stages_),
          k(carver.take<E>(stages * kTile)),
          q(carver.take<E>(stages * kTile)),
          x(carver.take<E>(stages * kValueTile)),
          scores(carver.take<E>(2 * kScoreTile)),
          vectors(carver.take<Vectors<kRows>>(2)),
          coefficients(carver.take<float>(kRows * kScoreStride)),
          gates(carver.take<float2>(2 * kRows)),
          anchor(carver.take<Pair<E>>(D / 16 * columns * 2 * 4)),
          bytes(carver.used()) {}
};

// Named barriers: kFull and kEmpty, one for even and one for odd segments.
enum PipelineBarrier { kFull = 1, kEmpty = 3, kHelpersOnly = 5 };

template <int GroupsLeft>
DEVICE void wait_for_copies(int groups_left) {
    if (groups_left == GroupsLeft)
        cp_async_wait<GroupsLeft>();
    else if constexpr (GroupsLeft > 0)
        wait_for_copies<GroupsLeft - 1>(groups_left);
}
constexpr int kMostStages = 4;

template <class E, int D>
class Helpers {
    using Layout = PipelineLayout<E, D>;
    static constexpr int kRows = Layout::kRows;

 public:
    // third: V or dO, value columns value .. value + columns - 1; result: as the state warps leave
    // them in its place, with as many columns.
    DEVICE Helpers(const Layout& shared, const TitansParams& p, const Sequence<kRows>& in,
                   const TokenTensor& third, const TokenTensor& result, int value, int columns)
        : shared_(shared),
          p_(p),
          in_(in),
          third_(third),
          result_(result),
          value_(value),
          columns_(columns),
          helper_(static_cast<int>(threadIdx.x) - columns * 2),
          threads_(columns * 2 + kHelpers) {}

    // Prepares the segments order(0), ..., order(count - 1). Scored: with q, the scores, and the
    // results; else only what the state's update needs.
    template <bool Scored, class Order>
    DEVICE void run(int count, Order order) const {
        const int ahead = shared_.stages - 2;
        for (int i = 0; i < ahead; i++) load<Scored>(i, count, order);
        Gates gates = own_gates(0, count, order);
        for (int i = 0; i < count + 2; i++) {
            const int parity = i % 2;
            if (i >= 2) {
                named_barrier_sync(kEmpty + parity, threads_);
                if (Scored) store_result(order(i - 2), (i - 2) % shared_.stages);
            }
            if (i >= count) continue;
            float2* const shared_gates = shared_.gates + parity * kRows;
            if (helper_ < kRows) shared_gates[helper_] = make_float2(gates.momentum, gates.keep);
            const float lr = gates.lr;
            gates = own_gates(i + 1, count, order);  // on the way while this segment is prepared
            // A thread copies to and from the same places of x, and k and q are free, see kEmpty.
            load<Scored>(i + ahead, count, order);
            wait_for_copies<kMostStages - 2>(ahead);
            named_barrier_sync(kHelpersOnly, kHelpers);  // the gates and the segment are here
            recur<kRows>(helper_, lr, shared_gates, order(i).rows - 1,
                         p_.read == TitansRead::before, shared_.coefficients,
                         shared_.vectors[parity]);
            __syncwarp();  // not all of a warp have recurred; products need all
            if (Scored && p_.read != TitansRead::chunk)
                score(i % shared_.stages, shared_.scores + parity * Layout::kScoreTile);
            named_barrier_arrive(kFull + parity, threads_);
        }
    }

 private:
    // Of the thread's token in segment order(i), if there is one.
    template <class Order>
    DEVICE Gates own_gates(int i, int count, Order order) const {
        if (i >= count) return {0, 0, 0};
        const Segment at = order(i);
        return load_gates(p_, in_, at.first + helper_, helper_ < at.rows);
    }
    template <int Columns>
    DEVICE void copy(E* to, int stride, const TokenTensor& from, int first_column, int columns,
                     const Segment& at) const {
        constexpr int kPieces = Columns / kPerCopy<E>;
#pragma unroll 4
        for (int i = helper_; i < kRows * kPieces; i += kHelpers) {
            const int row = i / kPieces, column = i % kPieces * kPerCopy<E>;
            const bool valid = row < at.rows && from.data;
            const E* const source =  // of rows that are not there, any address that is
                valid ? token<const E>(from, in_, at.first + row) + first_column + column
                      : static_cast<const E*>(p_.k.data);
            if (column < columns) cp_async_16(to + row * stride + column, source, valid ? 16 : 0);
        }
    }
    template <bool Scored, class Order>
    DEVICE void load(int i, int count, Order order) const {
        if (i < count) {
            const Segment at = order(i);
            const int stage = i % shared_.stages;
            copy<D>(shared_.k + stage * Layout::kTile, Layout::kStride, p_.k, 0, D, at);
            if (Scored) copy<D>(shared_.q + stage * Layout::kTile, Layout::kStride, p_.q, 0, D, at);
            copy<kMostColumns>(shared_.x + stage * Layout::kValueTile, Layout::kValueStride, third_,
                               value_, columns_, at);
        }
        cp_async_commit();  // also an empty group: the waits count groups
    }
    DEVICE void store_result(const Segment& at, int stage) const {
        constexpr int kPieces = kMostColumns / kPerCopy<E>;
        const E* const from = shared_.x + stage * Layout::kValueTile;
        for (int i = helper_; i < kRows * kPieces; i += kHelpers) {
            const int row = i / kPieces, column = i % kPieces * kPerCopy<E>;
            if (row < at.rows && column < columns_)
                *reinterpret_cast<uint4*>(token<E>(result_, in_, at.first + row) + value_ +
                                          column) =
                    *reinterpret_cast<const uint4*>(from + row * Layout::kValueStride + column);
        }
    }

    // Blocks of 16x16 on and below the diagonal, dealt out to the warps.
    DEVICE void score(int stage, E* result) const {
        constexpr int kBlocks = kLowerBlocks<kRows>;
        const E *const q = shared_.q + stage * Layout::kTile, *const k =
                                                                  shared_.k + stage * Layout::kTile;
        const int lane = helper_ % 32, warp = helper_ / 32;
        constexpr int kEach = (kBlocks + kHelperWarps - 1) / kHelperWarps;
        Accumulator<2> scores[kEach] = {};
#pragma unroll
        for (int n = 0; n < kEach; n++) {
            const int block = warp + n * kHelperWarps;
            if (block >= kBlocks) continue;
            const int r = block_row(block) * 16, c = block_column(block) * 16;
#pragma unroll
            for (int step = 0; step < D; step += 16) {
                Block<E> pairs;
                Left<E> left;
                load_block<false, Layout::kStride>(pairs, q + r * Layout::kStride + step);
                make_left(left, pairs);
                multiply<false, Layout::kStride>(scores[n], left, k + c * Layout::kStride + step);
            }
        }
        named_barrier_sync(kHelpersOnly, kHelpers);  // A is complete
#pragma unroll
        for (int n = 0; n < kEach; n++) {
            const int block = warp + n * kHelperWarps;
            if (block >= kBlocks) continue;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = block_row(block) * 16 + lane / 4 + i % 2 * 8,
                          column = block_column(block) * 16 + i / 2 * 8 + lane % 4 * 2;
                const int at = row * Layout::kScoreStride + column;
                const float2 a = pair_at(shared_.coefficients + at);
                const float* const x = &scores[n][i / 2][i % 2 * 2];
                pair_at(result + at) = pack<E>(x[0] * a.x, x[1] * a.y);
            }
        }
    }

    const Layout& shared_;
    const TitansParams& p_;
    const Sequence<kRows>& in_;
    const TokenTensor &third_, &result_;
    const int value_, columns_, helper_, threads_;
};

}  // namespace hope
