// Small dense matrices in a thread's cache: products, transposition, conversion. Included by
// each_isa_cpu.h inside the namespace of an instruction set (so: no include guard and no includes).
//
// A tile is row-major with a leading dimension that is a multiple of the vector length; columns
// past the matrix's own are padding, which may hold anything. Products run over the true depth, so
// padding never reaches a result.

template <int Bytes>
struct IntegerOf {
    using Type = int32_t;
};
template <>
struct IntegerOf<8> {
    using Type = int64_t;
};
template <class T>
struct Simd {
    typedef T Vector __attribute__((vector_size(kVectorBytes)));
    typedef typename IntegerOf<sizeof(T)>::Type Mask __attribute__((vector_size(kVectorBytes)));
    static constexpr int kLanes = kVectorBytes / sizeof(T);
};
template <class T>
using Vector = typename Simd<T>::Vector;

template <class T>
HOPE_INLINE Vector<T> load(const T* from) {
    Vector<T> vector;
    __builtin_memcpy(&vector, from, sizeof vector);
    return vector;
}
template <class T>
HOPE_INLINE void store(T* to, Vector<T> vector) {
    __builtin_memcpy(to, &vector, sizeof vector);
}
template <class T>
HOPE_INLINE T sum(Vector<T> vector) {
    T total = 0;
    for (int i = 0; i < Simd<T>::kLanes; i++) total += vector[i];
    return total;
}

HOPE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
HOPE_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
HOPE_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Hands out a thread's scratch memory; with a null base it only counts.
template <class T>
struct Carver {
    T* base;
    int64_t used = 0;
    T* take(int64_t count) {
        T* const piece = base ? base + used : nullptr;
        used += round_up(count, Simd<T>::kLanes);
        return piece;
    }
};

// ---- products ----
// The left operand: any two strides, so that a transposed matrix costs nothing.
template <class T>
struct Left {
    const T* data;
    int64_t row, depth;
};
template <class T>
HOPE_INLINE Left<T> plain(const T* data, int64_t stride) {
    return {data, stride, 1};
}
template <class T>
HOPE_INLINE Left<T> transposed(const T* data, int64_t stride) {
    return {data, 1, stride};
}

// A factor per row of the result, or one for all (stride 0).
template <class T>
struct Factor {
    const T* data;
    int64_t stride;
};

template <class T>
constexpr T kOne = 1;
template <class T>
constexpr T kMinusOne = -1;
template <class T>
HOPE_INLINE Factor<T> one() {
    return {&kOne<T>, 0};
}
template <class T>
HOPE_INLINE Factor<T> minus_one() {
    return {&kMinusOne<T>, 0};
}

// Which part of a product is computed: triangles are skipped by blocks of kTileRows rows.
enum class Part {
    all,
    lower_left,   // the left operand is lower triangular: depth <= row
    upper_left,   // the left operand is upper triangular: depth >= row
    lower_result  // only column <= row of the result is wanted; the rest is left as it was
};

template <int Rows, int Vectors, class T>
HOPE_INLINE void multiply_block(int64_t begin, int64_t end, Left<T> a, const T* b, int64_t ldb,
                                T* c, int64_t ldc, Factor<T> factor, bool accumulate) {
    constexpr int kLanes = Simd<T>::kLanes;
    Vector<T> total[Rows][Vectors] = {};
    for (int64_t k = begin; k < end; k++) {
        Vector<T> right[Vectors];
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; j++) right[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < Rows; i++) {
            const T left = a.data[i * a.row + k * a.depth];
#pragma GCC unroll 4
            for (int j = 0; j < Vectors; j++) total[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; j++) {
            T* const to = c + i * ldc + j * kLanes;
            const Vector<T> scaled = factor.data[i * factor.stride] * total[i][j];
            store(to, accumulate ? load(to) + scaled : scaled);
        }
}

template <int Rows, class T>
void multiply_rows(int64_t columns, int64_t begin, int64_t end, Left<T> a, const T* b, int64_t ldb,
                   T* c, int64_t ldc, Factor<T> factor, bool accumulate) {
    constexpr int kLanes = Simd<T>::kLanes, kStep = kTileVectors * kLanes;
    int64_t j = 0;
    for (; j + kStep <= columns; j += kStep)
        multiply_block<Rows, kTileVectors>(begin, end, a, b + j, ldb, c + j, ldc, factor,
                                           accumulate);
    for (; j < columns; j += kLanes)
        multiply_block<Rows, 1>(begin, end, a, b + j, ldb, c + j, ldc, factor, accumulate);
}

// c[rows x columns] = factor * (a b), or += with `accumulate`.
template <Part part = Part::all, class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, Left<T> a, const T* b, int64_t ldb,
              T* c, int64_t ldc, Factor<T> factor, bool accumulate) {
    constexpr int kLanes = Simd<T>::kLanes;
    columns = round_up(columns, kLanes);
    for (int64_t i = 0; i < rows;) {
        const int64_t left = rows - i, step = left >= kTileRows ? kTileRows
                                              : left >= 4       ? 4
                                              : left >= 2       ? 2
                                                                : 1;
        const int64_t begin = part == Part::upper_left ? i : 0;
        const int64_t end = part == Part::lower_left ? least(depth, i + step) : depth;
        const int64_t width =
            part == Part::lower_result ? least(columns, round_up(i + step, kLanes)) : columns;
        const Left<T> block{a.data + i * a.row, a.row, a.depth};
        const Factor<T> scale{factor.data + i * factor.stride, factor.stride};
        T* const to = c + i * ldc;
        if (step == kTileRows)
            multiply_rows<kTileRows>(width, begin, end, block, b, ldb, to, ldc, scale, accumulate);
        else if (step == 4)
            multiply_rows<4>(width, begin, end, block, b, ldb, to, ldc, scale, accumulate);
        else if (step == 2)
            multiply_rows<2>(width, begin, end, block, b, ldb, to, ldc, scale, accumulate);
        else
            multiply_rows<1>(width, begin, end, block, b, ldb, to, ldc, scale, accumulate);
        i += step;
    }
}

