// The Titans memory's contract between the host code (titans.cpp) and the kernels: plain structs,
// no torch. docs/ops/titans.md; the algebra is in docs/derivations.md. B batch, N sequences, T
// tokens, H heads, K key dim, F hidden dim, V value dim.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/memory.h"

namespace hope {

using TitansObjective = Objective;
using TitansRead = Read;
using TitansActivation = Activation;

// A memory has one layer, [K, V], or two, [K, F] and [F, V]. Absent tensors have null data. Gates,
// states, norms and their gradients are float32 (float64 if element is).
struct TitansParams {
    static constexpr bool kMomenta = true;
    Element element;  // of q, k, v, o and their gradients
    int64_t sequences, tokens, heads, key_dim, value_dim;
    int64_t hidden_dim;  // F; 0: one layer
    int64_t chunk_size;
    int64_t checkpoint_every;  // chunks; 0: no checkpoints
    TitansObjective objective;
    TitansRead read;
    TitansActivation activation;  // of two layers
    bool residual;                // M(x) = x + ...
    bool has_momentum;            // also where there are no tokens to have one
    double norm_eps;

    TokenTensor q, k, v;                  // [B, T, H, K], [B, T, H, K], [B, T, H, V]
    TokenTensor lr, momentum, decay;      // [B, T, H]
    MatrixTensor weights[2], momenta[2];  // [N, H, ., .] at the start
    MatrixTensor anchor[2];               // absent: every sequence starts at a chunk boundary
    MatrixTensor norm_weight, norm_bias;  // [N, H, V]; absent: no norm
    const int64_t* position;              // [N] tokens seen, or null: 0
    const int32_t* cu_seqlens;            // [N + 1], or null: sequence n is row n of the batch
    void*
        checkpoints;  // [slots, H, titans_state_size]: weights, then momenta, at some chunks' start

    // forward
    TokenTensor o;                                                     // [B, T, H, V]
    MatrixTensor final_weights[2], final_momenta[2], final_anchor[2];  // as at the start

    // backward
    TokenTensor d_o;  // [B, T, H, V], may be absent (zero), like the next three
    MatrixTensor d_final_weights[2], d_final_momenta[2], d_final_anchor[2];
    TokenTensor d_q, d_k, d_v, d_lr, d_momentum, d_decay;
    MatrixTensor d_weights[2], d_momenta[2], d_anchor[2], d_norm_weight, d_norm_bias;

    int layers() const { return hidden_dim ? 2 : 1; }
    int64_t rows_of(int layer) const { return layer ? hidden_dim : key_dim; }
    int64_t columns_of(int layer) const { return layer + 1 < layers() ? hidden_dim : value_dim; }
};

// Elements of one (sequence, head)'s weights, and momenta if there are any.
inline int64_t titans_state_size(const TitansParams& p) {
    int64_t size = 0;
    for (int layer = 0; layer < p.layers(); layer++) size += p.rows_of(layer) * p.columns_of(layer);
    return size * (p.has_momentum ? 2 : 1);
}

void titans_fwd_cpu(const TitansParams& params, const ParallelFor& parallel_for);
void titans_bwd_cpu(const TitansParams& params, const ParallelFor& parallel_for);

}  // namespace hope
