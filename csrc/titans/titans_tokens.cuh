// The gradients of q, k and the gates of one segment, from the states around it: the part of the
// backward in which no segment waits for another. In the names of docs/derivations.md:
//
//   per slice of value columns, which contribute sums (the block's shared memory holds a slice of
//   V, dO, dV and of the states before and their gradients after the segment, transposed):
//       E = K W_anchor - V                  dP += -dO E^T (lower triangle)
//       dO W^T,  dO S^T                     E dW'^T,  E dS'^T,  dE W_anchor^T        [tokens, D]
//   then
//       dX = A * dP,  dA = QK^T * dP
//       dQ = b * (dO W^T) + c * (dO S^T) + dX K
//       dK = dX^T Q - in_weights * (E dW'^T) - in_momenta * (E dS'^T) + dE W_anchor^T
//   and the gates' recurrences in reverse (titans_gates.cuh).
//
// A warp has 16 tokens (rows) and up to 32 columns of D.
#pragma once
#include "titans/titans_gates.cuh"

namespace hope {

template <class E, int D>
class SegmentGradients {
    using Layout = TokensLayout<E, D>;
    static constexpr int kRows = Layout::kRows, kTiles = Layout::kColumns / 8;
    static constexpr int kStride = Layout::kStride, kValueStride = Layout::kValueStride,
                         kScoreStride = Layout::kScoreStride, kThreads = Layout::kThreads;
    static constexpr int kBlocks = kLowerBlocks<kRows>,
                         kBlocksOfWarp = (kBlocks + Layout::kWarps - 1) / Layout::kWarps;

 public:
    // states: of the segment, [D_v, D]; anchor: W_anchor^T, the same. products: of a sequence's
    // first segment [D_v / 16][kProducts], else null.
    DEVICE SegmentGradients(const Layout& shared, const TitansParams& p, const Sequence<kRows>& in,
                            const Segment& at, const E* const (&states)[kStateKinds],
                            const E* anchor, const float* products)
        : shared_(shared),
          p_(p),
          in_(in),
          at_(at),
          states_(states),
          anchor_(anchor),
          needs_products_(!products && (p.momentum.data || p.decay.data)),
          has_momentum_(p.has_momentum),
          l2_(p.objective == TitansObjective::l2),
          reads_anchor_(p.read == TitansRead::chunk),
          thread_(static_cast<int>(threadIdx.x)),
          warp_(thread_ / 32),
          lane_(thread_ % 32),
          split_(warp_ % Layout::kSplits),
          row_(warp_ / Layout::kSplits * 16),
          column_(split_ * Layout::kColumns),
          gates_(shared, p, in, at, products) {}

    DEVICE void run(int slice_columns) {
        load_rows();
        gates_.load();
        for (int value = 0; value < p_.value_dim; value += slice_columns) {
            if (value) __syncthreads();  // the slice before has been used
            load_slice(value, slice_columns);
            if (!value) {
                __syncthreads();  // the gates are here
                gates_.compute_coefficients();
            }
            cp_async_wait<0>();
            __syncthreads();
            compute_errors(slice_columns);
            __syncthreads();
            multiply_slice(slice_columns);
        }
        sum_products();
        if (!reads_anchor_) differentiate_scores();
        __syncthreads();
        finish_queries();
        finish_keys();
        __syncthreads();  // q and k have been used
        leave_rows();
        gates_.through_recurrences();
        __syncthreads();
        store_rows();
        gates_.store();
    }

 private:
    // ---- loading ----

