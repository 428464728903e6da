// The backward of HOPE's self-modifying memories: the kernels for float16. selfmod_backward.cuh has
// the dataflow.
#include "selfmod/selfmod_backward.cuh"

namespace hope {

template struct LayerKernels<fp16, SelfmodBackward, SelfmodParams>;

}  // namespace hope
