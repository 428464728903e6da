// The states of the five self-modifying memories on CUDA: ten matrices, or five. The single column
// that rates and retention end in is a row of the transposed matrix, which is padded to 16 rows.
#pragma once
#include "common/layer_launch.cuh"
#include "selfmod/selfmod.h"

namespace hope {

struct MemoryMatrices {
    StateMatrix layer[2];
};
// Where a state's matrices are; lies in shared memory, since memories are taken by their number.
struct SelfmodMatrices {
    MemoryMatrices memory[kSelfmodMemories];
};

// ---- sizes, of matrix i as the params count them ----

__host__ __device__ inline int state_matrices(const SelfmodParams& p) {
    return kSelfmodMemories * p.memory_layers;
}
__host__ __device__ inline int in_features(const SelfmodParams& p, int i) {
    return static_cast<int>(i % p.memory_layers ? p.hidden_dim[i / p.memory_layers] : p.dim);
}
__host__ __device__ inline int out_features(const SelfmodParams& p, int i) {
    const int memory = i / p.memory_layers;
    if (i % p.memory_layers + 1 < p.memory_layers) return static_cast<int>(p.hidden_dim[memory]);
    return memory == kRates || memory == kRetention ? 1 : static_cast<int>(p.dim);
}
__host__ __device__ inline int padded_rows(const SelfmodParams& p, int i) {
    return (out_features(p, i) + 15) / 16 * 16;
}
__host__ __device__ inline int64_t floats_of_layer(const SelfmodParams& p, int i) {
    return floats_of_matrix(padded_rows(p, i), in_features(p, i));
}
__host__ __device__ inline int64_t floats_of_state(const SelfmodParams& p) {
    int64_t floats = 0;
    for (int i = 0; i < state_matrices(p); i++) floats += floats_of_layer(p, i);
    return floats;
}
// Numbers of a checkpoint, which has the matrices as they are in the call.
__host__ __device__ inline int64_t numbers_of_state(const SelfmodParams& p) {
    int64_t numbers = 0;
    for (int i = 0; i < state_matrices(p); i++)
        numbers += static_cast<int64_t>(out_features(p, i)) * in_features(p, i);
    return numbers;
}

inline LayerInstance instance_for(const SelfmodParams& p) { return {p.dim, p.memory_layers}; }

// ---- matrices ----

DEVICE StateMatrix& matrix_of(const SelfmodParams& p, SelfmodMatrices& state, int i) {
    return state.memory[i / p.memory_layers].layer[i % p.memory_layers];
}
DEVICE const StateMatrix& matrix_of(const SelfmodParams& p, const SelfmodMatrices& state, int i) {
    return state.memory[i / p.memory_layers].layer[i % p.memory_layers];
}
// All threads take them; a barrier has to follow.
DEVICE void take_matrices(const SelfmodParams& p, SelfmodMatrices& state, StateCarver& carver) {
    for (int i = 0; i < state_matrices(p); i++) {
        const StateMatrix taken = carver.take(padded_rows(p, i), in_features(p, i));
        if (threadIdx.x == 0) matrix_of(p, state, i) = taken;
    }
}
// The matrices of a state in scratch memory; a barrier has to follow.
DEVICE void point_to_state(const SelfmodParams& p, SelfmodMatrices& state, float* data) {
    if (threadIdx.x) return;
    for (int i = 0; i < state_matrices(p); i++) {
        matrix_of(p, state, i) = state_matrix(data, padded_rows(p, i), in_features(p, i));
        data += floats_of_layer(p, i);
    }
}

// body(element, its index in a matrix [in, out] of the call) for this thread's elements of matrix
// i; that index is -1 in the padding.
template <class Body>
DEVICE void for_elements(const SelfmodParams& p, int i, const StateMatrix& matrix,
                         const Body& body) {
    const int real = out_features(p, i);
    for (int n = static_cast<int>(threadIdx.x); n < matrix.rows * matrix.columns;
         n += kLayerThreads) {
        const int row = n % matrix.rows, column = n / matrix.rows;
        body(*matrix.at(row, column), row < real ? column * real + row : -1);
    }
}
// body(i, matrix i) for all matrices.
template <class Body>
DEVICE void for_matrices(const SelfmodParams& p, const SelfmodMatrices& state, const Body& body) {
    for (int i = 0; i < state_matrices(p); i++) body(i, matrix_of(p, state, i));
}

// From the matrices of the call, or zero where there are none; and to them.
DEVICE void load_matrices(const SelfmodParams& p, const SelfmodMatrices& to,
                          const MatrixTensor (&from)[kSelfmodMatrices], int sequence, int head) {
    for_matrices(p, to, [&](int i, const StateMatrix& m) {
        const float* const data = matrix(from[i], sequence, head);
        for_elements(p, i, m, [&](float& x, int at) { x = data && at >= 0 ? data[at] : 0; });
    });
}
DEVICE void add_matrices(const SelfmodParams& p, const SelfmodMatrices& to,
                         const MatrixTensor (&from)[kSelfmodMatrices], int sequence, int head) {
    for_matrices(p, to, [&](int i, const StateMatrix& m) {
        const float* const data = matrix(from[i], sequence, head);
        if (!data) return;
        for_elements(p, i, m, [&](float& x, int at) {
            if (at >= 0) x += data[at];
        });
    });
}
DEVICE void store_matrices(const SelfmodParams& p, const MatrixTensor (&to)[kSelfmodMatrices],
                           const SelfmodMatrices& from, int sequence, int head) {
    for_matrices(p, from, [&](int i, const StateMatrix& m) {
        float* const data = matrix(to[i], sequence, head);
        if (!data) return;
        for_elements(p, i, m, [&](float x, int at) {
            if (at >= 0) data[at] = x;
        });
    });
}
DEVICE void clear_matrices(const SelfmodParams& p, const MatrixTensor (&to)[kSelfmodMatrices],
                           int sequence, int head) {
    for (int i = 0; i < state_matrices(p); i++)
        clear_matrix(matrix(to[i], sequence, head), out_features(p, i) * in_features(p, i));
}
DEVICE void copy_to_checkpoint(const SelfmodParams& p, float* to, const SelfmodMatrices& from) {
    for_matrices(p, from, [&](int i, const StateMatrix& m) {
        for_elements(p, i, m, [&](float x, int at) {
            if (at >= 0) to[at] = x;
        });
        to += out_features(p, i) * in_features(p, i);
    });
}
DEVICE void copy_from_checkpoint(const SelfmodParams& p, const SelfmodMatrices& to,
                                 const float* from) {
    for_matrices(p, to, [&](int i, const StateMatrix& m) {
        for_elements(p, i, m, [&](float& x, int at) { x = at >= 0 ? from[at] : 0; });
        from += out_features(p, i) * in_features(p, i);
    });
}

}  // namespace hope
