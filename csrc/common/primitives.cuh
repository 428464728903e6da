// Every instruction that kernels need beyond plain CUDA C++: barriers, asynchronous copies, matrix
// fragments and tensor-core products. Each has a device body (PTX) and an emulated one with the
// same signature, so a kernel written with them compiles with nvcc and, for tests, with a plain C++
// compiler (tests/emulator).
//
// Rules for kernel sources (tests/emulator/README.md says why):
//  1. No inline PTX, __CUDA_ARCH__, <<<>>>, CUTLASS, CUB or cooperative groups. Launch with
//     launch().
//  2. Shared memory is SHARED_ARRAY or dynamic_shared() cut by a SharedCarver.
//  3. All threads reach each __syncthreads from the same line; none returns before one. Between
//     lanes that exchange data through shared memory stands a __syncwarp: shuffles, ldmatrix and
//     mma do not order memory.
//  4. Blocks never wait for each other.
//  5. Every cp.async is waited for before its thread ends.
//  6. Arithmetic in float: 16-bit types are storage.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "common/launch.cuh"

namespace hope {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// ---- named barriers ----------------------------------------------------------------------------
// `id` 1 to 15 (0 is __syncthreads); `threads`, a multiple of 32, counts those that sync and those
// that arrive.

DEVICE void named_barrier_sync(int id, int threads CALL_SITE) {
#ifdef __CUDACC__
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    ::emulator::barrier(id, threads, true, "bar.sync", site);
#endif
}

DEVICE void named_barrier_arrive(int id, int threads CALL_SITE) {
#ifdef __CUDACC__
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    ::emulator::barrier(id, threads, false, "bar.arrive", site);
#endif
}

// ---- asynchronous copies -----------------------------------------------------------------------

#ifdef __CUDACC__
DEVICE uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// Tells the compiler that this points into dynamic shared memory, or to its end: loads and stores
// of its own are cheaper than those through a pointer to anything.
DEVICE void assume_shared(const void* p CALL_SITE) {
#ifdef __CUDACC__
    __builtin_assume(__isShared(p));
#else
    if (::emulator::kRequiresShared) ::emulator::require_shared(p, site);
#endif
}

// Starts to copy 16 bytes to shared memory; those past `valid_bytes` become zero and are not read.
// Both addresses are multiples of 16.
DEVICE void cp_async_16(void* shared, const void* global, int valid_bytes = 16 CALL_SITE) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid_bytes)
                 : "memory");
#else
    ::emulator::require_aligned(shared, 16, "cp.async", site);
    ::emulator::require_aligned(global, 16, "cp.async", site);
    ::emulator::poison(shared, 16);
    const auto copy = [=] {
        memcpy(shared, global, valid_bytes);
        memset(static_cast<char*>(shared) + valid_bytes, 0, 16 - valid_bytes);
    };
    ::emulator::defer(copy, site);
#endif
}

// Closes the group of copies that this thread has started since the last commit.
DEVICE void cp_async_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    ::emulator::commit();
#endif
}

// Waits until at most `GroupsLeft` of this thread's groups are under way. Other threads see the
// data after a barrier that follows.
template <int GroupsLeft>
DEVICE void cp_async_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
#else
    ::emulator::wait_group(GroupsLeft);
#endif
}

// ---- matrix fragments --------------------------------------------------------------------------
// A warp holds an 8x8 matrix of 16-bit elements in one register per lane: lane i has row i / 4,
// columns i % 4 * 2 (low half) and i % 4 * 2 + 1 (high half).

// Loads `Count` 8x8 matrices, each transposed on the way if asked: r[m] is this lane's register of
// matrix m. Lane i gives the address of row i % 8 of matrix i / 8, a multiple of 16; lanes from
// 8 * Count on give any.
template <int Count, bool Transposed = false>
DEVICE void ldmatrix(uint32_t (&r)[Count], const void* row CALL_SITE) {
    static_assert(Count == 1 || Count == 2 || Count == 4);
#ifdef __CUDACC__
    const uint32_t address = shared_address(row);
    if constexpr (Count == 1 && !Transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(address)
                     : "memory");
    else if constexpr (Count == 1)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(address)
                     : "memory");
    else if constexpr (Count == 2 && !Transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(address)
                     : "memory");
    else if constexpr (Count == 2)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(address)
                     : "memory");
    else if constexpr (!Transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
#else
    struct Operands {
        uint16_t row[8];
        uint32_t* result;
    } mine{{}, r};
    if (::emulator::thread_rank() % 32 < 8 * Count) {
        ::emulator::require_aligned(row, 16, "ldmatrix", site);
        // Each lane reads the row it points at itself, so that a race is reported on its line.
        for (int j = 0; j < 8; j++) mine.row[j] = static_cast<const uint16_t*>(row)[j];
    }
    const auto exchange = [](void* const* all, unsigned) {
        for (int lane = 0; lane < 32; lane++)
            for (int matrix = 0; matrix < Count; matrix++) {
                const auto element = [&](int i, int j) -> uint32_t {
                    if (Transposed) std::swap(i, j);
                    return static_cast<Operands*>(all[matrix * 8 + i])->row[j];
                };
                const int i = lane / 4, j = lane % 4 * 2;
                static_cast<Operands*>(all[lane])->result[matrix] =
                    element(i, j) | element(i, j + 1) << 16;
            }
    };
    ::emulator::collective("ldmatrix", ~0u, &mine, exchange, site);
#endif
}

