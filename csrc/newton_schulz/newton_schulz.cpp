// Host code of the Newton-Schulz iteration: allocates, fills the Params, launches. Arguments are
// checked in hope_ext/newton_schulz.py; what is checked here protects memory against a caller of
// torch.ops.
#include "newton_schulz/newton_schulz.h"

#include <ATen/ops/empty.h>

#include <limits>

#include "common/cuda_host.h"
#include "common/library.h"

namespace hope {
namespace {

using at::Tensor;

int64_t workspace_bytes(const NewtonSchulzParams& p, [[maybe_unused]] const Tensor& g) {
#ifdef HOPE_WITH_CUDA
    if (on_cuda(g)) return newton_schulz_cuda_workspace(p);
#endif
#ifdef HOPE_EMULATED
    return 0;
#else
    return newton_schulz_cpu_workspace(p);
#endif
}

Tensor newton_schulz(const Tensor& g, int64_t steps, double a, double b, double c, double eps) {
    TORCH_CHECK_VALUE(g.dim() >= 2, "g: expected [..., M, N], got ", g.sizes());
    TORCH_CHECK_VALUE(steps >= 0, "steps: expected 0 or more, got ", steps);
    NewtonSchulzParams p{};
    p.element = element_of(g);
    TORCH_CHECK_TYPE(p.element != Element::float16,
                     "g: expected float32, bfloat16 or float64, got ", g.scalar_type());
    TORCH_CHECK_TYPE(!on_cuda(g) || p.element != Element::float64,
                     "g: float64 is for the CPU, got a tensor on ", g.device());
    const Tensor out = at::empty(g.sizes(), g.options());
    if (g.numel() == 0) return out;
    const Tensor from = g.contiguous();
    p.rows = g.size(-2), p.columns = g.size(-1), p.batch = g.numel() / (p.rows * p.columns);
    TORCH_CHECK_VALUE(!on_cuda(g) || p.rows + p.columns < std::numeric_limits<int32_t>::max(),
                      "g: too large for the CUDA kernels, ", g.sizes());
    p.steps = steps, p.a = a, p.b = b, p.c = c, p.eps = eps;
    p.g = from.const_data_ptr(), p.out = out.data_ptr();
    const Tensor workspace = at::empty({workspace_bytes(p, g)}, g.options().dtype(at::kByte));
    p.workspace = workspace.data_ptr();
    HOPE_LAUNCH(g, newton_schulz, p);
    return out;
}

}  // namespace
}  // namespace hope

HOPE_OPERATORS(library) { library.impl("newton_schulz", &hope::newton_schulz); }
