// The Newton-Schulz iteration's contract between host code (newton_schulz.cpp) and kernels: plain
// structs, no torch. docs/ops/newton_schulz.md. M rows and N columns of a matrix, S the smaller.
#pragma once
#include "common/element.h"

namespace hope {

struct NewtonSchulzParams {
    Element element;               // of g and out
    int64_t batch, rows, columns;  // none is 0
    int64_t steps;
    double a, b, c, eps;

    const void* g;  // [batch, M, N], contiguous
    void* out;      // [batch, M, N], contiguous

    void* workspace;  // newton_schulz_{cpu,cuda}_workspace bytes, aligned to 64
};

// X^T X of a tall matrix and X X^T of a wide one are the smaller products.
inline bool is_tall(const NewtonSchulzParams& p) { return p.rows > p.columns; }
inline int64_t shorter_side(const NewtonSchulzParams& p) { return is_tall(p) ? p.columns : p.rows; }

void newton_schulz_cpu(const NewtonSchulzParams& params, const ParallelFor& parallel_for);
int64_t newton_schulz_cpu_workspace(const NewtonSchulzParams& params);  // needs sizes, element

// On the current device, in a cudaStream_t; the element is float32 or bfloat16.
void newton_schulz_cuda(const NewtonSchulzParams& params, void* stream);
int64_t newton_schulz_cuda_workspace(const NewtonSchulzParams& params);  // needs sizes, element

}  // namespace hope
