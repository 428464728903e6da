// The linear Titans memory by chunks (the dual form; docs/derivations.md has the algebra, in these
// names). Included by each_isa_cpu.h, once per instruction set.
//
// One task is one sequence and head; it walks its tokens in segments that end at chunk boundaries
// or after kSegment tokens, whichever comes first, with everything of a segment in a thread's
// cache:
//
//   forward    e = k anchor - v              (or -v)
//              o = b*(q w) + c*(q s) - (A * q k^T) e
//              w = b w + c s - k^T (g*e),  s = m s - k^T (u*e)       g, u: last rows of A and N
//   backward   forward over a group of chunks from its checkpoint, keeping each segment's start;
//   then segments in reverse
//
// Tiles are [tokens or K rows][leading dimension]; lk, lv, lt are the leading dimensions for K, V
// and token columns.

constexpr int64_t kSegment = 64;

#include "titans/titans_gates_cpu.h"

// A stretch of one sequence's tokens within one chunk.
struct Segment {
    int64_t first;  // token of the call
    int64_t rows;
    bool new_chunk;
};

template <class T>
struct TitansLinearTask {
    const TitansLinearParams& p;
    const int64_t sequence, head, batch;
    int64_t start, length,
        offset;  // first token in its batch row, tokens, position within the first chunk
    int64_t lk, lv, lt;
    const bool has_momentum, l2;
    Coefficients<T> gate;
    T *k, *q, *v, *e, *o, *k_t,
        *scores;  // tiles of a segment; o is scratch for [rows][V] in the backward
    T *weights, *momenta, *anchor;  // the state
    // backward only
    T *d_o, *d_q, *d_k, *d_e, *e_t, *d_scores, *read_scores, *product, *state_t, *d_weights,
        *d_momenta, *d_anchor;
    T *kept_weights, *kept_momenta, *kept_anchor;  // start of every segment of a group of chunks

    static int64_t rows_at_most(const TitansLinearParams& p) {
        return most(1, least(kSegment, least(p.chunk_size, p.tokens)));
    }
    static int64_t segments_of_chunk(const TitansLinearParams& p) {
        return (least(p.chunk_size, most(p.tokens, 1)) + kSegment - 1) / kSegment;
    }
    static int64_t segments_of_group(const TitansLinearParams& p) {
        const int64_t chunks = least(most(p.checkpoint_every, 1), p.tokens / p.chunk_size + 2);
        return chunks * segments_of_chunk(p);
    }

    TitansLinearTask(const TitansLinearParams& params, int64_t task, T* scratch, bool backward,
                     int64_t* scratch_size)
        : p(params),
          sequence(task / params.heads),
          head(task % params.heads),
          batch(params.cu_seqlens ? 0 : sequence),
          has_momentum(params.momentum.data),
          l2(params.objective == TitansObjective::l2) {
        start = 0, length = p.tokens;
        if (p.cu_seqlens) {
            start = most(0, least(p.tokens, p.cu_seqlens[sequence]));
            length = most(0, least(p.tokens, p.cu_seqlens[sequence + 1]) - start);
        }
        offset = p.position ? p.position[sequence] % p.chunk_size : 0;

        constexpr int kLanes = Simd<T>::kLanes;
        const int64_t rows = rows_at_most(p), state = p.key_dim * round_up(p.value_dim, kLanes);
        lk = round_up(p.key_dim, kLanes), lv = round_up(p.value_dim, kLanes),
        lt = round_up(rows, kLanes);
        Carver<T> carver{scratch};
        gate.carve(carver, rows, lt, backward);
        k = carver.take(rows * lk), q = carver.take(rows * lk);
        v = carver.take(rows * lv), e = carver.take(rows * lv), o = carver.take(rows * lv);
        k_t = carver.take(p.key_dim * lt), scores = carver.take(rows * lt);
        weights = carver.take(state), momenta = carver.take(state), anchor = carver.take(state);
        if (backward) {
            d_o = carver.take(rows * lv), d_e = carver.take(rows * lv);
            d_q = carver.take(rows * lk), d_k = carver.take(rows * lk),
            product = carver.take(rows * most(lk, lv));
            e_t = carver.take(p.value_dim * lt), d_scores = carver.take(rows * lt),
            read_scores = carver.take(rows * lt);
            state_t = carver.take(p.value_dim * lk);
            d_weights = carver.take(state), d_momenta = carver.take(state),
            d_anchor = carver.take(state);
            const int64_t kept = segments_of_group(p) * state;
            kept_weights = carver.take(kept), kept_anchor = carver.take(kept),
            kept_momenta = carver.take(has_momentum ? kept : 0);
        }
        *scratch_size = carver.used;
    }
    static int64_t scratch_size(const TitansLinearParams& p, bool backward) {
        int64_t size;
        TitansLinearParams sizes_only = p;
        sizes_only.cu_seqlens = nullptr, sizes_only.position = nullptr;
        TitansLinearTask(sizes_only, 0, nullptr, backward, &size);
        return size;
    }

