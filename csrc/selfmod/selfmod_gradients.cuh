// One segment of the self-modifying memories, backward, for one memory after the other: the phases
// between a block's barriers, for the state before the segment and the gradients dW' after it. In
// the names of docs/derivations.md, all products transposed. Two layers:
//
//   learn         Z, H, hidden values, E, R again; of `memory` ZQ and HQ too
//   reads         dX of the second layer | dHQ, dZQ | dX of the first layer
//   inputs        dQ; what reads and updates add to dK | dR = - P^T dZQ - in_weights * (K dW1')
//   solve         dG = (I + L)^-T dR | dL -= dG R^T; what b' receives; dU = dG * act'(Z)
//   errors        dE = - P^T dO - in_weights * (H dW2') + dU W2
//   hidden        dZ of K and of V, from dE and dH
//   states        what dK and dV get through W1; dW1, dW2 before the segment
//
// One layer:
//
//   learn         R again
//   reads         dX
//   inputs        dQ, what reads and updates add to dK; dR | dY += dR W^T; dW before the segment
//
// and after all memories, for the solution Y that they share:
//
//   solve         (I + L)^-T dY | dL, what b' receives, dK and dV
#pragma once
#include "common/layer_gradients.cuh"
#include "selfmod/selfmod_segment.cuh"

namespace hope {

template <class E, int D, int Tokens, int Layers>
class SelfmodGradients : public SelfmodSegment<E, D, Tokens, Layers, LayerGradients<E, D, Tokens>> {
    using Base = SelfmodSegment<E, D, Tokens, Layers, LayerGradients<E, D, Tokens>>;

 public:
    using Layout = SelfmodGradientsLayout<E, D, Tokens, Layers>;
    using Tiles = typename Layout::Tiles;
    using Gates = typename Base::Gates;
    using Sums = typename Base::Sums;
    using Hidden = typename Base::Hidden;
    // A sum that nothing else needs, without momenta: of the rows that b' scales.
    static constexpr typename Gates::Sum kBefore = Gates::kC;

    DEVICE SelfmodGradients(const Layout& shared, const SelfmodParams& p,
                            const Sequence<Tokens>& in)
        : Base(shared.forward, p, in, shared.forward.gates, Base::rows_read(shared.forward, p),
               *shared.forward.vectors, p.read == Read::chunk, p.read == Read::before, false),
          all_(shared) {}

    DEVICE void start_outputs_gradient(const Segment& at) const {
        this->start_rows(all_.d_o, p_.d_o, at);
    }
    // Clears what the memories add to. Y has been found.
    DEVICE_CALL void clear_sums(bool new_chunk) const __restrict__ {
        const auto clear = [](float* to, int count) {
            for (int i = thread(); i < count; i += kLayerThreads) to[i] = 0;
        };
        clear(shared_.gates.sums, Gates::kSums * Gates::kSplits * Tokens);
        clear(shared_.gates.products, kProducts * Gates::kWarps);
        clear(shared_.gates.d_a, Tokens * Gates::kScoreStride);
        clear(all_.d_system, Tokens * Tiles::kScoreStride);
        clear(all_.d_k, Tokens * Tiles::kSumStride);
        clear(all_.d_v, Tokens * Tiles::kSumStride);
        if (Layers == 1) clear(shared_.right.data, this->system_rows(new_chunk) * (Tokens + 1));
    }

    // Through what memory m has given and learned; ends after a barrier.
    DEVICE void through_memory(const MemoryMatrices& memory, const MemoryMatrices& anchor, int m,
                               const Segment& at) const {
        const MemoryMatrices &d_after = all_.d_state->memory[m],
                             &d_anchor = all_.d_anchor->memory[m];
        const bool is_read = m == kMemory;
        this->learn(memory, anchor, m, at.new_chunk);
        if (is_read) through_reads(memory, anchor, at);
        if constexpr (Layers == 2) {
            add_to_keys(d_after, is_read);
            first_errors_gradient(d_after, m, is_read);
            __syncthreads();
            solve_transposed(hidden_of(m), all_.d_r);
            __syncthreads();
            through_solution(memory, anchor, m, at.new_chunk);
            add_to_system(all_.d_r, shared_.r, hidden_of(m));
            __syncthreads();
            errors_gradient(anchor, d_after, m, is_read);
            __syncthreads();
            hidden_gradients(anchor, d_after, m, is_read);
            __syncthreads();
            through_first_layer(memory, anchor, at.new_chunk);
            states_gradient(at, memory, d_after, d_anchor, is_read);
        } else {
            add_to_keys(d_after, is_read);
            solution_errors_gradient(d_after, m, is_read);
            __syncthreads();
            add_to_solution(memory, anchor, at.new_chunk);
            state_gradient(at, memory, d_after, d_anchor, is_read);
        }
        __syncthreads();
    }
    // One layer: through the solution that all memories share; ends after a barrier.
    DEVICE void through_common_solution(bool new_chunk) const {
        if constexpr (Layers == 1) {
            solve_transposed(this->system_rows(new_chunk), all_.d_y);
            __syncthreads();
            add_to_system(all_.d_y, shared_.y, dim_);
            if (!new_chunk) {
                __syncthreads();  // they add to the same elements
                add_to_system(of_anchor(all_.d_y), of_anchor(shared_.y), dim_);
            }
            through_common_right_sides(new_chunk);
            __syncthreads();
        }
    }

