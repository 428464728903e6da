// What a segment does to the self-modifying memories, forward: the phases between a block's
// barriers. In the names of docs/derivations.md, all products transposed:
//
//   generate   K, V, A, b and the system L (selfmod_tokens.cuh)
//   learn      two layers:  Z, H of K and the hidden values of V | E = M(K) - M(V) |
//                           (E W2^T) * act'(Z) + b' * (K W1) | R by substitution
//              one layer:   R = Y W
//   read       two layers:  ZQ = b * (Q W1) - (A * Q K^T) R, HQ = act(ZQ) |
//              of the last: b * (HQ W) - (A * HQ H^T) E
//   update     of each layer: W' = b W - (in_weights * inputs)^T errors
//
// Memories take turns in the same tiles; K, V, the gates and the system are common to them.
#pragma once
#include "selfmod/selfmod_tokens.cuh"

namespace hope {

template <class E, int D, int Tokens, int Layers, class Of = LayerSegment<E, D, Tokens>>
class SelfmodSegment : public SelfmodTokens<E, D, Tokens, Layers, Of> {
    using Base = SelfmodTokens<E, D, Tokens, Layers, Of>;

 public:
    using Layout = typename Base::Layout;
    using Tiles = typename Base::Tiles;
    using Sums = typename Base::Sums;
    using Hidden = typename Base::Hidden;
    using Base::Base;

    // ---- what a memory learns, and gives ----

    DEVICE void learn(const MemoryMatrices& memory, const MemoryMatrices& anchor, int m,
                      bool new_chunk) const {
        if constexpr (Layers == 2) {
            hidden_keys_and_values(anchor, m);
            __syncthreads();
            compute_errors(anchor, m);
            __syncthreads();
            right_sides(memory, anchor, m);
            __syncthreads();
            solve(hidden_of(m), shared_.r);
        } else {
            errors_of_solution(memory, anchor, m, new_chunk);
        }
        __syncthreads();
    }
    // O of `memory`, in `sums`; ends after a barrier.
    DEVICE void read(const MemoryMatrices& memory, const MemoryMatrices& anchor) const {
        Sums o = {};
        if constexpr (Layers == 2) {
            score_first();
            __syncthreads();
            hidden_queries<false>(memory, anchor);
            __syncthreads();
        }
        score_last();
        start_reads(o, memory, anchor);
        __syncthreads();
        finish_reads(o);
        __syncthreads();
    }
    DEVICE_CALL void leave_outputs(const Segment& at) const __restrict__ {
        const int t = Tiles::token_of_group();
        if (t >= at.rows) return;
        const E* const q = token<const E>(p_.q, in_, at.first + t);
        E* const o = token<E>(p_.o, in_, at.first + t);
        for_columns(
            [&](int i) { o[i] = from_float<E>(sum(t, i) + (Layers == 2 ? to_float(q[i]) : 0)); });
    }
    DEVICE_CALL void update(const MemoryMatrices& from, const MemoryMatrices& to) const
        __restrict__ {
        update_layer(from.layer[0], to.layer[0], shared_.r, shared_.k);
        if constexpr (Layers == 2) update_layer(from.layer[1], to.layer[1], shared_.e, shared_.h);
    }

 protected:
    using Base::apart;
    using Base::dim_;
    using Base::for_columns;
    using Base::has_residual;
    using Base::hidden_of;
    using Base::hidden_of_keys;
    using Base::hidden_of_queries;
    using Base::hide;
    using Base::in_;
    using Base::l2_;
    using Base::last_errors;
    using Base::left_before;
    using Base::of_anchor;
    using Base::p_;
    using Base::right;
    using Base::rows_of_outputs;
    using Base::shared_;
    using Base::solve;
    using Base::sum;
    using Base::thread;

    // ---- learn ----

    // R = Y W
    DEVICE_CALL void errors_of_solution(const MemoryMatrices& memory, const MemoryMatrices& anchor,
                                        int m, bool new_chunk) const __restrict__ {
        Tiles::for_part(rows_of_outputs(m), [&](int slice, int at) {
            Sums r = {};
            multiply_state<false>(r, memory.layer[0], slice, shared_.y, at);
            if (!new_chunk)
                multiply_state<false>(r, anchor.layer[0], slice, of_anchor(shared_.y), at);
            for_pairs(r, slice, at, [&](int f, int t, float a, float b) {
                pair_at(shared_.r.at(f, t)) = pack<E>(a, b);
            });
        });
    }

