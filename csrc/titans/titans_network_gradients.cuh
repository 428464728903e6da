// One segment of a memory of two layers, or with a norm, backward: the phases between a block's
// barriers, for the state before the segment and the gradients dW', dS' after it. In the names of
// docs/derivations.md, all products transposed:
//
//   again         Z, H, E, G, ZQ, HQ as in the forward, with G and ZQ in tiles of their own
//   last layer    dX, dA | dHQ = b * (dO W2^T) + c * (dO S2^T) + dX H, dZQ = dHQ * act'(ZQ)
//   first layer   dX, dA | dQ, and what reads and updates add to dK |
//                 dG = - P^T dZQ - in_weights * (K dW1') - in_momenta * (K dS1'), dU = dG * act'(Z)
//   errors        dE = - P^T dO - in_weights * (H dW2') - in_momenta * (H dS2') + dU W2 |
//                 dV and dY, through the norm | dH, dZ
//   inputs        dK += dZ W1^T; dW1, dS1, dW2, dS2 before the segment
//
// The two layers are the same to the functions here; a memory of one has the last layer only, with
// H = K and HQ = Q, so that dHQ is dQ and dH is dK.
#pragma once
#include "common/layer_gradients.cuh"
#include "titans/titans_gates.cuh"
#include "titans/titans_network_segment.cuh"

namespace hope {

template <class E, int D, int Tokens, int Layers>
struct NetworkGradientsLayout {
    using Forward = NetworkLayout<E, D, Tokens, Layers>;
    using Tiles = typename Forward::Tiles;
    using Gates = GateTiles<Tokens, kLayerWarps, kLayerWarps>;
    // dZ * U, each element of the lane that has made it.
    using Parked = Features<float, false, Tokens + kRowPadding>;

    Gates gates;
    Forward forward;                                 // sums: Y, then dLoss
    typename Tiles::ByToken d_o, d_y;                // dO, through the norm; dY
    typename Tiles::Square scores, d_first, d_last;  // A * HQ H^T; dX of the layers
    float* results;                                  // [Tokens][kSumStride] dQ, dE, dK
    float *d_norm_weight, *d_norm_bias;              // [D]
    Parked parked;

    __host__ __device__ static int64_t parked_floats(const TitansParams& p) {
        return Layers == 2 ? p.hidden_dim * (Tokens + kRowPadding) : 0;
    }
    __host__ __device__ NetworkGradientsLayout(TileCarver& tiles, const TitansParams& p,
                                               float* parked_at)
        : NetworkGradientsLayout(tiles.shared(), tiles, p, parked_at) {}

 private:
    __host__ __device__ NetworkGradientsLayout(SharedCarver& carver, TileCarver& tiles,
                                               const TitansParams& p, float* parked_at)
        : gates(carver),
          // Row t of its A is what token t reads.
          forward(tiles, p, true,
                  gates.a + (p.read == TitansRead::before ? 0 : Gates::kScoreStride)),
          d_o{carver.take<E>(Tokens * (D + kRowPadding))},
          d_y{carver.take<E>(Tokens * (D + kRowPadding))},
          scores{carver.take<E>(Tokens * Tiles::kScoreStride)},
          d_first{carver.take<E>(Tokens * Tiles::kScoreStride)},
          d_last{carver.take<E>(Tokens * Tiles::kScoreStride)},
          results(tiles.template take<float>(Tokens * Tiles::kSumStride)),
          d_norm_weight(carver.take<float>(D)),
          d_norm_bias(carver.take<float>(D)),
          parked{parked_at} {}
};

template <class E, int D, int Tokens, int Layers>
class NetworkGradients : public NetworkSegment<E, D, Tokens, Layers, LayerGradients<E, D, Tokens>> {
    using Base = NetworkSegment<E, D, Tokens, Layers, LayerGradients<E, D, Tokens>>;
    using Layout = NetworkGradientsLayout<E, D, Tokens, Layers>;
    using Tiles = typename Layout::Tiles;
    using Gates = typename Layout::Gates;
    using Base::error_gradients;
    using Base::hidden_;
    using Base::hidden_of_keys;
    using Base::hidden_of_queries;
    using Base::in_;
    using Base::key_gradients;
    using Base::keys_;
    using Base::l2_;
    using Base::layer_gradient;
    using Base::multiply_gradient;
    using Base::norm_bias_;
    using Base::norm_weight_;
    using Base::p_;
    using Base::query_gradients;
    using Base::reads_anchor_;
    using Base::residual_;
    using Base::shared_;
    using Base::thread_;
    using Base::values_;
    static constexpr int kLast = Layers - 1;

