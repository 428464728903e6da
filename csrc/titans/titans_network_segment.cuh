// One segment of a memory of two layers, or with a norm, forward: the phases between a block's
// barriers. In the names of docs/derivations.md, all products transposed:
//
//   hidden_keys    Z = K W1, H = act(Z)                                    slices of F
//   outputs        Y = H W2                                                parts of V
//   errors         E, from Y, K and V, through the norm                    tokens
//   first_layer    G = (E W2^T) * act'(Z),                                 slices of F
//                  ZQ = b * (Q W1) + c * (Q S1) - (A * QK^T) G, HQ = act(ZQ), W1' and S1'
//   start_reads    b * (HQ W2) + c * (HQ S2)                               parts of V
//   finish_reads   - (A * HQ H^T) E                                        parts of V
//   update_last    W2' and S2'                                             slices of V
//   leave_outputs  O, through the norm                                     tokens
//
// All but E, H, HQ and the scores stay in the registers of the warp that has made them.
#pragma once
#include "common/layer_segment.cuh"
#include "titans/titans_network.cuh"

namespace hope {

template <class E, int D, int Tokens, int Layers>
struct NetworkLayout {
    using Tiles = LayerTiles<E, D, Tokens>;
    typename Tiles::ByToken k, q, e;
    typename Tiles::ByFeature z, h, hq;  // Z, H, HQ
    typename Tiles::ByFeature g, zq;     // G, ZQ: where they are kept
    typename Tiles::Square scores;
    float* sums;  // [Tokens][kSumStride] Y, or O
    float* a;     // A [Tokens][kScoreStride]
    Vectors<Tokens>* vectors;
    float2* gates;  // [Tokens] momentum and keep

    // Elements of a tile [F][Tokens].
    __host__ __device__ static int64_t hidden_elements(const TitansParams& p) {
        return Layers == 2 ? p.hidden_dim * (Tokens + kRowPadding) : 0;
    }
    // keeps: with all hidden tiles, for the backward; else HQ takes the place of Z. A lies at
    // `given_a` if that is not null.
    __host__ __device__ NetworkLayout(TileCarver& tiles, const TitansParams& p, bool keeps,
                                      float* given_a = nullptr)
        : NetworkLayout(tiles.shared(), tiles, given_a) {
        if (Layers == 1) return;
        const int64_t size = hidden_elements(p);
        z.data = tiles.template take<E>(size), h.data = tiles.template take<E>(size);
        hq = z;
        if (!keeps) return;
        hq.data = tiles.template take<E>(size);
        g.data = tiles.template take<E>(size), zq.data = tiles.template take<E>(size);
    }

 private:
    __host__ __device__ NetworkLayout(SharedCarver& carver, TileCarver& tiles, float* given_a)
        : k{carver.take<E>(Tokens * (D + kRowPadding))},
          q{carver.take<E>(Tokens * (D + kRowPadding))},
          e{carver.take<E>(Tokens * (D + kRowPadding))},
          z{},
          h{},
          hq{},
          g{},
          zq{},
          scores{carver.take<E>(Tokens * Tiles::kScoreStride)},
          sums(tiles.template take<float>(Tokens * Tiles::kSumStride)),
          a(given_a ? given_a : carver.take<float>(Tokens * Tiles::kScoreStride)),
          vectors(carver.take<Vectors<Tokens>>(1)),
          gates(carver.take<float2>(Tokens)) {}
};

// The mean and the inverse standard deviation of a row.
struct RowStatistics {
    float mean, inverse;
};

// Base: LayerSegment, or what extends it.
template <class E, int D, int Tokens, int Layers, class Base = LayerSegment<E, D, Tokens>>
class NetworkSegment : public Base {
 public:
    using Layout = NetworkLayout<E, D, Tokens, Layers>;
    using Tiles = typename Layout::Tiles;
    static constexpr int kLast = Layers - 1;
    static constexpr int kWide = Base::kWide;

