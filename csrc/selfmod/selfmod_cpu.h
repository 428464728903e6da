// HOPE's self-modifying memory by chunks (docs/derivations.md has the algebra, in these names).
// Included by each_isa_cpu.h, once per instruction set.
//
// One task is one sequence and head; it walks its tokens in segments (walk_cpu.h). All memories
// look at the same keys and learn at the same rates; what is a memory's own is computed for one
// after the other, in the same place in the thread's cache:
//
//   generate   x through four memories at the anchor: k, v, the gates and their coefficients, and
//              the triangular system L = tril(K K^T, -1) * A that is common to all memories
//   learn      v and k through a memory: its errors e; (I + L) u = b * (K w) + e
//   read       of the memory `memory`, as its layers are at each token   (layer_cpu.h)
//   advance    the state after the segment                               (layer_cpu.h)
//   backward   the same in reverse, learn included once more

#include "common/activation_cpu.h"
#include "common/gates_cpu.h"
#include "common/layer_cpu.h"
#include "common/sequence_cpu.h"
#include "common/solve_cpu.h"
#include "common/walk_cpu.h"
#include "selfmod/selfmod_memory_cpu.h"

constexpr double kSmallestNorm = 1e-6;  // of a key before it is normalised

template <class T>
struct SelfmodTask : Walk<T, SelfmodParams> {
    using Base = Walk<T, SelfmodParams>;
    using Base::at;
    using Base::layers;
    using Base::p;
    static constexpr int kLanes = Simd<T>::kLanes, kGenerating = kMemory;

    LayerWork<T> work;
    SelfmodMemory<T> memory[kSelfmodMemories];
    Look<T> of_x[kGenerating], of_v, of_k;  // the latter two: of the memory whose turn it is
    int64_t ld, lt;                         // leading dimensions of rows of D, of n
    T *x, *k, *v;                           // [n][ld]
    T *key_norms, *rate_slopes, *retention_slopes;  // [n]
    T *similar, *system;                            // [n][lt]: K K^T, L
    T *u, *kw, *d_kw;                               // [n][wide]: e w2^T, K w
    T *d_o, *d_k, *d_v, *d_x, *d_system;            // backward only
    T d_lr_bias = 0, d_retention_bias = 0;

