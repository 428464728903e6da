// Self-tests of common/primitives.cuh: one small kernel per instruction, checked against values
// that the host computes on its own. They show that the PTX does what its emulated twin says it
// does.
#pragma once
#include <string>
#include <utility>
#include <vector>

namespace hope {

// Runs every self-test on the current CUDA device (emulated builds: on the CPU) and waits for it.
// Returns each test's name with "" or the first difference found. Throws std::runtime_error if
// there is no device.
std::vector<std::pair<std::string, std::string>> run_selftests();

}  // namespace hope
