// Where a task's tokens are, and where its state is kept: the walk of one (sequence, head) in
// segments, which end at chunk boundaries or after kSegment tokens, whichever comes first. Included
// by each_isa_cpu.h through a memory's kernel, once per instruction set.

constexpr int64_t kSegment = 64;

// A stretch of one sequence's tokens within one chunk.
struct Segment {
    int64_t first;  // token of the call
    int64_t rows;
    bool new_chunk;
};

// Params: a memory's, with chunk_size, checkpoint_every, position, cu_seqlens and the like.
template <class Params>
struct Sequence {
    const Params& p;
    const int64_t state_size;  // numbers in a checkpoint
    const int64_t sequence, head, batch;
    int64_t start, length;  // first token in its batch row, tokens
    int64_t offset;         // position within the first chunk

    Sequence(const Params& params, int64_t task, int64_t size_of_state)
        : p(params),
          state_size(size_of_state),
          sequence(task / params.heads),
          head(task % params.heads),
          batch(params.cu_seqlens ? 0 : sequence),
          start(0),
          length(params.tokens) {
        if (p.cu_seqlens) {
            start = most(0, least(p.tokens, p.cu_seqlens[sequence]));
            length = most(0, least(p.tokens, p.cu_seqlens[sequence + 1]) - start);
        }
        offset = p.position ? p.position[sequence] % p.chunk_size : 0;
        if (offset < 0) offset += p.chunk_size;  // of a position that nobody has looked at
    }

    // ---- sizes of scratch memory ----
    static int64_t rows_at_most(const Params& p) {
        return most(1, least(kSegment, least(p.chunk_size, p.tokens)));
    }
    static int64_t segments_of_group(const Params& p) {
        const int64_t chunks = least(most(p.checkpoint_every, 1), p.tokens / p.chunk_size + 2);
        const int64_t longest = least(p.chunk_size, most(p.tokens, 1));
        return chunks * ((longest + kSegment - 1) / kSegment);
    }

    // ---- chunks ----
    int64_t chunks() const {
        return length ? (offset + length + p.chunk_size - 1) / p.chunk_size : 0;
    }
    int64_t chunk_begin(int64_t chunk) const { return most(0, chunk * p.chunk_size - offset); }
    int64_t chunk_end(int64_t chunk) const {
        return least(length, (chunk + 1) * p.chunk_size - offset);
    }
    bool at_boundary(int64_t token) const { return (offset + token) % p.chunk_size == 0; }
    Segment segment_at(int64_t token, int64_t end) const {
        return {token, least(kSegment, end - token), at_boundary(token)};
    }

    // ---- tokens ----
    template <class T>
    T gate_value(const TokenTensor& gate, int64_t token) const {
        return static_cast<const T*>(
            gate.data)[batch * gate.batch + (start + token) * gate.token + head * gate.head];
    }
    template <class T>
    void store_gate(const TokenTensor& gate, const Segment& at, const T* values, T sign) const {
        if (!gate.data) return;
        T* const to = static_cast<T*>(gate.data) + batch * gate.batch +
                      (start + at.first) * gate.token + head * gate.head;
        for (int64_t t = 0; t < at.rows; t++) to[t * gate.token] = sign * values[t];
    }
    template <class T>
    void load_rows(const TokenTensor& from, const Segment& at, int64_t columns, T* tile,
                   int64_t ld) const {
        load_tokens<T>(p.element, from, batch, start + at.first, head, at.rows, columns, tile, ld);
    }
    template <class T>
    void store_rows(const TokenTensor& to, const Segment& at, int64_t columns, const T* tile,
                    int64_t ld) const {
        store_tokens<T>(p.element, to, batch, start + at.first, head, at.rows, columns, tile, ld);
    }

    // ---- states ----
    template <class T>
    T* matrix(const MatrixTensor& tensor) const {
        return tensor.data
                   ? static_cast<T*>(tensor.data) + sequence * tensor.batch + head * tensor.head
                   : nullptr;
    }
    // Checkpoints: slots of the sequences that begin at `first` of the whole batch's tokens and
    // later start here.
    int64_t first_slot(int64_t n, int64_t first) const {
        return first / (p.chunk_size * p.checkpoint_every) + n;
    }
    int64_t batch_token() const { return p.cu_seqlens ? start : sequence * p.tokens; }
    template <class T>
    T* slot(int64_t index) const {
        return static_cast<T*>(p.checkpoints) + (index * p.heads + head) * state_size;
    }
    template <class T>
    T* checkpoint(int64_t chunk) const {  // of the chunk's start; null where none is taken
        if (!p.checkpoint_every || chunk == 0 || chunk % p.checkpoint_every) return nullptr;
        return slot<T>(first_slot(sequence, batch_token()) + chunk / p.checkpoint_every - 1);
    }
    template <class T>
    void clear_unused_checkpoints() const {
        if (!p.checkpoint_every) return;
        const int64_t used = chunks() ? (chunks() - 1) / p.checkpoint_every : 0;
        const int64_t end = first_slot(sequence + 1, batch_token() + length);
        for (int64_t index = first_slot(sequence, batch_token()) + used; index < end; index++)
            __builtin_memset(slot<T>(index), 0, state_size * sizeof(T));
    }
};
