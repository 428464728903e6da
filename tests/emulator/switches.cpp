// Which mutant is on, and which have been met (switches.h).
#include "switches.h"

namespace mutant {

constexpr int kMost = 1 << 14;
int current = static_cast<int>(emulator::environment("EMULATOR_MUTANT", 0));
unsigned char met[kMost];
__thread bool left = false;

bool is_no_constant() { throw emulator::Error("a mutant in a constant"); }

}  // namespace mutant

// For Python.
#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void mutants_switch(int number) { mutant::current = number; }

// Copies the marks of mutants below `count`, and clears them.
EXPORTED void mutants_met(unsigned char* to, int count) {
    for (int i = 0; i < count && i < mutant::kMost; i++) to[i] = std::exchange(mutant::met[i], 0);
}
