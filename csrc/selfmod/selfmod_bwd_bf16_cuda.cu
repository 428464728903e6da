// The backward of HOPE's self-modifying memories: the kernels for bfloat16. selfmod_backward.cuh
// has the dataflow.
#include "selfmod/selfmod_backward.cuh"

namespace hope {

template struct LayerKernels<bf16, SelfmodBackward, SelfmodParams>;

}  // namespace hope
