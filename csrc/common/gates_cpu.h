// The gates' recurrences within a segment, forward and backward: everything of a chunk that does
// not depend on the memory. Included by each_isa_cpu.h through a memory's kernel, once per
// instruction set.

// The gates of a segment of n tokens and the coefficients they give; row t of a matrix is for the
// state after token t.
template <class T>
struct Coefficients {
    T *lr, *momentum, *keep;  // [n]; keep = 1 - decay
    T *b, *c, *m;             // [1 + n]: the start's w in w, its s in w, its s in s; 0: the start
    T *in_weights, *in_momenta;  // [1 + n][lt]: A and N, how much of token s's gradient is in w and
                                 // in s; row 0 is zero
    T *d_b, *d_c, *d_m, *d_in_weights;  // [n], [n], [n], [n][lt]: gradients, backward only
    T *d_row_weights, *d_row_momenta;   // [lt]
    int64_t lt;

    void carve(Carver<T>& carver, int64_t rows, int64_t ld, bool backward) {
        lt = ld;
        lr = carver.take(rows), momentum = carver.take(rows), keep = carver.take(rows);
        b = carver.take(rows + 1), c = carver.take(rows + 1), m = carver.take(rows + 1);
        in_weights = carver.take((rows + 1) * ld), in_momenta = carver.take((rows + 1) * ld);
        if (!backward) return;
        d_b = carver.take(rows), d_c = carver.take(rows), d_m = carver.take(rows);
        d_in_weights = carver.take(rows * ld), d_row_weights = carver.take(ld),
        d_row_momenta = carver.take(ld);
    }
    T* weights_row(int64_t t) const { return in_weights + (t + 1) * lt; }  // t = -1: the start
    T* momenta_row(int64_t t) const { return in_momenta + (t + 1) * lt; }

    // A_t = keep_t A_{t-1} + N_t,  N_t = momentum_t N_{t-1} + lr_t at column t; likewise b, c, m.
    void compute(int64_t n, bool has_momentum) {
        constexpr int kLanes = Simd<T>::kLanes;
        for (int64_t j = 0; j < lt; j++) in_weights[j] = in_momenta[j] = 0;
        b[0] = 1, c[0] = 0, m[0] = has_momentum ? 1 : 0;
        for (int64_t t = 0; t < n; t++) {
            T *const a = weights_row(t), *const u = momenta_row(t);
            const T *const a_before = weights_row(t - 1), *const u_before = momenta_row(t - 1);
            for (int64_t j = 0; j < lt; j += kLanes) {
                const Vector<T> row = momentum[t] * load(u_before + j);
                store(u + j, row);
                store(a + j, keep[t] * load(a_before + j) + row);
            }
            u[t] = lr[t], a[t] = lr[t];  // columns from t on were zero
            b[t + 1] = keep[t] * b[t];
            m[t + 1] = momentum[t] * m[t];
            c[t + 1] = keep[t] * c[t] + m[t + 1];
        }
    }

    // The recurrences in reverse. In: d_b, d_c, d_m of the states after each token and d_in_weights
    // [n][lt] of A's rows (lower triangle, zero elsewhere), d_row_momenta of N's last row. Out: lr,
    // momentum, keep are replaced by their gradients.
    void backward(int64_t n) {
        constexpr int kLanes = Simd<T>::kLanes;
        T later_keep = 0, later_momentum = 0, sum_b = 0, sum_c = 0, sum_m = 0;
        for (int64_t j = 0; j < lt; j++) d_row_weights[j] = 0;
        for (int64_t t = n - 1; t >= 0; t--) {
            const T *const a_before = weights_row(t - 1), *const u_before = momenta_row(t - 1),
                           *const from_reads = d_in_weights + t * lt;
            Vector<T> d_keep = {}, d_momentum = {};
            const T kept =
                t == n - 1
                    ? T(1)
                    : later_momentum;  // d_row_momenta arrives holding the last row's own gradient
            for (int64_t j = 0; j < lt; j += kLanes) {
                const Vector<T> d_a = load(from_reads + j) + later_keep * load(d_row_weights + j);
                const Vector<T> d_u = d_a + kept * load(d_row_momenta + j);
                store(d_row_weights + j, d_a), store(d_row_momenta + j, d_u);
                d_keep += d_a * load(a_before + j), d_momentum += d_u * load(u_before + j);
            }
            sum_b = d_b[t] + later_keep * sum_b;
            sum_c = d_c[t] + later_keep * sum_c;
            sum_m = d_m[t] + sum_c + later_momentum * sum_m;
            later_keep = keep[t], later_momentum = momentum[t];
            keep[t] = sum<T>(d_keep) + sum_b * b[t] + sum_c * c[t];
            momentum[t] = sum<T>(d_momentum) + sum_m * m[t];
            lr[t] = d_row_momenta[t];
        }
    }
};
