// The phases of a chunk that the forward consists of. A phase is one launch, over all sequences
// that have the chunk; it says what product a block makes, and what becomes of two neighbouring
// sums. `wanted` and `depth`s are the same for a whole block.
#pragma once
#include "cms/cms_chunk.cuh"
#include "common/activation.cuh"

namespace hope {

// What a phase's result is: rows of F numbers, rows of D, or both layers' matrices.
enum class CmsResult { hidden, wide, matrices };

// H = act(X W1), with what `back` needs of it, or all the backward.
template <class E>
struct CmsHidden {
    static constexpr CmsResult kResult = CmsResult::hidden;
    static constexpr bool kLeftTurned = false, kRightTurned = false;
    const CmsChunk<E>& c;
    const int layer;

    DEVICE bool wanted() const { return true; }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        block.add({Factors<E>{c.x(), c.weights(0), c.dim()}});
    }
    DEVICE void leave(int t, int f, float z0, float z1) const {
        const Activated a0 = activate(c.p.activation, z0), a1 = activate(c.p.activation, z1);
        pair_at(c.h().at(t, f)) = pack<E>(a0.value, a1.value);
        if (c.backward())
            pair_at(c.z().at(t, f)) = pack<E>(z0, z1);
        else if (c.learns())
            pair_at(c.g().at(t, f)) = pack<E>(a0.slope, a1.slope);
    }
};

// Y = X + H W2, and S, the errors times their rates. The backward has seen Y: it wants the errors.
template <class E>
struct CmsOutput {
    static constexpr CmsResult kResult = CmsResult::wide;
    static constexpr bool kLeftTurned = false, kRightTurned = false;
    const CmsChunk<E>& c;
    const int layer;

    DEVICE bool writes() const { return c.of.pass == CmsPass::forward; }
    DEVICE bool wanted() const { return writes() || c.learns(); }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        const bool needs_output = writes() || c.p.objective == CmsObjective::l2;
        block.add({Factors<E>{c.h(), c.weights(1), needs_output ? c.hidden_dim() : 0}});
    }
    DEVICE void leave(int t, int d, float y0, float y1) const {
        if (c.p.residual) {
            const float2 x = unpack<E>(pair_at(c.x().at(t, d)));
            y0 += x.x, y1 += x.y;
        }
        if (writes()) pair_at(c.tokens(c.p.y).at(t, d)) = pack<E>(y0, y1);
        if (!c.learns()) return;
        float2 e = unpack<E>(pair_at(c.tokens(c.p.target).at(t, d)));
        if (c.p.objective == CmsObjective::l2)
            e = make_float2(y0 - e.x, y1 - e.y);
        else if (c.p.objective == CmsObjective::dot)
            e = make_float2(-e.x, -e.y);
        const float lr = c.rate(t);
        pair_at(c.s().at(t, d)) = pack<E>(lr * e.x, lr * e.y);
        if (c.backward()) pair_at(c.e().at(t, d)) = e;
    }
};

// U = S W2^T, G = U * act'(Z). The backward keeps U.
template <class E>
struct CmsBack {
    static constexpr CmsResult kResult = CmsResult::hidden;
    static constexpr bool kLeftTurned = false, kRightTurned = true;
    const CmsChunk<E>& c;
    const int layer;

    DEVICE bool wanted() const { return c.learns(); }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        block.add({Factors<E>{c.s(), c.weights(1), c.dim()}});
    }
    DEVICE void leave(int t, int f, float u0, float u1) const {
        Pair<E>& place = pair_at(c.g().at(t, f));
        const float2 slope = c.backward() ? make_float2(1, 1) : unpack<E>(place);
        place = pack<E>(u0 * slope.x, u1 * slope.y);
    }
};

// W <- keep W - (P + X^T G), and with H^T S: a gradient never gets to memory, but for that of a
// chunk that is not complete.
template <class E>
struct CmsLearn {
    static constexpr CmsResult kResult = CmsResult::matrices;
    static constexpr bool kLeftTurned = true, kRightTurned = false;
    const CmsChunk<E>& c;
    const int layer;

    DEVICE bool wanted() const { return c.learns(); }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        block.add({layer ? Factors<E>{c.h(), c.s(), c.rows} : Factors<E>{c.x(), c.g(), c.rows}});
    }
    DEVICE void leave(int row, int column, float p0, float p1) const {
        const int64_t place = static_cast<int64_t>(row) * c.columns_of(layer) + column;
        const float* const before = c.of.chunk == 0 ? c.of_sequence(c.p.pending, layer) : nullptr;
        if (before) {
            const float2 p = pair_at(before + place);
            p0 += p.x, p1 += p.y;
        }
        if (!c.complete) {
            pair_at(c.of_sequence(c.p.final_pending, layer) + place) = make_float2(p0, p1);
            return;
        }
        const int next = c.of.chunk + 1;
        const float2 w = pair_at(c.weights_at(c.of.chunk, layer) + place);
        const float w0 = c.keep() * w.x - p0, w1 = c.keep() * w.y - p1;
        pair_at(c.weights_to(next, layer) + place) = make_float2(w0, w1);
        if constexpr (CmsLaunch<E>::kRounds)
            if (!c.last) pair_at(c.rounded_at(next, layer) + place) = pack<E>(w0, w1);
        if (c.of.pass != CmsPass::forward) return;
        if (float* const saved = c.checkpoint(next, layer))
            pair_at(saved + place) = make_float2(w0, w1);
    }
};

}  // namespace hope