 public:
    using Sums = typename Base::Sums;

    DEVICE NetworkGradients(const Layout& shared, const TitansParams& p, const Sequence<Tokens>& in)
        : Base(shared.forward, p, in, shared.gates, shared.forward.a, *shared.forward.vectors,
               p.read == TitansRead::chunk, p.read == TitansRead::before,
               p.momentum.data != nullptr),
          all_(shared) {}

    // ---- inputs ----

    DEVICE void start_outputs_gradient(const Segment& at) const {
        this->start_rows(all_.d_o, p_.d_o, values_, at);
    }
    // Clears what this segment adds to.
    DEVICE void clear_sums() const {
        for (int i = thread_; i < Gates::kSums * kLayerWarps * Tokens; i += kLayerThreads)
            all_.gates.sums[i] = 0;
    }
    // The forward's vectors, from the gates' coefficients.
    DEVICE void spread_coefficients(const Segment& at) const {
        Vectors<Tokens>& to = *shared_.vectors;
        const int before = p_.read == TitansRead::before;
        if (thread_ < Tokens) {
            to.read_b[thread_] = all_.gates.b[thread_ + 1 - before];
            to.read_c[thread_] = all_.gates.c[thread_ + 1 - before];
            to.in_weights[thread_] = all_.gates.in_weights[thread_];
            to.in_momenta[thread_] = all_.gates.in_momenta[thread_];
        }
        if (thread_ == 0)
            to.b = all_.gates.b[at.rows], to.c = all_.gates.c[at.rows],
            to.m = all_.gates.m[at.rows];
    }

    // ---- through the norm of what is read ----
    // O is in `results`. First the rows are normalised there, then their gradients summed for the
    // norm, then dO becomes the gradient of what the norm was given.

    DEVICE_CALL RowStatistics normalise_outputs() const __restrict__ {
        const int t = Tiles::token_of_group();
        float mean = 0, variance = 0;
        this->for_columns([&](int v) { mean += result(t, v); });
        mean = Tiles::sum_of_group(mean) / values_;
        this->for_columns(
            [&](int v) { variance += (result(t, v) - mean) * (result(t, v) - mean); });
        variance = Tiles::sum_of_group(variance) / values_;
        const float inverse = 1 / sqrtf(variance + static_cast<float>(p_.norm_eps));
        this->for_columns([&](int v) { result(t, v) = (result(t, v) - mean) * inverse; });
        return {mean, inverse};
    }
    DEVICE_CALL void add_outputs_norm() const __restrict__ {
        for (int v = thread_; v < values_; v += kLayerThreads) {
            float of_weight = 0, of_bias = 0;
            for (int t = 0; t < Tokens; t++) {
                const float d_o = to_float(*all_.d_o.at(v, t));
                of_weight += d_o * result(t, v), of_bias += d_o;
            }
            all_.d_norm_weight[v] += of_weight, all_.d_norm_bias[v] += of_bias;
        }
    }
    DEVICE_CALL void through_outputs_norm(const RowStatistics& row) const __restrict__ {
        const int t = Tiles::token_of_group();
        float mean = 0, mean_y = 0;
        const auto gradient = [&](int v) { return to_float(*all_.d_o.at(v, t)) * norm_weight_[v]; };
        this->for_columns(
            [&](int v) { mean += gradient(v), mean_y += gradient(v) * result(t, v); });
        mean = Tiles::sum_of_group(mean) / values_;
        mean_y = Tiles::sum_of_group(mean_y) / values_;
        this->for_columns([&](int v) {
            *all_.d_o.at(v, t) =
                from_float<E>(row.inverse * (gradient(v) - mean - result(t, v) * mean_y));
        });
    }

    // ---- the last layer's reads ----