 protected:
    using Base::dim_;
    using Base::for_columns;
    using Base::has_residual;
    using Base::hidden_of;
    using Base::hidden_of_keys;
    using Base::hidden_of_queries;
    using Base::in_;
    using Base::l2_;
    using Base::last_errors;
    using Base::left_before;
    using Base::of_anchor;
    using Base::p_;
    using Base::reads_anchor_;
    using Base::right;
    using Base::rows_of_outputs;
    using Base::shared_;
    using Base::sum;
    using Base::thread;

    DEVICE float& in_row(float* sums, int t, int i) const {
        return sums[t * Tiles::kSumStride + i];
    }
    template <int Count>
    DEVICE void add_sums(float* to, Accumulator<Count>& x, int slice, int at) const {
        for_pairs(x, slice, at, [&](int f, int t, float a, float b) {
            in_row(to, t, f) += a, in_row(to, t + 1, f) += b;
        });
    }
    DEVICE static LayerState layer(const MemoryMatrices& memory, int i) {
        return {memory.layer[i], {}};
    }

    // ---- reads ----

    DEVICE void through_reads(const MemoryMatrices& memory, const MemoryMatrices& anchor,
                              const Segment& at) const {
        if constexpr (Layers == 2) {
            this->score_first();
            __syncthreads();
            this->template hidden_queries<true>(memory, anchor);
            __syncthreads();
        }
        differentiate_last_scores();
        __syncthreads();
        if constexpr (Layers == 2) {
            hidden_queries_gradient(memory, anchor);
            __syncthreads();
            differentiate_first_scores();
            __syncthreads();
        }
        queries_gradient(memory, anchor);
        __syncthreads();
        leave_queries(at);
    }
    DEVICE_CALL void differentiate_last_scores() const __restrict__ {
        if (reads_anchor_) return;
        this->template differentiate_scores<true>(hidden_of_queries(), hidden_of_keys(),
                                                  hidden_of(kMemory), all_.d_o, last_errors(), dim_,
                                                  &all_.last_scores, all_.d_last);
    }
    // dZQ in place of ZQ.
    DEVICE_CALL void hidden_queries_gradient(const MemoryMatrices& memory,
                                             const MemoryMatrices& anchor) const __restrict__ {
        Tiles::for_slices(hidden_of(kMemory), [&](int slice) {
            Hidden d_hq = {};
            this->query_gradients(d_hq, slice, 0, all_.d_o, shared_.hq, shared_.h, all_.d_last,
                                  layer(memory, Layers - 1), anchor.layer[Layers - 1]);
            for_pairs(d_hq, slice, 0, [&](int f, int t, float x, float y) {
                Pair<E>& zq = pair_at(shared_.zq.at(f, t));
                const float2 z = unpack<E>(zq);
                zq = pack<E>(x * activate(p_.activation, z.x).slope,
                             y * activate(p_.activation, z.y).slope);
            });
        });
    }
    DEVICE_CALL void differentiate_first_scores() const __restrict__ {
        if (reads_anchor_) return;
        this->template differentiate_scores<true>(shared_.q, shared_.k, dim_, shared_.zq, shared_.r,
                                                  hidden_of(kMemory), nullptr, all_.d_first);
    }
    // dQ in `sums`.
    DEVICE_CALL void queries_gradient(const MemoryMatrices& memory,
                                      const MemoryMatrices& anchor) const __restrict__ {
        Tiles::for_part(dim_, [&](int slice, int at) {
            Sums d_q = {};
            this->query_gradients(d_q, slice, at, first_outputs_gradient(), shared_.q, shared_.k,
                                  all_.d_first, layer(memory, 0), anchor.layer[0]);
            this->store_sums(shared_.sums, d_q, slice, at);
        });
    }
    DEVICE_CALL void leave_queries(const Segment& at) const __restrict__ {
        const int t = Tiles::token_of_group();
        if (t >= at.rows) return;
        E* const d_q = token<E>(p_.d_q, in_, at.first + t);
        for_columns([&](int i) {
            const float residual = Layers == 2 ? to_float(*all_.d_o.at(i, t)) : 0;
            d_q[i] = from_float<E>(sum(t, i) + residual);
        });
    }
    // Of the layer whose inputs are K and Q.
    DEVICE auto first_outputs_gradient() const {
        if constexpr (Layers == 2)
            return shared_.zq;
        else
            return all_.d_o;
    }