    // ---- segments and chunks of the sequence ----
    int64_t chunks() const {
        return length ? (offset + length + p.chunk_size - 1) / p.chunk_size : 0;
    }
    int64_t chunk_begin(int64_t chunk) const { return most(0, chunk * p.chunk_size - offset); }
    int64_t chunk_end(int64_t chunk) const {
        return least(length, (chunk + 1) * p.chunk_size - offset);
    }
    bool at_boundary(int64_t token) const { return (offset + token) % p.chunk_size == 0; }
    Segment segment_at(int64_t token, int64_t end) const {
        return {token, least(kSegment, end - token), at_boundary(token)};
    }

    // ---- the state's places ----
    static T* matrix(const MatrixTensor& tensor, int64_t n, int64_t h) {
        return tensor.data ? static_cast<T*>(tensor.data) + n * tensor.batch + h * tensor.head
                           : nullptr;
    }
    int64_t state_size() const { return p.key_dim * lv; }
    void read_state(const MatrixTensor& from, T* tile) const {
        if (const T* data = matrix(from, sequence, head))
            load_matrix(data, p.key_dim, p.value_dim, tile, lv);
        else
            fill(tile, T(0));
    }
    void write_state(const MatrixTensor& to, const T* tile) const {
        if (T* data = matrix(to, sequence, head))
            store_matrix(data, p.key_dim, p.value_dim, tile, lv);
    }
    void copy(const T* from, T* to) const { __builtin_memcpy(to, from, state_size() * sizeof(T)); }
    void fill(T* tile, T value) const {
        for (int64_t i = 0; i < state_size(); i++) tile[i] = value;
    }
    void add(const T* from, T* to) const {
        for (int64_t i = 0; i < state_size(); i++) to[i] += from[i];
    }
    // Slots of the sequences that begin at `first` of the whole batch's tokens and later start
    // here.
    int64_t first_slot(int64_t n, int64_t first) const {
        return first / (p.chunk_size * p.checkpoint_every) + n;
    }
    int64_t batch_token() const { return p.cu_seqlens ? start : sequence * p.tokens; }
    T* slot(int64_t index) const {
        const int64_t size = p.key_dim * p.value_dim * (has_momentum ? 2 : 1);
        return static_cast<T*>(p.checkpoints) + (index * p.heads + head) * size;
    }
    T* checkpoint(int64_t chunk) const {  // of the chunk's start; null where none is taken
        if (!p.checkpoint_every || chunk == 0 || chunk % p.checkpoint_every) return nullptr;
        return slot(first_slot(sequence, batch_token()) + chunk / p.checkpoint_every - 1);
    }
    void clear_unused_checkpoints() const {
        if (!p.checkpoint_every) return;
        const int64_t used = chunks() ? (chunks() - 1) / p.checkpoint_every : 0;
        const int64_t end = first_slot(sequence + 1, batch_token() + length);
        for (int64_t index = first_slot(sequence, batch_token()) + used; index < end; index++)
            __builtin_memset(slot(index), 0,
                             p.key_dim * p.value_dim * (has_momentum ? 2 : 1) * sizeof(T));
    }
    void start_state() {
        read_state(p.weights, weights), read_state(p.momenta, momenta);
        read_state(p.anchor.data && offset ? p.anchor : p.weights, anchor);
    }