    // of_base: what the base is made of.
    template <class... OfBase>
    DEVICE NetworkSegment(const Layout& shared, const TitansParams& p, const Sequence<Tokens>& in,
                          const OfBase&... of_base)
        : Base(of_base...),
          shared_(shared),
          p_(p),
          in_(in),
          keys_(static_cast<int>(p.key_dim)),
          values_(static_cast<int>(p.value_dim)),
          hidden_(static_cast<int>(Layers == 2 ? p.hidden_dim : p.key_dim)),
          l2_(p.objective == TitansObjective::l2),
          // A linear memory has a residual only with a norm, and is here only with one.
          residual_(p.residual),
          norm_weight_(matrix(p.norm_weight, in.index, in.head)),
          norm_bias_(matrix(p.norm_bias, in.index, in.head)) {}

    // ---- a segment's inputs ----

    // Starts to copy rows; those past the segment become zero.
    DEVICE void start_rows(const typename Tiles::ByToken& to, const TokenTensor& from, int columns,
                           const Segment& at) const {
        const int pieces = columns / kPerCopy<E>;
        for (int i = static_cast<int>(threadIdx.x); i < Tokens * pieces; i += kLayerThreads) {
            const int row = i / pieces, column = i % pieces * kPerCopy<E>;
            const bool valid = row < at.rows && from.data;
            const E* const source =  // of rows that are not there, any address that is
                valid ? token<const E>(from, in_, at.first + row) + column
                      : static_cast<const E*>(p_.k.data);
            cp_async_16(to.at(column, row), source, valid ? 16 : 0);
        }
    }
    DEVICE void start_keys(const Segment& at) const { start_rows(shared_.k, p_.k, keys_, at); }
    DEVICE void start_queries(const Segment& at) const { start_rows(shared_.q, p_.q, keys_, at); }
    DEVICE void start_values(const Segment& at) const { start_rows(shared_.e, p_.v, values_, at); }

    // Waits for what has been started; then the gates are here too. The learning rate of this
    // thread's token comes back.
    DEVICE float begin(const Segment& at) const {
        const int t = static_cast<int>(threadIdx.x);
        const Gates gates = load_gates(p_, in_, at.first + t, t < at.rows);
        if (t < Tokens) shared_.gates[t] = make_float2(gates.momentum, gates.keep);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        return gates.lr;
    }
    // A, b, c, m and the last rows of A and N.
    DEVICE_CALL void compute_coefficients(const Segment& at, float lr) const __restrict__ {
        recur<Tokens>(static_cast<int>(threadIdx.x), lr, shared_.gates, at.rows - 1,
                      p_.read == TitansRead::before, shared_.a, *shared_.vectors);
    }

    // ---- the state before the segment ----

    DEVICE_CALL void hidden_keys(const LayerMatrices& anchor) const __restrict__ {
        if constexpr (Layers == 2)
            Tiles::for_slices(hidden_, [&](int slice) {
                Accumulator<Tiles::kTokenTiles> z = {};
                multiply_state<false>(z, anchor.layer[0], slice, shared_.k, 0);
                for_pairs(z, slice, 0, [&](int f, int t, float x, float y) {
                    pair_at(shared_.z.at(f, t)) = pack<E>(x, y);
                    pair_at(shared_.h.at(f, t)) =
                        pack<E>(activate(p_.activation, x).value, activate(p_.activation, y).value);
                });
            });
    }
    // Whether the error depends on what the memory gives for K.
    DEVICE bool needs_outputs() const { return l2_ || norm_weight_; }
    DEVICE_CALL void outputs(const LayerMatrices& anchor) const __restrict__ {
        Tiles::for_part(values_, [&](int slice, int token) {
            Accumulator<Tiles::kPartTiles> y = {};
            multiply_state<false>(y, anchor.layer[kLast], slice, hidden_of_keys(), token);
            store_sums(shared_.sums, y, slice, token);
        });
    }
    // E in place of V.
    DEVICE_CALL void errors() const __restrict__ {
        const int t = Tiles::token_of_group();
        RowStatistics row{};
        float mean = 0, mean_y = 0;
        if (norm_weight_) {
            row = statistics(t);
            for_columns([&](int v) {
                const float y = normal(row, t, v), g = loss(row, t, v) * norm_weight_[v];
                mean += g, mean_y += g * y;
            });
            mean = Tiles::sum_of_group(mean) / values_;
            mean_y = Tiles::sum_of_group(mean_y) / values_;
        }
        for_columns([&](int v) {
            float e = loss(row, t, v);
            if (norm_weight_)
                e = row.inverse * (e * norm_weight_[v] - mean - normal(row, t, v) * mean_y);
            *shared_.e.at(v, t) = from_float<E>(e);
        });
    }