    // ---- the first layer, or the only one ----

    // What reads and updates add to dK.
    DEVICE_CALL void add_to_keys(const MemoryMatrices& d_after, bool is_read) const __restrict__ {
        Tiles::for_part(dim_, [&](int slice, int at) {
            Sums d_k = {};
            this->key_gradients(d_k, slice, at, shared_.q, all_.d_first, shared_.r,
                                layer(d_after, 0), is_read);
            add_sums(all_.d_k, d_k, slice, at);
        });
    }
    // (I + L)^T X = right sides in place, and rounded; as in the forward.
    DEVICE_CALL void solve_transposed(int rows, const typename Tiles::ByFeature& rounded) const
        __restrict__ {
        for (int row = thread(); row < rows; row += kLayerThreads) {
            float* const solution = &right(row, 0);
#pragma unroll 1
            for (int first = Tokens - 16; first >= 0; first -= 16) {
                const float* const block = shared_.system + first * Tiles::kScoreStride;
                float x[16];
#pragma unroll
                for (int i = 0; i < 16; i++) x[i] = solution[first + i];
#pragma unroll 2
                for (int t = first + 16; t < Tokens; t++) {
                    const float known = solution[t];
#pragma unroll
                    for (int i = 0; i < 16; i++) x[i] -= block[i * Tiles::kScoreStride + t] * known;
                }
#pragma unroll
                for (int t = 15; t > 0; t--)
#pragma unroll
                    for (int i = 0; i < t; i++)
                        x[i] -= block[i * Tiles::kScoreStride + first + t] * x[t];
#pragma unroll
                for (int i = 0; i < 16; i++) solution[first + i] = x[i];
#pragma unroll
                for (int i = 0; i < 16; i += 2)
                    pair_at(rounded.at(row, first + i)) = pack<E>(x[i], x[i + 1]);
            }
        }
    }
    // dL -= gradients solution^T, lower triangle.
    template <class F>
    DEVICE_CALL void add_to_system(const F& gradients, const F& solution, int rows) const
        __restrict__ {
        Tiles::for_lower_blocks([&](int row, int column) {
            Accumulator<2> x = {};
            this->multiply_scores(x, gradients, solution, rows, row, column);
            this->for_square(row, column, [&](int t, int s, int tile, int i) {
                float2& to = pair_at(all_.d_system + t * Tiles::kScoreStride + s);
                to = make_float2(to.x - x[tile][i], to.y - x[tile][i + 1]);
            });
        });
    }

    // ---- two layers ----

