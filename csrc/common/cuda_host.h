// Host code on the way to CUDA kernels: on which device, in which stream. Emulated builds
// (HOPE_EMULATED, tests/emulator) run the CUDA kernels on CPU tensors.
#pragma once
#include "common/host.h"

#if defined(HOPE_WITH_CUDA) && !defined(HOPE_EMULATED)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace hope {

#if defined(HOPE_EMULATED)

class CudaScope {
 public:
    explicit CudaScope(const at::Tensor&) {}
    void* stream() const { return nullptr; }
};

#elif defined(HOPE_WITH_CUDA)

// While it lives, the tensor's device is CUDA's current one.
class CudaScope {
 public:
    explicit CudaScope(const at::Tensor& tensor) : guard_(tensor.device()) {}
    // The cudaStream_t that torch's work on that device goes to now.
    void* stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

 private:
    c10::cuda::OptionalCUDAGuard guard_;
};

#endif

}  // namespace hope

// Calls `name`_cpu(params, parallel_for) or `name`_cuda(params, stream), by where the tensor is.
// A build refers only to the launchers that it has.
#if defined(HOPE_EMULATED)
#define HOPE_LAUNCH(tensor, name, params) name##_cuda(params, ::hope::CudaScope(tensor).stream())
#elif defined(HOPE_WITH_CUDA)
#define HOPE_LAUNCH(tensor, name, params)             \
    do {                                              \
        if (::hope::on_cuda(tensor)) {                \
            const ::hope::CudaScope scope(tensor);    \
            name##_cuda(params, scope.stream());      \
        } else {                                      \
            name##_cpu(params, ::hope::parallel_for); \
        }                                             \
    } while (false)
#else
#define HOPE_LAUNCH(tensor, name, params) name##_cpu(params, ::hope::parallel_for)
#endif
