// Host code of the Titans memory: allocates, fills the Params, launches. Arguments are checked in
// hope_ext/titans.py; what is checked here protects memory against a caller of torch.ops.
#include <ATen/ops/empty.h>

#include <array>
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

constexpr int kLayers = 2;
using Pair =
    std::array<optional<Tensor>, kLayers>;  // of a memory's layers; absent where it has one

struct Inputs {  // keeps the tensors that Params points into
    Tensor q, k, v, lr, momentum, decay, norm_weight, norm_bias, position, cu_seqlens;
    std::array<Tensor, kLayers> weights, momenta, anchor;
    at::TensorOptions rows,
        states;  // options of outputs in q's dtype and in the accumulation dtype
    TitansParams params{};

    Tensor empty_tokens(int64_t columns) const {
        return at::empty({q.size(0), q.size(1), q.size(2), columns}, rows);
    }
    Tensor empty_gates(bool wanted = true) const {
        return wanted ? at::empty({q.size(0), q.size(1), q.size(2)}, states)
                      : at::empty({0}, states);
    }
    std::array<int64_t, 4> sizes_of(int layer) const {
        return {params.sequences, params.heads, params.rows_of(layer), params.columns_of(layer)};
    }
    Tensor empty_state(int layer, bool wanted = true) const {
        return wanted && layer < params.layers() ? at::empty(sizes_of(layer), states)
                                                 : at::empty({0}, states);
    }
    std::array<Tensor, kLayers> empty_states(bool wanted = true) const {
        return {empty_state(0, wanted), empty_state(1, wanted)};
    }
    Tensor empty_norm() const {
        return norm_weight.defined()
                   ? at::empty({params.sequences, params.heads, params.value_dim}, states)
                   : at::empty({0}, states);
    }
};

MatrixTensor state_tensor(const Tensor& tensor) {
    return tensor.defined() && tensor.numel() ? matrix_tensor(tensor) : MatrixTensor{};
}
void set_states(MatrixTensor (&to)[kLayers], const std::array<Tensor, kLayers>& tensors) {
    for (int layer = 0; layer < kLayers; layer++) to[layer] = state_tensor(tensors[layer]);
}

void check_on_cuda([[maybe_unused]] const TitansParams& p,
                   [[maybe_unused]] at::ScalarType element) {
#ifdef HOPE_WITH_CUDA
    TORCH_CHECK_TYPE(element != at::kDouble,
                     "q: expected float32, bfloat16 or float16 on CUDA, got float64");
    auto size = [](const char* name, int64_t columns) {
        TORCH_CHECK_VALUE(titans_linear_cuda_supports(columns), name,
                          ": expected a head size of 16, 32, 64 or 128 on CUDA, got ", columns);
    };
    size("q", p.key_dim), size("v", p.value_dim);
    TORCH_CHECK_VALUE(p.tokens <= kMostTokensOnCuda, "q: expected at most ", kMostTokensOnCuda,
                      " tokens on CUDA, got ", p.tokens);
    TORCH_CHECK_VALUE(p.chunk_size < int64_t{1} << 31, "chunk_size: expected less than 2**31, got ",
                      p.chunk_size);
    TORCH_CHECK_VALUE(p.hidden_dim % 16 == 0,
                      "weights: expected a hidden size that is a multiple of 16 on CUDA, got ",
                      p.hidden_dim);
#endif
}

struct Options {
    int64_t chunk_size;
    std::string_view activation;
    bool residual;
    std::string_view objective, read;
    double norm_eps;
    int64_t checkpoint_every;
};