    // dR, as the right sides of the transposed system.
    DEVICE_CALL void first_errors_gradient(const MemoryMatrices& d_after, int m, bool is_read) const
        __restrict__ {
        Tiles::for_slices(hidden_of(m), [&](int slice) {
            Hidden d_r = {};
            this->error_gradients(d_r, slice, 0, shared_.zq, shared_.scores, shared_.k, shared_.r,
                                  layer(d_after, 0), is_read);
            this->for_each(slice,
                           [&](int f, int t, int tile, int i) { right(f, t) = d_r[tile][i]; });
        });
    }
    // From dG: dU, and in place of dG the part of dZ that does not come through H.
    DEVICE_CALL void through_solution(const MemoryMatrices& memory, const MemoryMatrices& anchor,
                                      int m, bool new_chunk) const __restrict__ {
        Tiles::for_slices(hidden_of(m), [&](int slice) {
            Hidden u = {}, kw = {};
            multiply_state<true>(u, anchor.layer[Layers - 1], slice, shared_.e, 0);
            multiply_state<false>(kw, memory.layer[0], slice, shared_.k, 0);
            this->add_dots(kBefore, kw, shared_.right, slice, 0);
            this->for_each(slice, [&](int f, int t, int tile, int i) {
                const Activated z = activate(p_.activation, to_float(*shared_.z.at(f, t)));
                float& d_g = right(f, t);
                *all_.d_u.at(f, t) = from_float<E>(d_g * z.slope);
                // At a chunk's start K meets the anchor as it meets the state.
                d_g *= u[tile][i] * z.curve + (new_chunk ? left_before(t) : 0);
            });
        });
    }
    // dE, and what K and V get of it directly.
    DEVICE_CALL void errors_gradient(const MemoryMatrices& anchor, const MemoryMatrices& d_after,
                                     int m, bool is_read) const __restrict__ {
        Tiles::for_part(rows_of_outputs(m), [&](int slice, int at) {
            Sums d_e = {};
            this->error_gradients(d_e, slice, at, all_.d_o, all_.last_scores, shared_.h, shared_.e,
                                  layer(d_after, Layers - 1), is_read);
            multiply_state<false>(d_e, anchor.layer[Layers - 1], slice, all_.d_u, at);
            for_pairs(d_e, slice, at, [&](int f, int t, float x, float y) {
                *all_.d_e.at(f, t) = from_float<E>(x);
                *all_.d_e.at(f, t + 1) = from_float<E>(y);
                if (!has_residual(m)) return;
                if (l2_) in_row(all_.d_k, t, f) += x, in_row(all_.d_k, t + 1, f) += y;
                in_row(all_.d_v, t, f) -= x, in_row(all_.d_v, t + 1, f) -= y;
            });
        });
    }
    // dZ of K in place of Z, that of V in place of R.
    DEVICE_CALL void hidden_gradients(const MemoryMatrices& anchor, const MemoryMatrices& d_after,
                                      int m, bool is_read) const __restrict__ {
        Tiles::for_slices(hidden_of(m), [&](int slice) {
            Hidden d_h = {}, of_e = {}, z_v = {};
            this->key_gradients(d_h, slice, 0, shared_.hq, all_.d_last, shared_.e,
                                layer(d_after, Layers - 1), is_read);
            multiply_state<true>(of_e, anchor.layer[Layers - 1], slice, all_.d_e, 0);
            multiply_state<false>(z_v, anchor.layer[0], slice, shared_.v, 0);
            this->for_each(slice, [&](int f, int t, int tile, int i) {
                E& z = *shared_.z.at(f, t);
                const float slope = activate(p_.activation, to_float(z)).slope,
                            slope_v = activate(p_.activation, z_v[tile][i]).slope;
                const float d = d_h[tile][i] + (l2_ ? of_e[tile][i] : 0);
                z = from_float<E>(right(f, t) + d * slope);
                *shared_.r.at(f, t) = from_float<E>(-of_e[tile][i] * slope_v);
            });
        });
    }
    DEVICE_CALL void through_first_layer(const MemoryMatrices& memory, const MemoryMatrices& anchor,
                                         bool new_chunk) const __restrict__ {
        Tiles::for_part(dim_, [&](int slice, int at) {
            Sums d_k = {}, d_v = {}, of_state = {};
            multiply_state<true>(d_k, anchor.layer[0], slice, shared_.z, at);
            multiply_state<true>(d_v, anchor.layer[0], slice, shared_.r, at);
            if (!new_chunk) {
                multiply_state<true>(of_state, memory.layer[0], slice, all_.d_r, at);
                for_pairs(of_state, slice, at, [&](int f, int t, float x, float y) {
                    in_row(all_.d_k, t, f) += left_before(t) * x;
                    in_row(all_.d_k, t + 1, f) += left_before(t + 1) * y;
                });
            }
            add_sums(all_.d_k, d_k, slice, at), add_sums(all_.d_v, d_v, slice, at);
        });
    }
    DEVICE_CALL void states_gradient(const Segment& at, const MemoryMatrices& memory,
                                     const MemoryMatrices& d_state, const MemoryMatrices& d_anchor,
                                     bool is_read) const __restrict__ {
        float products[kProducts] = {};
        this->layer_gradient(
            at, layer(memory, 0), layer(d_state, 0), d_anchor.layer[0], shared_.zq, shared_.q,
            products,
            [&](auto& to_w, auto& to_anchor, int row, int column) {
                this->multiply_gradient(to_anchor, shared_.z, shared_.k, row, column);
                this->multiply_gradient(to_anchor, shared_.r, shared_.v, row, column);
                if (!at.new_chunk) multiply_scaled(to_w, all_.d_r, shared_.k, row, column);
            },
            is_read);
        this->layer_gradient(
            at, layer(memory, Layers - 1), layer(d_state, Layers - 1), d_anchor.layer[Layers - 1],
            all_.d_o, shared_.hq, products,
            [&](auto&, auto& to_anchor, int row, int column) {
                std::remove_reference_t<decltype(to_anchor)> of_values = {};
                this->multiply_gradient(to_anchor, shared_.e, all_.d_u, row, column);
                if (l2_) this->multiply_gradient(to_anchor, all_.d_e, shared_.h, row, column);
                this->multiply_gradient(of_values, all_.d_e, shared_.hv, row, column);
                this->subtract(to_anchor, of_values);
            },
            is_read);
        leave_products(products);
    }
    // sums += (b' * errors)^T keys
    template <class Errors, class Keys, int Count>
    DEVICE void multiply_scaled(Accumulator<Count>& sums, const Errors& errors, const Keys& keys,
                                int row, int column) const {
#pragma unroll
        for (int n = 0; n < Tokens / 16; n++) {
            Block<E> block, scaled;
            Left<E> left;
            errors.load_features(block, row, n * 16);
            scale_columns<E>(scaled, block, shared_.gates.b + n * 16);
            make_left(left, scaled);
            keys.multiply_tokens(sums, left, n * 16, column);
        }
    }
    DEVICE void leave_products(float (&products)[kProducts]) const {
        float& product = products[kWeightsWeights];  // the only one without momenta
#pragma unroll
        for (int distance = 16; distance; distance /= 2)
            product += __shfl_xor_sync(~0u, product, distance);
        if (thread() % 32 == 0)
            shared_.gates.products[thread() / 32 * kProducts + kWeightsWeights] += product;
    }

