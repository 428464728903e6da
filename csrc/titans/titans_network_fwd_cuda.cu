// A Titans memory of two layers, or with a norm, forward: a block walks through one (sequence,
// head), segment by segment, with the phases of titans_network_segment.cuh.
//
//     hidden keys | scores, outputs | errors | first layer | scores, reads | reads, last layer |
//     outputs; every | is a barrier.
//
// Shared memory has the segment's tiles and as many of the state's float matrices as fit: W1, W2,
// then the momenta. The others stay in scratch memory, which is not read by any other block and is
// small enough for the device's cache. On the critical path are the products of one segment after
// another; the next one's rows are on their way while the last layer is updated.
#include "titans/titans_cuda.h"
#include "titans/titans_network_launch.cuh"

namespace hope {
namespace {

template <class E, int D, int Tokens, int Layers>
__global__ void __launch_bounds__(kLayerThreads, 1)
    titans_network_fwd_kernel(GRID_CONSTANT const TitansParams p, const LayerMemory memory) {
    using Layout = NetworkLayout<E, D, Tokens, Layers>;
    using Walk = NetworkSegment<E, D, Tokens, Layers>;
    SharedCarver carver(dynamic_shared());
    float* scratch = memory.of_block();
    TileCarver tiles(carver, memory.spills ? scratch : nullptr);
    const Layout shared(tiles, p, false);
    if (memory.spills) scratch = tiles.rest();
    StateCarver states(carver, scratch, memory.resident);
    const Sequence<Tokens> in(p, static_cast<int>(blockIdx.x / p.heads),
                              static_cast<int>(blockIdx.x % p.heads));
    const Walk walk(shared, p, in, shared.a, *shared.vectors, p.read == TitansRead::chunk);

    // The anchor is the state before a chunk; it stays while segments after the first are added.
    NetworkState state{};
    LayerMatrices spare{};
    state.weights = take_matrices(p, states);
    if (p.has_momentum) state.momenta = take_matrices(p, states);
    if (keeps_anchor<Tokens>(p)) spare = take_matrices(p, states);
    load_matrices(p, state.weights, p.weights, in.index, in.head);
    if (p.has_momentum) load_matrices(p, state.momenta, p.momenta, in.index, in.head);
    LayerMatrices anchor = state.weights;
    if (in.offset && p.anchor[0].data) {
        load_matrices(p, spare, p.anchor, in.index, in.head);
        anchor = spare;
    }

    bool left_anchor = false;

    const int count = in.segments_before(in.chunks());
    if (count) {
        const Segment first = in.segment(0);
        walk.start_keys(first), walk.start_queries(first), walk.start_values(first);
    }
    for (int i = 0; i < count; i++) {
        const Segment at = in.segment(i), next = i + 1 < count ? in.segment(i + 1) : Segment{};
        const float lr = walk.begin(at);
        if (at.new_chunk) {
            anchor = state.weights;
            if (at.chunk == in.chunks() - 1 && in.ends_inside_chunk()) {
                store_matrices(p, p.final_anchor, anchor, in.index, in.head);
                left_anchor = true;
            }
            if (float* to = checkpoint(p, in, at.chunk)) copy_to_checkpoint(p, to, state);
        }
        const bool splits = at.new_chunk && in.parts > 1;
        NetworkState after = state;
        if (splits) after.weights = spare;

        walk.compute_coefficients(at, lr);
        walk.hidden_keys(anchor);
        __syncthreads();
        walk.score_first();
        if (walk.needs_outputs()) walk.outputs(anchor);
        __syncthreads();
        walk.errors();
        __syncthreads();
        if (Layers == 2) {
            walk.template first_layer<true, false, true>(state, anchor, after);
            __syncthreads();
        }
        walk.score_last(shared.scores);
        typename Walk::Sums o = {};
        walk.start_reads(o, state, anchor);
        __syncthreads();
        if (Layers == 2 && next.rows) walk.start_keys(next), walk.start_queries(next);
        walk.finish_reads(o, shared.scores, shared.sums);
        walk.update_last(state, after);
        __syncthreads();
        if (Layers == 1 && next.rows) walk.start_keys(next), walk.start_queries(next);
        if (next.rows) walk.start_values(next);
        walk.leave_outputs(at);
        if (splits) spare = state.weights;  // where the anchor is
        state = after;
    }
    __syncthreads();
    store_matrices(p, p.final_weights, state.weights, in.index, in.head);
    if (p.has_momentum) store_matrices(p, p.final_momenta, state.momenta, in.index, in.head);
    if (!left_anchor)
        store_matrices(p, p.final_anchor, in.ends_inside_chunk() ? anchor : state.weights, in.index,
                       in.head);
    if (p.checkpoint_every && threadIdx.x < 32) clear_unused_checkpoints(p, in);
}

template <class E, int D, int Tokens, int Layers>
struct NetworkForward {
    static auto kernel() { return titans_network_fwd_kernel<E, D, Tokens, Layers>; }
    static constexpr SegmentTokens segments =
        Layers == 1 ? SegmentTokens::only_32 : SegmentTokens::both;

    static LayerDemand demand(const TitansParams& p) {
        LayerDemand demand = tiles_demand(
            [&](TileCarver& tiles) { NetworkLayout<E, D, Tokens, Layers>(tiles, p, false); });
        demand.groups = 1 + p.has_momentum + keeps_anchor<Tokens>(p);
        return demand;
    }
};

}  // namespace

int64_t titans_network_fwd_cuda_scratch(const TitansParams& params) {
    return for_element(params.element, [&](auto element) {
        return NetworkKernels<typename decltype(element)::type, NetworkForward>::scratch(params);
    });
}

void titans_network_fwd_cuda(const TitansParams& params, void* scratch, void* stream) {
    for_element(params.element, [&](auto element) {
        NetworkKernels<typename decltype(element)::type, NetworkForward>::run(params, scratch,
                                                                              stream);
    });
}

}  // namespace hope
