// Mutants that are switched at run time: `switches.py` writes these into a copy of the kernels, so
// that one compilation has thousands of them. One is on, that of mutants_switch or, from the start,
// of $EMULATOR_MUTANT. Without one, all of it does what the kernel does.
#pragma once
#include <utility>

#include "cuda_emulator.h"

#pragma GCC visibility push(hidden)
namespace mutant {

extern int current;
extern unsigned char met[];  // whether a mutant's place was reached, by number

bool is_no_constant();  // not constexpr: what a constant depends on cannot be switched

EMULATOR_NOT_INSTRUMENTED inline bool on_at_run_time(int n) {
#ifndef EMULATOR_RACES
    met[n] = 1;
#endif
    return n == current;
}

// Whether mutant n is on.
constexpr bool on(int n) {
    if (__builtin_is_constant_evaluated()) return n > 0 ? is_no_constant() : false;
    return n > 0 ? on_at_run_time(n) : false;
}

// An operator and what it becomes, in `a OP Name(n) OP b`, which has the precedence of `a OP b`.
template <class Name, class A>
struct Left {
    A&& a;
    int n;
};
#define MUTANT_OPERATOR(Name, OP, OTHER)                      \
    struct Name {                                             \
        int n;                                                \
        constexpr explicit Name(int number) : n(number) {}    \
    };                                                        \
    template <class A>                                        \
    constexpr Left<Name, A> operator OP(A&& a, Name name) {   \
        return {std::forward<A>(a), name.n};                  \
    }                                                         \
    template <class A, class B>                               \
    constexpr auto operator OP(Left<Name, A> left, B&& b) {   \
        return on(left.n) ? (left.a OTHER b) : (left.a OP b); \
    }
MUTANT_OPERATOR(Less, <, <=)
MUTANT_OPERATOR(LessEqual, <=, <)
MUTANT_OPERATOR(Greater, >, >=)
MUTANT_OPERATOR(GreaterEqual, >=, >)
MUTANT_OPERATOR(Equal, ==, !=)
MUTANT_OPERATOR(Unequal, !=, ==)
MUTANT_OPERATOR(Plus, +, -)
MUTANT_OPERATOR(Minus, -, +)

// The same for `a OP Name(n) OP b` where assignments group from the right.
template <class Name, class B>
struct Right {
    B&& b;
    int n;
};
#define MUTANT_ASSIGNMENT(Name, OP, OTHER)                       \
    struct Name {                                                \
        int n;                                                   \
        constexpr explicit Name(int number) : n(number) {}       \
    };                                                           \
    template <class B>                                           \
    constexpr Right<Name, B> operator OP(Name name, B&& b) {     \
        return {std::forward<B>(b), name.n};                     \
    }                                                            \
    template <class A, class B>                                  \
    constexpr A& operator OP(A& a, Right<Name, B> right) {       \
        return on(right.n) ? (a OTHER right.b) : (a OP right.b); \
    }
MUTANT_ASSIGNMENT(Increase, +=, -=)
MUTANT_ASSIGNMENT(Multiply, *=, +=)

// `a && b` and `a || b`, either as `a && both(n) || rest() && b`: b is evaluated where it was, and
// where the other operator would. What `both` or `either` knows of a, `rest` learns at once; no
// thread comes between, though for ThreadSanitizer all of a block's have the same `left`.
extern __thread bool left __attribute__((tls_model("initial-exec")));
EMULATOR_NOT_INSTRUMENTED inline bool leave(bool known) {
    left = known;
    return !known;
}
EMULATOR_NOT_INSTRUMENTED inline bool take() {
    const bool known = left;
    left = false;
    return known;
}
inline bool both(int n) { return leave(!on(n)); }
inline bool either(int n) { return leave(on(n)); }
inline bool rest_of_both(int n) { return take() || on(n); }
inline bool rest_of_either(int n) { return take() || !on(n); }

template <class T>
constexpr T min(int n, T a, T b) {
    return on(n) ? ::max(a, b) : ::min(a, b);
}
template <class T>
constexpr T max(int n, T a, T b) {
    return on(n) ? ::min(a, b) : ::max(a, b);
}

}  // namespace mutant
#pragma GCC visibility pop
