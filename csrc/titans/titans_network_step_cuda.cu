// A Titans memory of two layers, or with a norm, one token for every sequence.
//
//     z = k W1_a, h = act(z), y = h W2_a, e from y, k and v, g = (W2_a e) * act'(z),
//     S' = m S - lr (input)^T (error), W' = keep W + S' for both layers, o = M_W'(q) (or W, or W_a)
//
// Reading and writing the states is all the cost: they are of float and updated where they are
// read, a block for each (sequence, head). A product with a matrix [in, out] has its columns dealt
// out to the threads, and its rows to groups of threads whose sums meet in shared memory; one with
// its transpose has a row for each warp. Grid: N * H.
#include "titans/titans_cuda.h"
#include "titans/titans_network_launch.cuh"

namespace hope {
namespace {

constexpr int kStepThreads = 256, kStepWarps = kStepThreads / 32;

// Vectors of the one token, in shared memory.
struct StepVectors {
    float *k, *q, *e, *z, *h, *g, *hq, *o;
    float* parts;  // [kStepThreads]

    __host__ __device__ StepVectors(SharedCarver& carver, const TitansParams& p)
        : k(carver.take<float>(p.key_dim)),
          q(carver.take<float>(p.key_dim)),
          e(carver.take<float>(p.value_dim)),
          z(carver.take<float>(p.hidden_dim)),
          h(carver.take<float>(p.hidden_dim)),
          g(carver.take<float>(p.hidden_dim)),
          hq(carver.take<float>(p.hidden_dim)),
          o(carver.take<float>(p.value_dim)),
          parts(carver.take<float>(kStepThreads)) {}
};

// y = x M for a matrix [rows, columns].
DEVICE void multiply_vector(float* y, const float* x, const float* m, int rows, int columns,
                            float* parts) {
    const int thread = static_cast<int>(threadIdx.x);
    const int wide = min(columns, kStepThreads), groups = kStepThreads / wide;
    for (int first = 0; first < columns; first += wide) {
        const int column = first + thread % wide, group = thread / wide;
        float sum = 0;
        if (column < columns && group < groups)
            for (int row = group; row < rows; row += groups)
                sum += x[row] * m[row * columns + column];
        parts[thread] = sum;
        __syncthreads();
        if (group == 0 && column < columns) {
            for (int i = 1; i < groups; i++) sum += parts[i * wide + thread];
            y[column] = sum;
        }
        __syncthreads();
    }
}
// y = M x^T: a warp for each row.
DEVICE void multiply_transposed(float* y, const float* x, const float* m, int rows, int columns) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int row = static_cast<int>(threadIdx.x) / 32; row < rows; row += kStepWarps) {
        float sum = 0;
        for (int column = lane; column < columns; column += 32)
            sum += m[row * columns + column] * x[column];
#pragma unroll
        for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        if (lane == 0) y[row] = sum;
    }
    __syncthreads();
}

class Step {
 public:
    DEVICE Step(const StepVectors& shared, const TitansParams& p, const Sequence<1>& in)
        : shared_(shared),
          p_(p),
          in_(in),
          gates_(load_gates(p, in, 0, true)),
          layers_(network_layers(p)),
          last_(layers_ - 1),
          values_(static_cast<int>(p.value_dim)),
          norm_weight_(matrix(p.norm_weight, in.index, in.head)),
          norm_bias_(matrix(p.norm_bias, in.index, in.head)) {}

    DEVICE const float* weights(int layer) const { return of(p_.weights[layer]); }
    DEVICE const float* anchor(int layer) const {
        return in_.offset && p_.anchor[layer].data ? of(p_.anchor[layer]) : weights(layer);
    }
    DEVICE float* hidden_of_key() const { return layers_ == 2 ? shared_.h : shared_.k; }
    DEVICE float* error_of(int layer) const { return layer == last_ ? shared_.e : shared_.g; }
    DEVICE float* input_of(int layer) const { return layer ? shared_.h : shared_.k; }

