// What the CPU kernel of the continuum memory system does from one barrier to the next: a phase,
// for one chunk of each of some sequences.
#pragma once
#include "cms/cms.h"
#include "cms/cms_pass.h"

namespace hope {

enum class CmsPhase {
    start,   // of a pass: what needs no chunk
    load,    // tokens to rows of the accumulation dtype
    hidden,  // act(X W1)
    output,  // X + act(X W1) W2, the errors
    back,    // errors through W2
    learn,   // the chunk's gradient, the weights of the next
    finish,  // final states that no chunk has written
    // of the backward
    lesson,         // d_G = X Q1
    scaled_errors,  // d_S = H Q2 + d_U W2
    errors,         // d_lr, d_target, to d_Y
    activated,      // d_H = S Q2^T + d_Y W2^T
    input,          // d_X = G Q1^T + d_Z W1^T
    weights,        // both matrices' gradients before the chunk
};

// Matrices of rows that a chunk needs on its way: so many [rows][ld] and so many [rows][lf].
constexpr int64_t kCmsForwardRows = 2, kCmsBackwardRows = 5;

struct CmsWork {
    const CmsParams& params;
    CmsPass pass;
    int64_t first_sequence, sequences;  // those at work
    int64_t most_rows;                  // tokens in a chunk of theirs
    int64_t first_chunk, end_chunk;     // the group: from one checkpoint to the next; else all
    int64_t chunk;                      // of each sequence that has so many
    int64_t ld, lf;                     // leading dimensions of rows of D and F numbers
    void* rows;                         // [sequences][of each kind][most_rows][ld or lf]
    void* kept;                         // [chunks - 1][sequences][2 D F]: the group's weights; of
                                        // the forward's, if not final_weights, [sequences][2 D F]
};

}  // namespace hope
