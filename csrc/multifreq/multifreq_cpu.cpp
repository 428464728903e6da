// The multi-frequency step on the CPU: stretches of all parameters' elements over threads.
#include "common/isa_cpu.h"
#include "multifreq/multifreq.h"

#define HOPE_EACH_ISA "multifreq/multifreq_kernel_cpu.h"
#include "common/each_isa_cpu.h"

namespace hope {
namespace {

using Part = void (*)(const MultifreqTensor&, const MultifreqParams&, int64_t, int64_t);

Part variant() {
#if defined(__x86_64__)
    if (machine_isa() == Isa::avx512) return avx512::multifreq_part;
    if (machine_isa() == Isa::avx2) return avx2::multifreq_part;
#endif
    return baseline::multifreq_part;
}

// The tensor that has element `element` of them all.
const MultifreqTensor* holder(const MultifreqParams& p, int64_t element) {
    int64_t low = 0, high = p.count;  // tensors [0, low) begin at it or before, from high on later
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (p.tensors[middle].before <= element)
            low = middle + 1;
        else
            high = middle;
    }
    return p.tensors + low - 1;
}

}  // namespace

void multifreq_cpu(const MultifreqParams& p, const ParallelFor& parallel_for) {
    constexpr int64_t kStretch = 1 << 14;
    const Part part = variant();
    const int64_t elements = p.elements();
    parallel_for((elements + kStretch - 1) / kStretch, [&](int64_t begin, int64_t end) {
        int64_t at = begin * kStretch;
        const int64_t stop = end * kStretch < elements ? end * kStretch : elements;
        for (const MultifreqTensor* tensor = at < stop ? holder(p, at) : nullptr; at < stop;
             tensor++) {
            const int64_t first = at - tensor->before, left = tensor->count - first;
            const int64_t count = stop - at < left ? stop - at : left;
            part(*tensor, p, first, first + count);
            at += count;
        }
    });
}

}  // namespace hope
