// The contract of HOPE's self-modifying memory between the host code (selfmod.cpp) and the kernels:
// plain structs, no torch. docs/ops/selfmod.md; the algebra is in docs/derivations.md. B batch, N
// sequences, T tokens, H heads, D head dim, F hidden dim.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/memory.h"

namespace hope {

// The memories, in the order of every list of matrices.
enum SelfmodMemories { kKeys, kValues, kRates, kRetention, kMemory, kSelfmodMemories };
constexpr int kSelfmodMatrices = 2 * kSelfmodMemories;

// A memory has one layer, [D, D], or two, [D, F] and [F, D]; kRates and kRetention end in one
// column instead of D. Absent tensors have null data. States, biases and their gradients are
// float32 (float64 if element is).
struct SelfmodParams {
    static constexpr bool kMomenta = false;
    Element element;  // of x, q, o and their gradients
    int64_t sequences, tokens, heads, dim;
    int memory_layers;                     // 1 or 2, of each memory
    int64_t hidden_dim[kSelfmodMemories];  // F of each, if there are two
    int64_t chunk_size;
    int64_t checkpoint_every;  // chunks; 0: no checkpoints
    double lr_max;
    Activation activation;  // of two layers
    Objective objective;
    Read read;

    TokenTensor x, q;                        // [B, T, H, D]
    MatrixTensor weights[kSelfmodMatrices];  // [N, H, ., .] at the start: all layers of a memory,
                                             // then of the next
    MatrixTensor anchor[kSelfmodMatrices];   // absent: every sequence starts at a chunk boundary
    MatrixTensor lr_bias, retention_bias;    // [N, H]
    const int64_t* position;                 // [N] tokens seen, or null: 0
    const int32_t* cu_seqlens;               // [N + 1], or null: sequence n is row n of the batch
    void* checkpoints;  // [slots, H, selfmod_state_size]: weights at some chunks' start

    // forward
    TokenTensor o;  // [B, T, H, D]
    MatrixTensor final_weights[kSelfmodMatrices],
        final_anchor[kSelfmodMatrices];  // as at the start

    // backward
    TokenTensor d_o;  // [B, T, H, D], may be absent (zero), like the next two
    MatrixTensor d_final_weights[kSelfmodMatrices], d_final_anchor[kSelfmodMatrices];
    TokenTensor d_x, d_q;
    MatrixTensor d_weights[kSelfmodMatrices], d_anchor[kSelfmodMatrices], d_lr_bias,
        d_retention_bias;

    int layers() const { return kSelfmodMemories * memory_layers; }
    int64_t rows_of(int layer) const {
        return layer % memory_layers ? hidden_dim[layer / memory_layers] : dim;
    }
    int64_t columns_of(int layer) const {
        const int memory = layer / memory_layers;
        if (layer % memory_layers + 1 < memory_layers) return hidden_dim[memory];
        return memory == kRates || memory == kRetention ? 1 : dim;
    }
};

// Numbers in one (sequence, head)'s weights.
inline int64_t selfmod_state_size(const SelfmodParams& p) {
    int64_t size = 0;
    for (int layer = 0; layer < p.layers(); layer++) size += p.rows_of(layer) * p.columns_of(layer);
    return size;
}

void selfmod_fwd_cpu(const SelfmodParams& params, const ParallelFor& parallel_for);
void selfmod_bwd_cpu(const SelfmodParams& params, const ParallelFor& parallel_for);

}  // namespace hope
