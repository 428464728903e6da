// The scheduler. It stands for the hardware, so a sanitized build does not instrument it: that
// build defines EMULATOR_ADDRESS or EMULATOR_RACES, and the engine tells the sanitizer what it
// does.
#include "cuda_emulator.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "fiber.h"
#include "races.h"
#ifdef EMULATOR_ADDRESS
#include <sanitizer/asan_interface.h>
#endif

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kSharedAlignment = 1024;
constexpr unsigned kMaxThreads = 1024, kMaxGridYZ = 65535;
constexpr int kBarriers = 16;
#ifdef EMULATOR_ADDRESS
constexpr size_t kRedZones = 64 * kRedZone;  // room for them beyond the limit
#else
constexpr size_t kRedZones = 0;
#endif
// Blocks are run by crews of fibers. To ThreadSanitizer a fiber is a thread, which does not race
// with itself, nor with those it has met at a barrier: it sees the races between blocks of
// different crews. New fibers for every block would take it longer than running them.
#ifdef EMULATOR_RACES
constexpr unsigned kCrews = 3;
#else
constexpr unsigned kCrews = 1;
#endif

// The sum of the digits: for any distance, most blocks so far apart have different crews.
unsigned crew_of(uint64_t block) {
    unsigned digits = 0;
    for (; kCrews > 1 && block; block /= kCrews) digits += block % kCrews;
    return digits % kCrews;
}

enum class State { ready, collective, barrier, late, done };

struct Deferred {
    std::function<void()> effect;
    Site site;
};

struct Thread {
    Fiber fiber;
    int rank = 0;
    uint3 index{};
    State state = State::ready;
    const char* name = "";  // what it waits for, and where
    Site site{};
    int barrier_id = 0;
    unsigned mask = 0;
    void* operands = nullptr;
    Operation perform = nullptr;
    std::deque<std::vector<Deferred>> groups;  // committed copies, oldest first
    std::vector<Deferred> uncommitted;
};

struct Warp {
    unsigned lanes = 0, ready = 0, arrived = 0;
    unsigned generation = 0;
    char sync[2];  // addresses that carry happens-before edges
};

struct Barrier {
    int arrived = 0, expected = 0;
    unsigned generation = 0;
    Site site{};
    char sync[2];
};

// One per operating-system thread that launches.
struct Engine {
    std::vector<std::unique_ptr<Thread>> threads;  // of the block
    std::vector<std::unique_ptr<Thread>> resting[kCrews];
    unsigned crew = 0;
    std::vector<Warp> warps;
    Barrier barriers[kBarriers];
    std::map<const void*, void*> static_arrays;
    char* shared = nullptr;
    size_t shared_bytes = 0;
    Thread main;  // the caller of launch
    Thread* current = &main;
    int alive = 0;
    unsigned ready_warps = 0;
    void (*body)(const void*) = nullptr;
    const void* arguments = nullptr;
    std::exception_ptr error;
    uint64_t random = 0;  // 0: threads run in order
    bool running = false;
    char begin_sync = 0, end_sync = 0;
};

__thread Engine* engine __attribute__((tls_model("initial-exec"))) = nullptr;

// ---- which thread runs next --------------------------------------------------------------------

unsigned random_bits() {  // xorshift64
    uint64_t& x = engine->random;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return static_cast<unsigned>(x >> 32);
}

bool one_in(unsigned chances) { return engine->random && random_bits() % chances == 0; }

int pick_bit(unsigned bits) {
    if (!engine->random) return __builtin_ctz(bits);
    const unsigned turn = random_bits() % 32;
    const unsigned turned = turn ? bits >> turn | bits << (32 - turn) : bits;
    return static_cast<int>((__builtin_ctz(turned) + turn) % 32);
}

void switch_to(Thread& next) {
    Thread& self = *engine->current;
    engine->current = &next;
    threadIdx = next.index;
    Fiber::switch_to(self.fiber, next.fiber);
}

void make_ready(Thread& thread) {
    thread.state = State::ready;
    engine->warps[thread.rank / 32].ready |= 1u << thread.rank % 32;
    engine->ready_warps |= 1u << thread.rank / 32;
}

bool wake_latecomers() {
    bool any = false;
    for (auto& thread : engine->threads)
        if (thread->state == State::late) make_ready(*thread), any = true;
    return any;
}

