// What a block of the self-modifying memories keeps in shared memory: of a segment, and for its
// gradients. Tiles of float may lie in scratch memory instead.
#pragma once
#include "selfmod/selfmod_states.cuh"

namespace hope {

template <class E, int D, int Tokens, int Layers>
struct SelfmodLayout {
    using Tiles = LayerTiles<E, D, Tokens>;
    using Gates = GateTiles<Tokens, kLayerWarps, kLayerWarps>;
    using Right = Features<float, false, Tokens + 1>;  // threads of neighbouring rows, other banks
    static constexpr int kTables = 3;

    Gates gates;
    SelfmodMatrices* tables;  // [kTables] where states are
    typename Tiles::ByToken x, q, k, v, e;
    typename Tiles::ByFeature z, h, hv;  // Z and H of K, or of X; hidden values of V
    typename Tiles::ByFeature zq, hq;    // ZQ where it is kept; HQ, else in place of HV
    typename Tiles::ByFeature y;         // one layer: Y [2 D][Tokens], of the state and the anchor
    typename Tiles::ByFeature r;         // the first layer's errors
    typename Tiles::Square scores;
    Vectors<Tokens>* vectors;
    float* sums;    // [Tokens][kSumStride] what a product gave
    float* apart;   // [Tokens][kSumStride] K - V, or - V: errors begin with it, unrounded
    Right right;    // the system's right sides, then its solution
    float* system;  // L, column s at s * kScoreStride
    float* norms;   // [Tokens] of keys before they are normalised
    float* raw;     // [2][Tokens] what lr and retention give, with their biases

    // Rows of the largest hidden tile.
    __host__ __device__ static int64_t hidden_rows(const SelfmodParams& p) {
        int64_t rows = 0;
        for (int m = 0; Layers == 2 && m < kSelfmodMemories; m++)
            rows = rows > p.hidden_dim[m] ? rows : p.hidden_dim[m];
        return rows;
    }
    __host__ __device__ static int64_t system_rows(const SelfmodParams& p) {
        return Layers == 2 ? hidden_rows(p) : 2 * p.dim;
    }
    // Elements of a tile [rows][Tokens].
    __host__ __device__ static int64_t elements(int64_t rows) {
        return rows * (Tokens + kRowPadding);
    }
    // keeps: with all hidden tiles, for the backward.
    __host__ __device__ SelfmodLayout(TileCarver& tiles, const SelfmodParams& p, bool keeps)
        : SelfmodLayout(tiles.shared(), tiles, p) {
        r.data = tiles.template take<E>(elements(Layers == 2 ? hidden_rows(p) : p.dim));
        if (Layers == 1) {
            y.data = tiles.template take<E>(elements(2 * p.dim));
            return;
        }
        const int64_t size = elements(hidden_rows(p));
        z.data = tiles.template take<E>(size), h.data = tiles.template take<E>(size);
        hv.data = tiles.template take<E>(size);
        hq = hv;
        if (!keeps) return;
        zq.data = tiles.template take<E>(size), hq.data = tiles.template take<E>(size);
    }

 private:
    __host__ __device__ SelfmodLayout(SharedCarver& carver, TileCarver& tiles,
                                      const SelfmodParams& p)
        : gates(carver),
          tables(carver.take<SelfmodMatrices>(kTables)),
          x{carver.take<E>(Tokens * (D + kRowPadding))},
          q{carver.take<E>(Tokens * (D + kRowPadding))},
          k{carver.take<E>(Tokens * (D + kRowPadding))},
          v{carver.take<E>(Tokens * (D + kRowPadding))},
          e{Layers == 2 ? carver.take<E>(Tokens * (D + kRowPadding)) : nullptr},
          z{},
          h{},
          hv{},
          zq{},
          hq{},
          y{},
          r{},
          scores{carver.take<E>(Tokens * Tiles::kScoreStride)},
          vectors(carver.take<Vectors<Tokens>>(1)),
          sums(tiles.template take<float>(Tokens * Tiles::kSumStride)),
          apart(tiles.template take<float>(Tokens * Tiles::kSumStride)),
          right{tiles.template take<float>(system_rows(p) * (Tokens + 1) + 1)},
          system(carver.take<float>(Tokens * Tiles::kScoreStride)),
          norms(carver.take<float>(Tokens)),
          raw(carver.take<float>(2 * Tokens)) {}
};

template <class E, int D, int Tokens, int Layers>
struct SelfmodGradientsLayout {
    using Forward = SelfmodLayout<E, D, Tokens, Layers>;
    using Tiles = typename Forward::Tiles;

    Forward forward;
    SelfmodMatrices *d_state, *d_anchor;
    typename Tiles::ByToken d_o, d_e;        // d_e: of an error, or of what an input gave
    typename Tiles::ByFeature d_r, d_u;      // d_r: solved; one layer: of R
    typename Tiles::ByFeature d_y;           // one layer: of Y, solved [2 D][Tokens]
    typename Tiles::Square last_scores;      // A * HQ H^T
    typename Tiles::Square d_first, d_last;  // dX of the layers
    float* d_system;                         // [Tokens][kScoreStride]
    float *d_k, *d_v, *d_x;                  // [Tokens][kSumStride]
    float* d_raw;                            // [2][Tokens] of what lr and retention gave
    float* d_bias;                           // [2] their sums over all tokens

    __host__ __device__ SelfmodGradientsLayout(TileCarver& tiles, const SelfmodParams& p)
        : SelfmodGradientsLayout(tiles.shared(), tiles, p) {
        d_r.data = tiles.template take<E>(
            Forward::elements(Layers == 2 ? Forward::hidden_rows(p) : p.dim));
        if (Layers == 1) {
            d_y.data = tiles.template take<E>(Forward::elements(2 * p.dim));
            last_scores = forward.scores, d_last = d_first;
            return;
        }
        d_u.data = tiles.template take<E>(Forward::elements(Forward::hidden_rows(p)));
        last_scores.data = tiles.template take<E>(Tokens * Tiles::kScoreStride);
        d_last.data = tiles.template take<E>(Tokens * Tiles::kScoreStride);
    }

 private:
    __host__ __device__ SelfmodGradientsLayout(SharedCarver& carver, TileCarver& tiles,
                                               const SelfmodParams& p)
        : forward(tiles, p, true),
          d_state(carver.take<SelfmodMatrices>(2)),
          d_anchor(d_state + 1),
          d_o{carver.take<E>(Tokens * (D + kRowPadding))},
          d_e{carver.take<E>(Tokens * (D + kRowPadding))},
          d_r{},
          d_u{},
          d_y{},
          last_scores{},
          d_first{carver.take<E>(Tokens * Tiles::kScoreStride)},
          d_last{},
          d_system(carver.take<float>(Tokens * Tiles::kScoreStride)),
          d_k(tiles.template take<float>(Tokens * Tiles::kSumStride)),
          d_v(tiles.template take<float>(Tokens * Tiles::kSumStride)),
          d_x(tiles.template take<float>(Tokens * Tiles::kSumStride)),
          d_raw(carver.take<float>(2 * Tokens)),
          d_bias(carver.take<float>(2)) {}
};

}  // namespace hope