    SelfmodTask(const SelfmodParams& params, int64_t task, T* scratch, bool backward,
                int64_t* scratch_size)
        : Base(params, task, selfmod_state_size(params)) {
        Carver<T> carver{scratch};
        const int64_t rows = at.rows_at_most(p), kept = at.segments_of_group(p);
        work.read = p.read, work.has_momentum = false;
        int64_t width = p.dim;
        for (int m = 0; m < kSelfmodMemories; m++) {
            SelfmodMemory<T>& of = memory[m];
            of.layers = p.memory_layers, of.activation = p.activation;
            of.residual = of.layers == 2 && m != kRates && m != kRetention;
            for (int i = 0; i < of.layers; i++, layers++) {
                this->layer[layers] = &of.layer[i];
                of.layer[i].carve_state(carver, p.rows_of(layers), p.columns_of(layers), false,
                                        backward, kept);
                width = most(width, of.layer[i].out);
            }
        }
        work.carve(carver, rows, width, backward);
        const int64_t wide = round_up(width, kLanes);
        work.state_t = carver.take(wide * wide);
        ld = round_up(p.dim, kLanes), lt = work.lt;
        carve_rows(carver, rows, wide, backward);
        *scratch_size = carver.used;
    }
    void carve_rows(Carver<T>& carver, int64_t rows, int64_t wide, bool backward) {
        const int64_t size = rows * wide;
        x = carver.take(rows * ld), k = carver.take(rows * ld), v = carver.take(rows * ld);
        key_norms = carver.take(rows);
        rate_slopes = carver.take(rows), retention_slopes = carver.take(rows);
        similar = carver.take(rows * lt), system = carver.take(rows * lt);
        u = carver.take(size), kw = carver.take(size);
        T *const first_t = carver.take(wide * wide), *const last_t = carver.take(wide * wide);
        of_k = {carver.take(size), carver.take(size), carver.take(size), carver.take(size)};
        of_v = {nullptr, carver.take(size), nullptr, carver.take(size)};
        T *const errors = carver.take(size), *const last_errors = carver.take(size);
        T *d_errors = nullptr, *d_last_errors = nullptr;
        if (backward) {
            d_kw = carver.take(size);
            d_o = carver.take(rows * ld), d_k = carver.take(rows * ld);
            d_v = carver.take(rows * ld), d_x = carver.take(rows * ld);
            d_system = carver.take(rows * lt);
            of_k.d_h = carver.take(size), of_k.d_z = carver.take(size);
            of_v.slope = carver.take(size), of_v.d_h = of_k.d_h, of_v.d_z = of_k.d_z;
            d_errors = carver.take(size), d_last_errors = carver.take(size);
        }
        of_v.z = of_v.h;
        for (int m = 0; m < kGenerating; m++) {
            of_x[m] = of_v;
            if (backward) of_x[m].h = carver.take(size), of_x[m].slope = carver.take(size);
            of_x[m].z = of_x[m].h;
            of_x[m].y = m == kKeys ? k : m == kValues ? v : carver.take(rows * kLanes);
        }
        for (SelfmodMemory<T>& m : memory) {
            m.first_t = first_t, m.last_t = last_t;
            Layer<T>&first = m.layer[0], &top = m.last();
            top.x = of_k.h, top.errors = last_errors;
            top.d_x = of_k.d_h, top.d_errors = d_last_errors;
            first.x = k, first.errors = errors;
            first.d_x = d_k, first.d_errors = d_errors;
        }
        SelfmodMemory<T>& read = memory[kMemory];
        for (int i = 0; i < read.layers; i++) {
            Layer<T>& l = read.layer[i];
            l.queries = carver.take(size), l.result = carver.take(size);
            if (backward) l.d_queries = carver.take(size), l.d_result = carver.take(size);
        }
    }
    static int64_t scratch_size(const SelfmodParams& p, bool backward) {
        int64_t size;
        SelfmodParams sizes_only = p;
        sizes_only.cu_seqlens = nullptr, sizes_only.position = nullptr;
        SelfmodTask(sizes_only, 0, nullptr, backward, &size);
        return size;
    }

    // ---- forward ----
    void generate(const Segment& segment) {
        const int64_t n = segment.rows;
        at.load_rows(p.x, segment, p.dim, x, ld);
        for (int m = 0; m < kGenerating; m++) memory[m].look(n, x, of_x[m]);
        for (int64_t t = 0; t < n; t++) {
            T* const row = k + t * ld;
            key_norms[t] = square_root(dot(p.dim, row, row));
            const T norm = divisor(t);
            for (int64_t j = 0; j < ld; j++) row[j] /= norm;
        }
        gate(n, kRates, p.lr_bias, static_cast<T>(p.lr_max), work.gate.lr, rate_slopes);
        gate(n, kRetention, p.retention_bias, 1, work.gate.keep, retention_slopes);
        for (int64_t t = 0; t < n; t++) work.gate.momentum[t] = 0;
        work.gate.compute(n, false);

        transpose(n, p.dim, k, ld, work.x_t, lt);
        multiply<Part::lower_result>(n, n, p.dim, plain<T>(k, ld), work.x_t, lt, similar, lt,
                                     one<T>(), false);
        for (int64_t t = 0; t < n; t++) {
            const T* const a = work.gate.weights_row(t - 1);
            for (int64_t s = 0; s < t; s++) system[t * lt + s] = similar[t * lt + s] * a[s];
        }
    }
    T divisor(int64_t t) const {
        return key_norms[t] < T(kSmallestNorm) ? T(kSmallestNorm) : key_norms[t];
    }
    // values = scale s(M(x) + bias) and their slopes; 1 - s is s(-.), which does not cancel.
    void gate(int64_t n, int m, const MatrixTensor& bias, T scale, T* values, T* slopes) const {
        const T* const y = of_x[m].y;
        const T added = *at.template matrix<T>(bias);
        for (int64_t t = 0; t < n; t++) values[t] = y[t * kLanes] + added;
        for (int64_t t = 0; t < n; t += kLanes) {
            const Vector<T> raw = load(values + t), value = scale * sigmoid(raw);
            store(values + t, value), store(slopes + t, value * sigmoid(-raw));
        }
    }

