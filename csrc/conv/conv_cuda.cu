// The short causal convolution on CUDA.
//
//   z[t] = sum over k of weight[k] * x[t + k - (K - 1)],   y = z or silu(z),   per channel
//
// A warp walks one segment of L tokens, its lanes side by side over channels; a block has 8
// segments:
//
//              32 lanes x V channels
//            +----------------------+
//   warp 0   | L tokens, downwards  |   in pieces of one sequence, in runs of R tokens whose rows
//   warp 1   | the next L           |   are all loaded before the first is used
//     ...    |                      |
//   warp 7   |                      |   backward: + K - 1 tokens after it, whose d_z it needs too
//            +----------------------+
//               d_weight of the segment: registers -> sum over the block -> workspace ->
//               sum_partials
//
// Widths 2 to 4 with aligned rows ("narrow", V = 4) keep the window of inputs in registers and do
// everything in one pass; what else there is ("wide", V = 1, conv_wide.cuh) streams inputs past R
// sums and passes d_z through the workspace. Both add the same numbers in the same order, so the
// path taken, which depends on strides, does not show in the result.
#include "conv/conv_wide.cuh"

namespace hope {
namespace {

// ---- narrow: rows of 4 channels ----------------------------------------------------------------

template <class E>
struct alignas(kVector * sizeof(E)) Four {
    Pair<E> low, high;
};

template <class E>
DEVICE void load_row(float (&to)[kVector], const E* from) {
    const Four<E> four = *reinterpret_cast<const Four<E>*>(from);
    const float2 low = unpack<E>(four.low), high = unpack<E>(four.high);
    to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
}

DEVICE void clear_row(float (&row)[kVector]) {
#pragma unroll
    for (int v = 0; v < kVector; v++) row[v] = 0.0f;
}

template <class E>
DEVICE void store_row(E* to, const float (&row)[kVector]) {
    *reinterpret_cast<Four<E>*>(to) = {pack<E>(row[0], row[1]), pack<E>(row[2], row[3])};
}

// The K - 1 inputs before a piece.
template <class E, int K, int Rows>
DEVICE void load_window(float (&window)[Rows][kVector], const ConvParams& p, const Piece& at,
                        int64_t channel) {
#pragma unroll
    for (int j = 0; j < K - 1; j++) {
        const E* const from = input_row<E>(p, at.of, at.begin - (K - 1) + j);
        if (from)
            load_row(window[j], from + channel);
        else
            clear_row(window[j]);
    }
}

template <int K>
DEVICE void load_weights(float (&weight)[K][kVector], const ConvParams& p, int64_t channel) {
    const float* const from = static_cast<const float*>(p.weight) + channel * K;
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int v = 0; v < kVector; v++) weight[k][v] = from[v * K + k];
}

// The sum whose first input is the window's row `row`.
template <int K, int Rows>
DEVICE float convolve(const float (&window)[Rows][kVector], const float (&weight)[K][kVector],
                      int row, int v) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < K; k++) sum = fmaf(weight[k][v], window[row + k][v], sum);
    return sum;
}

template <int Kept, int Rows>
DEVICE void keep_last(float (&rows)[Rows][kVector]) {
#pragma unroll
    for (int j = 0; j < Kept; j++)
#pragma unroll
        for (int v = 0; v < kVector; v++) rows[j][v] = rows[Rows - Kept + j][v];
}

// ---- narrow: forward ---------------------------------------------------------------------------

