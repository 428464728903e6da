// The continuum memory system by phases (cms_work_cpu.h; docs/derivations.md has the algebra, in
// these names). Included by each_isa_cpu.h, once per instruction set.
//
// A chunk is a handful of large products, each over all sequences that are at work, and each
// followed by what is elementwise in the same block of the result (product_cpu.h). A task is such a
// block, or a few rows, of one sequence:
//
//   forward    load, hidden, output, back, learn
//   backward   forward over a group of chunks from its checkpoint, keeping their weights; then its
//              chunks in reverse: load, hidden, output, back, lesson, scaled_errors, errors,
//              activated, input, weights; without a lesson only what a plain MLP's backward has
//
// Gradients of the weights are carried in d_weights, from chunk to chunk, in place.

#include "common/activation_cpu.h"
#include "common/product_cpu.h"
#include "common/sequence_cpu.h"

template <class T>
struct CmsTask {
    static constexpr int kLanes = Simd<T>::kLanes;
    const CmsWork& w;
    const CmsParams& p;
    const int64_t n;  // the sequence
    const Sequence<CmsParams> at;
    const int64_t first, rows;  // the chunk's tokens
    const bool complete, last;
    BlockProduct<T>& block;

    CmsTask(const CmsWork& work, int64_t sequence, BlockProduct<T>& product)
        : w(work),
          p(work.params),
          n(sequence),
          at(p, sequence, 2 * p.dim * p.hidden_dim),
          first(at.chunk_begin(work.chunk)),
          rows(at.chunk_end(work.chunk) - first),
          complete(at.at_boundary(first + rows)),
          last(work.chunk + 1 >= at.chunks()),
          block(product) {}

    bool has_chunk() const { return w.chunk < least(at.chunks(), w.end_chunk); }
    // Whether the chunk is learned, and for the backward, whether anything comes back from that.
    bool learns() const {
        if (w.pass == CmsPass::again) return w.chunk + 1 < least(at.chunks(), w.end_chunk);
        if (!last) return true;
        if (w.pass == CmsPass::forward) return p.keeps_state;
        return (complete ? p.d_final_weights : p.d_final_pending)[0].data;
    }
    T keep() const { return static_cast<T>(1 - p.decay); }

    // ---- rows of the chunk ----
    T* rows_at(int64_t features, int64_t hidden) const {  // after so many of either kind
        const int64_t size = w.pass == CmsPass::forward ? 2 * (w.ld + w.lf) : 5 * (w.ld + w.lf);
        return static_cast<T*>(w.rows) + (n - w.first_sequence) * w.most_rows * size +
               w.most_rows * (features * w.ld + hidden * w.lf);
    }
    T* x() const { return rows_at(0, 0); }
    T* e() const { return rows_at(1, 0); }  // holds the target first
    T* h() const { return rows_at(2, 0); }
    T* g() const { return rows_at(2, 1); }  // before it act'(z), or U
    // Only the backward tells errors and errors times rates apart.
    T* s() const { return w.pass == CmsPass::backward ? rows_at(2, 2) : e(); }
    T* d_y() const { return rows_at(3, 2); }
    T* d_s() const { return rows_at(4, 2); }
    T* z() const { return rows_at(5, 2); }
    T* d_u() const { return rows_at(5, 3); }
    T* d_z() const { return rows_at(5, 4); }
    T rate(int64_t t) const { return at.template gate_value<T>(p.lr, first + t); }
    Segment segment(int64_t row, int64_t count) const { return {first + row, count, false}; }
    TokenTensor columns_of(const TokenTensor& tensor, int64_t column) const {
        const int64_t bytes = p.element == Element::float64   ? 8
                              : p.element == Element::float32 ? 4
                                                              : 2;
        return {static_cast<char*>(tensor.data) + column * bytes, tensor.batch, tensor.token, 0};
    }

