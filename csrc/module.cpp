// The table of contents of the native code: the schema of every operator, and the Python module
// `_C`, which holds the facts of the build and nothing else. Importing it registers the operators
// as torch.ops.hope.*. The emulator's build (HOPE_EMULATED) is a library without a Python module.

#include <torch/library.h>

#include "common/library.h"

#ifndef HOPE_EMULATED
#include <pybind11/pybind11.h>

#include "build_facts.h"

#ifdef HOPE_WITH_CUDA
#include <pybind11/stl.h>

#include "selftest/selftest.h"
#endif
#endif

HOPE_SCHEMAS(m) {
    // The short causal convolution (docs/ops/conv.md).
    m.def(
        "conv(Tensor x, Tensor weight, Tensor? tail, Tensor? cu_seqlens, str activation) -> "
        "(Tensor y, Tensor tail)");
    m.def(
        "conv_backward(Tensor? d_y, Tensor? d_tail, Tensor x, Tensor weight, Tensor? tail, "
        "Tensor? cu_seqlens, str activation) -> (Tensor x, Tensor weight, Tensor tail)");
    // The multi-frequency step (docs/ops/multifreq.md): an optimizer's, in place. Moments are
    // absent with the rule "sgd"; what is pending may have 0 elements where the period is 1.
    m.def(
        "multifreq_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] pending, Tensor(c!)[] "
        "exp_avgs, Tensor(d!)[] exp_avg_sqs, int[] periods, int step, float lr, float beta1, float "
        "beta2, float eps, float weight_decay, str rule) -> ()");
    // The Newton-Schulz iteration (docs/ops/newton_schulz.md).
    m.def("newton_schulz(Tensor g, int steps, float a, float b, float c, float eps) -> Tensor");
    // The Titans memory (docs/ops/titans.md): weights w, momenta s and anchors a of its one or two
    // layers, [N, H, ., .]; norms are [N, H, V]. Absent ones are returned with 0 elements.
    m.def(
        "titans(Tensor q, Tensor k, Tensor v, Tensor lr, Tensor? momentum, Tensor? decay, "
        "Tensor w1, Tensor? w2, Tensor? s1, Tensor? s2, Tensor? a1, Tensor? a2, Tensor? "
        "norm_weight, Tensor? norm_bias, Tensor? position, Tensor? cu_seqlens, int chunk_size, "
        "str activation, bool residual, str objective, str read, float norm_eps, int "
        "checkpoint_every) -> (Tensor o, Tensor w1, Tensor w2, Tensor s1, Tensor s2, Tensor a1,"
        " Tensor a2, Tensor checkpoints)");
    m.def(
        "titans_backward(Tensor? d_o, Tensor? d_w1, Tensor? d_w2, Tensor? d_s1, Tensor? d_s2, "
        "Tensor? d_a1, Tensor? d_a2, Tensor q, Tensor k, Tensor v, Tensor lr, Tensor? momentum,"
        " Tensor? decay, Tensor w1, Tensor? w2, Tensor? s1, Tensor? s2, Tensor? a1, Tensor? a2,"
        " Tensor? norm_weight, Tensor? norm_bias, Tensor? position, Tensor? cu_seqlens, Tensor "
        "checkpoints, int chunk_size, str activation, bool residual, str objective, str read, "
        "float norm_eps, int checkpoint_every) -> (Tensor q, Tensor k, Tensor v, Tensor lr, "
        "Tensor momentum, Tensor decay, Tensor w1, Tensor w2, Tensor s1, Tensor s2, Tensor a1, "
        "Tensor a2, Tensor norm_weight, Tensor norm_bias)");
    // HOPE's self-modifying memory (docs/ops/selfmod.md): the matrices [N, H, ., .] of k, v, lr,
    // retention and memory in turn, one or two of each; biases are [N, H]. Lists may be empty:
    // without anchors a call starts at a chunk boundary, without gradients they are zero.
    m.def(
        "selfmod(Tensor x, Tensor q, Tensor[] weights, Tensor lr_bias, Tensor retention_bias, "
        "Tensor[] anchor, Tensor? position, Tensor? cu_seqlens, int chunk_size, float lr_max, str "
        "activation, str objective, str read, int checkpoint_every) -> (Tensor o, Tensor[] "
        "weights, Tensor[] anchor, Tensor checkpoints)");
    m.def(
        "selfmod_backward(Tensor? d_o, Tensor[] d_weights, Tensor[] d_anchor, Tensor x, Tensor q, "
        "Tensor[] weights, Tensor lr_bias, Tensor retention_bias, Tensor[] anchor, Tensor? "
        "position, Tensor? cu_seqlens, Tensor checkpoints, int chunk_size, float lr_max, str "
        "activation, str objective, str read, int checkpoint_every) -> (Tensor x, Tensor q, "
        "Tensor[] weights, Tensor lr_bias, Tensor retention_bias, Tensor[] anchor)");
    // The continuum memory system (docs/ops/cms.md): weights w and pending gradients p of its two
    // layers, [N, ., .]. States are returned with 0 elements unless keeps_state, checkpoints with
    // checkpoint_every 0.
    m.def(
        "cms(Tensor x, Tensor target, Tensor lr, Tensor w1, Tensor w2, Tensor? p1, Tensor? p2, "
        "Tensor? position, Tensor? cu_seqlens, int chunk_size, str activation, str objective, "
        "float decay, bool residual, bool keeps_state, int checkpoint_every) -> (Tensor y, Tensor "
        "w1, Tensor w2, Tensor p1, Tensor p2, Tensor checkpoints)");
    m.def(
        "cms_backward(Tensor? d_y, Tensor? d_w1, Tensor? d_w2, Tensor? d_p1, Tensor? d_p2, Tensor "
        "x, Tensor target, Tensor lr, Tensor w1, Tensor w2, Tensor? p1, Tensor? p2, Tensor? "
        "position, Tensor? cu_seqlens, Tensor checkpoints, int chunk_size, str activation, str "
        "objective, float decay, bool residual, int checkpoint_every) -> (Tensor x, Tensor target,"
        " Tensor lr, Tensor w1, Tensor w2, Tensor p1, Tensor p2)");
}

#ifndef HOPE_EMULATED

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang++ " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

py::dict build_facts() {
    py::dict facts;
    facts["version"] = HOPE_BUILD_VERSION;
    facts["torch"] = HOPE_BUILD_TORCH;
    facts["cuda"] = HOPE_BUILD_CUDA;
    facts["architectures"] = HOPE_BUILD_ARCHITECTURES;
    facts["compiler"] = kCompiler;
    facts["revision"] = HOPE_BUILD_REVISION;
    facts["cxx_flags"] = HOPE_BUILD_CXX_FLAGS;
    facts["nvcc_flags"] = HOPE_BUILD_NVCC_FLAGS;
    return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The native half of hope_ext: registers its operators, and knows how it was built.";
    m.def("build_facts", &build_facts,
          "What this extension was built from, and with; absent facts are empty strings.");
#ifdef HOPE_WITH_CUDA
    m.def("run_selftests", &hope::run_selftests,
          "Run the CUDA primitives' self-tests on the current GPU: (name, \"\" or what went wrong) "
          "of each.");
#endif
}

#endif