    // ---- one segment ----
    T gate_value(const TokenTensor& gate_tensor, int64_t token) const {
        return static_cast<const T*>(
            gate_tensor.data)[batch * gate_tensor.batch + (start + token) * gate_tensor.token +
                              head * gate_tensor.head];
    }
    void store_gate(const TokenTensor& gate_tensor, const Segment& at, const T* values,
                    T sign) const {
        if (!gate_tensor.data) return;
        T* const to = static_cast<T*>(gate_tensor.data) + batch * gate_tensor.batch +
                      (start + at.first) * gate_tensor.token + head * gate_tensor.head;
        for (int64_t t = 0; t < at.rows; t++) to[t * gate_tensor.token] = sign * values[t];
    }
    void load_rows(const TokenTensor& from, const Segment& at, int64_t columns, T* tile,
                   int64_t ld) const {
        load_tokens<T>(p.element, from, batch, start + at.first, head, at.rows, columns, tile, ld);
    }
    void store_rows(const TokenTensor& to, const Segment& at, int64_t columns, const T* tile,
                    int64_t ld) const {
        store_tokens<T>(p.element, to, batch, start + at.first, head, at.rows, columns, tile, ld);
    }

    // Loads k, the gates and v; computes the coefficients and e.
    void prepare(const Segment& at) {
        const int64_t n = at.rows;
        for (int64_t t = 0; t < n; t++) {
            gate.lr[t] = gate_value(p.lr, at.first + t);
            gate.momentum[t] = has_momentum ? gate_value(p.momentum, at.first + t) : 0;
            gate.keep[t] = p.decay.data ? 1 - gate_value(p.decay, at.first + t) : 1;
        }
        gate.compute(n, has_momentum);
        load_rows(p.k, at, p.key_dim, k, lk);
        load_rows(p.v, at, p.value_dim, v, lv);
        if (l2)
            multiply(n, p.value_dim, p.key_dim, plain(k, lk), anchor, lv, e, lv, one<T>(), false);
        for (int64_t i = 0; i < n * lv; i++) e[i] = (l2 ? e[i] : 0) - v[i];
    }
    // scores = q k^T, lower triangle
    void score(int64_t n) {
        transpose(n, p.key_dim, k, lk, k_t, lt);
        multiply<Part::lower_result>(n, n, p.key_dim, plain(q, lk), k_t, lt, scores, lt, one<T>(),
                                     false);
    }
    int64_t read_row(int64_t t) const {
        return p.read == TitansRead::before ? t - 1 : t;
    }  // of the state token t reads
    const T* read_b() const { return gate.b + (p.read == TitansRead::before ? 0 : 1); }
    const T* read_c() const { return gate.c + (p.read == TitansRead::before ? 0 : 1); }

    void read_out(const Segment& at) {
        const int64_t n = at.rows;
        load_rows(p.q, at, p.key_dim, q, lk);
        if (p.read == TitansRead::chunk) {
            multiply(n, p.value_dim, p.key_dim, plain(q, lk), anchor, lv, o, lv, one<T>(), false);
        } else {
            multiply(n, p.value_dim, p.key_dim, plain(q, lk), weights, lv, o, lv, {read_b(), 1},
                     false);
            if (has_momentum)
                multiply(n, p.value_dim, p.key_dim, plain(q, lk), momenta, lv, o, lv, {read_c(), 1},
                         true);
            score(n);
            for (int64_t t = 0; t < n; t++) {
                const T* const a = gate.weights_row(read_row(t));
                T* const row = scores + t * lt;
                for (int64_t s = 0; s <= t; s++) row[s] *= a[s];
                for (int64_t s = t + 1; s < lt; s++) row[s] = 0;
            }
            multiply<Part::lower_left>(n, p.value_dim, n, plain(scores, lt), e, lv, o, lv,
                                       minus_one<T>(), true);
        }
        store_rows(p.o, at, p.value_dim, o, lv);
    }

