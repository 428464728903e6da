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

// How many value columns a block has: all, up to 64, or half as many as long as there are
// processors for twice the blocks. More would have to wait for others to end, and few columns take
// nearly as long as many: their keys, queries and scores are the same.
constexpr int columns_of_a_block(int64_t value_dim, int64_t walks, int processors) {
    int columns = value_dim < kMostColumns ? static_cast<int>(value_dim) : kMostColumns;
    while (columns > 16 && 2 * walks * (value_dim / columns) <= processors) columns /= 2;
    return columns;
}
static_assert(columns_of_a_block(64, 128, 132) == 64, "one block for each of 132 processors");
static_assert(columns_of_a_block(128, 32, 132) == 32, "four for each of 32 walks");
static_assert(columns_of_a_block(128, 33, 132) == 32);
static_assert(columns_of_a_block(128, 34, 132) == 64);
static_assert(columns_of_a_block(64, 1, 132) == 16 && columns_of_a_block(16, 1, 132) == 16);
static_assert(columns_of_a_block(32, 1, 2) == 16 && columns_of_a_block(32, 1, 1) == 32);

// As many stages as fit into shared memory, and fewer columns where not even two would.
template <class E, int D>
PipelinePlan pipeline_plan(const TitansParams& p, int64_t walks) {
    const auto bytes = [](int stages, int columns) {
        return PipelineLayout<E, D>(SharedCarver(nullptr), stages, columns).bytes;
    };
    const size_t room = shared_bytes_of_a_block();
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    PipelinePlan plan;
    plan.columns = columns_of_a_block(p.value_dim, walks, processors);
    while (plan.columns > 16 && bytes(2, plan.columns) > room) plan.columns /= 2;
    plan.stages = kMostStages;
    while (plan.stages > 2 && bytes(plan.stages, plan.columns) > room) plan.stages--;
    plan.shared_bytes = bytes(plan.stages, plan.columns);
    plan.grid = dim3(static_cast<unsigned>(p.sequences * p.heads),
                     static_cast<unsigned>(p.value_dim / plan.columns));
    plan.block = dim3(plan.columns * 2 + kHelpers);
    return plan;
}

}  // namespace hope
