// Runs CUDA kernels on the CPU: what a kernel source sees instead of CUDA's device headers when the
// compiler is a plain C++17 compiler. One fiber per CUDA thread, blocks one after another.
// csrc/common/launch.cuh includes this header; README.md beside it describes the whole.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <type_traits>
#include <utility>

#undef __shared__
#define __shared__ use_SHARED_ARRAY_instead_of___shared__  // a compile error that says what to do
#define __launch_bounds__(...)

// For long computations that stand for the hardware: their accesses are never checked, so
// ThreadSanitizer need not see them.
#define EMULATOR_NOT_INSTRUMENTED __attribute__((no_sanitize("thread")))

// Nothing of the emulator is visible outside the program or shared object that it is linked into:
// several emulated libraries, and the real CUDA runtime, can be loaded into one process.
#pragma GCC visibility push(hidden)

extern __thread uint3 threadIdx __attribute__((tls_model("initial-exec")));
extern __thread uint3 blockIdx __attribute__((tls_model("initial-exec")));
extern __thread uint3 blockDim __attribute__((tls_model("initial-exec")));
extern __thread uint3 gridDim __attribute__((tls_model("initial-exec")));
constexpr int warpSize = 32;

namespace emulator {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Site {  // the line of kernel source that called a primitive
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// ---- services for primitives, called from kernel code ------------------------------------------

[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));
int thread_rank();  // in the block
void require_aligned(const void* address, int alignment, const char* name, Site site);
#ifdef EMULATOR_ADDRESS
constexpr bool kRequiresShared = true;
#else
constexpr bool kRequiresShared = false;  // it is asked too often
#endif
void require_shared(const void* address, Site site);

// All lanes of `mask` meet; the last to come performs the operation on everybody's operands.
using Operation = void (*)(void* const* operands, unsigned mask);  // operands[lane]
void collective(const char* name, unsigned mask, void* operands, Operation perform, Site site);
void barrier(int id, int threads, bool must_wait, const char* name, Site site);

// Asynchronous copies: the effect is put off until the wait that covers it.
void defer(std::function<void()> effect, Site site);
void commit();
void wait_group(int groups_left);

// A setting of the environment, read at every call.
uint64_t environment(const char* name, uint64_t otherwise);

// What a block may have of shared memory: $EMULATOR_SHARED_BYTES, else that of compute capability
// 9.0; with room for red zones under AddressSanitizer.
size_t shared_limit();

constexpr size_t kRedZone = 64;
void* dynamic_shared();
void* static_shared(const void* key, size_t bytes);
void poison(void* address, size_t bytes);         // fills with NaN
void protect(const void* address, size_t bytes);  // makes any access an AddressSanitizer error

// ---- launch ------------------------------------------------------------------------------------

void run(uint3 grid, uint3 block, size_t shared_bytes, void (*thread)(const void*),
         const void* arguments);

template <class... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
            std::decay_t<P>... arguments) {
    const auto thread = [&] { kernel(arguments...); };
    run(
        {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes,
        [](const void* t) { (*static_cast<decltype(&thread)>(t))(); }, &thread);
}

// ---- warp exchange -----------------------------------------------------------------------------

template <class T>
struct Exchange {
    T value, result;
    int source;
    Site site;
};

template <class T>
T exchange(const char* name, unsigned mask, T value, int source, Site site) {
    Exchange<T> mine{value, value, source, site};
    const auto perform = [](void* const* operands, unsigned mask) {
        for (unsigned m = mask; m; m &= m - 1) {
            auto* lane = static_cast<Exchange<T>*>(operands[__builtin_ctz(m)]);
            if (!(mask >> lane->source & 1))
                fail(lane->site, "shuffle reads lane %d, not in the mask", lane->source);
            lane->result = static_cast<Exchange<T>*>(operands[lane->source])->value;
        }
    };
    collective(name, mask, &mine, perform, site);
    return mine.result;
}

// The lane to read: `source` if that is in the same segment of `width` lanes, else the lane itself.
inline int within_segment(int lane, int source, int width) {
    return source >= 0 && (source & -width) == (lane & -width) ? source : lane;
}

}  // namespace emulator

// ---- CUDA built-ins ----------------------------------------------------------------------------

#define EMULATOR_SITE emulator::Site site = emulator::Site::here()

inline void __syncthreads(EMULATOR_SITE) {
    const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
    emulator::barrier(0, threads, true, "__syncthreads", site);
}
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_SITE) {
    emulator::collective("__syncwarp", mask, nullptr, nullptr, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_SITE) {
    const int lane = emulator::thread_rank() % 32;
    const int from = (lane & -width) | (source & (width - 1));
    return emulator::exchange("__shfl_sync", mask, value, from, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATOR_SITE) {
    const int lane = emulator::thread_rank() % 32;
    const int from = emulator::within_segment(lane, lane ^ bits, width);
    return emulator::exchange("__shfl_xor_sync", mask, value, from, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, EMULATOR_SITE) {
    const int lane = emulator::thread_rank() % 32;
    const int from = emulator::within_segment(lane, lane + delta, width);
    return emulator::exchange("__shfl_down_sync", mask, value, from, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, EMULATOR_SITE) {
    const int lane = emulator::thread_rank() % 32;
    const int from = emulator::within_segment(lane, lane - delta, width);
    return emulator::exchange("__shfl_up_sync", mask, value, from, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
    struct Vote {
        bool cast;
        unsigned result;
    } mine{predicate != 0, 0};
    const auto count = [](void* const* operands, unsigned mask) {
        unsigned votes = 0;
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1 && static_cast<Vote*>(operands[i])->cast) votes |= 1u << i;
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1) static_cast<Vote*>(operands[i])->result = votes;
    };
    emulator::collective("__ballot_sync", mask, &mine, count, site);
    return mine.result;
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_SITE) {
    return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_SITE) {
    return __ballot_sync(mask, !predicate, site) == 0;
}

template <class T>
T atomicAdd(T* address, T value) {
    T old, sum;
    __atomic_load(address, &old, __ATOMIC_RELAXED);
    do sum = old + value;
    while (
        !__atomic_compare_exchange(address, &old, &sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

template <class T>
T __ldg(const T* address) {
    return *address;
}

inline float __uint_as_float(unsigned x) {
    float y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
inline unsigned __float_as_uint(float x) {
    unsigned y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
template <class T>
constexpr std::enable_if_t<std::is_arithmetic_v<T>, T> min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr std::enable_if_t<std::is_arithmetic_v<T>, T> max(T a, T b) {
    return a < b ? b : a;
}

// launch.cuh's SHARED_ARRAY: works in templates, and any number of times in a kernel.
#define EMULATED_SHARED_ARRAY(type, name, count) \
    static char name##_key;                      \
    type* const name =                           \
        static_cast<type*>(emulator::static_shared(&name##_key, sizeof(type) * (count)))

#pragma GCC visibility pop
