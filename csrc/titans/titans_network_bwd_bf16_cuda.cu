// The backward of memories of two layers, or with a norm: the kernels for bfloat16.
// titans_network_backward.cuh has the dataflow.
#include "titans/titans_network_backward.cuh"

namespace hope {

template struct LayerKernels<bf16, NetworkBackward, TitansParams>;

}  // namespace hope