    // ---- matrices [rows_of][columns_of] of a layer ----
    int64_t rows_of(int layer) const { return layer ? p.hidden_dim : p.dim; }
    int64_t columns_of(int layer) const { return layer ? p.dim : p.hidden_dim; }
    T* matrix(const MatrixTensor (&tensors)[kCmsLayers], int layer) const {
        return at.template matrix<T>(tensors[layer]);
    }
    int64_t place_in_state(int layer) const { return layer * p.dim * p.hidden_dim; }
    int64_t first_slot(int64_t sequence, int64_t token) const {
        return token / (p.chunk_size * p.checkpoint_every) + (p.position ? sequence : 0);
    }
    T* slot(int64_t index) const { return static_cast<T*>(p.checkpoints) + index * at.state_size; }
    T* checkpoint(int64_t chunk, int layer) const {  // of that chunk's start; null: none is taken
        if (!p.checkpoint_every || chunk % p.checkpoint_every || chunk >= at.chunks())
            return nullptr;
        const int64_t index = first_slot(n, at.batch_token()) + chunk / p.checkpoint_every - 1;
        return slot(index) + place_in_state(layer);
    }
    T* kept(int64_t chunk, int layer) const {
        const int64_t index = (chunk - w.first_chunk - 1) * w.sequences + n - w.first_sequence;
        return static_cast<T*>(w.kept) + index * at.state_size + place_in_state(layer);
    }
    // The weights at a chunk's start: of the call, of the group, or as the last chunk has left
    // them.
    const T* weights_at(int64_t chunk, int layer) const {
        if (chunk == 0) return matrix(p.weights, layer);
        if (w.pass == CmsPass::forward) return running(layer);
        return chunk == w.first_chunk ? checkpoint(chunk, layer) : kept(chunk, layer);
    }
    // In the forward, what chunks have made of them.
    T* running(int layer) const {
        return p.keeps_state ? matrix(p.final_weights, layer) : kept(1, layer);
    }
    Strided<T> weights(int layer) const {
        return as_it_lies(weights_at(w.chunk, layer), columns_of(layer));
    }
    Strided<T> weights_turned(int layer) const {
        return turned(weights_at(w.chunk, layer), columns_of(layer));
    }
    // Q, the gradient of the chunk's gradient, but for its sign.
    const T* lesson(int layer) const {
        return complete ? matrix(p.d_weights, layer) : matrix(p.d_final_pending, layer);
    }
    Factor<T> lesson_sign() const { return complete ? minus_one<T>() : one<T>(); }

