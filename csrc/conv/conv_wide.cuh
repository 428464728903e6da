// The convolution's CUDA kernels for any width and any strides: one channel per lane. d_z goes
// through the workspace, [B, T, C] in float behind the weights' partial gradients.
#pragma once
#include "conv/conv_plan.cuh"

namespace hope {
namespace {

constexpr int kWideRun = 8;  // sums under way, of neighbouring tokens or of neighbouring taps

DEVICE float* d_z_row(const ConvParams& p, const ConvPlan& plan, int64_t batch, int64_t token) {
    return p.workspace + plan.partials(p) + (batch * p.tokens + token) * p.channels;
}

// The block's weights [K, 32 lanes].
DEVICE void stage_weights(float* staged, const ConvParams& p, const Place& place) {
    const int width = static_cast<int>(p.width);
    const float* const from = static_cast<const float*>(p.weight) + place.first_channel * width;
    const int64_t left = (p.channels - place.first_channel) * width;
    for (int i = place.thread; i < 32 * width; i += kThreads)
        staged[i % width * 32 + i / width] = i < left ? from[i] : 0.0f;
    __syncthreads();
}

// sum[r] = sum over k of weight[k] * input(r + k), for r < count: inputs go past the sums, which
// see their taps in ascending order. input(i) is called once for every i.
template <class Input>
DEVICE void stream(float (&sum)[kWideRun], const float* weight, int width, int count, Input input) {
    float tap[kWideRun] = {};  // tap[r] = weight[i - r]
#pragma unroll
    for (int r = 0; r < kWideRun; r++) sum[r] = 0.0f;
    for (int i = 0; i < count + width - 1; i++) {
#pragma unroll
        for (int r = kWideRun - 1; r > 0; r--) tap[r] = tap[r - 1];
        if (i < width) tap[0] = weight[i * 32 + threadIdx.x];
        const float x = input(i);
#pragma unroll
        for (int r = 0; r < kWideRun; r++)
            if (i >= r && i - r < width) sum[r] = fmaf(tap[r], x, sum[r]);
    }
}

// Forward: y and the final tail. Backward: d_z.
template <class E, bool Backward>
__global__ void __launch_bounds__(kThreads) conv_wide(ConvParams p, ConvPlan plan) {
    SHARED_ARRAY(float, weight, kConvMaxWidthCuda * 32);
    const Place place(p.channels, 1);
    stage_weights(weight, p, place);
    if (place.channel >= p.channels) return;
    const int width = static_cast<int>(p.width);
    if (place.row >= plan.segments) {
        const int64_t row = place.row - plan.segments;
        if (Backward || row >= p.sequences * (width - 1)) return;
        const int64_t n = row / (width - 1), j = row % (width - 1);
        const E* const from = last_input_row<E>(p, n, j);
        row_of<E>(p.final_tail, n, j)[place.channel] =
            from ? from[place.channel] : from_float<E>(0.0f);
        return;
    }
    Segment segment(p, plan, place.row);
    for (Piece at; segment.next(p, at);)
        for (int64_t t = at.begin; t < at.end; t += kWideRun) {
            const int count = static_cast<int>(min(at.end - t, int64_t{kWideRun}));
            float z[kWideRun];
            stream(z, weight, width, count, [&](int i) {
                return load_or_zero(input_row<E>(p, at.of, t + i - (width - 1)), place.channel);
            });
#pragma unroll
            for (int r = 0; r < kWideRun; r++) {
                if (r >= count) continue;
                if constexpr (Backward) {
                    const E* const d_y =
                        p.d_y.data ? row_of<E>(p.d_y, at.of.batch, t + r) : nullptr;
                    d_z_row(p, plan, at.of.batch, t + r)[place.channel] =
                        through_activation(load_or_zero(d_y, place.channel), z[r], p.silu);
                } else {
                    row_of<E>(p.y, at.of.batch, t + r)[place.channel] =
                        from_float<E>(activate(z[r], p.silu));
                }
            }
        }
}

template <class E>
__global__ void __launch_bounds__(kThreads) conv_wide_d_x(ConvParams p, ConvPlan plan) {
    SHARED_ARRAY(float, weight, kConvMaxWidthCuda * 32);
    const Place place(p.channels, 1);
    stage_weights(weight, p, place);
    if (place.channel >= p.channels || place.row >= plan.segments) return;
    const int width = static_cast<int>(p.width);
    Segment segment(p, plan, place.row);
    for (Piece at; segment.next(p, at);)
        for (int64_t t = at.begin; t < at.end; t += kWideRun) {
            const int count = static_cast<int>(min(at.end - t, int64_t{kWideRun}));
            float d_x[kWideRun];  // of tokens from last on, backwards: their taps ascend too
            const int64_t last = t + count - 1;
            stream(d_x, weight, width, count, [&](int i) {
                const int64_t token = last + width - 1 - i;
                return token < at.of.stop ? d_z_row(p, plan, at.of.batch, token)[place.channel]
                                          : 0.0f;
            });
#pragma unroll
            for (int r = 0; r < kWideRun; r++) {
                if (r >= count) continue;
                const float edge = load_or_zero(edge_row<E>(p, at.of, last - r), place.channel);
                row_of<E>(p.d_x, at.of.batch, last - r)[place.channel] =
                    from_float<E>(d_x[r] + edge);
            }
        }
}

// The weights' gradient of a block's segments; blockIdx.y chooses kWideRun taps.
template <class E>
__global__ void __launch_bounds__(kThreads) conv_wide_d_weight(ConvParams p, ConvPlan plan) {
    SHARED_ARRAY(float, sums, kSegmentsPerBlock * kWideRun * 32);
    const Place place(p.channels, 1);
    const int lag = static_cast<int>(blockIdx.y) * kWideRun;  // tap K - 1 - lag - r is d_weight[r]
    float d_weight[kWideRun] = {};
    if (place.channel < p.channels && place.row < plan.segments) {
        Segment segment(p, plan, place.row);
        for (Piece at; segment.next(p, at);) {
            float x[kWideRun] = {};  // x[r]: the input `lag` + r tokens before
#pragma unroll
            for (int r = 1; r < kWideRun; r++)
                x[r - 1] = load_or_zero(input_row<E>(p, at.of, at.begin - lag - r), place.channel);
            for (int64_t t = at.begin; t < at.end; t++) {
#pragma unroll
                for (int r = kWideRun - 1; r > 0; r--) x[r] = x[r - 1];
                x[0] = load_or_zero(input_row<E>(p, at.of, t - lag), place.channel);
                const float d_z = d_z_row(p, plan, at.of.batch, t)[place.channel];
#pragma unroll
                for (int r = 0; r < kWideRun; r++) d_weight[r] = fmaf(d_z, x[r], d_weight[r]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < kWideRun; r++)
        sums[(threadIdx.y * kWideRun + r) * 32 + threadIdx.x] = d_weight[r];
    __syncthreads();
    const int64_t tap = p.width - 1 - lag - threadIdx.y;  // warp r sums tap r
    if (tap < 0 || place.channel >= p.channels) return;
    float sum = 0.0f;
    for (int segment = 0; segment < kSegmentsPerBlock; segment++)
        sum += sums[(segment * kWideRun + threadIdx.y) * 32 + threadIdx.x];
    p.workspace[(place.block * p.channels + place.channel) * p.width + tap] = sum;
}

// ---- both paths --------------------------------------------------------------------------------

// d_z from the workspace, or computed again if the narrow kernel kept it to itself.
template <class E>
DEVICE float d_z_at(const ConvParams& p, const ConvPlan& plan, bool narrow, const Sequence& of,
                    int64_t token, int64_t channel) {
    if (!narrow) return d_z_row(p, plan, of.batch, token)[channel];
    const float* const weight = static_cast<const float*>(p.weight) + channel * p.width;
    float z = 0.0f;
    for (int k = 0; k < p.width; k++)
        z = fmaf(weight[k], load_or_zero(input_row<E>(p, of, token + k - (p.width - 1)), channel),
                 z);
    const E* const d_y = p.d_y.data ? row_of<E>(p.d_y, of.batch, token) : nullptr;
    return through_activation(load_or_zero(d_y, channel), z, p.silu);
}

// The gradient of the inputs before each sequence: rows are those of d_tail.
template <class E>
__global__ void __launch_bounds__(kThreads) conv_d_tail(ConvParams p, ConvPlan plan, bool narrow) {
    const Place place(p.channels, 1);
    const int64_t before = p.width - 1;
    if (place.channel >= p.channels || place.row >= p.sequences * before) return;
    const int64_t n = place.row / before, i = place.row % before;
    const Sequence of = sequence(p, n);
    const float* const weight = static_cast<const float*>(p.weight) + place.channel * p.width;
    float sum = 0.0f;
    for (int64_t k = 0; k <= i; k++)  // token i - k of the sequence has the row under tap k
        if (of.start + i - k < of.stop)
            sum = fmaf(weight[k], d_z_at<E>(p, plan, narrow, of, of.start + i - k, place.channel),
                       sum);
    sum += load_or_zero(edge_row<E>(p, of, of.start + i - before), place.channel);
    row_of<E>(p.d_tail, n, i)[place.channel] = from_float<E>(sum);
}

// d_weight [C, K] = the sum of the blocks' parts, in a fixed order.
constexpr int kSumRows = 16;
__global__ void __launch_bounds__(32 * kSumRows)
    conv_sum_partials(const float* partials, float* d_weight, int64_t blocks, int64_t count) {
    SHARED_ARRAY(float, sums, kSumRows * 32);
    const int64_t column = blockIdx.x * int64_t{32} + threadIdx.x;
    float sum = 0.0f;
    if (column < count)
        for (int64_t block = threadIdx.y; block < blocks; block += kSumRows)
            sum += partials[block * count + column];
    sums[threadIdx.y * 32 + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= count) return;
    for (int row = 1; row < kSumRows; row++) sum += sums[row * 32 + threadIdx.x];
    d_weight[column] = sum;
}

// ---- launches ----------------------------------------------------------------------------------

inline int64_t tail_rows(const ConvParams& p) { return p.sequences * (p.width - 1); }

template <class E>
void launch_wide(const ConvParams& p, const ConvPlan& plan, bool backward, cudaStream_t stream) {
    const unsigned tails = grid_over(plan.segments + tail_rows(p), p.channels, 1),
                   grid = grid_over(plan.segments, p.channels, 1);
    if (!backward && tails) launch(conv_wide<E, false>, tails, kBlock, 0, stream, p, plan);
    if (!backward || !grid) return;
    launch(conv_wide<E, true>, grid, kBlock, 0, stream, p, plan);
    launch(conv_wide_d_x<E>, grid, kBlock, 0, stream, p, plan);
    const unsigned groups = static_cast<unsigned>(parts(p.width, kWideRun));
    launch(conv_wide_d_weight<E>, dim3(grid, groups), kBlock, 0, stream, p, plan);
}

// After either path: the gradients of tail and weights.
template <class E>
void finish_backward(const ConvParams& p, const ConvPlan& plan, bool narrow, cudaStream_t stream) {
    if (const unsigned grid = p.d_tail.data ? grid_over(tail_rows(p), p.channels, 1) : 0)
        launch(conv_d_tail<E>, grid, kBlock, 0, stream, p, plan, narrow);
    const int64_t count = p.channels * p.width;
    launch(conv_sum_partials, static_cast<unsigned>(parts(count, 32)), dim3(32, kSumRows), 0,
           stream, static_cast<const float*>(p.workspace), static_cast<float*>(p.d_weight),
           plan.segment_blocks(), count);
}

}  // namespace
}  // namespace hope
