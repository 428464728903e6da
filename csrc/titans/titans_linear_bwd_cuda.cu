// The linear Titans memory, backward: three kernels go over the tokens in windows
// (titans_windows.cuh), from the last to the first.
//
//   states     forward from a checkpoint through the window's chunks: W and S before every segment.
//              The walk of the forward kernel without its reads; grid (N * H, value columns)
//   gradients  backward, dW^T and dS^T in the accumulators of state warps (titans_gradients.cuh):
//
//                  dV^T = in_weights * dW^T K^T + in_momenta * dS^T K^T + dO^T (QK^T * A)
//                  dS^T = c' dW^T + m dS^T + (c * dO)^T Q
//                  dW^T = b' dW^T + (b * dO)^T Q - dV^T K
//
//              and dW, dS after every segment; the same grid
//   tokens     dQ, dK and the gates' gradients of all segments at once (titans_tokens.cuh);
//              grid (segments of the window, H)
//
// The states pass between them rounded, as they enter products.
#include "titans/titans_cuda.h"
#include "titans/titans_gradients.cuh"
#include "titans/titans_launch.cuh"
#include "titans/titans_states.cuh"
#include "titans/titans_tokens.cuh"

namespace hope {
namespace {

template <class E, int D>
__global__ void __launch_bounds__(kMostThreads, 1)
    titans_linear_states_kernel(const TitansParams p, const TitansWindow<E, D> window, int columns,
                                int stages) {
    constexpr int kRows = kTokens<E, D>;
    const PipelineLayout<E, D> shared(SharedCarver(dynamic_shared()), stages, columns);
    const Sequence<kRows> in(p, static_cast<int>(blockIdx.x / p.heads),
                             static_cast<int>(blockIdx.x % p.heads));
    const auto chunks = window.chunks_of(p, in);
    if (chunks.first >= chunks.last) return;
    const int value = static_cast<int>(blockIdx.y) * columns;
    const int every = static_cast<int>(p.checkpoint_every), start = chunks.first / every * every;
    const int first = in.segments_before(start), count = in.segments_before(chunks.last) - first;
    const auto order = [&](int i) { return in.segment(first + i); };
    if (static_cast<int>(threadIdx.x) >= columns * 2) {
        Helpers<E, D>(shared, p, in, p.v, p.o, value, columns).template run<false>(count, order);
        return;
    }
    StateWarp<E, D> state(shared, p, in, value, columns);
    if (start > 0)
        state.start_from(checkpoint(p, in, start));
    else
        state.start(in.offset ? window.anchor(p, in, 0) : nullptr);
    for (int i = 0; i < count; i++) {
        const Segment at = order(i);
        if (at.chunk >= chunks.first)
            state.leave_rounded(window.tile(p, in, at.chunk, at.part, kWeights),
                                window.tile(p, in, at.chunk, at.part, kMomenta));
        state.template step<false>(i, at);
    }
}

template <class E, int D>
__global__ void __launch_bounds__(kMostThreads, 1)
    titans_linear_gradients_kernel(const TitansParams p, const TitansWindow<E, D> window,
                                   int columns, int stages) {
    constexpr int kRows = kTokens<E, D>;
    const PipelineLayout<E, D> shared(SharedCarver(dynamic_shared()), stages, columns);
    const Sequence<kRows> in(p, static_cast<int>(blockIdx.x / p.heads),
                             static_cast<int>(blockIdx.x % p.heads));
    const auto chunks = window.chunks_of(p, in);
    if (!chunks.any()) return;
    const int value = static_cast<int>(blockIdx.y) * columns;
    const int first = in.segments_before(chunks.first),
              count = in.segments_before(chunks.last) - first;
    const auto order = [&](int i) { return in.segment(first + count - 1 - i); };
    if (static_cast<int>(threadIdx.x) >= columns * 2) {
        Helpers<E, D>(shared, p, in, p.d_o, p.d_v, value, columns).template run<true>(count, order);
        return;
    }
    GradientWarp<E, D> gradients(shared, p, in, value, columns);
    if (chunks.ends)
        gradients.start();
    else
        gradients.go_on();
    for (int i = 0; i < count; i++) {
        const Segment at = order(i);
        gradients.leave_rounded(window.tile(p, in, at.chunk, at.part, kWeightsGradient),
                                window.tile(p, in, at.chunk, at.part, kMomentaGradient));
        if (at.first == 0) gradients.leave_products(window.products(p, in));
        gradients.step(i, at);
    }
    gradients.stop(chunks.starts);
}

template <class E, int D>
__global__ void __launch_bounds__(TokensLayout<E, D>::kThreads, 1)
    titans_linear_tokens_kernel(const TitansParams p, const TitansWindow<E, D> window,
                                int columns) {
    constexpr int kRows = kTokens<E, D>;
    const TokensLayout<E, D> shared(SharedCarver(dynamic_shared()), columns);
    const int parts = Sequence<kRows>::segments_of_chunk(p), slots = window.end - window.begin;
    const int part = static_cast<int>(blockIdx.x) % parts;
    const int slot = static_cast<int>(blockIdx.x) / parts % slots + window.begin;
    const int row = static_cast<int>(blockIdx.x) / parts / slots;
    const Sequence<kRows> in(p, window.sequence_of(p, row, slot), static_cast<int>(blockIdx.y));
    const int chunk = slot - window.first_slot(p, in);
    if (chunk < 0 || chunk >= in.chunks()) return;
    const int segment = in.segments_before(chunk) + part;
    if (segment >= in.segments_before(chunk + 1)) return;
    const Segment at = in.segment(segment);
    const E* states[kStateKinds];
#pragma unroll
    for (int kind = 0; kind < kStateKinds; kind++)
        states[kind] = window.tile(p, in, chunk, part, kind);
    const float* const products = segment == 0 ? window.products(p, in) : nullptr;
    SegmentGradients<E, D>(shared, p, in, at, states, window.anchor(p, in, chunk), products)
        .run(columns);
}

template <class E, int D>
void run(const TitansParams& p, void* scratch, cudaStream_t stream) {
    using Window = TitansWindow<E, D>;
    const int slots = Window::slots(p), capacity = Window::capacity_for(p);
    const PipelinePlan walk = pipeline_plan<E, D>(p, p.sequences * p.heads);
    const auto tokens_bytes = [](int columns) {
        return TokensLayout<E, D>(SharedCarver(nullptr), columns).bytes;
    };
    int columns =
        static_cast<int>(p.value_dim < kMostSliceColumns ? p.value_dim : kMostSliceColumns);
    while (columns > 16 && tokens_bytes(columns) > shared_bytes_of_a_block()) columns /= 2;
    const int segments_of_slot = Window::rows(p) * Sequence<kTokens<E, D>>::segments_of_chunk(p);
    for (int end = slots; end > 0; end -= capacity) {
        const Window window{static_cast<E*>(scratch), end < capacity ? 0 : end - capacity, end,
                            capacity};
        launch(titans_linear_states_kernel<E, D>, walk.grid, walk.block, walk.shared_bytes, stream,
               p, window, walk.columns, walk.stages);
        launch(titans_linear_gradients_kernel<E, D>, walk.grid, walk.block, walk.shared_bytes,
               stream, p, window, walk.columns, walk.stages);
        const dim3 segments(static_cast<unsigned>(segments_of_slot * (end - window.begin)),
                            static_cast<unsigned>(p.heads));
        launch(titans_linear_tokens_kernel<E, D>, segments, dim3(TokensLayout<E, D>::kThreads),
               tokens_bytes(columns), stream, p, window, columns);
    }
}

}  // namespace

int64_t titans_linear_bwd_cuda_scratch(const TitansParams& params) {
    int64_t bytes = 0;
    for_instance(params, [&](auto element, auto key) {
        using E = typename decltype(element)::type;
        constexpr int kKey = decltype(key)::value;
        bytes = TitansWindow<E, kKey>::bytes_of_scratch(params);
    });
    return bytes;
}

void titans_linear_bwd_cuda(const TitansParams& params, void* scratch, void* stream) {
    if (params.sequences * params.heads == 0) return;
    for_instance(params, [&](auto element, auto key) {
        using E = typename decltype(element)::type;
        constexpr int kKey = decltype(key)::value;
        run<E, kKey>(params, scratch, static_cast<cudaStream_t>(stream));
    });
}

}  // namespace hope
