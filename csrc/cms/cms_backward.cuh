// The phases of a chunk that the backward adds to the forward's (cms_forward.cuh). Where the chunk
// is learned, Q1 and Q2 are its lesson; all rows are then gradients of the loss times the lesson's
// sign.
#pragma once
#include "cms/cms_forward.cuh"

namespace hope {

// d_G = X Q1, from there d_U = d_G * act'(Z) and what d_Z gets, d_G * U * act''(Z); G takes U's
// place.
template <class E>
struct CmsThroughLesson {
    static constexpr CmsResult kResult = CmsResult::hidden;
    static constexpr bool kLeftTurned = false, kRightTurned = false;
    const CmsChunk<E>& c;
    const RowMajor<E> z, g, d_u;
    const RowMajor<float> parked;

    DEVICE CmsThroughLesson(const CmsChunk<E>& chunk, int)
        : c(chunk), z(c.z()), g(c.g()), d_u(c.d_u()), parked(c.parked()) {}
    DEVICE bool wanted() const { return c.learns(); }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        block.add({Factors<E>{c.x(), c.lesson(0), c.dim()}});
    }
    DEVICE void leave(int t, int f, float d_g0, float d_g1) const {
        const float2 at = unpack<E>(pair_at(z.at(t, f)));
        const Activated a0 = activate(c.p.activation, at.x), a1 = activate(c.p.activation, at.y);
        Pair<E>& place = pair_at(g.at(t, f));
        const float2 u = unpack<E>(place);
        place = pack<E>(u.x * a0.slope, u.y * a1.slope);
        pair_at(d_u.at(t, f)) = pack<E>(d_g0 * a0.slope, d_g1 * a1.slope);
        pair_at(parked.at(t, f)) = make_float2(d_g0 * u.x * a0.curve, d_g1 * u.y * a1.curve);
    }
};

// d_S = H Q2 + d_U W2
template <class E>
struct CmsThroughScaledErrors {
    static constexpr CmsResult kResult = CmsResult::wide;
    static constexpr bool kLeftTurned = false, kRightTurned = false;
    const CmsChunk<E>& c;
    const RowMajor<float> d_s;

    DEVICE CmsThroughScaledErrors(const CmsChunk<E>& chunk, int) : c(chunk), d_s(c.d_s()) {}
    DEVICE bool wanted() const { return c.learns(); }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        block.add({Factors<E>{c.h(), c.lesson(1), c.hidden_dim()},
                   Factors<E>{c.d_u(), c.weights(1), c.hidden_dim()}});
    }
    DEVICE void leave(int t, int d, float x, float y) const {
        pair_at(d_s.at(t, d)) = make_float2(x, y);
    }
};

// d_H = S Q2^T + d_Y W2^T, to d_Z
template <class E>
struct CmsThroughActivated {
    static constexpr CmsResult kResult = CmsResult::hidden;
    static constexpr bool kLeftTurned = false, kRightTurned = true;
    const CmsChunk<E>& c;
    const RowMajor<E> z, d_z;
    const RowMajor<float> parked;
    const bool learned;

    DEVICE CmsThroughActivated(const CmsChunk<E>& chunk, int)
        : c(chunk), z(c.z()), d_z(c.d_z()), parked(c.parked()), learned(c.learns()) {}
    DEVICE bool wanted() const { return true; }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        block.add({Factors<E>{c.s(), c.lesson(1), learned ? c.dim() : 0},
                   Factors<E>{c.d_y(), c.weights(1), c.dim()}});
    }
    DEVICE void leave(int t, int f, float d_h0, float d_h1) const {
        const float2 at = unpack<E>(pair_at(z.at(t, f)));
        float2 sum = learned ? pair_at(parked.at(t, f)) : make_float2(0, 0);
        sum.x += d_h0 * activate(c.p.activation, at.x).slope;
        sum.y += d_h1 * activate(c.p.activation, at.y).slope;
        pair_at(d_z.at(t, f)) = pack<E>(sum.x, sum.y);
    }
};

// d_X = G Q1^T + d_Z W1^T + d_Y
template <class E>
struct CmsThroughInput {
    static constexpr CmsResult kResult = CmsResult::wide;
    static constexpr bool kLeftTurned = false, kRightTurned = true;
    const CmsChunk<E>& c;
    const RowMajor<E> d_y, d_x;
    const float sign;

    DEVICE CmsThroughInput(const CmsChunk<E>& chunk, int)
        : c(chunk), d_y(c.d_y()), d_x(c.tokens(c.p.d_x)), sign(c.sign()) {}
    DEVICE bool wanted() const { return true; }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        block.add({Factors<E>{c.g(), c.lesson(0), c.learns() ? c.hidden_dim() : 0},
                   Factors<E>{c.d_z(), c.weights(0), c.hidden_dim()}});
    }
    DEVICE void leave(int t, int d, float x, float y) const {
        if (c.p.residual) {
            const float2 past = unpack<E>(pair_at(d_y.at(t, d)));
            x += past.x, y += past.y;
        }
        pair_at(d_x.at(t, d)) = pack<E>(sign * x, sign * y);
    }
};

// d_W <- keep d_W + X^T d_Z, and for the second layer H^T d_Y + d_U^T S: the lesson of the chunk
// before. A chunk that is not complete keeps all of d_W.
template <class E>
struct CmsThroughWeights {
    static constexpr CmsResult kResult = CmsResult::matrices;
    static constexpr bool kLeftTurned = true, kRightTurned = false;
    const CmsChunk<E>& c;
    const int layer;
    const bool learned;
    const float sign, keep;
    const float* const lesson;
    float *const d_weights, *const d_pending;  // the latter where not null
    E* const rounded;                          // the next lesson, where not null

    DEVICE CmsThroughWeights(const CmsChunk<E>& chunk, int of_layer)
        : c(chunk),
          layer(of_layer),
          learned(c.learns()),
          sign(c.sign()),
          keep(c.complete ? c.keep() : 1),
          lesson(c.lesson_at(layer)),
          d_weights(c.of_sequence(c.p.d_weights, layer)),
          d_pending(c.of.chunk == 0 ? c.of_sequence(c.p.d_pending, layer) : nullptr),
          rounded(CmsLaunch<E>::kRounds && c.of.chunk > 0
                      ? c.of_state(c.of.scratch.lesson, 0, layer)
                      : nullptr) {}
    DEVICE bool wanted() const { return true; }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        block.add({layer ? Factors<E>{c.h(), c.d_y(), c.rows} : Factors<E>{c.x(), c.d_z(), c.rows},
                   Factors<E>{c.d_u(), c.s(), layer && learned ? c.rows : 0}});
    }
    DEVICE void leave(int row, int column, float x, float y) const {
        const int64_t place = static_cast<int64_t>(row) * c.columns_of(layer) + column;
        if (d_pending) {
            const float2 q = learned ? pair_at(lesson + place) : make_float2(0, 0);
            pair_at(d_pending + place) = make_float2(sign * q.x, sign * q.y);
        }
        float2& d_w = pair_at(d_weights + place);
        const float2 result = make_float2(keep * d_w.x + sign * x, keep * d_w.y + sign * y);
        d_w = result;
        if (rounded) pair_at(rounded + place) = pack<E>(result.x, result.y);
    }
};

}  // namespace hope
