// What a segment of n tokens does to one layer of a memory, forward and backward: every layer is a
// linear memory of its own inputs x and errors e (docs/derivations.md has the algebra, in these
// names). Included by each_isa_cpu.h through a memory's kernel, once per instruction set.
//
//   result = b*(queries w) + c*(queries s) - (A * queries x^T) e
//   w = b w + c s - x^T (g*e),  s = m s - x^T (u*e)       g, u: last rows of A and N
//
// Tiles are [tokens or rows of w][leading dimension]; li, lo, lt are the leading dimensions for the
// layer's inputs, its outputs, and token columns.

template <class T>
struct Layer {
    int64_t in, out, li, lo;
    T *weights, *momenta, *anchor;  // [in][lo], the state
    T *x, *queries;                 // [n][li]
    T *errors, *result;             // [n][lo]
    // backward only
    T *d_weights, *d_momenta, *d_anchor;           // [in][lo]
    T *d_x, *d_queries;                            // [n][li]
    T *d_errors, *d_result;                        // [n][lo]; the latter is given
    T *kept_weights, *kept_momenta, *kept_anchor;  // start of every segment of a group of chunks

    int64_t size() const { return in * lo; }
    void copy(const T* from, T* to) const { __builtin_memcpy(to, from, size() * sizeof(T)); }
    void clear(T* matrix) const { __builtin_memset(matrix, 0, size() * sizeof(T)); }
    void add(const T* from, T* to) const {
        for (int64_t i = 0; i < size(); i++) to[i] += from[i];
    }
    // <a, b> of two [in][lo] matrices, whose padding is not looked at.
    T inner(const T* a, const T* b) const {
        if (lo == out) return dot(size(), a, b);
        T total = 0;
        for (int64_t i = 0; i < in; i++) total += dot(out, a + i * lo, b + i * lo);
        return total;
    }

    void carve_state(Carver<T>& carver, int64_t in_, int64_t out_, bool has_momentum, bool backward,
                     int64_t kept) {
        constexpr int kLanes = Simd<T>::kLanes;
        in = in_, out = out_, li = round_up(in, kLanes), lo = round_up(out, kLanes);
        weights = carver.take(size()), anchor = carver.take(size());
        momenta = carver.take(has_momentum ? size() : 0);
        if (!backward) return;
        d_weights = carver.take(size()), d_anchor = carver.take(size());
        d_momenta = carver.take(has_momentum ? size() : 0);
        kept_weights = carver.take(kept * size()), kept_anchor = carver.take(kept * size());
        kept_momenta = carver.take(has_momentum ? kept * size() : 0);
    }
    void carve_rows(Carver<T>& carver, int64_t rows, bool backward) {
        x = carver.take(rows * li), queries = carver.take(rows * li);
        errors = carver.take(rows * lo), result = carver.take(rows * lo);
        if (!backward) return;
        d_x = carver.take(rows * li), d_queries = carver.take(rows * li);
        d_errors = carver.take(rows * lo), d_result = carver.take(rows * lo);
    }
};

// The work on a layer, with the segment's coefficients and scratch memory that layers share.
template <class T>
struct LayerWork {
    Read read;
    bool has_momentum;
    Coefficients<T> gate;
    int64_t lt;
    T *x_t, *scores, *scaled;                                  // [in][lt], [n][lt], [n][lo]
    T *product, *errors_t, *d_scores, *read_scores, *state_t;  // backward only

    // For layers of at most `width` inputs and outputs.
    void carve(Carver<T>& carver, int64_t rows, int64_t width, bool backward) {
        constexpr int kLanes = Simd<T>::kLanes;
        const int64_t wide = round_up(width, kLanes);
        lt = round_up(rows, kLanes);
        gate.carve(carver, rows, lt, backward);
        x_t = carver.take(width * lt), scores = carver.take(rows * lt);
        scaled = carver.take(rows * wide);
        if (!backward) return;
        product = carver.take(rows * wide), errors_t = carver.take(width * lt);
        d_scores = carver.take(rows * lt), read_scores = carver.take(rows * lt);
    }

    bool scored() const { return read != Read::chunk; }
    int64_t read_row(int64_t t) const {  // of the state token t reads
        return read == Read::before ? t - 1 : t;
    }
    const T* read_b() const { return gate.b + (read == Read::before ? 0 : 1); }
    const T* read_c() const { return gate.c + (read == Read::before ? 0 : 1); }

