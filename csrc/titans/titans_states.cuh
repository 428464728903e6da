// The forward walk of a state warp through the segments of a sequence: with the reads it is the
// forward kernel, without them the backward's recomputation of the states.
#pragma once
#include "titans/titans_pipeline.cuh"

namespace hope {

template <class E, int D>
class StateWarp {
    using Layout = PipelineLayout<E, D>;
    static constexpr int kRows = Layout::kRows, kTiles = D / 8, kTokenTiles = kRows / 8;

 public:
    // `value` is the block's first value column.
    DEVICE StateWarp(const Layout& shared, const TitansParams& p, const Sequence<kRows>& in,
                     int value, int columns)
        : shared_(shared),
          p_(p),
          in_(in),
          threads_(columns * 2 + kHelpers),
          column_(static_cast<int>(threadIdx.x) / 32 * 16),
          at_{in.index, in.head, value + column_, static_cast<int>(p.value_dim)} {}

    // Starts from the state that was given; keeps the anchor if the sequence starts inside a chunk,
    // and leaves it, rounded and transposed, for others.
    DEVICE void start(E* rounded_anchor = nullptr) {
        if (in_.offset) {
            const bool is_final = in_.ends_inside_chunk() && in_.chunks() <= 1;
            load_state<D>(w_, at_.own(p_.anchor[0].data ? p_.anchor[0] : p_.weights[0]),
                          at_.value_dim);
            keep_anchor();
            if (rounded_anchor) store_rounded_state<D>(rounded_anchor, w_, at_.first);
            if (is_final && p_.final_anchor[0].data)
                store_state<D>(at_.own(p_.final_anchor[0]), w_, at_.value_dim);
        }
        load_state<D>(w_, at_.own(p_.weights[0]), at_.value_dim);
        load_state<D>(s_, at_.own(p_.momenta[0]), at_.value_dim);
    }
    DEVICE void start_from(const float* kept) {
        load_state<D>(w_, kept + at_.lane(), at_.value_dim);
        load_state<D>(s_, p_.momentum.data ? kept + D * at_.value_dim + at_.lane() : nullptr,
                      at_.value_dim);
    }
    // What the forward leaves in float at a segment's start.
    DEVICE void leave(const Segment& at) const {
        if (!at.new_chunk) return;
        if (float* const kept = checkpoint(p_, in_, at.chunk)) {
            store_state<D>(kept + at_.lane(), w_, at_.value_dim);
            if (p_.momentum.data)
                store_state<D>(kept + D * at_.value_dim + at_.lane(), s_, at_.value_dim);
        }
        if (at.chunk == in_.chunks() - 1 && in_.ends_inside_chunk())
            store_state<D>(at_.own(p_.final_anchor[0]), w_, at_.value_dim);
    }
    DEVICE void finish() const {
        store_state<D>(at_.own(p_.final_weights[0]), w_, at_.value_dim);
        if (p_.final_momenta[0].data)
            store_state<D>(at_.own(p_.final_momenta[0]), s_, at_.value_dim);
        if (!in_.ends_inside_chunk())
            store_state<D>(at_.own(p_.final_anchor[0]), w_, at_.value_dim);
    }
    // W^T and S^T, rounded, to [value_dim, D] matrices.
    DEVICE void leave_rounded(E* weights, E* momenta) const {
        store_rounded_state<D>(weights, w_, at_.first);
        if (p_.momentum.data) store_rounded_state<D>(momenta, s_, at_.first);
    }

