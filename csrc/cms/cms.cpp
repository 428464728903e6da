// Host code of the continuum memory system: allocates, fills the Params, launches. Arguments are
// checked in hope_ext/cms.py; what is checked here protects memory against a caller of torch.ops.
#include "cms/cms.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <tuple>

#include "common/cuda_host.h"
#include "common/library.h"
#ifdef HOPE_WITH_CUDA
#include "cms/cms_cuda.h"
#endif

namespace hope {
namespace {

using at::Tensor;
using std::optional;
using Pair = std::array<Tensor, kCmsLayers>;  // of the two layers; undefined where absent

TokenTensor rows_of(const Tensor& tensor) {
    if (!tensor.defined()) return {};
    return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), 0};
}
void set_matrices(MatrixTensor (&to)[kCmsLayers], const Pair& tensors) {
    for (int layer = 0; layer < kCmsLayers; layer++)
        if (tensors[layer].defined())
            to[layer] = {tensors[layer].data_ptr(), tensors[layer].stride(0), 0};
}

// As the kernels of the tensor's device want it.
Tensor ready_rows(const Tensor& tensor) {
    return on_cuda(tensor) ? with_aligned_rows(tensor) : with_contiguous_rows(tensor);
}
Tensor ready_matrices(const Tensor& tensor) {
    const Tensor contiguous = with_contiguous_matrices(tensor);
    return on_cuda(tensor) ? with_aligned_rows(contiguous) : contiguous;
}

struct Inputs {  // keeps the tensors that Params points into
    Tensor x, target, lr, position, cu_seqlens;
    Pair weights, pending;
    at::TensorOptions states;  // options of outputs in the accumulation dtype
    CmsParams params{};

    Tensor empty_rows() const { return at::empty(x.sizes(), x.options()); }
    std::array<int64_t, 3> sizes_of(int layer) const {
        return {params.sequences, layer ? params.hidden_dim : params.dim,
                layer ? params.dim : params.hidden_dim};
    }
    Pair empty_matrices(bool wanted = true) const {
        Pair matrices;
        for (int layer = 0; layer < kCmsLayers; layer++)
            matrices[layer] = wanted ? at::empty(sizes_of(layer), states) : at::empty({0}, states);
        return matrices;
    }
};

void check_on_cuda([[maybe_unused]] const CmsParams& p, [[maybe_unused]] at::ScalarType element) {
#ifdef HOPE_WITH_CUDA
    TORCH_CHECK_TYPE(element != at::kDouble,
                     "x: expected float32, bfloat16 or float16 on CUDA, got float64");
    TORCH_CHECK_VALUE(p.dim % kCmsSizesOnCuda == 0, "x: expected a size D that is a multiple of ",
                      kCmsSizesOnCuda, " on CUDA, got ", p.dim);
    TORCH_CHECK_VALUE(p.hidden_dim % kCmsSizesOnCuda == 0,
                      "weights: expected a hidden size that is a multiple of ", kCmsSizesOnCuda,
                      " on CUDA, got ", p.hidden_dim);
    TORCH_CHECK_VALUE(p.tokens <= kMostCmsTokensOnCuda, "x: expected at most ",
                      kMostCmsTokensOnCuda, " tokens on CUDA, got ", p.tokens);
    TORCH_CHECK_VALUE(p.chunk_size < int64_t{1} << 31, "chunk_size: expected less than 2**31, got ",
                      p.chunk_size);
#endif
}

struct Options {
    int64_t chunk_size;
    std::string_view activation, objective;
    double decay;
    bool residual, keeps_state;
    int64_t checkpoint_every;
};

