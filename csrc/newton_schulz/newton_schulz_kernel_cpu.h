// The Newton-Schulz iteration, included by each_isa_cpu.h once per instruction set.
//
//   X = g / (|g| + eps);   A = X X^T,   B = b A + c A A,   X <- a X + B X   (wide; tall: A = X^T X
//                                                                            and X <- a X + X B)
//
// All are products of large matrices, cut into blocks of kBlock x kBlock results. A task makes one
// block: the right operand goes through scratch memory in slabs of kDepth rows, turned if need be
// and side by side, which is what `multiply` reads fastest; the left one is read where it lies. A
// and B are symmetric, so only blocks on and below the diagonal are made, and written twice.

// What a phase is, and how many tasks it has, is in newton_schulz_cpu.cpp.

constexpr int64_t kDepth = 256;

// Where the matrices of a group are, every one contiguous, one after the other.
template <class T>
struct NewtonSchulzBuffers {
    T *x[2], *a, *b;  // [group, M, N] twice, [group, S, S] twice
    double* squares;  // [group, blocks of rows]: sums of g^2

    NewtonSchulzBuffers(const NewtonSchulzParams& p, int64_t group, void* workspace) {
        const int64_t whole = group * p.rows * p.columns, side = shorter_side(p);
        Carver<T> carver{static_cast<T*>(workspace)};
        x[0] = carver.take(whole), x[1] = carver.take(whole);
        a = carver.take(group * side * side), b = carver.take(group * side * side);
        squares = reinterpret_cast<double*>(carver.base + carver.used);
    }
};

// to = scale * left right + keep * from
template <class T>
struct NewtonSchulzProduct {
    Left<T> left;    // [rows, depth]
    const T* right;  // [depth, columns], or its transpose; contiguous
    bool right_is_transposed;
    int64_t rows, columns, depth;
    T scale, keep;
    const T* from;  // [rows, columns], contiguous, or null
    T* to;          // the same
    bool symmetric;

    // Task t of the result: blocks row by row, of a symmetric one only those on or below the
    // diagonal.
    void block(int64_t t, T* tile, T* slab) const {
        int64_t i = 0, j = t;
        const int64_t across = round_up(columns, kBlock) / kBlock;
        for (; j > (symmetric ? i : across - 1); i++) j -= symmetric ? i + 1 : across;
        block_at(i * kBlock, j * kBlock, tile, slab);
    }

    // tile: [kBlock, kBlock]; slab: [kDepth, kBlock]
    void block_at(int64_t i0, int64_t j0, T* tile, T* slab) const {
        const int64_t height = least(kBlock, rows - i0), width = least(kBlock, columns - j0);
        const bool on_diagonal = symmetric && i0 == j0;
        for (int64_t k = 0; k < depth; k += kDepth) {
            const int64_t deep = least(kDepth, depth - k);
            if (right_is_transposed)
                transpose(width, deep, right + j0 * depth + k, depth, slab, kBlock);
            else
                for (int64_t row = 0; row < deep; row++)
                    __builtin_memcpy(slab + row * kBlock, right + (k + row) * columns + j0,
                                     width * sizeof(T));
            const Left<T> part{left.data + i0 * left.row + k * left.depth, left.row, left.depth};
            if (on_diagonal)
                multiply<Part::lower_result>(height, width, deep, part, slab, kBlock, tile, kBlock,
                                             one<T>(), k > 0);
            else
                multiply(height, width, deep, part, slab, kBlock, tile, kBlock, one<T>(), k > 0);
        }
        for (int64_t i = 0; i < height; i++) {
            T* const row = tile + i * kBlock;
            const int64_t place = (i0 + i) * columns + j0, end = on_diagonal ? i + 1 : width;
            for (int64_t j = 0; j < end; j++)
                row[j] = scale * row[j] + (from ? keep * from[place + j] : T(0));
            __builtin_memcpy(to + place, row, end * sizeof(T));
        }
        if (on_diagonal)
            for (int64_t i = 1; i < height; i++)
                for (int64_t j = 0; j < i; j++)
                    to[(j0 + j) * columns + i0 + i] = tile[i * kBlock + j];
        else if (symmetric)
            transpose(height, width, tile, kBlock, to + j0 * columns + i0, columns);
    }
};

template <class T>
struct NewtonSchulzTask {
    const NewtonSchulzParams& p;
    const NewtonSchulzBuffers<T>& buffers;
    int64_t group, first, iteration;  // matrices [first, first + group) of the batch

    int64_t elements() const { return p.rows * p.columns; }
    // The iterate that iteration reads, or the one that it writes.
    T* iterate(int64_t matrix, int64_t number) const {
        return buffers.x[number % 2] + matrix * elements();
    }