    DEVICE_CALL void hidden_keys_and_values(const MemoryMatrices& anchor, int m) const
        __restrict__ {
        hide(anchor.layer[0], m, shared_.k, shared_.h, shared_.z.data);
        hide(anchor.layer[0], m, shared_.v, shared_.hv, nullptr);
    }
    DEVICE_CALL void compute_errors(const MemoryMatrices& anchor, int m) const __restrict__ {
        Tiles::for_part(rows_of_outputs(m), [&](int slice, int at) {
            Sums e = {}, of_values = {};
            if (l2_) multiply_state<false>(e, anchor.layer[1], slice, shared_.h, at);
            multiply_state<false>(of_values, anchor.layer[1], slice, shared_.hv, at);
            this->subtract(e, of_values);
            for_pairs(e, slice, at, [&](int f, int t, float a, float b) {
                *shared_.e.at(f, t) = from_float<E>(a + residual(m, f, t));
                *shared_.e.at(f, t + 1) = from_float<E>(b + residual(m, f, t + 1));
            });
        });
    }
    DEVICE float residual(int m, int f, int t) const { return has_residual(m) ? apart(t, f) : 0; }
    // G + b' * (K W1)
    DEVICE_CALL void right_sides(const MemoryMatrices& memory, const MemoryMatrices& anchor,
                                 int m) const __restrict__ {
        Tiles::for_slices(hidden_of(m), [&](int slice) {
            Hidden u = {}, kw = {};
            multiply_state<true>(u, anchor.layer[1], slice, shared_.e, 0);
            multiply_state<false>(kw, memory.layer[0], slice, shared_.k, 0);
            for_each(slice, [&](int f, int t, int tile, int i) {
                const float slope = activate(p_.activation, to_float(*shared_.z.at(f, t))).slope;
                right(f, t) = u[tile][i] * slope + left_before(t) * kw[tile][i];
            });
        });
    }
    // body(feature, token, tile, i) for this lane's elements of a slice.
    template <class Body>
    DEVICE static void for_each(int slice, const Body& body) {
        const int lane = thread() % 32;
#pragma unroll
        for (int tile = 0; tile < Tiles::kTokenTiles; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                body(slice + lane / 4 + i / 2 * 8, tile * 8 + lane % 4 * 2 + i % 2, tile, i);
    }

    // ---- read ----

    DEVICE_CALL void score_first() const __restrict__ {
        if (!this->reads_anchor_) this->score(shared_.q, shared_.k, dim_, shared_.scores);
    }
    DEVICE_CALL void score_last() const __restrict__ {
        if (!this->reads_anchor_)
            this->score(hidden_of_queries(), hidden_of_keys(), hidden_of(kMemory), shared_.scores);
    }
    template <bool Keeps>
    DEVICE_CALL void hidden_queries(const MemoryMatrices& memory,
                                    const MemoryMatrices& anchor) const __restrict__ {
        Tiles::for_slices(hidden_of(kMemory), [&](int slice) {
            Hidden zq = {};
            this->read_slice(zq, LayerState{memory.layer[0], {}}, anchor.layer[0], slice, shared_.q,
                             0);
            if (!this->reads_anchor_) subtract_errors(zq, shared_.r, slice, 0);
            for_pairs(zq, slice, 0, [&](int f, int t, float a, float b) {
                if (Keeps) pair_at(shared_.zq.at(f, t)) = pack<E>(a, b);
                pair_at(shared_.hq.at(f, t)) =
                    pack<E>(activate(p_.activation, a).value, activate(p_.activation, b).value);
            });
        });
    }
    DEVICE_CALL void start_reads(Sums& o, const MemoryMatrices& memory,
                                 const MemoryMatrices& anchor) const __restrict__ {
        Tiles::for_part(dim_, [&](int slice, int at) {
            this->read_slice(o, LayerState{memory.layer[Layers - 1], {}}, anchor.layer[Layers - 1],
                             slice, hidden_of_queries(), at);
        });
    }
    DEVICE_CALL void finish_reads(Sums& o) const __restrict__ {
        Tiles::for_part(dim_, [&](int slice, int at) {
            if (!this->reads_anchor_) subtract_errors(o, last_errors(), slice, at);
            this->store_sums(shared_.sums, o, slice, at);
        });
    }
    // from -= errors^T scores^T
    template <class Errors, int Count>
    DEVICE void subtract_errors(Accumulator<Count>& from, const Errors& errors, int slice,
                                int at) const {
        Accumulator<Count> of_errors = {};
#pragma unroll
        for (int n = 0; n < Tokens / 16; n++) {
            Block<E> block;
            Left<E> left;
            errors.load_features(block, slice, n * 16);
            make_left(left, block);
            shared_.scores.multiply_features(of_errors, left, n * 16, at, n * 2 - at / 8);
        }
        this->subtract(from, of_errors);
    }

    // ---- update ----

    template <class Errors, class Keys>
    DEVICE void update_layer(const StateMatrix& from, const StateMatrix& to, const Errors& errors,
                             const Keys& keys) const {
        Tiles::template for_pieces<Base::kWide>(
            from.rows, from.columns, [&](int row, int column, auto width) {
                this->template update_piece<decltype(width)::value>(
                    LayerState{from, {}}, LayerState{to, {}}, row, column, keys,
                    [&](Block<E>& scaled, int n, const float* factor) {
                        Block<E> block;
                        errors.load_features(block, row, n * 16);
                        scale_columns<E>(scaled, block, factor + n * 16);
                    });
            });
    }
};

}  // namespace hope
