// The Newton-Schulz iteration on CUDA.
//
//   X = g / (|g| + eps);   A = X X^T,   B = b A + c A A,   X <- a X + B X   (wide; tall: A = X^T X
//                                                                            and X <- a X + X B)
//
// Three launches a step (newton_schulz_product.cuh), for all matrices of the batch at once. X, A
// and B are in the workspace in g's dtype, so a float matrix goes through 3xTF32 and a bfloat16 one
// is rounded after every product; sums are float. The norm is summed in double, in a fixed order:
// by rows of blocks first, then over these.
#include <stdexcept>

#include "newton_schulz/newton_schulz.h"
#include "newton_schulz/newton_schulz_product.cuh"

namespace hope {
namespace {

int64_t round_up_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Of a matrix, for the norm and what goes over it once: blocks for all of a GPU, if it is large.
int parts_of(const NewtonSchulzParams& p) {
    constexpr int64_t kEach = 4096, kMost = 64;
    const int64_t parts = (p.rows * p.columns + kEach - 1) / kEach;
    return static_cast<int>(parts < kMost ? parts : kMost);
}

// ---- elementwise -------------------------------------------------------------------------------

// The part [begin, end) of a matrix of `count` elements that this block has.
struct Share {
    int64_t matrix, begin, end;
    int part;
    DEVICE Share(int64_t count, int parts)
        : matrix(blockIdx.x / parts), part(static_cast<int>(blockIdx.x % parts)) {
        const int64_t each = (count + parts - 1) / parts;
        begin = min(part * each, count), end = min(begin + each, count);
    }
};

// The block's sum, in every thread; the same order every time.
DEVICE double sum_of_block(double x) {
    SHARED_ARRAY(double, sums, kThreads);
    sums[threadIdx.x] = x;
    __syncthreads();
    for (unsigned half = kThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    return sums[0];
}

template <class E>
__global__ void __launch_bounds__(kThreads)
    newton_schulz_squares_kernel(const E* g, int64_t count, int parts, double* squares) {
    const Share share(count, parts);
    const E* const from = g + share.matrix * count;
    double sum = 0;
    for (int64_t i = share.begin + threadIdx.x; i < share.end; i += kThreads) {
        const double x = to_float(from[i]);
        sum += x * x;
    }
    const double total = sum_of_block(sum);
    if (threadIdx.x == 0) squares[blockIdx.x] = total;
}

// X, with zeros after the columns of a row.
template <class E>
__global__ void __launch_bounds__(kThreads)
    newton_schulz_normalise_kernel(const E* g, int64_t columns, int parts, const double* squares,
                                   double eps, Matrices<E> x) {
    const Share share(x.elements(), parts);
    double square = 0;
    for (int i = 0; i < parts; i++) square += squares[share.matrix * parts + i];
    const double factor = 1 / (sqrt(square) + eps);
    const E* const from = g + share.matrix * (x.rows * columns);
    E* const to = x.at(share.matrix);
    for (int64_t i = share.begin + threadIdx.x; i < share.end; i += kThreads) {
        const int64_t row = i / x.stride, column = i % x.stride;
        const float value =
            column < columns ? static_cast<float>(to_float(from[row * columns + column]) * factor)
                             : 0.0f;
        to[i] = from_float<E>(value);
    }
}

template <class E>
__global__ void __launch_bounds__(kThreads)
    newton_schulz_store_kernel(Matrices<E> x, int64_t columns, int parts, E* out) {
    const Share share(x.rows * columns, parts);
    const E* const from = x.at(share.matrix);
    E* const to = out + share.matrix * x.rows * columns;
    for (int64_t i = share.begin + threadIdx.x; i < share.end; i += kThreads)
        to[i] = from[i / columns * x.stride + i % columns];
}

// ---- launches ----------------------------------------------------------------------------------

// The workspace; without memory it counts.
template <class E>
struct Buffers {
    Matrices<E> x[2], a, b;
    double* squares;  // [batch, parts]
    int64_t bytes = 0;

    Buffers(const NewtonSchulzParams& p, void* workspace) {
        const auto take = [&](int64_t size) {
            char* const piece = workspace ? static_cast<char*>(workspace) + bytes : nullptr;
            bytes += round_up_to(size, 64);
            return piece;
        };
        const auto matrices = [&](int64_t rows, int64_t columns) {
            const int64_t stride = round_up_to(columns, kRowUnit);
            char* const data = take(p.batch * rows * stride * static_cast<int64_t>(sizeof(E)));
            return Matrices<E>{reinterpret_cast<E*>(data), static_cast<int>(rows),
                               static_cast<int>(stride)};
        };
        x[0] = matrices(p.rows, p.columns), x[1] = matrices(p.rows, p.columns);
        const int64_t side = shorter_side(p);
        a = matrices(side, side), b = matrices(side, side);
        squares = reinterpret_cast<double*>(take(p.batch * parts_of(p) * 8));
    }
};

template <bool kLeftAcross, bool kRightAcross, class E>
void multiply_all(Product<E> p, int64_t columns, int64_t batch, cudaStream_t stream) {
    const int64_t down = (p.to.rows + kTile - 1) / kTile, across = (columns + kTile - 1) / kTile;
    p.across = static_cast<int>(across);
    p.blocks = static_cast<int>(p.symmetric ? down * (down + 1) / 2 : down * across);
    const size_t bytes = ProductLayout<E, kLeftAcross, kRightAcross>(SharedCarver(nullptr)).bytes;
    launch(newton_schulz_product_kernel<E, kLeftAcross, kRightAcross>,
           static_cast<unsigned>(p.blocks * batch), kThreads, bytes, stream, p);
}

template <class E>
void run(const NewtonSchulzParams& p, cudaStream_t stream) {
    const Buffers<E> buffers(p, p.workspace);
    const int parts = parts_of(p);
    const unsigned blocks = static_cast<unsigned>(p.batch * parts);
    const E* const g = static_cast<const E*>(p.g);
    launch(newton_schulz_squares_kernel<E>, blocks, kThreads, 0, stream, g, p.rows * p.columns,
           parts, buffers.squares);
    launch(newton_schulz_normalise_kernel<E>, blocks, kThreads, 0, stream, g, p.columns, parts,
           buffers.squares, p.eps, buffers.x[0]);
    const int side = static_cast<int>(shorter_side(p)),
              longer = static_cast<int>(p.rows + p.columns) - side;
    const Matrices<E>&a = buffers.a, &b = buffers.b, none{};
    const float scale_a = static_cast<float>(p.a), scale_b = static_cast<float>(p.b),
                scale_c = static_cast<float>(p.c);
    for (int64_t i = 0; i < p.steps; i++) {
        const Matrices<E>&x = buffers.x[i % 2], &next = buffers.x[(i + 1) % 2];
        const Product<E> gram{x, x, a, none, longer, 1.0f, 0.0f, true, 0, 0},
            polynomial{a, a, b, a, side, scale_c, scale_b, true, 0, 0};
        if (is_tall(p)) {
            multiply_all<true, true>(gram, side, p.batch, stream);
            multiply_all<false, false>(polynomial, side, p.batch, stream);
            const Product<E> update{x, b, next, x, side, 1.0f, scale_a, false, 0, 0};
            multiply_all<false, false>(update, p.columns, p.batch, stream);
        } else {
            multiply_all<false, false>(gram, side, p.batch, stream);
            multiply_all<false, false>(polynomial, side, p.batch, stream);
            const Product<E> update{b, x, next, x, side, 1.0f, scale_a, false, 0, 0};
            multiply_all<false, true>(update, p.columns, p.batch, stream);
        }
    }
    launch(newton_schulz_store_kernel<E>, blocks, kThreads, 0, stream, buffers.x[p.steps % 2],
           p.columns, parts, static_cast<E*>(p.out));
}

}  // namespace

void newton_schulz_cuda(const NewtonSchulzParams& p, void* stream) {
    if (p.element == Element::float32)
        run<float>(p, static_cast<cudaStream_t>(stream));
    else if (p.element == Element::bfloat16)
        run<bf16>(p, static_cast<cudaStream_t>(stream));
    else
        throw std::invalid_argument("newton_schulz: no CUDA kernel for this element");
}

int64_t newton_schulz_cuda_workspace(const NewtonSchulzParams& p) {
    return p.element == Element::bfloat16 ? Buffers<bf16>(p, nullptr).bytes
                                          : Buffers<float>(p, nullptr).bytes;
}

}  // namespace hope
