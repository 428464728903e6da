// Prints the result of every primitive's self-test; the exit status is the number of failures.
#include <cstdio>

#include "selftest/selftest.h"

// For programs that load this file and the emulator as a shared object.
extern "C" int print_selftests() {
    int failures = 0;
    for (const auto& [name, problem] : hope::run_selftests()) {
        std::printf("%s: %s\n", name.c_str(), problem.empty() ? "ok" : problem.c_str());
        failures += !problem.empty();
    }
    std::fflush(stdout);
    return failures;
}

int main() { return print_selftests(); }
