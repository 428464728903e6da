// How the kernels of memories with two layers, or with a norm, are launched: the choice of an
// instance, and of what lies in shared memory.
#pragma once
#include "titans/titans_launch.cuh"
#include "titans/titans_network_segment.cuh"

namespace hope {

// Where a block keeps what does not fit its shared memory: `floats` of scratch memory for each
// block, first the tiles of float if `spills`, then the state matrices after the first `resident`.
struct NetworkMemory {
    float* scratch;
    int64_t floats;
    int resident;
    bool spills;

    DEVICE float* of_block() const { return scratch + blockIdx.x * floats; }
};

// A kernel's demand of shared memory in bytes and of state matrices, in the order in which they are
// wanted there: groups of all layers' matrices.
struct NetworkDemand {
    size_t tiles, spilled_tiles;  // the latter without what may lie in scratch memory
    int64_t spilled_floats;       // which is that much
    int groups;
    int64_t more_floats;  // of scratch memory, after all that
};

// layout(tiles) makes a kernel's layout.
template <class MakeLayout>
NetworkDemand tiles_demand(const MakeLayout& layout) {
    SharedCarver all(nullptr), rest(nullptr);
    float* const scratch = reinterpret_cast<float*>(sizeof(float) * 4);  // any but null
    TileCarver in_shared(all, nullptr), spilled(rest, scratch);
    layout(in_shared), layout(spilled);
    return {all.used(), rest.used(), spilled.rest() - scratch, 0, 0};
}

struct NetworkPlan {
    bool fits;
    NetworkMemory memory;
    size_t shared_bytes;
};

inline NetworkPlan network_plan(const TitansParams& p, const NetworkDemand& demand) {
    const size_t room = shared_bytes_of_a_block();
    NetworkPlan plan{};
    plan.memory.spills = demand.tiles > room;
    plan.shared_bytes = plan.memory.spills ? demand.spilled_tiles : demand.tiles;
    plan.fits = plan.shared_bytes <= room;
    if (plan.memory.spills) plan.memory.floats = demand.spilled_floats;
    const int layers = network_layers(p);
    bool fitting = true;
    for (int i = 0; i < demand.groups * layers; i++) {
        const int64_t floats = floats_of_layer(p, i % layers);
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

// Whether the anchor may be another matrix than the state before a segment.
template <int Tokens>
__host__ __device__ bool keeps_anchor(const TitansParams& p) {
    return p.position || Sequence<Tokens>::segments_of_chunk(p) > 1;
}

// body(plan, kernel) for the instance of a kernel that the params want: tiles with room for D
// columns, segments of as many tokens as fit the device. Kernel<E, D, Tokens, Layers> has
// demand(params) and the kernel itself. Returns false if no segment fits.
template <class E, template <class, int D, int Tokens, int Layers> class Kernel, class Body>
bool for_network(const TitansParams& p, const Body& body) {
    const auto attempt = [&](auto width, auto tokens, auto layers) {
        using Instance =
            Kernel<E, decltype(width)::value, decltype(tokens)::value, decltype(layers)::value>;
        const NetworkPlan plan = network_plan(p, Instance::demand(p));
        if (plan.fits) body(plan, Instance::kernel);
        return plan.fits;
    };
    const auto for_tokens = [&](auto width, auto layers) {
        if constexpr (sizeof(E) == 2)
            if (attempt(width, Constant<32>(), layers)) return true;
        if constexpr (sizeof(E) == 2 && decltype(layers)::value == 1 &&
                      decltype(width)::value <= 64)
            return false;  // 32 tokens fit every device
        else
            return attempt(width, Constant<16>(), layers);
    };
    const auto for_depth = [&](auto width) {
        return p.hidden_dim ? for_tokens(width, Constant<2>()) : for_tokens(width, Constant<1>());
    };
    const int64_t widest = p.key_dim > p.value_dim ? p.key_dim : p.value_dim;
    return widest <= 64 ? for_depth(Constant<64>()) : for_depth(Constant<128>());
}

// A kernel's instances of one dtype: a block for each (sequence, head). Not inline, so that an
// extern template keeps them out of other sources.
template <class E, template <class, int, int, int> class Kernel>
struct NetworkKernels {
    // Bytes of scratch memory, -1 if no segment fits.
    static int64_t scratch(const TitansParams& p);
    static void run(const TitansParams& p, void* scratch, void* stream);
};

template <class E, template <class, int, int, int> class Kernel>
int64_t NetworkKernels<E, Kernel>::scratch(const TitansParams& p) {
    int64_t floats = 0;
    const bool fits = for_network<E, Kernel>(
        p, [&](const NetworkPlan& plan, auto) { floats = plan.memory.floats; });
    return fits ? p.sequences * p.heads * floats * static_cast<int64_t>(sizeof(float)) : -1;
}
template <class E, template <class, int, int, int> class Kernel>
void NetworkKernels<E, Kernel>::run(const TitansParams& p, void* scratch, void* stream) {
    const int64_t blocks = p.sequences * p.heads;
    if (blocks == 0) return;
    for_network<E, Kernel>(p, [&](const NetworkPlan& plan, auto kernel) {
        NetworkMemory memory = plan.memory;
        memory.scratch = static_cast<float*>(scratch);
        launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kLayerThreads), plan.shared_bytes,
               static_cast<cudaStream_t>(stream), p, memory);
    });
}

// body(Type<E>) for the params' dtype.
template <class Body>
auto for_element(Element element, const Body& body) {
    switch (element) {
        case Element::float32:
            return body(Type<float>());
        case Element::bfloat16:
            return body(Type<bf16>());
        case Element::float16:
            return body(Type<fp16>());
        case Element::float64:
            break;
    }
    throw std::invalid_argument("titans_network: no CUDA kernel for float64");
}

}  // namespace hope
