// The phases of a chunk that the forward consists of. A phase is one launch, over all sequences
// that have the chunk; it says what product a block makes, and what becomes of two neighbouring
// sums. Its members are what all of a block's sums need; `wanted` and the products' depths are the
// same for the whole block. `layer` is the one whose matrix the result is, if it is a matrix.
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
    const RowMajor<E> h, z, slope;
    const bool learns;

    DEVICE CmsHidden(const CmsChunk<E>& chunk, int)
        : c(chunk), h(c.h()), z(c.z()), slope(c.g()), learns(c.learns()) {}
    DEVICE bool wanted() const { return true; }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        block.add({Factors<E>{c.x(), c.weights(0), c.dim()}});
    }
    DEVICE void leave(int t, int f, float z0, float z1) const {
        const Activated a0 = activate(c.p.activation, z0), a1 = activate(c.p.activation, z1);
        pair_at(h.at(t, f)) = pack<E>(a0.value, a1.value);
        if (c.backward())
            pair_at(z.at(t, f)) = pack<E>(z0, z1);
        else if (learns)
            pair_at(slope.at(t, f)) = pack<E>(a0.slope, a1.slope);
    }
};

// Y = X + H W2, and S, the errors times their rates. The backward has seen Y: it wants the errors.
template <class E>
struct CmsOutput {
    static constexpr CmsResult kResult = CmsResult::wide;
    static constexpr bool kLeftTurned = false, kRightTurned = false;
    const CmsChunk<E>& c;
    const RowMajor<E> x, y, target, s;
    const RowMajor<float> e;
    const bool writes, learns;

    DEVICE CmsOutput(const CmsChunk<E>& chunk, int)
        : c(chunk),
          x(c.x()),
          y(c.tokens(c.p.y)),
          target(c.tokens(c.p.target)),
          s(c.s()),
          e(c.e()),
          writes(c.of.pass == CmsPass::forward),
          learns(c.learns()) {}
    DEVICE bool wanted() const { return writes || learns; }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        const bool needs_output = writes || c.p.objective == CmsObjective::l2;
        block.add({Factors<E>{c.h(), c.weights(1), needs_output ? c.hidden_dim() : 0}});
    }
    DEVICE void leave(int t, int d, float y0, float y1) const {
        if (c.p.residual) {
            const float2 input = unpack<E>(pair_at(x.at(t, d)));
            y0 += input.x, y1 += input.y;
        }
        if (writes) pair_at(y.at(t, d)) = pack<E>(y0, y1);
        if (!learns) return;
        float2 error = unpack<E>(pair_at(target.at(t, d)));
        if (c.p.objective == CmsObjective::l2)
            error = make_float2(y0 - error.x, y1 - error.y);
        else if (c.p.objective == CmsObjective::dot)
            error = make_float2(-error.x, -error.y);
        const float lr = c.rate(t);
        pair_at(s.at(t, d)) = pack<E>(lr * error.x, lr * error.y);
        if (c.backward()) pair_at(e.at(t, d)) = error;
    }
};

// U = S W2^T, G = U * act'(Z). The backward keeps U.
template <class E>
struct CmsBack {
    static constexpr CmsResult kResult = CmsResult::hidden;
    static constexpr bool kLeftTurned = false, kRightTurned = true;
    const CmsChunk<E>& c;
    const RowMajor<E> g;  // the slopes before it

    DEVICE CmsBack(const CmsChunk<E>& chunk, int) : c(chunk), g(c.g()) {}
    DEVICE bool wanted() const { return c.learns(); }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        block.add({Factors<E>{c.s(), c.weights(1), c.dim()}});
    }
    DEVICE void leave(int t, int f, float u0, float u1) const {
        Pair<E>& place = pair_at(g.at(t, f));
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
    const float *const pending, *const from;
    float *const to, *const saved;  // where not null
    E* const rounded;               // the same

    DEVICE CmsLearn(const CmsChunk<E>& chunk, int of_layer)
        : c(chunk),
          layer(of_layer),
          pending(c.of.chunk == 0 ? c.of_sequence(c.p.pending, layer) : nullptr),
          from(c.weights_at(c.of.chunk, layer)),
          to(c.complete ? c.weights_to(c.of.chunk + 1, layer)
                        : c.of_sequence(c.p.final_pending, layer)),
          saved(c.of.pass == CmsPass::forward ? c.checkpoint(c.of.chunk + 1, layer) : nullptr),
          rounded(CmsLaunch<E>::kRounds && !c.last ? c.rounded_at(c.of.chunk + 1, layer)
                                                   : nullptr) {}
    DEVICE bool wanted() const { return c.learns(); }
    template <class Block>
    DEVICE void multiply(Block& block) const {
        block.add({layer ? Factors<E>{c.h(), c.s(), c.rows} : Factors<E>{c.x(), c.g(), c.rows}});
    }
    DEVICE void leave(int row, int column, float p0, float p1) const {
        const int64_t place = static_cast<int64_t>(row) * c.columns_of(layer) + column;
        float2 result = make_float2(p0, p1);
        if (pending) {
            const float2 p = pair_at(pending + place);
            result.x += p.x, result.y += p.y;
        }
        if (c.complete) {
            const float2 w = pair_at(from + place);
            result = make_float2(c.keep() * w.x - result.x, c.keep() * w.y - result.y);
        }
        pair_at(to + place) = result;
        if (rounded) pair_at(rounded + place) = pack<E>(result.x, result.y);
        if (saved) pair_at(saved + place) = result;
    }
};

}  // namespace hope