template <class E, int K>
__global__ void __launch_bounds__(kThreads) conv_fwd(ConvParams p, ConvPlan plan) {
    constexpr int kRun = 8, kRows = K - 1 + kRun;
    const Place place(p.channels, kVector);
    if (place.channel >= p.channels) return;
    if (place.row >= plan.segments) {  // rows of the final tail, after the segments
        const int64_t row = place.row - plan.segments;
        if (row >= p.sequences * (K - 1)) return;
        const int64_t n = row / (K - 1), j = row % (K - 1);
        float last[kVector];
        clear_row(last);
        const E* const from = last_input_row<E>(p, n, j);
        if (from) load_row(last, from + place.channel);
        store_row(row_of<E>(p.final_tail, n, j) + place.channel, last);
        return;
    }
    float weight[K][kVector], window[kRows][kVector];
    load_weights<K>(weight, p, place.channel);
    Segment segment(p, plan, place.row);
    for (Piece at; segment.next(p, at);) {
        load_window<E, K>(window, p, at, place.channel);
        const E* from = row_of<E>(p.x, at.of.batch, at.begin) + place.channel;
        E* to = row_of<E>(p.y, at.of.batch, at.begin) + place.channel;
        for (int64_t t = at.begin; t < at.end; t += kRun) {
#pragma unroll
            for (int r = 0; r < kRun; r++, from += p.x.token)
                if (t + r < at.end) load_row(window[K - 1 + r], from);
#pragma unroll
            for (int r = 0; r < kRun; r++, to += p.y.token) {
                float y[kVector];
#pragma unroll
                for (int v = 0; v < kVector; v++)
                    y[v] = activate(convolve<K>(window, weight, r, v), p.silu);
                if (t + r < at.end) store_row(to, y);
            }
            keep_last<K - 1>(window);
        }
    }
}

// ---- narrow: backward --------------------------------------------------------------------------

template <class E, int K>
__global__ void __launch_bounds__(kThreads, 1) conv_bwd(ConvParams p, ConvPlan plan) {
    constexpr int kRun = 4, kRows = K - 1 + kRun;
    const Place place(p.channels, kVector);
    float d_weight[K][kVector] = {};
    if (place.channel < p.channels && place.row < plan.segments) {
        float weight[K][kVector], x[kRows][kVector], d_z[kRows][kVector];
        load_weights<K>(weight, p, place.channel);
        Segment segment(p, plan, place.row);
        for (Piece at; segment.next(p, at);) {
            load_window<E, K>(x, p, at, place.channel);
            const int64_t live = min(at.end + K - 1, at.of.stop);  // from here on d_z is 0
            const E* from = row_of<E>(p.x, at.of.batch, at.begin) + place.channel;
            for (int64_t t = at.begin; t < at.end + K - 1; t += kRun) {
                float d_y[kRun][kVector];
#pragma unroll
                for (int r = 0; r < kRun; r++, from += p.x.token) {
                    clear_row(d_y[r]);
                    if (t + r >= live) continue;
                    load_row(x[K - 1 + r], from);
                    if (p.d_y.data)
                        load_row(d_y[r], row_of<E>(p.d_y, at.of.batch, t + r) + place.channel);
                }
#pragma unroll
                for (int r = 0; r < kRun; r++)
#pragma unroll
                    for (int v = 0; v < kVector; v++) {
                        const float z = convolve<K>(x, weight, r, v);
                        d_z[K - 1 + r][v] =
                            t + r < live ? through_activation(d_y[r][v], z, p.silu) : 0.0f;
                    }
#pragma unroll
                for (int r = 0; r < kRun; r++) {
                    if (t + r >= at.end) continue;
#pragma unroll
                    for (int k = 0; k < K; k++)
#pragma unroll
                        for (int v = 0; v < kVector; v++)
                            d_weight[k][v] = fmaf(d_z[K - 1 + r][v], x[r + k][v], d_weight[k][v]);
                }
#pragma unroll
                for (int r = 0; r < kRun; r++) {  // the inputs whose last output was token t + r
                    const int64_t token = t + r - (K - 1);
                    if (token < at.begin || token >= at.end) continue;
                    float d_x[kVector], edge[kVector];
                    clear_row(edge);
                    const E* const of_edge = edge_row<E>(p, at.of, token);
                    if (of_edge) load_row(edge, of_edge + place.channel);
#pragma unroll
                    for (int v = 0; v < kVector; v++) {
                        float sum = 0.0f;
#pragma unroll
                        for (int k = 0; k < K; k++)
                            sum = fmaf(weight[k][v], d_z[K - 1 + r - k][v], sum);
                        d_x[v] = sum + edge[v];
                    }
                    store_row(row_of<E>(p.d_x, at.of.batch, token) + place.channel, d_x);
                }
                keep_last<K - 1>(x);
                keep_last<K - 1>(d_z);
            }
        }
    }
    // Sums over the block's segments, in their order.
    constexpr int kEach = K * kVector, kColumns = 32 * kEach;
    SHARED_ARRAY(float, sums, kSegmentsPerBlock* kColumns);
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int v = 0; v < kVector; v++)
            sums[threadIdx.y * kColumns + threadIdx.x * kEach + v * K + k] = d_weight[k][v];
    __syncthreads();
    const int64_t first = place.first_channel * K, all = p.channels * K;
    for (int i = place.thread; i < kColumns && first + i < all; i += kThreads) {
        float sum = 0.0f;
        for (int segment = 0; segment < kSegmentsPerBlock; segment++)
            sum += sums[segment * kColumns + i];
        p.workspace[place.block * all + first + i] = sum;
    }
}