    DEVICE_CALL void differentiate_last_scores() const __restrict__ {
        if (reads_anchor_) return;
        this->template differentiate_scores<false>(hidden_of_queries(), hidden_of_keys(), hidden_,
                                                   all_.d_o, shared_.e, values_, &all_.scores,
                                                   all_.d_last);
    }
    // dZQ in place of ZQ.
    DEVICE_CALL void hidden_queries(const NetworkState& from, const LayerMatrices& anchor) const
        __restrict__ {
        if constexpr (Layers == 2)
            Tiles::for_slices(hidden_, [&](int slice) {
                Accumulator<Tiles::kTokenTiles> d_hq = {};
                query_gradients(d_hq, slice, 0, all_.d_o, shared_.hq, shared_.h, all_.d_last,
                                from.layer(1), anchor.layer[1]);
                for_pairs(d_hq, slice, 0, [&](int f, int t, float x, float y) {
                    Pair<E>& zq = pair_at(shared_.zq.at(f, t));
                    const float2 z = unpack<E>(zq);
                    zq = pack<E>(x * activate(p_.activation, z.x).slope,
                                 y * activate(p_.activation, z.y).slope);
                });
            });
    }

    // ---- the first layer's reads, or the only one's; its updates ----

    DEVICE_CALL void differentiate_first_scores() const __restrict__ {
        if constexpr (Layers == 2)
            if (!reads_anchor_)
                this->template differentiate_scores<true>(shared_.q, shared_.k, keys_, shared_.zq,
                                                          shared_.g, hidden_, nullptr,
                                                          all_.d_first);
    }
    // dQ in `results`; what reads and updates add to dK stays in d_k.
    DEVICE_CALL void queries_and_keys(Sums& d_k, const NetworkState& from,
                                      const LayerMatrices& anchor,
                                      const NetworkState& d_after) const __restrict__ {
        Tiles::for_part(keys_, [&](int slice, int token) {
            Sums d_q = {};
            query_gradients(d_q, slice, token, first_outputs_gradient(), shared_.q, shared_.k,
                            first_d_scores(), from.layer(0), anchor.layer[0]);
            key_gradients(d_k, slice, token, shared_.q, first_d_scores(), first_errors(),
                          d_after.layer(0));
            store_results(d_q, slice, token);
        });
    }
    DEVICE_CALL void leave_queries(const Segment& at) const __restrict__ {
        const int t = Tiles::token_of_group();
        if (t >= at.rows) return;
        E* const d_q = token<E>(p_.d_q, in_, at.first + t);
        const E* const d_o =
            residual_ && p_.d_o.data ? token<const E>(p_.d_o, in_, at.first + t) : nullptr;
        for (int i = Tiles::rank_in_group(); i < keys_; i += Tiles::kGroup)
            d_q[i] = from_float<E>(result(t, i) + (d_o ? to_float(d_o[i]) : 0));
    }
    // dU in place of G; dG * U * act''(Z), part of dZ, is put aside.
    DEVICE_CALL void first_errors_gradient(const LayerMatrices& anchor,
                                           const NetworkState& d_after) const __restrict__ {
        if constexpr (Layers == 2)
            Tiles::for_slices(hidden_, [&](int slice) {
                Accumulator<Tiles::kTokenTiles> d_g = {}, u = {};
                error_gradients(d_g, slice, 0, shared_.zq, shared_.scores, shared_.k, shared_.g,
                                d_after.layer(0));
                multiply_state<true>(u, anchor.layer[1], slice, shared_.e, 0);
                const int lane = thread_ % 32;
#pragma unroll
                for (int tile = 0; tile < Tiles::kTokenTiles; tile++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int f = slice + lane / 4 + half * 8, t = tile * 8 + lane % 4 * 2;
                        const float2 z = unpack<E>(pair_at(shared_.z.at(f, t)));
                        const Activated x = activate(p_.activation, z.x),
                                        y = activate(p_.activation, z.y);
                        const float *const d = &d_g[tile][half * 2], *const of = &u[tile][half * 2];
                        pair_at(all_.parked.at(f, t)) =
                            make_float2(d[0] * of[0] * x.curve, d[1] * of[1] * y.curve);
                        pair_at(shared_.g.at(f, t)) = pack<E>(d[0] * x.slope, d[1] * y.slope);
                    }
            });
    }

    // ---- the errors ----