    // ---- forward ----
    void load_rows(int64_t part) const {
        const int64_t row = part * kBlockRows, count = least(kBlockRows, rows - row);
        if (count <= 0) return;
        at.load_rows(p.x, segment(row, count), p.dim, x() + row * w.ld, w.ld);
        if (w.pass == CmsPass::backward) {
            T* const to = d_y() + row * w.ld;
            if (p.d_y.data)
                at.load_rows(p.d_y, segment(row, count), p.dim, to, w.ld);
            else
                fill(count * w.ld, to);
        }
        if (!learns()) return;
        at.load_rows(p.target, segment(row, count), p.dim, e() + row * w.ld, w.ld);
        if (p.objective == CmsObjective::l2) return;  // needs the output
        for (int64_t t = row; t < row + count; t++) {
            T *const error = e() + t * w.ld, *const scaled = s() + t * w.ld, lr = rate(t);
            const T sign = p.objective == CmsObjective::dot ? -1 : 1;
            for (int64_t j = 0; j < p.dim; j++) {
                error[j] *= sign;
                scaled[j] = lr * error[j];
            }
        }
    }
    void hidden() {
        block.add(p.dim, as_it_lies<T>(x(), w.ld), weights(0));
        const bool backward = w.pass == CmsPass::backward, slopes = !backward && learns();
        for (int64_t i = 0; i < block.rows; i++) {
            const T* const row = block.row_of_result(i);
            const int64_t place = (block.row + i) * w.lf + block.column;
            for (int64_t j = 0; j < block.columns; j += kLanes) {
                const Activated<T> a = activate<T>(p.activation, load(row + j));
                store(h() + place + j, a.value);
                if (slopes) store(g() + place + j, a.slope);
                if (backward) store(z() + place + j, load(row + j));
            }
        }
    }
    void output() {
        const bool errors = learns() && p.objective == CmsObjective::l2,
                   writes = w.pass == CmsPass::forward;
        if (!errors && !writes) return;
        block.add(p.hidden_dim, as_it_lies<T>(h(), w.lf), weights(1));
        for (int64_t i = 0; i < block.rows; i++) {
            const int64_t place = (block.row + i) * w.ld + block.column;
            T* const y = block.row_of_result(i);
            if (p.residual) add(block.columns, x() + place, y);
            if (!errors) continue;
            T *const error = e() + place, *const scaled = s() + place, lr = rate(block.row + i);
            for (int64_t j = 0; j < block.columns; j++) {
                error[j] = y[j] - error[j];
                scaled[j] = lr * error[j];
            }
        }
        if (writes)
            at.store_rows(columns_of(p.y, block.column), segment(block.row, block.rows),
                          block.columns, block.result, block.ld);
    }
    void back() {
        block.add(p.dim, as_it_lies<T>(s(), w.ld), weights_turned(1));
        const bool backward = w.pass == CmsPass::backward;
        for (int64_t i = 0; i < block.rows; i++) {
            const T* const u = block.row_of_result(i);
            T* const to = g() + (block.row + i) * w.lf + block.column;
            for (int64_t j = 0; j < block.columns; j++) to[j] = backward ? u[j] : to[j] * u[j];
        }
    }
    void learn(int layer) {
        const T *const inputs = layer ? h() : x(), *const errors = layer ? s() : g();
        const int64_t ld_inputs = layer ? w.lf : w.ld, ld_errors = layer ? w.ld : w.lf;
        block.add(rows, turned(inputs, ld_inputs), as_it_lies(errors, ld_errors));
        const int64_t columns = columns_of(layer), corner = block.row * columns + block.column;
        const T* const before = w.chunk == 0 ? matrix(p.pending, layer) : nullptr;
        const T* const from = weights_at(w.chunk, layer);
        T* const to = !complete                    ? matrix(p.final_pending, layer)
                      : w.pass == CmsPass::forward ? running(layer)
                                                   : kept(w.chunk + 1, layer);
        T* const saved = w.pass == CmsPass::forward ? checkpoint(w.chunk + 1, layer) : nullptr;
        for (int64_t i = 0; i < block.rows; i++) {
            T* const gradient = block.row_of_result(i);
            const int64_t place = corner + i * columns;
            if (before) add(block.columns, before + place, gradient);
            if (complete)
                for (int64_t j = 0; j < block.columns; j++)
                    gradient[j] = keep() * from[place + j] - gradient[j];
            copy(block.columns, gradient, to + place);
            if (saved) copy(block.columns, gradient, saved + place);
        }
    }
    // What a sequence without a chunk, or whose last one has not been written here, ends with.
    void finish(int64_t part, int layer) const {
        const int64_t columns = columns_of(layer);
        const int64_t begin = part * kBlockRows * columns;
        const int64_t size = least(kBlockRows, rows_of(layer) - part * kBlockRows) * columns;
        const int64_t chunks = at.chunks();
        const bool ends = at.at_boundary(at.length);  // with a complete chunk, or none at all
        if (p.keeps_state) {
            if (chunks == 0 || (chunks == 1 && !ends))
                copy(size, matrix(p.weights, layer) + begin,
                     matrix(p.final_weights, layer) + begin);
            T* const pending = matrix(p.final_pending, layer) + begin;
            const T* const given = matrix(p.pending, layer);
            if (chunks == 0 && given)
                copy(size, given + begin, pending);
            else if (chunks == 0 || ends)
                fill(size, pending);
        }
        if (part || layer || !p.checkpoint_every) return;
        const int64_t used = chunks ? (chunks - 1) / p.checkpoint_every : 0;
        const int64_t from = first_slot(n, at.batch_token()) + used;
        const int64_t end = first_slot(n + 1, at.batch_token() + at.length);
        if (from < end) fill((end - from) * at.state_size, slot(from));
    }

