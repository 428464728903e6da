// Host code of HOPE's self-modifying memory: allocates, fills the Params, launches. Arguments are
// checked in hope_ext/selfmod.py; what is checked here protects memory against a caller of
// torch.ops.
#include "selfmod/selfmod.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/cuda_host.h"
#include "common/library.h"
#ifdef HOPE_WITH_CUDA
#include "selfmod/selfmod_cuda.h"
#endif

namespace hope {
namespace {

using at::Tensor;
using std::optional;
using Matrices = std::vector<Tensor>;  // all layers of a memory, then of the next; or none

struct Inputs {  // keeps the tensors that Params points into
    Tensor x, q, lr_bias, retention_bias, position, cu_seqlens;
    Matrices weights, anchor;
    at::TensorOptions states;  // options of outputs in the accumulation dtype
    SelfmodParams params{};

    Tensor empty_rows() const { return at::empty(x.sizes(), x.options()); }
    Tensor empty_bias() const { return at::empty({params.sequences, params.heads}, states); }
    std::vector<int64_t> sizes_of(int layer) const {
        return {params.sequences, params.heads, params.rows_of(layer), params.columns_of(layer)};
    }
    Matrices empty_states(bool wanted = true) const {
        Matrices matrices;
        for (int layer = 0; wanted && layer < params.layers(); layer++)
            matrices.push_back(at::empty(sizes_of(layer), states));
        return matrices;
    }
};

void set_states(MatrixTensor (&to)[kSelfmodMatrices], const Matrices& tensors) {
    for (size_t layer = 0; layer < tensors.size(); layer++)
        to[layer] = matrix_tensor(tensors[layer]);
}

// Sizes of the memories, from their first matrices and how many they are.
void set_sizes(SelfmodParams& p, at::TensorList weights) {
    const size_t count = weights.size();
    TORCH_CHECK_VALUE(count == kSelfmodMemories || count == kSelfmodMatrices,
                      "weights: expected one or two matrices for each of ", int{kSelfmodMemories},
                      " memories, got ", count);
    p.memory_layers = static_cast<int>(count) / kSelfmodMemories;
    for (int m = 0; p.memory_layers == 2 && m < kSelfmodMemories; m++) {
        TORCH_CHECK_VALUE(weights[2 * m].dim() == 4, "weights: expected 4 dimensions");
        p.hidden_dim[m] = weights[2 * m].size(3);
        TORCH_CHECK_VALUE(p.hidden_dim[m] > 0, "weights: expected a hidden size above 0");
    }
}

void check_on_cuda([[maybe_unused]] const SelfmodParams& p,
                   [[maybe_unused]] at::ScalarType element) {
#ifdef HOPE_WITH_CUDA
    TORCH_CHECK_TYPE(element != at::kDouble,
                     "x: expected float32, bfloat16 or float16 on CUDA, got float64");
    TORCH_CHECK_VALUE(selfmod_cuda_supports(p.dim),
                      "x: expected a head size of 16, 32, 64 or 128 on CUDA, got ", p.dim);
    TORCH_CHECK_VALUE(p.tokens <= kMostSelfmodTokensOnCuda, "x: expected at most ",
                      kMostSelfmodTokensOnCuda, " tokens on CUDA, got ", p.tokens);
    TORCH_CHECK_VALUE(p.chunk_size < int64_t{1} << 31, "chunk_size: expected less than 2**31, got ",
                      p.chunk_size);
    for (const int64_t hidden : p.hidden_dim)
        TORCH_CHECK_VALUE(hidden % 16 == 0,
                          "memories: expected hidden sizes that are multiples of 16 on CUDA, got ",
                          hidden);
#endif
}

struct Options {
    int64_t chunk_size;
    double lr_max;
    std::string_view activation, objective, read;
    int64_t checkpoint_every;
};

Inputs gather(const Tensor& x, const Tensor& q, at::TensorList weights, const Tensor& lr_bias,
              const Tensor& retention_bias, at::TensorList anchor, const optional<Tensor>& position,
              const optional<Tensor>& cu_seqlens, const Options& options) {
    TORCH_CHECK_VALUE(x.dim() == 4, "x: expected 4 dimensions, got ", x.dim());
    TORCH_CHECK_VALUE(options.chunk_size > 0, "chunk_size: expected a positive number, got ",
                      options.chunk_size);
    Inputs in;
    SelfmodParams& p = in.params;
    const int64_t batch = x.size(0);
    p.tokens = x.size(1), p.heads = x.size(2), p.dim = x.size(3);
    p.sequences = cu_seqlens ? cu_seqlens->numel() - 1 : batch;
    p.chunk_size = options.chunk_size, p.checkpoint_every = options.checkpoint_every;
    p.lr_max = options.lr_max;
    p.activation = parse<Activation>("activation", options.activation,
                                     {{"gelu", Activation::gelu}, {"silu", Activation::silu}});
    p.objective = parse<Objective>("objective", options.objective,
                                   {{"l2", Objective::l2}, {"dot", Objective::dot}});
    p.read =
        parse<Read>("read", options.read,
                    {{"after", Read::after}, {"before", Read::before}, {"chunk", Read::chunk}});
    set_sizes(p, weights);
    const at::ScalarType element = x.scalar_type(), state = accumulation_of(x);
    auto check = [&](const char* name, const Tensor& tensor, at::IntArrayRef sizes,
                     at::ScalarType type) {
        return checked_tensor(name, tensor, sizes, type, x.device());
    };
    auto states = [&](const char* name, at::TensorList tensors) {
        Matrices checked;
        TORCH_CHECK_VALUE(tensors.empty() || tensors.size() == weights.size(), name,
                          ": expected as many matrices as weights, got ", tensors.size());
        for (size_t i = 0; i < tensors.size(); i++)
            checked.push_back(with_contiguous_matrices(
                check(name, tensors[i], in.sizes_of(static_cast<int>(i)), state)));
        return checked;
    };
    if (on_cuda(x)) check_on_cuda(p, element);
    auto rows = [&](const Tensor& tensor) {
        return on_cuda(x) ? with_aligned_rows(tensor) : with_contiguous_rows(tensor);
    };
    in.x = rows(x), in.q = rows(check("q", q, x.sizes(), element));
    in.weights = states("weights", weights), in.anchor = states("anchor", anchor);
    in.lr_bias = check("lr_bias", lr_bias, {p.sequences, p.heads}, state);
    in.retention_bias = check("retention_bias", retention_bias, {p.sequences, p.heads}, state);
    in.states = x.options().dtype(state);

    p.element = element_of(x);
    p.x = token_tensor(in.x), p.q = token_tensor(in.q);
    set_states(p.weights, in.weights), set_states(p.anchor, in.anchor);
    p.lr_bias = matrix_tensor(in.lr_bias), p.retention_bias = matrix_tensor(in.retention_bias);
    if (position) {
        in.position = check("position", *position, {p.sequences}, at::kLong).contiguous();
        p.position = in.position.const_data_ptr<int64_t>();
    }
    if (cu_seqlens) {
        TORCH_CHECK_VALUE(batch == 1, "x: expected batch 1 with cu_seqlens, got ", batch);
        in.cu_seqlens = checked_bounds(*cu_seqlens, p.tokens, x.device());
        p.cu_seqlens = in.cu_seqlens.const_data_ptr<int32_t>();
    }
    return in;
}

std::vector<int64_t> checkpoint_sizes(const SelfmodParams& p, int64_t batch) {
    const int64_t span = p.chunk_size * p.checkpoint_every;
    return {checkpoint_slots(batch * p.tokens, p.sequences, span), p.heads, selfmod_state_size(p)};
}

#ifdef HOPE_WITH_CUDA
// bytes_of: selfmod_fwd_cuda_scratch or the backward's, which says -1 where a block's tiles do not
// fit the device's shared memory.
Tensor cuda_scratch(const Inputs& in, int64_t (*bytes_of)(const SelfmodParams&)) {
    const int64_t bytes = bytes_of(in.params);
    TORCH_CHECK_VALUE(bytes >= 0 || in.params.memory_layers == 2, "x: a head size of ",
                      in.params.dim, " needs more shared memory than this device has in ",
                      in.x.scalar_type());
    SelfmodParams smaller = in.params;
    int64_t& hidden = smaller.hidden_dim[0];
    for (const int64_t other : in.params.hidden_dim) hidden = std::max(hidden, other);
    const int64_t widest = hidden;
    while (bytes < 0 && hidden > 16 && bytes_of(smaller) < 0) {
        hidden -= 16;
        for (int64_t& each : smaller.hidden_dim) each = std::min(each, hidden);
    }
    TORCH_CHECK_VALUE(bytes >= 0, "memories: a hidden size of ", widest,
                      " needs more shared memory than this device has for a head size of ",
                      in.params.dim, " in ", in.x.scalar_type(), "; expected at most ", hidden);
    return at::empty({bytes}, in.x.options().dtype(at::kByte));
}
#endif

void run_forward(const Inputs& in) {
    const SelfmodParams& p = in.params;
#ifdef HOPE_WITH_CUDA
    if (on_cuda(in.x)) {
        const CudaScope scope(in.x);
        const Tensor scratch = cuda_scratch(in, selfmod_fwd_cuda_scratch);
        selfmod_fwd_cuda(p, scratch.data_ptr(), scope.stream());
        return;
    }
#endif
#ifndef HOPE_EMULATED
    selfmod_fwd_cpu(p, parallel_for);
#endif
}

void run_backward(const Inputs& in) {
    const SelfmodParams& p = in.params;
#ifdef HOPE_WITH_CUDA
    if (on_cuda(in.x)) {
        const CudaScope scope(in.x);
        const Tensor scratch = cuda_scratch(in, selfmod_bwd_cuda_scratch);
        selfmod_bwd_cuda(p, scratch.data_ptr(), scope.stream());
        return;
    }
#endif
#ifndef HOPE_EMULATED
    selfmod_bwd_cpu(p, parallel_for);
#endif
}

using Forward = std::tuple<Tensor, Matrices, Matrices, Tensor>;

Forward selfmod(const Tensor& x, const Tensor& q, at::TensorList weights, const Tensor& lr_bias,
                const Tensor& retention_bias, at::TensorList anchor,
                const optional<Tensor>& position, const optional<Tensor>& cu_seqlens,
                int64_t chunk_size, double lr_max, std::string_view activation,
                std::string_view objective, std::string_view read, int64_t checkpoint_every) {
    Inputs in = gather(x, q, weights, lr_bias, retention_bias, anchor, position, cu_seqlens,
                       {chunk_size, lr_max, activation, objective, read, checkpoint_every});
    SelfmodParams& p = in.params;
    Tensor o = in.empty_rows(), checkpoints = at::empty({0}, in.states);
    const Matrices final_weights = in.empty_states(), final_anchor = in.empty_states();
    if (checkpoint_every > 0) checkpoints = at::empty(checkpoint_sizes(p, x.size(0)), in.states);
    p.o = token_tensor(o), p.checkpoints = checkpoints.data_ptr();
    set_states(p.final_weights, final_weights), set_states(p.final_anchor, final_anchor);
    run_forward(in);
    return {o, final_weights, final_anchor, checkpoints};
}

using Backward = std::tuple<Tensor, Tensor, Matrices, Tensor, Tensor, Matrices>;

Backward selfmod_backward(const optional<Tensor>& d_o, at::TensorList d_weights,
                          at::TensorList d_anchor, const Tensor& x, const Tensor& q,
                          at::TensorList weights, const Tensor& lr_bias,
                          const Tensor& retention_bias, at::TensorList anchor,
                          const optional<Tensor>& position, const optional<Tensor>& cu_seqlens,
                          const Tensor& checkpoints, int64_t chunk_size, double lr_max,
                          std::string_view activation, std::string_view objective,
                          std::string_view read, int64_t checkpoint_every) {
    TORCH_CHECK_VALUE(checkpoint_every > 0, "checkpoint_every: expected a positive number, got ",
                      checkpoint_every);
    Inputs in = gather(x, q, weights, lr_bias, retention_bias, anchor, position, cu_seqlens,
                       {chunk_size, lr_max, activation, objective, read, checkpoint_every});
    SelfmodParams& p = in.params;
    TORCH_CHECK_VALUE(checkpoints.is_contiguous() &&
                          checkpoints.scalar_type() == accumulation_of(x) &&
                          checkpoints.sizes() == checkpoint_sizes(p, x.size(0)),
                      "checkpoints: not those of this forward");
    p.checkpoints = checkpoints.data_ptr();
    auto of_states = [&](const char* name, at::TensorList gradients) {
        TORCH_CHECK_VALUE(gradients.empty() || gradients.size() == weights.size(), name,
                          ": expected as many matrices as weights, got ", gradients.size());
        Matrices checked;
        for (size_t i = 0; i < gradients.size(); i++)
            checked.push_back(checked_gradient(name, gradients[i], in.sizes_of(static_cast<int>(i)),
                                               accumulation_of(x), x.device()));
        return checked;
    };
    Tensor from_o = checked_gradient("d_o", d_o, x.sizes(), x.scalar_type(), x.device());
    if (from_o.defined() && on_cuda(x)) from_o = with_aligned_rows(from_o);
    const Matrices from_weights = of_states("d_weights", d_weights),
                   from_anchor = of_states("d_anchor", d_anchor);
    p.d_o = token_tensor(from_o);
    set_states(p.d_final_weights, from_weights), set_states(p.d_final_anchor, from_anchor);

    const Tensor d_x = in.empty_rows(), d_q = in.empty_rows(), d_lr_bias = in.empty_bias(),
                 d_retention_bias = in.empty_bias();
    const Matrices d_start = in.empty_states();
    // The CUDA kernel wants to write it always.
    Matrices d_first_anchor = in.empty_states(!anchor.empty() || on_cuda(x));
    p.d_x = token_tensor(d_x), p.d_q = token_tensor(d_q);
    p.d_lr_bias = matrix_tensor(d_lr_bias), p.d_retention_bias = matrix_tensor(d_retention_bias);
    set_states(p.d_weights, d_start), set_states(p.d_anchor, d_first_anchor);
    run_backward(in);
    if (anchor.empty()) d_first_anchor.clear();
    return {d_x, d_q, d_start, d_lr_bias, d_retention_bias, d_first_anchor};
}

}  // namespace
}  // namespace hope

HOPE_OPERATORS(library) {
    library.impl("selfmod", &hope::selfmod);
    library.impl("selfmod_backward", &hope::selfmod_backward);
}
