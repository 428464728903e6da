// What makes layers a memory: M(x) = x + N(core(x)), with core(x) = x w or act(x w1) w2, and N the
// LayerNorm, or nothing. Everything here is at the anchor, except the queries' way through the
// layers. Included by each_isa_cpu.h through titans_cpu.h, once per instruction set.
//
//   errors     e2 = through the norm of (M(k) - v), or of -v: the inner loss's gradient at core
//              e1 = (e2 w2^T) * act'(z),   z = k w1

template <class T>
struct TitansNetwork {
    Layer<T> layer[2];
    int layers;
    bool l2, residual;
    Activation activation;
    T norm_eps;
    const T *norm_weight, *norm_bias;  // [V], or null
    T *v, *o, *core;                   // [n][lv]; v: -d_v's place in the backward too
    T *z, *slope, *u;                  // [n][lf]; u = e2 w2^T
    T *d_o, *d_core, *d_z;             // backward only
    T *d_norm_weight, *d_norm_bias;    // [lv]

    Layer<T>& last() { return layer[layers - 1]; }

    void carve(Carver<T>& carver, const TitansParams& p, const T* weight, const T* bias,
               int64_t rows, bool backward) {
        layers = p.layers(), l2 = p.objective == Objective::l2, activation = p.activation;
        residual = p.residual && (layers == 2 || p.norm_weight.data);
        norm_eps = static_cast<T>(p.norm_eps), norm_weight = weight, norm_bias = bias;
        has_norm = p.norm_weight.data;
        const int64_t lv = last().lo, hidden = layers == 2 ? rows * layer[0].lo : 0;
        v = carver.take(rows * lv), o = carver.take(rows * lv), core = carver.take(rows * lv);
        z = carver.take(hidden), slope = carver.take(hidden), u = carver.take(hidden);
        if (!backward) return;
        d_o = carver.take(rows * lv), d_core = carver.take(rows * lv), d_z = carver.take(hidden);
        d_norm_weight = carver.take(lv), d_norm_bias = carver.take(lv);
    }
    void clear_norm_gradients() {
        for (int64_t j = 0; j < last().lo; j++) d_norm_weight[j] = d_norm_bias[j] = 0;
    }

    // ---- inputs and errors ----
    void look_back(LayerWork<T>& work, int64_t n) {
        Layer<T>& top = last();
        const int64_t lv = top.lo, V = top.out;
        if (layers == 2) {
            const Layer<T>& l = layer[0];
            multiply(n, l.out, l.in, plain<T>(l.x, l.li), l.anchor, l.lo, z, l.lo, one<T>(), false);
            activate_all(activation, n * l.lo, z, top.x, slope);
        }
        if (l2 || has_norm)
            multiply(n, V, top.in, plain<T>(top.x, top.li), top.anchor, lv, core, lv, one<T>(),
                     false);
        for (int64_t t = 0; t < n; t++) {
            T* const e = top.errors + t * lv;
            const T *const value = v + t * lv, *const key = layer[0].x + t * layer[0].li;
            if (has_norm) {
                Normed row(*this, core + t * lv);
                for (int64_t j = 0; j < V; j++)
                    e[j] = row.g(j, l2, residual ? key[j] : 0, value[j]);
                row.through(e);
            } else {
                for (int64_t j = 0; j < lv; j++) e[j] = (l2 ? core[t * lv + j] : 0) - value[j];
                if (l2 && residual)
                    for (int64_t j = 0; j < V; j++) e[j] += key[j];
            }
        }
        if (layers == 1) return;
        transpose(top.in, V, top.anchor, lv, work.state_t, top.li);
        multiply(n, top.in, V, plain<T>(top.errors, lv), work.state_t, top.li, u, top.li, one<T>(),
                 false);
        for (int64_t i = 0; i < n * top.li; i++) layer[0].errors[i] = u[i] * slope[i];
    }

