// A Titans memory of two layers, or with a norm, backward: a block walks through one (sequence,
// head) from the last segment to the first, with the phases of titans_network_gradients.cuh.
//
//   per group of chunks between two checkpoints, the last first:
//       states   forward from the checkpoint: the state before every chunk, in scratch memory
//       per chunk, the last first:
//           states     forward again through the chunk, if it has several segments
//           gradients  its segments, the last first
//
// The gradients dW1, dW2, dS1, dS2 lie like the states in the forward: in shared memory as far as
// there is room. Scratch memory has, for each block, the states of one group of chunks: with the
// distance between checkpoints that the forward chooses, about as much as q, k and v of all tokens.
#pragma once
#include "titans/titans_network_gradients.cuh"
#include "titans/titans_network_launch.cuh"

namespace hope {

template <class E, int D, int Tokens, int Layers>
class BackwardWalk {
    using Layout = NetworkGradientsLayout<E, D, Tokens, Layers>;
    using Segments = NetworkGradients<E, D, Tokens, Layers>;
    using Gates = GateGradients<typename Layout::Gates>;

 public:
    DEVICE BackwardWalk(const Layout& shared, const TitansParams& p, const Sequence<Tokens>& in,
                        StateCarver& carver)
        : shared_(shared), p_(p), in_(in), segments_(shared, p, in), d_state_{}, d_anchor_{} {
        d_state_.weights = take_matrices(p, carver);
        if (p.has_momentum) d_state_.momenta = take_matrices(p, carver);
        if (keeps_anchor<Tokens>(p)) d_anchor_ = take_matrices(p, carver);
        states_ = carver.rest();
        if (!p.position) return;
        given_anchor_ = network_state(p, states_).weights;
        states_ += floats_of_network(p);
    }

    DEVICE void run() {
        start();
        const int chunks = in_.chunks(), every = static_cast<int>(p_.checkpoint_every);
        for (int last = chunks; last > 0;) {
            const int first = (last - 1) / every * every;
            __syncthreads();  // the states of the group after this one have been used
            const NetworkState start = state(0);
            if (first > 0) {
                copy_from_checkpoint(p_, start, checkpoint(p_, in_, first));
            } else {
                load_matrices(p_, start.weights, p_.weights, in_.index, in_.head);
                if (p_.has_momentum)
                    load_matrices(p_, start.momenta, p_.momenta, in_.index, in_.head);
            }
            for (int chunk = first; chunk + 1 < last; chunk++)
                advance_through(chunk, state(chunk - first), state(chunk + 1 - first));
            for (int chunk = last - 1; chunk >= first; chunk--)
                back_through(chunk, state(chunk - first));
            last = first;
        }
        __syncthreads();
        finish();
    }

 private:
    DEVICE NetworkState state(int i) const {
        return network_state(p_, states_ + i * floats_of_state(p_));
    }
    // Before segment `part` of a chunk, from the second on.
    DEVICE NetworkState state_of_part(int part) const {
        return state(static_cast<int>(chunks_of_group(p_)) + part - 1);
    }
    DEVICE LayerMatrices anchor_of(int chunk, const NetworkState& at_start) const {
        return chunk == 0 && in_.offset ? given_anchor_ : at_start.weights;
    }

