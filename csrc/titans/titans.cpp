// Host code of the Titans memory: allocates, fills the Params, launches. Arguments are checked in
// hope_ext/titans.py; what is checked here protects memory against a caller of torch.ops.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "common/cuda_host.h"
#include "common/library.h"
#include "titans/titans.h"
#ifdef HOPE_WITH_CUDA
#include "titans/titans_cuda.h"
#endif

namespace hope {
namespace {

using at::Tensor;
using std::optional;

struct Inputs {  // keeps the tensors that Params points into
    Tensor q, k, v, lr, momentum, decay, weights, momenta, anchor, position, cu_seqlens;
    at::TensorOptions rows,
        states;  // options of outputs in q's dtype and in the accumulation dtype
    TitansLinearParams params{};

    Tensor empty_tokens(int64_t columns) const {
        return at::empty({q.size(0), q.size(1), q.size(2), columns}, rows);
    }
    Tensor empty_gates(bool wanted = true) const {
        return wanted ? at::empty({q.size(0), q.size(1), q.size(2)}, states)
                      : at::empty({0}, states);
    }
    Tensor empty_states(bool wanted = true) const {
        return wanted
                   ? at::empty({params.sequences, params.heads, params.key_dim, params.value_dim},
                               states)
                   : at::empty({0}, states);
    }
};

void check_sizes_on_cuda([[maybe_unused]] at::ScalarType element, [[maybe_unused]] int64_t tokens,
                         [[maybe_unused]] int64_t key, [[maybe_unused]] int64_t value,
                         [[maybe_unused]] int64_t chunk_size) {
#ifdef HOPE_WITH_CUDA
    TORCH_CHECK_TYPE(element != at::kDouble,
                     "q: expected float32, bfloat16 or float16 on CUDA, got float64");
    auto size = [](const char* name, int64_t columns) {
        TORCH_CHECK_VALUE(titans_linear_cuda_supports(columns), name,
                          ": expected a head size of 16, 32, 64 or 128 on CUDA, got ", columns);
    };
    size("q", key), size("v", value);
    TORCH_CHECK_VALUE(tokens <= kMostTokensOnCuda, "q: expected at most ", kMostTokensOnCuda,
                      " tokens on CUDA, got ", tokens);
    TORCH_CHECK_VALUE(chunk_size < int64_t{1} << 31, "chunk_size: expected less than 2**31, got ",
                      chunk_size);
#endif
}

Inputs gather(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr,
              const optional<Tensor>& momentum, const optional<Tensor>& decay,
              const Tensor& weights, const optional<Tensor>& momenta,
              const optional<Tensor>& anchor, const optional<Tensor>& position,
              const optional<Tensor>& cu_seqlens, int64_t chunk_size, int64_t checkpoint_every,
              std::string_view objective, std::string_view read) {
    TORCH_CHECK_VALUE(q.dim() == 4 && v.dim() == 4 && weights.dim() == 4,
                      "q, v, weights: expected 4 dimensions");
    TORCH_CHECK_VALUE(chunk_size > 0, "chunk_size: expected a positive number, got ", chunk_size);
    const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), key = q.size(3),
                  value = v.size(3);
    const int64_t sequences = cu_seqlens ? cu_seqlens->numel() - 1 : batch;
    const at::ScalarType element = q.scalar_type(), state = accumulation_of(q);
    auto check = [&](const char* name, const optional<Tensor>& tensor, at::IntArrayRef sizes,
                     at::ScalarType type) {
        if (!tensor) return Tensor();
        TORCH_CHECK_VALUE(tensor->sizes() == sizes, name, ": expected shape ", sizes, ", got ",
                          tensor->sizes());
        TORCH_CHECK_TYPE(tensor->scalar_type() == type, name, ": expected ", type, ", got ",
                         tensor->scalar_type());
        TORCH_CHECK_VALUE(tensor->device() == q.device(), name, ": expected device ", q.device(),
                          ", got ", tensor->device());
        return *tensor;
    };
    if (on_cuda(q)) check_sizes_on_cuda(element, tokens, key, value, chunk_size);
    auto rows = [&](const char* name, const Tensor& tensor, int64_t columns) {
        const Tensor checked = check(name, tensor, {batch, tokens, heads, columns}, element);
        return on_cuda(q) ? with_aligned_rows(checked) : with_contiguous_rows(checked);
    };
    auto states = [&](const char* name, const optional<Tensor>& tensor) {
        const Tensor checked = check(name, tensor, {sequences, heads, key, value}, state);
        if (!tensor) return checked;
        const Tensor matrices = with_contiguous_matrices(checked);
        return on_cuda(q) ? with_aligned_rows(matrices) : matrices;
    };
    Inputs in;
    in.q = rows("q", q, key), in.k = rows("k", k, key), in.v = rows("v", v, value);
    in.lr = check("lr", lr, {batch, tokens, heads}, state);
    in.momentum = check("momentum", momentum, {batch, tokens, heads}, state);
    in.decay = check("decay", decay, {batch, tokens, heads}, state);
    in.weights = states("weights", weights), in.momenta = states("momenta", momenta),
    in.anchor = states("anchor", anchor);
    in.position = check("position", position, {sequences}, at::kLong);
    if (in.position.defined()) in.position = in.position.contiguous();
    in.rows = q.options(), in.states = q.options().dtype(state);

