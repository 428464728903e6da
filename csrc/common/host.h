// Host-side helpers: torch tensors to the plain structs of element.h, and argument parsing.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <functional>
#include <initializer_list>
#include <optional>
#include <string_view>
#include <utility>

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