    // scores = queries x^T, lower triangle
    void score(const Layer<T>& l, int64_t n) {
        transpose(n, l.in, l.x, l.li, x_t, lt);
        multiply<Part::lower_result>(n, n, l.in, plain(l.queries, l.li), x_t, lt, scores, lt,
                                     one<T>(), false);
    }
    void scale_rows(const Layer<T>& l, int64_t n, const T* factor, const T* from) {
        for (int64_t t = 0; t < n; t++)
            for (int64_t j = 0; j < l.lo; j++)
                scaled[t * l.lo + j] = factor[t] * from[t * l.lo + j];
    }

    // ---- forward ----
    void read_out(const Layer<T>& l, int64_t n) {
        const Left<T> queries = plain<T>(l.queries, l.li);
        if (!scored()) {
            multiply(n, l.out, l.in, queries, l.anchor, l.lo, l.result, l.lo, one<T>(), false);
            return;
        }
        multiply(n, l.out, l.in, queries, l.weights, l.lo, l.result, l.lo, {read_b(), 1}, false);
        if (has_momentum)
            multiply(n, l.out, l.in, queries, l.momenta, l.lo, l.result, l.lo, {read_c(), 1}, true);
        score(l, n);
        for (int64_t t = 0; t < n; t++) {
            const T* const a = gate.weights_row(read_row(t));
            T* const row = scores + t * lt;
            for (int64_t s = 0; s <= t; s++) row[s] *= a[s];
            for (int64_t s = t + 1; s < lt; s++) row[s] = 0;
        }
        multiply<Part::lower_left>(n, l.out, n, plain(scores, lt), l.errors, l.lo, l.result, l.lo,
                                   minus_one<T>(), true);
    }
    // The state after the segment.
    void advance(Layer<T>& l, int64_t n) {
        const T b = gate.b[n], c = gate.c[n], m = gate.m[n];
        const Left<T> x_t_left = transposed<T>(l.x, l.li);
        scale_rows(l, n, gate.weights_row(n - 1), l.errors);
        if (has_momentum)
            for (int64_t i = 0; i < l.size(); i++)
                l.weights[i] = b * l.weights[i] + c * l.momenta[i];
        else
            for (int64_t i = 0; i < l.size(); i++) l.weights[i] *= b;
        multiply(l.in, l.out, n, x_t_left, scaled, l.lo, l.weights, l.lo, minus_one<T>(), true);
        if (!has_momentum) return;
        scale_rows(l, n, gate.momenta_row(n - 1), l.errors);
        for (int64_t i = 0; i < l.size(); i++) l.momenta[i] *= m;
        multiply(l.in, l.out, n, x_t_left, scaled, l.lo, l.momenta, l.lo, minus_one<T>(), true);
    }

    // ---- backward ----
    void clear_gradients(int64_t n) {
        for (int64_t t = 0; t < n; t++) gate.d_b[t] = gate.d_c[t] = gate.d_m[t] = 0;
        for (int64_t i = 0; i < n * lt; i++) gate.d_in_weights[i] = 0;
        for (int64_t j = 0; j < lt; j++) gate.d_row_momenta[j] = 0;
    }

    // Through the result: begins d_queries, d_x and d_errors.
    void through_read(const Layer<T>& l, int64_t n) {
        if (!scored()) {
            transpose(l.in, l.out, l.anchor, l.lo, state_t, l.li);
            multiply(n, l.in, l.out, plain<T>(l.d_result, l.lo), state_t, l.li, l.d_queries, l.li,
                     one<T>(), false);
            for (int64_t i = 0; i < n * l.li; i++) l.d_x[i] = 0;
            for (int64_t i = 0; i < n * l.lo; i++) l.d_errors[i] = 0;
            return;
        }
        score(l, n);
        transpose(n, l.out, l.errors, l.lo, errors_t, lt);
        multiply<Part::lower_result>(n, n, l.out, plain<T>(l.d_result, l.lo), errors_t, lt,
                                     d_scores, lt, one<T>(), false);
        for (int64_t t = 0; t < n; t++) {
            const int64_t row = read_row(t);
            const T* __restrict const a = gate.weights_row(row), * __restrict const s_row =
                                                                     scores + t * lt;
            T* __restrict const d_row = d_scores + t * lt, * __restrict const a_row =
                                                               read_scores + t * lt;
            if (row >= 0) {
                T* __restrict const d_a = gate.d_in_weights + row * lt;
                for (int64_t s = 0; s <= t; s++) d_a[s] -= d_row[s] * s_row[s];
            }
            for (int64_t s = 0; s <= t; s++) a_row[s] = a[s] * s_row[s], d_row[s] *= -a[s];
            for (int64_t s = t + 1; s < lt; s++) a_row[s] = d_row[s] = 0;
        }
        multiply<Part::upper_left>(n, l.out, n, transposed(read_scores, lt), l.d_result, l.lo,
                                   l.d_errors, l.lo, minus_one<T>(), false);
        multiply<Part::upper_left>(n, l.in, n, transposed(d_scores, lt), l.queries, l.li, l.d_x,
                                   l.li, one<T>(), false);
        multiply<Part::lower_left>(n, l.in, n, plain(d_scores, lt), l.x, l.li, l.d_queries, l.li,
                                   one<T>(), false);
        through_state_read(l, n, l.weights, read_b(), gate.d_b);
        if (has_momentum) through_state_read(l, n, l.momenta, read_c(), gate.d_c);
    }
    // result += factor * (queries state): adds to d_queries and to the factor's gradient.
    void through_state_read(const Layer<T>& l, int64_t n, const T* state, const T* factor,
                            T* d_factor) {
        transpose(l.in, l.out, state, l.lo, state_t, l.li);
        multiply(n, l.in, l.out, plain<T>(l.d_result, l.lo), state_t, l.li, product, l.li, one<T>(),
                 false);
        for (int64_t t = 0; t < n; t++) {
            if (const int64_t row = read_row(t); row >= 0)
                d_factor[row] += dot(l.in, l.queries + t * l.li, product + t * l.li);
            for (int64_t j = 0; j < l.li; j++)
                l.d_queries[t * l.li + j] += factor[t] * product[t * l.li + j];
        }
    }

