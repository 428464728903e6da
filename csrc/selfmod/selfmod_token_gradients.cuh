// From the gradients of what a segment's tokens have generated to those of the tokens: the phases
// between a block's barriers, after those of selfmod_gradients.cuh.
//
//   system      dK K^T and what A receives | dK; the gates' recurrences in reverse
//   generate    the gradient dF of what a memory gave x, from dK through the norm, dV, or a gate's
//   |
//               dZ of x's way through the memory | dX += dZ W1^T, dW1, dW2 of the anchor
#pragma once
#include "selfmod/selfmod_gradients.cuh"

namespace hope {

template <class E, int D, int Tokens, int Layers>
class SelfmodTokenGradients : public SelfmodGradients<E, D, Tokens, Layers> {
    using Base = SelfmodGradients<E, D, Tokens, Layers>;

 public:
    using Tiles = typename Base::Tiles;
    using Gates = typename Base::Gates;
    using Sums = typename Base::Sums;
    using Hidden = typename Base::Hidden;
    using Base::Base;

    // Through the system L = K K^T * A and the gates; ends after a barrier.
    DEVICE void through_system(const Segment& at) const {
        differentiate_system();
        __syncthreads();
        add_similar_keys();
        through_recurrences(at);
        __syncthreads();
        through_gates(at);
        __syncthreads();
    }
    // Through the memories that generate, at the anchor; ends after a barrier.
    DEVICE void through_generation(const SelfmodMatrices& anchor, const Segment& at) const {
        const SelfmodMatrices& to = at.new_chunk ? *all_.d_state : *all_.d_anchor;
        for (int m = kKeys; m <= kRetention; m++) {
            generated_gradient(m);
            __syncthreads();
            if constexpr (Layers == 2) {
                hidden_inputs_gradient(anchor.memory[m], m);
                __syncthreads();
            }
            inputs_gradient(anchor.memory[m]);
            add_to_matrices(to.memory[m]);
            __syncthreads();
        }
        leave_inputs(at);
        __syncthreads();
    }

 private:
    using Base::all_;
    using Base::dim_;
    using Base::for_columns;
    using Base::hidden_of;
    using Base::in_;
    using Base::in_row;
    using Base::p_;
    using Base::reads_anchor_;
    using Base::shared_;
    using Base::thread;

    // ---- the system ----

    // dL becomes the gradient of K K^T; A's row t - 1 gets its share.
    DEVICE_CALL void differentiate_system() const __restrict__ {
        Tiles::for_lower_blocks([&](int row, int column) {
            Accumulator<2> x = {};
            this->multiply_scores(x, shared_.k, shared_.k, dim_, row, column);
            this->for_square(row, column, [&](int t, int s, int tile, int i) {
                const float2 a = pair_at(shared_.gates.a + t * Tiles::kScoreStride + s);
                float2 d = pair_at(all_.d_system + t * Tiles::kScoreStride + s);
                if (s >= t) d.x = 0;
                if (s + 1 >= t) d.y = 0;
                pair_at(all_.d_first.at(s, t)) = pack<E>(d.x * a.x, d.y * a.y);
                if (t == 0) return;
                float2& d_a = pair_at(shared_.gates.d_a + (t - 1) * Gates::kScoreStride + s);
                d_a = make_float2(d_a.x + d.x * x[tile][i], d_a.y + d.y * x[tile][i + 1]);
            });
        });
    }
    // dK += (dX + dX^T) K, dX lower.
    DEVICE_CALL void add_similar_keys() const __restrict__ {
        Tiles::for_part(dim_, [&](int slice, int at) {
            Sums d_k = {};
#pragma unroll
            for (int n = 0; n < Tokens / 16; n++) {
                Block<E> block;
                Left<E> left;
                shared_.k.load_features(block, slice, n * 16);
                make_left(left, block);
                all_.d_first.multiply_features(d_k, left, n * 16, at, n * 2 - at / 8);
                all_.d_first.multiply_tokens(d_k, left, n * 16, at, 0, n * 2 + 2 - at / 8);
            }
            this->add_sums(all_.d_k, d_k, slice, at);
        });
    }

    // ---- the gates ----

    DEVICE float dot_of_row(typename Gates::Sum sum, int t) const {
        float dot = 0;
#pragma unroll
        for (int split = 0; split < Gates::kSplits; split++)
            dot += shared_.gates.sums[(sum * Gates::kSplits + split) * Tokens + t];
        return dot;
    }
    // A's recurrence, a thread for each column, and b's. What keep[t] receives of a column stays in
    // the column's place of dA, what it receives of b in in_momenta; dlr in in_weights.
    DEVICE_CALL void through_recurrences(const Segment& at) const __restrict__ {
        const Gates& gates = shared_.gates;
        const int s = thread(), last = at.rows - 1;
        if (s < at.rows) {
            float d = -dot_of_row(Gates::kInWeights, s), later = 1;
            for (int t = last; t >= s; t--) {
                float& d_a = gates.d_a[t * Gates::kScoreStride + s];
                d = later * d + d_a;
                d_a = d * gates.a[t * Gates::kScoreStride + s];
                later = gates.gates[t].y;
            }
            gates.in_weights[s] = d;
        } else if (s == Tokens) {
            const bool before = p_.read == Read::before;
            float d = before ? 0 : dot_of_row(Gates::kB, last);
            for (int warp = 0; warp < Gates::kWarps; warp++)
                d += gates.products[warp * kProducts + kWeightsWeights];
            for (int t = last; t >= 0; t--) {  // d: of b after token t
                gates.in_momenta[t] = d * gates.b[t];
                d = gates.gates[t].y * d + dot_of_row(Base::kBefore, t);
                if (before)
                    d += dot_of_row(Gates::kB, t);
                else if (t > 0)
                    d += dot_of_row(Gates::kB, t - 1);
            }
        }
    }
    DEVICE_CALL void through_gates(const Segment& at) const __restrict__ {
        const Gates& gates = shared_.gates;
        const int t = thread();
        if (t >= Tokens) return;
        float d_keep = 0, d_lr = 0;
        if (t < at.rows) {
            for (int s = 0; s < t; s++) d_keep += gates.d_a[t * Gates::kScoreStride + s];
            d_keep += gates.in_momenta[t], d_lr = gates.in_weights[t];
        }
        // s'(x) = s(x) s(-x), which does not cancel.
        all_.d_raw[t] = d_lr * gates.lr[t] * logistic(-shared_.raw[t]);
        all_.d_raw[Tokens + t] = d_keep * gates.gates[t].y * logistic(-shared_.raw[Tokens + t]);
    }