    // The i-th segment of the walk: o over V's rows if Reads, then the state after it.
    template <bool Reads>
    DEVICE void step(int i, const Segment& at) {
        const int stage = i % shared_.stages, parity = i % 2;
        const E *const k = shared_.k + stage * Layout::kTile, *const q =
                                                                  shared_.q + stage * Layout::kTile;
        E* const v = shared_.x + stage * Layout::kValueTile + column_;
        const Vectors<kRows>& vectors = shared_.vectors[parity];
        const bool l2 = p_.objective == TitansObjective::l2, reads_anchor = reads_anchor_only();
        if (at.new_chunk && in_.parts > 1) keep_anchor();
        named_barrier_sync(kFull + parity, threads_);

        // Every rounding of the state serves all its uses at once, and once only: the compiler
        // would keep a rounded copy that is needed again in registers.
        Accumulator<kTokenTiles> o = {};
        Accumulator<kTokenTiles> e = {};  // minus the error, V^T - W^T K^T
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            Block<E> block;
            Left<E> left;
            round_block<E>(block, w_, n);
            if (!at.new_chunk) {
                if (Reads && !reads_anchor) {
                    make_left(left, block);
                    multiply<false, Layout::kStride>(o, left, q + n * 16);
                }
                load_anchor(block, n);
            }
            make_left(left, block);
            if (l2) multiply<false, Layout::kStride>(e, left, k + n * 16);
            if (Reads && (at.new_chunk || reads_anchor))
                multiply<false, Layout::kStride>(o, left, q + n * 16);
        }
#pragma unroll
        for (int n = 0; n < kRows / 16; n++) {
            Block<E> target;
            load_block<true, Layout::kValueStride>(target, v + n * 16 * Layout::kValueStride);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float* const x = &e[n * 2 + j / 2][j % 2 * 2];
                const float2 y = unpack<E>(target[j]);
                x[0] = y.x - x[0], x[1] = y.y - x[1];
            }
        }
        if (Reads) {
            if (!reads_anchor) read(o, e, q, shared_.scores + parity * Layout::kScoreTile, vectors);
            __syncwarp();  // all lanes have read V
#pragma unroll
            for (int tile = 0; tile < kTokenTiles; tile++)
                store_transposed<Layout::kValueStride>(v + tile * 8 * Layout::kValueStride,
                                                       o[tile]);
        }
        update(e, k, vectors);
        named_barrier_arrive(kEmpty + parity, threads_);
    }

 private:
    DEVICE bool reads_anchor_only() const { return p_.read == TitansRead::chunk; }

    // O^T = b * W^T Q^T (given) + c * S^T Q^T + e (scores)^T
    DEVICE void read(Accumulator<kTokenTiles>& o, const Accumulator<kTokenTiles>& e, const E* q,
                     const E* scores, const Vectors<kRows>& vectors) const {
        Accumulator<kTokenTiles> from_s = {};
        if (p_.momentum.data) {
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                Block<E> block;
                Left<E> left;
                round_block<E>(block, s_, n);
                make_left(left, block);
                multiply<false, Layout::kStride>(from_s, left, q + n * 16);
            }
        }
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; tile++) {
            const int token = tile * 8 + threadIdx.x % 4 * 2;
            const float2 b = pair_at(vectors.read_b + token), c = pair_at(vectors.read_c + token);
#pragma unroll
            for (int i = 0; i < 4; i++)
                o[tile][i] =
                    (i % 2 ? b.y : b.x) * o[tile][i] + (i % 2 ? c.y : c.x) * from_s[tile][i];
        }
#pragma unroll
        for (int n = 0; n < kRows / 16; n++) {
            Block<E> block;
            Left<E> left;
            round_block<E>(block, e, n);
            make_left(left, block);
            multiply<false, Layout::kScoreStride>(o, left, scores + n * 16, n * 2);
        }
    }

    // W' = b W + c S + (in_weights * e) K,  S' = m S + (in_momenta * e) K, all transposed
    DEVICE void update(const Accumulator<kTokenTiles>& e, const E* k,
                       const Vectors<kRows>& vectors) {
        const bool has_momentum = p_.momentum.data;
        const float b = vectors.b, c = vectors.c, m = vectors.m;
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                w_[tile][i] = b * w_[tile][i] + c * s_[tile][i];
                s_[tile][i] *= m;
            }
#pragma unroll
        for (int n = 0; n < kRows / 16; n++) {
            Block<E> scaled;
            Left<E> to_w, to_s;
            round_scaled<E>(scaled, e, n, vectors.in_weights);
            make_left(to_w, scaled);
            round_scaled<E>(scaled, e, n, vectors.in_momenta);
            make_left(to_s, scaled);
#pragma unroll
            for (int tile = 0; tile < kTiles; tile += 2) {
                Right<E> right[2];
                load_right<true, Layout::kStride>(right, k + n * 16 * Layout::kStride + tile * 8);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    mma<E>(w_[tile + i], to_w, right[i]);
                    if (has_momentum) mma<E>(s_[tile + i], to_s, right[i]);
                }
            }
        }
    }

    DEVICE Pair<E>* anchor_block(int n) const {
        return shared_.anchor + (n * (threads_ - kHelpers) + static_cast<int>(threadIdx.x)) * 4;
    }
    DEVICE void keep_anchor() const {
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            Block<E> block;
            round_block<E>(block, w_, n);
#pragma unroll
            for (int i = 0; i < 4; i++) anchor_block(n)[i] = block[i];
        }
    }
    DEVICE void load_anchor(Block<E>& block, int n) const {
#pragma unroll
        for (int i = 0; i < 4; i++) block[i] = anchor_block(n)[i];
    }

    const Layout& shared_;
    const TitansParams& p_;
    const Sequence<kRows>& in_;
    const int threads_, column_;  // the latter within the block
    const StateColumns at_;
    Accumulator<kTiles> w_, s_;
};

}  // namespace hope