    NewtonSchulzProduct<T> product(NewtonSchulzPhase phase, int64_t matrix) const {
        const int64_t side = shorter_side(p), longer = p.rows + p.columns - side;
        T* const x = iterate(matrix, iteration);
        T *const a = buffers.a + matrix * side * side, *const b = buffers.b + matrix * side * side;
        const T scale_a = static_cast<T>(p.a), scale_b = static_cast<T>(p.b),
                scale_c = static_cast<T>(p.c);
        if (phase == NewtonSchulzPhase::gram) {
            const Left<T> left = is_tall(p) ? transposed(x, side) : plain(x, longer);
            return {left, x, !is_tall(p), side, side, longer, 1, 0, nullptr, a, true};
        }
        if (phase == NewtonSchulzPhase::polynomial)
            return {plain(a, side), a, false, side, side, side, scale_c, scale_b, a, b, true};
        T* const next = iterate(matrix, iteration + 1);
        const Left<T> left = is_tall(p) ? plain(x, side) : plain(b, side);
        return {left, is_tall(p) ? b : x, false, p.rows, p.columns, side, 1, scale_a, x, next,
                false};
    }

    // ---- blocks of kBlock rows ----
    void load(int64_t matrix, int64_t block, int64_t blocks) const {
        const int64_t row = block * kBlock, rows = least(kBlock, p.rows - row);
        const TokenTensor g{const_cast<void*>(p.g), elements(), p.columns, 0};
        T* const to = iterate(matrix, 0) + row * p.columns;
        load_tokens<T>(p.element, g, first + matrix, row, 0, rows, p.columns, to, p.columns);
        constexpr int64_t kSums = 16;
        double sums[kSums] = {};
        const int64_t count = rows * p.columns, whole = count / kSums * kSums;
        for (int64_t i = 0; i < whole; i += kSums)
            for (int64_t j = 0; j < kSums; j++) {
                const double x = to[i + j];
                sums[j] += x * x;
            }
        for (int64_t i = whole; i < count; i++)
            sums[0] += static_cast<double>(to[i]) * static_cast<double>(to[i]);
        double total = 0;
        for (int64_t j = 0; j < kSums; j++) total += sums[j];
        buffers.squares[matrix * blocks + block] = total;
    }

    void normalise(int64_t matrix, int64_t block, int64_t blocks) const {
        double square = 0;
        for (int64_t i = 0; i < blocks; i++) square += buffers.squares[matrix * blocks + i];
        const double factor = 1 / (__builtin_sqrt(square) + p.eps);
        const int64_t row = block * kBlock, rows = least(kBlock, p.rows - row);
        T* const x = iterate(matrix, 0) + row * p.columns;
        for (int64_t i = 0; i < rows * p.columns; i++) x[i] = static_cast<T>(x[i] * factor);
    }

    void store(int64_t matrix, int64_t block) const {
        const int64_t row = block * kBlock, rows = least(kBlock, p.rows - row);
        const TokenTensor out{p.out, elements(), p.columns, 0};
        const T* const x = iterate(matrix, iteration) + row * p.columns;
        store_tokens<T>(p.element, out, first + matrix, row, 0, rows, p.columns, x, p.columns);
    }

    void run(NewtonSchulzPhase phase, int64_t begin, int64_t end, T* scratch) const {
        const int64_t each = newton_schulz_tasks(p, phase);
        for (int64_t task = begin; task < end; task++) {
            const int64_t matrix = task / each, part = task % each;
            if (phase == NewtonSchulzPhase::load)
                load(matrix, part, each);
            else if (phase == NewtonSchulzPhase::normalise)
                normalise(matrix, part, each);
            else if (phase == NewtonSchulzPhase::store)
                store(matrix, part);
            else
                product(phase, matrix).block(part, scratch, scratch + kBlock * kBlock);
        }
    }
};

template <class T>
int64_t newton_schulz_scratch_bytes() {
    return (kBlock + kDepth) * kBlock * static_cast<int64_t>(sizeof(T));
}

// Tasks [begin, end) of a phase, of all matrices of a group.
template <class T>
void newton_schulz_part(const NewtonSchulzParams& p, NewtonSchulzPhase phase, int64_t group,
                        int64_t first, int64_t iteration, void* workspace, int64_t begin,
                        int64_t end, void* scratch) {
    const NewtonSchulzBuffers<T> buffers(p, group, workspace);
    NewtonSchulzTask<T>{p, buffers, group, first, iteration}.run(phase, begin, end,
                                                                 static_cast<T*>(scratch));
}
