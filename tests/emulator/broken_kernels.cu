// Kernels with one mistake each, to see the emulator find it. usage: broken_kernels NAME
// broken|intact `intact` runs the same kernel without the mistake. The exit status is 0 if out[i]
// == 1 for all i and nothing was reported. "// <- NAME" marks the line that a report of that
// mistake has to name.
#include <cstdio>
#include <string>
#include <vector>

#include "common/primitives.cuh"

using namespace hope;

namespace {

constexpr int kThreads = 64, kBlocks = 2;

struct Pair {  // two arrays of a float per thread, side by side in shared memory
    float *a, *b;
    size_t bytes;
    __host__ __device__ explicit Pair(SharedCarver carver)
        : a(carver.take<float>(kThreads)), b(carver.take<float>(kThreads)), bytes(carver.used()) {}
};

__global__ void missing_barrier(bool broken, const float*, float* out) {
    const Pair shared{SharedCarver(dynamic_shared())};
    const int i = threadIdx.x;
    shared.a[i] = 1.0f;
    if (!broken) __syncthreads();
    out[blockIdx.x * kThreads + i] = shared.a[kThreads - 1 - i];  // <- missing_barrier
}

__global__ void missing_syncwarp(bool broken, const float*, float* out) {
    const Pair shared{SharedCarver(dynamic_shared())};
    const int i = threadIdx.x;
    shared.a[i] = 1.0f;
    if (broken)
        __shfl_sync(~0u, i, 0);  // the lanes meet here, but it orders no memory
    else
        __syncwarp();
    out[blockIdx.x * kThreads + i] = shared.a[i ^ 1];  // <- missing_syncwarp
}

__global__ void missing_copy_wait(bool broken, const float* in, float* out) {
    const Pair shared{SharedCarver(dynamic_shared())};
    const int i = threadIdx.x;
    if (i < kThreads / 4) cp_async_16(shared.a + i * 4, in + i * 4);  // <- missing_copy_wait
    cp_async_commit();
    if (!broken) cp_async_wait<0>();
    __syncthreads();
    out[blockIdx.x * kThreads + i] = shared.a[i];
}

__global__ void late_copy_wait(bool broken, const float* in, float* out) {
    const Pair shared{SharedCarver(dynamic_shared())};
    const int i = threadIdx.x;
    if (i < kThreads / 4) cp_async_16(shared.a + i * 4, in + i * 4);
    cp_async_commit();
    if (!broken) cp_async_wait<0>();
    __syncthreads();
    out[blockIdx.x * kThreads + i] = shared.a[i];  // <- late_copy_wait
    cp_async_wait<0>();
}

__global__ void divergent_barrier(bool broken, const float*, float* out) {
    if (broken && threadIdx.x >= 32)
        __syncthreads();  // <- divergent_barrier
    else
        __syncthreads();
    out[blockIdx.x * kThreads + threadIdx.x] = 1.0f;
}

__global__ void early_return(bool broken, const float*, float* out) {
    out[blockIdx.x * kThreads + threadIdx.x] = 1.0f;
    if (broken && threadIdx.x == 40) return;
    __syncthreads();  // <- early_return
}

__global__ void divergent_warp(bool broken, const float*, float* out) {
    float one = 1.0f;
    if (!broken || threadIdx.x % 32 < 16) one = __shfl_xor_sync(~0u, one, 1);  // <- divergent_warp
    out[blockIdx.x * kThreads + threadIdx.x] = one;
}

__global__ void shared_overrun(bool broken, const float*, float* out) {
    const Pair shared{SharedCarver(dynamic_shared())};
    const int i = threadIdx.x;
    shared.b[broken ? i + 1 : i] = 1.0f;  // <- shared_overrun
    out[blockIdx.x * kThreads + i] = 1.0f;
}

__global__ void static_shared_overrun(bool broken, const float*, float* out) {
    SHARED_ARRAY(float, array, kThreads);
    const int i = threadIdx.x;
    array[broken ? i + 1 : i] = 1.0f;  // <- static_shared_overrun
    out[blockIdx.x * kThreads + i] = 1.0f;
}

__global__ void between_arrays(bool broken, const float*, float* out) {
    const Pair shared{SharedCarver(dynamic_shared())};
    const int i = threadIdx.x;
    shared.a[i] = shared.b[i] = 1.0f;
    __syncthreads();
    out[blockIdx.x * kThreads + i] = shared.a[broken ? kThreads + i % 16 : i];  // <- between_arrays
}

__global__ void global_overrun(bool broken, const float*, float* out) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    out[broken ? i + 1 : i] = 1.0f;  // <- global_overrun
    if (broken && i == 0) out[0] = 1.0f;
}

__global__ void misaligned(bool broken, const float* in, float* out) {
    const auto* four = reinterpret_cast<const float4*>(broken ? in + 1 : in);
    out[blockIdx.x * kThreads + threadIdx.x] = four->x;  // <- misaligned
}

