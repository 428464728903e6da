// Host-side helpers: torch tensors to the plain structs of element.h, and argument parsing.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "common/element.h"

namespace hope {

inline Element element_of(const at::Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case at::kFloat:
            return Element::float32;
        case at::kDouble:
            return Element::float64;
        case at::kBFloat16:
            return Element::bfloat16;
        case at::kHalf:
            return Element::float16;
        default:
            TORCH_CHECK_TYPE(false, "expected float32, float64, bfloat16 or float16, got ",
                             tensor.scalar_type());
    }
}

inline at::ScalarType accumulation_of(const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Whether the CUDA kernels run on this tensor; always in the emulator (cuda_host.h).
inline bool on_cuda([[maybe_unused]] const at::Tensor& tensor) {
#ifdef HOPE_EMULATED
    return true;
#else
    return tensor.is_cuda();
#endif
}

// An argument with these properties; undefined if it is absent.
inline at::Tensor checked_tensor(const char* name, const std::optional<at::Tensor>& tensor,
                                 at::IntArrayRef sizes, at::ScalarType type, at::Device device) {
    if (!tensor) return {};
    TORCH_CHECK_VALUE(tensor->sizes() == sizes, name, ": expected shape ", sizes, ", got ",
                      tensor->sizes());
    TORCH_CHECK_TYPE(tensor->scalar_type() == type, name, ": expected ", type, ", got ",
                     tensor->scalar_type());
    TORCH_CHECK_VALUE(tensor->device() == device, name, ": expected device ", device, ", got ",
                      tensor->device());
    return *tensor;
}
// The incoming gradient of an output, contiguous; undefined if there is none.
inline at::Tensor checked_gradient(const char* name, const std::optional<at::Tensor>& gradient,
                                   at::IntArrayRef sizes, at::ScalarType type, at::Device device) {
    const at::Tensor checked = checked_tensor(name, gradient, sizes, type, device);
    return checked.defined() ? checked.contiguous() : checked;
}

// The bounds of packed sequences [N + 1]. Python looks at their values too, but not in traced code;
// tokens outside every sequence would be left unwritten. On CUDA nobody looks, since that would
// mean waiting for the GPU: kernels clamp them to [0, T].
inline at::Tensor checked_bounds(const at::Tensor& cu_seqlens, int64_t tokens,
                                 std::optional<at::Device> device = std::nullopt) {
    TORCH_CHECK_TYPE(cu_seqlens.scalar_type() == at::kInt, "cu_seqlens: expected int32, got ",
                     cu_seqlens.scalar_type());
    TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.numel() > 0,
                      "cu_seqlens: expected [N + 1], got ", cu_seqlens.sizes());
    TORCH_CHECK_VALUE(!device || cu_seqlens.device() == *device, "cu_seqlens: expected device ",
                      *device, ", got ", cu_seqlens.device());
    const at::Tensor contiguous = cu_seqlens.contiguous();
    if (on_cuda(contiguous)) return contiguous;
    const int32_t* const bounds = contiguous.const_data_ptr<int32_t>();
    const int64_t sequences = contiguous.numel() - 1;
    bool rises = bounds[0] == 0 && bounds[sequences] == tokens;
    for (int64_t i = 0; i < sequences; i++) rises = rises && bounds[i] <= bounds[i + 1];
    TORCH_CHECK_VALUE(rises, "cu_seqlens: expected values that rise from 0 to T = ", tokens);
    return contiguous;
}

// Kernels read any strides but want neighbouring elements side by side.
inline at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
    return tensor.numel() == 0 || tensor.stride(-1) == 1 || tensor.size(-1) == 1
               ? tensor
               : tensor.contiguous();
}
inline at::Tensor with_contiguous_matrices(const at::Tensor& tensor) {
    const bool fits =
        tensor.numel() == 0 || (tensor.stride(-1) == 1 && tensor.stride(-2) == tensor.size(-1));
    return fits ? tensor : tensor.contiguous();
}

// For kernels that copy 16 bytes at a time: the data and all strides but the last, which is 1, are
// multiples of 16 bytes. The last dimension has to be one.
inline at::Tensor with_aligned_rows(const at::Tensor& tensor) {
    if (tensor.numel() == 0) return tensor;
    constexpr int64_t kBytes = 16;
    const int64_t per_copy = kBytes / tensor.element_size(), last = tensor.dim() - 1;
    TORCH_INTERNAL_ASSERT(tensor.size(last) % per_copy == 0, "rows of ", tensor.size(last));
    bool fits = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kBytes == 0 &&
                tensor.stride(last) == 1;
    std::vector<int64_t> strides = tensor.strides().vec();
    for (int64_t i = 0; i < last; i++) {
        if (tensor.size(i) == 1) strides[i] = per_copy;  // any will do: the index is always 0
        fits = fits && strides[i] % per_copy == 0;
    }
    if (!fits) return tensor.clone(at::MemoryFormat::Contiguous);
    return tensor.strides() == strides ? tensor : tensor.as_strided(tensor.sizes(), strides);
}

inline TokenTensor token_tensor(const at::Tensor& tensor) {
    if (!tensor.defined()) return {};
    return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}
inline MatrixTensor matrix_tensor(const at::Tensor& tensor) {
    if (!tensor.defined()) return {};
    return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)};
}
inline at::Tensor or_undefined(const std::optional<at::Tensor>& tensor) {
    return tensor.value_or(at::Tensor());
}

template <class Enum>
Enum parse(const char* argument, std::string_view value,
           std::initializer_list<std::pair<std::string_view, Enum>> names) {
    for (const auto& [name, result] : names)
        if (name == value) return result;
    TORCH_CHECK_VALUE(false, argument, ": unknown value '", value, "'");
}

inline void parallel_for(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
    at::parallel_for(0, n, 1, body);
}

}  // namespace hope
