// Inputs are chosen so that the right result is exact (small integers in products), or are rounded
// by arithmetic of this file's own: every comparison is for equality.
#include "selftest/selftest.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "common/primitives.cuh"

namespace hope {
namespace {

// ---- host side ---------------------------------------------------------------------------------

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("self-tests: ") + what + ": " + cudaGetErrorString(error));
}

template <class T>
class DeviceArray {
 public:
    explicit DeviceArray(size_t count) : count_(count) {
        check(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)), "cudaMalloc");
    }
    explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
        check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice),
              "copy to the device");
    }
    ~DeviceArray() { cudaFree(data_); }
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;

    T* data() const { return data_; }
    std::vector<T> host() const {  // waits for the kernels before it
        std::vector<T> values(count_);
        check(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost),
              "copy to the host");
        return values;
    }

 private:
    size_t count_;
    T* data_ = nullptr;
};

template <class T>
std::string first_difference(const std::vector<T>& actual, const std::vector<T>& expected) {
    for (size_t i = 0; i < expected.size(); i++)
        if (actual[i] != expected[i])
            return "element " + std::to_string(i) + ": expected " + std::to_string(expected[i]) +
                   ", got " + std::to_string(actual[i]);
    return "";
}

// Integers of [-8, 8] that follow no pattern a wrong layout could share.
float small_integer(int i) { return static_cast<float>((i * i * 7 + i * 13 + 5) % 101 % 17 - 8); }

// ---- warp exchange -----------------------------------------------------------------------------

constexpr int kExchanges = 8;

__global__ void exchange_kernel(unsigned* out) {  // [64][kExchanges]
    const unsigned lane = threadIdx.x % 32, half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    unsigned sum = threadIdx.x;
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    out += threadIdx.x * kExchanges;
    out[0] = sum;
    out[1] = __shfl_down_sync(~0u, lane, 1, 8);
    out[2] = __shfl_up_sync(~0u, lane, 2);
    out[3] = __shfl_sync(~0u, lane, 3);
    out[4] = __ballot_sync(~0u, lane % 3 == 0);
    out[5] = 0;
    if (lane < 16)
        out[5] = __shfl_sync(half, lane, 5);
    else
        out[5] = __shfl_sync(half, lane, 21);
    out[6] = __any_sync(~0u, lane == 5) + 2 * __all_sync(~0u, lane == 5);
    __syncwarp();
    out[7] = __ldg(out);
}

std::string test_exchange() {
    DeviceArray<unsigned> out(64 * kExchanges);
    launch(exchange_kernel, 1, 64, 0, nullptr, out.data());
    std::vector<unsigned> expected;
    for (unsigned thread = 0; thread < 64; thread++) {
        const unsigned lane = thread % 32, sum = thread < 32 ? 496 : 1520;
        unsigned votes = 0;
        for (unsigned i = 0; i < 32; i += 3) votes |= 1u << i;
        const unsigned row[kExchanges] = {sum,
                                          lane % 8 == 7 ? lane : lane + 1,
                                          lane < 2 ? lane : lane - 2,
                                          3,
                                          votes,
                                          lane < 16 ? 5u : 21u,
                                          1,
                                          sum};
        expected.insert(expected.end(), row, row + kExchanges);
    }
    return first_difference(out.host(), expected);
}

// ---- barriers ----------------------------------------------------------------------------------

constexpr int kRounds = 5;

// One warp hands numbers to another through a ring of two slots; both named barriers of a slot are
// used in turn: filled (1 and 2), read (3 and 4).
__global__ void named_barrier_kernel(int* out) {  // [kRounds][32]
    SHARED_ARRAY(int, ring, 64);
    const int lane = threadIdx.x % 32;
    for (int round = 0; round < kRounds; round++) {
        const int slot = round % 2;
        if (threadIdx.x < 32) {
            if (round >= 2) named_barrier_sync(3 + slot, 64);
            ring[slot * 32 + lane] = round * 100 + lane;
            named_barrier_arrive(1 + slot, 64);
        } else {
            named_barrier_sync(1 + slot, 64);
            out[round * 32 + lane] = ring[slot * 32 + 31 - lane];
            if (round + 2 < kRounds) named_barrier_arrive(3 + slot, 64);
        }
    }
}