    // The state after the segment. v is free by now and holds e, scaled.
    void advance(int64_t n) {
        const T b = gate.b[n], c = gate.c[n], m = gate.m[n];
        const T *const g = gate.weights_row(n - 1), *const u = gate.momenta_row(n - 1);
        const int64_t size = state_size();
        for (int64_t t = 0; t < n; t++)
            for (int64_t j = 0; j < lv; j++) v[t * lv + j] = g[t] * e[t * lv + j];
        if (has_momentum)
            for (int64_t i = 0; i < size; i++) weights[i] = b * weights[i] + c * momenta[i];
        else
            for (int64_t i = 0; i < size; i++) weights[i] *= b;
        multiply(p.key_dim, p.value_dim, n, transposed(k, lk), v, lv, weights, lv, minus_one<T>(),
                 true);
        if (!has_momentum) return;
        for (int64_t t = 0; t < n; t++)
            for (int64_t j = 0; j < lv; j++) v[t * lv + j] = u[t] * e[t * lv + j];
        for (int64_t i = 0; i < size; i++) momenta[i] *= m;
        multiply(p.key_dim, p.value_dim, n, transposed(k, lk), v, lv, momenta, lv, minus_one<T>(),
                 true);
    }

    void forward() {
        start_state();
        for (int64_t chunk = 0; chunk < chunks(); chunk++) {
            const int64_t end = chunk_end(chunk);
            if (T* to = checkpoint(chunk)) {
                store_matrix(to, p.key_dim, p.value_dim, weights, lv);
                if (has_momentum)
                    store_matrix(to + p.key_dim * p.value_dim, p.key_dim, p.value_dim, momenta, lv);
            }
            for (int64_t token = chunk_begin(chunk); token < end; token += kSegment) {
                const Segment at = segment_at(token, end);
                if (at.new_chunk) copy(weights, anchor);
                prepare(at);
                read_out(at);
                advance(at.rows);
            }
        }
        clear_unused_checkpoints();
        write_state(p.final_weights, weights), write_state(p.final_momenta, momenta);
        write_state(p.final_anchor, at_boundary(length) ? weights : anchor);
    }