Inputs gather(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr,
              const optional<Tensor>& momentum, const optional<Tensor>& decay, const Pair& weights,
              const Pair& momenta, const Pair& anchor, const optional<Tensor>& norm_weight,
              const optional<Tensor>& norm_bias, const optional<Tensor>& position,
              const optional<Tensor>& cu_seqlens, const Options& options) {
    const Tensor& w1 = *weights[0];
    TORCH_CHECK_VALUE(q.dim() == 4 && v.dim() == 4 && w1.dim() == 4,
                      "q, v, weights: expected 4 dimensions");
    TORCH_CHECK_VALUE(options.chunk_size > 0, "chunk_size: expected a positive number, got ",
                      options.chunk_size);
    Inputs in;
    TitansParams& p = in.params;
    const int64_t batch = q.size(0);
    p.tokens = q.size(1), p.heads = q.size(2), p.key_dim = q.size(3), p.value_dim = v.size(3);
    p.sequences = cu_seqlens ? cu_seqlens->numel() - 1 : batch;
    p.hidden_dim = weights[1] ? w1.size(3) : 0;
    TORCH_CHECK_VALUE(!weights[1] || p.hidden_dim > 0, "weights: expected a hidden size above 0");
    p.chunk_size = options.chunk_size, p.checkpoint_every = options.checkpoint_every;
    p.has_momentum = momentum.has_value(), p.residual = options.residual,
    p.norm_eps = options.norm_eps;
    p.activation = parse<TitansActivation>(
        "activation", options.activation,
        {{"gelu", TitansActivation::gelu}, {"silu", TitansActivation::silu}});
    p.objective =
        parse<TitansObjective>("objective", options.objective,
                               {{"l2", TitansObjective::l2}, {"dot", TitansObjective::dot}});
    p.read = parse<TitansRead>("read", options.read,
                               {{"after", TitansRead::after},
                                {"before", TitansRead::before},
                                {"chunk", TitansRead::chunk}});
    const at::ScalarType element = q.scalar_type(), state = accumulation_of(q);
    auto check = [&](const char* name, const optional<Tensor>& tensor, at::IntArrayRef sizes,
                     at::ScalarType type) {
        return checked_tensor(name, tensor, sizes, type, q.device());
    };
    auto rows = [&](const char* name, const Tensor& tensor, int64_t columns) {
        const Tensor checked = check(name, tensor, {batch, p.tokens, p.heads, columns}, element);
        return on_cuda(q) ? with_aligned_rows(checked) : with_contiguous_rows(checked);
    };
    auto states = [&](const char* name, const Pair& tensors) {
        std::array<Tensor, kLayers> checked;
        for (int layer = 0; layer < p.layers(); layer++) {
            checked[layer] = check(name, tensors[layer], in.sizes_of(layer), state);
            if (!checked[layer].defined()) continue;
            checked[layer] = with_contiguous_matrices(checked[layer]);
            if (on_cuda(q)) checked[layer] = with_aligned_rows(checked[layer]);
        }
        TORCH_CHECK_VALUE(p.layers() == 1 || checked[0].defined() == checked[1].defined(), name,
                          ": expected a tensor for each layer or for none");
        return checked;
    };
    auto norm = [&](const char* name, const optional<Tensor>& tensor) {
        const Tensor checked = check(name, tensor, {p.sequences, p.heads, p.value_dim}, state);
        return tensor ? with_contiguous_rows(checked) : checked;
    };
    if (on_cuda(q)) check_on_cuda(p, element);
    in.q = rows("q", q, p.key_dim), in.k = rows("k", k, p.key_dim);
    in.v = rows("v", v, p.value_dim);
    in.lr = check("lr", lr, {batch, p.tokens, p.heads}, state);
    in.momentum = check("momentum", momentum, {batch, p.tokens, p.heads}, state);
    in.decay = check("decay", decay, {batch, p.tokens, p.heads}, state);
    in.weights = states("weights", weights), in.momenta = states("momenta", momenta),
    in.anchor = states("anchor", anchor);
    in.norm_weight = norm("norm_weight", norm_weight), in.norm_bias = norm("norm_bias", norm_bias);
    TORCH_CHECK_VALUE(in.norm_weight.defined() == in.norm_bias.defined(),
                      "norm_weight, norm_bias: expected both or none");
    TORCH_CHECK_VALUE(
        !p.residual || p.key_dim == p.value_dim || (p.layers() == 1 && !in.norm_weight.defined()),
        "v: expected as many columns as k for a residual memory, got ", p.value_dim);
    in.position = check("position", position, {p.sequences}, at::kLong);
    if (in.position.defined()) in.position = in.position.contiguous();
    in.rows = q.options(), in.states = q.options().dtype(state);

    p.element = element_of(q);
    p.q = token_tensor(in.q), p.k = token_tensor(in.k), p.v = token_tensor(in.v);
    p.lr = token_tensor(in.lr), p.momentum = token_tensor(in.momentum),
    p.decay = token_tensor(in.decay);
    set_states(p.weights, in.weights), set_states(p.momenta, in.momenta),
        set_states(p.anchor, in.anchor);
    if (in.norm_weight.defined())
        p.norm_weight = matrix_tensor(in.norm_weight), p.norm_bias = matrix_tensor(in.norm_bias);
    if (in.position.defined()) p.position = in.position.const_data_ptr<int64_t>();
    if (cu_seqlens) {
        TORCH_CHECK_VALUE(batch == 1, "q: expected batch 1 with cu_seqlens, got ", batch);
        in.cu_seqlens = checked_bounds(*cu_seqlens, p.tokens, q.device());
        p.cu_seqlens = in.cu_seqlens.const_data_ptr<int32_t>();
    }
    return in;
}