    // What the memory's layers give, before the norm; leaves the hidden values, activated.
    template <class Weights>
    DEVICE void apply(float* y, const float* x, float* z, float* h, const Weights& weights) const {
        if (layers_ == 2) {
            product(z, x, weights(0), 0);
            for_elements(p_.hidden_dim, [&](int f) { h[f] = activate(p_.activation, z[f]).value; });
            __syncthreads();
            x = h;
        }
        product(y, x, weights(last_), last_);
    }
    // y, normalised; the inverse standard deviation comes back.
    DEVICE float normalise(float* y) const {
        const float mean = sum(y, [](float x) { return x; }) / values_;
        const float variance = sum(y, [&](float x) { return (x - mean) * (x - mean); }) / values_;
        const float inverse = 1 / sqrtf(variance + static_cast<float>(p_.norm_eps));
        __syncthreads();  // all have read y
        for_elements(values_, [&](int v) { y[v] = (y[v] - mean) * inverse; });
        __syncthreads();
        return inverse;
    }
    DEVICE float through_norm(float y, int v) const {
        return norm_weight_ ? y * norm_weight_[v] + norm_bias_[v] : y;
    }
    // E in place of V, and the error of the hidden values. Y is in o.
    DEVICE void errors() const {
        float inverse = 1;
        if (norm_weight_) inverse = normalise(shared_.o);
        for_elements(values_, [&](int v) {
            float x = -shared_.e[v];
            if (p_.objective == TitansObjective::l2)
                x += through_norm(shared_.o[v], v) + (p_.residual ? shared_.k[v] : 0);
            shared_.e[v] = norm_weight_ ? x * norm_weight_[v] : x;
        });
        __syncthreads();
        if (norm_weight_) {
            const float mean = sum(shared_.e, [](float x) { return x; }) / values_;
            float with_y = 0;
            for (int v = 0; v < values_; v++) with_y += shared_.e[v] * shared_.o[v];
            __syncthreads();
            for_elements(values_, [&](int v) {
                shared_.e[v] = inverse * (shared_.e[v] - mean - shared_.o[v] * (with_y / values_));
            });
            __syncthreads();
        }
        if (layers_ == 1) return;
        multiply_transposed(shared_.g, shared_.e, anchor(1), static_cast<int>(p_.hidden_dim),
                            values_);
        for_elements(p_.hidden_dim,
                     [&](int f) { shared_.g[f] *= activate(p_.activation, shared_.z[f]).slope; });
        __syncthreads();
    }
    // Every element is read and written by one thread.
    DEVICE void update() const {
        const bool at_boundary = !in_.ends_inside_chunk();
        for (int layer = 0; layer < layers_; layer++) {
            const float *const w = weights(layer), *const a = anchor(layer),
                               *const x = input_of(layer), *const e = error_of(layer);
            const float* const s = of(p_.momenta[layer]);
            const int columns = rows_of_layer(p_, layer),
                      size = columns * columns_of_layer(p_, layer);
            float *const to_w = of(p_.final_weights[layer]),
                         *const to_s = of(p_.final_momenta[layer]),
                         *const to_a = of(p_.final_anchor[layer]);
            for_elements(size, [&](int i) {
                const float old = a[i];
                const float momentum =
                    (s ? gates_.momentum * s[i] : 0) - gates_.lr * x[i / columns] * e[i % columns];
                const float after = gates_.keep * w[i] + momentum;
                to_w[i] = after;
                if (p_.has_momentum) to_s[i] = momentum;
                to_a[i] = at_boundary ? after : old;
            });
        }
        __syncthreads();
    }
    DEVICE void read() const {
        if (p_.read == TitansRead::after)
            answer([&](int layer) { return of(p_.final_weights[layer]); });
        else if (p_.read == TitansRead::before)
            answer([&](int layer) { return weights(layer); });
        else
            answer([&](int layer) { return anchor(layer); });
    }
    template <class E>
    DEVICE void load() const {
        const E *const q = token<const E>(p_.q, in_, 0), *const k = token<const E>(p_.k, in_, 0),
                       *const v = token<const E>(p_.v, in_, 0);
        for_elements(p_.key_dim,
                     [&](int i) { shared_.q[i] = to_float(q[i]), shared_.k[i] = to_float(k[i]); });
        for_elements(values_, [&](int i) { shared_.e[i] = to_float(v[i]); });
        __syncthreads();
    }
    template <class E>
    DEVICE void store() const {
        E* const o = token<E>(p_.o, in_, 0);
        for_elements(values_, [&](int v) {
            const float x = through_norm(shared_.o[v], v);
            o[v] = from_float<E>(p_.residual ? x + shared_.q[v] : x);
        });
    }

 private:
    DEVICE float* of(const MatrixTensor& tensor) const {
        return matrix(tensor, in_.index, in_.head);
    }
    template <class Body>
    DEVICE static void for_elements(int64_t count, const Body& body) {
        for (int i = static_cast<int>(threadIdx.x); i < count; i += kStepThreads) body(i);
    }
    // In every thread, over a few values in shared memory.
    template <class Body>
    DEVICE float sum(const float* values, const Body& body) const {
        float total = 0;
        for (int v = 0; v < values_; v++) total += body(values[v]);
        return total;
    }
    DEVICE void product(float* y, const float* x, const float* m, int layer) const {
        multiply_vector(y, x, m, columns_of_layer(p_, layer), rows_of_layer(p_, layer),
                        shared_.parts);
    }
    template <class Weights>
    DEVICE void answer(const Weights& weights) const {
        apply(shared_.o, shared_.q, shared_.hq, shared_.hq, weights);
        if (norm_weight_) normalise(shared_.o);
    }

    const StepVectors& shared_;
    const TitansParams& p_;
    const Sequence<1>& in_;
    const Gates gates_;
    const int layers_, last_, values_;
    const float *const norm_weight_, *const norm_bias_;
};

template <class E>
__global__ void __launch_bounds__(kStepThreads)
    titans_network_step_kernel(GRID_CONSTANT const TitansParams p) {
    SharedCarver carver(dynamic_shared());
    const StepVectors shared(carver, p);
    const Sequence<1> in(p, static_cast<int>(blockIdx.x / p.heads),
                         static_cast<int>(blockIdx.x % p.heads));
    const Step step(shared, p, in);
    step.load<E>();
    // What does not see this token is read before the state may be overwritten.
    if (p.read != TitansRead::after) {
        step.read();
        step.store<E>();
        __syncthreads();
    }
    step.apply(shared.o, shared.k, shared.z, shared.h,
               [&](int layer) { return step.anchor(layer); });
    step.errors();
    step.update();
    if (p.read == TitansRead::after) {
        step.read();
        step.store<E>();
    }
}

template <class E>
void run(const TitansParams& p, cudaStream_t stream) {
    SharedCarver carver(nullptr);
    StepVectors(carver, p);
    launch(titans_network_step_kernel<E>, dim3(static_cast<unsigned>(p.sequences * p.heads)),
           dim3(kStepThreads), carver.used(), stream, p);
}

}  // namespace

void titans_network_step_cuda(const TitansParams& params, void* stream) {
    if (params.sequences * params.heads == 0) return;
    for_element(params.element, [&](auto element) {
        run<typename decltype(element)::type>(params, static_cast<cudaStream_t>(stream));
    });
}

}  // namespace hope
