// The linear Titans memory, forward: o and the final state.
//
//   W^T, S^T [D_v x D] of a (sequence, head) stay in the accumulators of state warps, 16 value
//   columns each, from its first token to its last; the columns of D_v are independent, so they may
//   be spread over several blocks. Per segment of a chunk, transposed, with A, b, c, m from the
//   gates (titans_pipeline.cuh; docs/derivations.md):
//
//       e^T = V^T - W_anchor^T K^T               (V^T for the dot objective)
//       O^T = b * W^T Q^T + c * S^T Q^T + e^T (QK^T * A)^T
//       W^T = b' W^T + c' S^T + (e^T * in_weights) K,    S^T = m S^T + (e^T * in_momenta) K
//
//   A result's layout is that of a left operand, so the chain W -> e -> W never leaves the
//   registers; K, Q and the scores are right operands from shared memory. Grid: (N * H, groups of
//   value columns).
#include "titans/titans_cuda.h"
#include "titans/titans_launch.cuh"
#include "titans/titans_states.cuh"

namespace hope {
namespace {

template <class E, int D>
__global__ void __launch_bounds__(kMostThreads, 1)
    titans_linear_fwd_kernel(const TitansParams p, int columns, int stages) {
    constexpr int kRows = kTokens<E, D>;
    const PipelineLayout<E, D> shared(SharedCarver(dynamic_shared()), stages, columns);
    const Sequence<kRows> in(p, static_cast<int>(blockIdx.x / p.heads),
                             static_cast<int>(blockIdx.x % p.heads));
    const int value = static_cast<int>(blockIdx.y) * columns;
    const int count = in.segments_before(in.chunks());
    const auto order = [&](int i) { return in.segment(i); };
    if (static_cast<int>(threadIdx.x) >= columns * 2) {
        Helpers<E, D>(shared, p, in, p.v, p.o, value, columns).template run<true>(count, order);
        return;
    }
    StateWarp<E, D> state(shared, p, in, value, columns);
    state.start();
    for (int i = 0; i < count; i++) {
        const Segment at = order(i);
        state.leave(at);
        state.template step<true>(i, at);
    }
    state.finish();
    if (p.checkpoint_every && blockIdx.y == 0 && threadIdx.x < 32) clear_unused_checkpoints(p, in);
}

}  // namespace

void titans_linear_fwd_cuda(const TitansParams& params, void* stream) {
    if (params.sequences * params.heads == 0) return;
    for_instance(params, [&](auto element, auto key) {
        using E = typename decltype(element)::type;
        constexpr int kKey = decltype(key)::value;
        const PipelinePlan plan = pipeline_plan<E, kKey>(params, params.sequences * params.heads);
        launch(titans_linear_fwd_kernel<E, kKey>, plan.grid, plan.block, plan.shared_bytes,
               static_cast<cudaStream_t>(stream), params, plan.columns, plan.stages);
    });
}

}  // namespace hope
