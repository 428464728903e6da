// The CUDA kernels' contract with the host code, beside cms.h; no torch, no CUDA headers. `stream`
// is a cudaStream_t of the current device.
#pragma once
#include "cms/cms.h"

namespace hope {

// D and F are multiples of this.
constexpr int64_t kCmsSizesOnCuda = 16;

// Tokens are counted in 32 bits.
constexpr int64_t kMostCmsTokensOnCuda = int64_t{1} << 30;

// Bytes of scratch memory: for the rows of a chunk of every sequence and, in the dtype of the
// tokens, for weights; the backward's grows with the chunks between two checkpoints.
int64_t cms_fwd_cuda_scratch(const CmsParams& params);
int64_t cms_bwd_cuda_scratch(const CmsParams& params);

// Rows of x, target, y and their gradients, and all matrices, begin at multiples of 16 bytes.
// cu_seqlens may hold anything: tokens of no sequence are left as they are.
void cms_fwd_cuda(const CmsParams& params, void* scratch, void* stream);
void cms_bwd_cuda(const CmsParams& params, void* scratch, void* stream);

}  // namespace hope
