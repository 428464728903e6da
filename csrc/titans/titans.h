// The Titans memory's contract between the host code (titans.cpp) and the kernels: plain structs,
// no torch. docs/ops/titans.md; the algebra is in docs/derivations.md. B batch, N sequences, T
// tokens, H heads, K key dim, V value dim.
#pragma once
#include <cstdint>

#include "common/element.h"

namespace hope {

enum class TitansObjective { l2, dot };
enum class TitansRead { after, before, chunk };

// Absent tensors have null data. Gates, states and their gradients are float32 (float64 if element
// is).
struct TitansLinearParams {
    Element element;  // of q, k, v, o and their gradients
    int64_t sequences, tokens, heads, key_dim, value_dim;
    int64_t chunk_size;
    int64_t checkpoint_every;  // chunks; 0: no checkpoints
    TitansObjective objective;
    TitansRead read;

    TokenTensor q, k, v;              // [B, T, H, K], [B, T, H, K], [B, T, H, V]
    TokenTensor lr, momentum, decay;  // [B, T, H]
    MatrixTensor weights, momenta;    // [N, H, K, V] at the start
    MatrixTensor anchor;        // [N, H, K, V]; absent: every sequence starts at a chunk boundary
    const int64_t* position;    // [N] tokens seen, or null: 0
    const int32_t* cu_seqlens;  // [N + 1], or null: sequence n is row n of the batch
    void* checkpoints;  // [slots, H, 1 or 2, K, V]: weights and momenta at the start of some chunks

    // forward
    TokenTensor o;                                            // [B, T, H, V]
    MatrixTensor final_weights, final_momenta, final_anchor;  // [N, H, K, V]

    // backward
    TokenTensor d_o;  // [B, T, H, V], may be absent (zero), like the next three
    MatrixTensor d_final_weights, d_final_momenta, d_final_anchor;  // [N, H, K, V]
    TokenTensor d_q, d_k, d_v, d_lr, d_momentum, d_decay;
    MatrixTensor d_weights, d_momenta, d_anchor;
};

// Checkpoints are taken at the start of every checkpoint_every-th chunk of a sequence, its first
// chunk excepted (that state is the input). Sequence n with its first token at `start` of the whole
// batch keeps them from slot start / span + n on, span = chunk_size * checkpoint_every: room for
// all, whatever the lengths and positions are.
inline int64_t titans_checkpoint_slots(int64_t all_tokens, int64_t sequences, int64_t span) {
    return all_tokens / span + sequences;
}

void titans_linear_fwd_cpu(const TitansLinearParams& params, const ParallelFor& parallel_for);
void titans_linear_bwd_cpu(const TitansLinearParams& params, const ParallelFor& parallel_for);

}  // namespace hope
