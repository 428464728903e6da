// The states of a Titans memory of two layers, or with a norm, on CUDA.
//
// Both layers are the same linear memory: of keys K and errors G the first, of keys H and errors E
// the second. A memory of one layer (with a norm) has the second only, and then H is K and HQ is Q.
#pragma once
#include "common/layers.cuh"
#include "titans/titans_sequence.cuh"

namespace hope {

constexpr int kMostLayers = 2;

// A memory's weights or momenta.
struct LayerMatrices {
    StateMatrix layer[kMostLayers];
};

struct NetworkState {
    LayerMatrices weights, momenta;

    DEVICE LayerState layer(int i) const { return {weights.layer[i], momenta.layer[i]}; }
};

__host__ __device__ inline int network_layers(const TitansParams& p) {
    return p.hidden_dim ? 2 : 1;
}
__host__ __device__ inline int rows_of_layer(const TitansParams& p, int layer) {
    return static_cast<int>(layer + 1 < network_layers(p) ? p.hidden_dim : p.value_dim);
}
__host__ __device__ inline int columns_of_layer(const TitansParams& p, int layer) {
    return static_cast<int>(layer ? p.hidden_dim : p.key_dim);
}
__host__ __device__ inline int64_t floats_of_layer(const TitansParams& p, int layer) {
    return floats_of_matrix(rows_of_layer(p, layer), columns_of_layer(p, layer));
}
__host__ __device__ inline int64_t floats_of_network(const TitansParams& p) {
    int64_t floats = 0;
    for (int layer = 0; layer < network_layers(p); layer++) floats += floats_of_layer(p, layer);
    return floats;
}

DEVICE StateMatrix state_matrix(const TitansParams& p, int layer, float* data) {
    return state_matrix(data, rows_of_layer(p, layer), columns_of_layer(p, layer));
}

template <class Body>
DEVICE void for_layers(const TitansParams& p, const Body& body) {
#pragma unroll
    for (int layer = 0; layer < kMostLayers; layer++)
        if (layer < network_layers(p)) body(layer);
}

DEVICE LayerMatrices take_matrices(const TitansParams& p, StateCarver& carver) {
    LayerMatrices matrices{};
    for_layers(p, [&](int layer) {
        matrices.layer[layer] = carver.take(rows_of_layer(p, layer), columns_of_layer(p, layer));
    });
    return matrices;
}
// A state in scratch memory.
__host__ __device__ inline int64_t floats_of_state(const TitansParams& p) {
    return floats_of_network(p) * (p.has_momentum ? 2 : 1);
}
DEVICE NetworkState network_state(const TitansParams& p, float* data) {
    NetworkState state{};
    for_layers(p, [&](int layer) {
        state.weights.layer[layer] = state_matrix(p, layer, data);
        data += floats_of_layer(p, layer);
    });
    if (p.has_momentum)
        for_layers(p, [&](int layer) {
            state.momenta.layer[layer] = state_matrix(p, layer, data);
            data += floats_of_layer(p, layer);
        });
    return state;
}

// From the matrices of the call, or zero where there are none; and to them.
DEVICE void load_matrices(const TitansParams& p, const LayerMatrices& to,
                          const MatrixTensor (&from)[kMostLayers], int sequence, int head) {
    for_layers(p, [&](int i) { load_matrix(to.layer[i], matrix(from[i], sequence, head)); });
}
DEVICE void store_matrices(const TitansParams& p, const MatrixTensor (&to)[kMostLayers],
                           const LayerMatrices& from, int sequence, int head) {
    for_layers(p, [&](int i) {
        if (to[i].data) store_matrix(matrix(to[i], sequence, head), from.layer[i]);
    });
}
DEVICE void add_matrices(const TitansParams& p, const LayerMatrices& to,
                         const MatrixTensor (&from)[kMostLayers], int sequence, int head) {
    for_layers(p, [&](int i) {
        if (from[i].data) add_matrix(to.layer[i], matrix(from[i], sequence, head));
    });
}
DEVICE float* copy_to_checkpoint(const TitansParams& p, float* to, const NetworkState& from) {
    for_layers(p, [&](int i) { to = copy_to_checkpoint(to, from.weights.layer[i]); });
    if (p.has_momentum)
        for_layers(p, [&](int i) { to = copy_to_checkpoint(to, from.momenta.layer[i]); });
    return to;
}
DEVICE void copy_from_checkpoint(const TitansParams& p, const NetworkState& to, const float* from) {
    for_layers(p, [&](int i) { from = copy_from_checkpoint(to.weights.layer[i], from); });
    if (p.has_momentum)
        for_layers(p, [&](int i) { from = copy_from_checkpoint(to.momenta.layer[i], from); });
}

}  // namespace hope
