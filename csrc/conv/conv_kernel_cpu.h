// The short causal convolution, included by each_isa_cpu.h once per instruction set.
//
//   z[t] = sum over k of weight[k] * x[t + k - (K - 1)],   y = z or silu(z),   per channel
//
// One task is a block of channels, with all sequences: so it owns its part of the weights' gradient
// and sums it in a fixed order. It walks a sequence in blocks of kRows tokens, whose tile begins
// with the K - 1 inputs before them; the backward goes from the last block to the first, and its
// tile of d_z ends with the K - 1 rows after the block.

constexpr int64_t kChannels = 128, kRows = 64,
                  kLine = kChannels;  // kLine: elements of a tile's row
constexpr int kUsual = 4;             // the width that models use

template <class T>
struct ConvTask {
    const ConvParams& p;
    int64_t first, columns;  // the task's channels
    int64_t taps, before;    // K, K - 1
    T *weight, *d_weight;    // [K][kLine]
    T *x, *z;                // [K - 1 + kRows], [kRows + K - 1] rows
    T *d_y, *d_x, *edge;     // [kRows], [kRows], [K - 1] rows

    static int64_t rows_of_scratch(const ConvParams& p) { return 6 * p.width + 4 * kRows; }

    ConvTask(const ConvParams& params, int64_t task, T* scratch)
        : p(params), first(task * kChannels), columns(least(kChannels, p.channels - first)) {
        taps = p.width, before = taps - 1;
        weight = scratch, d_weight = weight + taps * kLine;
        x = d_weight + taps * kLine, z = x + (before + kRows) * kLine;
        d_y = z + (before + kRows) * kLine, d_x = d_y + kRows * kLine, edge = d_x + kRows * kLine;
        const T* const from = static_cast<const T*>(p.weight) + first * taps;
        for (int64_t k = 0; k < taps; k++)
            for (int64_t j = 0; j < kLine; j++) {
                weight[k * kLine + j] = j < columns ? from[j * taps + k] : T(0);
                d_weight[k * kLine + j] = 0;
            }
    }

    // ---- rows of tensors ----
    void load_rows(const TokenTensor& from, int64_t batch, int64_t token, int64_t n,
                   T* tile) const {
        if (from.data)
            load_tokens<T>(p.element, from, batch, token, first, n, columns, tile, kLine);
        else
            clear(tile, n);
    }
    void store_rows(const TokenTensor& to, int64_t batch, int64_t token, int64_t n,
                    const T* tile) const {
        if (to.data) store_tokens<T>(p.element, to, batch, token, first, n, columns, tile, kLine);
    }
    static void clear(T* tile, int64_t n) { __builtin_memset(tile, 0, n * kLine * sizeof(T)); }
    static void move(const T* from, T* to, int64_t n) {
        __builtin_memmove(to, from, n * kLine * sizeof(T));
    }

    struct Sequence {
        int64_t index, batch, start, length;
    };
    Sequence sequence(int64_t n) const {
        if (!p.cu_seqlens) return {n, n, 0, p.tokens};
        return {n, 0, p.cu_seqlens[n], p.cu_seqlens[n + 1] - p.cu_seqlens[n]};
    }

    // A vector of channels at row i of the x tile. Taps is K if that is known, else 0.
    template <int Taps>
    HOPE_INLINE Vector<T> convolve(int64_t i, int64_t j) const {
        const int64_t width = Taps ? Taps : taps;
        Vector<T> total = {};
#pragma GCC unroll 8
        for (int64_t k = 0; k < width; k++)
            total += load(weight + k * kLine + j) * load(x + (i + k) * kLine + j);
        return total;
    }

