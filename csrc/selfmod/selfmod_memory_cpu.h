// One of the self-modifying memories at its anchor: M(x) = x + act(x w1) w2, without the `x +` for
// learning rates and retention, or x w. Included by each_isa_cpu.h through selfmod_cpu.h, once per
// instruction set.

// An input's way through a memory, n rows of it. z, h, slope and their gradients [n][lf] are there
// for two layers, the slope and the gradients in the backward.
template <class T>
struct Look {
    T *z = nullptr, *h = nullptr, *slope = nullptr;  // x w1, act(z) (over z where none needs it),
                                                     // act'(z)
    T* y = nullptr;                                  // [n][lo]
    T *d_h = nullptr, *d_z = nullptr;
};

template <class T>
struct SelfmodMemory {
    Layer<T> layer[2];
    int layers;
    bool residual;
    Activation activation;
    T *first_t, *last_t;  // the anchor's matrices transposed: [out of the first][li], [out][lf]

    Layer<T>& last() { return layer[layers - 1]; }
    const Layer<T>& last() const { return layer[layers - 1]; }

    void transpose_first() { transpose_anchor(layer[0], first_t); }
    void transpose_last() { transpose_anchor(last(), last_t); }
    static void transpose_anchor(const Layer<T>& l, T* to) {
        transpose(l.in, l.out, l.anchor, l.lo, to, l.li);
    }

    void look(int64_t n, const T* x, const Look<T>& at, bool wants_y = true) const {
        const Layer<T>& first = layer[0];
        multiply(n, first.out, first.in, plain(x, first.li), first.anchor, first.lo,
                 layers == 1 ? at.y : at.z, first.lo, one<T>(), false);
        if (layers == 1) return;
        activate_all(activation, n * first.lo, at.z, at.h, at.slope);
        if (!wants_y) return;
        multiply(n, last().out, last().in, plain<T>(at.h, last().li), last().anchor, last().lo,
                 at.y, last().lo, one<T>(), false);
        if (residual) add(n * first.li, x, at.y);
    }

    // With both matrices transposed, from the gradient of y (null: zero) to d_x and the anchor's
    // gradient, adding to both, and to what d_h and d_z hold if they are `begun`.
    void look_back(int64_t n, const T* x, const Look<T>& at, const T* d_y, bool begun, T* d_x) {
        const Layer<T>&first = layer[0], &top = last();
        const T* d_first = d_y;
        if (layers == 2) {
            if (d_y) {
                multiply(n, top.in, top.out, plain(d_y, top.lo), last_t, top.li, at.d_h, top.li,
                         one<T>(), begun);
                multiply(top.in, top.out, n, transposed<T>(at.h, top.li), d_y, top.lo, top.d_anchor,
                         top.lo, one<T>(), true);
                if (residual) add(n * first.li, d_y, d_x);
            }
            for (int64_t i = 0; i < n * top.li; i++)
                at.d_z[i] = (begun ? at.d_z[i] : 0) + at.d_h[i] * at.slope[i];
            d_first = at.d_z;
        }
        if (!d_first) return;
        multiply(n, first.in, first.out, plain(d_first, first.lo), first_t, first.li, d_x, first.li,
                 one<T>(), true);
        multiply(first.in, first.out, n, transposed(x, first.li), d_first, first.lo, first.d_anchor,
                 first.lo, one<T>(), true);
    }

    static void add(int64_t count, const T* from, T* to) {
        for (int64_t i = 0; i < count; i++) to[i] += from[i];
    }
};
