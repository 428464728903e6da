// HOPE's self-modifying memories, backward: a block walks through one (sequence, head) from the
// last segment to the first, with the phases of selfmod_gradients.cuh and
// selfmod_token_gradients.cuh.
//
//   per group of chunks between two checkpoints, the last first:
//       states   forward from the checkpoint: the state before every chunk, in scratch memory
//       per chunk, the last first:
//           states     forward again through the chunk, if it has several segments
//           gradients  its segments, the last first: generate again, through each memory, through
//                      the system and the gates, through the memories that generate
//
// The gradients of the state and of the anchor lie like the states in the forward: in shared memory
// as far as there is room. Scratch memory has, for each block, the states of one group of chunks:
// with the distance between checkpoints that the forward chooses, about as much as x and q of all
// tokens.
#pragma once
#include "selfmod/selfmod_token_gradients.cuh"

namespace hope {

template <class E, int D, int Tokens, int Layers>
class SelfmodBackwardWalk {
    using Layout = SelfmodGradientsLayout<E, D, Tokens, Layers>;
    using Segments = SelfmodTokenGradients<E, D, Tokens, Layers>;

 public:
    DEVICE SelfmodBackwardWalk(const Layout& shared, const SelfmodParams& p,
                               const Sequence<Tokens>& in, StateCarver& carver)
        : shared_(shared),
          p_(p),
          in_(in),
          segments_(shared, p, in),
          from_(shared.forward.tables[0]),
          anchor_(shared.forward.tables[1]),
          to_(shared.forward.tables[2]),
          keeps_anchor_(keeps_anchor<Tokens>(p)) {
        take_matrices(p, *shared.d_state, carver);
        if (keeps_anchor_)
            take_matrices(p, *shared.d_anchor, carver);
        else if (threadIdx.x == 0)
            *shared.d_anchor = SelfmodMatrices{};
        states_ = given_anchor_ = carver.rest();
        if (p.position) states_ += floats_of_state(p);
        __syncthreads();
    }

    DEVICE void run() {
        start();
        const int chunks = in_.chunks(), every = static_cast<int>(p_.checkpoint_every);
        for (int last = chunks; last > 0;) {
            const int first = (last - 1) / every * every;
            __syncthreads();
            point_to_state(p_, from_, state(0));
            __syncthreads();
            if (first > 0)
                copy_from_checkpoint(p_, from_, checkpoint(p_, in_, first, numbers_of_state(p_)));
            else
                load_matrices(p_, from_, p_.weights, in_.index, in_.head);
            for (int chunk = first; chunk + 1 < last; chunk++)
                advance_through(chunk, state(chunk - first), state(chunk + 1 - first));
            for (int chunk = last - 1; chunk >= first; chunk--)
                back_through(chunk, state(chunk - first));
            last = first;
        }
        __syncthreads();
        finish();
    }

 private:
    DEVICE float* state(int i) const { return states_ + i * floats_of_state(p_); }
    // Before segment `part` of a chunk.
    DEVICE float* state_of_part(float* start, int part) const {
        return part ? state(static_cast<int>(chunks_of_group(p_)) + part - 1) : start;
    }
    DEVICE float* anchor_of(int chunk, float* start) const {
        return chunk == 0 && in_.offset ? given_anchor_ : start;
    }

    // The gradients of what the sequence ends with: a chunk that is complete has the final weights
    // as its anchor.
    DEVICE void start() {
        const MatrixTensor none[kSelfmodMatrices] = {};
        const bool inside = in_.ends_inside_chunk();
        load_matrices(p_, *shared_.d_state, p_.d_final_weights, in_.index, in_.head);
        if (!inside) add_matrices(p_, *shared_.d_state, p_.d_final_anchor, in_.index, in_.head);
        if (keeps_anchor_)
            load_matrices(p_, *shared_.d_anchor, inside ? p_.d_final_anchor : none, in_.index,
                          in_.head);
        else
            anchor_pending_ = inside;
        if (threadIdx.x < 2) shared_.d_bias[threadIdx.x] = 0;
        if (!in_.offset) return;
        point_to_state(p_, anchor_, given_anchor_);
        __syncthreads();
        load_matrices(p_, anchor_, p_.anchor[0].data ? p_.anchor : p_.weights, in_.index, in_.head);
    }
    DEVICE void finish() const {
        store_matrices(p_, p_.d_weights, *shared_.d_state, in_.index, in_.head);
        if (in_.offset)
            store_matrices(p_, p_.d_anchor, *shared_.d_anchor, in_.index, in_.head);
        else
            clear_matrices(p_, p_.d_anchor, in_.index, in_.head);
        if (threadIdx.x) return;
        *matrix(p_.d_lr_bias, in_.index, in_.head) = shared_.d_bias[0];
        *matrix(p_.d_retention_bias, in_.index, in_.head) = shared_.d_bias[1];
    }

