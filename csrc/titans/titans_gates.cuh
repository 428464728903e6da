// The gates of one segment in the backward: their recurrences, forward and in reverse, a thread per
// column of A; and the shared memory of the kernel around them (titans_tokens.cuh).
#pragma once
#include "titans/titans_windows.cuh"

namespace hope {

constexpr int kMostSliceColumns = 32;

// How the columns of D are dealt out: a warp has at most 32, and fewer if that makes four warps.
template <class E, int D>
struct TokensShape {
    static constexpr int kRows = kTokens<E, D>;
    static constexpr int kForFour = 64 / kRows < D / 16 ? 64 / kRows : D / 16;
    static constexpr int kSplits = D / 32 > kForFour ? D / 32 : kForFour, kColumns = D / kSplits;
    static constexpr int kWarps = kRows / 16 * kSplits;
    using Gates = GateTiles<kRows, kSplits, kWarps>;
};

template <class E, int D>
struct TokensLayout : TokensShape<E, D>::Gates {
    using Gates = typename TokensShape<E, D>::Gates;
    static constexpr int kRows = Gates::kRows, kColumns = TokensShape<E, D>::kColumns,
                         kThreads = Gates::kWarps * 32;
    static constexpr int kStride = D + kRowPadding, kValueStride = kMostSliceColumns + kRowPadding,
                         kScoreStride = Gates::kScoreStride;

    E *q, *k;                // [kRows][kStride]; dQ and dK in the end
    E *v, *d_o, *d_v, *e;    // [kRows][kValueStride]: a slice
    E* states[kStateKinds];  // [columns][kStride]: a slice
    E* anchor;               // the same
    E* d_scores;             // dX [kRows][kScoreStride]
    size_t bytes;

    __host__ __device__ TokensLayout(SharedCarver carver, int columns)
        : Gates(carver),
          q(carver.take<E>(kRows * kStride)),
          k(carver.take<E>(kRows * kStride)),
          v(carver.take<E>(kRows * kValueStride)),
          d_o(carver.take<E>(kRows * kValueStride)),
          d_v(carver.take<E>(kRows * kValueStride)),
          e(carver.take<E>(kRows * kValueStride)) {
        for (E*& state : states) state = carver.take<E>(columns * kStride);
        anchor = carver.take<E>(columns * kStride);
        d_scores = carver.take<E>(kRows * kScoreStride);
        bytes = carver.used();
    }
};

// Layout: GateTiles of some sizes.
template <class Layout>
class GateGradients {
    static constexpr int kRows = Layout::kRows, kScoreStride = Layout::kScoreStride;

 public:
    // products: of a sequence's first segment, else null.
    DEVICE GateGradients(const Layout& shared, const TitansParams& p, const Sequence<kRows>& in,
                         const Segment& at, const float* products)
        : shared_(shared),
          p_(p),
          in_(in),
          at_(at),
          given_products_(products),
          has_momentum_(p.has_momentum),
          // No read has the last token's state if it reads the one before; none has any for
          // "chunk".
          read_rows_(p.read == TitansRead::chunk ? 0 : at.rows - (p.read == TitansRead::before)),
          thread_(static_cast<int>(threadIdx.x)) {}

    DEVICE void load() const {
        if (thread_ >= kRows) return;
        const Gates gates = load_gates(p_, in_, at_.first + thread_, thread_ < at_.rows);
        shared_.lr[thread_] = gates.lr;
        shared_.gates[thread_] = make_float2(gates.momentum, gates.keep);
    }

    // A with its row before the first token, b, c, m, and the last rows of A and N.
    DEVICE void compute_coefficients() const {
        if (thread_ >= kRows + 2) return;
        const bool of_token = thread_ < kRows, of_momenta = thread_ == kRows;
        const float lr = of_token ? shared_.lr[thread_] : 0;
        Recurrence column(thread_, kRows);
        float* const a = of_token ? shared_.a + thread_ : of_momenta ? shared_.c : shared_.b;
        const int stride = of_token ? kScoreStride : 1;
        a[0] = column.a;
        if (of_momenta) shared_.m[0] = column.n;
#pragma unroll 4
        for (int t = 0; t < kRows; t++) {
            column.step(t, shared_.gates[t], lr);
            a[(t + 1) * stride] = column.a;
            if (of_momenta) shared_.m[t + 1] = column.n;
            if (t == at_.rows - 1 && of_token)
                shared_.in_weights[thread_] = column.a, shared_.in_momenta[thread_] = column.n;
        }
    }

