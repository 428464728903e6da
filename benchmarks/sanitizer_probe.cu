// Whether compute-sanitizer works here: a kernel that stays in its memory or, with the argument
// "wrong", writes one number past the end. In namespace hope, as are the kernels that it is to
// watch.
#include <cstring>

namespace hope {

__global__ void probe(int* out, int past) { out[threadIdx.x + past] = 1; }

}  // namespace hope

int main(int count, char** words) {
    const int past = count > 1 && std::strcmp(words[1], "wrong") == 0;
    int* out = nullptr;
    if (cudaMalloc(&out, 32 * sizeof(int)) != cudaSuccess) return 2;
    hope::probe<<<1, 32>>>(out, past);
    return cudaDeviceSynchronize() == cudaSuccess ? 0 : 3;
}