// The lane numbers that swap the off-diagonal size x size quarters of 2 size x 2 size blocks.
template <class T>
struct QuarterSwaps {
    static constexpr int kLanes = Simd<T>::kLanes;
    typename IntegerOf<sizeof(T)>::Type upper[kLanes][kLanes], lower[kLanes][kLanes];  // [size]
    constexpr QuarterSwaps() : upper(), lower() {
        for (int size = 1; size < kLanes; size *= 2)
            for (int j = 0; j < kLanes; j++) {
                upper[size][j] = j & size ? kLanes + j - size : j;
                lower[size][j] = j & size ? kLanes + j : j + size;
            }
    }
};
template <class T>
constexpr QuarterSwaps<T> kQuarterSwaps;

// One square block of kLanes rows, transposed in registers.
template <class T>
HOPE_INLINE void transpose_block(const T* from, int64_t ldfrom, T* to, int64_t ldto) {
    constexpr int kLanes = Simd<T>::kLanes;
#if __has_builtin(__builtin_shuffle)
    Vector<T> rows[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) rows[i] = load(from + i * ldfrom);
#pragma GCC unroll 4
    for (int size = 1; size < kLanes; size *= 2) {
        typename Simd<T>::Mask upper, lower;
        __builtin_memcpy(&upper, kQuarterSwaps<T>.upper[size], sizeof upper);
        __builtin_memcpy(&lower, kQuarterSwaps<T>.lower[size], sizeof lower);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++)
            if (!(i & size)) {
                const Vector<T> a = rows[i], b = rows[i + size];
                rows[i] = __builtin_shuffle(a, b, upper);
                rows[i + size] = __builtin_shuffle(a, b, lower);
            }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) store(to + i * ldto, rows[i]);
#else
    for (int j = 0; j < kLanes; j++)
        for (int i = 0; i < kLanes; i++) to[j * ldto + i] = from[i * ldfrom + j];
#endif
}

// to[columns x rows] = from[rows x columns]^T.
template <class T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t ldfrom, T* to, int64_t ldto) {
    constexpr int64_t kLanes = Simd<T>::kLanes;
    for (int64_t i0 = 0; i0 < rows; i0 += kLanes)
        for (int64_t j0 = 0; j0 < columns; j0 += kLanes) {
            if (i0 + kLanes <= rows && j0 + kLanes <= columns) {
                transpose_block(from + i0 * ldfrom + j0, ldfrom, to + j0 * ldto + i0, ldto);
                continue;
            }
            for (int64_t j = j0; j < least(columns, j0 + kLanes); j++)
                for (int64_t i = i0; i < least(rows, i0 + kLanes); i++)
                    to[j * ldto + i] = from[i * ldfrom + j];
        }
}

// ---- rows ----
// <a, b> over exactly n elements, a sum of sums: one running sum over whole states would round
// several times worse than torch's.
template <class T>
HOPE_INLINE T dot(int64_t n, const T* a, const T* b) {
    constexpr int kLanes = Simd<T>::kLanes, kVectors = 32;
    Vector<T> total = {};
    int64_t i = 0;
    while (i + kLanes <= n) {
        Vector<T> part = {};
        for (int vector = 0; vector < kVectors && i + kLanes <= n; vector++, i += kLanes)
            part += load(a + i) * load(b + i);
        total += part;
    }
    T result = sum<T>(total);
    for (; i < n; i++) result += a[i] * b[i];
    return result;
}