    // The gradients of what the sequence ends with: a chunk that is complete has the final weights
    // as its anchor.
    DEVICE void start() {
        const MatrixTensor none[kMostLayers] = {};
        const bool inside = in_.ends_inside_chunk();
        load_matrices(p_, d_state_.weights, p_.d_final_weights, in_.index, in_.head);
        if (p_.has_momentum)
            load_matrices(p_, d_state_.momenta, p_.d_final_momenta, in_.index, in_.head);
        if (!inside) add_matrices(p_, d_state_.weights, p_.d_final_anchor, in_.index, in_.head);
        if (d_anchor_.layer[0].data)
            load_matrices(p_, d_anchor_, inside ? p_.d_final_anchor : none, in_.index, in_.head);
        else
            anchor_pending_ = inside;
        if (in_.offset)
            load_matrices(p_, given_anchor_, p_.anchor[0].data ? p_.anchor : p_.weights, in_.index,
                          in_.head);
        for (int v = static_cast<int>(threadIdx.x); v < p_.value_dim; v += kLayerThreads)
            shared_.d_norm_weight[v] = shared_.d_norm_bias[v] = 0;
    }
    DEVICE void finish() const {
        store_matrices(p_, p_.d_weights, d_state_.weights, in_.index, in_.head);
        if (p_.has_momentum)
            store_matrices(p_, p_.d_momenta, d_state_.momenta, in_.index, in_.head);
        if (in_.offset)
            store_matrices(p_, p_.d_anchor, d_anchor_, in_.index, in_.head);
        else
            for_layers(p_, [&](int i) {
                clear_matrix(matrix(p_.d_anchor[i], in_.index, in_.head),
                             rows_of_layer(p_, i) * columns_of_layer(p_, i));
            });
        if (!p_.norm_weight.data) return;
        float *const d_weight = matrix(p_.d_norm_weight, in_.index, in_.head),
                     *const d_bias = matrix(p_.d_norm_bias, in_.index, in_.head);
        for (int v = static_cast<int>(threadIdx.x); v < p_.value_dim; v += kLayerThreads)
            d_weight[v] = shared_.d_norm_weight[v], d_bias[v] = shared_.d_norm_bias[v];
    }

    // The state after a segment.
    DEVICE void advance(const Segment& at, const LayerMatrices& anchor, const NetworkState& from,
                        const NetworkState& to) const {
        segments_.start_keys(at), segments_.start_values(at);
        const float lr = segments_.begin(at);
        segments_.compute_coefficients(at, lr);
        segments_.hidden_keys(anchor);
        __syncthreads();
        if (segments_.needs_outputs()) segments_.outputs(anchor);
        __syncthreads();
        segments_.errors();
        __syncthreads();
        segments_.template first_layer<false, false, true>(from, anchor, to);
        segments_.update_last(from, to);
        __syncthreads();
    }
    DEVICE void advance_through(int chunk, const NetworkState& from, const NetworkState& to) const {
        const int first = in_.segments_before(chunk),
                  count = in_.segments_before(chunk + 1) - first;
        for (int i = 0; i < count; i++)
            advance(in_.segment(first + i), anchor_of(chunk, from), i ? state_of_part(i) : from,
                    i + 1 < count ? state_of_part(i + 1) : to);
    }
    DEVICE void back_through(int chunk, const NetworkState& start) {
        const int first = in_.segments_before(chunk),
                  count = in_.segments_before(chunk + 1) - first;
        const LayerMatrices anchor = anchor_of(chunk, start);
        for (int i = 0; i + 1 < count; i++)
            advance(in_.segment(first + i), anchor, i ? state_of_part(i) : start,
                    state_of_part(i + 1));
        for (int i = count - 1; i >= 0; i--)
            back(in_.segment(first + i), anchor, i ? state_of_part(i) : start);
    }