    void backward_segment(const Segment& at) {
        const int64_t n = at.rows, K = p.key_dim, V = p.value_dim;
        const bool scored = p.read != TitansRead::chunk;
        prepare(at);
        load_rows(p.q, at, K, q, lk);
        if (p.d_o.data)
            load_rows(p.d_o, at, V, d_o, lv);
        else
            for (int64_t i = 0; i < n * lv; i++) d_o[i] = 0;

        // Through the scores: o -= (A * scores) e
        for (int64_t t = 0; t < n; t++) gate.d_b[t] = gate.d_c[t] = gate.d_m[t] = 0;
        for (int64_t i = 0; i < n * lt; i++) gate.d_in_weights[i] = 0;
        transpose(n, V, e, lv, e_t, lt);
        if (scored) {
            score(n);
            multiply<Part::lower_result>(n, n, V, plain(d_o, lv), e_t, lt, d_scores, lt, one<T>(),
                                         false);
            for (int64_t t = 0; t < n; t++) {
                const int64_t row = read_row(t);
                const T* __restrict const a = gate.weights_row(row), * __restrict const x =
                                                                         scores + t * lt;
                T* __restrict const dx = d_scores + t * lt, * __restrict const ax =
                                                                read_scores + t * lt;
                if (row >= 0) {
                    T* __restrict const d_a = gate.d_in_weights + row * lt;
                    for (int64_t s = 0; s <= t; s++) d_a[s] = -dx[s] * x[s];
                }
                for (int64_t s = 0; s <= t; s++) ax[s] = a[s] * x[s], dx[s] *= -a[s];
                for (int64_t s = t + 1; s < lt; s++) ax[s] = dx[s] = 0;
            }
            multiply<Part::upper_left>(n, V, n, transposed(read_scores, lt), d_o, lv, d_e, lv,
                                       minus_one<T>(), false);
        } else {
            for (int64_t i = 0; i < n * lv; i++) d_e[i] = 0;
        }

        // Through the state after the segment: w = b w + c s - k^T (g*e), s = m s - k^T (u*e)
        T *const d_a_last = gate.d_in_weights + (n - 1) * lt, *const d_u_last = gate.d_row_momenta;
        through_update(n, gate.weights_row(n - 1), d_weights, d_a_last, false);
        for (int64_t j = 0; j < lt; j++) d_u_last[j] = 0;
        if (has_momentum) through_update(n, gate.momenta_row(n - 1), d_momenta, d_u_last, true);
        gate.d_b[n - 1] += dot(state_size(), d_weights, weights);
        if (has_momentum) {
            gate.d_c[n - 1] += dot(state_size(), d_weights, momenta);
            gate.d_m[n - 1] += dot(state_size(), d_momenta, momenta);
        }

        for (int64_t i = 0; i < n * lv; i++) v[i] = -d_e[i];
        store_rows(p.d_v, at, V, v, lv);

        // To k and q
        if (l2 || !scored) transpose(K, V, anchor, lv, state_t, lk);
        if (l2) multiply(n, K, V, plain(d_e, lv), state_t, lk, d_k, lk, one<T>(), true);
        if (scored) {
            multiply<Part::upper_left>(n, K, n, transposed(d_scores, lt), q, lk, d_k, lk, one<T>(),
                                       true);
            multiply<Part::lower_left>(n, K, n, plain(d_scores, lt), k, lk, d_q, lk, one<T>(),
                                       false);
            through_read(n, weights, read_b(), gate.d_b);
            if (has_momentum) through_read(n, momenta, read_c(), gate.d_c);
        } else {
            multiply(n, K, V, plain(d_o, lv), state_t, lk, d_q, lk, one<T>(), false);
        }
        store_rows(p.d_k, at, K, d_k, lk);
        store_rows(p.d_q, at, K, d_q, lk);

        // To the state before the segment and the anchor
        const T b = gate.b[n], c = gate.c[n], m = gate.m[n];
        if (has_momentum)
            for (int64_t i = 0; i < state_size(); i++)
                d_momenta[i] = c * d_weights[i] + m * d_momenta[i];
        for (int64_t i = 0; i < state_size(); i++) d_weights[i] *= b;
        if (l2) multiply(K, V, n, transposed(k, lk), d_e, lv, d_anchor, lv, one<T>(), true);
        if (scored) {
            add_read(n, read_b(), d_weights);
            if (has_momentum) add_read(n, read_c(), d_momenta);
        } else {
            multiply(K, V, n, transposed(q, lk), d_o, lv, d_anchor, lv, one<T>(), true);
        }

        gate.backward(n);
        store_gate(p.d_lr, at, gate.lr, 1), store_gate(p.d_momentum, at, gate.momentum, 1),
            store_gate(p.d_decay, at, gate.keep, -1);
        if (at.new_chunk) {
            add(d_anchor, d_weights);
            fill(d_anchor, 0);
        }
    }
    // state -= k^T (row*e): adds to d_e and d_row, begins d_k or adds to it.
    void through_update(int64_t n, const T* row, const T* d_state, T* d_row, bool accumulate) {
        multiply(n, p.value_dim, p.key_dim, plain(k, lk), d_state, lv, product, lv, one<T>(),
                 false);
        for (int64_t t = 0; t < n; t++) {
            d_row[t] -= dot(p.value_dim, product + t * lv, e + t * lv);
            for (int64_t j = 0; j < lv; j++) d_e[t * lv + j] -= row[t] * product[t * lv + j];
        }
        transpose(p.key_dim, p.value_dim, d_state, lv, state_t, lk);
        for (int64_t t = 0; t < n; t++) product[t] = -row[t];
        multiply(n, p.key_dim, p.value_dim, plain(e, lv), state_t, lk, d_k, lk, {product, 1},
                 accumulate);
    }
    // o += factor * (q state): adds to d_q and to the factor's gradient.
    void through_read(int64_t n, const T* state, const T* factor, T* d_factor) {
        transpose(p.key_dim, p.value_dim, state, lv, state_t, lk);
        multiply(n, p.key_dim, p.value_dim, plain(d_o, lv), state_t, lk, product, lk, one<T>(),
                 false);
        for (int64_t t = 0; t < n; t++) {
            if (const int64_t row = read_row(t); row >= 0)
                d_factor[row] += dot(p.key_dim, q + t * lk, product + t * lk);
            for (int64_t j = 0; j < lk; j++) d_q[t * lk + j] += factor[t] * product[t * lk + j];
        }
    }
    // d_state += q^T (factor*d_o)
    void add_read(int64_t n, const T* factor, T* d_state) {
        for (int64_t t = 0; t < n; t++)
            for (int64_t j = 0; j < lv; j++) o[t * lv + j] = factor[t] * d_o[t * lv + j];
        multiply(p.key_dim, p.value_dim, n, transposed(q, lk), o, lv, d_state, lv, one<T>(), true);
    }

