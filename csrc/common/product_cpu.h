// Large products by blocks. A task computes one block of the result, of at most kBlockRows x
// kBlockColumns, in its thread's cache, and then does with it what it likes: no result is written
// to memory only to be read again by an elementwise pass. Included by each_isa_cpu.h through a
// kernel, once per instruction set.
//
// The depth goes by in stretches. Of each, the right operand is packed in panels as wide as the
// inner loop's tile, which then lie side by side and stay in the first-level cache; so is a left
// operand whose rows are not contiguous. Blocks and stretches depend on the sizes alone, so results
// are the same bits with any number of threads.

constexpr int64_t kBlockRows = 128, kBlockColumns = 256, kBlockDepth = 256, kFewRows = 4;

// A matrix by its strides, of which one is 1.
template <class T>
struct Strided {
    const T* data;
    int64_t row, column;
};
template <class T>
HOPE_INLINE Strided<T> as_it_lies(const T* data, int64_t ld) {
    return {data, ld, 1};
}
template <class T>
HOPE_INLINE Strided<T> turned(const T* data, int64_t ld) {
    return {data, 1, ld};
}

template <class T>
struct BlockProduct {
    static constexpr int64_t kPanel = kTileVectors * Simd<T>::kLanes;
    int64_t row, column, rows, columns;  // of the block, within the whole result
    T* result;                           // [rows][ld]
    int64_t ld;
    T *left, *right;  // packed: [rows / kTileRows][depth][kTileRows], [depth][kPanel]
    bool empty;       // nothing has been added yet

    // For blocks of results of up to `most_rows` x `most_columns`.
    void carve(Carver<T>& carver, int64_t most_rows, int64_t most_columns, int64_t most_depth) {
        const int64_t height = round_up(least(kBlockRows, most_rows), kTileRows),
                      depth = least(kBlockDepth, most_depth);
        ld = round_up(least(kBlockColumns, most_columns), kPanel);
        result = carver.take(height * ld);
        left = carver.take(height * depth), right = carver.take(depth * kPanel);
    }
    // The block at a place of the grid over a whole_rows x whole_columns result.
    void begin(int64_t index, int64_t whole_rows, int64_t whole_columns) {
        const int64_t across = (whole_columns + kBlockColumns - 1) / kBlockColumns;
        row = index / across * kBlockRows, column = index % across * kBlockColumns;
        rows = least(kBlockRows, whole_rows - row);
        columns = least(kBlockColumns, whole_columns - column);
        empty = true;
    }
    static int64_t count(int64_t whole_rows, int64_t whole_columns) {
        return (whole_rows + kBlockRows - 1) / kBlockRows *
               ((whole_columns + kBlockColumns - 1) / kBlockColumns);
    }
    T* row_of_result(int64_t i) const { return result + i * ld; }

    // Adds factor * a b, whole matrices of which the block takes its part. An empty depth counts.
    void add(int64_t depth, Strided<T> a, Strided<T> b, Factor<T> factor = one<T>()) {
        a.data += row * a.row, b.data += column * b.column;
        if (depth == 0 && empty) clear();
        if (rows < kFewRows && b.column == 1) return add_few(depth, a, b, factor);
        for (int64_t k = 0; k < depth; k += kBlockDepth, empty = false) {
            const int64_t n = least(kBlockDepth, depth - k);
            const bool packed = a.column != 1;
            if (packed) pack_left(n, {a.data + k * a.column, a.row, a.column});
            for (int64_t j = 0; j < columns; j += kPanel) {
                const int64_t width = least(kPanel, columns - j);
                pack_right(n, width, {b.data + k * b.row + j * b.column, b.row, b.column});
                if (!packed)
                    multiply(rows, width, n, Left<T>{a.data + k, a.row, 1}, right, kPanel,
                             result + j, ld, factor, !empty);
                for (int64_t i = 0; packed && i < rows; i += kTileRows)
                    multiply(least(kTileRows, rows - i), width, n,
                             Left<T>{left + i * n, 1, kTileRows}, right, kPanel,
                             row_of_result(i) + j, ld, factor, !empty);
            }
        }
    }

 private:
    void clear() {
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < ld; j++) row_of_result(i)[j] = 0;
        empty = false;
    }
    // Few rows do not pay for packing: the right operand is read once, in the order of memory.
    void add_few(int64_t depth, Strided<T> a, Strided<T> b, Factor<T> factor) {
        if (empty) clear();
        const T scale = *factor.data;
        int64_t k = 0;
        for (; k + 4 <= depth; k += 4)
            for (int64_t i = 0; i < rows; i++) {
                const T* const from = b.data + k * b.row;
                const T *const b0 = from, *const b1 = b0 + b.row, *const b2 = b1 + b.row,
                               *const b3 = b2 + b.row;
                const T* const at = a.data + i * a.row + k * a.column;
                const T a0 = scale * at[0], a1 = scale * at[a.column],
                        a2 = scale * at[2 * a.column], a3 = scale * at[3 * a.column];
                T* const to = row_of_result(i);
                for (int64_t j = 0; j < columns; j++)
                    to[j] += (a0 * b0[j] + a1 * b1[j]) + (a2 * b2[j] + a3 * b3[j]);
            }
        for (; k < depth; k++)
            for (int64_t i = 0; i < rows; i++) {
                const T* const from = b.data + k * b.row;
                const T left_value = scale * a.data[i * a.row + k * a.column];
                T* const to = row_of_result(i);
                for (int64_t j = 0; j < columns; j++) to[j] += left_value * from[j];
            }
    }
    void pack_left(int64_t depth, Strided<T> a) {
        for (int64_t i = 0; i < rows; i += kTileRows) {
            T* to = left + i * depth;
            const T* from = a.data + i * a.row;
            const int64_t height = least(kTileRows, rows - i);
            for (int64_t k = 0; k < depth; k++, to += kTileRows, from += a.column) {
                if (height == kTileRows)
                    __builtin_memcpy(to, from, kTileRows * sizeof(T));
                else
                    for (int64_t r = 0; r < height; r++) to[r] = from[r];
            }
        }
    }
    void pack_right(int64_t depth, int64_t width, Strided<T> b) {
        if (b.column != 1) return transpose(width, depth, b.data, b.column, right, kPanel);
        for (int64_t k = 0; k < depth; k++) {
            const T* const from = b.data + k * b.row;
            T* const to = right + k * kPanel;
            if (width == kPanel)
                __builtin_memcpy(to, from, kPanel * sizeof(T));
            else
                for (int64_t j = 0; j < width; j++) to[j] = from[j];
        }
    }
};
