// The backward of HOPE's self-modifying memories: the choice of the dtype, and the kernels for
// float32. selfmod_backward.cuh has the dataflow.
#include "selfmod/selfmod_backward.cuh"
#include "selfmod/selfmod_cuda.h"

namespace hope {

template <class E>
using Kernels = LayerKernels<E, SelfmodBackward, SelfmodParams>;

template struct LayerKernels<float, SelfmodBackward, SelfmodParams>;

int64_t selfmod_bwd_cuda_scratch(const SelfmodParams& params) {
    return for_element(params.element, [&](auto element) {
        return Kernels<typename decltype(element)::type>::scratch(params);
    });
}

void selfmod_bwd_cuda(const SelfmodParams& params, void* scratch, void* stream) {
    for_element(params.element, [&](auto element) {
        Kernels<typename decltype(element)::type>::run(params, scratch, stream);
    });
}

}  // namespace hope
