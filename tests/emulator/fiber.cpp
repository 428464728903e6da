#include "fiber.h"

#include <sys/mman.h>

#include <new>
#ifdef EMULATOR_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMULATOR_RACES
#include <sanitizer/tsan_interface.h>
#endif

#ifndef EMULATOR_UCONTEXT
// ucontext makes two system calls a switch, which is 50 times slower. Saves what a function call
// must preserve on x86-64; the floating-point control words are the same in all fibers of a thread.
extern "C" void emulator_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");
#endif

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 4 << 10;

}  // namespace

void Fiber::start(void (*entry)()) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(memory);
    stack_bytes_ = kStackBytes;
    owns_stack_ = true;
    if (mprotect(stack_, kGuardBytes, PROT_NONE)) throw std::bad_alloc();
#ifdef EMULATOR_RACES
    sanitizer_ = __tsan_create_fiber(0);
#endif
#ifdef EMULATOR_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes;
    makecontext(&context_, entry, 0);
#else
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes);
    *--top = nullptr;                         // the return address that entry must not use
    *--top = reinterpret_cast<void*>(entry);  // where emulator_switch returns to
    stack_pointer_ = top - 6;                 // the registers that it pops
#endif
}

Fiber::~Fiber() {
    if (!owns_stack_) return;
#ifdef EMULATOR_ADDRESS
    __asan_unpoison_memory_region(stack_, kStackBytes);  // whoever gets these pages next
#endif
    munmap(stack_, kStackBytes);
#ifdef EMULATOR_RACES
    if (sanitizer_) __tsan_destroy_fiber(sanitizer_);
#endif
}

void Fiber::adopt_thread() {
#ifdef EMULATOR_RACES
    sanitizer_ = __tsan_get_current_fiber();
#endif
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
#ifdef EMULATOR_ADDRESS
    __sanitizer_start_switch_fiber(&from.sanitizer_, to.stack_, to.stack_bytes_);
#endif
#ifdef EMULATOR_RACES
    __tsan_switch_to_fiber(to.sanitizer_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMULATOR_UCONTEXT
    swapcontext(&from.context_, &to.context_);
#else
    emulator_switch(&from.stack_pointer_, to.stack_pointer_);
#endif
#ifdef EMULATOR_ADDRESS
    __sanitizer_finish_switch_fiber(from.sanitizer_, nullptr, nullptr);
#endif
}

void Fiber::entered([[maybe_unused]] Fiber& thread) {
#ifdef EMULATOR_ADDRESS
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (!thread.stack_) {
        thread.stack_ = static_cast<char*>(const_cast<void*>(bottom));
        thread.stack_bytes_ = bytes;
    }
#endif
}

}  // namespace emulator
