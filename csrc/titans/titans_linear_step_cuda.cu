// The linear Titans memory, one token for every sequence: what generating a text does all day.
//
//     e = k W_anchor - v,  S' = m S - lr k^T e,  W' = keep W + S',  o = q W' (or W, or W_anchor)
//
// Reading and writing the state once is all the cost. A block has up to 32 value columns of one
// (sequence, head); a thread has 4 neighbouring ones of every 32nd row, in float throughout, and
// the sums over rows go through shared memory. Each element is written by the thread that has read
// it, so a state may be updated in place. Grid: (N * H, groups of value columns).
#include "titans/titans_cuda.h"
#include "titans/titans_launch.cuh"

namespace hope {
namespace {

constexpr int kStepRows = 32, kStepColumns = 32;  // threads over rows, columns of a block

DEVICE float4 multiply_add(float x, float4 y, float4 sum) {
    return make_float4(fmaf(x, y.x, sum.x), fmaf(x, y.y, sum.y), fmaf(x, y.z, sum.z),
                       fmaf(x, y.w, sum.w));
}
DEVICE float4 scaled(float x, float4 y) { return multiply_add(x, y, make_float4(0, 0, 0, 0)); }

template <class E>
DEVICE float4 load_four(const E* from) {
    const float2 low = unpack<E>(pair_at(from)), high = unpack<E>(pair_at(from + 2));
    return make_float4(low.x, low.y, high.x, high.y);
}

// The sum over the block's rows, in every thread: a thread's own part comes in, those of all rows
// are added in their order.
DEVICE float4 sum_over_rows(float4 part, float4* parts, int row, int column, int columns) {
    parts[row * columns + column] = part;
    __syncthreads();
    float4 sum = parts[column];
#pragma unroll 8
    for (int i = 1; i < kStepRows; i++) sum = multiply_add(1, parts[i * columns + column], sum);
    __syncthreads();
    return sum;
}

template <class E, int D>
__global__ void __launch_bounds__(kStepRows* kStepColumns / 4)
    titans_linear_step_kernel(const TitansParams p) {
    constexpr int kEach = D < kStepRows ? 1 : D / kStepRows;  // rows of a thread
    SHARED_ARRAY(float4, parts, kStepRows * kStepColumns / 4);
    const int columns = static_cast<int>(blockDim.x), row = static_cast<int>(threadIdx.y),
              first = (static_cast<int>(blockIdx.y) * columns + static_cast<int>(threadIdx.x)) * 4;
    const Sequence<1> in(p, static_cast<int>(blockIdx.x / p.heads),
                         static_cast<int>(blockIdx.x % p.heads));
    const Gates gates = load_gates(p, in, 0, true);
    const bool new_chunk = in.offset == 0, has_momentum = p.momentum.data;
    const auto elements = [&](const MatrixTensor& tensor) {
        float* const data = matrix(tensor, in.index, in.head);
        return data ? data + first : nullptr;
    };
    const auto at = [&](float* data, int i) -> float4& {
        return *reinterpret_cast<float4*>(data + (row + i * kStepRows) * p.value_dim);
    };
    const float4 zero = make_float4(0, 0, 0, 0);
    const float* const anchors =
        new_chunk || !p.anchor[0].data ? elements(p.weights[0]) : elements(p.anchor[0]);
    const bool mine = row < D;  // a head of 16 has fewer rows than the block
    float4 w[kEach], s[kEach], anchor[kEach];
    float k[kEach], q[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        w[i] = s[i] = anchor[i] = zero, k[i] = q[i] = 0;
        if (!mine) continue;
        w[i] = at(elements(p.weights[0]), i);
        if (p.momenta[0].data) s[i] = at(elements(p.momenta[0]), i);
        anchor[i] = new_chunk ? w[i] : at(const_cast<float*>(anchors), i);
        k[i] = to_float(token<const E>(p.k, in, 0)[row + i * kStepRows]);
        q[i] = to_float(token<const E>(p.q, in, 0)[row + i * kStepRows]);
    }

    float4 e = zero;
    if (p.objective == TitansObjective::l2) {
#pragma unroll
        for (int i = 0; i < kEach; i++) e = multiply_add(k[i], anchor[i], e);
        e = sum_over_rows(e, parts, row, static_cast<int>(threadIdx.x), columns);
    }
    e = multiply_add(-1, load_four(token<const E>(p.v, in, 0) + first), e);

    float4 o = zero;
    const bool at_boundary = !in.ends_inside_chunk();
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        if (p.read == TitansRead::before) o = multiply_add(q[i], w[i], o);
        if (p.read == TitansRead::chunk) o = multiply_add(q[i], anchor[i], o);
        s[i] = multiply_add(-gates.lr * k[i], e, scaled(gates.momentum, s[i]));
        w[i] = multiply_add(gates.keep, w[i], s[i]);
        if (p.read == TitansRead::after) o = multiply_add(q[i], w[i], o);
        if (!mine) continue;
        at(elements(p.final_weights[0]), i) = w[i];
        if (has_momentum) at(elements(p.final_momenta[0]), i) = s[i];
        at(elements(p.final_anchor[0]), i) = at_boundary ? w[i] : anchor[i];
    }
    o = sum_over_rows(o, parts, row, static_cast<int>(threadIdx.x), columns);
    if (row) return;
    E* const to = token<E>(p.o, in, 0) + first;
    pair_at(to) = pack<E>(o.x, o.y), pair_at(to + 2) = pack<E>(o.z, o.w);
}

}  // namespace

void titans_linear_step_cuda(const TitansParams& params, void* stream) {
    if (params.sequences * params.heads == 0) return;
    for_instance(params, [&](auto element, auto key) {
        using E = typename decltype(element)::type;
        const int64_t columns = params.value_dim < kStepColumns ? params.value_dim : kStepColumns;
        const dim3 grid(static_cast<unsigned>(params.sequences * params.heads),
                        static_cast<unsigned>(params.value_dim / columns)),
            block(static_cast<unsigned>(columns / 4), kStepRows);
        launch(titans_linear_step_kernel<E, decltype(key)::value>, grid, block, 0,
               static_cast<cudaStream_t>(stream), params);
    });
}

}  // namespace hope