    // ---- reads ----
    void through_layers(LayerWork<T>& work, int64_t n) {  // the queries; also in the backward
        work.read_out(layer[0], n);
        if (layers == 1) return;
        activate_all<T>(activation, n * layer[0].lo, layer[0].result, layer[1].queries, nullptr);
    }
    void read_out(LayerWork<T>& work, int64_t n) {
        Layer<T>& top = last();
        through_layers(work, n);
        if (layers == 2) work.read_out(top, n);
        for (int64_t t = 0; t < n; t++) {
            const T *const from = top.result + t * top.lo, *const query =
                                                               layer[0].queries + t * layer[0].li;
            T* const to = o + t * top.lo;
            if (has_norm) {
                const Normed row(*this, from);
                for (int64_t j = 0; j < top.out; j++)
                    to[j] = row.y(j) * norm_weight[j] + norm_bias[j];
            } else {
                for (int64_t j = 0; j < top.lo; j++) to[j] = from[j];
            }
            if (residual)
                for (int64_t j = 0; j < top.out; j++) to[j] += query[j];
        }
    }

    // ---- backward ----
    // From d_o to the queries, and through the layers' results to everything else.
    void through_reads(LayerWork<T>& work, int64_t n) {
        Layer<T>& top = last();
        if (layers == 2 || has_norm) through_layers(work, n);
        if (has_norm && layers == 2) work.read_out(top, n);
        for (int64_t t = 0; t < n; t++) {
            const T* const d_row = d_o + t * top.lo;
            T* const to = top.d_result + t * top.lo;
            if (has_norm) {
                const Normed row(*this, top.result + t * top.lo);
                for (int64_t j = 0; j < top.out; j++) {
                    to[j] = d_row[j] * norm_weight[j];
                    d_norm_weight[j] += d_row[j] * row.y(j), d_norm_bias[j] += d_row[j];
                }
                row.through(to);
            } else {
                for (int64_t j = 0; j < top.lo; j++) to[j] = d_row[j];
            }
        }
        work.through_read(top, n);
        if (layers == 2) {
            constexpr int kLanes = Simd<T>::kLanes;
            for (int64_t i = 0; i < n * top.li; i += kLanes)
                store(layer[0].d_result + i,
                      load(top.d_queries + i) *
                          activate<T>(activation, load(layer[0].result + i)).slope);
            work.through_read(layer[0], n);
        }
        if (residual)
            for (int64_t t = 0; t < n; t++)
                for (int64_t j = 0; j < top.out; j++)
                    layer[0].d_queries[t * layer[0].li + j] += d_o[t * top.lo + j];
    }

    // From the errors' and inputs' gradients to k (layer[0].d_x), v (in its place) and the anchor.
    void through_errors(LayerWork<T>& work, int64_t n) {
        Layer<T>& top = last();
        const int64_t lv = top.lo;
        if (layers == 2) through_first_error(n);
        for (int64_t t = 0; t < n; t++) {
            T *const d_e = top.d_errors + t * lv, *const d_v = v + t * lv;
            T *const d_out = d_core + t * lv, *const d_key = layer[0].d_x + t * layer[0].li;
            if (has_norm) {
                const T* const key = layer[0].x + t * layer[0].li;
                through_norm(Normed(*this, core + t * lv), top.errors + t * lv, d_e,
                             residual ? key : nullptr, d_v, d_out);
            } else {
                for (int64_t j = 0; j < lv; j++) d_out[j] = d_e[j];
                for (int64_t j = 0; j < lv; j++) d_v[j] = -d_e[j];
            }
            if (l2 && residual)
                for (int64_t j = 0; j < top.out; j++) d_key[j] -= d_v[j];
        }
        if (l2 || has_norm) work.through_anchor(top, n, d_core);
        if (layers == 1) return;
        constexpr int kLanes = Simd<T>::kLanes;
        for (int64_t i = 0; i < n * top.li; i += kLanes) {
            const Vector<T> through_input = load(top.d_x + i) * load(slope + i);
            store(d_z + i, load(d_z + i) + through_input);
        }
        work.through_anchor(layer[0], n, d_z);
    }
    // e1 = u * act'(z), u = e2 w2^T: begins d_z; adds to d_errors and d_anchor of the second layer.
    void through_first_error(int64_t n) {
        Layer<T>& top = last();
        constexpr int kLanes = Simd<T>::kLanes;
        T* const d_u = layer[0].d_errors;
        for (int64_t i = 0; i < n * top.li; i += kLanes) {
            const Vector<T> d_e = load(d_u + i);
            store(d_z + i, d_e * load(u + i) * activate<T>(activation, load(z + i)).curve);
            store(d_u + i, d_e * load(slope + i));
        }
        multiply(n, top.out, top.in, plain<T>(d_u, top.li), top.anchor, top.lo, top.d_errors,
                 top.lo, one<T>(), true);
        multiply(top.in, top.out, n, transposed<T>(d_u, top.li), top.errors, top.lo, top.d_anchor,
                 top.lo, one<T>(), true);
    }

