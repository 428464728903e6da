// The Titans memory by chunks (the dual form; docs/derivations.md has the algebra, in these names).
// Included by each_isa_cpu.h, once per instruction set.
//
// One task is one sequence and head; it walks its tokens in segments, with everything of a segment
// in a thread's cache:
//
//   forward    inputs x and errors e of each layer, at the anchor      (titans_network_cpu.h)
//              the queries through the layers, each as its state is at their token, and the state
//              after the segment                                       (titans_layer_cpu.h)
//   backward   forward over a group of chunks from its checkpoint, keeping each segment's start;
//              then segments in reverse

#include "titans/titans_gates_cpu.h"
#include "titans/titans_layer_cpu.h"
#include "titans/titans_network_cpu.h"
#include "titans/titans_sequence_cpu.h"

template <class T>
struct TitansTask {
    const TitansParams& p;
    const TitansSequence at;
    const int layers;
    LayerWork<T> work;
    TitansNetwork<T> network;  // and the layers

    TitansTask(const TitansParams& params, int64_t task, T* scratch, bool backward,
               int64_t* scratch_size)
        : p(params), at(params, task), layers(params.layers()) {
        const int64_t rows = TitansSequence::rows_at_most(p),
                      kept = TitansSequence::segments_of_group(p);
        Carver<T> carver{scratch};
        work.read = p.read, work.has_momentum = p.has_momentum;
        int64_t width = 0, transposed_size = 0;
        for (int i = 0; i < layers; i++) {
            TitansLayer<T>& l = network.layer[i];
            l.carve(carver, p.rows_of(i), p.columns_of(i), rows, work.has_momentum, backward, kept);
            width = most(width, most(l.in, l.out));
            transposed_size = most(transposed_size, l.out * l.li);
        }
        work.carve(carver, rows, width, backward);
        work.state_t = carver.take(transposed_size);
        network.carve(carver, p, at.template matrix<T>(p.norm_weight),
                      at.template matrix<T>(p.norm_bias), rows, backward);
        *scratch_size = carver.used;
    }
    static int64_t scratch_size(const TitansParams& p, bool backward) {
        int64_t size;
        TitansParams sizes_only = p;
        sizes_only.cu_seqlens = nullptr, sizes_only.position = nullptr;
        TitansTask(sizes_only, 0, nullptr, backward, &size);
        return size;
    }

    // ---- the state's places ----
    TitansLayer<T>& layer(int i) { return network.layer[i]; }
    void read_state(const MatrixTensor& from, const TitansLayer<T>& l, T* tile) const {
        if (const T* data = at.template matrix<T>(from))
            load_matrix(data, l.in, l.out, tile, l.lo);
        else
            l.clear(tile);
    }
    void write_state(const MatrixTensor& to, const TitansLayer<T>& l, const T* tile) const {
        if (T* data = at.template matrix<T>(to)) store_matrix(data, l.in, l.out, tile, l.lo);
    }
    void start_state() {
        for (int i = 0; i < layers; i++) {
            TitansLayer<T>& l = layer(i);
            read_state(p.weights[i], l, l.weights);
            if (work.has_momentum) read_state(p.momenta[i], l, l.momenta);
            read_state(p.anchor[i].data && at.offset ? p.anchor[i] : p.weights[i], l, l.anchor);
        }
    }
    // A checkpoint holds the weights of all layers, then their momenta.
    void save(T* to) {
        for (int i = 0; i < layers; to += layer(i).in * layer(i).out, i++)
            store_matrix(to, layer(i).in, layer(i).out, layer(i).weights, layer(i).lo);
        for (int i = 0; work.has_momentum && i < layers; to += layer(i).in * layer(i).out, i++)
            store_matrix(to, layer(i).in, layer(i).out, layer(i).momenta, layer(i).lo);
    }
    void restore(const T* from) {
        for (int i = 0; i < layers; from += layer(i).in * layer(i).out, i++)
            load_matrix(from, layer(i).in, layer(i).out, layer(i).weights, layer(i).lo);
        for (int i = 0; work.has_momentum && i < layers; from += layer(i).in * layer(i).out, i++)
            load_matrix(from, layer(i).in, layer(i).out, layer(i).momenta, layer(i).lo);
    }