    DEVICE void copy_tokens(E* to, int stride, const TokenTensor& from, int first_column,
                            int columns) const {
        const int pieces = columns / kPerCopy<E>;
        for (int i = thread_; i < kRows * pieces; i += kThreads) {
            const int row = i / pieces, column = i % pieces * kPerCopy<E>;
            const bool valid = row < at_.rows && from.data;
            const E* const source =  // of rows that are not there, any address that is
                valid ? token<const E>(from, in_, at_.first + row) + first_column + column
                      : static_cast<const E*>(p_.k.data);
            cp_async_16(to + row * stride + column, source, valid ? 16 : 0);
        }
    }
    DEVICE void copy_state(E* to, const E* from, int value, int columns) const {
        constexpr int kPieces = D / kPerCopy<E>;
        for (int i = thread_; i < columns * kPieces; i += kThreads) {
            const int row = i / kPieces, column = i % kPieces * kPerCopy<E>;
            cp_async_16(to + row * kStride + column, from + (value + row) * D + column);
        }
    }
    DEVICE void load_rows() const {
        copy_tokens(shared_.q, kStride, p_.q, 0, D);
        copy_tokens(shared_.k, kStride, p_.k, 0, D);
    }
    DEVICE void load_slice(int value, int columns) const {
        copy_tokens(shared_.v, kValueStride, p_.v, value, columns);
        copy_tokens(shared_.d_o, kValueStride, p_.d_o, value, columns);
        copy_tokens(shared_.d_v, kValueStride, p_.d_v, value, columns);
#pragma unroll
        for (int kind = 0; kind < kStateKinds; kind++)
            if (has_momentum_ || kind == kWeights || kind == kWeightsGradient)
                copy_state(shared_.states[kind], states_[kind], value, columns);
        if (anchor_ != states_[kWeights]) copy_state(shared_.anchor, anchor_, value, columns);
        cp_async_commit();
    }

    // ---- sums over the value columns ----

    DEVICE const E* anchor() const {
        return anchor_ == states_[kWeights] ? shared_.states[kWeights] : shared_.anchor;
    }