    // A memory's errors: of the second layer e, of the first u, those of the delta rule.
    void learn(SelfmodMemory<T>& m, const Segment& segment) {
        const int64_t n = segment.rows;
        Layer<T>&first = m.layer[0], &top = m.last();
        const bool l2 = p.objective == Objective::l2;
        m.look(n, v, of_v);
        m.look(n, k, of_k, l2);
        for (int64_t i = 0; i < n * top.lo; i++)
            top.errors[i] = l2 ? of_k.y[i] - of_v.y[i] : -of_v.y[i];
        if (m.layers == 2) {
            m.transpose_last();
            multiply(n, top.in, top.out, plain<T>(top.errors, top.lo), m.last_t, top.li, u, top.li,
                     one<T>(), false);
            for (int64_t i = 0; i < n * top.li; i++) first.errors[i] = u[i] * of_k.slope[i];
        }
        const T* const before = keys_through_weights(m, segment);
        for (int64_t t = 0; t < n; t++)
            for (int64_t j = 0; j < first.lo; j++)
                first.errors[t * first.lo + j] += work.gate.b[t] * before[t * first.lo + j];
        solve_lower(n, first.out, system, lt, first.errors, first.lo);
    }
    // K w, which at a chunk's start is what K meets at the anchor.
    const T* keys_through_weights(const SelfmodMemory<T>& m, const Segment& segment) const {
        if (segment.new_chunk) return m.layers == 1 ? of_k.y : of_k.z;
        const Layer<T>& l = m.layer[0];
        multiply(segment.rows, l.out, l.in, plain<T>(k, ld), l.weights, l.lo, kw, l.lo, one<T>(),
                 false);
        return kw;
    }
    void through_layers(int64_t n) {  // the queries; also in the backward
        SelfmodMemory<T>& m = memory[kMemory];
        work.read_out(m.layer[0], n);
        if (m.layers == 2)
            activate_all<T>(p.activation, n * m.last().li, m.layer[0].result, m.last().queries,
                            nullptr);
    }
    void read_out(const Segment& segment) {
        const int64_t n = segment.rows;
        SelfmodMemory<T>& m = memory[kMemory];
        const Layer<T>&first = m.layer[0], &top = m.last();
        at.load_rows(p.q, segment, p.dim, first.queries, ld);
        through_layers(n);
        if (m.layers == 2) work.read_out(top, n);
        if (m.residual) m.add(n * ld, first.queries, top.result);
        at.store_rows(p.o, segment, p.dim, top.result, ld);
    }
    void advance(SelfmodMemory<T>& m, int64_t n) {
        for (int i = 0; i < m.layers; i++) work.advance(m.layer[i], n);
    }
    void forward_segment(const Segment& segment) {
        generate(segment);
        for (SelfmodMemory<T>& m : memory) {
            learn(m, segment);
            if (&m == &memory[kMemory]) read_out(segment);
            advance(m, segment.rows);
        }
    }
    void learn_segment(const Segment& segment) {
        generate(segment);
        for (SelfmodMemory<T>& m : memory) {
            learn(m, segment);
            advance(m, segment.rows);
        }
    }