    // ---- the LayerNorm of one row ----
    // y = (x - mean) r,  r = 1 / sqrt(variance + eps)
    struct Normed {
        const TitansNetwork& of;
        const T* x;
        T mean, scale;
        int64_t size;

        Normed(const TitansNetwork& network, const T* row)
            : of(network), x(row), size(network.layer[network.layers - 1].out) {
            T sum = 0, square = 0;
            for (int64_t j = 0; j < size; j++) sum += x[j];
            mean = sum / static_cast<T>(size);
            for (int64_t j = 0; j < size; j++) square += (x[j] - mean) * (x[j] - mean);
            scale = 1 / square_root(square / static_cast<T>(size) + of.norm_eps);
        }
        T y(int64_t j) const { return (x[j] - mean) * scale; }
        // The gradient of the inner loss at the normalised row.
        T g(int64_t j, bool l2, T key, T value) const {
            return loss(j, l2, key, value) * of.norm_weight[j];
        }
        T loss(int64_t j, bool l2, T key, T value) const {
            return l2 ? key + y(j) * of.norm_weight[j] + of.norm_bias[j] - value : -value;
        }
        // A row of gradients of y becomes one of x: r (g - mean(g) - y mean(g y)).
        void through(T* g_row) const {
            T along_one = 0, along_y = 0;
            for (int64_t j = 0; j < size; j++) along_one += g_row[j], along_y += g_row[j] * y(j);
            along_one /= static_cast<T>(size), along_y /= static_cast<T>(size);
            for (int64_t j = 0; j < size; j++)
                g_row[j] = scale * (g_row[j] - along_one - y(j) * along_y);
        }
    };

    // e = through(g), g = loss * weight: from d_e to d_v (over v) and d_x of the row, adding to the
    // norm's gradients.
    void through_norm(const Normed& row, const T* e, T* d_e, const T* key, T* v_row, T* d_x) {
        const int64_t size = row.size;
        const T count = static_cast<T>(size);
        T d_scale = 0, along_u = 0, along_uy = 0, along_gy = 0;
        for (int64_t j = 0; j < size; j++) {
            const T y = row.y(j), u_j = row.scale * d_e[j];
            d_scale += d_e[j] * e[j] / row.scale;
            along_u += u_j, along_uy += u_j * y;
            along_gy += row.g(j, l2, key ? key[j] : 0, v_row[j]) * y;
        }
        along_u /= count, along_uy /= count, along_gy /= count;
        T along_one = 0, along_y = 0;
        for (int64_t j = 0; j < size; j++) {
            const T y = row.y(j), u_j = row.scale * d_e[j];
            const T loss = row.loss(j, l2, key ? key[j] : 0, v_row[j]);
            const T d_g = u_j - along_u - y * along_uy, d_loss = d_g * norm_weight[j];
            T d_y = -u_j * along_gy - loss * norm_weight[j] * along_uy;
            d_norm_weight[j] += d_g * loss;
            if (l2) {
                d_norm_bias[j] += d_loss, d_norm_weight[j] += d_loss * y;
                d_y += d_loss * norm_weight[j];
            }
            v_row[j] = -d_loss, d_x[j] = d_y;
            along_one += d_y, along_y += d_y * y;
        }
        along_one /= count, along_y /= count;
        for (int64_t j = 0; j < size; j++) {
            const T y = row.y(j);
            d_x[j] = row.scale * (d_x[j] - along_one - y * along_y) -
                     row.scale * row.scale * d_scale * y / count;
        }
    }

    bool has_norm;
};