// Threads run until they have to wait, and a warp goes on as long as one of its lanes can: threads
// drift apart as far as the synchronisation allows. Now and then, chance decides otherwise.
Thread& pick() {
    Engine& e = *engine;
    if (one_in(64)) wake_latecomers();
    if (!e.ready_warps && !wake_latecomers()) return e.main;
    int warp = e.current->rank / 32;
    if (!e.warps[warp].ready || one_in(16)) warp = pick_bit(e.ready_warps);
    Warp& w = e.warps[warp];
    const int lane = pick_bit(w.ready);
    w.ready &= ~(1u << lane);
    if (!w.ready) e.ready_warps &= ~(1u << warp);
    return *e.threads[warp * 32 + lane];
}

void wait(State state) {
    engine->current->state = state;
    Thread& next = pick();
    if (&next != engine->current) switch_to(next);
}

// ---- a thread's life ---------------------------------------------------------------------------

void run_thread(Thread& self) {
    acquire(&engine->begin_sync);
    try {
        engine->body(engine->arguments);
        commit();
        for (auto& group : self.groups)
            if (!group.empty())
                fail(group[0].site, "the thread ends without waiting for an asynchronous copy");
    } catch (...) {
        engine->error = std::current_exception();
    }
    release(&engine->end_sync);
    engine->alive--;
    self.state = State::done;
}

void fiber_main() {
    Fiber::entered(engine->main.fiber);
    for (;;) {  // once per block
        run_thread(*engine->current);
        switch_to(engine->error ? engine->main : pick());
    }
}

// ---- messages ----------------------------------------------------------------------------------

std::string format_list(const char* format, va_list list) {
    char text[512];
    vsnprintf(text, sizeof text, format, list);
    return text;
}

std::string format(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* format, ...) {
    va_list list;
    va_start(list, format);
    std::string text = format_list(format, list);
    va_end(list);
    return text;
}

std::string current_block() {
    return format("block (%u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z);
}

std::string describe(const Thread& thread) {
    return format("thread (%u,%u,%u) [warp %d lane %d]", thread.index.x, thread.index.y,
                  thread.index.z, thread.rank / 32, thread.rank % 32);
}

std::string describe(Site site) { return site.file + (":" + std::to_string(site.line)); }

bool same_line(Site a, Site b) {
    return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file));
}

std::string deadlock_report() {
    struct Group {
        int count = 0;
        const Thread* first = nullptr;
    };
    std::map<std::string, Group> groups;
    for (auto& thread : engine->threads) {
        std::string what = "have ended";
        if (thread->state != State::done) {
            what = std::string("wait in ") + thread->name + " at " + describe(thread->site);
            const Barrier& b = engine->barriers[thread->barrier_id];
            if (thread->state == State::barrier)
                what += format(" (%d of %d threads came)", b.arrived, b.expected);
        }
        Group& group = groups[what];
        if (!group.count++) group.first = thread.get();
    }
    std::string report = current_block() + ": deadlock:";
    for (auto& [what, group] : groups)
        report += "\n    " + std::to_string(group.count) + " threads " + what + ", first " +
                  describe(*group.first);
    return report;
}

// ---- blocks ------------------------------------------------------------------------------------

void* allocate_shared(size_t bytes) {  // the exact size, so that AddressSanitizer sees the end
    Unchecked scope;
    void* memory;
    if (posix_memalign(&memory, kSharedAlignment, bytes)) throw std::bad_alloc();
    poison(memory, bytes);
    return memory;
}

void free_shared() {
    std::free(engine->shared);
    for (auto& [key, array] : engine->static_arrays) std::free(array);
    engine->static_arrays.clear();
}

void run_block() {
    Engine& e = *engine;
    e.shared = static_cast<char*>(allocate_shared(e.shared_bytes));
    for (auto& barrier : e.barriers) barrier.arrived = 0;
    for (auto& warp : e.warps) warp.arrived = 0;
    for (auto& thread : e.threads) {
        thread->groups.clear();
        make_ready(*thread);
    }
    e.alive = static_cast<int>(e.threads.size());
    release(&e.begin_sync);
    switch_to(pick());
    Unchecked scope;
    free_shared();
    if (!e.error && e.alive) e.error = std::make_exception_ptr(Error(deadlock_report()));
    if (e.error) {
        e.threads.clear();  // their stacks are abandoned half-way
        std::rethrow_exception(std::exchange(e.error, nullptr));
    }
    for (auto& thread : e.threads) e.resting[e.crew].push_back(std::move(thread));
    e.threads.clear();
}

