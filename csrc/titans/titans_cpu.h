// The Titans memory by chunks (the dual form; docs/derivations.md has the algebra, in these names).
// Included by each_isa_cpu.h, once per instruction set.
//
// One task is one sequence and head; it walks its tokens in segments (walk_cpu.h), with everything
// of a segment in a thread's cache:
//
//   forward    inputs x and errors e of each layer, at the anchor      (titans_network_cpu.h)
//              the queries through the layers, each as its state is at their token, and the state
//              after the segment                                       (layer_cpu.h)
//   backward   the same in reverse

#include "common/activation_cpu.h"
#include "common/gates_cpu.h"
#include "common/layer_cpu.h"
#include "common/sequence_cpu.h"
#include "common/walk_cpu.h"
#include "titans/titans_network_cpu.h"

template <class T>
struct TitansTask : Walk<T, TitansParams> {
    using Walk<T, TitansParams>::p;
    using Walk<T, TitansParams>::at;
    using Walk<T, TitansParams>::layers;
    LayerWork<T> work;
    TitansNetwork<T> network;  // and the layers

    TitansTask(const TitansParams& params, int64_t task, T* scratch, bool backward,
               int64_t* scratch_size)
        : Walk<T, TitansParams>(params, task, titans_state_size(params)) {
        const int64_t rows = at.rows_at_most(p), kept = at.segments_of_group(p);
        Carver<T> carver{scratch};
        layers = p.layers(), this->has_momentum = p.has_momentum;
        work.read = p.read, work.has_momentum = p.has_momentum;
        int64_t width = 0, transposed_size = 0;
        for (int i = 0; i < layers; i++) {
            Layer<T>& l = network.layer[i];
            this->layer[i] = &l;
            l.carve_state(carver, p.rows_of(i), p.columns_of(i), work.has_momentum, backward, kept);
            l.carve_rows(carver, rows, backward);
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
        at.load_rows(p.k, segment, p.key_dim, network.layer[0].x, network.layer[0].li);
        at.load_rows(p.v, segment, p.value_dim, network.v, network.last().lo);
        network.look_back(work, n);
    }
    void forward_segment(const Segment& segment) {
        prepare(segment);
        const Layer<T>& first = network.layer[0];
        at.load_rows(p.q, segment, p.key_dim, first.queries, first.li);
        network.read_out(work, segment.rows);
        at.store_rows(p.o, segment, p.value_dim, network.o, network.last().lo);
        advance(segment.rows);
    }
    void learn_segment(const Segment& segment) {
        prepare(segment);
        advance(segment.rows);
    }
    void advance(int64_t n) {
        for (int i = 0; i < layers; i++) work.advance(network.layer[i], n);
    }
    void backward_segment(const Segment& segment) {
        const int64_t n = segment.rows, lv = network.last().lo;
        prepare(segment);
        at.load_rows(p.q, segment, p.key_dim, network.layer[0].queries, network.layer[0].li);
        if (p.d_o.data)
            at.load_rows(p.d_o, segment, p.value_dim, network.d_o, lv);
        else
            for (int64_t i = 0; i < n * lv; i++) network.d_o[i] = 0;
        work.clear_gradients(n);
        network.through_reads(work, n);
        for (int i = 0; i < layers; i++) work.through_update(network.layer[i], n);
        network.through_errors(work, n);
        at.store_rows(p.d_v, segment, p.value_dim, network.v, lv);
        at.store_rows(p.d_k, segment, p.key_dim, network.layer[0].d_x, network.layer[0].li);
        at.store_rows(p.d_q, segment, p.key_dim, network.layer[0].d_queries, network.layer[0].li);
        for (int i = 0; i < layers; i++) {
            work.to_state_before(network.layer[i], n);
            work.add_read_state(network.layer[i], n);
        }
        work.gate.backward(n);
        at.store_gate(p.d_lr, segment, work.gate.lr, T(1));
        at.store_gate(p.d_momentum, segment, work.gate.momentum, T(1));
        at.store_gate(p.d_decay, segment, work.gate.keep, T(-1));
    }

    void backward() {
        network.clear_norm_gradients();
        walk_backward<T>(*this);
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
            walk_forward<T>(run);
    }
}
template <class T>
int64_t titans_scratch_bytes(const TitansParams& p, bool backward) {
    return TitansTask<T>::scratch_size(p, backward) * static_cast<int64_t>(sizeof(T));
}