#ifdef HOPE_WITH_CUDA
// Memories with two layers or a norm have kernels of their own.
bool is_network(const TitansParams& p) { return p.layers() == 2 || p.norm_weight.data; }

// bytes_of: titans_network_fwd_cuda_scratch or the backward's, which says -1 where a block's tiles
// do not fit the device's shared memory.
Tensor network_scratch(const Inputs& in, int64_t (*bytes_of)(const TitansParams&)) {
    const int64_t bytes = bytes_of(in.params);
    TitansParams smaller = in.params;
    while (bytes < 0 && smaller.hidden_dim > 16 && bytes_of(smaller) < 0)
        smaller.hidden_dim = smaller.hidden_dim / 32 * 16;
    TORCH_CHECK_VALUE(bytes >= 0, "weights: a hidden size of ", in.params.hidden_dim,
                      " needs more shared memory than this device has for a head size of ",
                      in.params.key_dim, " in ", in.q.scalar_type(), "; expected at most ",
                      smaller.hidden_dim);
    return at::empty({bytes}, in.q.options().dtype(at::kByte));
}
#endif

void run_forward(const Inputs& in) {
    const TitansParams& p = in.params;
#ifdef HOPE_WITH_CUDA
    if (on_cuda(in.q)) {
        const CudaScope scope(in.q);
        const bool steps = p.tokens == 1 && !p.cu_seqlens && !p.checkpoint_every;
        if (is_network(p) && steps)
            titans_network_step_cuda(p, scope.stream());
        else if (is_network(p))
            titans_network_fwd_cuda(
                p, network_scratch(in, titans_network_fwd_cuda_scratch).data_ptr(), scope.stream());
        else if (steps)
            titans_linear_step_cuda(p, scope.stream());
        else
            titans_linear_fwd_cuda(p, scope.stream());
        return;
    }
#endif
#ifndef HOPE_EMULATED
    titans_fwd_cpu(p, parallel_for);
#endif
}

void run_backward(const Inputs& in) {
    const TitansParams& p = in.params;
#ifdef HOPE_WITH_CUDA
    if (on_cuda(in.q)) {
        const CudaScope scope(in.q);
        if (is_network(p)) {
            titans_network_bwd_cuda(
                p, network_scratch(in, titans_network_bwd_cuda_scratch).data_ptr(), scope.stream());
            return;
        }
        const Tensor scratch =
            at::empty({titans_linear_bwd_cuda_scratch(p)}, in.q.options().dtype(at::kByte));
        titans_linear_bwd_cuda(p, scratch.data_ptr(), scope.stream());
        return;
    }
#endif
#ifndef HOPE_EMULATED
    titans_bwd_cpu(p, parallel_for);
#endif
}

