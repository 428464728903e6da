// The backward walk of a state warp: dW^T and dS^T [16 value columns x D] in its accumulators, from
// a sequence's last segment to its first.
#pragma once
#include "titans/titans_windows.cuh"

namespace hope {

template <class E, int D>
class GradientWarp {
    using Layout = PipelineLayout<E, D>;
    static constexpr int kRows = Layout::kRows, kTiles = D / 8, kTokenTiles = kRows / 8;

 public:
    DEVICE GradientWarp(const Layout& shared, const TitansParams& p, const Sequence<kRows>& in,
                        int value, int columns)
        : shared_(shared),
          p_(p),
          in_(in),
          threads_(columns * 2 + kHelpers),
          column_(static_cast<int>(threadIdx.x) / 32 * 16),
          at_{in.index, in.head, value + column_, static_cast<int>(p.value_dim)} {}

    // The gradients of what the sequence ends with. A chunk that is complete has the final weights
    // as its anchor.
    DEVICE void start() {
        load_state<D>(w_, at_.own(p_.d_final_anchor[0]), at_.value_dim);
        if (in_.ends_inside_chunk()) {
            store_state<D>(to_anchor(), w_, at_.value_dim);
            anchor_pending_ = true;
        }
        if (anchor_pending_) load_state<D>(w_, nullptr, at_.value_dim);
        if (const float* const d_weights = at_.own(p_.d_final_weights[0]))
            for_elements<D>(d_weights, at_.value_dim,
                            [&](int tile, int i, float x) { w_[tile][i] += x; });
        load_state<D>(s_, at_.own(p_.d_final_momenta[0]), at_.value_dim);
    }
    // Goes on where another launch stopped, at a chunk's start: nothing is pending there.
    DEVICE void go_on() {
        load_state<D>(w_, at_.own(p_.d_weights[0]), at_.value_dim);
        load_state<D>(s_, at_.own(p_.d_momenta[0]), at_.value_dim);
    }
    DEVICE void stop(bool at_start_of_sequence) {
        store_state<D>(at_.own(p_.d_weights[0]), w_, at_.value_dim);
        if (p_.d_momenta[0].data) store_state<D>(at_.own(p_.d_momenta[0]), s_, at_.value_dim);
        if (at_start_of_sequence && !anchor_pending_)
            for_elements<D>(to_anchor(), at_.value_dim, [](int, int, float& x) { x = 0; });
    }
    // dW^T and dS^T, rounded, to [value_dim, D] matrices.
    DEVICE void leave_rounded(E* weights, E* momenta) const {
        store_rounded_state<D>(weights, w_, at_.first);
        if (p_.momentum.data) store_rounded_state<D>(momenta, s_, at_.first);
    }

    // The state's products before the sequence's first segment (titans_windows.cuh).
    DEVICE void leave_products(float* products) const {
        const float *const weights = at_.own(p_.weights[0]), *const momenta =
                                                                 at_.own(p_.momenta[0]);
        float sums[kProducts] = {};
        for_elements<D>(weights, at_.value_dim, [&](int tile, int i, float x) {
            sums[kWeightsWeights] += w_[tile][i] * x;
        });
        if (momenta)
            for_elements<D>(momenta, at_.value_dim, [&](int tile, int i, float x) {
                sums[kWeightsMomenta] += w_[tile][i] * x;
                sums[kMomentaMomenta] += s_[tile][i] * x;
            });
#pragma unroll
        for (int i = 0; i < kProducts; i++) {
#pragma unroll
            for (int distance = 16; distance; distance /= 2)
                sums[i] += __shfl_xor_sync(~0u, sums[i], distance);
            if (threadIdx.x % 32 == 0) products[at_.first / 16 * kProducts + i] = sums[i];
        }
    }

    // The i-th segment of the walk: dV over dO's rows, then the gradients of the state before it.
    DEVICE void step(int i, const Segment& at) {
        const int stage = i % shared_.stages, parity = i % 2;
        const E *const k = shared_.k + stage * Layout::kTile, *const q =
                                                                  shared_.q + stage * Layout::kTile;
        E* const d_o = shared_.x + stage * Layout::kValueTile + column_;
        const Vectors<kRows>& vectors = shared_.vectors[parity];
        named_barrier_sync(kFull + parity, threads_);

        Accumulator<kTokenTiles> d_v = {};
        through_state(d_v, k, vectors);
        if (p_.read != TitansRead::chunk) {
            const E* const scores = shared_.scores + parity * Layout::kScoreTile;
#pragma unroll
            for (int n = 0; n < kRows / 16; n++) {
                Block<E> block;
                Left<E> left;
                load_block<true, Layout::kValueStride>(block, d_o + n * 16 * Layout::kValueStride);
                make_left(left, block);
                multiply<true, Layout::kScoreStride>(
                    d_v, left, scores + n * 16 * Layout::kScoreStride, 0, n * 2 + 2);
            }
        }
        through_reads(d_o, q, vectors);
        if (at.new_chunk)
            into_weights(d_v, d_o, k, q);
        else
            into_anchor(d_v, d_o, k, q);
        __syncwarp();  // all lanes have read dO
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; tile++)
            store_transposed<Layout::kValueStride>(d_o + tile * 8 * Layout::kValueStride,
                                                   d_v[tile]);
        named_barrier_arrive(kEmpty + parity, threads_);
    }

