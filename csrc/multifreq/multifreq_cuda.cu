// The multi-frequency step on CUDA.
//
//   adamw:  m += (1 - beta1) (g - m),   v = beta2 v + (1 - beta2) g^2,
//           direction = m / (1 - beta1^i) / (sqrt(v / (1 - beta2^i)) + eps) + decay p
//   sgd:    direction = g + decay p
//   pending += lr direction;   where the parameter is due:  p -= pending,  pending = 0
//
// A block has kPerBlock elements of one tensor and finds out which: blocks are dealt to the tensors
// in their order, and the table of the tensors is the kernel's argument. A call with more tensors
// than an argument holds (4 KiB) takes several launches.
//
// It is bound by memory: four elements at a time where all of a tensor's pieces are aligned for
// that, each read and written once, and only if it has to be. What does not concern an element
// (rule, dtypes, due or not, decay or none) is the same for a whole block.
#include "common/tile.cuh"
#include "multifreq/multifreq.h"

namespace hope {
namespace {

constexpr int kThreads = 256, kVector = 4, kPerBlock = 4096, kMostTensors = 70;

struct Entry {
    void* parameter;
    const void* gradient;
    float *pending, *mean, *square;  // absent: null
    int64_t count;
    unsigned first_block;
    bool small_parameter, small_gradient;  // bfloat16, not float
    bool due, aligned;
};

struct Table {
    Entry entries[kMostTensors];
    int count;
    float lr, take1, beta2, take2, eps, decay, mean_correction, square_correction;
};
static_assert(sizeof(Table) <= 4096, "arguments of a kernel");

// ---- kernel ------------------------------------------------------------------------------------

template <class E>
struct alignas(kVector * sizeof(E)) Four {
    Pair<E> low, high;
};

// `live` elements, all four at once if `whole`.
template <class E>
DEVICE void load(float (&to)[kVector], const E* from, int live, bool whole) {
    if (whole) {
        const Four<E> four = *reinterpret_cast<const Four<E>*>(from);
        const float2 low = unpack<E>(four.low), high = unpack<E>(four.high);
        to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
        return;
    }
#pragma unroll
    for (int i = 0; i < kVector; i++) to[i] = i < live ? to_float(from[i]) : 0.0f;
}

template <class E>
DEVICE void store(E* to, const float (&from)[kVector], int live, bool whole) {
    if (whole) {
        *reinterpret_cast<Four<E>*>(to) = {pack<E>(from[0], from[1]), pack<E>(from[2], from[3])};
        return;
    }
#pragma unroll
    for (int i = 0; i < kVector; i++)
        if (i < live) to[i] = from_float<E>(from[i]);
}

template <Rule kRule, class P, class G>
DEVICE void step_block(const Entry& tensor, const Table& s, int64_t first) {
    P* const parameter = static_cast<P*>(tensor.parameter);
    const G* const gradient = static_cast<const G*>(tensor.gradient);
    const bool decays = s.decay != 0.0f;
    const int64_t end = min(first + kPerBlock, tensor.count);
    for (int64_t at = first + threadIdx.x * kVector; at < end; at += kThreads * kVector) {
        const int live = static_cast<int>(min(end - at, int64_t{kVector}));
        const bool whole = tensor.aligned && live == kVector;
        float g[kVector], p[kVector] = {}, pending[kVector] = {}, m[kVector], v[kVector];
        load(g, gradient + at, live, whole);
        if (tensor.due || decays) load(p, parameter + at, live, whole);
        if (tensor.pending) load(pending, tensor.pending + at, live, whole);
        if constexpr (kRule == Rule::adamw) {
            load(m, tensor.mean + at, live, whole);
            load(v, tensor.square + at, live, whole);
        }
#pragma unroll
        for (int i = 0; i < kVector; i++) {
            float direction = g[i];
            if constexpr (kRule == Rule::adamw) {
                m[i] = fmaf(s.take1, g[i] - m[i], m[i]);
                v[i] = fmaf(s.take2 * g[i], g[i], s.beta2 * v[i]);
                direction =
                    s.mean_correction * m[i] / fmaf(sqrtf(v[i]), s.square_correction, s.eps);
            }
            if (decays) direction = fmaf(s.decay, p[i], direction);
            pending[i] = fmaf(s.lr, direction, pending[i]);
            p[i] -= pending[i];
            if (tensor.due) pending[i] = 0.0f;
        }
        if constexpr (kRule == Rule::adamw) {
            store(tensor.mean + at, m, live, whole);
            store(tensor.square + at, v, live, whole);
        }
        if (tensor.due) store(parameter + at, p, live, whole);
        if (tensor.pending) store(tensor.pending + at, pending, live, whole);
    }
}

template <Rule kRule>
__global__ void __launch_bounds__(kThreads) multifreq_kernel(Table table) {
    int low = 0, high = table.count;  // entries [0, low) begin at this block or before
    while (low < high) {
        const int middle = (low + high) / 2;
        if (table.entries[middle].first_block <= blockIdx.x)
            low = middle + 1;
        else
            high = middle;
    }
    const Entry tensor = table.entries[low - 1];
    const int64_t first = static_cast<int64_t>(blockIdx.x - tensor.first_block) * kPerBlock;
    if (tensor.small_parameter && tensor.small_gradient)
        step_block<kRule, bf16, bf16>(tensor, table, first);
    else if (tensor.small_parameter)
        step_block<kRule, bf16, float>(tensor, table, first);
    else if (tensor.small_gradient)
        step_block<kRule, float, bf16>(tensor, table, first);
    else
        step_block<kRule, float, float>(tensor, table, first);
}

// ---- launches ----------------------------------------------------------------------------------

bool is_aligned(const void* data, int element_bytes) {
    return reinterpret_cast<uintptr_t>(data) % (kVector * element_bytes) == 0;
}

Entry entry_of(const MultifreqTensor& t, unsigned first_block) {
    Entry entry{};
    entry.parameter = t.parameter, entry.gradient = t.gradient;
    entry.pending = static_cast<float*>(t.pending);
    entry.mean = static_cast<float*>(t.mean), entry.square = static_cast<float*>(t.square);
    entry.count = t.count, entry.first_block = first_block, entry.due = t.due;
    entry.small_parameter = t.parameter_element == Element::bfloat16;
    entry.small_gradient = t.gradient_element == Element::bfloat16;
    entry.aligned = is_aligned(t.parameter, element_bytes(t.parameter_element)) &&
                    is_aligned(t.gradient, element_bytes(t.gradient_element)) &&
                    is_aligned(t.pending, 4) && is_aligned(t.mean, 4) && is_aligned(t.square, 4);
    return entry;
}

}  // namespace

void multifreq_cuda(const MultifreqParams& p, void* stream) {
    Table table{};
    table.lr = static_cast<float>(p.lr), table.eps = static_cast<float>(p.eps);
    table.take1 = static_cast<float>(1 - p.beta1), table.take2 = static_cast<float>(1 - p.beta2);
    table.beta2 = static_cast<float>(p.beta2), table.decay = static_cast<float>(p.weight_decay);
    table.mean_correction = static_cast<float>(p.mean_correction);
    table.square_correction = static_cast<float>(p.square_correction);
    for (int64_t begin = 0; begin < p.count; begin += kMostTensors) {
        table.count =
            static_cast<int>(p.count - begin < kMostTensors ? p.count - begin : kMostTensors);
        unsigned blocks = 0;
        for (int i = 0; i < table.count; i++) {
            const MultifreqTensor& tensor = p.tensors[begin + i];
            if (tensor.parameter_element == Element::float64)
                throw std::invalid_argument("multifreq: float64 is not for the CUDA kernels");
            table.entries[i] = entry_of(tensor, blocks);
            blocks += static_cast<unsigned>((tensor.count + kPerBlock - 1) / kPerBlock);
        }
        const auto kernel =
            p.rule == Rule::adamw ? multifreq_kernel<Rule::adamw> : multifreq_kernel<Rule::sgd>;
        launch(kernel, blocks, kThreads, 0, static_cast<cudaStream_t>(stream), table);
    }
}

}  // namespace hope