    // E = K W_anchor - V, columns of 16 dealt out to the warps of these rows.
    DEVICE void compute_errors(int columns) const {
#pragma unroll 1
        for (int first = split_ * 16; first < columns; first += Layout::kSplits * 16) {
            Accumulator<2> e = {};
            if (l2_) {
#pragma unroll
                for (int step = 0; step < D; step += 16) {
                    Block<E> block;
                    Left<E> left;
                    load_block<false, kStride>(block, shared_.k + row_ * kStride + step);
                    make_left(left, block);
                    multiply<false, kStride>(e, left, anchor() + first * kStride + step);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = (row_ + lane_ / 4 + i % 2 * 8) * kValueStride + first + i / 2 * 8 +
                               lane_ % 4 * 2;
                const float2 v = unpack<E>(pair_at(shared_.v + at));
                const float* const x = &e[i / 2][i % 2 * 2];
                pair_at(shared_.e + at) = pack<E>(x[0] - v.x, x[1] - v.y);
            }
        }
    }

    DEVICE void multiply_slice(int columns) {
        const E* const read_from = (reads_anchor_ ? anchor() : shared_.states[kWeights]) + column_;
#pragma unroll 1
        for (int n = 0; n < columns; n += 16) {
            const int rows = row_ * kValueStride + n, state = n * kStride + column_;
            Block<E> block;
            Left<E> left;
            load_block<false, kValueStride>(block, shared_.d_o + rows);
            make_left(left, block);
            multiply<true, kStride>(read_weights_, left, read_from + n * kStride);
            if (has_momentum_ && !reads_anchor_)
                multiply<true, kStride>(read_momenta_, left, shared_.states[kMomenta] + state);
            load_block<false, kValueStride>(block, shared_.e + rows);
            make_left(left, block);
            multiply<true, kStride>(learn_weights_, left, shared_.states[kWeightsGradient] + state);
            if (has_momentum_)
                multiply<true, kStride>(learn_momenta_, left,
                                        shared_.states[kMomentaGradient] + state);
            if (l2_) {
                load_block<false, kValueStride>(block, shared_.d_v + rows);
                make_left(left, block);
                multiply<true, kStride>(through_error_, left, anchor() + state);
            }
            if (!reads_anchor_) {
#pragma unroll
                for (int i = 0; i < kBlocksOfWarp; i++) {
                    const int b = warp_ + i * Layout::kWarps;
                    if (b >= kBlocks) continue;
                    load_block<false, kValueStride>(
                        block, shared_.d_o + block_row(b) * 16 * kValueStride + n);
                    make_left(left, block);
                    multiply<false, kValueStride>(
                        d_p_[i], left, shared_.e + block_column(b) * 16 * kValueStride + n);
                }
            }
        }
        if (!needs_products_) return;
        for (int i = thread_; i < columns * (D / 2); i += kThreads) {
            const int at = i / (D / 2) * kStride + i % (D / 2) * 2;
            const auto pair = [&](StateKind kind) {
                return unpack<E>(pair_at(shared_.states[kind] + at));
            };
            const float2 w = pair(kWeights), d_w = pair(kWeightsGradient);
            products_[kWeightsWeights] += d_w.x * w.x + d_w.y * w.y;
            if (!has_momentum_) continue;
            const float2 s = pair(kMomenta), d_s = pair(kMomentaGradient);
            products_[kWeightsMomenta] += d_w.x * s.x + d_w.y * s.y;
            products_[kMomentaMomenta] += d_s.x * s.x + d_s.y * s.y;
        }
    }
    DEVICE void sum_products() const {
#pragma unroll
        for (int i = 0; i < kProducts; i++) {
            float sum = products_[i];
#pragma unroll
            for (int distance = 16; distance; distance /= 2)
                sum += __shfl_xor_sync(~0u, sum, distance);
            if (lane_ == 0) shared_.products[warp_ * kProducts + i] = sum;
        }
    }

    // ---- tokens ----

    // dX and dA, whose rows are those of the states that were read.
    DEVICE void differentiate_scores() const {
        const int before = p_.read == TitansRead::before;
#pragma unroll
        for (int i = 0; i < kBlocksOfWarp; i++) {
            const int b = warp_ + i * Layout::kWarps;
            if (b >= kBlocks) continue;
            const int r = block_row(b) * 16, c = block_column(b) * 16;
            Accumulator<2> x = {};
#pragma unroll
            for (int step = 0; step < D; step += 16) {
                Block<E> block;
                Left<E> left;
                load_block<false, kStride>(block, shared_.q + r * kStride + step);
                make_left(left, block);
                multiply<false, kStride>(x, left, shared_.k + c * kStride + step);
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int row = r + lane_ / 4 + j % 2 * 8, column = c + j / 2 * 8 + lane_ % 4 * 2;
                const float2 a = pair_at(shared_.a + (row + 1 - before) * kScoreStride + column);
                const float* const d_p = &d_p_[i][j / 2][j % 2 * 2];
                const float* const scores = &x[j / 2][j % 2 * 2];
                pair_at(shared_.d_scores + row * kScoreStride + column) =
                    pack<E>(-d_p[0] * a.x, -d_p[1] * a.y);
                if (row >= before)
                    pair_at(shared_.d_a + (row - before) * kScoreStride + column) =
                        make_float2(-d_p[0] * scores[0], -d_p[1] * scores[1]);
            }
        }
    }

    // The dot products of this warp's columns of the rows with those of x, left for the sums over
    // all columns.
    DEVICE void dot_rows(typename Layout::Sum sum, const Accumulator<kTiles>& rows,
                         const E* x) const {
        float dots[2] = {};
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float2 other = unpack<E>(pair_at(x + (row_ + lane_ / 4 + half * 8) * kStride +
                                                       column_ + tile * 8 + lane_ % 4 * 2));
                dots[half] += rows[tile][half * 2] * other.x + rows[tile][half * 2 + 1] * other.y;
            }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            dots[half] += __shfl_xor_sync(~0u, dots[half], 1);
            dots[half] += __shfl_xor_sync(~0u, dots[half], 2);
            if (lane_ % 4 == 0)
                shared_
                    .sums[(sum * Layout::kSplits + split_) * kRows + row_ + lane_ / 4 + half * 8] =
                    dots[half];
        }
    }
    // read_weights_ becomes dQ.
    DEVICE void finish_queries() {
        if (reads_anchor_) return;
        dot_rows(Layout::kB, read_weights_, shared_.q);
        if (has_momentum_) dot_rows(Layout::kC, read_momenta_, shared_.q);
        const int before = p_.read == TitansRead::before;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int state = row_ + lane_ / 4 + half * 8 + 1 - before;
            const float b = shared_.b[state], c = shared_.c[state];
#pragma unroll
            for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; i++)
                    read_weights_[tile][i] =
                        b * read_weights_[tile][i] + c * read_momenta_[tile][i];
        }