    // dE in `results`.
    DEVICE_CALL void errors_gradient(const LayerMatrices& anchor, const NetworkState& d_after) const
        __restrict__ {
        Tiles::for_part(values_, [&](int slice, int token) {
            Sums d_e = {};
            error_gradients(d_e, slice, token, all_.d_o, all_.scores, hidden_of_keys(), shared_.e,
                            d_after.layer(kLast));
            if constexpr (Layers == 2)
                multiply_state<false>(d_e, anchor.layer[1], slice, shared_.g, token);
            store_results(d_e, slice, token);
        });
    }
    // From dE to dV and dY; the loss's gradient stays in `sums`, what the norm's weight gets of it
    // in `results`.
    DEVICE_CALL void through_errors(const Segment& at) const __restrict__ {
        const int t = Tiles::token_of_group();
        const bool valid = t < at.rows;
        E* const d_v = valid ? token<E>(p_.d_v, in_, at.first + t) : nullptr;
        if (norm_weight_) {
            through_error_norm(t, valid ? token<const E>(p_.v, in_, at.first + t) : nullptr, d_v);
            return;
        }
        this->for_columns([&](int v) {
            const float d_loss = result(t, v);
            this->sum(t, v) = d_loss;
            *all_.d_y.at(v, t) = from_float<E>(l2_ ? d_loss : 0);
            if (valid) d_v[v] = from_float<E>(-d_loss);
        });
    }
    DEVICE_CALL void add_errors_norm() const __restrict__ {
        if (!norm_weight_) return;
        for (int v = thread_; v < values_; v += kLayerThreads) {
            float of_weight = 0, of_bias = 0;
            for (int t = 0; t < Tokens; t++)
                of_weight += result(t, v), of_bias += l2_ ? this->sum(t, v) : 0;
            all_.d_norm_weight[v] += of_weight, all_.d_norm_bias[v] += of_bias;
        }
    }
    // dZ in place of Z.
    DEVICE_CALL void hidden_gradient(const LayerMatrices& anchor, const NetworkState& d_after) const
        __restrict__ {
        if constexpr (Layers == 2)
            Tiles::for_slices(hidden_, [&](int slice) {
                Accumulator<Tiles::kTokenTiles> d_h = {};
                key_gradients(d_h, slice, 0, shared_.hq, all_.d_last, shared_.e, d_after.layer(1));
                if (this->needs_outputs())
                    multiply_state<true>(d_h, anchor.layer[1], slice, all_.d_y, 0);
                for_pairs(d_h, slice, 0, [&](int f, int t, float x, float y) {
                    Pair<E>& place = pair_at(shared_.z.at(f, t));
                    const float2 z = unpack<E>(place), parked = pair_at(all_.parked.at(f, t));
                    place = pack<E>(parked.x + x * activate(p_.activation, z.x).slope,
                                    parked.y + y * activate(p_.activation, z.y).slope);
                });
            });
    }

    // ---- the inputs, and the state before the segment ----

    // dK in `results`.
    DEVICE_CALL void finish_keys(Sums& d_k, const LayerMatrices& anchor) const __restrict__ {
        Tiles::for_part(keys_, [&](int slice, int token) {
            if constexpr (Layers == 2)
                multiply_state<true>(d_k, anchor.layer[0], slice, shared_.z, token);
            else if (this->needs_outputs())
                multiply_state<true>(d_k, anchor.layer[0], slice, all_.d_y, token);
            store_results(d_k, slice, token);
        });
    }
    DEVICE_CALL void leave_keys(const Segment& at) const __restrict__ {
        const int t = Tiles::token_of_group();
        if (t >= at.rows) return;
        E* const d_k = token<E>(p_.d_k, in_, at.first + t);
        for (int i = Tiles::rank_in_group(); i < keys_; i += Tiles::kGroup)
            d_k[i] = from_float<E>(result(t, i) + (l2_ && residual_ ? this->sum(t, i) : 0));
    }
    // dW and dS before the segment, and the inner products of dW' and dS' with W and S; a pending
    // gradient of the anchor is taken up at the chunk's start. d_anchor has data where anchors are
    // kept.
    DEVICE_CALL void states_gradient(const Segment& at, const NetworkState& from,
                                     const NetworkState& d_state,
                                     const LayerMatrices& d_anchor) const __restrict__ {
        float products[kProducts] = {};
        if constexpr (Layers == 2) {
            layer_gradient(at, from.layer(0), d_state.layer(0), d_anchor.layer[0], shared_.zq,
                           shared_.q, products, [&](auto&, auto& sums, int row, int column) {
                               multiply_gradient(sums, shared_.z, shared_.k, row, column);
                           });
            layer_gradient(at, from.layer(1), d_state.layer(1), d_anchor.layer[1], all_.d_o,
                           shared_.hq, products, [&](auto&, auto& sums, int row, int column) {
                               multiply_gradient(sums, shared_.e, shared_.g, row, column);
                               if (this->needs_outputs())
                                   multiply_gradient(sums, all_.d_y, shared_.h, row, column);
                           });
        } else {
            layer_gradient(at, from.layer(0), d_state.layer(0), d_anchor.layer[0], all_.d_o,
                           shared_.q, products, [&](auto&, auto& sums, int row, int column) {
                               if (this->needs_outputs())
                                   multiply_gradient(sums, all_.d_y, shared_.k, row, column);
                           });
        }
#pragma unroll
        for (int i = 0; i < kProducts; i++) {
#pragma unroll
            for (int distance = 16; distance; distance /= 2)
                products[i] += __shfl_xor_sync(~0u, products[i], distance);
            if (thread_ % 32 == 0) all_.gates.products[thread_ / 32 * kProducts + i] = products[i];
        }
    }

