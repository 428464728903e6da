// What a layer's gradients are made of in a segment, by a warp for its share of rows. A layer has
// queries and keys (its inputs), d_out (the gradient of what its reads give) and errors; W, S are
// its states before the segment, dW', dS' their gradients after it.
#pragma once
#include "common/layer_segment.cuh"

namespace hope {

template <class E, int D, int Tokens>
class LayerGradients : public LayerSegment<E, D, Tokens> {
    using Base = LayerSegment<E, D, Tokens>;

 public:
    using Tiles = typename Base::Tiles;
    using Gates = GateTiles<Tokens, kLayerWarps, kLayerWarps>;

    // before: tokens read the state before them.
    DEVICE LayerGradients(const Gates& gates, const float* a, const Vectors<Tokens>& vectors,
                          bool reads_anchor, bool before, bool has_momenta)
        : Base(a, vectors, reads_anchor),
          gates_(gates),
          before_(before),
          has_momenta_(has_momenta),
          thread_(static_cast<int>(threadIdx.x)) {}

 protected:
    using Base::a_;
    using Base::reads_anchor_;
    using Base::vectors_;

    // X = queries keys^T, dP = - d_out errors^T, both lower triangles: dX = A * dP, and X * dP is
    // put, or added, to dA; A * X goes to `scores` if that is not null.
    template <bool Adds, class Queries, class Keys, class Outputs, class Errors>
    DEVICE void differentiate_scores(const Queries& queries, const Keys& keys, int in_terms,
                                     const Outputs& d_out, const Errors& errors, int out_terms,
                                     const typename Tiles::Square* scores,
                                     const typename Tiles::Square& d_scores) const {
        Tiles::for_lower_blocks([&](int row, int column) {
            Accumulator<2> x = {}, y = {};
            this->multiply_scores(x, queries, keys, in_terms, row, column);
            this->multiply_scores(y, d_out, errors, out_terms, row, column);
            this->for_square(row, column, [&](int t, int s, int tile, int i) {
                const float2 a = pair_at(a_ + t * Tiles::kScoreStride + s);
                if (scores)
                    pair_at(scores->at(s, t)) = pack<E>(x[tile][i] * a.x, x[tile][i + 1] * a.y);
                pair_at(d_scores.at(s, t)) = pack<E>(-y[tile][i] * a.x, -y[tile][i + 1] * a.y);
                if (t < before_) return;  // it reads what is before the segment
                float2& d_a = pair_at(gates_.d_a + (t - before_) * Gates::kScoreStride + s);
                const float2 old = Adds ? d_a : make_float2(0, 0);
                d_a = make_float2(old.x - x[tile][i] * y[tile][i],
                                  old.y - x[tile][i + 1] * y[tile][i + 1]);
            });
        });
    }