#pragma unroll
        for (int n = 0; n < kRows; n += 16) {
            if (n > row_) continue;
            Block<E> block;
            Left<E> left;
            load_block<false, kScoreStride>(block, shared_.d_scores + row_ * kScoreStride + n);
            make_left(left, block);
            multiply<true, kStride>(read_weights_, left, shared_.k + n * kStride + column_);
        }
    }
    // through_error_ becomes dK; it comes as dV W_anchor^T.
    DEVICE void finish_keys() {
        dot_rows(Layout::kInWeights, learn_weights_, shared_.k);
        if (has_momentum_) dot_rows(Layout::kInMomenta, learn_momenta_, shared_.k);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = row_ + lane_ / 4 + half * 8;
            const float g = shared_.in_weights[row], u = shared_.in_momenta[row];
#pragma unroll
            for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; i++)
                    through_error_[tile][i] = -through_error_[tile][i] -
                                              g * learn_weights_[tile][i] -
                                              u * learn_momenta_[tile][i];
        }
        if (reads_anchor_) return;
#pragma unroll
        for (int n = 0; n < kRows; n += 16) {
            if (n < row_) continue;
            Block<E> block;
            Left<E> left;
            load_block<true, kScoreStride>(block, shared_.d_scores + n * kScoreStride + row_);
            make_left(left, block);
            multiply<true, kStride>(through_error_, left, shared_.q + n * kStride + column_);
        }
    }
    // dQ and dK take the places of Q and K.
    DEVICE void leave_rows() const {
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at =
                    (row_ + lane_ / 4 + half * 8) * kStride + column_ + tile * 8 + lane_ % 4 * 2;
                const float *const d_q = &read_weights_[tile][half * 2],
                                   *const d_k = &through_error_[tile][half * 2];
                pair_at(shared_.q + at) = pack<E>(d_q[0], d_q[1]);
                pair_at(shared_.k + at) = pack<E>(d_k[0], d_k[1]);
            }
    }
    DEVICE void store_rows() const {
        constexpr int kPieces = D / kPerCopy<E>;
        for (int i = thread_; i < at_.rows * kPieces; i += kThreads) {
            const int row = i / kPieces, column = i % kPieces * kPerCopy<E>;
            const auto store = [&](const TokenTensor& to, const E* from) {
                *reinterpret_cast<uint4*>(token<E>(to, in_, at_.first + row) + column) =
                    *reinterpret_cast<const uint4*>(from + row * kStride + column);
            };
            store(p_.d_q, shared_.q), store(p_.d_k, shared_.k);
        }
    }

    const Layout& shared_;
    const TitansParams& p_;
    const Sequence<kRows>& in_;
    const Segment& at_;
    const E* const (&states_)[kStateKinds];
    const E* const anchor_;
    const bool needs_products_, has_momentum_, l2_, reads_anchor_;
    const int thread_, warp_, lane_, split_;
    const int row_, column_;  // first of the warp's
    const GateGradients<typename Layout::Gates> gates_;
    Accumulator<kTiles> read_weights_ = {}, read_momenta_ = {};    // dO W^T, dO S^T
    Accumulator<kTiles> learn_weights_ = {}, learn_momenta_ = {};  // E dW'^T, E dS'^T
    Accumulator<kTiles> through_error_ = {};                       // dV W_anchor^T
    Accumulator<2> d_p_[kBlocksOfWarp] = {};                       // dO E^T
    float products_[kProducts] = {};
};

}  // namespace hope