Inputs gather(const Tensor& x, const Tensor& target, const Tensor& lr, const Tensor& w1,
              const Tensor& w2, const optional<Tensor>& p1, const optional<Tensor>& p2,
              const optional<Tensor>& position, const optional<Tensor>& cu_seqlens,
              const Options& options) {
    TORCH_CHECK_VALUE(x.dim() == 3, "x: expected 3 dimensions, got ", x.dim());
    TORCH_CHECK_VALUE(w1.dim() == 3, "w1: expected 3 dimensions, got ", w1.dim());
    TORCH_CHECK_VALUE(options.chunk_size > 0, "chunk_size: expected a positive number, got ",
                      options.chunk_size);
    Inputs in;
    CmsParams& p = in.params;
    p.tokens = x.size(1), p.dim = x.size(2), p.hidden_dim = w1.size(2);
    p.sequences = cu_seqlens ? cu_seqlens->numel() - 1 : x.size(0);
    p.chunk_size = options.chunk_size, p.checkpoint_every = options.checkpoint_every;
    p.decay = options.decay, p.residual = options.residual, p.keeps_state = options.keeps_state;
    p.activation = parse<Activation>("activation", options.activation,
                                     {{"gelu", Activation::gelu}, {"silu", Activation::silu}});
    p.objective = parse<CmsObjective>(
        "objective", options.objective,
        {{"l2", CmsObjective::l2}, {"dot", CmsObjective::dot}, {"teach", CmsObjective::teach}});
    const at::ScalarType element = x.scalar_type(), state = accumulation_of(x);
    auto check = [&](const char* name, const Tensor& tensor, at::IntArrayRef sizes,
                     at::ScalarType type) {
        return checked_tensor(name, tensor, sizes, type, x.device());
    };
    if (on_cuda(x)) check_on_cuda(p, element);
    auto matrices = [&](const char* name, const Tensor& first, const Tensor& second) {
        return Pair{ready_matrices(check(name, first, in.sizes_of(0), state)),
                    ready_matrices(check(name, second, in.sizes_of(1), state))};
    };
    in.x = ready_rows(x), in.target = ready_rows(check("target", target, x.sizes(), element));
    in.lr = check("lr", lr, x.sizes().slice(0, 2), state);
    in.weights = matrices("w1, w2", w1, w2);
    TORCH_CHECK_VALUE(p1.has_value() == p2.has_value(), "p1, p2: expected both or none");
    if (p1) in.pending = matrices("p1, p2", *p1, *p2);
    in.states = x.options().dtype(state);

    p.element = element_of(x);
    p.x = rows_of(in.x), p.target = rows_of(in.target), p.lr = rows_of(in.lr);
    set_matrices(p.weights, in.weights), set_matrices(p.pending, in.pending);
    if (position) {
        in.position = check("position", *position, {p.sequences}, at::kLong).contiguous();
        p.position = in.position.const_data_ptr<int64_t>();
    }
    if (cu_seqlens) {
        TORCH_CHECK_VALUE(x.size(0) == 1, "x: expected batch 1 with cu_seqlens, got ", x.size(0));
        in.cu_seqlens = checked_bounds(*cu_seqlens, p.tokens, x.device());
        p.cu_seqlens = in.cu_seqlens.const_data_ptr<int32_t>();
    }
    return in;
}

std::array<int64_t, 2> checkpoint_sizes(const CmsParams& p, int64_t batch) {
    return {cms_checkpoint_slots(p, batch * p.tokens), 2 * p.dim * p.hidden_dim};
}

#ifdef HOPE_WITH_CUDA
Tensor cuda_scratch(const Inputs& in, int64_t bytes) {
    return at::empty({bytes}, in.x.options().dtype(at::kByte));
}
#endif

void run_forward(const Inputs& in) {
    const CmsParams& p = in.params;
#ifdef HOPE_WITH_CUDA
    if (on_cuda(in.x)) {
        const CudaScope scope(in.x);
        const Tensor scratch = cuda_scratch(in, cms_fwd_cuda_scratch(p));
        cms_fwd_cuda(p, scratch.data_ptr(), scope.stream());
        return;
    }
#endif
#ifndef HOPE_EMULATED
    cms_fwd_cpu(p, parallel_for);
#endif
}

