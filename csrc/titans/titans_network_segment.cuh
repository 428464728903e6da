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
#include "titans/titans_network.cuh"

namespace hope {

template <class E, int D, int Tokens, int Layers>
struct NetworkLayout {
    using Tiles = NetworkTiles<E, D, Tokens>;
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

template <class E, int D, int Tokens, int Layers>
class NetworkSegment {
 public:
    using Layout = NetworkLayout<E, D, Tokens, Layers>;
    using Tiles = typename Layout::Tiles;
    static constexpr int kLast = Layers - 1;
    // Columns of a state that a warp updates at a time: float operands need more registers.
    static constexpr int kWide = sizeof(E) == 4 ? 32 : 64;

    DEVICE NetworkSegment(const Layout& shared, const TitansParams& p, const Sequence<Tokens>& in)
        : shared_(shared),
          p_(p),
          in_(in),
          keys_(static_cast<int>(p.key_dim)),
          values_(static_cast<int>(p.value_dim)),
          hidden_(static_cast<int>(Layers == 2 ? p.hidden_dim : p.key_dim)),
          l2_(p.objective == TitansObjective::l2),
          reads_anchor_(p.read == TitansRead::chunk),
          // A linear memory has a residual only with a norm, and is here only with one.
          residual_(p.residual),
          norm_weight_(matrix(p.norm_weight, in.index, in.head)),
          norm_bias_(matrix(p.norm_bias, in.index, in.head)) {}

    // ---- a segment's inputs ----