__global__ void misaligned_copy(bool broken, const float* in, float* out) {
    const Pair shared{SharedCarver(dynamic_shared())};
    const int i = threadIdx.x;
    if (i < 8) cp_async_16(shared.a + i * 4, broken ? in + i : in + i * 4);  // <- misaligned_copy
    cp_async_commit();
    cp_async_wait<0>();
    out[blockIdx.x * kThreads + i] = 1.0f;
}

__global__ void assumed_shared(bool broken, const float* in, float* out) {
    const Pair shared{SharedCarver(dynamic_shared())};
    assume_shared(broken ? in : shared.a + threadIdx.x);  // <- assumed_shared
    out[blockIdx.x * kThreads + threadIdx.x] = 1.0f;
}

__global__ void uninitialised_register(bool broken, const float* in, float* out) {
    float x;
    if (!broken || threadIdx.x > 7) x = in[threadIdx.x];
    out[blockIdx.x * kThreads + threadIdx.x] = x;  // <- uninitialised_register
}

__global__ void uninitialised_shared(bool broken, const float*, float* out) {
    const Pair shared{SharedCarver(dynamic_shared())};
    const int i = threadIdx.x;
    if (!broken || i > 7) shared.a[i] = 1.0f;
    out[blockIdx.x * kThreads + i] = shared.a[i];
}

__global__ void blocks_collide(bool broken, const float*, float* out) {
    const int i = threadIdx.x;
    out[blockIdx.x * kThreads + i] = 1.0f;
    if (broken || blockIdx.x == 0) out[i] = 1.0f;  // <- blocks_collide
}

__global__ void write_ones(bool, const float*, float* out) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i < kBlocks * kThreads) out[i] = 1.0f;
}

__global__ void nested_launch(bool broken, const float* in, float* out) {
    out[blockIdx.x * kThreads + threadIdx.x] = 1.0f;
    if (broken) launch(write_ones, kBlocks, kThreads, 0, nullptr, broken, in, out);
}

struct Shape {  // of a launch
    unsigned blocks = kBlocks, threads = kThreads;
    size_t shared_bytes = Pair(SharedCarver(nullptr)).bytes;
};

struct Case {
    const char* name;
    void (*kernel)(bool, const float*, float*);
    Shape broken_shape = {};
};

const Case kCases[] = {
    {"missing_barrier", missing_barrier},
    {"missing_syncwarp", missing_syncwarp},
    {"missing_copy_wait", missing_copy_wait},
    {"late_copy_wait", late_copy_wait},
    {"divergent_barrier", divergent_barrier},
    {"early_return", early_return},
    {"divergent_warp", divergent_warp},
    {"shared_overrun", shared_overrun},
    {"static_shared_overrun", static_shared_overrun},
    {"between_arrays", between_arrays},
    {"global_overrun", global_overrun},
    {"misaligned", misaligned},
    {"misaligned_copy", misaligned_copy},
    {"assumed_shared", assumed_shared},
    {"uninitialised_register", uninitialised_register},
    {"uninitialised_shared", uninitialised_shared},
    {"blocks_collide", blocks_collide},
    {"nested_launch", nested_launch},
    {"empty_grid", write_ones, {0, kThreads, 0}},
    {"oversized_block", write_ones, {kBlocks, 1056, 0}},
    {"oversized_shared", write_ones, {kBlocks, kThreads, 256 << 10}},
};

int run(const Case& test, bool broken) {
    constexpr int kCount = kBlocks * kThreads;
    const Shape shape = broken ? test.broken_shape : Shape{};
    void *in, *out;
    cudaMalloc(&in, kCount * sizeof(float));
    cudaMalloc(&out, kCount * sizeof(float));
    const std::vector<float> ones(kCount, 1.0f);
    cudaMemcpy(in, ones.data(), kCount * sizeof(float), cudaMemcpyHostToDevice);
    launch(test.kernel, shape.blocks, shape.threads, shape.shared_bytes, nullptr, broken,
           static_cast<const float*>(in), static_cast<float*>(out));
    std::vector<float> result(kCount);
    cudaMemcpy(result.data(), out, kCount * sizeof(float), cudaMemcpyDeviceToHost);
    cudaFree(in);
    cudaFree(out);
    for (int i = 0; i < kCount; i++)
        if (result[i] != 1.0f) {
            uint32_t bits;
            memcpy(&bits, &result[i], sizeof bits);
            std::printf("wrong result: element %d is %g (0x%08x)\n", i, result[i], bits);
            return 1;
        }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string name = argc == 3 ? argv[1] : "", mode = argc == 3 ? argv[2] : "";
    for (const Case& test : kCases)
        if (name == test.name && (mode == "broken" || mode == "intact")) {
            try {
                return run(test, mode == "broken");
            } catch (const std::exception& error) {
                std::printf("error: %s\n", error.what());
                return 1;
            }
        }
    std::fprintf(stderr, "usage: broken_kernels NAME broken|intact\n");
    return 2;
}