// Transposes an 8x8 matrix between the lanes' registers.
DEVICE uint32_t transpose_8x8(uint32_t x CALL_SITE) {
#ifdef __CUDACC__
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
#else
    struct Operands {
        uint32_t x, y;
    } mine{x, 0};
    const auto exchange = [](void* const* all, unsigned) {
        const auto element = [&](int i, int j) {
            return static_cast<Operands*>(all[i * 4 + j / 2])->x >> j % 2 * 16 & 0xffffu;
        };
        for (int lane = 0; lane < 32; lane++)
            static_cast<Operands*>(all[lane])->y =
                element(lane % 4 * 2, lane / 4) | element(lane % 4 * 2 + 1, lane / 4) << 16;
    };
    ::emulator::collective("movmatrix", ~0u, &mine, exchange, site);
    return mine.y;
#endif
}

// ---- conversions -------------------------------------------------------------------------------

// Rounds both to nearest even and packs them as consecutive elements: `low` at the lower address.
DEVICE uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

DEVICE uint32_t pack_fp16(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

// Rounds to tf32: 10 mantissa bits, ties away from zero.
DEVICE uint32_t to_tf32(float x) {
#ifdef __CUDACC__
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
#else
    return (__float_as_uint(x) + (std::isfinite(x) ? 0x1000u : 0u)) & ~0x1fffu;
#endif
}

// ---- tensor-core products ----------------------------------------------------------------------
// d[16x8] += a[16xK] b[Kx8] by one warp, fp32 sums. With row = lane / 4 and pair = lane % 4:
//   d[i]: row (+ 8 if i >= 2), column pair * 2 + i % 2
//   16-bit, K = 16: a[i] = A[row (+ 8 if i is odd)][pair * 2 (+ 8 if i >= 2) and the next]
//                   b[i] = B[pair * 2 (+ 8 if i) and the next][row]
//   tf32, K = 8:    a[i] = A[row (+ 8 if i is odd)][pair (+ 4 if i >= 2)], b[i] = B[pair (+ 4 if
//   i)][row]

#ifndef __CUDACC__
namespace emulated {

struct MmaOperands {
    float* d;
    const uint32_t *a, *b;
};

template <int K>
EMULATOR_NOT_INSTRUMENTED void multiply_tile(void* const* all, const float (&a)[16][K],
                                             const float (&b)[K][8]) {
    for (int i = 0; i < 16; i++) {
        float sum[8] = {};
        for (int k = 0; k < K; k++)
            for (int j = 0; j < 8; j++) sum[j] += a[i][k] * b[k][j];
        for (int j = 0; j < 8; j++)
            static_cast<MmaOperands*>(all[i % 8 * 4 + j / 2])->d[i / 8 * 2 + j % 2] += sum[j];
    }
}

// The m16n8k16 product of 16-bit operands; to_float(bits) gives an element's value.
template <float (*to_float)(uint16_t)>
EMULATOR_NOT_INSTRUMENTED void multiply_16bit(void* const* all, unsigned) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const auto& from = *static_cast<MmaOperands*>(all[lane]);
        const int row = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++)
                a[row + i % 2 * 8][column + i / 2 * 8 + half] = to_float(from.a[i] >> half * 16);
        for (int i = 0; i < 2; i++)
            for (int half = 0; half < 2; half++)
                b[column + i * 8 + half][row] = to_float(from.b[i] >> half * 16);
    }
    multiply_tile<16>(all, a, b);
}

EMULATOR_NOT_INSTRUMENTED inline float bf16_bits_to_float(uint16_t bits) {
    return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
}
EMULATOR_NOT_INSTRUMENTED inline float fp16_bits_to_float(uint16_t bits) {
    return __half2float(__half(__half_raw{bits}));
}

EMULATOR_NOT_INSTRUMENTED inline void multiply_tf32(void* const* all, unsigned) {
    float a[16][8], b[8][8];
    const auto to_float = [](uint32_t bits) {
        return __uint_as_float(bits & ~0x1fffu);  // the hardware ignores the low 13 bits
    };
    for (int lane = 0; lane < 32; lane++) {
        const auto& from = *static_cast<MmaOperands*>(all[lane]);
        const int row = lane / 4, column = lane % 4;
        for (int i = 0; i < 4; i++) a[row + i % 2 * 8][column + i / 2 * 4] = to_float(from.a[i]);
        for (int i = 0; i < 2; i++) b[column + i * 4][row] = to_float(from.b[i]);
    }
    multiply_tile<8>(all, a, b);
}

}  // namespace emulated
#endif

DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] CALL_SITE) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulated::MmaOperands mine{d, a, b};
    ::emulator::collective("mma.bf16", ~0u, &mine,
                           emulated::multiply_16bit<emulated::bf16_bits_to_float>, site);
#endif
}

DEVICE void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] CALL_SITE) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulated::MmaOperands mine{d, a, b};
    ::emulator::collective("mma.fp16", ~0u, &mine,
                           emulated::multiply_16bit<emulated::fp16_bits_to_float>, site);
#endif
}

// Operands come from to_tf32.
DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] CALL_SITE) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulated::MmaOperands mine{d, a, b};
    ::emulator::collective("mma.tf32", ~0u, &mine, emulated::multiply_tf32, site);
#endif
}

}  // namespace hope
