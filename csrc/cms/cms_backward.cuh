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
    const int layer;

    DEVICE bool wanted() const { return c.learns(); }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        block.add({Factors<E>{c.x(), c.lesson(0), c.dim()}});
    }
    DEVICE void leave(int t, int f, float d_g0, float d_g1) const {
        const float2 z = unpack<E>(pair_at(c.z().at(t, f)));
        const Activated a0 = activate(c.p.activation, z.x), a1 = activate(c.p.activation, z.y);
        Pair<E>& place = pair_at(c.g().at(t, f));
        const float2 u = unpack<E>(place);
        place = pack<E>(u.x * a0.slope, u.y * a1.slope);
        pair_at(c.d_u().at(t, f)) = pack<E>(d_g0 * a0.slope, d_g1 * a1.slope);
        pair_at(c.parked().at(t, f)) = make_float2(d_g0 * u.x * a0.curve, d_g1 * u.y * a1.curve);
    }
};

// d_S = H Q2 + d_U W2
template <class E>
struct CmsThroughScaledErrors {
    static constexpr CmsResult kResult = CmsResult::wide;
    static constexpr bool kLeftTurned = false, kRightTurned = false;
    const CmsChunk<E>& c;
    const int layer;

    DEVICE bool wanted() const { return c.learns(); }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        block.add({Factors<E>{c.h(), c.lesson(1), c.hidden_dim()},
                   Factors<E>{c.d_u(), c.weights(1), c.hidden_dim()}});
    }
    DEVICE void leave(int t, int d, float x, float y) const {
        pair_at(c.d_s().at(t, d)) = make_float2(x, y);
    }
};

// d_H = S Q2^T + d_Y W2^T, to d_Z
template <class E>
struct CmsThroughActivated {
    static constexpr CmsResult kResult = CmsResult::hidden;
    static constexpr bool kLeftTurned = false, kRightTurned = true;
    const CmsChunk<E>& c;
    const int layer;

    DEVICE bool wanted() const { return true; }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        block.add({Factors<E>{c.s(), c.lesson(1), c.learns() ? c.dim() : 0},
                   Factors<E>{c.d_y(), c.weights(1), c.dim()}});
    }
    DEVICE void leave(int t, int f, float d_h0, float d_h1) const {
        const float2 z = unpack<E>(pair_at(c.z().at(t, f)));
        float2 d_z = c.learns() ? pair_at(c.parked().at(t, f)) : make_float2(0, 0);
        d_z.x += d_h0 * activate(c.p.activation, z.x).slope;
        d_z.y += d_h1 * activate(c.p.activation, z.y).slope;
        pair_at(c.d_z().at(t, f)) = pack<E>(d_z.x, d_z.y);
    }
};

// d_X = G Q1^T + d_Z W1^T + d_Y
template <class E>
struct CmsThroughInput {
    static constexpr CmsResult kResult = CmsResult::wide;
    static constexpr bool kLeftTurned = false, kRightTurned = true;
    const CmsChunk<E>& c;
    const int layer;

    DEVICE bool wanted() const { return true; }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        block.add({Factors<E>{c.g(), c.lesson(0), c.learns() ? c.hidden_dim() : 0},
                   Factors<E>{c.d_z(), c.weights(0), c.hidden_dim()}});
    }
    DEVICE void leave(int t, int d, float x, float y) const {
        if (c.p.residual) {
            const float2 d_y = unpack<E>(pair_at(c.d_y().at(t, d)));
            x += d_y.x, y += d_y.y;
        }
        pair_at(c.tokens(c.p.d_x).at(t, d)) = pack<E>(c.sign() * x, c.sign() * y);
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

    DEVICE bool wanted() const { return true; }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        block.add({layer ? Factors<E>{c.h(), c.d_y(), c.rows} : Factors<E>{c.x(), c.d_z(), c.rows},
                   Factors<E>{c.d_u(), c.s(), layer && c.learns() ? c.rows : 0}});
    }
    DEVICE void leave(int row, int column, float x, float y) const {
        const int64_t place = static_cast<int64_t>(row) * c.columns_of(layer) + column;
        const float sign = c.sign();
        float* const d_pending = c.of.chunk == 0 ? c.of_sequence(c.p.d_pending, layer) : nullptr;
        if (d_pending) {
            const float2 q = c.learns() ? pair_at(c.lesson_at(layer) + place) : make_float2(0, 0);
            pair_at(d_pending + place) = make_float2(sign * q.x, sign * q.y);
        }
        float2& d_w = pair_at(c.of_sequence(c.p.d_weights, layer) + place);
        const float keep = c.complete ? c.keep() : 1;
        const float x1 = keep * d_w.x + sign * x, y1 = keep * d_w.y + sign * y;
        d_w = make_float2(x1, y1);
        if constexpr (CmsLaunch<E>::kRounds)
            if (c.of.chunk > 0) pair_at(of_lesson() + place) = pack<E>(x1, y1);
    }
    DEVICE E* of_lesson() const { return c.of_state(c.of.scratch.lesson, 0, layer); }
};

}  // namespace hope
