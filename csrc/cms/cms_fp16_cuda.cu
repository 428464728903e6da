// The continuum memory system on CUDA: the kernels for float16. cms_kernels.cuh has the dataflow.
#include "cms/cms_kernels.cuh"

namespace hope {

template struct CmsKernels<fp16>;

}  // namespace hope
