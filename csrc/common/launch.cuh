// Where a kernel runs: the words a kernel source uses for "device function", "shared array" and
// "launch", once for nvcc and once for a plain C++ compiler, which then runs the kernel on the CPU
// (tests/emulator). Instructions are in primitives.cuh, the rules for kernel sources there too.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef __CUDACC__
#include <cxxabi.h>

#include <cstdlib>
#include <memory>

#define DEVICE __device__ __forceinline__
// A device function that is called: what it needs takes no registers from its caller's other parts.
// Of a class it is `const __restrict__`: nobody else writes to the object, so what it has read of
// it does not have to be read again after every store and every barrier.
#define DEVICE_CALL __device__ __noinline__
// Before a kernel's struct of params: functions that are given it by reference read it where it is,
// without a copy for every thread.
#define GRID_CONSTANT __grid_constant__
// A static shared array of `count` elements.
#define SHARED_ARRAY(type, name, count) __shared__ __align__(16) type name[count]
// Last parameter of a primitive; emulated, it records the line that called the primitive. PASS_SITE
// hands it on, as last argument.
#define CALL_SITE
#define PASS_SITE
#else
#include "cuda_emulator.h"

#define DEVICE inline
#define DEVICE_CALL inline
#define GRID_CONSTANT
#define SHARED_ARRAY EMULATED_SHARED_ARRAY
#define CALL_SITE , ::emulator::Site site = ::emulator::Site::here()
#define PASS_SITE , site
#endif

namespace hope {

#ifdef __CUDACC__
inline std::string kernel_name(const void* kernel) {
    const char* mangled = nullptr;
    if (cudaFuncGetName(&mangled, kernel) != cudaSuccess) return "kernel";
    int status = 0;
    const std::unique_ptr<char, void (*)(void*)> name(
        abi::__cxa_demangle(mangled, nullptr, nullptr, &status), std::free);
    return status == 0 ? name.get() : mangled;
}
#endif

inline void check_cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
}

inline size_t shared_bytes_of_a_block() {
    return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// A type, or a number, as an argument: for the choice of a kernel's instance.
template <class T>
struct Type {
    using type = T;
};
template <int N>
using Constant = std::integral_constant<int, N>;

// Launches kernel(arguments...) and returns without waiting for it. Throws std::runtime_error with
// the kernel's name and CUDA's message; an error of an earlier, asynchronous kernel may surface
// here.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            [[maybe_unused]] cudaStream_t stream, Arguments... arguments) {
#ifdef __CUDACC__
    const void* function = reinterpret_cast<const void*>(kernel);
    const auto check = [function](cudaError_t error) {
        if (error == cudaSuccess) return;
        const std::string name = kernel_name(function);
        cudaGetLastError();  // reported here, so nobody else has to find it
        throw std::runtime_error("launch of " + name + ": " + cudaGetErrorString(error));
    };
    constexpr size_t kWithoutOptIn = 48 << 10;
    if (shared_bytes > kWithoutOptIn)
        check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared_bytes)));
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
#else
    ::emulator::launch(kernel, grid, block, shared_bytes, arguments...);
#endif
}

// The block's dynamic shared memory, aligned to 1024 bytes.
DEVICE char* dynamic_shared() {
#ifdef __CUDACC__
    extern __shared__ __align__(1024) char dynamic_shared_memory[];
    return dynamic_shared_memory;
#else
    return static_cast<char*>(::emulator::dynamic_shared());
#endif
}

// Hands out dynamic shared memory piece by piece. A kernel's layout is one class that takes its
// pieces from a carver: the device gives dynamic_shared() as base and gets pointers, the host gives
// nullptr and asks used(), the bytes to launch with. Builds with AddressSanitizer leave a red zone
// after each piece.
class SharedCarver {
 public:
    __host__ __device__ explicit SharedCarver(char* base) : base_(base) {}

    template <class T>
    __host__ __device__ T* take(size_t count, size_t alignment = 16) {
        used_ = (used_ + alignment - 1) / alignment * alignment;
        T* piece = reinterpret_cast<T*>(base_ + used_);
        used_ += count * sizeof(T);
#ifdef EMULATOR_ADDRESS
        if (base_) ::emulator::protect(base_ + used_, ::emulator::kRedZone);
        used_ += ::emulator::kRedZone;
#endif
        return piece;
    }

    __host__ __device__ size_t used() const { return used_; }

 private:
    char* base_;
    size_t used_ = 0;
};

}  // namespace hope