    template <int Taps>
    void forward_rows(int64_t rows) {
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < kLine; j += Simd<T>::kLanes) {
                const Vector<T> sum = convolve<Taps>(i, j);
                store(z + i * kLine + j, p.silu ? sum * sigmoid(sum) : sum);
            }
    }

    void forward() {
        for (int64_t n = 0; n < p.sequences; n++) {
            const Sequence at = sequence(n);
            load_rows(p.tail, at.index, 0, before, x);
            for (int64_t token = 0; token < at.length; token += kRows) {
                const int64_t rows = least(kRows, at.length - token);
                load_rows(p.x, at.batch, at.start + token, rows, x + before * kLine);
                if (taps == kUsual)
                    forward_rows<kUsual>(rows);
                else
                    forward_rows<0>(rows);
                store_rows(p.y, at.batch, at.start + token, rows, z);
                move(x + rows * kLine, x, before);
            }
            store_rows(p.final_tail, at.index, 0, before, x);
        }
    }

    void backward() {
        for (int64_t n = 0; n < p.sequences; n++) {
            const Sequence at = sequence(n);
            load_rows(p.d_final_tail, at.index, 0, before, edge);
            const int64_t last = at.length ? (at.length - 1) / kRows * kRows : -1;
            for (int64_t token = last; token >= 0; token -= kRows) {
                const int64_t rows = least(kRows, at.length - token);
                // The rows after the block: none at the end, else the beginning of the later one.
                if (token == last)
                    clear(z + rows * kLine, before);
                else
                    move(z, z + rows * kLine, before);
                backward_block(at, token, rows);
            }
            if (!p.d_tail.data) continue;
            for (int64_t i = 0; i < before; i++) {  // input i - (K - 1)
                T* const to = d_x + i * kLine;
                const int64_t of_edge = i - at.length;  // it may also be among the last inputs
                for (int64_t j = 0; j < kLine; j++)
                    to[j] = of_edge >= 0 ? edge[of_edge * kLine + j] : T(0);
                if (at.length)
                    for (int64_t k = 0; k <= i; k++)
                        for (int64_t j = 0; j < kLine; j++)
                            to[j] += weight[k * kLine + j] * z[(i - k) * kLine + j];
            }
            store_rows(p.d_tail, at.index, 0, before, d_x);
        }
        T* const to = static_cast<T*>(p.d_weight) + first * taps;
        for (int64_t j = 0; j < columns; j++)
            for (int64_t k = 0; k < taps; k++) to[j * taps + k] = d_weight[k * kLine + j];
    }

    template <int Taps>
    void backward_rows(int64_t rows) {
        constexpr int kLanes = Simd<T>::kLanes;
        const int64_t width = Taps ? Taps : taps;
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < kLine; j += kLanes) {
                Vector<T> d_z = load(d_y + i * kLine + j);
                if (p.silu) {
                    const Vector<T> sum = convolve<Taps>(i, j), s = sigmoid(sum);
                    d_z *= s * (1 + sum * (1 - s));
                }
                store(z + i * kLine + j, d_z);
#pragma GCC unroll 8
                for (int64_t k = 0; k < width; k++) {
                    T* const to = d_weight + k * kLine + j;
                    store(to, load(to) + d_z * load(x + (i + k) * kLine + j));
                }
            }
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < kLine; j += kLanes) {
                Vector<T> total = {};
#pragma GCC unroll 8
                for (int64_t k = 0; k < width; k++)
                    total += load(weight + k * kLine + j) * load(z + (i + before - k) * kLine + j);
                store(d_x + i * kLine + j, total);
            }
    }

    // Leaves d_z of the block in z.
    void backward_block(const Sequence& at, int64_t token, int64_t rows) {
        const int64_t missing = most(0, before - token);  // inputs of the tile that are in the tail
        if (missing) load_rows(p.tail, at.index, before - missing, missing, x);
        load_rows(p.x, at.batch, at.start + token - before + missing, rows + before - missing,
                  x + missing * kLine);
        load_rows(p.d_y, at.batch, at.start + token, rows, d_y);
        if (taps == kUsual)
            backward_rows<kUsual>(rows);
        else
            backward_rows<0>(rows);
        const int64_t from_end = token - (at.length - before);  // >= 0: among the last inputs
        for (int64_t i = most(0, -from_end); i < rows; i++)
            for (int64_t j = 0; j < kLine; j++)
                d_x[i * kLine + j] += edge[(from_end + i) * kLine + j];
        store_rows(p.d_x, at.batch, at.start + token, rows, d_x);
    }
};

template <class T>
void conv_tasks(const ConvParams& p, bool backward, int64_t begin, int64_t end, void* scratch) {
    for (int64_t task = begin; task < end; task++) {
        ConvTask<T> run(p, task, static_cast<T*>(scratch));
        if (backward)
            run.backward();
        else
            run.forward();
    }
}
template <class T>
int64_t conv_scratch_bytes(const ConvParams& p) {
    return ConvTask<T>::rows_of_scratch(p) * kLine * static_cast<int64_t>(sizeof(T));
}
