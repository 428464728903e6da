// The multi-frequency step's contract between host code (multifreq.cpp) and kernels: plain structs,
// no torch. docs/ops/multifreq.md.
#pragma once
#include "common/element.h"

namespace hope {

enum class Rule { sgd, adamw };

// A parameter and what belongs to it: `count` elements each, in the same order, without gaps.
struct MultifreqTensor {
    void* parameter;
    const void* gradient;
    void* pending;        // what is still to be subtracted; null: nothing ever is (period 1)
    void *mean, *square;  // moments of the gradient; null for sgd
    int64_t count;
    int64_t before;  // elements of all tensors before it
    Element parameter_element, gradient_element;
    bool due;  // what is pending is subtracted in this step
};

// Pending and moments are float32, or float64 where everything is.
struct MultifreqParams {
    const MultifreqTensor* tensors;  // in host memory
    int64_t count;                   // of tensors; none is empty
    Rule rule;
    double lr, beta1, beta2, eps, weight_decay;
    double mean_correction, square_correction;  // 1 / (1 - beta1^i), 1 / sqrt(1 - beta2^i)

    int64_t elements() const {
        return count ? tensors[count - 1].before + tensors[count - 1].count : 0;
    }
};

void multifreq_cpu(const MultifreqParams& params, const ParallelFor& parallel_for);

// On the current device, in a cudaStream_t; no element is float64.
void multifreq_cuda(const MultifreqParams& params, void* stream);

}  // namespace hope
