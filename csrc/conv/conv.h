// The short causal convolution's contract between host code (conv.cpp) and kernels: plain structs,
// no torch. docs/ops/conv.md. B batch, N sequences, T tokens, C channels, K width of the kernel.
#pragma once
#include "common/element.h"

namespace hope {

// Absent tensors have null data. Of TokenTensor's strides, `head` is that of a channel: 1.
struct ConvParams {
    Element element;  // of everything but the weights, which are float32 (float64 if it is)
    int64_t batch, sequences, tokens, channels, width;
    bool silu;

    TokenTensor x;              // [B, T, C]
    const void* weight;         // [C, K], contiguous; the last tap is the token itself
    TokenTensor tail;           // [N, K - 1, C], the inputs before the first; absent: zeros
    const int32_t* cu_seqlens;  // [N + 1], or null: sequence n is row n of the batch

    // forward
    TokenTensor y;           // [B, T, C]
    TokenTensor final_tail;  // [N, K - 1, C]

    // backward
    TokenTensor d_y, d_final_tail;  // either may be absent: zeros
    TokenTensor d_x, d_tail;
    void* d_weight;    // [C, K]
    float* workspace;  // CUDA: conv_bwd_cuda_workspace elements
};

void conv_fwd_cpu(const ConvParams& params, const ParallelFor& parallel_for);
void conv_bwd_cpu(const ConvParams& params, const ParallelFor& parallel_for);

// On the current device, in a cudaStream_t; the element is not float64.
constexpr int64_t kConvMaxWidthCuda = 64;
void conv_fwd_cuda(const ConvParams& params, void* stream);
void conv_bwd_cuda(const ConvParams& params, void* stream);
int64_t conv_bwd_cuda_workspace(const ConvParams& params);  // needs all but `workspace`

}  // namespace hope