    // ---- backward ----
    void start(int64_t part, int layer) const {
        const int64_t columns = columns_of(layer), begin = part * kBlockRows * columns;
        const int64_t size = least(kBlockRows, rows_of(layer) - part * kBlockRows) * columns;
        begin_gradient(size, matrix(p.d_final_weights, layer), begin, matrix(p.d_weights, layer));
        T* const d_pending = matrix(p.d_pending, layer);
        if (d_pending && at.chunks() == 0)
            begin_gradient(size, matrix(p.d_final_pending, layer), begin, d_pending);
    }
    void begin_gradient(int64_t size, const T* from, int64_t begin, T* to) const {
        if (from)
            copy(size, from + begin, to + begin);
        else
            fill(size, to + begin);
    }
    // U is there in g's place: d_U = d_G * act'(Z), d_Z = d_G * U * act''(Z), G = U * act'(Z).
    void through_lesson() {
        block.add(p.dim, as_it_lies<T>(x(), w.ld), as_it_lies(lesson(0), p.hidden_dim),
                  lesson_sign());
        for (int64_t i = 0; i < block.rows; i++) {
            const T* const d_g = block.row_of_result(i);
            const int64_t place = (block.row + i) * w.lf + block.column;
            for (int64_t j = 0; j < block.columns; j += kLanes) {
                const Activated<T> a = activate<T>(p.activation, load(z() + place + j));
                const Vector<T> u = load(g() + place + j), d = load(d_g + j);
                store(d_u() + place + j, d * a.slope);
                store(d_z() + place + j, d * u * a.curve);
                store(g() + place + j, u * a.slope);
            }
        }
    }
    void through_scaled_errors() {
        block.add(p.hidden_dim, as_it_lies<T>(h(), w.lf), as_it_lies(lesson(1), p.dim),
                  lesson_sign());
        block.add(p.hidden_dim, as_it_lies<T>(d_u(), w.lf), weights(1));
        for (int64_t i = 0; i < block.rows; i++)
            copy(block.columns, block.row_of_result(i),
                 d_s() + (block.row + i) * w.ld + block.column);
    }
    // s = lr * e: d_lr, and d_e to the target and, for l2, to y.
    void through_errors(int64_t part) const {
        const int64_t row = part * kBlockRows, count = least(kBlockRows, rows - row);
        const bool learned = learns(), l2 = p.objective == CmsObjective::l2;
        for (int64_t t = row; t < row + count; t++) {
            T* const d = d_s() + t * w.ld;  // becomes d_target
            if (!learned) fill(p.dim, d);
            T* const d_lr = static_cast<T*>(p.d_lr.data) + at.batch * p.d_lr.batch +
                            (at.start + first + t) * p.d_lr.token;
            *d_lr = learned ? dot(p.dim, d, e() + t * w.ld) : 0;
            if (!learned) continue;
            const T lr = rate(t), sign = p.objective == CmsObjective::teach ? 1 : -1;
            if (l2)
                for (int64_t j = 0; j < p.dim; j++) d_y()[t * w.ld + j] += lr * d[j];
            for (int64_t j = 0; j < p.dim; j++) d[j] *= sign * lr;
        }
        if (count > 0)
            at.store_rows(p.d_target, segment(row, count), p.dim, d_s() + row * w.ld, w.ld);
    }
    void through_activated() {
        const bool learned = learns();
        if (learned)
            block.add(p.dim, as_it_lies<T>(s(), w.ld), turned(lesson(1), p.dim), lesson_sign());
        block.add(p.dim, as_it_lies<T>(d_y(), w.ld), weights_turned(1));
        for (int64_t i = 0; i < block.rows; i++) {
            const T* const d_h = block.row_of_result(i);
            const int64_t place = (block.row + i) * w.lf + block.column;
            for (int64_t j = 0; j < block.columns; j += kLanes) {
                const Vector<T> slope = activate<T>(p.activation, load(z() + place + j)).slope;
                const Vector<T> through = load(d_h + j) * slope;
                T* const to = d_z() + place + j;
                store(to, learned ? load(to) + through : through);
            }
        }
    }
    void through_input() {
        if (learns())
            block.add(p.hidden_dim, as_it_lies<T>(g(), w.lf), turned(lesson(0), p.hidden_dim),
                      lesson_sign());
        block.add(p.hidden_dim, as_it_lies<T>(d_z(), w.lf), weights_turned(0));
        if (p.residual)
            for (int64_t i = 0; i < block.rows; i++)
                add(block.columns, d_y() + (block.row + i) * w.ld + block.column,
                    block.row_of_result(i));
        at.store_rows(columns_of(p.d_x, block.column), segment(block.row, block.rows),
                      block.columns, block.result, block.ld);
    }
    void through_weights(int layer) {
        const bool learned = learns();
        if (layer == 0) {
            block.add(rows, turned<T>(x(), w.ld), as_it_lies<T>(d_z(), w.lf));
        } else {
            block.add(rows, turned<T>(h(), w.lf), as_it_lies<T>(d_y(), w.ld));
            if (learned) block.add(rows, turned<T>(d_u(), w.lf), as_it_lies<T>(s(), w.ld));
        }
        const int64_t columns = columns_of(layer), corner = block.row * columns + block.column;
        T* const d_pending = w.chunk == 0 ? matrix(p.d_pending, layer) : nullptr;
        const T kept_part = complete ? keep() : 1, sign = complete ? -1 : 1;
        for (int64_t i = 0; i < block.rows; i++) {
            const T* const gradient = block.row_of_result(i);
            const int64_t place = corner + i * columns;
            if (d_pending && learned)
                for (int64_t j = 0; j < block.columns; j++)
                    d_pending[place + j] = sign * lesson(layer)[place + j];
            else if (d_pending)
                fill(block.columns, d_pending + place);
            T* const to = matrix(p.d_weights, layer) + place;
            for (int64_t j = 0; j < block.columns; j++) to[j] = kept_part * to[j] + gradient[j];
        }
    }

