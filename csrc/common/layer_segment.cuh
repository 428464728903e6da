// What a segment does to a layer, forward: scores, reads and updates, by a warp for its share of
// rows. In the names of docs/derivations.md; a layer has queries, keys (its inputs) and errors.
#pragma once
#include "common/layers.cuh"

namespace hope {

template <class E, int D, int Tokens>
class LayerSegment {
 public:
    using Tiles = LayerTiles<E, D, Tokens>;
    // Columns of a state that a warp updates at a time: float operands need more registers.
    static constexpr int kWide = sizeof(E) == 4 ? 32 : 64;

    // a: A [Tokens][kScoreStride], the rows that tokens read. reads_anchor: they read nothing else.
    DEVICE LayerSegment(const float* a, const Vectors<Tokens>& vectors, bool reads_anchor)
        : a_(a), vectors_(vectors), reads_anchor_(reads_anchor) {}

 protected:
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

    // A * (queries keys^T), lower triangle.
    template <class Queries, class Keys>
    DEVICE void score(const Queries& queries, const Keys& keys, int terms,
                      const typename Tiles::Square& to) const {
        Tiles::for_lower_blocks([&](int row, int column) {
            Accumulator<2> x = {};
            multiply_scores(x, queries, keys, terms, row, column);
            for_square(row, column, [&](int t, int s, int tile, int i) {
                const float2 a = pair_at(a_ + t * Tiles::kScoreStride + s);
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
    DEVICE void read_slice(Accumulator<Count>& result, const LayerState& from,
                           const StateMatrix& anchor, int slice, const Queries& queries,
                           int token) const {
        Accumulator<Count> of_w = {}, of_s = {};
        if (reads_anchor_) {
            multiply_state<false>(of_w, anchor, slice, queries, token);
#pragma unroll
            for (int tile = 0; tile < Count; tile++)
#pragma unroll
                for (int i = 0; i < 4; i++) result[tile][i] = of_w[tile][i];
            return;
        }
        multiply_states<false>(of_w, of_s, from, slice, queries, token);
        combine(result, of_w, of_s, vectors_.read_b + token, vectors_.read_c + token);
    }

    // 16 rows of a layer's states after the segment: W' = b W + c S - (in_weights * errors^T) keys,
    // S' = m S - (in_momenta * errors^T) keys. scaled_errors(block, n, factors) gives tokens 16 n..
    template <class Keys, class ScaledErrors>
    DEVICE void update_rows(const LayerState& from, const LayerState& to, int row, const Keys& keys,
                            const ScaledErrors& scaled_errors) const {
        const int columns = from.w.columns;
        if (columns % kWide == 0)
            for (int column = 0; column < columns; column += kWide)
                update_piece<kWide>(from, to, row, column, keys, scaled_errors);
        else
            for (int column = 0; column < columns; column += 16)
                update_piece<16>(from, to, row, column, keys, scaled_errors);
    }
    template <int Columns, class Keys, class ScaledErrors>
    DEVICE void update_piece(const LayerState& from, const LayerState& to, int row, int column,
                             const Keys& keys, const ScaledErrors& scaled_errors) const {
        const Vectors<Tokens>& vectors = vectors_;
        const StateMatrix &w = from.w, &s = from.s;
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
                pair_at(to.w.at(r, c)) =
                    make_float2(vectors.b * old_w.x + vectors.c * old_s.x - x[0],
                                vectors.b * old_w.y + vectors.c * old_s.y - x[1]);
                if (s.data)
                    pair_at(to.s.at(r, c)) =
                        make_float2(vectors.m * old_s.x - y[0], vectors.m * old_s.y - y[1]);
            }
    }

    const float* const a_;
    const Vectors<Tokens>& vectors_;
    const bool reads_anchor_;
};

}  // namespace hope