 private:
    DEVICE float* to_anchor() const { return at_.own(p_.d_anchor[0]); }
    DEVICE int element(int tile, int i) const {
        return (tile * 8 + i % 2) * at_.value_dim + i / 2 * 8;
    }

    // dV = -dE: in_weights * (dW^T K^T) + in_momenta * (dS^T K^T)
    DEVICE void through_state(Accumulator<kTokenTiles>& d_v, const E* k,
                              const Vectors<kRows>& vectors) const {
        Accumulator<kTokenTiles> of_s = {};
        const bool has_momentum = p_.momentum.data;
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            Block<E> block;
            Left<E> of_weights, of_momenta;
            round_block<E>(block, w_, n);
            make_left(of_weights, block);
            round_block<E>(block, s_, n);
            make_left(of_momenta, block);
#pragma unroll
            for (int tile = 0; tile < kTokenTiles; tile += 2) {
                Right<E> right[2];
                load_right<false, Layout::kStride>(right, k + tile * 8 * Layout::kStride + n * 16);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    mma<E>(d_v[tile + j], of_weights, right[j]);
                    if (has_momentum) mma<E>(of_s[tile + j], of_momenta, right[j]);
                }
            }
        }
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; tile++) {
            const int token = tile * 8 + threadIdx.x % 4 * 2;
            const float2 g = pair_at(vectors.in_weights + token),
                         u = pair_at(vectors.in_momenta + token);
#pragma unroll
            for (int i = 0; i < 4; i++)
                d_v[tile][i] =
                    (i % 2 ? g.y : g.x) * d_v[tile][i] + (i % 2 ? u.y : u.x) * of_s[tile][i];
        }
    }

    // dS = c' dW + m dS + (c * dO)^T Q,  dW = b' dW + (b * dO)^T Q, all transposed
    DEVICE void through_reads(const E* d_o, const E* q, const Vectors<kRows>& vectors) {
        const bool has_momentum = p_.momentum.data;
        const float b = vectors.b, c = vectors.c, m = vectors.m;
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s_[tile][i] = c * w_[tile][i] + m * s_[tile][i];
                w_[tile][i] *= b;
            }
        if (p_.read == TitansRead::chunk) return;
#pragma unroll
        for (int n = 0; n < kRows / 16; n++) {
            Block<E> block, scaled;
            Left<E> to_w, to_s;
            load_block<true, Layout::kValueStride>(block, d_o + n * 16 * Layout::kValueStride);
            scale_columns<E>(scaled, block, vectors.read_b + n * 16);
            make_left(to_w, scaled);
            scale_columns<E>(scaled, block, vectors.read_c + n * 16);
            make_left(to_s, scaled);
#pragma unroll
            for (int tile = 0; tile < kTiles; tile += 2) {
                Right<E> right[2];
                load_right<true, Layout::kStride>(right, q + n * 16 * Layout::kStride + tile * 8);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    mma<E>(w_[tile + j], to_w, right[j]);
                    if (has_momentum) mma<E>(s_[tile + j], to_s, right[j]);
                }
            }
        }
    }

    // What reaches the anchor's tiles from `tile` on: dE^T K (l2), dO^T Q (read "chunk").
    template <int Tiles>
    DEVICE void add_anchor(Accumulator<Tiles>& to, const Accumulator<kTokenTiles>& d_v,
                           const E* d_o, const E* k, const E* q, int tile) const {
#pragma unroll
        for (int n = 0; n < kRows / 16; n++) {
            Block<E> block;
            Left<E> left;
            const int first = n * 16 * Layout::kStride + tile * 8;
            if (p_.objective == TitansObjective::l2) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float* const x = &d_v[n * 2 + i / 2][i % 2 * 2];
                    block[i] = pack<E>(-x[0], -x[1]);
                }
                make_left(left, block);
                multiply<true, Layout::kStride>(to, left, k + first);
            }
            if (p_.read == TitansRead::chunk) {
                load_block<true, Layout::kValueStride>(block, d_o + n * 16 * Layout::kValueStride);
                make_left(left, block);
                multiply<true, Layout::kStride>(to, left, q + first);
            }
        }
    }
    DEVICE void into_weights(const Accumulator<kTokenTiles>& d_v, const E* d_o, const E* k,
                             const E* q) {
        add_anchor<kTiles>(w_, d_v, d_o, k, q, 0);
        if (anchor_pending_)
            for_elements<D>(to_anchor(), at_.value_dim,
                            [&](int tile, int i, float x) { w_[tile][i] += x; });
        anchor_pending_ = false;
    }
    // Segments inside a chunk gather the anchor's gradient in memory, each lane its own elements.
    DEVICE void into_anchor(const Accumulator<kTokenTiles>& d_v, const E* d_o, const E* k,
                            const E* q) {
#pragma unroll 1
        for (int tile = 0; tile < kTiles; tile += 2) {
            Accumulator<2> sum = {};
            add_anchor<2>(sum, d_v, d_o, k, q, tile);
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float& to = to_anchor()[element(tile + j, i)];
                    to = (anchor_pending_ ? to : 0) + sum[j][i];
                }
        }
        anchor_pending_ = true;
    }

    const Layout& shared_;
    const TitansParams& p_;
    const Sequence<kRows>& in_;
    const int threads_, column_;
    const StateColumns at_;
    bool anchor_pending_ = false;
    Accumulator<kTiles> w_, s_;
};

}  // namespace hope
