// The walk of one task, a sequence and head, over its tokens, and the state that it carries: the
// matrices of a memory's layers. Included by each_isa_cpu.h through a memory's kernel, once per
// instruction set.
//
//   forward    segments in order; the state at the start of some chunks is kept
//   backward   forward over a group of chunks from its checkpoint, keeping each segment's start;
//              then the group's segments in reverse

constexpr int kMostLayers = 10;

// Params: a memory's, with tensors weights, anchor and the like of every layer.
template <class T, class Params>
struct Walk {
    const Params& p;
    const Sequence<Params> at;
    Layer<T>* layer[kMostLayers];
    int layers = 0;
    bool has_momentum = false;

    Walk(const Params& params, int64_t task, int64_t state_size)
        : p(params), at(params, task, state_size) {}

    // ---- the state's places ----
    void read(const MatrixTensor& from, const Layer<T>& l, T* tile) const {
        if (const T* data = at.template matrix<T>(from))
            load_matrix(data, l.in, l.out, tile, l.lo);
        else
            l.clear(tile);
    }
    void write(const MatrixTensor& to, const Layer<T>& l, const T* tile) const {
        if (T* data = at.template matrix<T>(to)) store_matrix(data, l.in, l.out, tile, l.lo);
    }
    void start_state() {
        for (int i = 0; i < layers; i++) {
            const Layer<T>& l = *layer[i];
            read(p.weights[i], l, l.weights);
            read(p.anchor[i].data && at.offset ? p.anchor[i] : p.weights[i], l, l.anchor);
            if constexpr (Params::kMomenta)
                if (has_momentum) read(p.momenta[i], l, l.momenta);
        }
    }
    void finish_state() const {
        const bool complete = at.at_boundary(at.length);
        for (int i = 0; i < layers; i++) {
            const Layer<T>& l = *layer[i];
            write(p.final_weights[i], l, l.weights);
            write(p.final_anchor[i], l, complete ? l.weights : l.anchor);
            if constexpr (Params::kMomenta)
                if (has_momentum) write(p.final_momenta[i], l, l.momenta);
        }
    }
    void begin_chunk(const Segment& segment) {
        if (!segment.new_chunk) return;
        for (int i = 0; i < layers; i++) layer[i]->copy(layer[i]->weights, layer[i]->anchor);
    }

    // A checkpoint holds the weights of all layers, then their momenta.
    void save(T* to) const {
        for (int i = 0; i < layers; to += layer[i]->in * layer[i]->out, i++)
            store_matrix(to, layer[i]->in, layer[i]->out, layer[i]->weights, layer[i]->lo);
        for (int i = 0; has_momentum && i < layers; to += layer[i]->in * layer[i]->out, i++)
            store_matrix(to, layer[i]->in, layer[i]->out, layer[i]->momenta, layer[i]->lo);
    }
    void restore(const T* from) {
        for (int i = 0; i < layers; from += layer[i]->in * layer[i]->out, i++)
            load_matrix(from, layer[i]->in, layer[i]->out, layer[i]->weights, layer[i]->lo);
        for (int i = 0; has_momentum && i < layers; from += layer[i]->in * layer[i]->out, i++)
            load_matrix(from, layer[i]->in, layer[i]->out, layer[i]->momenta, layer[i]->lo);
    }
    // The start of a group's segment, which is kept and later found there again.
    void keep(int64_t index) {
        for (int i = 0; i < layers; i++) {
            const Layer<T>& l = *layer[i];
            l.copy(l.weights, l.kept_weights + index * l.size());
            l.copy(l.anchor, l.kept_anchor + index * l.size());
            if (has_momentum) l.copy(l.momenta, l.kept_momenta + index * l.size());
        }
    }
    void find(int64_t index) {
        for (int i = 0; i < layers; i++) {
            Layer<T>& l = *layer[i];
            l.weights = l.kept_weights + index * l.size();
            l.anchor = l.kept_anchor + index * l.size();
            if (has_momentum) l.momenta = l.kept_momenta + index * l.size();
        }
    }

