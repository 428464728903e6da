// The Newton-Schulz iteration on the CPU: phases, each of independent tasks over threads.
#include "common/isa_cpu.h"
#include "common/tasks_cpu.h"
#include "newton_schulz/newton_schulz.h"

namespace hope {
namespace {

constexpr int64_t kBlock = 128;  // rows and columns of what one task makes

enum class NewtonSchulzPhase {
    load,        // X = g, and the sums of its squares
    normalise,   // X /= |g| + eps
    gram,        // A
    polynomial,  // B
    update,      // the next X
    store
};

int64_t blocks(int64_t size) { return (size + kBlock - 1) / kBlock; }

// Tasks of a phase for one matrix.
int64_t newton_schulz_tasks(const NewtonSchulzParams& p, NewtonSchulzPhase phase) {
    const int64_t side = blocks(shorter_side(p));
    if (phase == NewtonSchulzPhase::gram || phase == NewtonSchulzPhase::polynomial)
        return side * (side + 1) / 2;
    return blocks(p.rows) * (phase == NewtonSchulzPhase::update ? blocks(p.columns) : 1);
}

}  // namespace
}  // namespace hope

#define HOPE_EACH_ISA "newton_schulz/newton_schulz_kernel_cpu.h"
#include "common/each_isa_cpu.h"

namespace hope {
namespace {

struct Variant {
    void (*part)(const NewtonSchulzParams&, NewtonSchulzPhase, int64_t, int64_t, int64_t, void*,
                 int64_t, int64_t, void*);
    int64_t (*scratch_bytes)();
};

template <class T>
Variant variant() {
#if defined(__x86_64__)
    if (machine_isa() == Isa::avx512)
        return {avx512::newton_schulz_part<T>, avx512::newton_schulz_scratch_bytes<T>};
    if (machine_isa() == Isa::avx2)
        return {avx2::newton_schulz_part<T>, avx2::newton_schulz_scratch_bytes<T>};
#endif
    return {baseline::newton_schulz_part<T>, baseline::newton_schulz_scratch_bytes<T>};
}

constexpr int64_t kCacheLine = 64;

// Bytes of NewtonSchulzBuffers, to whole cache lines.
int64_t buffer_bytes(const NewtonSchulzParams& p, int64_t group) {
    const int64_t side = shorter_side(p), element = p.element == Element::float64 ? 8 : 4;
    const auto lines = [](int64_t bytes) { return (bytes + kCacheLine - 1) / kCacheLine; };
    const int64_t iterates = 2 * lines(group * p.rows * p.columns * element),
                  squares_of_x = 2 * lines(group * side * side * element),
                  sums = lines(group * blocks(p.rows) * 8);
    return kCacheLine * (iterates + squares_of_x + sums);
}

// Small matrices stay in a core's cache: each is one thread's, from the first phase to the last.
bool is_small(const NewtonSchulzParams& p) {
    constexpr int64_t kSmall = 256 * 256;
    return p.rows * p.columns <= kSmall;
}

// Large ones are shared by all threads, in groups that have work for many.
int64_t group_size(const NewtonSchulzParams& p) {
    constexpr int64_t kEnough = 64;
    const int64_t tasks = newton_schulz_tasks(p, NewtonSchulzPhase::gram);
    const int64_t enough = (kEnough + tasks - 1) / tasks;
    return enough < p.batch ? enough : p.batch;
}

template <class Run>
void each_phase(int64_t steps, Run run) {
    run(NewtonSchulzPhase::load, 0);
    run(NewtonSchulzPhase::normalise, 0);
    for (int64_t i = 0; i < steps; i++)
        for (const auto phase :
             {NewtonSchulzPhase::gram, NewtonSchulzPhase::polynomial, NewtonSchulzPhase::update})
            run(phase, i);
    run(NewtonSchulzPhase::store, steps);
}

}  // namespace

int64_t newton_schulz_cpu_workspace(const NewtonSchulzParams& p) {
    return is_small(p) ? 0 : buffer_bytes(p, group_size(p));
}

void newton_schulz_cpu(const NewtonSchulzParams& p, const ParallelFor& parallel_for) {
    const Variant use = p.element == Element::float64 ? variant<double>() : variant<float>();
    const int64_t scratch_bytes = use.scratch_bytes();
    if (is_small(p)) {
        run_tasks(parallel_for, p.batch, static_cast<size_t>(scratch_bytes + buffer_bytes(p, 1)),
                  [&](int64_t begin, int64_t end, void* scratch) {
                      void* const buffers = static_cast<char*>(scratch) + scratch_bytes;
                      for (int64_t matrix = begin; matrix < end; matrix++)
                          each_phase(p.steps, [&](NewtonSchulzPhase phase, int64_t iteration) {
                              use.part(p, phase, 1, matrix, iteration, buffers, 0,
                                       newton_schulz_tasks(p, phase), scratch);
                          });
                  });
        return;
    }
    const int64_t most = group_size(p);
    for (int64_t first = 0; first < p.batch; first += most) {
        const int64_t group = p.batch - first < most ? p.batch - first : most;
        each_phase(p.steps, [&](NewtonSchulzPhase phase, int64_t iteration) {
            run_tasks(
                parallel_for, group * newton_schulz_tasks(p, phase),
                static_cast<size_t>(scratch_bytes), [&](int64_t begin, int64_t end, void* scratch) {
                    use.part(p, phase, group, first, iteration, p.workspace, begin, end, scratch);
                });
        });
    }
}

}  // namespace hope
