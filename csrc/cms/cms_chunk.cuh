// What a launch of the continuum memory system's CUDA kernels gets, and what a block finds there
// about its sequence: a chunk's tokens, its rows on their way, the weights around it.
//
// Factors of products are of the tokens' dtype E. Float matrices that are factors too have a
// rounded copy beside them, which the kernel that writes the one writes as well; for float the
// matrix is its own copy.
#pragma once
#include <algorithm>

#include "cms/cms.h"
#include "cms/cms_pass.h"
#include "common/product.cuh"
#include "common/sequence.cuh"

namespace hope {

// Cuts scratch memory; from null, it counts.
class CmsCarver {
 public:
    explicit CmsCarver(char* base) : base_(base) {}
    template <class T>
    T* take(int64_t count) {
        constexpr int64_t kAlignment = 128;
        T* const piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
        used_ +=
            (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
        return piece;
    }
    int64_t used() const { return used_; }

 private:
    char* base_;
    int64_t used_ = 0;
};

// [rows] of the chunks under way, [copies] of states [2 D F].
template <class E>
struct CmsScratch {
    E *h, *g, *s;      // act(Z) [F]; act'(Z), then G [F]; the errors times their rates [D]
    E* rounded;        // weights at chunks' starts
    float* kept;       // weights at chunks' starts, computed again; of the forward's, if nobody
                       // wants the final ones, the last chunk's
    E *z, *d_u, *d_z;  // [F]; the backward only, like all below
    E* d_y;            // [D]
    float *e, *d_s;    // [D]
    float* parked;     // [F] what reaches Z through the lesson
    E* lesson;         // the next chunk's lesson, rounded
};

template <class E>
struct CmsLaunch {
    static constexpr bool kRounds = sizeof(E) == 2;

    CmsParams p;
    CmsPass pass;
    int chunk;                   // of each sequence that has so many
    int first_chunk, end_chunk;  // the group: from one checkpoint to the next; else all
    int most_rows;               // tokens of a chunk
    int blocks;                  // for each sequence
    bool one_start;              // the weights at the start are the same for all sequences
    bool rows_by_token;          // rows of scratch memory lie where the tokens are, not by sequence
    CmsScratch<E> scratch;

    __host__ __device__ int64_t layer_size() const { return p.dim * p.hidden_dim; }
    __host__ __device__ int64_t state_size() const { return 2 * layer_size(); }
};

// A sequence's chunk; names are those of docs/derivations.md.
template <class E>
struct CmsChunk {
    using In = Sequence<128>;  // no matter how many: there are no segments here
    const CmsLaunch<E>& of;
    const CmsParams& p;
    const In in;
    const int first, rows;  // the chunk's tokens
    const bool complete, last;

    DEVICE CmsChunk(const CmsLaunch<E>& launch, int sequence)
        : of(launch),
          p(launch.p),
          in(p, sequence, 0),
          first(in.chunk_begin(of.chunk)),
          rows(in.chunk_end(of.chunk) - first),
          complete((in.offset + static_cast<unsigned>(first + rows)) % in.chunk_size == 0),
          last(of.chunk + 1 >= in.chunks()) {}

    DEVICE bool exists() const { return of.chunk < in.chunks(); }
    // Whether the chunk is learned, and for the backward, whether anything comes back from that.
    DEVICE bool learns() const {
        if (of.pass == CmsPass::again) return of.chunk + 1 < min(in.chunks(), of.end_chunk);
        if (!last) return true;
        if (of.pass == CmsPass::forward) return p.keeps_state;
        return (complete ? p.d_final_weights : p.d_final_pending)[0].data;
    }
    DEVICE bool backward() const { return of.pass == CmsPass::backward; }
    DEVICE int dim() const { return static_cast<int>(p.dim); }
    DEVICE int hidden_dim() const { return static_cast<int>(p.hidden_dim); }
    DEVICE float keep() const { return static_cast<float>(1 - p.decay); }

    // ---- rows of the chunk ----
    DEVICE RowMajor<E> tokens(const TokenTensor& tensor) const {
        return {token<E>(tensor, in, first), tensor.token};
    }
    template <class T>
    DEVICE RowMajor<T> scratch(T* all, int64_t width) const {
        const int64_t row =
            of.rows_by_token ? in.start + first : in.index * static_cast<int64_t>(of.most_rows);
        return {all + row * width, width};
    }
    template <class T>
    DEVICE RowMajor<T> wide(T* all) const {
        return scratch(all, p.dim);
    }
    template <class T>
    DEVICE RowMajor<T> hidden(T* all) const {
        return scratch(all, p.hidden_dim);
    }
    DEVICE RowMajor<E> x() const { return tokens(p.x); }
    DEVICE RowMajor<E> h() const { return hidden(of.scratch.h); }
    DEVICE RowMajor<E> g() const { return hidden(of.scratch.g); }
    DEVICE RowMajor<E> s() const { return wide(of.scratch.s); }
    DEVICE RowMajor<E> z() const { return hidden(of.scratch.z); }
    DEVICE RowMajor<E> d_u() const { return hidden(of.scratch.d_u); }
    DEVICE RowMajor<E> d_z() const { return hidden(of.scratch.d_z); }
    DEVICE RowMajor<E> d_y() const { return wide(of.scratch.d_y); }
    DEVICE RowMajor<float> e() const { return wide(of.scratch.e); }
    DEVICE RowMajor<float> d_s() const { return wide(of.scratch.d_s); }
    DEVICE RowMajor<float> parked() const { return hidden(of.scratch.parked); }
    DEVICE float rate(int row) const { return *token<float>(p.lr, in, first + row); }

