// How kernels of memories whose layers are kept as matrices are launched: the choice of an
// instance, and of what lies in shared memory. Such a kernel's params have, found by their type,
//
//     instance_for(p)          what its instance has to have room for
//     state_matrices(p)        how many matrices a state's weights are (or its momenta)
//     floats_of_layer(p, i)    numbers of such a matrix as it lies
#pragma once
#include "common/for_element.cuh"
#include "common/layers.cuh"

namespace hope {

// Where a block keeps what does not fit its shared memory: `floats` of scratch memory for each
// block, first the tiles of float if `spills`, then the state matrices after the first `resident`.
struct LayerMemory {
    float* scratch;
    int64_t floats;
    int resident;
    bool spills;

    DEVICE float* of_block() const { return scratch + blockIdx.x * floats; }
};

// A kernel's demand of shared memory in bytes and of state matrices, in the order in which they are
// wanted there: groups of a state's weights, or momenta.
struct LayerDemand {
    size_t tiles, spilled_tiles;  // the latter without what may lie in scratch memory
    int64_t spilled_floats;       // which is that much
    int groups;
    int64_t more_floats;  // of scratch memory, after all that
};

// layout(tiles) makes a kernel's layout.
template <class MakeLayout>
LayerDemand tiles_demand(const MakeLayout& layout) {
    SharedCarver all(nullptr), rest(nullptr);
    float* const scratch = reinterpret_cast<float*>(sizeof(float) * 4);  // any but null
    TileCarver in_shared(all, nullptr), spilled(rest, scratch);
    layout(in_shared), layout(spilled);
    return {all.used(), rest.used(), spilled.rest() - scratch, 0, 0};
}

struct LayerPlan {
    bool fits;
    LayerMemory memory;
    size_t shared_bytes;
};

template <class Params>
LayerPlan layer_plan(const Params& p, const LayerDemand& demand) {
    const size_t room = shared_bytes_of_a_block();
    LayerPlan plan{};
    plan.memory.spills = demand.tiles > room;
    plan.shared_bytes = plan.memory.spills ? demand.spilled_tiles : demand.tiles;
    plan.fits = plan.shared_bytes <= room;
    if (plan.memory.spills) plan.memory.floats = demand.spilled_floats;
    const int matrices = state_matrices(p);
    bool fitting = true;
    for (int i = 0; i < demand.groups * matrices; i++) {
        const int64_t floats = floats_of_layer(p, i % matrices);
        SharedCarver piece(nullptr);  // with what a carver adds
        piece.take<float>(floats);
        fitting = fitting && plan.shared_bytes + piece.used() <= room;
        if (fitting)
            plan.shared_bytes += piece.used(), plan.memory.resident++;
        else
            plan.memory.floats += floats;
    }
    plan.memory.floats += demand.more_floats;
    return plan;
}

struct LayerInstance {
    int64_t widest;  // most features of a token
    int layers;      // of a memory, 1 or 2
};

// Whether the anchor may be another matrix than the state before a segment.
template <int Tokens, class Params>
__host__ __device__ bool keeps_anchor(const Params& p) {
    return p.position || Sequence<Tokens>::segments_of_chunk(p) > 1;
}

// Chunks whose states a backward keeps: those between two checkpoints.
template <class Params>
__host__ __device__ int64_t chunks_of_group(const Params& p) {
    const int64_t most = p.tokens / p.chunk_size + 2;
    return p.checkpoint_every < most ? p.checkpoint_every : most;
}

// States that its block keeps: before a group's chunks, then before a chunk's other segments.
template <int Tokens, class Params>
int64_t states_of_block(const Params& p) {
    return chunks_of_group(p) + Sequence<Tokens>::segments_of_chunk(p) - 1;
}

// Tokens of the segments that a kernel of 16-bit numbers has instances for. Where 32 fit every
// device (99 KiB of shared memory, with what is of float in scratch memory), or hardly any, there
// is no other; in float32 there are 16 always.
enum class SegmentTokens { only_16, only_32, both };

// body(plan, kernel) for the instance of a kernel that the params want: tiles with room for D
// columns, segments of as many tokens as fit the device. Kernel<E, D, Tokens, Layers> has
// demand(params), the kernel itself, and `segments`, which says what Tokens there are. Returns
// false if no segment fits.
template <class E, template <class, int D, int Tokens, int Layers> class Kernel, class Params,
          class Body>
bool for_fitting(const Params& p, const Body& body) {
    const LayerInstance wanted = instance_for(p);
    const auto attempt = [&](auto width, auto tokens, auto layers) {
        using Instance =
            Kernel<E, decltype(width)::value, decltype(tokens)::value, decltype(layers)::value>;
        const LayerPlan plan = layer_plan(p, Instance::demand(p));
        if (plan.fits) body(plan, Instance::kernel());
        return plan.fits;
    };
    const auto for_tokens = [&](auto width, auto layers) {
        constexpr SegmentTokens kTokens =
            sizeof(E) == 4
                ? SegmentTokens::only_16
                : Kernel<E, decltype(width)::value, 16, decltype(layers)::value>::segments;
        if constexpr (kTokens != SegmentTokens::only_16)
            if (attempt(width, Constant<32>(), layers)) return true;
        if constexpr (kTokens == SegmentTokens::only_32)
            return false;
        else
            return attempt(width, Constant<16>(), layers);
    };
    const auto for_depth = [&](auto width) {
        return wanted.layers == 2 ? for_tokens(width, Constant<2>())
                                  : for_tokens(width, Constant<1>());
    };
    return wanted.widest <= 64 ? for_depth(Constant<64>()) : for_depth(Constant<128>());
}

// A kernel's instances of one dtype: a block for each (sequence, head). Not inline, so that an
// extern template keeps them out of other sources.
template <class E, template <class, int, int, int> class Kernel, class Params>
struct LayerKernels {
    // Bytes of scratch memory, -1 if no segment fits.
    static int64_t scratch(const Params& p);
    static void run(const Params& p, void* scratch, void* stream);
};

template <class E, template <class, int, int, int> class Kernel, class Params>
int64_t LayerKernels<E, Kernel, Params>::scratch(const Params& p) {
    int64_t floats = 0;
    const bool fits = for_fitting<E, Kernel>(
        p, [&](const LayerPlan& plan, auto) { floats = plan.memory.floats; });
    return fits ? p.sequences * p.heads * floats * static_cast<int64_t>(sizeof(float)) : -1;
}
template <class E, template <class, int, int, int> class Kernel, class Params>
void LayerKernels<E, Kernel, Params>::run(const Params& p, void* scratch, void* stream) {
    const int64_t blocks = p.sequences * p.heads;
    if (blocks == 0) return;
    for_fitting<E, Kernel>(p, [&](const LayerPlan& plan, auto kernel) {
        LayerMemory memory = plan.memory;
        memory.scratch = static_cast<float*>(scratch);
        launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kLayerThreads), plan.shared_bytes,
               static_cast<cudaStream_t>(stream), p, memory);
    });
}

}  // namespace hope
