// Host code of the multi-frequency step: fills the Params, launches. Arguments are checked in
// hope_ext/multifreq.py; what is checked here protects memory against a caller of torch.ops.
#include "multifreq/multifreq.h"

#include <ATen/ops/empty_strided.h>

#include <cmath>
#include <utility>

#include "common/cuda_host.h"
#include "common/library.h"

namespace hope {
namespace {

using at::Tensor;

// Kernels walk the tensors of a parameter side by side, in the order in which it lies in memory, or
// in row-major order if it has gaps. Of what lies otherwise copies take part, which are copied back
// in the end.
class Tensors {
 public:
    void* written(const Tensor& tensor, const Tensor& like) {
        if (lies_like(tensor, like)) return bump(tensor).data_ptr();
        copies_.emplace_back(tensor, laid_like(tensor, like));
        return bump(copies_.back().second).data_ptr();
    }
    const void* read(const Tensor& tensor, const Tensor& like) {
        if (lies_like(tensor, like)) return tensor.const_data_ptr();
        return kept_.emplace_back(laid_like(tensor, like)).const_data_ptr();
    }
    void copy_back() const {
        for (const auto& [to, from] : copies_)
            if (!to.is_same(from)) to.copy_(from);
    }

 private:
    static bool lies_like(const Tensor& tensor, const Tensor& like) {
        return (tensor.is_contiguous() && like.is_contiguous()) ||
               (like.is_non_overlapping_and_dense() && tensor.strides() == like.strides());
    }
    static Tensor laid_like(const Tensor& tensor, const Tensor& like) {
        if (!like.is_non_overlapping_and_dense()) return tensor.contiguous();
        return at::empty_strided(like.sizes(), like.strides(), tensor.options()).copy_(tensor);
    }
    // A backward that has saved the tensor notices that it has changed.
    static const Tensor& bump(const Tensor& tensor) {
        tensor.unsafeGetTensorImpl()->bump_version();
        return tensor;
    }
    std::vector<std::pair<Tensor, Tensor>> copies_;
    std::vector<Tensor> kept_;
};

void check_like(const char* name, const Tensor& tensor, const Tensor& parameter,
                at::ScalarType type) {
    TORCH_CHECK_VALUE(tensor.sizes() == parameter.sizes(), name, ": expected shape ",
                      parameter.sizes(), ", got ", tensor.sizes());
    TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, ": expected ", type, ", got ",
                     tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.device() == parameter.device(), name, ": expected device ",
                      parameter.device(), ", got ", tensor.device());
}

void multifreq_(at::TensorList params, at::TensorList grads, at::TensorList pending,
                at::TensorList exp_avgs, at::TensorList exp_avg_sqs, at::IntArrayRef periods,
                int64_t step, double lr, double beta1, double beta2, double eps,
                double weight_decay, std::string_view rule) {
    MultifreqParams p{};
    p.rule = parse<Rule>("rule", rule, {{"sgd", Rule::sgd}, {"adamw", Rule::adamw}});
    const bool has_moments = p.rule == Rule::adamw;
    const size_t count = params.size(), moments = has_moments ? count : 0;
    TORCH_CHECK_VALUE(grads.size() == count && pending.size() == count && periods.size() == count &&
                          exp_avgs.size() == moments && exp_avg_sqs.size() == moments,
                      "grads, pending, periods, moments: expected one for each of params");
    TORCH_CHECK_VALUE(step >= 1, "step: expected 1 or more, got ", step);
    if (!count) return;
    p.lr = lr, p.beta1 = beta1, p.beta2 = beta2, p.eps = eps, p.weight_decay = weight_decay;
    p.mean_correction = 1 / (1 - std::pow(beta1, step));
    p.square_correction = 1 / std::sqrt(1 - std::pow(beta2, step));

    const bool wide = params[0].scalar_type() == at::kDouble;
    Tensors tensors;
    std::vector<MultifreqTensor> table;
    table.reserve(count);
    for (size_t i = 0; i < count; i++) {
        const Tensor &parameter = params[i], &gradient = grads[i];
        for (const Tensor* x : {&parameter, &gradient}) {
            const bool fits =
                wide ? x->scalar_type() == at::kDouble
                     : x->scalar_type() == at::kFloat || x->scalar_type() == at::kBFloat16;
            TORCH_CHECK_TYPE(fits, "params, grads: expected float32 or bfloat16, or all float64");
        }
        TORCH_CHECK_TYPE(!wide || !on_cuda(parameter), "params: float64 is for the CPU");
        TORCH_CHECK_VALUE(parameter.device() == params[0].device(), "params: on several devices");
        TORCH_CHECK_VALUE(periods[i] >= 1, "periods: expected 1 or more, got ", periods[i]);
        check_like("grads", gradient, parameter, gradient.scalar_type());
        const at::ScalarType state = wide ? at::kDouble : at::kFloat;
        const bool keeps = periods[i] > 1 || pending[i].numel() > 0;
        if (keeps) check_like("pending", pending[i], parameter, state);
        if (has_moments) {
            check_like("exp_avgs", exp_avgs[i], parameter, state);
            check_like("exp_avg_sqs", exp_avg_sqs[i], parameter, state);
        }
        if (parameter.numel() == 0) continue;
        MultifreqTensor t{};
        t.parameter_element = element_of(parameter), t.gradient_element = element_of(gradient);
        t.count = parameter.numel(), t.before = p.elements();
        t.due = step % periods[i] == 0;
        t.parameter = t.due ? tensors.written(parameter, parameter)
                            : const_cast<void*>(tensors.read(parameter, parameter));
        t.gradient = tensors.read(gradient, parameter);
        if (keeps) t.pending = tensors.written(pending[i], parameter);
        if (has_moments) {
            t.mean = tensors.written(exp_avgs[i], parameter);
            t.square = tensors.written(exp_avg_sqs[i], parameter);
        }
        table.push_back(t);
        p.tensors = table.data(), p.count = static_cast<int64_t>(table.size());
    }
    if (table.empty()) return;
    HOPE_LAUNCH(params[0], multifreq, p);
    tensors.copy_back();
}

}  // namespace
}  // namespace hope

HOPE_OPERATORS(library) { library.impl("multifreq_", &hope::multifreq_); }