void prepare(int threads, uint3 block, size_t shared_bytes, uint64_t seed, unsigned crew) {
    Engine& e = *engine;
    e.crew = crew;
    e.main.fiber.adopt_thread();
    e.shared_bytes = shared_bytes;
    e.ready_warps = 0;
    e.random = seed ? seed * 0x9e3779b97f4a7c15 | 1 : 0;
    e.warps.assign((threads + 31) / 32, Warp{});
    auto& resting = e.resting[e.crew];
    while (static_cast<int>(e.threads.size()) < threads) {
        if (resting.empty()) {
            resting.push_back(std::make_unique<Thread>());
            resting.back()->fiber.start(fiber_main);
        }
        e.threads.push_back(std::move(resting.back()));
        resting.pop_back();
    }
    for (unsigned rank = 0; rank < e.threads.size(); rank++) {
        Thread& thread = *e.threads[rank];
        thread.rank = static_cast<int>(rank);
        thread.index = {rank % block.x, rank / block.x % block.y, rank / (block.x * block.y)};
        e.warps[rank / 32].lanes |= 1u << rank % 32;
    }
}

}  // namespace

uint64_t environment(const char* name, uint64_t otherwise) {
    const char* text = std::getenv(name);
    return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

size_t shared_limit() { return environment("EMULATOR_SHARED_BYTES", 227 << 10) + kRedZones; }

// ---- what kernels call -------------------------------------------------------------------------

void fail(Site site, const char* format, ...) {
    va_list list;
    va_start(list, format);
    const std::string message = format_list(format, list);
    va_end(list);
    throw Error(current_block() + " " + describe(*engine->current) + ": " + message + " at " +
                describe(site));
}

int thread_rank() { return engine->current->rank; }
void* dynamic_shared() { return engine->shared; }
void poison(void* address, size_t bytes) { std::memset(address, 0xff, bytes); }
void protect([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_ADDRESS
    __asan_poison_memory_region(address, bytes);
#endif
}

void require_aligned(const void* address, int alignment, const char* name, Site site) {
    if (reinterpret_cast<uintptr_t>(address) % alignment)
        fail(site, "%s: address %p is not a multiple of %d", name, address, alignment);
}

void require_shared(const void* address, Site site) {
    const size_t offset = static_cast<const char*>(address) - engine->shared;
    if (offset > engine->shared_bytes) fail(site, "address %p is not in shared memory", address);
}

void* static_shared(const void* key, size_t bytes) {
    void*& array = engine->static_arrays[key];
    if (!array) array = allocate_shared(bytes);
    return array;
}

void collective(const char* name, unsigned mask, void* operands, Operation perform, Site site) {
    Thread& self = *engine->current;
    const unsigned lane = 1u << self.rank % 32;
    Warp& warp = engine->warps[self.rank / 32];
    const auto thread_of = [first = self.rank / 32 * 32](unsigned lanes) -> Thread& {
        return *engine->threads[first + __builtin_ctz(lanes)];
    };
    mask &= warp.lanes;
    if (!(mask & lane)) fail(site, "%s: the calling lane is not in the mask %08x", name, mask);
    self.name = name, self.site = site, self.mask = mask;
    self.operands = operands, self.perform = perform;
    warp.arrived |= lane;
    bool complete = (warp.arrived & mask) == mask;
    for (unsigned m = mask & warp.arrived; m; m &= m - 1) {
        const Thread& other = thread_of(m);
        if (other.mask != mask)
            complete = false;  // it is still busy with a collective of other lanes
        else if (other.perform != perform || !same_line(other.site, site))
            fail(site, "divergent warp: %s meets %s at %s of %s", name, other.name,
                 describe(other.site).c_str(), describe(other).c_str());
    }
    char* sync = perform ? nullptr : &warp.sync[warp.generation % 2];  // only __syncwarp orders
    if (sync) release(sync);
    if (complete) {
        warp.arrived &= ~mask;
        if (sync) warp.generation++;
        if (perform) {
            void* all[32] = {};
            for (unsigned m = mask; m; m &= m - 1) all[__builtin_ctz(m)] = thread_of(m).operands;
            Unchecked scope;
            perform(all, mask);
        }
        for (unsigned m = mask & ~lane; m; m &= m - 1) make_ready(thread_of(m));
    } else {
        wait(State::collective);
    }
    if (sync) acquire(sync);
}

void barrier(int id, int threads, bool must_wait, const char* name, Site site) {
    Thread& self = *engine->current;
    const int all = static_cast<int>(engine->threads.size());
    if (id < 0 || id >= kBarriers) fail(site, "%s: no barrier %d", name, id);
    if (threads <= 0 || threads > all || (threads % 32 && threads != all))
        fail(site, "%s: %d threads of a block of %d", name, threads, all);
    Barrier& b = engine->barriers[id];
    self.name = name, self.site = site, self.barrier_id = id;
    if (!b.arrived) b.expected = threads, b.site = site;
    if (b.expected != threads)
        fail(site, "%s: %d threads here, %d at %s", name, threads, b.expected,
             describe(b.site).c_str());
    if (id == 0 && !same_line(b.site, site))
        fail(site, "divergent barrier: %s here, another thread came from %s", name,
             describe(b.site).c_str());
    char* sync = &b.sync[b.generation % 2];
    release(sync);
    if (++b.arrived == b.expected) {
        b.arrived = 0, b.generation++;
        for (auto& thread : engine->threads)
            if (thread->state == State::barrier && thread->barrier_id == id) make_ready(*thread);
    } else if (must_wait) {
        wait(State::barrier);
    }
    if (must_wait) acquire(sync);
}

void defer(std::function<void()> effect, Site site) {
    Unchecked scope;
    engine->current->uncommitted.push_back({std::move(effect), site});
}

void commit() {
    Unchecked scope;
    Thread& self = *engine->current;
    self.groups.push_back(std::exchange(self.uncommitted, {}));
}

void wait_group(int groups_left) {
    if (one_in(16)) wait(State::late);  // goes on when all others have to wait, or chance wants it
    auto& groups = engine->current->groups;
    for (; static_cast<int>(groups.size()) > groups_left; groups.pop_front())
        for (const Deferred& deferred : groups.front()) deferred.effect();
}

void run(uint3 grid, uint3 block, size_t shared_bytes, void (*thread)(const void*),
         const void* arguments) {
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    if (threads < 1 || threads > kMaxThreads || block.z > 64)
        throw Error(format("launch: a block of (%u,%u,%u) threads", block.x, block.y, block.z));
    if (blocks < 1 || grid.x > INT32_MAX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ)
        throw Error(format("launch: a grid of (%u,%u,%u) blocks", grid.x, grid.y, grid.z));
    if (shared_bytes > shared_limit())
        throw Error(format("launch: %zu bytes of shared memory", shared_bytes));
    if (engine && engine->running) throw Error("launch: called by a kernel");

    const uint64_t workers =
        std::min(std::max<uint64_t>(environment("EMULATOR_THREADS", 1), 1), blocks);
    const uint64_t seed = environment("EMULATOR_SEED", 1);
    std::vector<std::exception_ptr> errors(workers);
    const auto work = [&](uint64_t worker) {
        static thread_local std::unique_ptr<Engine> own;  // thread-local storage itself is scarce
        if (!own) own = std::make_unique<Engine>();
        engine = own.get();
        engine->running = true;
        engine->body = thread, engine->arguments = arguments;
        try {
            for (uint64_t i = worker; i < blocks; i += workers) {
                gridDim = grid, blockDim = block;
                blockIdx = {static_cast<unsigned>(i % grid.x),
                            static_cast<unsigned>(i / grid.x % grid.y),
                            static_cast<unsigned>(i / grid.x / grid.y)};
                prepare(static_cast<int>(threads), block, shared_bytes, seed ? seed + i : 0,
                        crew_of(i));
                run_block();
            }
        } catch (...) {
            errors[worker] = std::current_exception();
        }
        engine->running = false;
        acquire(&engine->end_sync);
    };
    std::vector<std::thread> others;
    struct JoinAll {
        std::vector<std::thread>& threads;
        ~JoinAll() {
            for (auto& thread : threads) thread.join();
        }
    };
    {
        const JoinAll joined{others};
        for (uint64_t i = 1; i < workers; i++) others.emplace_back(work, i);
        work(0);
    }
    for (auto& error : errors)
        if (error) std::rethrow_exception(error);
}

}  // namespace emulator
