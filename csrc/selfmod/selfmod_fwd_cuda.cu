// HOPE's self-modifying memories, forward: a block walks through one (sequence, head), segment by
// segment, with the phases of selfmod_tokens.cuh and selfmod_segment.cuh.
//
//     generate | for each memory:  learn | read, of one of them | update; every | is a barrier.
//
// Keys, values and gates never leave the chip. Shared memory has the segment's tiles and as many of
// the state's float matrices as fit, in the order of the memories; the others stay in scratch
// memory, which is not read by any other block and is small enough for the device's cache. On the
// critical path are the segments' products one after another; the next segment's rows are on their
// way as soon as this one's have been used.
#include "selfmod/selfmod_cuda.h"
#include "selfmod/selfmod_segment.cuh"

namespace hope {
namespace {

template <class E, int D, int Tokens, int Layers>
__global__ void __launch_bounds__(kLayerThreads, 1)
    selfmod_fwd_kernel(GRID_CONSTANT const SelfmodParams p, const LayerMemory memory) {
    using Layout = SelfmodLayout<E, D, Tokens, Layers>;
    using Walk = SelfmodSegment<E, D, Tokens, Layers>;
    SharedCarver carver(dynamic_shared());
    float* scratch = memory.of_block();
    TileCarver tiles(carver, memory.spills ? scratch : nullptr);
    const Layout shared(tiles, p, false);
    if (memory.spills) scratch = tiles.rest();
    StateCarver states(carver, scratch, memory.resident);
    const Sequence<Tokens> in(p, static_cast<int>(blockIdx.x / p.heads),
                              static_cast<int>(blockIdx.x % p.heads));
    const Walk walk(shared, p, in, Walk::rows_read(shared, p), *shared.vectors,
                    p.read == Read::chunk);

    // The anchor is the state before a chunk; it stays while segments after the first are added.
    const SelfmodMatrices *state = &shared.tables[0], *anchor = state, *spare = &shared.tables[1];
    take_matrices(p, shared.tables[0], states);
    if (keeps_anchor<Tokens>(p)) take_matrices(p, shared.tables[1], states);
    __syncthreads();
    load_matrices(p, *state, p.weights, in.index, in.head);
    if (in.offset && p.anchor[0].data) {
        load_matrices(p, *spare, p.anchor, in.index, in.head);
        anchor = spare;
    }

    bool left_anchor = false;
    const int count = in.segments_before(in.chunks());
    if (count) walk.start_inputs(in.segment(0)), walk.start_queries(in.segment(0));
    for (int i = 0; i < count; i++) {
        const Segment at = in.segment(i), next = i + 1 < count ? in.segment(i + 1) : Segment{};
        walk.wait();
        if (at.new_chunk) {
            anchor = state;
            if (at.chunk == in.chunks() - 1 && in.ends_inside_chunk()) {
                store_matrices(p, p.final_anchor, *anchor, in.index, in.head);
                left_anchor = true;
            }
            if (float* to = checkpoint(p, in, at.chunk, numbers_of_state(p)))
                copy_to_checkpoint(p, to, *state);
        }
        const bool splits = at.new_chunk && in.parts > 1;
        const SelfmodMatrices* const after = splits ? spare : state;

        walk.generate(*anchor, at);
        if (next.rows) walk.start_inputs(next);
        for (int m = 0; m < kSelfmodMemories; m++) {
            walk.learn(state->memory[m], anchor->memory[m], m, at.new_chunk);
            if (m == kMemory) {
                walk.read(state->memory[m], anchor->memory[m]);
                walk.leave_outputs(at);
                if (next.rows) walk.start_queries(next);
            }
            walk.update(state->memory[m], after->memory[m]);
            __syncthreads();
        }
        if (splits) spare = state;  // where the anchor is
        state = after;
    }
    __syncthreads();
    store_matrices(p, p.final_weights, *state, in.index, in.head);
    if (!left_anchor)
        store_matrices(p, p.final_anchor, in.ends_inside_chunk() ? *anchor : *state, in.index,
                       in.head);
    if (p.checkpoint_every && threadIdx.x < 32)
        clear_unused_checkpoints(p, in, numbers_of_state(p));
}

template <class E, int D, int Tokens, int Layers>
struct SelfmodForward {
    static auto kernel() { return selfmod_fwd_kernel<E, D, Tokens, Layers>; }
    static constexpr SegmentTokens segments =
        Layers == 1 ? SegmentTokens::only_32 : SegmentTokens::both;

    static LayerDemand demand(const SelfmodParams& p) {
        LayerDemand demand = tiles_demand(
            [&](TileCarver& tiles) { SelfmodLayout<E, D, Tokens, Layers>(tiles, p, false); });
        demand.groups = 1 + keeps_anchor<Tokens>(p);
        return demand;
    }
};

template <class E>
using Kernels = LayerKernels<E, SelfmodForward, SelfmodParams>;

}  // namespace

int64_t selfmod_fwd_cuda_scratch(const SelfmodParams& params) {
    return for_element(params.element, [&](auto element) {
        return Kernels<typename decltype(element)::type>::scratch(params);
    });
}

void selfmod_fwd_cuda(const SelfmodParams& params, void* scratch, void* stream) {
    for_element(params.element, [&](auto element) {
        Kernels<typename decltype(element)::type>::run(params, scratch, stream);
    });
}

}  // namespace hope