int64_t slots_of(const Tensor& q, const TitansParams& p) {
    return checkpoint_slots(q.size(0) * p.tokens, p.sequences, p.chunk_size * p.checkpoint_every);
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward titans(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr,
               const optional<Tensor>& momentum, const optional<Tensor>& decay, const Tensor& w1,
               const optional<Tensor>& w2, const optional<Tensor>& s1, const optional<Tensor>& s2,
               const optional<Tensor>& a1, const optional<Tensor>& a2,
               const optional<Tensor>& norm_weight, const optional<Tensor>& norm_bias,
               const optional<Tensor>& position, const optional<Tensor>& cu_seqlens,
               int64_t chunk_size, std::string_view activation, bool residual,
               std::string_view objective, std::string_view read, double norm_eps,
               int64_t checkpoint_every) {
    Inputs in =
        gather(q, k, v, lr, momentum, decay, {w1, w2}, {s1, s2}, {a1, a2}, norm_weight, norm_bias,
               position, cu_seqlens,
               {chunk_size, activation, residual, objective, read, norm_eps, checkpoint_every});
    TitansParams& p = in.params;
    Tensor o = in.empty_tokens(p.value_dim), checkpoints = at::empty({0}, in.states);
    const auto weights = in.empty_states(), momenta = in.empty_states(momentum.has_value()),
               anchor = in.empty_states();
    if (checkpoint_every > 0)
        checkpoints = at::empty({slots_of(q, p), p.heads, titans_state_size(p)}, in.states);
    p.o = token_tensor(o), p.checkpoints = checkpoints.data_ptr();
    set_states(p.final_weights, weights), set_states(p.final_momenta, momenta),
        set_states(p.final_anchor, anchor);
    run_forward(in);
    return {o, weights[0], weights[1], momenta[0], momenta[1], anchor[0], anchor[1], checkpoints};
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                            Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward titans_backward(
    const optional<Tensor>& d_o, const optional<Tensor>& d_w1, const optional<Tensor>& d_w2,
    const optional<Tensor>& d_s1, const optional<Tensor>& d_s2, const optional<Tensor>& d_a1,
    const optional<Tensor>& d_a2, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& lr, const optional<Tensor>& momentum, const optional<Tensor>& decay,
    const Tensor& w1, const optional<Tensor>& w2, const optional<Tensor>& s1,
    const optional<Tensor>& s2, const optional<Tensor>& a1, const optional<Tensor>& a2,
    const optional<Tensor>& norm_weight, const optional<Tensor>& norm_bias,
    const optional<Tensor>& position, const optional<Tensor>& cu_seqlens, const Tensor& checkpoints,
    int64_t chunk_size, std::string_view activation, bool residual, std::string_view objective,
    std::string_view read, double norm_eps, int64_t checkpoint_every) {
    TORCH_CHECK_VALUE(checkpoint_every > 0, "checkpoint_every: expected a positive number, got ",
                      checkpoint_every);
    Inputs in =
        gather(q, k, v, lr, momentum, decay, {w1, w2}, {s1, s2}, {a1, a2}, norm_weight, norm_bias,
               position, cu_seqlens,
               {chunk_size, activation, residual, objective, read, norm_eps, checkpoint_every});
    TitansParams& p = in.params;
    TORCH_CHECK_VALUE(checkpoints.is_contiguous() &&
                          checkpoints.scalar_type() == w1.scalar_type() &&
                          checkpoints.numel() == slots_of(q, p) * p.heads * titans_state_size(p),
                      "checkpoints: not those of this forward");
    p.checkpoints = checkpoints.data_ptr();

    const bool has_momentum = momentum.has_value(), has_decay = decay.has_value();
    auto of_states = [&](const char* name, const Pair& gradients, bool wanted = true) {
        std::array<Tensor, kLayers> checked;
        for (int layer = 0; wanted && layer < p.layers(); layer++)
            checked[layer] = checked_gradient(name, gradients[layer], in.sizes_of(layer),
                                              w1.scalar_type(), q.device());
        return checked;
    };
    Tensor from_o = checked_gradient("d_o", d_o, v.sizes(), q.scalar_type(), q.device());
    if (from_o.defined() && on_cuda(q)) from_o = with_aligned_rows(from_o);
    const auto from_weights = of_states("d_weights", {d_w1, d_w2}),
               from_momenta = of_states("d_momenta", {d_s1, d_s2}, has_momentum),
               from_anchor = of_states("d_anchor", {d_a1, d_a2});
    p.d_o = token_tensor(from_o);
    set_states(p.d_final_weights, from_weights), set_states(p.d_final_momenta, from_momenta),
        set_states(p.d_final_anchor, from_anchor);

    Tensor d_q = in.empty_tokens(p.key_dim), d_k = in.empty_tokens(p.key_dim),
           d_v = in.empty_tokens(p.value_dim);
    Tensor d_lr = in.empty_gates(), d_momentum = in.empty_gates(has_momentum),
           d_decay = in.empty_gates(has_decay);
    // The CUDA kernels keep gradients in these between launches, whether or not anybody asks.
    const bool keeps = on_cuda(q);
    auto d_weights = in.empty_states(),
         d_momenta = in.empty_states(s1.has_value() || (keeps && has_momentum)),
         d_anchor = in.empty_states(a1.has_value() || keeps);
    Tensor d_norm_weight = in.empty_norm(), d_norm_bias = in.empty_norm();
    p.d_q = token_tensor(d_q), p.d_k = token_tensor(d_k), p.d_v = token_tensor(d_v),
    p.d_lr = token_tensor(d_lr);
    if (has_momentum) p.d_momentum = token_tensor(d_momentum);
    if (has_decay) p.d_decay = token_tensor(d_decay);
    set_states(p.d_weights, d_weights), set_states(p.d_momenta, d_momenta),
        set_states(p.d_anchor, d_anchor);
    if (in.norm_weight.defined())
        p.d_norm_weight = matrix_tensor(d_norm_weight), p.d_norm_bias = matrix_tensor(d_norm_bias);
    run_backward(in);
    if (!s1) d_momenta = in.empty_states(false);
    if (!a1) d_anchor = in.empty_states(false);
    return {d_q,         d_k,          d_v,           d_lr,         d_momentum,
            d_decay,     d_weights[0], d_weights[1],  d_momenta[0], d_momenta[1],
            d_anchor[0], d_anchor[1],  d_norm_weight, d_norm_bias};
}

}  // namespace
}  // namespace hope

HOPE_OPERATORS(library) {
    library.impl("titans", &hope::titans);
    library.impl("titans_backward", &hope::titans_backward);
}
