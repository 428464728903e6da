// Host code of the Newton-Schulz iteration: allocates, fills the Params, launches. Arguments are
// checked in hope_ext/newton_schulz.py; what is checked here protects memory against a caller of
// torch.ops.
#include "newton_schulz/newton_schulz.h"

#include <ATen/ops/empty.h>

#include "common/cuda_host.h"
#include "common/library.h"

namespace hope {
namespace {

using at::Tensor;

Tensor newton_schulz(const Tensor& g, int64_t steps, double a, double b, double c, double eps) {
    TORCH_CHECK_VALUE(g.dim() >= 2, "g: expected [..., M, N], got ", g.sizes());
    TORCH_CHECK_VALUE(steps >= 0, "steps: expected 0 or more, got ", steps);
    NewtonSchulzParams p{};
    p.element = element_of(g);
    TORCH_CHECK_TYPE(p.element != Element::float16,
                     "g: expected float32, bfloat16 or float64, got ", g.scalar_type());
    const Tensor out = at::empty(g.sizes(), g.options());
    if (g.numel() == 0) return out;
    const Tensor from = g.contiguous();
    p.rows = g.size(-2), p.columns = g.size(-1), p.batch = g.numel() / (p.rows * p.columns);
    p.steps = steps, p.a = a, p.b = b, p.c = c, p.eps = eps;
    p.g = from.const_data_ptr(), p.out = out.data_ptr();
    const Tensor workspace =
        at::empty({newton_schulz_cpu_workspace(p)}, g.options().dtype(at::kByte));
    p.workspace = workspace.data_ptr();
    newton_schulz_cpu(p, parallel_for);
    return out;
}

}  // namespace
}  // namespace hope

HOPE_CPU_OPERATORS(library) { library.impl("newton_schulz", &hope::newton_schulz); }
