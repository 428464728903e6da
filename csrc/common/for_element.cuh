// From a dtype that is known at run time to the type of a kernel's elements.
#pragma once
#include <stdexcept>

#include "common/element.h"
#include "common/primitives.cuh"

namespace hope {

// body(Type<E>) for the params' dtype.
template <class Body>
auto for_element(Element element, const Body& body) {
    switch (element) {
        case Element::float32:
            return body(Type<float>());
        case Element::bfloat16:
            return body(Type<bf16>());
        case Element::float16:
            return body(Type<fp16>());
        case Element::float64:
            break;
    }
    throw std::invalid_argument("no CUDA kernel for float64");
}

}  // namespace hope
