// HOPE's self-modifying memory on the CPU: tasks (sequence, head) over threads, each in the
// machine's best instruction set.
#include "common/isa_cpu.h"
#include "common/tasks_cpu.h"
#include "selfmod/selfmod.h"

#define HOPE_EACH_ISA "selfmod/selfmod_cpu.h"
#include "common/each_isa_cpu.h"

namespace hope {
namespace {

struct Variant {
    void (*tasks)(const SelfmodParams&, bool, int64_t, int64_t, void*);
    int64_t (*scratch_bytes)(const SelfmodParams&, bool);
};

template <class T>
Variant variant() {
#if defined(__x86_64__)
    if (machine_isa() == Isa::avx512)
        return {avx512::selfmod_tasks<T>, avx512::selfmod_scratch_bytes<T>};
    if (machine_isa() == Isa::avx2) return {avx2::selfmod_tasks<T>, avx2::selfmod_scratch_bytes<T>};
#endif
    return {baseline::selfmod_tasks<T>, baseline::selfmod_scratch_bytes<T>};
}

void run(const SelfmodParams& params, bool backward, const ParallelFor& parallel_for) {
    const Variant use = params.element == Element::float64 ? variant<double>() : variant<float>();
    const int64_t tasks = params.sequences * params.heads;
    if (tasks == 0) return;  // no head has sizes to speak of
    const size_t bytes = static_cast<size_t>(use.scratch_bytes(params, backward));
    run_tasks(parallel_for, tasks, bytes, [&](int64_t begin, int64_t end, void* scratch) {
        use.tasks(params, backward, begin, end, scratch);
    });
}

}  // namespace

void selfmod_fwd_cpu(const SelfmodParams& params, const ParallelFor& parallel_for) {
    run(params, false, parallel_for);
}
void selfmod_bwd_cpu(const SelfmodParams& params, const ParallelFor& parallel_for) {
    run(params, true, parallel_for);
}

}  // namespace hope