    // The state after a segment.
    DEVICE void advance(const Segment& at, float* anchor, float* from, float* to) const {
        __syncthreads();  // the tables are free
        point_to_state(p_, from_, from), point_to_state(p_, anchor_, anchor);
        point_to_state(p_, to_, to);
        segments_.start_inputs(at);
        segments_.wait();
        segments_.generate(anchor_, at);
        for (int m = 0; m < kSelfmodMemories; m++) {
            segments_.learn(from_.memory[m], anchor_.memory[m], m, at.new_chunk);
            segments_.update(from_.memory[m], to_.memory[m]);
            __syncthreads();
        }
    }
    DEVICE void advance_through(int chunk, float* from, float* to) const {
        const int first = in_.segments_before(chunk),
                  count = in_.segments_before(chunk + 1) - first;
        for (int i = 0; i < count; i++)
            advance(in_.segment(first + i), anchor_of(chunk, from), state_of_part(from, i),
                    i + 1 < count ? state_of_part(from, i + 1) : to);
    }
    DEVICE void back_through(int chunk, float* start) {
        const int first = in_.segments_before(chunk),
                  count = in_.segments_before(chunk + 1) - first;
        float* const anchor = anchor_of(chunk, start);
        for (int i = 0; i + 1 < count; i++)
            advance(in_.segment(first + i), anchor, state_of_part(start, i),
                    state_of_part(start, i + 1));
        for (int i = count - 1; i >= 0; i--)
            back(in_.segment(first + i), anchor, state_of_part(start, i));
    }
    DEVICE void back(const Segment& at, float* anchor, float* from) {
        __syncthreads();  // the tables are free
        point_to_state(p_, from_, from), point_to_state(p_, anchor_, anchor);
        segments_.start_inputs(at), segments_.start_queries(at);
        segments_.start_outputs_gradient(at);
        segments_.wait();
        segments_.generate(anchor_, at);
        segments_.clear_sums(at.new_chunk);
        __syncthreads();
        for (int m = 0; m < kSelfmodMemories; m++)
            segments_.through_memory(from_.memory[m], anchor_.memory[m], m, at);
        segments_.through_common_solution(at.new_chunk);
        segments_.through_system(at);
        segments_.through_generation(anchor_, at);
        if (anchor_pending_) {
            add_matrices(p_, *shared_.d_state, p_.d_final_anchor, in_.index, in_.head);
            anchor_pending_ = false;
        }
    }

    const Layout& shared_;
    const SelfmodParams& p_;
    const Sequence<Tokens>& in_;
    const Segments segments_;
    SelfmodMatrices &from_, &anchor_, &to_;  // of the segment that is worked on
    const bool keeps_anchor_;
    float *states_, *given_anchor_;
    bool anchor_pending_ = false;  // until the last chunk's start
};

template <class E, int D, int Tokens, int Layers>
__global__ void __launch_bounds__(kLayerThreads, 1)
    selfmod_bwd_kernel(GRID_CONSTANT const SelfmodParams p, const LayerMemory memory) {
    using Layout = SelfmodGradientsLayout<E, D, Tokens, Layers>;
    SharedCarver carver(dynamic_shared());
    float* scratch = memory.of_block();
    TileCarver tiles(carver, memory.spills ? scratch : nullptr);
    const Layout shared(tiles, p);
    if (memory.spills) scratch = tiles.rest();
    StateCarver states(carver, scratch, memory.resident);
    const Sequence<Tokens> in(p, static_cast<int>(blockIdx.x / p.heads),
                              static_cast<int>(blockIdx.x % p.heads));
    SelfmodBackwardWalk<E, D, Tokens, Layers>(shared, p, in, states).run();
}

template <class E, int D, int Tokens, int Layers>
struct SelfmodBackward {
    static auto kernel() { return selfmod_bwd_kernel<E, D, Tokens, Layers>; }
    // Of 128 features and two layers, 32 tokens fit 227 KiB only for hidden sizes up to 128, and
    // then with all that is of float in scratch memory.
    static constexpr SegmentTokens segments =
        D <= 64 ? (Layers == 1 ? SegmentTokens::only_32 : SegmentTokens::both)
                : (Layers == 1 ? SegmentTokens::both : SegmentTokens::only_16);

    static LayerDemand demand(const SelfmodParams& p) {
        LayerDemand demand = tiles_demand(
            [&](TileCarver& tiles) { SelfmodGradientsLayout<E, D, Tokens, Layers>(tiles, p); });
        demand.groups = 1 + keeps_anchor<Tokens>(p);
        const int64_t states = states_of_block<Tokens>(p) + (p.position ? 1 : 0);
        demand.more_floats = states * floats_of_state(p);
        return demand;
    }
};

// Compiled one by one: each takes minutes.
extern template struct LayerKernels<float, SelfmodBackward, SelfmodParams>;
extern template struct LayerKernels<bf16, SelfmodBackward, SelfmodParams>;
extern template struct LayerKernels<fp16, SelfmodBackward, SelfmodParams>;

}  // namespace hope