    // b * (W d_out^T) + c * (S d_out^T) + keys^T dX^T: of a layer's queries, 16 of their features.
    template <class Outputs, class Queries, class Keys, int Count>
    DEVICE void query_gradients(Accumulator<Count>& result, int slice, int token,
                                const Outputs& d_out, const Queries& queries, const Keys& keys,
                                const typename Tiles::Square& d_scores, const LayerState& from,
                                const StateMatrix& anchor) const {
        if (reads_anchor_) {
            multiply_state<true>(result, anchor, slice, d_out, token);
            return;
        }
        Accumulator<Count> of_w = {}, of_s = {};
        multiply_states<true>(of_w, of_s, from, slice, d_out, token);
        add_dots(Gates::kB, of_w, queries, slice, token);
        if (has_momenta_) add_dots(Gates::kC, of_s, queries, slice, token);
        combine(result, of_w, of_s, vectors_.read_b + token, vectors_.read_c + token);
#pragma unroll
        for (int n = 0; n < Tokens / 16; n++) {
            Block<E> block;
            Left<E> left;
            keys.load_features(block, slice, n * 16);
            make_left(left, block);
            d_scores.multiply_features(result, left, n * 16, token, n * 2 - token / 8);
        }
    }
    // queries^T dX - in_weights * (dW' errors^T) - in_momenta * (dS' errors^T): of a layer's keys.
    // Of a layer that is not read, only what its update gives.
    template <class Queries, class Errors, int Count>
    DEVICE void key_gradients(Accumulator<Count>& result, int slice, int token,
                              const Queries& queries, const typename Tiles::Square& d_scores,
                              const Errors& errors, const LayerState& d_after,
                              bool is_read = true) const {
        Accumulator<Count> of_w = {}, of_s = {};
        multiply_states<true>(of_w, of_s, d_after, slice, errors, token);
        combine(of_w, of_w, of_s, vectors_.in_weights + token, vectors_.in_momenta + token);
        this->subtract(result, of_w);
        if (reads_anchor_ || !is_read) return;
#pragma unroll
        for (int n = 0; n < Tokens / 16; n++) {
            Block<E> block;
            Left<E> left;
            queries.load_features(block, slice, n * 16);
            make_left(left, block);
            d_scores.multiply_tokens(result, left, n * 16, token, 0, n * 2 + 2 - token / 8);
        }
    }
    // - d_out^T P - in_weights * (dW'^T keys^T) - in_momenta * (dS'^T keys^T): of a layer's errors.
    // Of a layer that is not read, only what its update gives.
    template <class Outputs, class Keys, class Errors, int Count>
    DEVICE void error_gradients(Accumulator<Count>& result, int slice, int token,
                                const Outputs& d_out, const typename Tiles::Square& scores,
                                const Keys& keys, const Errors& errors, const LayerState& d_after,
                                bool is_read = true) const {
        Accumulator<Count> of_w = {}, of_s = {};
        multiply_states<false>(of_w, of_s, d_after, slice, keys, token);
        add_dots(Gates::kInWeights, of_w, errors, slice, token);
        if (has_momenta_) add_dots(Gates::kInMomenta, of_s, errors, slice, token);
        combine(of_w, of_w, of_s, vectors_.in_weights + token, vectors_.in_momenta + token);
        if (!reads_anchor_ && is_read) {
#pragma unroll
            for (int n = 0; n < Tokens / 16; n++) {
                Block<E> block;
                Left<E> left;
                d_out.load_features(block, slice, n * 16);
                make_left(left, block);
                scores.multiply_tokens(of_w, left, n * 16, token, 0, n * 2 + 2 - token / 8);
            }
        }
        this->subtract(result, of_w);
    }

    // Adds the tokens' dot products of 16 features, x with the tile's, to this warp's sums.
    template <class F, int Count>
    DEVICE void add_dots(typename Gates::Sum sum, const Accumulator<Count>& x, const F& features,
                         int slice, int token) const {
        const int lane = thread_ % 32, warp = thread_ / 32;
        float* const to =
            gates_.sums + (sum * Gates::kSplits + warp) * Tokens + token + lane % 4 * 2;
#pragma unroll
        for (int tile = 0; tile < Count; tile++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int t = token + tile * 8 + lane % 4 * 2 + i, f = slice + lane / 4;
                float dot = x[tile][i] * to_float(*features.at(f, t)) +
                            x[tile][i + 2] * to_float(*features.at(f + 8, t));
#pragma unroll
                for (int distance = 4; distance < 32; distance *= 2)
                    dot += __shfl_xor_sync(~0u, dot, distance);
                if (lane < 4) to[tile * 8 + i] += dot;
            }
    }

    // ---- states ----

