// What the tokens of a segment generate, for all self-modifying memories: the phases between a
// block's barriers. In the names of docs/derivations.md, all products transposed:
//
//   x through memories k, v, lr, retention at the anchor, one after the other: K, normalised; V;
//   eta and alpha | A, b | L = K K^T * A, strictly lower | memories of one layer: Y
//
// A memory of one layer is linear in what it is asked, so the right sides of its system are those
// of a memory that is the identity, times its matrix: all memories share the solution Y, and with
// it the matrix b I - (in_weights * K)^T Y that takes each of them through the segment. What
// belongs to the anchor is apart where that is not the state itself.
#pragma once
#include "common/layer_segment.cuh"
#include "selfmod/selfmod_layout.cuh"

namespace hope {

constexpr float kSmallestKeyNorm = 1e-6f;

DEVICE float logistic(float x) { return 1 / (1 + expf(-x)); }

// Base: LayerSegment, or what extends it.
template <class E, int D, int Tokens, int Layers, class Base = LayerSegment<E, D, Tokens>>
class SelfmodTokens : public Base {
 public:
    using Layout = SelfmodLayout<E, D, Tokens, Layers>;
    using Tiles = typename Layout::Tiles;
    using Sums = Accumulator<Tiles::kPartTiles>;
    using Hidden = Accumulator<Tiles::kTokenTiles>;  // a slice's

    // of_base: what the base is made of.
    template <class... OfBase>
    DEVICE SelfmodTokens(const Layout& shared, const SelfmodParams& p, const Sequence<Tokens>& in,
                         const OfBase&... of_base)
        : Base(of_base...),
          shared_(shared),
          p_(p),
          in_(in),
          dim_(static_cast<int>(p.dim)),
          l2_(p.objective == Objective::l2) {}

    // The rows of A that tokens read.
    DEVICE static const float* rows_read(const Layout& shared, const SelfmodParams& p) {
        return shared.gates.a + (p.read == Read::before ? 0 : Tiles::kScoreStride);
    }

    // ---- a segment's inputs ----

    // Starts to copy rows; those past the segment become zero.
    DEVICE void start_rows(const typename Tiles::ByToken& to, const TokenTensor& from,
                           const Segment& at) const {
        const int pieces = dim_ / kPerCopy<E>;
        for (int i = thread(); i < Tokens * pieces; i += kLayerThreads) {
            const int row = i / pieces, column = i % pieces * kPerCopy<E>;
            const bool valid = row < at.rows && from.data;
            const E* const source =  // of rows that are not there, any address that is
                valid ? token<const E>(from, in_, at.first + row) + column
                      : static_cast<const E*>(p_.x.data);
            cp_async_16(to.at(column, row), source, valid ? 16 : 0);
        }
    }
    DEVICE void start_inputs(const Segment& at) const { start_rows(shared_.x, p_.x, at); }
    DEVICE void start_queries(const Segment& at) const { start_rows(shared_.q, p_.q, at); }
    DEVICE static void wait() {
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
    }

    // ---- what the tokens generate ----

    DEVICE void generate(const SelfmodMatrices& anchor, const Segment& at) const {
        for (int m = kKeys; m <= kRetention; m++) {
            if constexpr (Layers == 2) hidden_inputs(anchor.memory[m], m);
            __syncthreads();
            look_at_inputs(anchor.memory[m], m);
            __syncthreads();
            if (m == kKeys) leave_keys();
            if (m == kValues) leave_values();
        }
        load_gates(at);
        __syncthreads();
        compute_coefficients(at);
        __syncthreads();
        compute_system();
        if constexpr (Layers == 1) {
            common_right_sides(at.new_chunk);
            __syncthreads();
            solve(system_rows(at.new_chunk), shared_.y);
        }
        __syncthreads();
    }

 protected:
    // ---- sizes ----

    DEVICE static int thread() { return static_cast<int>(threadIdx.x); }
    DEVICE static bool is_gate(int m) { return m == kRates || m == kRetention; }
    DEVICE static bool has_residual(int m) { return Layers == 2 && !is_gate(m); }
    DEVICE int hidden_of(int m) const {
        return Layers == 2 ? static_cast<int>(p_.hidden_dim[m]) : dim_;
    }
    DEVICE int rows_of_outputs(int m) const { return is_gate(m) ? 16 : dim_; }
    // One layer: rows of Y.
    DEVICE int system_rows(bool new_chunk) const { return new_chunk ? dim_ : 2 * dim_; }

    // ---- tiles ----

