// The CUDA kernels' contract with the host code, beside titans.h; no torch, no CUDA headers.
// `stream` is a cudaStream_t of the current device.
#pragma once
#include "titans/titans.h"

namespace hope {

// The head sizes there are kernels for, D and D_v alike.
constexpr bool titans_linear_cuda_supports(int64_t size) {
    return size == 16 || size == 32 || size == 64 || size == 128;
}

// Tokens are counted in 32 bits.
constexpr int64_t kMostTokensOnCuda = int64_t{1} << 30;

// Rows q, k, v, o (and their gradients) begin at multiples of 16 bytes. cu_seqlens may hold
// anything: tokens of no sequence are left as they are.
void titans_linear_fwd_cuda(const TitansParams& params, void* stream);

// One token for every sequence, without checkpoints and cu_seqlens. Final states may be the given
// ones, to be updated in place.
void titans_linear_step_cuda(const TitansParams& params, void* stream);

// Bytes of scratch memory for the backward. It does not grow with the number of tokens beyond
// what fills the device.
int64_t titans_linear_bwd_cuda_scratch(const TitansParams& params);

// d_momenta and d_anchor are wanted whenever there is momentum, and always.
void titans_linear_bwd_cuda(const TitansParams& params, void* scratch, void* stream);

// ---- memories of two layers, or with a norm ----
// The hidden dimension is a multiple of 16.

// Bytes of scratch memory; -1 if the device's shared memory is too small for these sizes. The
// backward's grows with the chunks between two checkpoints.
int64_t titans_network_fwd_cuda_scratch(const TitansParams& params);
int64_t titans_network_bwd_cuda_scratch(const TitansParams& params);

void titans_network_fwd_cuda(const TitansParams& params, void* scratch, void* stream);
void titans_network_step_cuda(const TitansParams& params, void* stream);
void titans_network_bwd_cuda(const TitansParams& params, void* scratch, void* stream);

}  // namespace hope