    // ---- its gradient ----
    void start_gradients() {
        for (int i = 0; i < layers; i++) {
            const Layer<T>& l = *layer[i];
            read(p.d_final_weights[i], l, l.d_weights);
            read(p.d_final_anchor[i], l, l.d_anchor);
            if constexpr (Params::kMomenta)
                if (has_momentum) read(p.d_final_momenta[i], l, l.d_momenta);
        }
        if (at.at_boundary(at.length)) anchor_is_weights();
    }
    void anchor_is_weights() {
        for (int i = 0; i < layers; i++) {
            layer[i]->add(layer[i]->d_anchor, layer[i]->d_weights);
            layer[i]->clear(layer[i]->d_anchor);
        }
    }
    void finish_gradients() const {
        for (int i = 0; i < layers; i++) {
            const Layer<T>& l = *layer[i];
            write(p.d_anchor[i], l, l.d_anchor);
            write(p.d_weights[i], l, l.d_weights);
            if constexpr (Params::kMomenta)
                if (has_momentum) write(p.d_momenta[i], l, l.d_momenta);
        }
    }
};

// Task: a Walk with forward_segment(segment), learn_segment(segment), which only takes the state
// further, and backward_segment(segment).
template <class T, class Task>
void walk_forward(Task& task) {
    const auto& at = task.at;
    task.start_state();
    for (int64_t chunk = 0; chunk < at.chunks(); chunk++) {
        const int64_t end = at.chunk_end(chunk);
        if (T* to = at.template checkpoint<T>(chunk)) task.save(to);
        for (int64_t token = at.chunk_begin(chunk); token < end; token += kSegment) {
            const Segment segment = at.segment_at(token, end);
            task.begin_chunk(segment);
            task.forward_segment(segment);
        }
    }
    at.template clear_unused_checkpoints<T>();
    task.finish_state();
}

// Forward over chunks [first, last) from their checkpoint, keeping every segment's start; returns
// the number of segments.
template <class T, class Task>
int64_t walk_keeping_states(Task& task, int64_t first, int64_t last) {
    const auto& at = task.at;
    if (const T* from = at.template checkpoint<T>(first))
        task.restore(from);
    else
        task.start_state();
    int64_t index = 0;
    for (int64_t chunk = first; chunk < last; chunk++)
        for (int64_t token = at.chunk_begin(chunk); token < at.chunk_end(chunk);
             token += kSegment, index++) {
            const Segment segment = at.segment_at(token, at.chunk_end(chunk));
            task.begin_chunk(segment);
            task.keep(index);
            if (token + segment.rows == at.chunk_end(last - 1))
                continue;  // nobody needs the state after the group
            task.learn_segment(segment);
        }
    return index;
}

template <class T, class Task>
void walk_backward(Task& task) {
    const auto& at = task.at;
    task.start_gradients();
    Layer<T> own[kMostLayers];
    const int64_t group = task.p.checkpoint_every;
    for (int64_t first = at.chunks() ? (at.chunks() - 1) / group * group : -1; first >= 0;
         first -= group) {
        const int64_t last = least(at.chunks(), first + group);
        int64_t index = walk_keeping_states<T>(task, first, last);
        for (int i = 0; i < task.layers; i++) own[i] = *task.layer[i];
        for (int64_t chunk = last - 1; chunk >= first; chunk--) {
            const int64_t begin = at.chunk_begin(chunk), end = at.chunk_end(chunk);
            for (int64_t token = begin + (end - begin - 1) / kSegment * kSegment; token >= begin;
                 token -= kSegment) {
                const Segment segment = at.segment_at(token, end);
                task.find(--index);
                task.backward_segment(segment);
                if (segment.new_chunk) task.anchor_is_weights();
            }
        }
        for (int i = 0; i < task.layers; i++) *task.layer[i] = own[i];
    }
    task.finish_gradients();
}