    void backward() {
        read_state(p.d_final_weights, d_weights), read_state(p.d_final_momenta, d_momenta),
            read_state(p.d_final_anchor, d_anchor);
        if (at_boundary(length)) {
            add(d_anchor, d_weights);
            fill(d_anchor, 0);
        }
        const int64_t group = p.checkpoint_every;
        for (int64_t first = chunks() ? (chunks() - 1) / group * group : -1; first >= 0;
             first -= group) {
            const int64_t last = least(chunks(), first + group);
            if (const T* from = checkpoint(first)) {
                load_matrix(from, p.key_dim, p.value_dim, weights, lv);
                if (has_momentum)
                    load_matrix(from + p.key_dim * p.value_dim, p.key_dim, p.value_dim, momenta,
                                lv);
            } else {
                start_state();
            }
            // Forward over the group, keeping every segment's start; then its segments in reverse.
            int64_t index = 0;
            for (int64_t chunk = first; chunk < last; chunk++)
                for (int64_t token = chunk_begin(chunk); token < chunk_end(chunk);
                     token += kSegment, index++) {
                    const Segment at = segment_at(token, chunk_end(chunk));
                    if (at.new_chunk) copy(weights, anchor);
                    copy(weights, kept_weights + index * state_size()),
                        copy(anchor, kept_anchor + index * state_size());
                    if (has_momentum) copy(momenta, kept_momenta + index * state_size());
                    if (token + at.rows == chunk_end(last - 1))
                        continue;  // nobody needs the state after the group
                    prepare(at);
                    advance(at.rows);
                }
            T *const own_weights = weights, *const own_momenta = momenta,
                     *const own_anchor = anchor;
            for (int64_t chunk = last - 1; chunk >= first; chunk--) {
                const int64_t begin = chunk_begin(chunk), end = chunk_end(chunk);
                for (int64_t token = begin + (end - begin - 1) / kSegment * kSegment;
                     token >= begin; token -= kSegment) {
                    index--;
                    weights = kept_weights + index * state_size(),
                    anchor = kept_anchor + index * state_size();
                    if (has_momentum) momenta = kept_momenta + index * state_size();
                    backward_segment(segment_at(token, end));
                }
            }
            weights = own_weights, momenta = own_momenta, anchor = own_anchor;
        }
        write_state(p.d_anchor, d_anchor);
        write_state(p.d_weights, d_weights), write_state(p.d_momenta, d_momenta);
    }
};

template <class T>
void titans_linear_tasks(const TitansLinearParams& p, bool backward, int64_t begin, int64_t end,
                         void* scratch) {
    for (int64_t task = begin; task < end; task++) {
        int64_t size;
        TitansLinearTask<T> run(p, task, static_cast<T*>(scratch), backward, &size);
        if (backward)
            run.backward();
        else
            run.forward();
    }
}
template <class T>
int64_t titans_linear_scratch_bytes(const TitansLinearParams& p, bool backward) {
    return TitansLinearTask<T>::scratch_size(p, backward) * static_cast<int64_t>(sizeof(T));
}
