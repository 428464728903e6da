// A stack of its own and the switch to it, with AddressSanitizer and ThreadSanitizer kept informed.
#pragma once
#include <ucontext.h>

#include <cstddef>

#pragma GCC visibility push(hidden)
namespace emulator {

class Fiber {
 public:
    Fiber() = default;  // stands for the calling thread until start()
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // Makes a stack; the first switch to this fiber calls entry, which must not return.
    void start(void (*entry)());
    // The fiber of a plain thread: called in that thread before it switches away.
    void adopt_thread();
    // Continues `to`; returns when something switches back to `from`, the fiber that calls.
    static void switch_to(Fiber& from, Fiber& to);
    // Called first thing in entry. `thread` is the fiber that started the very first one.
    static void entered(Fiber& thread);

 private:
    void* stack_pointer_ = nullptr;
    char* stack_ = nullptr;
    size_t stack_bytes_ = 0;
    bool owns_stack_ = false;
    void* sanitizer_ = nullptr;  // AddressSanitizer's fake stack or ThreadSanitizer's fiber
    ucontext_t context_;         // used on other processors than x86-64 only
};

}  // namespace emulator
#pragma GCC visibility pop