    // Through the state after the segment: adds to d_errors, d_x and the gates' gradients.
    void through_update(const Layer<T>& l, int64_t n) {
        through_row(l, n, gate.weights_row(n - 1), l.d_weights, gate.d_in_weights + (n - 1) * lt);
        gate.d_b[n - 1] += l.inner(l.d_weights, l.weights);
        if (!has_momentum) return;
        through_row(l, n, gate.momenta_row(n - 1), l.d_momenta, gate.d_row_momenta);
        gate.d_c[n - 1] += l.inner(l.d_weights, l.momenta);
        gate.d_m[n - 1] += l.inner(l.d_momenta, l.momenta);
    }
    // state -= x^T (row*e)
    void through_row(const Layer<T>& l, int64_t n, const T* row, const T* d_state, T* d_row) {
        multiply(n, l.out, l.in, plain<T>(l.x, l.li), d_state, l.lo, product, l.lo, one<T>(),
                 false);
        for (int64_t t = 0; t < n; t++) {
            d_row[t] -= dot(l.out, product + t * l.lo, l.errors + t * l.lo);
            for (int64_t j = 0; j < l.lo; j++)
                l.d_errors[t * l.lo + j] -= row[t] * product[t * l.lo + j];
        }
        transpose(l.in, l.out, d_state, l.lo, state_t, l.li);
        for (int64_t t = 0; t < n; t++) product[t] = -row[t];
        multiply(n, l.in, l.out, plain<T>(l.errors, l.lo), state_t, l.li, l.d_x, l.li, {product, 1},
                 true);
    }

    // y = x anchor: adds to d_x and d_anchor.
    void through_anchor(const Layer<T>& l, int64_t n, const T* d_y) {
        transpose(l.in, l.out, l.anchor, l.lo, state_t, l.li);
        multiply(n, l.in, l.out, plain<T>(d_y, l.lo), state_t, l.li, l.d_x, l.li, one<T>(), true);
        multiply(l.in, l.out, n, transposed<T>(l.x, l.li), d_y, l.lo, l.d_anchor, l.lo, one<T>(),
                 true);
    }

    // d_weights and d_momenta become those before the segment, as far as the update goes ...
    void to_state_before(Layer<T>& l, int64_t n) {
        const T b = gate.b[n], c = gate.c[n], m = gate.m[n];
        if (has_momentum)
            for (int64_t i = 0; i < l.size(); i++)
                l.d_momenta[i] = c * l.d_weights[i] + m * l.d_momenta[i];
        for (int64_t i = 0; i < l.size(); i++) l.d_weights[i] *= b;
    }
    // ... and with what is read from them, or from the anchor.
    void add_read_state(Layer<T>& l, int64_t n) {
        const Left<T> queries_t = transposed<T>(l.queries, l.li);
        if (!scored()) {
            multiply(l.in, l.out, n, queries_t, l.d_result, l.lo, l.d_anchor, l.lo, one<T>(), true);
            return;
        }
        scale_rows(l, n, read_b(), l.d_result);
        multiply(l.in, l.out, n, queries_t, scaled, l.lo, l.d_weights, l.lo, one<T>(), true);
        if (!has_momentum) return;
        scale_rows(l, n, read_c(), l.d_result);
        multiply(l.in, l.out, n, queries_t, scaled, l.lo, l.d_momenta, l.lo, one<T>(), true);
    }
};
