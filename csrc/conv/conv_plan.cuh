// How the convolution's CUDA kernels divide the work, and where a token's inputs lie.
#pragma once
#include "common/tile.cuh"
#include "conv/conv.h"

namespace hope {
namespace {

constexpr int kVector = 4, kNarrow = 4;  // channels of a lane, greatest width of the narrow kernels
constexpr int kSegmentsPerBlock = 8, kThreads = 32 * kSegmentsPerBlock;
const dim3 kBlock(32, kSegmentsPerBlock);

__host__ __device__ inline int64_t parts(int64_t whole, int64_t size) {
    return (whole + size - 1) / size;
}

// Segments are as long as leaves enough of them to fill a GPU. Their length follows from sizes
// alone, and with it the order of the weights' gradient's sum.
struct ConvPlan {
    int64_t length = 128, per_row, segments;  // tokens; segments of a row of the batch, of all rows

    explicit ConvPlan(const ConvParams& p) {
        constexpr int64_t kShortest = 16, kEnoughWarps = 8192;
        const int64_t warps_per_segment = parts(p.channels, 32 * kVector);
        for (;; length /= 2) {
            per_row = parts(p.tokens, length), segments = p.batch * per_row;
            if (length == kShortest || segments * warps_per_segment >= kEnoughWarps) return;
        }
    }

    __host__ __device__ int64_t segment_blocks() const {
        return parts(segments, kSegmentsPerBlock);
    }
    // Elements of the weights' gradient of every block.
    __host__ __device__ int64_t partials(const ConvParams& p) const {
        return segment_blocks() * p.channels * p.width;
    }
};

// A grid over (rows, channels): blocks of the same rows are neighbours.
inline unsigned grid_over(int64_t rows, int64_t channels, int vector) {
    return static_cast<unsigned>(parts(rows, kSegmentsPerBlock) * parts(channels, 32 * vector));
}

// What a thread of grid_over works on.
struct Place {
    int thread;
    int64_t block, row;  // of rows
    int64_t first_channel, channel;
    DEVICE Place(int64_t channels, int vector) {
        const int64_t across = parts(channels, 32 * vector);
        thread = static_cast<int>(threadIdx.y * 32 + threadIdx.x);
        block = blockIdx.x / across, row = block * kSegmentsPerBlock + threadIdx.y;
        first_channel = blockIdx.x % across * 32 * vector;
        channel = first_channel + threadIdx.x * vector;
    }
};

// ---- sequences ---------------------------------------------------------------------------------

// Sequence `index` has tokens [start, stop) of a row of the batch.
struct Sequence {
    int64_t index, batch, start, stop;
};

// Whatever cu_seqlens holds, the bounds are in [0, T]; nobody has looked at it.
DEVICE Sequence sequence(const ConvParams& p, int64_t n) {
    if (!p.cu_seqlens) return {n, n, 0, p.tokens};
    const int64_t start = min(max(static_cast<int64_t>(p.cu_seqlens[n]), int64_t{0}), p.tokens);
    return {n, 0, start, min(max(static_cast<int64_t>(p.cu_seqlens[n + 1]), start), p.tokens)};
}

// The tokens [begin, end) of a segment that belong to one sequence.
struct Piece {
    Sequence of;
    int64_t begin, end;
};

// A segment's pieces, one after the other.
class Segment {
 public:
    DEVICE Segment(const ConvParams& p, const ConvPlan& plan, int64_t index)
        : batch_(index / plan.per_row),
          at_(index % plan.per_row * plan.length),
          end_(min(at_ + plan.length, p.tokens)) {}

    DEVICE bool next(const ConvParams& p, Piece& piece) {
        if (at_ >= end_) return false;
        int64_t n = batch_;
        if (p.cu_seqlens) {  // the last sequence that starts at this token or before
            int64_t low = 0, high = p.sequences + 1;  // bounds [0, low) are <= at_, from high on >
            while (low < high) {
                const int64_t middle = (low + high) / 2;
                if (p.cu_seqlens[middle] <= at_)
                    low = middle + 1;
                else
                    high = middle;
            }
            n = low - 1;
            if (n < 0 || n == p.sequences) return false;  // the token is in no sequence
        }
        piece.of = sequence(p, n);
        piece.begin = at_, piece.end = at_ = min(end_, piece.of.stop);
        return true;
    }

 private:
    int64_t batch_, at_, end_;
};

// ---- rows --------------------------------------------------------------------------------------

template <class E>
DEVICE E* row_of(const TokenTensor& tensor, int64_t batch, int64_t token) {
    return static_cast<E*>(tensor.data) + batch * tensor.batch + token * tensor.token;
}

// The input at a token of the sequence or one of the K - 1 before it; null where it is zero.
template <class E>
DEVICE const E* input_row(const ConvParams& p, const Sequence& of, int64_t token) {
    if (token >= of.start) return row_of<E>(p.x, of.batch, token);
    const int64_t in_tail = token - of.start + p.width - 1;
    return p.tail.data && in_tail >= 0 ? row_of<E>(p.tail, of.index, in_tail) : nullptr;
}

// Row j of the K - 1 last inputs of sequence n.
template <class E>
DEVICE const E* last_input_row(const ConvParams& p, int64_t n, int64_t j) {
    const Sequence of = sequence(p, n);
    return input_row<E>(p, of, of.stop - (p.width - 1) + j);
}

// The gradient that the final tail gives to a token (before the sequence: to a row of its tail);
// null where it is zero.
template <class E>
DEVICE const E* edge_row(const ConvParams& p, const Sequence& of, int64_t token) {
    const int64_t in_tail = token - of.stop + p.width - 1;
    return p.d_final_tail.data && in_tail >= 0 ? row_of<E>(p.d_final_tail, of.index, in_tail)
                                               : nullptr;
}

// ---- arithmetic, the same on every path --------------------------------------------------------

DEVICE float sigmoid(float z) { return __fdividef(1.0f, 1.0f + expf(-z)); }

DEVICE float activate(float z, bool silu) { return silu ? z * sigmoid(z) : z; }

// The gradient of z, given that of y.
DEVICE float through_activation(float d_y, float z, bool silu) {
    if (!silu) return d_y;
    const float s = sigmoid(z);
    return d_y * (s * fmaf(z, 1.0f - s, 1.0f));
}

template <class E>
DEVICE float load_or_zero(const E* row, int64_t channel) {
    return row ? to_float(row[channel]) : 0.0f;
}

}  // namespace
}  // namespace hope
