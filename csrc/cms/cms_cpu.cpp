// The continuum memory system on the CPU: the phases of its chunks in order, the tasks of each over
// threads, in the machine's best instruction set.
#include "cms/cms_work_cpu.h"
#include "common/isa_cpu.h"
#include "common/tasks_cpu.h"

#define HOPE_EACH_ISA "cms/cms_cpu.h"
#include "common/each_isa_cpu.h"

namespace hope {
namespace {

using baseline::least;
using baseline::most;
using baseline::round_up;
using Phase = CmsPhase;
using Sequence = baseline::Sequence<CmsParams>;

// Blocks of a product that are worked on at once, as far as there are sequences: enough for every
// thread, while the rows of other sequences' chunks take no memory.
constexpr int64_t kBlocksAtOnce = 64;
constexpr int64_t kLanesAtMost = 16;

struct Variant {
    void (*tasks)(const CmsWork&, Phase, int64_t, int64_t, void*);
    int64_t (*tasks_of)(const CmsWork&, Phase);
    int64_t (*scratch_bytes)(const CmsWork&);
    int64_t bytes;  // of a number
};

template <class T>
Variant variant() {
#if defined(__x86_64__)
    if (machine_isa() == Isa::avx512)
        return {avx512::cms_tasks<T>, avx512::cms_tasks_of<T>, avx512::cms_scratch_bytes<T>,
                sizeof(T)};
    if (machine_isa() == Isa::avx2)
        return {avx2::cms_tasks<T>, avx2::cms_tasks_of<T>, avx2::cms_scratch_bytes<T>, sizeof(T)};
#endif
    return {baseline::cms_tasks<T>, baseline::cms_tasks_of<T>, baseline::cms_scratch_bytes<T>,
            sizeof(T)};
}

using Memory = std::unique_ptr<char[]>;

class Run {
 public:
    Run(const CmsParams& params, const ParallelFor& threads)
        : p(params),
          parallel_for(threads),
          use(p.element == Element::float64 ? variant<double>() : variant<float>()),
          work{p, CmsPass::forward, 0, 0, 0, 0, 0, 0, 0, 0, nullptr, nullptr} {
        work.ld = round_up(p.dim, kLanesAtMost), work.lf = round_up(p.hidden_dim, kLanesAtMost);
    }

    void forward() {
        for (int64_t n = 0; n < p.sequences; n += work.sequences) {
            begin(n, 2);
            const Memory running = states(!p.keeps_state && chunks > 1);
            work.kept = running.get();
            work.first_chunk = 0, work.end_chunk = chunks;
            for (work.chunk = 0; work.chunk < chunks; work.chunk++) forward_chunk();
            phase(Phase::finish);
        }
    }
    void backward() {
        for (int64_t n = 0; n < p.sequences; n += work.sequences) {
            begin(n, 5);
            const int64_t group = p.checkpoint_every;
            const Memory kept = states(most(0, least(group, chunks) - 1));
            work.kept = kept.get();
            phase(Phase::start);
            for (int64_t first = (chunks - 1) / group * group; first >= 0 && chunks;
                 first -= group) {
                work.first_chunk = first, work.end_chunk = least(chunks, first + group);
                work.pass = CmsPass::again;
                for (work.chunk = first; work.chunk + 1 < work.end_chunk; work.chunk++)
                    forward_chunk();
                work.pass = CmsPass::backward;
                for (work.chunk = work.end_chunk - 1; work.chunk >= first; work.chunk--)
                    backward_chunk();
            }
        }
    }

 private:
    const CmsParams& p;
    const ParallelFor& parallel_for;
    const Variant use;
    CmsWork work;
    int64_t chunks = 0;  // of the longest sequence at work
    Memory rows;

    // Memory for so many numbers; untouched, since phases write all that later ones read.
    Memory memory(int64_t numbers) const {
        return Memory(new char[static_cast<size_t>(numbers * use.bytes)]);
    }
    Memory states(int64_t count) const {  // of each sequence at work
        return memory(count * work.sequences * 2 * p.dim * p.hidden_dim);
    }
    // Puts sequences from n on to work: as many as give all threads something to do.
    void begin(int64_t n, int64_t rows_of_each_kind) {
        using Block = baseline::BlockProduct<float>;
        const int64_t blocks = Block::count(least(p.chunk_size, most(p.tokens, 1)), most(p.dim, 1));
        work.first_sequence = n;
        work.sequences = least(p.sequences - n, most(1, kBlocksAtOnce / blocks));
        work.most_rows = 0, chunks = 0;
        for (int64_t i = n; i < n + work.sequences; i++) {
            const Sequence at(p, i, 0);
            work.most_rows = most(work.most_rows, least(p.chunk_size, at.length));
            chunks = most(chunks, at.chunks());
        }
        rows = memory(work.sequences * work.most_rows * rows_of_each_kind * (work.ld + work.lf));
        work.rows = rows.get();
    }
    void phase(Phase which) {
        const int64_t tasks = work.sequences * use.tasks_of(work, which);
        run_tasks(parallel_for, tasks, static_cast<size_t>(use.scratch_bytes(work)),
                  [&](int64_t from, int64_t to, void* scratch) {
                      use.tasks(work, which, from, to, scratch);
                  });
    }
    void phases(std::initializer_list<Phase> order) {
        for (const Phase which : order) phase(which);
    }
    void forward_chunk() {
        phases({Phase::load, Phase::hidden, Phase::output, Phase::back, Phase::learn});
    }
    void backward_chunk() {
        phases({Phase::load, Phase::hidden, Phase::output, Phase::back, Phase::lesson,
                Phase::scaled_errors, Phase::errors, Phase::activated, Phase::input,
                Phase::weights});
    }
};

}  // namespace

void cms_fwd_cpu(const CmsParams& params, const ParallelFor& parallel_for) {
    Run(params, parallel_for).forward();
}
void cms_bwd_cpu(const CmsParams& params, const ParallelFor& parallel_for) {
    Run(params, parallel_for).backward();
}

}  // namespace hope