std::string test_named_barriers() {
    DeviceArray<int> out(kRounds * 32);
    launch(named_barrier_kernel, 1, 64, 0, nullptr, out.data());
    std::vector<int> expected;
    for (int round = 0; round < kRounds; round++)
        for (int lane = 0; lane < 32; lane++) expected.push_back(round * 100 + 31 - lane);
    return first_difference(out.host(), expected);
}

// ---- asynchronous copies -----------------------------------------------------------------------

constexpr int kCopies = 17;  // the i-th has i valid bytes

struct CopyShared {
    uint8_t *first, *second;
    size_t bytes;
    __host__ __device__ explicit CopyShared(SharedCarver carver)
        : first(carver.take<uint8_t>(kCopies * 16)),
          second(carver.take<uint8_t>(kCopies * 16)),
          bytes(carver.used()) {}
};

// Two groups: `first` is read while `second` may still be under way.
__global__ void copy_kernel(const uint8_t* in,
                            uint8_t* out) {  // in [2 * 16 * kCopies], out the same
    const CopyShared shared{SharedCarver(dynamic_shared())};
    const int i = threadIdx.x;
    if (i < kCopies) cp_async_16(shared.first + i * 16, in + i * 16, i);
    cp_async_commit();
    if (i < kCopies) cp_async_16(shared.second + i * 16, in + (kCopies + i) * 16);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    for (int j = i; j < kCopies * 16; j += 32) out[j] = shared.first[j];
    cp_async_wait<0>();
    __syncthreads();
    for (int j = i; j < kCopies * 16; j += 32) out[kCopies * 16 + j] = shared.second[j];
}

std::string test_copies() {
    std::vector<uint8_t> in(2 * kCopies * 16), expected;
    for (size_t i = 0; i < in.size(); i++) in[i] = static_cast<uint8_t>(i % 251 + 1);
    for (int i = 0; i < 2 * kCopies * 16; i++)
        expected.push_back(i % 16 < i / 16 || i / 16 >= kCopies ? in[i] : 0);
    const DeviceArray<uint8_t> from(in), out(in.size());
    launch(copy_kernel, 1, 32, CopyShared(SharedCarver(nullptr)).bytes, nullptr, from.data(),
           out.data());
    return first_difference(out.host(), expected);
}

// ---- matrix fragments --------------------------------------------------------------------------

constexpr int kRowStride = 24;  // elements of a matrix row in shared memory, 8 of them used

template <int Count, bool Transposed>
__global__ void ldmatrix_kernel(uint32_t* out) {  // [Count][32]
    SHARED_ARRAY(uint16_t, matrices, 32 * kRowStride);
    const int lane = threadIdx.x;
    for (int j = 0; j < 8; j++)
        matrices[lane * kRowStride + j] = static_cast<uint16_t>(lane * 8 + j);
    __syncwarp();
    uint32_t r[Count];
    ldmatrix<Count, Transposed>(r, matrices + lane * kRowStride);
    for (int m = 0; m < Count; m++) out[m * 32 + lane] = r[m];
}

// The register of `lane` for the 8x8 matrix whose element (i, j) is first + 8 i + j.
uint32_t fragment(int lane, uint32_t first, bool transposed) {
    const uint32_t i = lane / 4, j = lane % 4 * 2;
    return transposed ? (first + j * 8 + i) | (first + (j + 1) * 8 + i) << 16
                      : (first + i * 8 + j) | (first + i * 8 + j + 1) << 16;
}

template <int Count, bool Transposed>
std::string test_ldmatrix() {
    DeviceArray<uint32_t> out(Count * 32);
    launch(ldmatrix_kernel<Count, Transposed>, 1, 32, 0, nullptr, out.data());
    std::vector<uint32_t> expected;
    for (int m = 0; m < Count; m++)
        for (int lane = 0; lane < 32; lane++)
            expected.push_back(fragment(lane, m * 64, Transposed));
    return first_difference(out.host(), expected);
}