// ---- functions ----
// e^x to 2 ulp; 0 below -87 and infinity above 87, where it would soon be so anyway. NaN stays NaN.
HOPE_INLINE Vector<float> exponential(Vector<float> x) {
    typedef typename Simd<float>::Mask Mask;
    const Vector<float> limit = Vector<float>{} + 87.0f, zero = {};
    const Vector<float> infinity = zero + __builtin_inff(), given = x;
    x = x > limit ? limit : x < -limit ? -limit : x;
    // x = n ln2 + r; adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const Vector<float> shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const Vector<float> r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vector<float> p = r * 1.98756912e-4f + 1.39819994e-3f;
    p = p * r + 8.33345205e-3f;
    p = p * r + 4.16657962e-2f;
    p = p * r + 1.66666657e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    Mask bits;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;  // 2^n
    Vector<float> power;
    __builtin_memcpy(&power, &bits, sizeof power);
    return given > limit ? infinity : given < -limit ? zero : p * power;
}
HOPE_INLINE Vector<double> exponential(Vector<double> x) {
    for (int i = 0; i < Simd<double>::kLanes; i++) x[i] = __builtin_exp(x[i]);
    return x;
}
template <class V>
HOPE_INLINE V sigmoid(V x) {
    return 1 / (1 + exponential(-x));
}
template <class T>
HOPE_INLINE T square_root(T x) {
    if constexpr (sizeof(T) == 8)
        return __builtin_sqrt(x);
    else
        return __builtin_sqrtf(x);
}

// ---- conversion ----
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
HOPE_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}
HOPE_INLINE float float_of(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
template <class T>
HOPE_INLINE T widen(float x) {
    return x;
}
template <class T>
HOPE_INLINE T widen(double x) {
    return static_cast<T>(x);
}
template <class T>
HOPE_INLINE T widen(BFloat16 x) {
    return float_of(static_cast<uint32_t>(x.bits) << 16);
}
template <class T>
HOPE_INLINE T widen(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16,
                   magnitude = (x.bits & 0x7fffu) << 13;
    // Shifted into place the exponent is 112 too small; a product corrects it, for subnormal
    // numbers too.
    const float finite = float_of(magnitude) * 0x1p112f;
    return float_of(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits_of(finite)));
}
// All round to nearest, ties to even; NaN stays NaN.
template <class T>
HOPE_INLINE void narrow(T x, float& to) {
    to = static_cast<float>(x);
}
template <class T>
HOPE_INLINE void narrow(T x, double& to) {
    to = x;
}
template <class T>
HOPE_INLINE void narrow(T x, BFloat16& to) {
    const uint32_t bits = bits_of(static_cast<float>(x));
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
template <class T>
HOPE_INLINE void narrow(T x, Float16& to) {
    const uint32_t bits = bits_of(static_cast<float>(x)), sign = bits >> 16 & 0x8000u,
                   magnitude = bits & 0x7fffffffu;
    // Below 2^-14 the sum with 0.5 rounds to multiples of 2^-24, float16's smallest number.
    const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const uint32_t finite = magnitude < 0x38800000u    ? small
                            : magnitude >= 0x477ff000u ? 0x7c00u
                                                       : normal;
    to.bits = static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : finite));
}

// Tokens [first, first + rows) of one sequence and head to a tile; the padding up to the leading
// dimension becomes 0.
template <class E, class T>
void load_tokens_of(const TokenTensor& tensor, int64_t batch, int64_t first, int64_t head,
                    int64_t rows, int64_t columns, T* tile, int64_t ld) {
    const E* from = static_cast<const E*>(tensor.data) + batch * tensor.batch +
                    first * tensor.token + head * tensor.head;
    for (int64_t i = 0; i < rows; i++, from += tensor.token) {
        T* const to = tile + i * ld;
        for (int64_t j = 0; j < columns; j++) to[j] = widen<T>(from[j]);
        for (int64_t j = columns; j < ld; j++) to[j] = 0;
    }
}
template <class E, class T>
void store_tokens_of(const TokenTensor& tensor, int64_t batch, int64_t first, int64_t head,
                     int64_t rows, int64_t columns, const T* tile, int64_t ld) {
    E* to = static_cast<E*>(tensor.data) + batch * tensor.batch + first * tensor.token +
            head * tensor.head;
    for (int64_t i = 0; i < rows; i++, to += tensor.token)
        for (int64_t j = 0; j < columns; j++) narrow(tile[i * ld + j], to[j]);
}
template <class T, class... Rest>
void load_tokens(Element element, Rest... rest) {
    if constexpr (sizeof(T) == 8) return load_tokens_of<double, T>(rest...);
    if (element == Element::bfloat16) return load_tokens_of<BFloat16, T>(rest...);
    if (element == Element::float16) return load_tokens_of<Float16, T>(rest...);
    return load_tokens_of<float, T>(rest...);
}
template <class T, class... Rest>
void store_tokens(Element element, Rest... rest) {
    if constexpr (sizeof(T) == 8) return store_tokens_of<double, T>(rest...);
    if (element == Element::bfloat16) return store_tokens_of<BFloat16, T>(rest...);
    if (element == Element::float16) return store_tokens_of<Float16, T>(rest...);
    return store_tokens_of<float, T>(rest...);
}
// A contiguous matrix to a tile and back.
template <class T>
void load_matrix(const T* from, int64_t rows, int64_t columns, T* tile, int64_t ld) {
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < columns; j++) tile[i * ld + j] = from[i * columns + j];
        for (int64_t j = columns; j < ld; j++) tile[i * ld + j] = 0;
    }
}
template <class T>
void store_matrix(T* to, int64_t rows, int64_t columns, const T* tile, int64_t ld) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) to[i * columns + j] = tile[i * ld + j];
}