    // ---- the first layer ----

    DEVICE_CALL void score_first() const __restrict__ {
        if (Layers == 2 && !reads_anchor_) this->score(shared_.q, shared_.k, keys_, shared_.scores);
    }
    // Reads: with HQ. Keeps: and leaves G and ZQ in their tiles. Without a state to go to, nothing
    // is updated.
    template <bool Reads, bool Keeps, bool Updates>
    DEVICE_CALL void first_layer(const NetworkState& from, const LayerMatrices& anchor,
                                 const NetworkState& to) const __restrict__ {
        if constexpr (Layers == 2)
            Tiles::for_slices(hidden_, [&](int slice) {
                Accumulator<Tiles::kTokenTiles> g = {};
                multiply_state<true>(g, anchor.layer[1], slice, shared_.e, 0);
                for_pairs(g, slice, 0, [&](int f, int t, float& x, float& y) {
                    const float2 z = unpack<E>(pair_at(shared_.z.at(f, t)));
                    x *= activate(p_.activation, z.x).slope;
                    y *= activate(p_.activation, z.y).slope;
                    if (Keeps) pair_at(shared_.g.at(f, t)) = pack<E>(x, y);
                });
                if constexpr (Reads) {
                    Accumulator<Tiles::kTokenTiles> zq = {};
                    this->read_slice(zq, from.layer(0), anchor.layer[0], slice, shared_.q, 0);
                    if (!reads_anchor_) {
                        Accumulator<Tiles::kTokenTiles> of_errors = {};
#pragma unroll
                        for (int n = 0; n < Tokens / 16; n++) {
                            Block<E> block;
                            Left<E> left;
                            round_block<E>(block, g, n);
                            make_left(left, block);
                            shared_.scores.multiply_features(of_errors, left, n * 16, 0, n * 2);
                        }
                        subtract(zq, of_errors);
                    }
                    for_pairs(zq, slice, 0, [&](int f, int t, float x, float y) {
                        if (Keeps) pair_at(shared_.zq.at(f, t)) = pack<E>(x, y);
                        pair_at(shared_.hq.at(f, t)) = pack<E>(activate(p_.activation, x).value,
                                                               activate(p_.activation, y).value);
                    });
                }
                if constexpr (Updates)
                    this->update_rows(from.layer(0), to.layer(0), slice, shared_.k,
                                      [&](Block<E>& block, int n, const float* factor) {
                                          round_scaled<E>(block, g, n, factor);
                                      });
            });
    }

    // ---- the last layer ----

    using Sums = Accumulator<Tiles::kPartTiles>;