    // ---- a segment ----
    // Loads k, v and the gates; computes the coefficients, and inputs and errors of the layers.
    void prepare(const Segment& segment) {
        const int64_t n = segment.rows;
        for (int64_t t = 0; t < n; t++) {
            const int64_t token = segment.first + t;
            work.gate.lr[t] = at.template gate_value<T>(p.lr, token);
            work.gate.momentum[t] =
                work.has_momentum ? at.template gate_value<T>(p.momentum, token) : 0;
            work.gate.keep[t] = p.decay.data ? 1 - at.template gate_value<T>(p.decay, token) : T(1);
        }
        work.gate.compute(n, work.has_momentum);
        at.load_rows(p.k, segment, p.key_dim, layer(0).x, layer(0).li);
        at.load_rows(p.v, segment, p.value_dim, network.v, network.last().lo);
        network.look_back(work, n);
    }
    void begin_chunk(const Segment& segment) {
        if (!segment.new_chunk) return;
        for (int i = 0; i < layers; i++) layer(i).copy(layer(i).weights, layer(i).anchor);
    }

    void forward() {
        start_state();
        for (int64_t chunk = 0; chunk < at.chunks(); chunk++) {
            const int64_t end = at.chunk_end(chunk);
            if (T* to = at.template checkpoint<T>(chunk)) save(to);
            for (int64_t token = at.chunk_begin(chunk); token < end; token += kSegment) {
                const Segment segment = at.segment_at(token, end);
                begin_chunk(segment);
                prepare(segment);
                at.load_rows(p.q, segment, p.key_dim, layer(0).queries, layer(0).li);
                network.read_out(work, segment.rows);
                at.store_rows(p.o, segment, p.value_dim, network.o, network.last().lo);
                for (int i = 0; i < layers; i++) work.advance(layer(i), segment.rows);
            }
        }
        at.template clear_unused_checkpoints<T>();
        const bool complete = at.at_boundary(at.length);
        for (int i = 0; i < layers; i++) {
            const TitansLayer<T>& l = layer(i);
            write_state(p.final_weights[i], l, l.weights);
            if (work.has_momentum) write_state(p.final_momenta[i], l, l.momenta);
            write_state(p.final_anchor[i], l, complete ? l.weights : l.anchor);
        }
    }

    void backward_segment(const Segment& segment) {
        const int64_t n = segment.rows, lv = network.last().lo;
        prepare(segment);
        at.load_rows(p.q, segment, p.key_dim, layer(0).queries, layer(0).li);
        if (p.d_o.data)
            at.load_rows(p.d_o, segment, p.value_dim, network.d_o, lv);
        else
            for (int64_t i = 0; i < n * lv; i++) network.d_o[i] = 0;
        work.clear_gradients(n);
        network.through_reads(work, n);
        for (int i = 0; i < layers; i++) work.through_update(layer(i), n);
        network.through_errors(work, n);
        at.store_rows(p.d_v, segment, p.value_dim, network.v, lv);
        at.store_rows(p.d_k, segment, p.key_dim, layer(0).d_x, layer(0).li);
        at.store_rows(p.d_q, segment, p.key_dim, layer(0).d_queries, layer(0).li);
        for (int i = 0; i < layers; i++) work.to_state_before(layer(i), n);
        work.gate.backward(n);
        at.store_gate(p.d_lr, segment, work.gate.lr, T(1));
        at.store_gate(p.d_momentum, segment, work.gate.momentum, T(1));
        at.store_gate(p.d_decay, segment, work.gate.keep, T(-1));
        if (segment.new_chunk) anchor_is_weights();
    }
    void anchor_is_weights() {
        for (int i = 0; i < layers; i++) {
            layer(i).add(layer(i).d_anchor, layer(i).d_weights);
            layer(i).clear(layer(i).d_anchor);
        }
    }

