// The contract of the continuum memory system between the host code (cms.cpp) and the kernels:
// plain structs, no torch. docs/ops/cms.md; the algebra is in docs/derivations.md. B batch, N
// sequences, T tokens, D features, F hidden dim.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/memory.h"

namespace hope {

enum class CmsObjective { l2, dot, teach };
constexpr int kCmsLayers = 2;

// Matrices are those of the first layer, [N, D, F], and of the second, [N, F, D]; of tensors
// without heads the head's stride is not used. Absent tensors have null data. Matrices, rates and
// their gradients are float32 (float64 if element is).
struct CmsParams {
    static constexpr int64_t heads = 1;
    Element element;  // of x, target, y and their gradients
    int64_t sequences, tokens, dim, hidden_dim;
    int64_t chunk_size;
    int64_t checkpoint_every;  // chunks; 0: no checkpoints
    double decay;
    Activation activation;
    CmsObjective objective;
    bool residual;
    bool keeps_state;  // somebody wants the final state; else a last chunk is not learned

    TokenTensor x, target;             // [B, T, D]
    TokenTensor lr;                    // [B, T]
    MatrixTensor weights[kCmsLayers];  // at the start
    MatrixTensor pending[kCmsLayers];  // gradient of the chunk so far; absent: zero
    const int64_t* position;           // [N] tokens seen, or null: 0
    const int32_t* cu_seqlens;         // [N + 1], or null: sequence n is row n of the batch
    void* checkpoints;                 // [slots, 2 D F]: both matrices at some chunks' start

    // forward
    TokenTensor y;                                                      // [B, T, D]
    MatrixTensor final_weights[kCmsLayers], final_pending[kCmsLayers];  // absent without
                                                                        // keeps_state

    // backward
    TokenTensor d_y;                                                        // may be absent
    MatrixTensor d_final_weights[kCmsLayers], d_final_pending[kCmsLayers];  // both or none
    TokenTensor d_x, d_target, d_lr;
    MatrixTensor d_weights[kCmsLayers];
    MatrixTensor d_pending[kCmsLayers];  // absent where pending is
};

// Slots for checkpoints, taken at the start of every checkpoint_every-th chunk of a sequence but
// its first. Sequence n with its first token at `start` of the whole batch has them from slot start
// / span on, span = chunk_size * checkpoint_every, or n slots further where positions are given: a
// call that begins inside a chunk may have one more.
inline int64_t cms_checkpoint_slots(const CmsParams& p, int64_t all_tokens) {
    return all_tokens / (p.chunk_size * p.checkpoint_every) + (p.position ? p.sequences : 0);
}

void cms_fwd_cpu(const CmsParams& params, const ParallelFor& parallel_for);
void cms_bwd_cpu(const CmsParams& params, const ParallelFor& parallel_for);

}  // namespace hope