 private:
    DEVICE float& result(int t, int v) const { return all_.results[t * Tiles::kSumStride + v]; }
    DEVICE void store_results(Sums& from, int slice, int token) const {
        this->store_sums(all_.results, from, slice, token);
    }

    // Of the layer whose inputs are K and Q.
    DEVICE auto first_outputs_gradient() const {
        if constexpr (Layers == 2)
            return shared_.zq;
        else
            return all_.d_o;
    }
    DEVICE auto first_errors() const {
        if constexpr (Layers == 2)
            return shared_.g;
        else
            return shared_.e;
    }
    DEVICE typename Tiles::Square first_d_scores() const {
        return Layers == 2 ? all_.d_first : all_.d_last;
    }

    // ---- the norm of the errors ----
    // From dE in `results` (docs/derivations.md); v: the token's row, or null past the segment.
    DEVICE void through_error_norm(int t, const E* values, E* d_v) const {
        const RowStatistics row = this->statistics(t);
        const float count = static_cast<float>(values_);
        const auto y = [&](int v) { return this->normal(row, t, v); };
        const auto loss = [&](int v) {
            float x = values ? -to_float(values[v]) : 0;
            if (!l2_) return x;
            x += y(v) * norm_weight_[v] + norm_bias_[v];
            return residual_ ? x + to_float(*shared_.k.at(v, t)) : x;
        };
        const auto u = [&](int v) { return row.inverse * result(t, v); };
        float mean_u = 0, mean_uy = 0, mean_g = 0, mean_gy = 0;
        this->for_columns([&](int v) {
            const float g = loss(v) * norm_weight_[v];
            mean_u += u(v), mean_uy += u(v) * y(v), mean_g += g, mean_gy += g * y(v);
        });
        for (float* mean : {&mean_u, &mean_uy, &mean_g, &mean_gy})
            *mean = Tiles::sum_of_group(*mean) / count;
        const auto d_loss = [&](int v) {
            return (u(v) - mean_u - y(v) * mean_uy) * norm_weight_[v];
        };
        const auto d_y = [&](int v) {
            const float direct = l2_ ? d_loss(v) * norm_weight_[v] : 0;
            return direct - u(v) * mean_gy - loss(v) * norm_weight_[v] * mean_uy;
        };
        float d_scale = 0, mean_dy = 0, mean_dyy = 0;
        this->for_columns([&](int v) {
            d_scale += result(t, v) * (loss(v) * norm_weight_[v] - mean_g - y(v) * mean_gy);
            mean_dy += d_y(v), mean_dyy += d_y(v) * y(v);
        });
        d_scale = Tiles::sum_of_group(d_scale);
        mean_dy = Tiles::sum_of_group(mean_dy) / count;
        mean_dyy = Tiles::sum_of_group(mean_dyy) / count;
        this->for_columns([&](int v) {
            const float of_loss = d_loss(v), normal = y(v);
            *all_.d_y.at(v, t) =
                from_float<E>(row.inverse * (d_y(v) - mean_dy - normal * mean_dyy) -
                              row.inverse * row.inverse * d_scale * normal / count);
            if (d_v) d_v[v] = from_float<E>(-of_loss);
            result(t, v) =
                (u(v) - mean_u - normal * mean_uy) * loss(v) + (l2_ ? of_loss * normal : 0);
            this->sum(t, v) = of_loss;  // the last use of this element of Y
        });
    }

    const Layout all_;
};

}  // namespace hope