    // ---- backward ----
    void backward_segment(const Segment& segment) {
        const int64_t n = segment.rows;
        generate(segment);
        at.load_rows(p.q, segment, p.dim, memory[kMemory].layer[0].queries, ld);
        if (p.d_o.data)
            at.load_rows(p.d_o, segment, p.dim, d_o, ld);
        else
            clear(n * ld, d_o);
        work.clear_gradients(n);
        clear(n * ld, d_v), clear(n * ld, d_x), clear(n * lt, d_system);
        through_memory(memory[kMemory], segment);  // begins d_k
        for (int m = 0; m < kMemory; m++) through_memory(memory[m], segment);
        through_system(n);
        through_generation(n);
        at.store_rows(p.d_x, segment, p.dim, d_x, ld);
        at.store_rows(p.d_q, segment, p.dim, memory[kMemory].layer[0].d_queries, ld);
    }
    static void clear(int64_t count, T* numbers) {
        __builtin_memset(numbers, 0, count * sizeof(T));
    }
    void through_memory(SelfmodMemory<T>& m, const Segment& segment) {
        const int64_t n = segment.rows;
        Layer<T>&first = m.layer[0], &top = m.last();
        const bool is_read = &m == &memory[kMemory];
        learn(m, segment);
        if (is_read) {
            through_reads(n);
        } else {
            clear(n * first.lo, first.d_errors), clear(n * top.lo, top.d_errors);
            if (m.layers == 2) clear(n * top.li, top.d_x);
        }
        for (int i = 0; i < m.layers; i++) {
            work.through_update(m.layer[i], n);
            work.to_state_before(m.layer[i], n);
            if (is_read) work.add_read_state(m.layer[i], n);
        }
        through_solve(m, segment);
        through_errors(m, segment);
    }
    // Begins d_queries, d_x and d_errors of the layers that are read.
    void through_reads(int64_t n) {
        SelfmodMemory<T>& m = memory[kMemory];
        Layer<T>&first = m.layer[0], &top = m.last();
        through_layers(n);
        for (int64_t i = 0; i < n * ld; i++) top.d_result[i] = d_o[i];
        work.through_read(top, n);
        if (m.layers == 1) return;
        for (int64_t i = 0; i < n * top.li; i += kLanes)
            store(first.d_result + i, load(top.d_queries + i) *
                                          activate<T>(p.activation, load(first.result + i)).slope);
        work.through_read(first, n);
        m.add(n * ld, d_o, first.d_queries);
    }
    // (I + L) u = b * (K w) + e: d_errors of the first layer becomes that of e.
    void through_solve(SelfmodMemory<T>& m, const Segment& segment) {
        const int64_t n = segment.rows;
        Layer<T>& l = m.layer[0];
        T* const d_e = l.d_errors;
        const T *const b = work.gate.b, *const before = keys_through_weights(m, segment);
        solve_lower_transposed(n, l.out, system, lt, d_e, l.lo);
        transpose(n, l.out, l.errors, l.lo, work.errors_t, lt);
        multiply<Part::lower_result>(n, n, l.out, plain<T>(d_e, l.lo), work.errors_t, lt, d_system,
                                     lt, minus_one<T>(), true);
        for (int64_t t = 0; t < n; t++) {
            if (t) work.gate.d_b[t - 1] += dot(l.out, before + t * l.lo, d_e + t * l.lo);
            for (int64_t j = 0; j < l.lo; j++) d_kw[t * l.lo + j] = b[t] * d_e[t * l.lo + j];
        }
        if (segment.new_chunk) return;  // then d_kw joins what comes from the anchor
        transpose(l.in, l.out, l.weights, l.lo, work.state_t, l.li);
        multiply(n, l.in, l.out, plain<T>(d_kw, l.lo), work.state_t, l.li, d_k, ld, one<T>(), true);
        multiply(l.in, l.out, n, transposed<T>(k, ld), d_kw, l.lo, l.d_weights, l.lo, one<T>(),
                 true);
        clear(n * l.lo, d_kw);
    }
    // From the errors' gradients through k's and v's way at the anchor.
    void through_errors(SelfmodMemory<T>& m, const Segment& segment) {
        const int64_t n = segment.rows;
        Layer<T>&first = m.layer[0], &top = m.last();
        const bool l2 = p.objective == Objective::l2;
        T* const d_e = m.layers == 2 ? top.d_errors : first.d_errors;
        const T* d_y = l2 ? d_e : nullptr;  // of k's
        if (m.layers == 2) {
            through_first_errors(m, n);
        } else {
            if (l2) m.add(n * top.lo, d_e, d_kw);
            d_y = d_kw;
        }
        m.transpose_first();
        m.look_back(n, k, of_k, d_y, true, d_k);
        for (int64_t i = 0; i < n * top.lo; i++) of_v.y[i] = -d_e[i];
        m.look_back(n, v, of_v, of_v.y, false, d_v);
    }
    // g = u * act'(z), u = e w2^T: begins d_z with it and d_kw; adds to e's gradient and to w2's.
    void through_first_errors(SelfmodMemory<T>& m, int64_t n) {
        Layer<T>& top = m.last();
        T* const d_u = m.layer[0].d_errors;
        for (int64_t i = 0; i < n * top.li; i += kLanes) {
            const Vector<T> d_g = load(d_u + i);
            const Vector<T> curve = activate<T>(p.activation, load(of_k.z + i)).curve;
            store(of_k.d_z + i, load(d_kw + i) + d_g * load(u + i) * curve);
            store(d_u + i, d_g * load(of_k.slope + i));
        }
        multiply(n, top.out, top.in, plain<T>(d_u, top.li), top.anchor, top.lo, top.d_errors,
                 top.lo, one<T>(), true);
        multiply(top.in, top.out, n, transposed<T>(d_u, top.li), top.errors, top.lo, top.d_anchor,
                 top.lo, one<T>(), true);
    }
    // L = K K^T * A, row t with A's row t - 1.
    void through_system(int64_t n) {
        for (int64_t t = 0; t < n; t++) {
            const T* const a = work.gate.weights_row(t - 1);
            T* const d_row = d_system + t * lt;
            T* const d_a = work.gate.d_in_weights + (t - 1) * lt;
            for (int64_t s = 0; s < t; s++) {
                d_a[s] += d_row[s] * similar[t * lt + s];
                d_row[s] *= a[s];
            }
            for (int64_t s = t; s < lt; s++) d_row[s] = 0;
        }
        multiply<Part::lower_left>(n, p.dim, n, plain<T>(d_system, lt), k, ld, d_k, ld, one<T>(),
                                   true);
        multiply<Part::upper_left>(n, p.dim, n, transposed<T>(d_system, lt), k, ld, d_k, ld,
                                   one<T>(), true);
    }
    // From the gradients of k, v and the gates to those of x and the biases.
    void through_generation(int64_t n) {
        work.gate.backward(n);  // lr and keep become their gradients
        d_lr_bias += through_gate(n, kRates, work.gate.lr, rate_slopes);
        d_retention_bias += through_gate(n, kRetention, work.gate.keep, retention_slopes);
        for (int64_t t = 0; t < n; t++) {
            const T* const key = k + t * ld;
            T* const d_key = d_k + t * ld;
            const T norm = divisor(t);
            const T along = key_norms[t] < norm ? 0 : dot(p.dim, key, d_key);
            for (int64_t j = 0; j < ld; j++) d_key[j] = (d_key[j] - along * key[j]) / norm;
        }
        for (int m = 0; m < kGenerating; m++) {
            const T* const d_y = m == kKeys ? d_k : m == kValues ? d_v : of_x[m].y;
            memory[m].transpose_first(), memory[m].transpose_last();
            memory[m].look_back(n, x, of_x[m], d_y, false, d_x);
        }
    }
    // The gate's raw gradients take the place of its raw values; returns their sum, the bias's.
    T through_gate(int64_t n, int m, const T* d_gate, const T* slopes) {
        T* const raw = of_x[m].y;
        clear(n * kLanes, raw);
        T total = 0;
        for (int64_t t = 0; t < n; t++) total += raw[t * kLanes] = d_gate[t] * slopes[t];
        return total;
    }

    void backward() {
        walk_backward<T>(*this);
        *at.template matrix<T>(p.d_lr_bias) = d_lr_bias;
        *at.template matrix<T>(p.d_retention_bias) = d_retention_bias;
    }
};

template <class T>
void selfmod_tasks(const SelfmodParams& p, bool backward, int64_t begin, int64_t end,
                   void* scratch) {
    for (int64_t task = begin; task < end; task++) {
        int64_t size;
        SelfmodTask<T> run(p, task, static_cast<T*>(scratch), backward, &size);
        if (backward)
            run.backward();
        else
            walk_forward<T>(run);
    }
}
template <class T>
int64_t selfmod_scratch_bytes(const SelfmodParams& p, bool backward) {
    return SelfmodTask<T>::scratch_size(p, backward) * static_cast<int64_t>(sizeof(T));
}