__global__ void transpose_kernel(const uint32_t* in, uint32_t* out) {  // [32]
    out[threadIdx.x] = transpose_8x8(in[threadIdx.x]);
}

std::string test_transpose() {
    std::vector<uint32_t> in, expected;
    for (int lane = 0; lane < 32; lane++) {
        in.push_back(fragment(lane, 1000, false));
        expected.push_back(fragment(lane, 1000, true));
    }
    const DeviceArray<uint32_t> from(in), out(32);
    launch(transpose_kernel, 1, 32, 0, nullptr, from.data(), out.data());
    return first_difference(out.host(), expected);
}

// ---- conversions -------------------------------------------------------------------------------

__global__ void convert_kernel(const float* in, uint32_t* out, int count) {  // out [3][count]
    const int i = threadIdx.x;
    if (i >= count) return;
    out[i] = pack_bf16(in[i], -in[i]);
    out[count + i] = pack_fp16(in[i], -in[i]);
    out[2 * count + i] =
        to_tf32(in[i]) & ~0x1fffu;  // mma ignores the low 13 bits, PTX leaves them open
}

// x rounded to `mantissa_bits`, subnormal below 2^min_exponent.
double round_to(double x, int mantissa_bits, int min_exponent, bool ties_to_even) {
    if (x == 0 || std::isinf(x)) return x;
    const int exponent = std::max(std::ilogb(x), min_exponent);
    const double unit = std::ldexp(1.0, exponent - mantissa_bits);
    return (ties_to_even ? std::nearbyint(x / unit) : std::round(x / unit)) * unit;
}

// The bits of x in a format of 16 bits that holds it exactly.
uint32_t encode(double x, int mantissa_bits, int min_exponent) {
    const uint32_t sign = std::signbit(x) ? 0x8000u : 0u;
    if (x == 0) return sign;
    if (std::isinf(x)) return sign | (0x7fffu >> mantissa_bits << mantissa_bits);
    const int exponent = std::max(std::ilogb(x), min_exponent);
    const auto scaled = static_cast<uint32_t>(std::ldexp(std::abs(x), mantissa_bits - exponent));
    return sign | (((exponent - min_exponent) << mantissa_bits) + scaled);
}

std::string test_conversions() {
    const float infinity = HUGE_VALF;
    std::vector<float> in = {0.0f,           1.0f,           0.5f,       1.00390625f, 1.01171875f,
                             1.00048828125f, 1.00146484375f, 0x1.001p0f, 0x1.003p0f,  0x1.000ffep0f,
                             3.14159274f,    65504.0f,       0x1p-24f,   0x1.8p-24f,  0x1p-25f,
                             0x1.2p-20f,     infinity};
    for (int i = 1; i <= 32; i++) in.push_back(std::sin(static_cast<float>(i)) * 100.0f);
    const int count = static_cast<int>(in.size());
    const DeviceArray<float> from(in);
    const DeviceArray<uint32_t> out(3 * in.size());
    launch(convert_kernel, 1, 64, 0, nullptr, from.data(), out.data(), count);
    std::vector<uint32_t> expected(3 * in.size());
    for (int i = 0; i < count; i++) {
        const uint32_t bf16_bits = encode(round_to(in[i], 7, -126, true), 7, -126);
        const uint32_t fp16_bits = encode(round_to(in[i], 10, -14, true), 10, -14);
        const float tf32 = static_cast<float>(round_to(in[i], 10, -126, false));
        expected[i] = bf16_bits | (bf16_bits ^ 0x8000u) << 16;
        expected[count + i] = fp16_bits | (fp16_bits ^ 0x8000u) << 16;
        memcpy(&expected[2 * count + i], &tf32, sizeof tf32);
    }
    return first_difference(out.host(), expected);
}

// ---- tensor-core products ----------------------------------------------------------------------

enum class Product { bf16, fp16, tf32 };

template <Product product>
constexpr int kDepth = product == Product::tf32 ? 8 : 16;