    DEVICE void back(const Segment& at, const LayerMatrices& anchor, const NetworkState& from) {
        const Gates gates(shared_.gates, p_, in_, at, nullptr);
        segments_.start_keys(at), segments_.start_queries(at), segments_.start_values(at);
        segments_.start_outputs_gradient(at);
        segments_.clear_sums();
        gates.load();
        segments_.begin(at);

        gates.compute_coefficients();
        segments_.hidden_keys(anchor);
        __syncthreads();
        segments_.spread_coefficients(at);
        segments_.score_first();
        if (segments_.needs_outputs()) segments_.outputs(anchor);
        __syncthreads();
        segments_.errors();
        __syncthreads();
        if (Layers == 2) {
            segments_.template first_layer<true, true, false>(from, anchor, NetworkState{});
            __syncthreads();
        }
        if (p_.norm_weight.data) through_outputs_norm(from, anchor);

        segments_.differentiate_last_scores();
        __syncthreads();
        if (Layers == 2) {
            segments_.hidden_queries(from, anchor);
            __syncthreads();
            segments_.differentiate_first_scores();
            __syncthreads();
        }
        typename Segments::Sums d_k = {};
        segments_.queries_and_keys(d_k, from, anchor, d_state_);
        __syncthreads();
        segments_.leave_queries(at);
        segments_.first_errors_gradient(anchor, d_state_);
        __syncthreads();
        segments_.errors_gradient(anchor, d_state_);
        __syncthreads();
        segments_.through_errors(at);
        __syncthreads();
        segments_.add_errors_norm();
        segments_.hidden_gradient(anchor, d_state_);
        __syncthreads();
        segments_.finish_keys(d_k, anchor);
        segments_.states_gradient(at, from, d_state_, d_anchor_);
        __syncthreads();
        segments_.leave_keys(at);
        gates.through_recurrences();
        __syncthreads();
        gates.store();
        if (anchor_pending_) {
            add_matrices(p_, d_state_.weights, p_.d_final_anchor, in_.index, in_.head);
            anchor_pending_ = false;
        }
    }
    DEVICE void through_outputs_norm(const NetworkState& from, const LayerMatrices& anchor) const {
        typename Segments::Sums o = {};
        segments_.score_last(shared_.scores);
        segments_.start_reads(o, from, anchor);
        __syncthreads();
        segments_.finish_reads(o, shared_.scores, shared_.results);
        __syncthreads();
        const RowStatistics row = segments_.normalise_outputs();
        __syncthreads();
        segments_.add_outputs_norm();
        __syncthreads();
        segments_.through_outputs_norm(row);
        __syncthreads();
    }

    const Layout& shared_;
    const TitansParams& p_;
    const Sequence<Tokens>& in_;
    const Segments segments_;
    NetworkState d_state_;    // after the segment that is worked on
    LayerMatrices d_anchor_;  // of the chunk that is worked on, if anchors are kept
    LayerMatrices given_anchor_;
    float* states_;
    bool anchor_pending_ = false;  // until the last chunk's start
};

template <class E, int D, int Tokens, int Layers>
__global__ void __launch_bounds__(kLayerThreads, 1)
    titans_network_bwd_kernel(GRID_CONSTANT const TitansParams p, const LayerMemory memory) {
    using Layout = NetworkGradientsLayout<E, D, Tokens, Layers>;
    SharedCarver carver(dynamic_shared());
    float* scratch = memory.of_block();
    TileCarver tiles(carver, memory.spills ? scratch + Layout::parked_floats(p) : nullptr);
    const Layout shared(tiles, p, scratch);
    scratch = memory.spills ? tiles.rest() : scratch + Layout::parked_floats(p);
    StateCarver states(carver, scratch, memory.resident);
    const Sequence<Tokens> in(p, static_cast<int>(blockIdx.x / p.heads),
                              static_cast<int>(blockIdx.x % p.heads));
    BackwardWalk<E, D, Tokens, Layers>(shared, p, in, states).run();
}

template <class E, int D, int Tokens, int Layers>
struct NetworkBackward {
    static auto kernel() { return titans_network_bwd_kernel<E, D, Tokens, Layers>; }
    static constexpr SegmentTokens segments =
        Layers == 1 ? SegmentTokens::only_32 : SegmentTokens::both;

    static LayerDemand demand(const TitansParams& p) {
        using Layout = NetworkGradientsLayout<E, D, Tokens, Layers>;
        LayerDemand demand = tiles_demand([&](TileCarver& tiles) { Layout(tiles, p, nullptr); });
        demand.groups = 1 + p.has_momentum + keeps_anchor<Tokens>(p);
        demand.more_floats = Layout::parked_floats(p) + (p.position ? floats_of_network(p) : 0) +
                             states_of_block<Tokens>(p) * floats_of_state(p);
        return demand;
    }
};

// Compiled one by one: each takes minutes.
extern template struct LayerKernels<float, NetworkBackward, TitansParams>;
extern template struct LayerKernels<bf16, NetworkBackward, TitansParams>;
extern template struct LayerKernels<fp16, NetworkBackward, TitansParams>;

}  // namespace hope