    DEVICE auto hidden_of_keys() const {
        if constexpr (Layers == 2)
            return shared_.h;
        else
            return shared_.k;
    }
    DEVICE auto hidden_of_queries() const {
        if constexpr (Layers == 2)
            return shared_.hq;
        else
            return shared_.q;
    }
    DEVICE auto hidden_of_inputs() const {
        if constexpr (Layers == 2)
            return shared_.h;
        else
            return shared_.x;
    }
    DEVICE auto last_errors() const {
        if constexpr (Layers == 2)
            return shared_.e;
        else
            return shared_.r;
    }
    // Rows of Y that belong to the anchor.
    DEVICE typename Tiles::ByFeature of_anchor(const typename Tiles::ByFeature& y) const {
        return {y.at(dim_, 0)};
    }
    DEVICE float& sum(int t, int i) const { return shared_.sums[t * Tiles::kSumStride + i]; }
    DEVICE float& apart(int t, int i) const { return shared_.apart[t * Tiles::kSumStride + i]; }
    DEVICE float& right(int row, int t) const { return *shared_.right.at(row, t); }
    // How much of the segment's first state is left before token t.
    DEVICE float left_before(int t) const { return shared_.gates.b[t]; }
    // body(i) for this thread's features of its group's token.
    template <class Body>
    DEVICE void for_columns(const Body& body) const {
        for (int i = Tiles::rank_in_group(); i < dim_; i += Tiles::kGroup) body(i);
    }

    // ---- generate ----