    // The recurrences in reverse (docs/derivations.md). A column of A turns dA into dA * A before
    // the token, and A into dN * N before the token, whose row sums are the gates' gradients.
    DEVICE void through_recurrences() const {
        if (thread_ < at_.rows)
            through_column(thread_);
        else if (thread_ == kRows)
            through_vectors();
    }
    // A warp per token, its lanes over the columns.
    DEVICE void store() const {
        const int warp = thread_ / 32, lane = thread_ % 32;
        for (int t = warp; t < at_.rows; t += Layout::kWarps) {
            float d_keep = 0, d_momentum = 0;
            for (int s = lane; s < t; s += 32) {
                d_keep += shared_.d_a[t * kScoreStride + s];
                d_momentum += shared_.a[(t + 1) * kScoreStride + s];
            }
#pragma unroll
            for (int distance = 16; distance; distance /= 2) {
                d_keep += __shfl_xor_sync(~0u, d_keep, distance);
                d_momentum += __shfl_xor_sync(~0u, d_momentum, distance);
            }
            if (lane) continue;
            if (p_.d_decay.data)
                *token<float>(p_.d_decay, in_, at_.first + t) = -(d_keep + shared_.in_weights[t]);
            if (p_.d_momentum.data)
                *token<float>(p_.d_momentum, in_, at_.first + t) =
                    d_momentum + shared_.in_momenta[t];
        }
    }

 private:
    DEVICE float dot_of_row(typename Layout::Sum sum, int row) const {
        float dot = 0;
#pragma unroll
        for (int split = 0; split < Layout::kSplits; split++)
            dot += shared_.sums[(sum * Layout::kSplits + split) * kRows + row];
        return dot;
    }

    DEVICE void through_column(int s) const {
        const int last = at_.rows - 1;
        const float lr = shared_.lr[s];
        float* const a = shared_.a + s;
        float* const d_a = shared_.d_a + s;
        float d_weights = -dot_of_row(Layout::kInWeights, s),
              d_momenta = has_momentum_ ? -dot_of_row(Layout::kInMomenta, s) : 0;
        float2 later = make_float2(1, 1);  // the gates of the token after
#pragma unroll 4
        for (int t = last; t >= s; t--) {
            d_weights = later.y * d_weights + (t < read_rows_ ? d_a[t * kScoreStride] : 0);
            d_momenta = later.x * d_momenta + d_weights;
            d_a[t * kScoreStride] = d_weights * a[t * kScoreStride];
            a[(t + 1) * kScoreStride] = d_momenta;
            later = shared_.gates[t];
        }
        *token<float>(p_.d_lr, in_, at_.first + s) = d_momenta;
        float n = lr;
#pragma unroll 4
        for (int t = s + 1; t <= last; t++) {
            a[(t + 1) * kScoreStride] *= n;
            n *= shared_.gates[t].x;
        }
    }
    // b, c and m: one thread.
    DEVICE void through_vectors() const {
        const int last = at_.rows - 1;
        const int before = p_.read == TitansRead::before;
        const auto product = [&](StateProduct which) {
            const float* const parts =
                given_products_ ? given_products_ + which : shared_.products + which;
            const int count =
                given_products_ ? static_cast<int>(p_.value_dim / 16) : Layout::kWarps;
            float sum = 0;
            for (int i = 0; i < count; i++) sum += parts[i * kProducts];
            return sum;
        };
        float d_b = product(kWeightsWeights), d_c = product(kWeightsMomenta),
              d_m = product(kMomentaMomenta);
        float2 later = make_float2(1, 1);
        for (int t = last; t >= 0; t--) {
            const bool read = t < read_rows_;
            d_b = later.y * d_b + (read ? dot_of_row(Layout::kB, t + before) : 0);
            d_c = later.y * d_c + (read && has_momentum_ ? dot_of_row(Layout::kC, t + before) : 0);
            d_m = later.x * d_m + d_c;
            shared_.in_weights[t] = d_b * shared_.b[t] + d_c * shared_.c[t];
            shared_.in_momenta[t] = d_m * shared_.m[t];
            later = shared_.gates[t];
        }
    }

    const Layout& shared_;
    const TitansParams& p_;
    const Sequence<kRows>& in_;
    const Segment& at_;
    const float* const given_products_;
    const bool has_momentum_;
    const int read_rows_;  // states that reads see, from the first token's on
    const int thread_;
};

}  // namespace hope