    // Forward over chunks [first, last) from their checkpoint, keeping every segment's start;
    // returns the number of segments.
    int64_t keep_states(int64_t first, int64_t last) {
        if (const T* from = at.template checkpoint<T>(first))
            restore(from);
        else
            start_state();
        int64_t index = 0;
        for (int64_t chunk = first; chunk < last; chunk++)
            for (int64_t token = at.chunk_begin(chunk); token < at.chunk_end(chunk);
                 token += kSegment, index++) {
                const Segment segment = at.segment_at(token, at.chunk_end(chunk));
                begin_chunk(segment);
                for (int i = 0; i < layers; i++) {
                    TitansLayer<T>& l = layer(i);
                    l.copy(l.weights, l.kept_weights + index * l.size());
                    l.copy(l.anchor, l.kept_anchor + index * l.size());
                    if (work.has_momentum) l.copy(l.momenta, l.kept_momenta + index * l.size());
                }
                if (token + segment.rows == at.chunk_end(last - 1))
                    continue;  // nobody needs the state after the group
                prepare(segment);
                for (int i = 0; i < layers; i++) work.advance(layer(i), segment.rows);
            }
        return index;
    }

    void backward() {
        for (int i = 0; i < layers; i++) {
            TitansLayer<T>& l = layer(i);
            read_state(p.d_final_weights[i], l, l.d_weights);
            if (work.has_momentum) read_state(p.d_final_momenta[i], l, l.d_momenta);
            read_state(p.d_final_anchor[i], l, l.d_anchor);
        }
        network.clear_norm_gradients();
        if (at.at_boundary(at.length)) anchor_is_weights();
        const int64_t group = p.checkpoint_every;
        for (int64_t first = at.chunks() ? (at.chunks() - 1) / group * group : -1; first >= 0;
             first -= group) {
            const int64_t last = least(at.chunks(), first + group);
            int64_t index = keep_states(first, last);
            const TitansNetwork<T> own = network;
            for (int64_t chunk = last - 1; chunk >= first; chunk--) {
                const int64_t begin = at.chunk_begin(chunk), end = at.chunk_end(chunk);
                for (int64_t token = begin + (end - begin - 1) / kSegment * kSegment;
                     token >= begin; token -= kSegment) {
                    index--;
                    for (int i = 0; i < layers; i++) {
                        TitansLayer<T>& l = layer(i);
                        l.weights = l.kept_weights + index * l.size();
                        l.anchor = l.kept_anchor + index * l.size();
                        if (work.has_momentum) l.momenta = l.kept_momenta + index * l.size();
                    }
                    backward_segment(at.segment_at(token, end));
                }
            }
            network = own;
        }
        for (int i = 0; i < layers; i++) {
            const TitansLayer<T>& l = layer(i);
            write_state(p.d_anchor[i], l, l.d_anchor);
            write_state(p.d_weights[i], l, l.d_weights);
            if (work.has_momentum) write_state(p.d_momenta[i], l, l.d_momenta);
        }
        if (T* to = at.template matrix<T>(p.d_norm_weight))
            store_matrix(to, 1, p.value_dim, network.d_norm_weight, network.last().lo);
        if (T* to = at.template matrix<T>(p.d_norm_bias))
            store_matrix(to, 1, p.value_dim, network.d_norm_bias, network.last().lo);
    }
};

template <class T>
void titans_tasks(const TitansParams& p, bool backward, int64_t begin, int64_t end, void* scratch) {
    for (int64_t task = begin; task < end; task++) {
        int64_t size;
        TitansTask<T> run(p, task, static_cast<T*>(scratch), backward, &size);
        if (backward)
            run.backward();
        else
            run.forward();
    }
}
template <class T>
int64_t titans_scratch_bytes(const TitansParams& p, bool backward) {
    return TitansTask<T>::scratch_size(p, backward) * static_cast<int64_t>(sizeof(T));
}
