// The short causal convolution on the CPU: blocks of channels over threads.
#include "common/isa_cpu.h"
#include "common/tasks_cpu.h"
#include "conv/conv.h"

#define HOPE_EACH_ISA "conv/conv_kernel_cpu.h"
#include "common/each_isa_cpu.h"

namespace hope {
namespace {

struct Variant {
    void (*tasks)(const ConvParams&, bool, int64_t, int64_t, void*);
    int64_t (*scratch_bytes)(const ConvParams&);
};

template <class T>
Variant variant() {
#if defined(__x86_64__)
    if (machine_isa() == Isa::avx512) return {avx512::conv_tasks<T>, avx512::conv_scratch_bytes<T>};
    if (machine_isa() == Isa::avx2) return {avx2::conv_tasks<T>, avx2::conv_scratch_bytes<T>};
#endif
    return {baseline::conv_tasks<T>, baseline::conv_scratch_bytes<T>};
}

void run(const ConvParams& params, const ParallelFor& parallel_for, bool backward) {
    const Variant use = params.element == Element::float64 ? variant<double>() : variant<float>();
    const int64_t blocks = (params.channels + baseline::kChannels - 1) / baseline::kChannels;
    run_tasks(parallel_for, blocks, static_cast<size_t>(use.scratch_bytes(params)),
              [&](int64_t begin, int64_t end, void* scratch) {
                  use.tasks(params, backward, begin, end, scratch);
              });
}

}  // namespace

void conv_fwd_cpu(const ConvParams& params, const ParallelFor& parallel_for) {
    run(params, parallel_for, false);
}
void conv_bwd_cpu(const ConvParams& params, const ParallelFor& parallel_for) {
    run(params, parallel_for, true);
}

}  // namespace hope
