// Which library of torch.ops a build registers its operators in, and for which devices:
//
//     hope            the extension: CPU, and CUDA if it was built with it
//     hope_emulated   tests: the CUDA kernels in the emulator, on CPU tensors
#pragma once
#include <torch/library.h>

#ifdef HOPE_EMULATED
#define HOPE_SCHEMAS(library) TORCH_LIBRARY(hope_emulated, library)
#else
#define HOPE_SCHEMAS(library) TORCH_LIBRARY(hope, library)
#endif

// The host code of a stem, one body for all devices; once per file:
//
//     HOPE_OPERATORS(library) { library.impl("conv", &hope::conv); }
#if defined(HOPE_EMULATED)
#define HOPE_OPERATORS(library) TORCH_LIBRARY_IMPL(hope_emulated, CPU, library)
#elif defined(HOPE_WITH_CUDA)
#define HOPE_OPERATORS(library)                                          \
    static void hope_operators(torch::Library& library);                 \
    TORCH_LIBRARY_IMPL(hope, CPU, library) { hope_operators(library); }  \
    TORCH_LIBRARY_IMPL(hope, CUDA, library) { hope_operators(library); } \
    static void hope_operators(torch::Library& library)
#else
#define HOPE_OPERATORS(library) TORCH_LIBRARY_IMPL(hope, CPU, library)
#endif
