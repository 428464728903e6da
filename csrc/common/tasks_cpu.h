// Runs tasks over threads, each thread with scratch memory of its own.
#pragma once
#include <cstring>
#include <memory>
#include <new>

#include "common/element.h"

namespace hope {

// tasks(begin, end, scratch) handles tasks [begin, end); scratch is aligned to a cache line and
// zero, so that padding never holds signalling garbage.
template <class Tasks>
void run_tasks(const ParallelFor& parallel_for, int64_t count, size_t scratch_bytes, Tasks tasks) {
    parallel_for(count, [&](int64_t begin, int64_t end) {
        constexpr std::align_val_t kCacheLine{64};
        const auto release = [](void* memory) { ::operator delete(memory, kCacheLine); };
        const std::unique_ptr<void, decltype(release)> scratch(
            ::operator new(scratch_bytes, kCacheLine), release);
        std::memset(scratch.get(), 0, scratch_bytes);
        tasks(begin, end, scratch.get());
    });
}

}  // namespace hope