    // Starts to copy rows; those past the segment become zero.
    DEVICE void start_rows(const typename Tiles::ByToken& to, const TokenTensor& from, int columns,
                           const Segment& at) const {
        const int pieces = columns / kPerCopy<E>;
        for (int i = static_cast<int>(threadIdx.x); i < Tokens * pieces; i += kNetworkThreads) {
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
    DEVICE_CALL void compute_coefficients(const Segment& at, float lr) const {
        recur<Tokens>(static_cast<int>(threadIdx.x), lr, shared_.gates, at.rows - 1,
                      p_.read == TitansRead::before, shared_.a, *shared_.vectors);
    }

    // ---- the state before the segment ----

    DEVICE_CALL void hidden_keys(const LayerMatrices& anchor) const {
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
    DEVICE_CALL void outputs(const LayerMatrices& anchor) const {
        Tiles::for_part(values_, [&](int slice, int token) {
            Accumulator<Tiles::kPartTiles> y = {};
            multiply_state<false>(y, anchor.layer[kLast], slice, hidden_of_keys(), token);
            store_sums(shared_.sums, y, slice, token);
        });
    }
    // E in place of V.
    DEVICE_CALL void errors() const {
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

    DEVICE_CALL void score_first() const {
        if (Layers == 2 && !reads_anchor_) score(shared_.q, shared_.k, keys_, shared_.scores);
    }
    // Reads: with HQ. Keeps: and leaves G and ZQ in their tiles. Without a state to go to, nothing
    // is updated.
    template <bool Reads, bool Keeps, bool Updates>
    DEVICE_CALL void first_layer(const NetworkState& from, const LayerMatrices& anchor,
                                 const NetworkState& to) const {
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
                    read_slice(zq, from, anchor, 0, slice, shared_.q, 0);
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
                    update_rows(from, to, 0, slice, shared_.k,
                                [&](Block<E>& block, int n, const float* factor) {
                                    round_scaled<E>(block, g, n, factor);
                                });
            });
    }

    // ---- the last layer ----

    using Sums = Accumulator<Tiles::kPartTiles>;

    DEVICE_CALL void score_last(const typename Tiles::Square& to) const {
        if (!reads_anchor_) score(hidden_of_queries(), hidden_of_keys(), hidden_, to);
    }
    DEVICE_CALL void start_reads(Sums& o, const NetworkState& from,
                                 const LayerMatrices& anchor) const {
        Tiles::for_part(values_, [&](int slice, int token) {
            read_slice(o, from, anchor, kLast, slice, hidden_of_queries(), token);
        });
    }
    // O, to a tile like that of the sums.
    DEVICE_CALL void finish_reads(Sums& o, const typename Tiles::Square& scores, float* to) const {
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
    DEVICE_CALL void update_last(const NetworkState& from, const NetworkState& to) const {
        Tiles::template for_pieces<kWide>(values_, hidden_, [&](int row, int column, auto width) {
            update_piece<decltype(width)::value>(from, to, kLast, row, column, hidden_of_keys(),
                                                 [&](Block<E>& scaled, int n, const float* factor) {
                                                     Block<E> block;
                                                     shared_.e.load_features(block, row, n * 16);
                                                     scale_columns<E>(scaled, block,
                                                                      factor + n * 16);
                                                 });
        });
    }
    DEVICE_CALL void leave_outputs(const Segment& at) const {
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
    template <int Count>
    DEVICE static void store_sums(float* to, Accumulator<Count>& from, int slice, int token) {
        for_pairs(from, slice, token, [&](int v, int t, float x, float y) {
            to[t * Tiles::kSumStride + v] = x, to[(t + 1) * Tiles::kSumStride + v] = y;
        });
    }
    template <int Count>
    DEVICE static void subtract(Accumulator<Count>& from, const Accumulator<Count>& x) {
#pragma unroll
        for (int tile = 0; tile < Count; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++) from[tile][i] -= x[tile][i];
    }

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

    // A * (queries keys^T), lower triangle.
    template <class Queries, class Keys>
    DEVICE void score(const Queries& queries, const Keys& keys, int terms,
                      const typename Tiles::Square& to) const {
        Tiles::for_lower_blocks([&](int row, int column) {
            Accumulator<2> x = {};
            multiply_scores(x, queries, keys, terms, row, column);
            for_square(row, column, [&](int t, int s, int tile, int i) {
                const float2 a = pair_at(shared_.a + t * Tiles::kScoreStride + s);
                pair_at(to.at(s, t)) = pack<E>(x[tile][i] * a.x, x[tile][i + 1] * a.y);
            });
        });
    }
    template <class Queries, class Keys>
    DEVICE static void multiply_scores(Accumulator<2>& x, const Queries& queries, const Keys& keys,
                                       int terms, int row, int column) {
#pragma unroll 2
        for (int step = 0; step < terms; step += 16) {
            Block<E> block;
            Left<E> left;
            queries.load_tokens(block, row, step);
            make_left(left, block);
            keys.multiply_features(x, left, step, column);
        }
    }
    // body(t, s, tile, i) for the pairs (t, s), (t, s + 1) of a 16x16 block, which are elements i
    // and i + 1 of the tile.
    template <class Body>
    DEVICE static void for_square(int row, int column, const Body& body) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int tile = 0; tile < 2; tile++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                body(row + lane / 4 + half * 8, column + tile * 8 + lane % 4 * 2, tile, half * 2);
    }

    // What a layer's states give for queries: b * (W^T queries^T) + c * (S^T queries^T), or the
    // anchor's.
    template <class Queries, int Count>
    DEVICE void read_slice(Accumulator<Count>& result, const NetworkState& from,
                           const LayerMatrices& anchor, int layer, int slice,
                           const Queries& queries, int token) const {
        Accumulator<Count> of_w = {}, of_s = {};
        if (reads_anchor_) {
            multiply_state<false>(of_w, anchor.layer[layer], slice, queries, token);
#pragma unroll
            for (int tile = 0; tile < Count; tile++)
#pragma unroll
                for (int i = 0; i < 4; i++) result[tile][i] = of_w[tile][i];
            return;
        }
        multiply_states<false>(of_w, of_s, from.weights.layer[layer], from.momenta.layer[layer],
                               slice, queries, token);
        combine(result, of_w, of_s, shared_.vectors->read_b + token,
                shared_.vectors->read_c + token);
    }

    // 16 rows of a layer's states after the segment: W' = b W + c S - (in_weights * errors^T) keys,
    // S' = m S - (in_momenta * errors^T) keys. scaled_errors(block, n, factors) gives tokens 16 n..
    template <class Keys, class ScaledErrors>
    DEVICE void update_rows(const NetworkState& from, const NetworkState& to, int layer, int row,
                            const Keys& keys, const ScaledErrors& scaled_errors) const {
        const int columns = from.weights.layer[layer].columns;
        if (columns % kWide == 0)
            for (int column = 0; column < columns; column += kWide)
                update_piece<kWide>(from, to, layer, row, column, keys, scaled_errors);
        else
            for (int column = 0; column < columns; column += 16)
                update_piece<16>(from, to, layer, row, column, keys, scaled_errors);
    }
    template <int Columns, class Keys, class ScaledErrors>
    DEVICE void update_piece(const NetworkState& from, const NetworkState& to, int layer, int row,
                             int column, const Keys& keys,
                             const ScaledErrors& scaled_errors) const {
        const Vectors<Tokens>& vectors = *shared_.vectors;
        const StateMatrix &w = from.weights.layer[layer], &s = from.momenta.layer[layer];
        Accumulator<Columns / 8> to_w = {}, to_s = {};
#pragma unroll
        for (int n = 0; n < Tokens / 16; n++) {
            Block<E> block;
            Left<E> left;
            scaled_errors(block, n, vectors.in_weights);
            make_left(left, block);
            keys.multiply_tokens(to_w, left, n * 16, column);
            if (!s.data) continue;
            scaled_errors(block, n, vectors.in_momenta);
            make_left(left, block);
            keys.multiply_tokens(to_s, left, n * 16, column);
        }
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int tile = 0; tile < Columns / 8; tile++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = row + lane / 4 + half * 8, c = column + tile * 8 + lane % 4 * 2;
                const float2 old_w = pair_at(w.at(r, c)),
                             old_s = s.data ? pair_at(s.at(r, c)) : make_float2(0, 0);
                const float *const x = &to_w[tile][half * 2], *const y = &to_s[tile][half * 2];
                pair_at(to.weights.layer[layer].at(r, c)) =
                    make_float2(vectors.b * old_w.x + vectors.c * old_s.x - x[0],
                                vectors.b * old_w.y + vectors.c * old_s.y - x[1]);
                if (s.data)
                    pair_at(to.momenta.layer[layer].at(r, c)) =
                        make_float2(vectors.m * old_s.x - y[0], vectors.m * old_s.y - y[1]);
            }
    }

    const Layout& shared_;
    const TitansParams& p_;
    const Sequence<Tokens>& in_;
    const int keys_, values_, hidden_;
    const bool l2_, reads_anchor_, residual_;
    const float *const norm_weight_, *const norm_bias_;
};

}  // namespace hope
