// Tensors and threads for code that knows no torch.
#pragma once
#include <cstdint>
#include <functional>

namespace hope {

enum class Element { float32, float64, bfloat16, float16 };

inline int element_bytes(Element element) {
    return element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2;
}

// A tensor [batch, token, head, .] with contiguous last dimension; strides in elements.
struct TokenTensor {
    void* data;
    int64_t batch, token, head;
};

// A tensor [batch, head, ., .] of contiguous matrices; strides in elements. A shared matrix has
// batch stride 0.
struct MatrixTensor {
    void* data;
    int64_t batch, head;
};

// Runs body(begin, end) over parts of [0, n) in parallel.
using ParallelFor =
    std::function<void(int64_t n, const std::function<void(int64_t begin, int64_t end)>& body)>;

}  // namespace hope
