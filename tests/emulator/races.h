// What the engine tells ThreadSanitizer. Nothing, unless EMULATOR_RACES is defined.
#pragma once
#ifdef EMULATOR_RACES
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

#pragma GCC visibility push(hidden)
namespace emulator {

// A scope in which the emulator acts for the hardware: its accesses race with nothing.
struct Unchecked {
#ifdef EMULATOR_RACES
    Unchecked() {
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~Unchecked() {
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    }
#else
    Unchecked() {}  // user-provided, so that a scope is no unused variable
#endif
};

// Happens-before: all before release(x) is seen by all after a later acquire(x).
inline void release([[maybe_unused]] void* address) {
#ifdef EMULATOR_RACES
    __tsan_release(address);
#endif
}
inline void acquire([[maybe_unused]] void* address) {
#ifdef EMULATOR_RACES
    __tsan_acquire(address);
#endif
}

}  // namespace emulator
#pragma GCC visibility pop