void run_backward(const Inputs& in) {
    const CmsParams& p = in.params;
#ifdef HOPE_WITH_CUDA
    if (on_cuda(in.x)) {
        const CudaScope scope(in.x);
        const Tensor scratch = cuda_scratch(in, cms_bwd_cuda_scratch(p));
        cms_bwd_cuda(p, scratch.data_ptr(), scope.stream());
        return;
    }
#endif
#ifndef HOPE_EMULATED
    cms_bwd_cpu(p, parallel_for);
#endif
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward cms(const Tensor& x, const Tensor& target, const Tensor& lr, const Tensor& w1,
            const Tensor& w2, const optional<Tensor>& p1, const optional<Tensor>& p2,
            const optional<Tensor>& position, const optional<Tensor>& cu_seqlens,
            int64_t chunk_size, std::string_view activation, std::string_view objective,
            double decay, bool residual, bool keeps_state, int64_t checkpoint_every) {
    Inputs in =
        gather(x, target, lr, w1, w2, p1, p2, position, cu_seqlens,
               {chunk_size, activation, objective, decay, residual, keeps_state, checkpoint_every});
    CmsParams& p = in.params;
    const Tensor y = in.empty_rows();
    const Pair weights = in.empty_matrices(keeps_state), pending = in.empty_matrices(keeps_state);
    Tensor checkpoints = at::empty({0}, in.states);
    if (checkpoint_every > 0) checkpoints = at::empty(checkpoint_sizes(p, x.size(0)), in.states);
    p.y = rows_of(y), p.checkpoints = checkpoints.data_ptr();
    if (keeps_state) set_matrices(p.final_weights, weights), set_matrices(p.final_pending, pending);
    run_forward(in);
    return {y, weights[0], weights[1], pending[0], pending[1], checkpoints};
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward cms_backward(const optional<Tensor>& d_y, const optional<Tensor>& d_w1,
                      const optional<Tensor>& d_w2, const optional<Tensor>& d_p1,
                      const optional<Tensor>& d_p2, const Tensor& x, const Tensor& target,
                      const Tensor& lr, const Tensor& w1, const Tensor& w2,
                      const optional<Tensor>& p1, const optional<Tensor>& p2,
                      const optional<Tensor>& position, const optional<Tensor>& cu_seqlens,
                      const Tensor& checkpoints, int64_t chunk_size, std::string_view activation,
                      std::string_view objective, double decay, bool residual,
                      int64_t checkpoint_every) {
    TORCH_CHECK_VALUE(checkpoint_every > 0, "checkpoint_every: expected a positive number, got ",
                      checkpoint_every);
    Inputs in =
        gather(x, target, lr, w1, w2, p1, p2, position, cu_seqlens,
               {chunk_size, activation, objective, decay, residual, true, checkpoint_every});
    CmsParams& p = in.params;
    TORCH_CHECK_VALUE(checkpoints.is_contiguous() &&
                          checkpoints.scalar_type() == accumulation_of(x) &&
                          checkpoints.sizes() == checkpoint_sizes(p, x.size(0)),
                      "checkpoints: not those of this forward");
    p.checkpoints = checkpoints.data_ptr();
    auto of_states = [&](const char* name, const optional<Tensor>& first,
                         const optional<Tensor>& second) {
        Pair checked;
        if (!first && !second) return checked;
        for (int layer = 0; layer < kCmsLayers; layer++) {
            checked[layer] = checked_gradient(name, layer ? second : first, in.sizes_of(layer),
                                              accumulation_of(x), x.device());
            checked[layer] = checked[layer].defined() ? ready_matrices(checked[layer])
                                                      : at::zeros(in.sizes_of(layer), in.states);
        }
        return checked;
    };
    Tensor from_y = checked_gradient("d_y", d_y, x.sizes(), x.scalar_type(), x.device());
    if (from_y.defined()) from_y = ready_rows(from_y);
    const Pair from_weights = of_states("d_w1, d_w2", d_w1, d_w2),
               from_pending = of_states("d_p1, d_p2", d_p1, d_p2);
    p.d_y = rows_of(from_y);
    set_matrices(p.d_final_weights, from_weights), set_matrices(p.d_final_pending, from_pending);

    const Tensor d_x = in.empty_rows(), d_target = in.empty_rows(),
                 d_lr = at::empty(lr.sizes(), in.states);
    const Pair d_weights = in.empty_matrices(), d_pending = in.empty_matrices(p1.has_value());
    p.d_x = rows_of(d_x), p.d_target = rows_of(d_target), p.d_lr = rows_of(d_lr);
    set_matrices(p.d_weights, d_weights);
    if (p1) set_matrices(p.d_pending, d_pending);
    run_backward(in);
    return {d_x, d_target, d_lr, d_weights[0], d_weights[1], d_pending[0], d_pending[1]};
}

}  // namespace
}  // namespace hope

HOPE_OPERATORS(library) {
    library.impl("cms", &hope::cms);
    library.impl("cms_backward", &hope::cms_backward);
}
