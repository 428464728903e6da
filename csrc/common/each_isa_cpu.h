// Compiles one kernel header several times, once per instruction set, so that a portable build uses
// what the machine has (the kernel header is named by HOPE_EACH_ISA; this file is included once per
// .cpp and has no include guard).
//
//     #define HOPE_EACH_ISA "titans/titans_cpu.h"
//     #include "common/each_isa_cpu.h"
//
// gives hope::avx512::f, hope::avx2::f and hope::baseline::f for every f of the header; isa_cpu.h
// says which of them this machine runs.
//
// Everything the kernel header calls must be defined in it, in tile_cpu.h, or be a compiler
// built-in: an inline function of the standard library instantiated here could be linked into code
// that runs on a lesser machine. No lambdas: not every compiler gives them the instruction set.
#include <cstddef>
#include <cstdint>

#include "common/element.h"

#define HOPE_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)

#define HOPE_ISA avx512
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")
#endif
namespace hope::HOPE_ISA {
constexpr int kVectorBytes = 64, kTileRows = 8, kTileVectors = 2;  // 16 of 32 registers accumulate
#include "common/tile_cpu.h"
#include HOPE_EACH_ISA
}  // namespace hope::HOPE_ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef HOPE_ISA

#define HOPE_ISA avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace hope::HOPE_ISA {
constexpr int kVectorBytes = 32, kTileRows = 4, kTileVectors = 2;  // 8 of 16 registers accumulate
#include "common/tile_cpu.h"
#include HOPE_EACH_ISA
}  // namespace hope::HOPE_ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef HOPE_ISA

#endif

#define HOPE_ISA baseline  // what every machine of the architecture has: SSE2, NEON
namespace hope::HOPE_ISA {
#if defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileRows = 8, kTileVectors = 2;
#else
constexpr int kVectorBytes = 16, kTileRows = 4, kTileVectors = 2;
#endif
#include "common/tile_cpu.h"
#include HOPE_EACH_ISA
}  // namespace hope::HOPE_ISA
#undef HOPE_ISA