    TitansLinearParams& p = in.params;
    p.element = element_of(q);
    p.sequences = sequences, p.tokens = tokens, p.heads = heads, p.key_dim = key,
    p.value_dim = value;
    p.chunk_size = chunk_size, p.checkpoint_every = checkpoint_every;
    p.objective = parse<TitansObjective>(
        "objective", objective, {{"l2", TitansObjective::l2}, {"dot", TitansObjective::dot}});
    p.read = parse<TitansRead>("read", read,
                               {{"after", TitansRead::after},
                                {"before", TitansRead::before},
                                {"chunk", TitansRead::chunk}});
    p.q = token_tensor(in.q), p.k = token_tensor(in.k), p.v = token_tensor(in.v);
    p.lr = token_tensor(in.lr), p.momentum = token_tensor(in.momentum),
    p.decay = token_tensor(in.decay);
    p.weights = matrix_tensor(in.weights), p.momenta = matrix_tensor(in.momenta),
    p.anchor = matrix_tensor(in.anchor);
    if (in.position.defined()) p.position = in.position.const_data_ptr<int64_t>();
    if (cu_seqlens) {
        TORCH_CHECK_VALUE(batch == 1, "q: expected batch 1 with cu_seqlens, got ", batch);
        in.cu_seqlens = checked_bounds(*cu_seqlens, tokens, q.device());
        p.cu_seqlens = in.cu_seqlens.const_data_ptr<int32_t>();
    }
    return in;
}

void run_forward(const Inputs& in) {
    const TitansLinearParams& p = in.params;
#ifdef HOPE_WITH_CUDA
    if (on_cuda(in.q)) {
        const CudaScope scope(in.q);
        if (p.tokens == 1 && !p.cu_seqlens && !p.checkpoint_every)
            titans_linear_step_cuda(p, scope.stream());
        else
            titans_linear_fwd_cuda(p, scope.stream());
        return;
    }
#endif
#ifndef HOPE_EMULATED
    titans_linear_fwd_cpu(p, parallel_for);
#endif
}

void run_backward(const Inputs& in) {
    const TitansLinearParams& p = in.params;
#ifdef HOPE_WITH_CUDA
    if (on_cuda(in.q)) {
        const CudaScope scope(in.q);
        const Tensor scratch =
            at::empty({titans_linear_bwd_cuda_scratch(p)}, in.q.options().dtype(at::kByte));
        titans_linear_bwd_cuda(p, scratch.data_ptr(), scope.stream());
        return;
    }
#endif
#ifndef HOPE_EMULATED
    titans_linear_bwd_cpu(p, parallel_for);
#endif
}

int64_t checkpoint_columns(const TitansLinearParams& p) { return p.momentum.data ? 2 : 1; }

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward titans_linear(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr,
                      const optional<Tensor>& momentum, const optional<Tensor>& decay,
                      const Tensor& weights, const optional<Tensor>& momenta,
                      const optional<Tensor>& anchor, const optional<Tensor>& position,
                      const optional<Tensor>& cu_seqlens, int64_t chunk_size,
                      std::string_view objective, std::string_view read, int64_t checkpoint_every) {
    Inputs in = gather(q, k, v, lr, momentum, decay, weights, momenta, anchor, position, cu_seqlens,
                       chunk_size, checkpoint_every, objective, read);
    TitansLinearParams& p = in.params;
    const bool has_momentum = momentum.has_value();
    Tensor o = in.empty_tokens(p.value_dim), checkpoints = at::empty({0}, in.states);
    Tensor final_weights = in.empty_states(), final_momenta = in.empty_states(has_momentum),
           final_anchor = in.empty_states();
    if (checkpoint_every > 0) {
        const int64_t slots = titans_checkpoint_slots(q.size(0) * p.tokens, p.sequences,
                                                      chunk_size * checkpoint_every);
        checkpoints =
            at::empty({slots, p.heads, checkpoint_columns(p), p.key_dim, p.value_dim}, in.states);
    }
    p.o = token_tensor(o), p.checkpoints = checkpoints.data_ptr();
    p.final_weights = matrix_tensor(final_weights), p.final_anchor = matrix_tensor(final_anchor);
    if (has_momentum) p.final_momenta = matrix_tensor(final_momenta);
    run_forward(in);
    return {o, final_weights, final_momenta, final_anchor, checkpoints};
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward titans_linear_backward(const optional<Tensor>& d_o,
                                const optional<Tensor>& d_final_weights,
                                const optional<Tensor>& d_final_momenta,
                                const optional<Tensor>& d_final_anchor, const Tensor& q,
                                const Tensor& k, const Tensor& v, const Tensor& lr,
                                const optional<Tensor>& momentum, const optional<Tensor>& decay,
                                const Tensor& weights, const optional<Tensor>& momenta,
                                const optional<Tensor>& anchor, const optional<Tensor>& position,
                                const optional<Tensor>& cu_seqlens, const Tensor& checkpoints,
                                int64_t chunk_size, std::string_view objective,
                                std::string_view read, int64_t checkpoint_every) {
    TORCH_CHECK_VALUE(checkpoint_every > 0, "checkpoint_every: expected a positive number, got ",
                      checkpoint_every);
    Inputs in = gather(q, k, v, lr, momentum, decay, weights, momenta, anchor, position, cu_seqlens,
                       chunk_size, checkpoint_every, objective, read);
    TitansLinearParams& p = in.params;
    const int64_t slots =
        titans_checkpoint_slots(q.size(0) * p.tokens, p.sequences, chunk_size * checkpoint_every);
    TORCH_CHECK_VALUE(checkpoints.is_contiguous() &&
                          checkpoints.scalar_type() == in.weights.scalar_type() &&
                          checkpoints.numel() ==
                              slots * p.heads * checkpoint_columns(p) * p.key_dim * p.value_dim,
                      "checkpoints: not those of this forward");
    p.checkpoints = checkpoints.data_ptr();

    const int64_t state[] = {p.sequences, p.heads, p.key_dim, p.value_dim};
    auto of_state = [&](const char* name, const optional<Tensor>& gradient) {
        return checked_gradient(name, gradient, state, in.weights.scalar_type(), q.device());
    };
    Tensor from_o = checked_gradient("d_o", d_o, v.sizes(), q.scalar_type(), q.device());
    if (from_o.defined() && on_cuda(q)) from_o = with_aligned_rows(from_o);
    const Tensor from_weights = of_state("d_weights", d_final_weights),
                 from_momenta = of_state("d_momenta", momentum ? d_final_momenta : std::nullopt),
                 from_anchor = of_state("d_anchor", d_final_anchor);
    p.d_o = token_tensor(from_o);
    p.d_final_weights = matrix_tensor(from_weights), p.d_final_anchor = matrix_tensor(from_anchor);
    if (momentum) p.d_final_momenta = matrix_tensor(from_momenta);

    const bool has_momentum = momentum.has_value(), has_decay = decay.has_value();
    Tensor d_q = in.empty_tokens(p.key_dim), d_k = in.empty_tokens(p.key_dim),
           d_v = in.empty_tokens(p.value_dim);
    Tensor d_lr = in.empty_gates(), d_momentum = in.empty_gates(has_momentum),
           d_decay = in.empty_gates(has_decay);
    // The CUDA kernels keep gradients in these between launches, whether or not anybody asks.
    const bool keeps = on_cuda(q);
    Tensor d_weights = in.empty_states(),
           d_momenta = in.empty_states(momenta.has_value() || (keeps && has_momentum)),
           d_anchor = in.empty_states(anchor.has_value() || keeps);
    p.d_q = token_tensor(d_q), p.d_k = token_tensor(d_k), p.d_v = token_tensor(d_v),
    p.d_lr = token_tensor(d_lr);
    if (has_momentum) p.d_momentum = token_tensor(d_momentum);
    if (has_decay) p.d_decay = token_tensor(d_decay);
    p.d_weights = matrix_tensor(d_weights);
    if (d_momenta.numel()) p.d_momenta = matrix_tensor(d_momenta);
    if (d_anchor.numel()) p.d_anchor = matrix_tensor(d_anchor);
    run_backward(in);
    if (!momenta) d_momenta = in.empty_states(false);
    if (!anchor) d_anchor = in.empty_states(false);
    return {d_q, d_k, d_v, d_lr, d_momentum, d_decay, d_weights, d_momenta, d_anchor};
}

}  // namespace
}  // namespace hope

HOPE_OPERATORS(library) {
    library.impl("titans_linear", &hope::titans_linear);
    library.impl("titans_linear_backward", &hope::titans_linear_backward);
}
