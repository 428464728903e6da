// What memories have in common: their options, and where the checkpoints of their states lie.
#pragma once
#include <cstdint>

namespace hope {

enum class Objective { l2, dot };
enum class Read { after, before, chunk };
enum class Activation { gelu, silu };

// Checkpoints are taken at the start of every checkpoint_every-th chunk of a sequence, its first
// chunk excepted (that state is the input). Sequence n with its first token at `start` of the whole
// batch keeps them from slot start / span + n on, span = chunk_size * checkpoint_every: room for
// all, whatever the lengths and positions are.
inline int64_t checkpoint_slots(int64_t all_tokens, int64_t sequences, int64_t span) {
    return all_tokens / span + sequences;
}

}  // namespace hope
