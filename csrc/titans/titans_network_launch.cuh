// What the launch of memories with two layers, or with a norm, needs of their params.
#pragma once
#include "common/layer_launch.cuh"
#include "titans/titans_network_segment.cuh"

namespace hope {

inline LayerInstance instance_for(const TitansParams& p) {
    return {p.key_dim > p.value_dim ? p.key_dim : p.value_dim, network_layers(p)};
}
inline int state_matrices(const TitansParams& p) { return network_layers(p); }

template <class E, template <class, int, int, int> class Kernel>
using NetworkKernels = LayerKernels<E, Kernel, TitansParams>;

}  // namespace hope
