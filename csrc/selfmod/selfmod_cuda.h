// The CUDA kernels' contract with the host code, beside selfmod.h; no torch, no CUDA headers.
// `stream` is a cudaStream_t of the current device.
#pragma once
#include "selfmod/selfmod.h"

namespace hope {

// The head sizes there are kernels for. Hidden sizes are multiples of 16.
constexpr bool selfmod_cuda_supports(int64_t size) {
    return size == 16 || size == 32 || size == 64 || size == 128;
}

// Tokens are counted in 32 bits.
constexpr int64_t kMostSelfmodTokensOnCuda = int64_t{1} << 30;

// Bytes of scratch memory; -1 if the device's shared memory is too small for these sizes. The
// backward's grows with the chunks between two checkpoints.
int64_t selfmod_fwd_cuda_scratch(const SelfmodParams& params);
int64_t selfmod_bwd_cuda_scratch(const SelfmodParams& params);

// Rows of x, q, o (and their gradients) begin at multiples of 16 bytes. cu_seqlens may hold
// anything: tokens of no sequence are left as they are.
void selfmod_fwd_cuda(const SelfmodParams& params, void* scratch, void* stream);

// d_anchor is wanted always.
void selfmod_bwd_cuda(const SelfmodParams& params, void* scratch, void* stream);

}  // namespace hope