    // ---- the memories that generate ----

    // dF in the tile of errors, and what x gets of it directly.
    DEVICE_CALL void generated_gradient(int m) const __restrict__ {
        const int t = Tiles::token_of_group();
        const typename Tiles::ByToken& to = all_.d_e;
        if (this->is_gate(m)) {
            const float* const d_raw = all_.d_raw + (m - kRates) * Tokens;
            for (int i = Tiles::rank_in_group(); i < 16; i += Tiles::kGroup)
                *to.at(i, t) = finite(i ? 0 : d_raw[t]);
            if (thread() == 0)
                for (int i = 0; i < Tokens; i++) all_.d_bias[m - kRates] += d_raw[i];
            return;
        }
        float along = 0, divisor = 1;
        if (m == kKeys) {
            const float norm = shared_.norms[t];
            for_columns([&](int i) { along += in_row(all_.d_k, t, i) * key(t, i); });
            along = Tiles::sum_of_group(along);
            if (norm < kSmallestKeyNorm) along = 0;
            divisor = fmaxf(norm, kSmallestKeyNorm);
        }
        float* const d_given = m == kKeys ? all_.d_k : all_.d_v;
        for_columns([&](int i) {
            float d = in_row(d_given, t, i);
            if (m == kKeys) d = (d - along * key(t, i)) / divisor;
            *to.at(i, t) = finite(d);
            float& d_x = in_row(all_.d_x, t, i);
            d_x = (m == kKeys ? 0 : d_x) + (Layers == 2 ? d : 0);
        });
    }
    DEVICE float key(int t, int i) const { return to_float(*shared_.k.at(i, t)); }
    // A key of length 0 has a gradient of up to 1e6 times its own: in float16 that is cut off,
    // since infinity times a weight's zero would be no number.
    DEVICE static E finite(float x) {
        if constexpr (std::is_same_v<E, fp16>) x = fminf(fmaxf(x, -65504.f), 65504.f);
        return from_float<E>(x);
    }
    DEVICE_CALL void hidden_inputs_gradient(const MemoryMatrices& anchor, int m) const
        __restrict__ {
        Tiles::for_slices(hidden_of(m), [&](int slice) {
            Hidden z = {}, d_h = {};
            multiply_state<false>(z, anchor.layer[0], slice, shared_.x, 0);
            multiply_state<true>(d_h, anchor.layer[Layers - 1], slice, all_.d_e, 0);
            this->for_each(slice, [&](int f, int t, int tile, int i) {
                const Activated of_x = activate(p_.activation, z[tile][i]);
                *shared_.h.at(f, t) = from_float<E>(of_x.value);
                *shared_.z.at(f, t) = from_float<E>(d_h[tile][i] * of_x.slope);
            });
        });
    }
    DEVICE_CALL void inputs_gradient(const MemoryMatrices& anchor) const __restrict__ {
        Tiles::for_part(dim_, [&](int slice, int at) {
            Sums d_x = {};
            if constexpr (Layers == 2)
                multiply_state<true>(d_x, anchor.layer[0], slice, shared_.z, at);
            else
                multiply_state<true>(d_x, anchor.layer[0], slice, all_.d_e, at);
            this->add_sums(all_.d_x, d_x, slice, at);
        });
    }
    DEVICE_CALL void add_to_matrices(const MemoryMatrices& to) const __restrict__ {
        if constexpr (Layers == 2) {
            add_product(to.layer[0], shared_.z, shared_.x);
            add_product(to.layer[1], all_.d_e, shared_.h);
        } else {
            add_product(to.layer[0], all_.d_e, shared_.x);
        }
    }
    // to += errors^T inputs
    template <class Errors, class Inputs>
    DEVICE void add_product(const StateMatrix& to, const Errors& errors,
                            const Inputs& inputs) const {
        Tiles::template for_pieces<32>(to.rows, to.columns, [&](int row, int column, auto width) {
            Accumulator<decltype(width)::value / 8> x = {};
            this->multiply_gradient(x, errors, inputs, row, column);
            for_pairs(x, row, column, [&](int r, int c, float a, float b) {
                float2& sum = pair_at(to.at(r, c));
                sum = make_float2(sum.x + a, sum.y + b);
            });
        });
    }
    DEVICE_CALL void leave_inputs(const Segment& at) const __restrict__ {
        const int t = Tiles::token_of_group();
        if (t >= at.rows) return;
        E* const d_x = token<E>(p_.d_x, in_, at.first + t);
        for_columns([&](int i) { d_x[i] = from_float<E>(in_row(all_.d_x, t, i)); });
    }
};

}  // namespace hope
