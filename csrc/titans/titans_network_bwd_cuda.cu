// The backward of memories of two layers, or with a norm: the choice of the dtype, and the kernels
// for float32. titans_network_backward.cuh has the dataflow.
#include "titans/titans_cuda.h"
#include "titans/titans_network_backward.cuh"

namespace hope {

template struct LayerKernels<float, NetworkBackward, TitansParams>;

int64_t titans_network_bwd_cuda_scratch(const TitansParams& params) {
    return for_element(params.element, [&](auto element) {
        return NetworkKernels<typename decltype(element)::type, NetworkBackward>::scratch(params);
    });
}

void titans_network_bwd_cuda(const TitansParams& params, void* scratch, void* stream) {
    for_element(params.element, [&](auto element) {
        NetworkKernels<typename decltype(element)::type, NetworkBackward>::run(params, scratch,
                                                                               stream);
    });
}

}  // namespace hope
