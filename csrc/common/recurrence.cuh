// The coefficients that a segment's gates give (docs/derivations.md), a thread per column s of A:
//
//   N[t, s] = momentum_t N[t-1, s] + lr_t [t = s]        A[t, s] = keep_t A[t-1, s] + N[t, s]
//
// and two more columns: N = 1 before the first token gives m and c, A = 1 gives b.
#pragma once
#include "common/tile.cuh"

namespace hope {

// What products with states need of a segment's gates.
template <int Tokens>
struct alignas(16) Vectors {                       // read in pairs
    float read_b[Tokens], read_c[Tokens];          // how much of the start's W and S token t reads
    float in_weights[Tokens], in_momenta[Tokens];  // last rows of A and N
    float b, c, m;                                 // W' = b W + c S - ..., S' = m S - ...
};

// One column of the gates' row recurrences: that of token `thread`, or b's and c's (above).
struct Recurrence {
    int thread;
    float n, a;

    DEVICE Recurrence(int of_thread, int tokens)
        : thread(of_thread), n(of_thread == tokens), a(of_thread == tokens + 1) {}
    // gate: momentum and keep of token t; lr: of token `thread`.
    DEVICE void step(int t, float2 gate, float lr) {
        n = t == thread ? lr : gate.x * n;
        a = gate.y * a + n;
    }
};

// Threads 0 .. Tokens + 1: columns of A [Tokens][Tokens + kRowPadding], b, c and the rest. `lr` is
// that of token `thread`, `last` the segment's last token. Rows are those that tokens read.
template <int Tokens>
DEVICE void recur(int thread, float lr, const float2* gates, int last, bool before, float* a_matrix,
                  Vectors<Tokens>& vectors) {
    if (thread >= Tokens + 2) return;
    const bool of_token = thread < Tokens, of_momenta = thread == Tokens;
    float* const column = of_token     ? a_matrix + thread
                          : of_momenta ? vectors.read_c
                                       : vectors.read_b;
    const int stride = of_token ? Tokens + kRowPadding : 1;
    Recurrence row(thread, Tokens);
    float last_n = 0, last_a = 0;
    // Gates that are read before results are written beside them; not all, that takes registers.
    constexpr int kAhead = 8;
#pragma unroll 1
    for (int first = 0; first < Tokens; first += kAhead) {
        float2 ahead[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; i++) ahead[i] = gates[first + i];
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            const int t = first + i;
            if (before) column[t * stride] = row.a;
            row.step(t, ahead[i], lr);
            if (!before) column[t * stride] = row.a;
            if (t == last) last_n = row.n, last_a = row.a;
        }
    }
    if (of_token)
        vectors.in_weights[thread] = last_a, vectors.in_momenta[thread] = last_n;
    else if (of_momenta)
        vectors.c = last_a, vectors.m = last_n;
    else
        vectors.b = last_a;
}

// The 16x16 blocks on and below a matrix's diagonal, counted row by row: at most 4 rows of them.
DEVICE int block_row(int block) { return (block >= 1) + (block >= 3) + (block >= 6); }
DEVICE int block_column(int block) { return block - block_row(block) * (block_row(block) + 1) / 2; }
template <int Tokens>
constexpr int kLowerBlocks = Tokens / 16 * (Tokens / 16 + 1) / 2;

// ---- for the backward ----

// Inner products of the states' gradients after a segment with the states before it: <dW', W>,
// <dW', S>, <dS', S>, which is what b, c and m receive.
enum StateProduct { kWeightsWeights, kWeightsMomenta, kMomentaMomenta, kProducts };

// Rows: a segment's most tokens. Splits: what dot products of rows come in. Warps: of the block.
template <int Rows, int Splits, int Warps>
struct GateTiles {
    static constexpr int kRows = Rows, kSplits = Splits, kWarps = Warps,
                         kScoreStride = Rows + kRowPadding;
    enum Sum { kB, kC, kInWeights, kInMomenta, kSums };

    float* a;                        // A [1 + kRows][kScoreStride], row t + 1 for token t; then dN
    float* d_a;                      // [kRows][kScoreStride]
    float *b, *c, *m;                // [1 + kRows]
    float* lr;                       // [kRows]
    float2* gates;                   // [kRows] momentum and keep
    float *in_weights, *in_momenta;  // [kRows] last rows of A and N; in the end what b, c and m
                                     // contribute to the gradients of keep and momentum
    float* sums;                     // [kSums][kSplits][kRows]: dot products of rows with q and k
    float* products;                 // [kWarps][kProducts]

    __host__ __device__ explicit GateTiles(SharedCarver& carver) {
        a = carver.take<float>((kRows + 1) * kScoreStride);
        d_a = carver.take<float>(kRows * kScoreStride);
        for (float** row : {&b, &c, &m}) *row = carver.take<float>(kRows + 1);
        gates = carver.take<float2>(kRows);
        for (float** row : {&lr, &in_weights, &in_momenta}) *row = carver.take<float>(kRows);
        sums = carver.take<float>(kSums * kSplits * kRows);
        products = carver.take<float>(kProducts * kWarps);
    }
};

}  // namespace hope