    DEVICE_CALL void score_last(const typename Tiles::Square& to) const __restrict__ {
        if (!reads_anchor_) this->score(hidden_of_queries(), hidden_of_keys(), hidden_, to);
    }
    DEVICE_CALL void start_reads(Sums& o, const NetworkState& from,
                                 const LayerMatrices& anchor) const __restrict__ {
        Tiles::for_part(values_, [&](int slice, int token) {
            this->read_slice(o, from.layer(kLast), anchor.layer[kLast], slice, hidden_of_queries(),
                             token);
        });
    }
    // O, to a tile like that of the sums.
    DEVICE_CALL void finish_reads(Sums& o, const typename Tiles::Square& scores, float* to) const
        __restrict__ {
        Tiles::for_part(values_, [&](int slice, int token) {
            if (!reads_anchor_) {
                Sums of_errors = {};
#pragma unroll
                for (int n = 0; n < Tokens / 16; n++) {
                    Block<E> block;
                    Left<E> left;
                    shared_.e.load_features(block, slice, n * 16);
                    make_left(left, block);
                    scores.multiply_features(of_errors, left, n * 16, token, n * 2 - token / 8);
                }
                subtract(o, of_errors);
            }
            store_sums(to, o, slice, token);
        });
    }
    DEVICE_CALL void update_last(const NetworkState& from, const NetworkState& to) const
        __restrict__ {
        Tiles::template for_pieces<kWide>(values_, hidden_, [&](int row, int column, auto width) {
            this->template update_piece<decltype(width)::value>(
                from.layer(kLast), to.layer(kLast), row, column, hidden_of_keys(),
                [&](Block<E>& scaled, int n, const float* factor) {
                    Block<E> block;
                    shared_.e.load_features(block, row, n * 16);
                    scale_columns<E>(scaled, block, factor + n * 16);
                });
        });
    }
    DEVICE_CALL void leave_outputs(const Segment& at) const __restrict__ {
        const int t = Tiles::token_of_group();
        RowStatistics row{};
        if (norm_weight_) row = statistics(t);
        if (t >= at.rows) return;
        const E* const q = token<const E>(p_.q, in_, at.first + t);
        E* const o = token<E>(p_.o, in_, at.first + t);
        for_columns([&](int v) {
            float x = sum(t, v);
            if (norm_weight_) x = normal(row, t, v) * norm_weight_[v] + norm_bias_[v];
            if (residual_) x += to_float(q[v]);
            o[v] = from_float<E>(x);
        });
    }

 protected:
    using Base::reads_anchor_;
    using Base::store_sums;
    using Base::subtract;

    // ---- pieces ----

    DEVICE auto hidden_of_keys() const {
        if constexpr (Layers == 2)
            return shared_.h;
        else
            return shared_.k;
    }
    DEVICE auto hidden_of_queries() const {
        if constexpr (Layers == 2)
            return shared_.hq;
        else
            return shared_.q;
    }

    DEVICE float& sum(int t, int v) const { return shared_.sums[t * Tiles::kSumStride + v]; }
    // body(v) for this thread's columns of its token's row.
    template <class Body>
    DEVICE void for_columns(const Body& body) const {
        for (int v = Tiles::rank_in_group(); v < values_; v += Tiles::kGroup) body(v);
    }
    DEVICE RowStatistics statistics(int t) const {
        float mean = 0, variance = 0;
        for_columns([&](int v) { mean += sum(t, v); });
        mean = Tiles::sum_of_group(mean) / values_;
        for_columns([&](int v) { variance += (sum(t, v) - mean) * (sum(t, v) - mean); });
        variance = Tiles::sum_of_group(variance) / values_;
        return {mean, 1 / sqrtf(variance + static_cast<float>(p_.norm_eps))};
    }
    DEVICE float normal(const RowStatistics& row, int t, int v) const {
        return (sum(t, v) - row.mean) * row.inverse;
    }
    // The inner loss's gradient at what the memory gives.
    DEVICE float loss(const RowStatistics& row, int t, int v) const {
        float x = -to_float(*shared_.e.at(v, t));
        if (!l2_) return x;
        x += norm_weight_ ? normal(row, t, v) * norm_weight_[v] + norm_bias_[v] : sum(t, v);
        return residual_ ? x + to_float(*shared_.k.at(v, t)) : x;
    }

    const Layout shared_;
    const TitansParams& p_;
    const Sequence<Tokens>& in_;
    const int keys_, values_, hidden_;
    const bool l2_, residual_;
    const float *const norm_weight_, *const norm_bias_;
};

}  // namespace hope
