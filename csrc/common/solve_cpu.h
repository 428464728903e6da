// Triangular systems, by substitution in blocks of rows: the way to them is products, and within a
// block few rows meet. Included by each_isa_cpu.h through a memory's kernel, once per instruction
// set.

// x [n][lx] becomes (I + L)^-1 x; L [n][ld], of which only what is below the diagonal counts.
template <class T>
void solve_lower(int64_t n, int64_t columns, const T* lower, int64_t ld, T* x, int64_t lx) {
    constexpr int kLanes = Simd<T>::kLanes;
    for (int64_t i = 0; i < n; i += kTileRows) {
        const int64_t rows = least(kTileRows, n - i);
        T* const block = x + i * lx;
        const T* const diagonal = lower + i * ld + i;
        if (i)
            multiply(rows, columns, i, plain(lower + i * ld, ld), x, lx, block, lx, minus_one<T>(),
                     true);
        for (int64_t j = 0; j < columns; j += kLanes)
            for (int64_t r = 1; r < rows; r++) {
                Vector<T> row = load(block + r * lx + j);
                for (int64_t s = 0; s < r; s++)
                    row -= diagonal[r * ld + s] * load(block + s * lx + j);
                store(block + r * lx + j, row);
            }
    }
}

// x becomes (I + L)^-T x.
template <class T>
void solve_lower_transposed(int64_t n, int64_t columns, const T* lower, int64_t ld, T* x,
                            int64_t lx) {
    constexpr int kLanes = Simd<T>::kLanes;
    for (int64_t i = (n - 1) / kTileRows * kTileRows; i >= 0; i -= kTileRows) {
        const int64_t rows = least(kTileRows, n - i), end = i + rows;
        T* const block = x + i * lx;
        const T* const diagonal = lower + i * ld + i;
        if (end < n)
            multiply(rows, columns, n - end, transposed(lower + end * ld + i, ld), x + end * lx, lx,
                     block, lx, minus_one<T>(), true);
        for (int64_t j = 0; j < columns; j += kLanes)
            for (int64_t r = rows - 2; r >= 0; r--) {
                Vector<T> row = load(block + r * lx + j);
                for (int64_t s = r + 1; s < rows; s++)
                    row -= diagonal[s * ld + r] * load(block + s * lx + j);
                store(block + r * lx + j, row);
            }
    }
}
