// The few functions of the CUDA runtime that host code beside the kernels calls, on host memory.
// Fresh "device" memory is poisoned with NaN and, under AddressSanitizer, checked to the byte.
#include <cstdlib>
#include <cstring>

#include "cuda_emulator.h"

#pragma GCC visibility push(hidden)
extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

// The device is small, so that small inputs fill it, and are divided as large ones on a real one.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin)
        *value = static_cast<int>(emulator::shared_limit());
    else if (attribute == cudaDevAttrMultiProcessorCount)
        *value = static_cast<int>(emulator::environment("EMULATOR_MULTIPROCESSORS", 4));
    else if (attribute == cudaDevAttrL2CacheSize)
        *value = static_cast<int>(emulator::environment("EMULATOR_L2_BYTES", 256 << 10));
    else
        return cudaErrorInvalidValue;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    constexpr size_t kAlignment = 256;
    if (posix_memalign(pointer, kAlignment, bytes)) return cudaErrorMemoryAllocation;
    emulator::poison(*pointer, bytes);
    return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
    std::free(pointer);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess                 ? "no error"
           : error == cudaErrorMemoryAllocation ? "out of memory"
                                                : "not emulated";
}

}  // extern "C"
#pragma GCC visibility pop