    // ---- matrices [rows_of][columns_of] of a layer ----
    DEVICE int rows_of(int layer) const { return layer ? hidden_dim() : dim(); }
    DEVICE int columns_of(int layer) const { return layer ? dim() : hidden_dim(); }
    DEVICE float* of_sequence(const MatrixTensor (&tensors)[kCmsLayers], int layer) const {
        return matrix(tensors[layer], in.index, 0);
    }
    // A layer of copy `index` of the sequence's state.
    template <class T>
    DEVICE T* of_state(T* states, int64_t index, int layer) const {
        return states + (index * p.sequences + in.index) * of.state_size() +
               layer * of.layer_size();
    }
    DEVICE int64_t first_slot() const {
        const int64_t start = in.batch * p.tokens + in.start;
        return start / (p.chunk_size * p.checkpoint_every) + (p.position ? in.index : 0);
    }
    // One past the slots that are this sequence's.
    DEVICE int64_t end_slot() const {
        const int64_t end = in.batch * p.tokens + in.start + in.length;
        return end / (p.chunk_size * p.checkpoint_every) + (p.position ? in.index + 1 : 0);
    }
    DEVICE float* slot(int64_t index) const {
        return static_cast<float*>(p.checkpoints) + index * of.state_size();
    }
    // Of that chunk's start; null: none is taken.
    DEVICE float* checkpoint(int chunk, int layer) const {
        if (!p.checkpoint_every || chunk % p.checkpoint_every || chunk >= in.chunks())
            return nullptr;
        return slot(first_slot() + chunk / p.checkpoint_every - 1) + layer * of.layer_size();
    }
    // Weights that the backward has computed again; rounded copies remain of those before.
    DEVICE float* kept(int chunk, int layer) const {
        return of_state(of.scratch.kept, CmsLaunch<E>::kRounds ? 0 : chunk - of.first_chunk - 1,
                        layer);
    }
    // The weights at a chunk's start: of the call, of the group, or as the chunk before has left
    // them.
    DEVICE float* weights_at(int chunk, int layer) const {
        if (chunk == 0) return of_sequence(p.weights, layer);
        if (of.pass == CmsPass::forward) return running(layer);
        return chunk == of.first_chunk ? checkpoint(chunk, layer) : kept(chunk, layer);
    }
    // Where the weights at a later chunk's start go.
    DEVICE float* weights_to(int chunk, int layer) const {
        return of.pass == CmsPass::forward ? running(layer) : kept(chunk, layer);
    }
    // In the forward, what chunks have made of them.
    DEVICE float* running(int layer) const {
        return p.keeps_state ? of_sequence(p.final_weights, layer)
                             : of_state(of.scratch.kept, 0, layer);
    }
    DEVICE E* rounded_at(int chunk, int layer) const {
        if (chunk == 0 && of.one_start) return of.scratch.rounded + layer * of.layer_size();
        const int index = of.pass == CmsPass::forward ? 0 : chunk - of.first_chunk;
        return of_state(of.scratch.rounded, index, layer);
    }
    DEVICE RowMajor<E> weights(int layer) const {
        if constexpr (CmsLaunch<E>::kRounds)
            return {rounded_at(of.chunk, layer), columns_of(layer)};
        else
            return {weights_at(of.chunk, layer), columns_of(layer)};
    }
    // Q, the gradient of the chunk's gradient, but for its sign: all rows of the backward that come
    // from it are those of the loss times this sign.
    DEVICE float* lesson_at(int layer) const {
        return of_sequence(complete ? p.d_weights : p.d_final_pending, layer);
    }
    DEVICE RowMajor<E> lesson(int layer) const {
        if constexpr (CmsLaunch<E>::kRounds)
            return {of_state(of.scratch.lesson, 0, layer), columns_of(layer)};
        else
            return {lesson_at(layer), columns_of(layer)};
    }
    DEVICE float sign() const { return complete && learns() ? -1.0f : 1.0f; }
};

}  // namespace hope
