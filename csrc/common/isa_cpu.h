// Which of each_isa_cpu.h's instruction sets this machine runs.
#pragma once
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace hope {

enum class Isa { baseline, avx2, avx512 };

// HOPE_CPU_ISA=baseline|avx2 in the environment lowers it (for tests).
inline Isa machine_isa() {
    static const Isa isa = [] {
        Isa best = Isa::baseline;
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
        if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq"))
            best = Isa::avx512;
#endif
        const char* wish = std::getenv("HOPE_CPU_ISA");
        if (!wish) return best;
        const Isa wanted =
            !std::strcmp(wish, "baseline") ? Isa::baseline
            : !std::strcmp(wish, "avx2")   ? Isa::avx2
            : !std::strcmp(wish, "avx512")
                ? Isa::avx512
                : throw std::invalid_argument("HOPE_CPU_ISA: expected baseline, avx2 or avx512");
        if (wanted > best)
            throw std::invalid_argument(
                "HOPE_CPU_ISA: this machine does not have that instruction set");
        return wanted;
    }();
    return isa;
}

}  // namespace hope