    // act(W1^T inputs^T), 16 hidden rows at a time; Z too unless z_at is null.
    DEVICE void hide(const StateMatrix& w1, int m, const typename Tiles::ByToken& inputs,
                     const typename Tiles::ByFeature& to, E* z_at) const {
        const typename Tiles::ByFeature to_z{z_at};
        Tiles::for_slices(hidden_of(m), [&](int slice) {
            Hidden z = {};
            multiply_state<false>(z, w1, slice, inputs, 0);
            for_pairs(z, slice, 0, [&](int f, int t, float a, float b) {
                if (z_at) pair_at(to_z.at(f, t)) = pack<E>(a, b);
                pair_at(to.at(f, t)) =
                    pack<E>(activate(p_.activation, a).value, activate(p_.activation, b).value);
            });
        });
    }
    DEVICE_CALL void hidden_inputs(const MemoryMatrices& anchor, int m) const __restrict__ {
        hide(anchor.layer[0], m, shared_.x, shared_.h, nullptr);
    }
    DEVICE_CALL void look_at_inputs(const MemoryMatrices& anchor, int m) const __restrict__ {
        Tiles::for_part(rows_of_outputs(m), [&](int slice, int at) {
            Sums y = {};
            multiply_state<false>(y, anchor.layer[Layers - 1], slice, hidden_of_inputs(), at);
            if (!is_gate(m)) {
                this->store_sums(shared_.sums, y, slice, at);
                return;
            }
            const float bias =
                *matrix(m == kRates ? p_.lr_bias : p_.retention_bias, in_.index, in_.head);
            float* const to = shared_.raw + (m - kRates) * Tokens;
            for_pairs(y, slice, at, [&](int f, int t, float a, float b) {
                if (f == 0) to[t] = a + bias, to[t + 1] = b + bias;
            });
        });
    }
    DEVICE_CALL void leave_keys() const __restrict__ {
        const int t = Tiles::token_of_group();
        float square = 0;
        for_columns([&](int i) {
            if (Layers == 2) sum(t, i) += to_float(*shared_.x.at(i, t));
            square += sum(t, i) * sum(t, i);
        });
        const float norm = sqrtf(Tiles::sum_of_group(square));
        if (Tiles::rank_in_group() == 0) shared_.norms[t] = norm;
        const float divisor = fmaxf(norm, kSmallestKeyNorm);
        for_columns([&](int i) {
            const float k = sum(t, i) / divisor;
            *shared_.k.at(i, t) = from_float<E>(k);
            apart(t, i) = l2_ ? k : 0;
        });
    }
    DEVICE_CALL void leave_values() const __restrict__ {
        const int t = Tiles::token_of_group();
        for_columns([&](int i) {
            const float v = sum(t, i) + (Layers == 2 ? to_float(*shared_.x.at(i, t)) : 0);
            *shared_.v.at(i, t) = from_float<E>(v);
            apart(t, i) -= v;
        });
    }
    // A token past the segment learns nothing and leaves nothing behind.
    DEVICE void load_gates(const Segment& at) const {
        const int t = thread();
        if (t >= Tokens) return;
        const bool valid = t < at.rows;
        const float lr_max = static_cast<float>(p_.lr_max);
        shared_.gates.lr[t] = valid ? lr_max * logistic(shared_.raw[t]) : 0;
        shared_.gates.gates[t] = make_float2(0, valid ? logistic(shared_.raw[Tokens + t]) : 0);
    }
    // A and b with their rows before the first token, and what reads and updates need of them: a
    // thread for each column of A, and one for b.
    DEVICE_CALL void compute_coefficients(const Segment& at) const __restrict__ {
        const int s = thread(), before = p_.read == Read::before;
        if (s > Tokens) return;
        const bool of_token = s < Tokens;
        float* const column = of_token ? shared_.gates.a + s : shared_.gates.b;
        const int stride = of_token ? Tiles::kScoreStride : 1;
        float value = of_token ? 0 : 1;
        column[0] = value;
        for (int t = 0; t < Tokens; t++) {
            value = shared_.gates.gates[t].y * value + (t == s ? shared_.gates.lr[t] : 0);
            column[(t + 1) * stride] = value;
        }
        Vectors<Tokens>& to = *shared_.vectors;
        if (of_token) {
            to.read_c[s] = to.in_momenta[s] = 0;
            to.in_weights[s] = column[at.rows * stride];
        } else {
            for (int t = 0; t < Tokens; t++) to.read_b[t] = column[t + 1 - before];
            to.b = column[at.rows], to.c = to.m = 0;
        }
    }
    // L = K K^T * A, row t with A's row t - 1; zero on the diagonal.
    DEVICE_CALL void compute_system() const __restrict__ {
        Tiles::for_lower_blocks([&](int row, int column) {
            Accumulator<2> x = {};
            this->multiply_scores(x, shared_.k, shared_.k, dim_, row, column);
            this->for_square(row, column, [&](int t, int s, int tile, int i) {
                const float2 a = pair_at(shared_.gates.a + t * Tiles::kScoreStride + s);
                float* const to = shared_.system + s * Tiles::kScoreStride + t;
                to[0] = s < t ? x[tile][i] * a.x : 0;
                to[Tiles::kScoreStride] = s + 1 < t ? x[tile][i + 1] * a.y : 0;
            });
        });
    }
    // (I + L) X = right sides in place, and rounded: a thread for each row, in float throughout, 16
    // tokens at a time.
    DEVICE_CALL void solve(int rows, const typename Tiles::ByFeature& rounded) const __restrict__ {
        for (int row = thread(); row < rows; row += kLayerThreads) {
            float* const solution = &right(row, 0);
#pragma unroll 1
            for (int first = 0; first < Tokens; first += 16) {
                const float* const block = shared_.system + first;  // rows from `first`
                float x[16];
#pragma unroll
                for (int i = 0; i < 16; i++) x[i] = solution[first + i];
#pragma unroll 2
                for (int s = 0; s < first; s++) {
                    const float known = solution[s];
#pragma unroll
                    for (int i = 0; i < 16; i += 2) {
                        const float2 l = pair_at(block + s * Tiles::kScoreStride + i);
                        x[i] -= l.x * known, x[i + 1] -= l.y * known;
                    }
                }
#pragma unroll
                for (int s = 0; s < 15; s++)
#pragma unroll
                    for (int i = (s + 1) / 2 * 2; i < 16; i += 2) {  // L[s, s] = 0
                        const float2 l = pair_at(block + (first + s) * Tiles::kScoreStride + i);
                        if (i > s) x[i] -= l.x * x[s];
                        x[i + 1] -= l.y * x[s];
                    }
#pragma unroll
                for (int i = 0; i < 16; i++) solution[first + i] = x[i];
#pragma unroll
                for (int i = 0; i < 16; i += 2)
                    pair_at(rounded.at(row, first + i)) = pack<E>(x[i], x[i + 1]);
            }
        }
    }

    // ---- the system of memories of one layer ----

    // b' * K + (K - V): of a memory that is the identity. The part of the anchor in rows of its own
    // where that is not the state.
    DEVICE_CALL void common_right_sides(bool new_chunk) const __restrict__ {
        const int t = Tiles::token_of_group();
        for_columns([&](int i) {
            const float of_state = left_before(t) * to_float(*shared_.k.at(i, t)),
                        of_anchor = apart(t, i);
            right(i, t) = new_chunk ? of_state + of_anchor : of_state;
            if (!new_chunk) right(dim_ + i, t) = of_anchor;
        });
    }
    const Layout shared_;
    const SelfmodParams& p_;
    const Sequence<Tokens>& in_;
    const int dim_;
    const bool l2_;
};

}  // namespace hope
