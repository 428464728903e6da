// How the kernels of the linear memory are launched: the choice of an instance, and of a block's
// size.
#pragma once
#include <stdexcept>

#include "titans/titans_pipeline.cuh"

namespace hope {

// body(Type<E>, Constant<D>) for the params' element and key dimension.
template <class Body>
void for_instance(const TitansParams& p, const Body& body) {
    const auto for_key = [&](auto element) {
        switch (p.key_dim) {
            case 16:
                return body(element, Constant<16>());
            case 32:
                return body(element, Constant<32>());
            case 64:
                return body(element, Constant<64>());
            case 128:
                return body(element, Constant<128>());
        }
        throw std::invalid_argument("titans_linear: key dimension without a CUDA kernel");
    };
    switch (p.element) {
        case Element::float32:
            return for_key(Type<float>());
        case Element::bfloat16:
            return for_key(Type<bf16>());
        case Element::float16:
            return for_key(Type<fp16>());
        case Element::float64:
            break;
    }
    throw std::invalid_argument("titans_linear: no CUDA kernel for float64");
}

// How the walking kernels are launched.
struct PipelinePlan {
    int columns, stages;
    size_t shared_bytes;
    dim3 grid, block;
};

// A block has as many value columns as there are, up to 64, but fewer where the device would
// otherwise stay partly idle, or has too little shared memory; and as many stages as fit.
template <class E, int D>
PipelinePlan pipeline_plan(const TitansParams& p, int64_t walks) {
    const auto bytes = [](int stages, int columns) {
        return PipelineLayout<E, D>(SharedCarver(nullptr), stages, columns).bytes;
    };
    const size_t room = shared_bytes_of_a_block();
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    PipelinePlan plan;
    plan.columns = static_cast<int>(p.value_dim < kMostColumns ? p.value_dim : kMostColumns);
    while (plan.columns > 16 &&
           (walks * (p.value_dim / plan.columns) < processors || bytes(2, plan.columns) > room))
        plan.columns /= 2;
    plan.stages = kMostStages;
    while (plan.stages > 2 && bytes(plan.stages, plan.columns) > room) plan.stages--;
    plan.shared_bytes = bytes(plan.stages, plan.columns);
    plan.grid = dim3(static_cast<unsigned>(p.sequences * p.heads),
                     static_cast<unsigned>(p.value_dim / plan.columns));
    plan.block = dim3(plan.columns * 2 + kHelpers);
    return plan;
}

}  // namespace hope