// d[16x8] = c + a[16xK] b[Kx8]
template <Product product>
__global__ void mma_kernel(const float* a, const float* b, const float* c, float* d) {
    constexpr int K = kDepth<product>;
    const int row = threadIdx.x / 4, pair = threadIdx.x % 4;
    uint32_t fragment_a[4], fragment_b[2];
    float sum[4];
    for (int i = 0; i < 4; i++) sum[i] = c[(row + i / 2 * 8) * 8 + pair * 2 + i % 2];
    if constexpr (product == Product::tf32) {
        for (int i = 0; i < 4; i++)
            fragment_a[i] = to_tf32(a[(row + i % 2 * 8) * K + pair + i / 2 * 4]);
        for (int i = 0; i < 2; i++) fragment_b[i] = to_tf32(b[(pair + i * 4) * 8 + row]);
        mma_tf32(sum, fragment_a, fragment_b);
    } else {
        const auto pack = [](float low, float high) {
            return product == Product::bf16 ? pack_bf16(low, high) : pack_fp16(low, high);
        };
        for (int i = 0; i < 4; i++) {
            const float* from = a + (row + i % 2 * 8) * K + pair * 2 + i / 2 * 8;
            fragment_a[i] = pack(from[0], from[1]);
        }
        for (int i = 0; i < 2; i++) {
            const float* from = b + (pair * 2 + i * 8) * 8 + row;
            fragment_b[i] = pack(from[0], from[8]);
        }
        if constexpr (product == Product::bf16)
            mma_bf16(sum, fragment_a, fragment_b);
        else
            mma_fp16(sum, fragment_a, fragment_b);
    }
    for (int i = 0; i < 4; i++) d[(row + i / 2 * 8) * 8 + pair * 2 + i % 2] = sum[i];
}

template <Product product>
std::string test_mma() {
    constexpr int K = kDepth<product>;
    std::vector<float> a(16 * K), b(K * 8), c(16 * 8), expected(16 * 8);
    for (size_t i = 0; i < a.size(); i++) a[i] = small_integer(static_cast<int>(i));
    for (size_t i = 0; i < b.size(); i++) b[i] = small_integer(static_cast<int>(i) + 1000);
    for (size_t i = 0; i < c.size(); i++) c[i] = small_integer(static_cast<int>(i) + 2000);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) {
            double sum = c[i * 8 + j];
            for (int k = 0; k < K; k++) sum += double(a[i * K + k]) * double(b[k * 8 + j]);
            expected[i * 8 + j] = static_cast<float>(sum);
        }
    const DeviceArray<float> device_a(a), device_b(b), device_c(c), d(expected.size());
    launch(mma_kernel<product>, 1, 32, 0, nullptr, device_a.data(), device_b.data(),
           device_c.data(), d.data());
    return first_difference(d.host(), expected);
}

struct SelfTest {
    const char* name;
    std::string (*run)();
};

constexpr SelfTest kSelfTests[] = {
    {"warp exchange", test_exchange},
    {"named barriers", test_named_barriers},
    {"cp.async", test_copies},
    {"ldmatrix x1", test_ldmatrix<1, false>},
    {"ldmatrix x1 transposed", test_ldmatrix<1, true>},
    {"ldmatrix x2", test_ldmatrix<2, false>},
    {"ldmatrix x2 transposed", test_ldmatrix<2, true>},
    {"ldmatrix x4", test_ldmatrix<4, false>},
    {"ldmatrix x4 transposed", test_ldmatrix<4, true>},
    {"movmatrix", test_transpose},
    {"conversions", test_conversions},
    {"mma bf16", test_mma<Product::bf16>},
    {"mma fp16", test_mma<Product::fp16>},
    {"mma tf32", test_mma<Product::tf32>},
};

}  // namespace

std::vector<std::pair<std::string, std::string>> run_selftests() {
    int devices = 0;
    check(cudaGetDeviceCount(&devices), "looking for a CUDA device");
    std::vector<std::pair<std::string, std::string>> results;
    for (const SelfTest& test : kSelfTests) {
        try {
            results.emplace_back(test.name, test.run());
        } catch (const std::exception& error) {
            results.emplace_back(test.name, error.what());
        }
    }
    return results;
}

}  // namespace hope
