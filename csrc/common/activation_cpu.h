// The activations of memories of two layers, with their derivatives. Included by each_isa_cpu.h
// through a memory's kernel, once per instruction set.
//
// Both are z s(g(z)), s the sigmoid: g = z for silu, and for gelu's tanh approximation
// g = 2 c (z + a z^3), since (1 + tanh y) / 2 = s(2 y).

template <class T>
struct Activated {
    Vector<T> value, slope, curve;  // act(z), act'(z), act''(z)
};
template <class T>
HOPE_INLINE Activated<T> activate(Activation activation, Vector<T> z) {
    constexpr T kC = T(2 * 0.7978845608028654), kA = T(0.044715);  // 2 sqrt(2 / pi)
    const Vector<T> zero = {};
    Vector<T> g = z, g1 = zero + T(1), g2 = zero;
    if (activation == Activation::gelu) {
        const Vector<T> z2 = z * z;
        g = kC * z * (1 + kA * z2), g1 = kC * (1 + 3 * kA * z2), g2 = (6 * kC * kA) * z;
    }
    const Vector<T> s = sigmoid(g), s1 = s * (1 - s) * g1;  // s1: s's slope
    const Vector<T> s2 = s1 * (1 - 2 * s) * g1 + s * (1 - s) * g2;
    return {z * s, s + z * s1, 2 * s1 + z * s2};
}

// Of whole vectors, to `value`, which may be `z`, and `slope` if there is one.
template <class T>
void activate_all(Activation activation, int64_t count, const T* z, T* value, T* slope) {
    constexpr int kLanes = Simd<T>::kLanes;
    if (slope)
        for (int64_t i = 0; i < count; i += kLanes) {
            const Activated<T> a = activate<T>(activation, load(z + i));
            store(value + i, a.value), store(slope + i, a.slope);
        }
    else
        for (int64_t i = 0; i < count; i += kLanes)
            store(value + i, activate<T>(activation, load(z + i)).value);
}
