// What the continuum memory system does besides products: one pass over rows or over states.
#pragma once
#include "cms/cms_chunk.cuh"

namespace hope {

constexpr int kCmsThreads = 256, kCmsWarps = kCmsThreads / 32;
constexpr int kCmsPart = 16 * kCmsThreads;  // numbers of a state that a block sees to

// body(layer, place in its matrix, place in the state) for pairs of neighbours, this block's part.
template <class E, class Body>
DEVICE void for_state_pairs(const CmsLaunch<E>& of, int part, const Body& body) {
    const int64_t size = of.layer_size();
#pragma unroll 4
    for (int i = 0; i < kCmsPart / kCmsThreads / 2; i++) {
        const int64_t place =
            static_cast<int64_t>(part) * kCmsPart + (i * kCmsThreads + threadIdx.x) * 2;
        if (place >= 2 * size) continue;
        const int layer = place >= size;
        body(layer, place - layer * size, place);
    }
}

// The weights at the group's start, rounded.
template <class E>
__global__ void __launch_bounds__(kCmsThreads)
    cms_round_kernel(GRID_CONSTANT const CmsLaunch<E> of) {
    const CmsChunk<E> c(of, static_cast<int>(blockIdx.x) / of.blocks);
    const bool for_all = of.chunk == 0 && of.one_start;
    if (!for_all && !c.exists()) return;
    const float *const first = c.weights_at(of.chunk, 0), *const second = c.weights_at(of.chunk, 1);
    E* const rounded = c.rounded_at(of.chunk, 0);  // both layers
    for_state_pairs(of, static_cast<int>(blockIdx.x) % of.blocks,
                    [&](int layer, int64_t place, int64_t all) {
                        const float2 w = pair_at((layer ? second : first) + place);
                        pair_at(rounded + all) = pack<E>(w.x, w.y);
                    });
}

// What a sequence without a chunk, or whose last one has not been written by its chunks, ends with.
template <class E>
__global__ void __launch_bounds__(kCmsThreads)
    cms_finish_kernel(GRID_CONSTANT const CmsLaunch<E> of) {
    const CmsParams& p = of.p;
    const CmsChunk<E> c(of, static_cast<int>(blockIdx.x) / of.blocks);
    const int chunks = c.in.chunks();
    const bool ends = !c.in.ends_inside_chunk();  // with a complete chunk, or none at all
    int64_t unused = 0, end = 0;                  // slots of checkpoints
    if (p.checkpoint_every) {
        unused = c.first_slot() + (chunks ? (chunks - 1) / p.checkpoint_every : 0);
        end = c.end_slot();
    }
    for_state_pairs(
        of, static_cast<int>(blockIdx.x) % of.blocks, [&](int layer, int64_t place, int64_t all) {
            if (p.keeps_state) {
                if (chunks == 0 || (chunks == 1 && !ends))
                    pair_at(c.of_sequence(p.final_weights, layer) + place) =
                        pair_at(c.of_sequence(p.weights, layer) + place);
                const float* const given = c.of_sequence(p.pending, layer);
                float2& pending = pair_at(c.of_sequence(p.final_pending, layer) + place);
                if (chunks == 0 && given)
                    pending = pair_at(given + place);
                else if (chunks == 0 || ends)
                    pending = make_float2(0, 0);
            }
            for (int64_t slot = unused; slot < end; slot++)
                pair_at(c.slot(slot) + all) = make_float2(0, 0);
        });
}

// The gradients that the backward starts from, and the last chunk's lesson.
template <class E>
__global__ void __launch_bounds__(kCmsThreads)
    cms_start_kernel(GRID_CONSTANT const CmsLaunch<E> of) {
    const CmsParams& p = of.p;
    const CmsChunk<E> c(of, static_cast<int>(blockIdx.x) / of.blocks);
    const bool ends = !c.in.ends_inside_chunk();
    const auto or_zero = [](const float* from, int64_t place) {
        return from ? pair_at(from + place) : make_float2(0, 0);
    };
    for_state_pairs(of, static_cast<int>(blockIdx.x) % of.blocks,
                    [&](int layer, int64_t place, int64_t all) {
                        const float2 d_w = or_zero(c.of_sequence(p.d_final_weights, layer), place),
                                     d_p = or_zero(c.of_sequence(p.d_final_pending, layer), place);
                        pair_at(c.of_sequence(p.d_weights, layer) + place) = d_w;
                        if constexpr (CmsLaunch<E>::kRounds)
                            pair_at(c.of_state(of.scratch.lesson, 0, 0) + all) =
                                ends ? pack<E>(d_w.x, d_w.y) : pack<E>(d_p.x, d_p.y);
                        float* const d_pending = c.of_sequence(p.d_pending, layer);
                        if (d_pending && c.in.chunks() == 0) pair_at(d_pending + place) = d_p;
                    });
}

// S = lr * E: d_lr, and what the errors give to the target and, for l2, to Y. A warp for each row.
template <class E>
__global__ void __launch_bounds__(kCmsThreads)
    cms_errors_kernel(GRID_CONSTANT const CmsLaunch<E> of) {
    const CmsParams& p = of.p;
    const CmsChunk<E> c(of, static_cast<int>(blockIdx.x) / of.blocks);
    const int t =
        static_cast<int>(blockIdx.x) % of.blocks * kCmsWarps + static_cast<int>(threadIdx.x) / 32;
    if (!c.exists() || t >= c.rows) return;
    const bool learned = c.learns();
    const float sign = c.sign(), lr = learned ? c.rate(t) : 0.0f;
    const float to_output = p.objective == CmsObjective::l2 ? lr : 0.0f;
    const float to_target = (p.objective == CmsObjective::teach ? sign : -sign) * lr;
    float d_lr = 0;
    for (int d = static_cast<int>(threadIdx.x) % 32 * 2; d < c.dim(); d += 64) {
        float2 d_s = make_float2(0, 0), d_y = d_s;
        if (learned) {
            const float2 e = pair_at(c.e().at(t, d));
            d_s = pair_at(c.d_s().at(t, d));
            d_lr += d_s.x * e.x + d_s.y * e.y;
        }
        if (p.d_y.data) d_y = unpack<E>(pair_at(c.tokens(p.d_y).at(t, d)));
        pair_at(c.d_y().at(t, d)) =
            pack<E>(sign * d_y.x + to_output * d_s.x, sign * d_y.y + to_output * d_s.y);
        pair_at(c.tokens(p.d_target).at(t, d)) = pack<E>(to_target * d_s.x, to_target * d_s.y);
    }
#pragma unroll
    for (int distance = 16; distance; distance /= 2) d_lr += __shfl_xor_sync(~0u, d_lr, distance);
    if (threadIdx.x % 32 == 0) *token<float>(p.d_lr, c.in, c.first + t) = sign * d_lr;
}

}  // namespace hope
