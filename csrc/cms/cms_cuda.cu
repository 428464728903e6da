// The continuum memory system on CUDA: the choice of the dtype, and the kernels for float32.
// cms_kernels.cuh has the dataflow.
#include "cms/cms_cuda.h"

#include "cms/cms_kernels.cuh"
#include "common/for_element.cuh"

namespace hope {

template struct CmsKernels<float>;

namespace {

template <class Body>
auto with_kernels(const CmsParams& p, const Body& body) {
    return for_element(p.element, [&](auto element) {
        return body(CmsKernels<typename decltype(element)::type>());
    });
}

}  // namespace

int64_t cms_fwd_cuda_scratch(const CmsParams& params) {
    return with_kernels(params, [&](auto kernels) { return kernels.scratch(params, false); });
}
int64_t cms_bwd_cuda_scratch(const CmsParams& params) {
    return with_kernels(params, [&](auto kernels) { return kernels.scratch(params, true); });
}
void cms_fwd_cuda(const CmsParams& params, void* scratch, void* stream) {
    with_kernels(params, [&](auto kernels) { kernels.forward(params, scratch, stream); });
}
void cms_bwd_cuda(const CmsParams& params, void* scratch, void* stream) {
    with_kernels(params, [&](auto kernels) { kernels.backward(params, scratch, stream); });
}

}  // namespace hope
