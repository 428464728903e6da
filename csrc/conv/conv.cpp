// Host code of the short causal convolution: allocates, fills the Params, launches. Arguments are
// checked in hope_ext/conv.py; what is checked here protects memory against a caller of torch.ops.
#include "conv/conv.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <tuple>

#include "common/cuda_host.h"
#include "common/library.h"

namespace hope {
namespace {

using at::Tensor;
using std::optional;

struct Inputs {  // keeps the tensors that Params points into
    Tensor x, weight, tail, cu_seqlens;
    ConvParams params{};

    Tensor empty_tail() const {
        return at::empty({params.sequences, params.width - 1, params.channels}, x.options());
    }
};

TokenTensor rows_of(const Tensor& tensor) {
    if (!tensor.defined()) return {};
    return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), 1};
}

Inputs gather(const Tensor& x, const Tensor& weight, const optional<Tensor>& tail,
              const optional<Tensor>& cu_seqlens, std::string_view activation) {
    TORCH_CHECK_VALUE(x.dim() == 3 && weight.dim() == 2 && weight.size(1) > 0,
                      "x, weight: expected [B, T, C] and [C, K], K > 0");
    Inputs in;
    ConvParams& p = in.params;
    p.element = element_of(x);
    TORCH_CHECK_TYPE(!on_cuda(x) || p.element != Element::float64,
                     "x: float64 is for the CPU, got a tensor on ", x.device());
    TORCH_CHECK_VALUE(!on_cuda(x) || weight.size(1) <= kConvMaxWidthCuda,
                      "weight: expected [C, K] with K up to ", kConvMaxWidthCuda,
                      ", got K = ", weight.size(1));
    p.batch = x.size(0), p.tokens = x.size(1), p.channels = x.size(2), p.width = weight.size(1);
    p.sequences = cu_seqlens ? cu_seqlens->numel() - 1 : x.size(0);
    p.silu = parse<bool>("activation", activation, {{"none", false}, {"silu", true}});
    TORCH_CHECK_VALUE(weight.size(0) == p.channels, "weight: expected ", p.channels, " channels");
    TORCH_CHECK_TYPE(weight.scalar_type() == accumulation_of(x), "weight: expected ",
                     accumulation_of(x));
    TORCH_CHECK_VALUE(weight.device() == x.device() && (!tail || tail->device() == x.device()),
                      "weight, tail: expected the device of x, ", x.device());
    in.x = with_contiguous_rows(x), in.weight = weight.contiguous();
    p.x = rows_of(in.x), p.weight = in.weight.const_data_ptr();
    if (tail) {
        const bool fits = tail->sizes() == at::IntArrayRef{p.sequences, p.width - 1, p.channels};
        TORCH_CHECK_VALUE(fits && tail->scalar_type() == x.scalar_type(), "tail: does not fit x");
        in.tail = with_contiguous_rows(*tail);
        p.tail = rows_of(in.tail);
    }
    if (cu_seqlens) {
        TORCH_CHECK_VALUE(x.size(0) == 1, "x: expected batch 1 with cu_seqlens, got ", x.size(0));
        in.cu_seqlens = checked_bounds(*cu_seqlens, p.tokens, x.device());
        p.cu_seqlens = in.cu_seqlens.const_data_ptr<int32_t>();
    }
    return in;
}

std::tuple<Tensor, Tensor> conv(const Tensor& x, const Tensor& weight, const optional<Tensor>& tail,
                                const optional<Tensor>& cu_seqlens, std::string_view activation) {
    Inputs in = gather(x, weight, tail, cu_seqlens, activation);
    const Tensor y = at::empty(x.sizes(), x.options()), final_tail = in.empty_tail();
    in.params.y = rows_of(y), in.params.final_tail = rows_of(final_tail);
    HOPE_LAUNCH(x, conv_fwd, in.params);
    return {y, final_tail};
}

std::tuple<Tensor, Tensor, Tensor> conv_backward(const optional<Tensor>& d_y,
                                                 const optional<Tensor>& d_final_tail,
                                                 const Tensor& x, const Tensor& weight,
                                                 const optional<Tensor>& tail,
                                                 const optional<Tensor>& cu_seqlens,
                                                 std::string_view activation) {
    Inputs in = gather(x, weight, tail, cu_seqlens, activation);
    const ConvParams& p = in.params;
    const at::ScalarType type = x.scalar_type();
    const Tensor from_y = checked_gradient("d_y", d_y, x.sizes(), type, x.device()),
                 from_tail =
                     checked_gradient("d_tail", d_final_tail,
                                      {p.sequences, p.width - 1, p.channels}, type, x.device());
    in.params.d_y = rows_of(from_y), in.params.d_final_tail = rows_of(from_tail);
    const Tensor d_x = at::empty(x.sizes(), x.options()), d_weight = at::empty_like(in.weight),
                 d_tail = tail ? in.empty_tail() : at::empty({0}, x.options());
    in.params.d_x = rows_of(d_x), in.params.d_weight = d_weight.data_ptr();
    if (tail) in.params.d_tail = rows_of(d_tail);
    Tensor workspace;
#ifdef HOPE_WITH_CUDA
    if (on_cuda(x)) {
        workspace = at::empty({conv_bwd_cuda_workspace(p)}, weight.options());
        in.params.workspace = static_cast<float*>(workspace.data_ptr());
    }
#endif
    HOPE_LAUNCH(x, conv_bwd, in.params);
    return {d_x, d_weight, d_tail};
}

}  // namespace
}  // namespace hope

HOPE_OPERATORS(library) {
    library.impl("conv", &hope::conv);
    library.impl("conv_backward", &hope::conv_backward);
}