    // ---- one layer ----

    DEVICE_CALL void solution_errors_gradient(const MemoryMatrices& d_after, int m,
                                              bool is_read) const __restrict__ {
        Tiles::for_part(rows_of_outputs(m), [&](int slice, int at) {
            Sums d_r = {};
            this->error_gradients(d_r, slice, at, all_.d_o, all_.last_scores, shared_.k, shared_.r,
                                  layer(d_after, 0), is_read);
            for_pairs(d_r, slice, at, [&](int f, int t, float x, float y) {
                pair_at(all_.d_r.at(f, t)) = pack<E>(x, y);
            });
        });
    }
    // dY += dR W^T, as the right sides of the transposed system.
    DEVICE_CALL void add_to_solution(const MemoryMatrices& memory, const MemoryMatrices& anchor,
                                     bool new_chunk) const __restrict__ {
        Tiles::for_part(dim_, [&](int slice, int at) {
            Sums of_state = {}, of_anchor = {};
            multiply_state<true>(of_state, memory.layer[0], slice, all_.d_r, at);
            add_right(of_state, slice, at);
            if (new_chunk) return;
            multiply_state<true>(of_anchor, anchor.layer[0], slice, all_.d_r, at);
            add_right(of_anchor, slice, at, dim_);
        });
    }
    DEVICE void add_right(Sums& x, int slice, int at, int first_row = 0) const {
        for_pairs(x, slice, at, [&](int f, int t, float a, float b) {
            right(first_row + f, t) += a, right(first_row + f, t + 1) += b;
        });
    }
    DEVICE_CALL void state_gradient(const Segment& at, const MemoryMatrices& memory,
                                    const MemoryMatrices& d_state, const MemoryMatrices& d_anchor,
                                    bool is_read) const __restrict__ {
        float products[kProducts] = {};
        this->layer_gradient(
            at, layer(memory, 0), layer(d_state, 0), d_anchor.layer[0], all_.d_o, shared_.q,
            products,
            [&](auto& to_w, auto& to_anchor, int row, int column) {
                this->multiply_gradient(to_w, all_.d_r, shared_.y, row, column);
                if (!at.new_chunk)
                    this->multiply_gradient(to_anchor, all_.d_r, of_anchor(shared_.y), row, column);
            },
            is_read);
        leave_products(products);
    }
    DEVICE_CALL void through_common_right_sides(bool new_chunk) const __restrict__ {
        const int t = Tiles::token_of_group();
        float of_b = 0;
        for_columns([&](int i) {
            const float of_state = right(i, t),
                        of_anchor = new_chunk ? of_state : right(dim_ + i, t);
            of_b += of_state * to_float(*shared_.k.at(i, t));
            in_row(all_.d_k, t, i) += left_before(t) * of_state + (l2_ ? of_anchor : 0);
            in_row(all_.d_v, t, i) -= of_anchor;
        });
        of_b = Tiles::sum_of_group(of_b);
        if (Tiles::rank_in_group() == 0)
            shared_.gates.sums[kBefore * Gates::kSplits * Tokens + t] += of_b;
    }

    const Layout all_;
};

}  // namespace hope
