// The activations of memories of two layers, with the derivatives that learning needs.
#pragma once
#include "common/launch.cuh"
#include "common/memory.h"

namespace hope {

struct Activated {
    float value, slope, curve;  // act, act', act''
};

// z s(g(z)) with the sigmoid s: docs/derivations.md.
DEVICE Activated activate(Activation activation, float z) {
    float g = z, slope = 1, curve = 0;
    if (activation == Activation::gelu) {
        constexpr float kScale = 1.5957691216057308f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
        g = kScale * (z + kCubic * z * z * z);
        slope = kScale * (1 + 3 * kCubic * z * z);
        curve = kScale * 6 * kCubic * z;
    }
    // Of the exponential that cannot overflow; no difference, so that nothing cancels in s (1 - s).
    const float e = expf(-fabsf(g)), larger = 1 / (1 + e), smaller = e * larger;
    const float s = g < 0 ? smaller : larger, spread = larger * smaller;
    const float s1 = spread * slope;
    return {z * s, s + z * s1, 2 * s1 + z * (s1 * (1 - 2 * s) * slope + spread * curve)};
}

}  // namespace hope
