// The backward of memories of two layers, or with a norm: the kernels for float16.
// titans_network_backward.cuh has the dataflow.
#include "titans/titans_network_backward.cuh"

namespace hope {

template struct LayerKernels<fp16, NetworkBackward, TitansParams>;

}  // namespace hope