    // ---- plain loops ----
    static void add(int64_t count, const T* from, T* to) {
        for (int64_t i = 0; i < count; i++) to[i] += from[i];
    }
    static void copy(int64_t count, const T* from, T* to) {
        __builtin_memcpy(to, from, count * sizeof(T));
    }
    static void fill(int64_t count, T* to) { __builtin_memset(to, 0, count * sizeof(T)); }
};

// ---- a phase's tasks ----
template <class T>
void cms_carve(const CmsWork& w, Carver<T>& carver, BlockProduct<T>& block) {
    const int64_t widest = most(w.params.dim, w.params.hidden_dim),
                  most_rows = most(widest, w.most_rows);
    block.carve(carver, most_rows, widest, most_rows);
}
// How many tasks each sequence has.
template <class T>
int64_t cms_tasks_of(const CmsWork& w, CmsPhase phase) {
    const CmsParams& p = w.params;
    switch (phase) {
        case CmsPhase::start:
        case CmsPhase::finish:
            return BlockProduct<T>::count(p.dim, 1) + BlockProduct<T>::count(p.hidden_dim, 1);
        case CmsPhase::load:
        case CmsPhase::errors:
            return BlockProduct<T>::count(w.most_rows, 1);
        case CmsPhase::hidden:
        case CmsPhase::back:
        case CmsPhase::lesson:
        case CmsPhase::activated:
            return BlockProduct<T>::count(w.most_rows, p.hidden_dim);
        case CmsPhase::output:
        case CmsPhase::scaled_errors:
        case CmsPhase::input:
            return BlockProduct<T>::count(w.most_rows, p.dim);
        case CmsPhase::learn:
        case CmsPhase::weights:
            return BlockProduct<T>::count(p.dim, p.hidden_dim) +
                   BlockProduct<T>::count(p.hidden_dim, p.dim);
    }
    return 0;
}

// Task `index` of those that a phase has for a sequence.
template <class T>
void cms_task(CmsTask<T>& task, CmsPhase phase, int64_t index) {
    const CmsParams& p = task.p;
    BlockProduct<T>& block = task.block;
    const bool whole = phase == CmsPhase::start || phase == CmsPhase::finish;
    if (whole || phase == CmsPhase::learn || phase == CmsPhase::weights) {
        const int64_t of_first = whole ? block.count(p.dim, 1) : block.count(p.dim, p.hidden_dim);
        const int layer = index >= of_first;
        if (layer) index -= of_first;
        if (phase == CmsPhase::start) return task.start(index, layer);
        if (phase == CmsPhase::finish) return task.finish(index, layer);
        block.begin(index, task.rows_of(layer), task.columns_of(layer));
        if (!task.has_chunk()) return;
        if (phase == CmsPhase::weights) return task.through_weights(layer);
        if (task.learns()) task.learn(layer);
        return;
    }
    if (!task.has_chunk()) return;
    if (phase == CmsPhase::load) return task.load_rows(index);
    if (phase == CmsPhase::errors) return task.through_errors(index);
    const bool of_output =
        phase == CmsPhase::output || phase == CmsPhase::scaled_errors || phase == CmsPhase::input;
    block.begin(index, task.rows, of_output ? p.dim : p.hidden_dim);
    if (block.rows <= 0) return;  // other sequences have longer chunks
    if (phase == CmsPhase::hidden) return task.hidden();
    if (phase == CmsPhase::output) return task.output();
    if (phase == CmsPhase::activated) return task.through_activated();
    if (phase == CmsPhase::input) return task.through_input();
    if (!task.learns()) return;
    if (phase == CmsPhase::back) return task.back();
    if (phase == CmsPhase::lesson) return task.through_lesson();
    if (phase == CmsPhase::scaled_errors) return task.through_scaled_errors();
}

template <class T>
void cms_tasks(const CmsWork& w, CmsPhase phase, int64_t begin, int64_t end, void* scratch) {
    const int64_t of_each = cms_tasks_of<T>(w, phase);
    BlockProduct<T> block;
    Carver<T> carver{static_cast<T*>(scratch)};
    cms_carve(w, carver, block);
    for (int64_t index = begin; index < end; index++) {
        CmsTask<T> task(w, w.first_sequence + index / of_each, block);
        cms_task(task, phase, index % of_each);
    }
}
template <class T>
int64_t cms_scratch_bytes(const CmsWork& w) {
    BlockProduct<T> block;
    Carver<T> carver{nullptr};
    cms_carve(w, carver, block);
    return carver.used * static_cast<int64_t>(sizeof(T));
}