    // sums += errors^T keys: rows are the errors' features, columns the keys'.
    template <class Errors, class Keys, int Count>
    DEVICE void multiply_gradient(Accumulator<Count>& sums, const Errors& errors, const Keys& keys,
                                  int row, int column) const {
#pragma unroll
        for (int n = 0; n < Tokens / 16; n++) {
            Block<E> block;
            Left<E> left;
            errors.load_features(block, row, n * 16);
            make_left(left, block);
            keys.multiply_tokens(sums, left, n * 16, column);
        }
    }
    // The states' gradients before the segment, in place of those after it, and the anchor's, which
    // wait in d_anchor until the chunk's start. more(to_w, to_anchor, row, column) adds to both
    // what is special to a memory.
    template <class Outputs, class Queries, class More>
    DEVICE void layer_gradient(const Segment& at, const LayerState& from, const LayerState& d_state,
                               const StateMatrix& d_anchor, const Outputs& d_out,
                               const Queries& queries, float (&products)[kProducts],
                               const More& more, bool is_read = true) const {
        const StateMatrix& w = from.w;
        Tiles::template for_pieces<32>(w.rows, w.columns, [&](int row, int column, auto width) {
            piece_gradient<decltype(width)::value>(at, row, column, from, d_state, d_anchor, d_out,
                                                   queries, products, more, is_read);
        });
    }
    template <int Columns, class Outputs, class Queries, class More>
    DEVICE void piece_gradient(const Segment& at, int row, int column, const LayerState& from,
                               const LayerState& d_state, const StateMatrix& d_anchor,
                               const Outputs& d_out, const Queries& queries,
                               float (&products)[kProducts], const More& more, bool is_read) const {
        const Vectors<Tokens>& vectors = vectors_;
        Accumulator<Columns / 8> to_w = {}, to_s = {}, to_anchor = {};
        if (reads_anchor_ && is_read) multiply_gradient(to_anchor, d_out, queries, row, column);
#pragma unroll
        for (int n = 0; n < Tokens / 16; n++) {
            if (reads_anchor_ || !is_read) continue;
            Block<E> block, scaled;
            Left<E> left;
            d_out.load_features(block, row, n * 16);
            scale_columns<E>(scaled, block, vectors.read_b + n * 16);
            make_left(left, scaled);
            queries.multiply_tokens(to_w, left, n * 16, column);
            if (!has_momenta_) continue;
            scale_columns<E>(scaled, block, vectors.read_c + n * 16);
            make_left(left, scaled);
            queries.multiply_tokens(to_s, left, n * 16, column);
        }
        more(to_w, to_anchor, row, column);
        const StateMatrix &d_w = d_state.w, &d_s = d_state.s, &w = from.w, &s = from.s;
        const int lane = thread_ % 32;
#pragma unroll
        for (int tile = 0; tile < Columns / 8; tile++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = row + lane / 4 + half * 8, c = column + tile * 8 + lane % 4 * 2;
                const float *const own_w = &to_w[tile][half * 2], *const own_s =
                                                                      &to_s[tile][half * 2];
                float2 pending =
                    make_float2(to_anchor[tile][half * 2], to_anchor[tile][half * 2 + 1]);
                if (d_anchor.data) {
                    float2& of_anchor = pair_at(d_anchor.at(r, c));
                    pending = make_float2(pending.x + of_anchor.x, pending.y + of_anchor.y);
                    const float2 none = make_float2(0, 0);
                    of_anchor = at.new_chunk ? none : pending;
                    if (!at.new_chunk) pending = none;
                }
                float2& of_w = pair_at(d_w.at(r, c));
                const float2 after_w = of_w, old_w = pair_at(w.at(r, c));
                of_w = make_float2(vectors.b * after_w.x + own_w[0] + pending.x,
                                   vectors.b * after_w.y + own_w[1] + pending.y);
                products[kWeightsWeights] += after_w.x * old_w.x + after_w.y * old_w.y;
                if (!d_s.data) continue;
                float2& of_s = pair_at(d_s.at(r, c));
                const float2 after_s = of_s, old_s = pair_at(s.at(r, c));
                of_s = make_float2(vectors.c * after_w.x + vectors.m * after_s.x + own_s[0],
                                   vectors.c * after_w.y + vectors.m * after_s.y + own_s[1]);
                products[kWeightsMomenta] += after_w.x * old_s.x + after_w.y * old_s.y;
                products[kMomentaMomenta] += after_s.x * old_s.x + after_s.y * old_s.y;
            }
    }

    const Gates& gates_;
    const bool before_, has_momenta_;
    const int thread_;
};

}  // namespace hope