// ---- launches ----------------------------------------------------------------------------------

// Rows of 4 channels can be loaded at once.
bool has_aligned_rows(const ConvParams& p) {
    if (p.channels % kVector) return false;
    const uintptr_t bytes = kVector * element_bytes(p.element);
    for (const TokenTensor* tensor :
         {&p.x, &p.tail, &p.y, &p.final_tail, &p.d_y, &p.d_final_tail, &p.d_x, &p.d_tail})
        if (reinterpret_cast<uintptr_t>(tensor->data) % bytes || tensor->batch % kVector ||
            tensor->token % kVector)
            return false;
    return true;
}

bool is_narrow(const ConvParams& p) {
    return p.width >= 2 && p.width <= kNarrow && has_aligned_rows(p);
}

template <class E, int K>
void launch_narrow(const ConvParams& p, const ConvPlan& plan, bool backward, cudaStream_t stream) {
    const unsigned grid =
        grid_over(plan.segments + (backward ? 0 : tail_rows(p)), p.channels, kVector);
    if (grid) launch(backward ? conv_bwd<E, K> : conv_fwd<E, K>, grid, kBlock, 0, stream, p, plan);
}

template <class E>
void run(const ConvParams& p, bool backward, cudaStream_t stream) {
    const ConvPlan plan(p);
    if (!is_narrow(p))
        launch_wide<E>(p, plan, backward, stream);
    else if (p.width == 2)
        launch_narrow<E, 2>(p, plan, backward, stream);
    else if (p.width == 3)
        launch_narrow<E, 3>(p, plan, backward, stream);
    else
        launch_narrow<E, 4>(p, plan, backward, stream);
    if (backward) finish_backward<E>(p, plan, is_narrow(p), stream);
}

void run(const ConvParams& p, bool backward, void* stream) {
    if (p.element == Element::float64 || p.width > kConvMaxWidthCuda)
        throw std::invalid_argument("conv: not for the CUDA kernels");
    if (p.channels == 0) return;
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (p.element == Element::float32)
        run<float>(p, backward, queue);
    else if (p.element == Element::bfloat16)
        run<bf16>(p, backward, queue);
    else
        run<fp16>(p, backward, queue);
}

}  // namespace

void conv_fwd_cuda(const ConvParams& params, void* stream) { run(params, false, stream); }
void conv_bwd_cuda(const ConvParams& params, void* stream) { run(params, true, stream); }

int64_t conv_bwd_cuda_workspace(const ConvParams& p) {
    return ConvPlan(p).partials(p) + (is_narrow(p) ? 0 : p.batch * p.tokens * p.channels);
}

}  // namespace hope
