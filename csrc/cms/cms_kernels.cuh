// The continuum memory system on CUDA (docs/derivations.md has the algebra, in these names).
//
// A chunk is a handful of large products, each a launch over all sequences and each followed by
// what is elementwise in the same tile of the result. Chunks follow each other: a launch waits for
// the one before it, and inside a launch no block waits for another.
//
//   forward    for each chunk   hidden   X, W1 -------> H, act'(Z)
//                               output   H, W2 -------> Y, S
//                               back     S, W2 -------> G
//                               learn    X G, H S ----> W1, W2, their rounded copies, a checkpoint
//   backward   for each group of chunks, last first: forward from its checkpoint, keeping rounded
//              weights, then for each chunk, last first
//                               hidden, output, back    H, Z, E, S, U, without Y
//                               lesson   X, Q1 -------> d_U, G, part of d_Z
//                               scaled errors  H Q2, d_U W2 ----> d_S
//                               errors   a pass ------> d_lr, d_target, d_Y
//                               activated  S Q2, d_Y W2 --------> d_Z
//                               input    G Q1, d_Z W1 ----------> d_X
//                               weights  X d_Z, H d_Y, d_U S ---> d_W, the next lesson
//
// How many chunks a sequence has is known on the device alone: the host goes over as many as there
// may be, and blocks of sequences without that chunk return at once.
#pragma once
#include <stdexcept>

#include "cms/cms_backward.cuh"
#include "cms/cms_elementwise.cuh"

namespace hope {

template <class E, template <class> class Phase, int Tile>
using CmsProduct = BlockProduct<E, Tile, Phase<E>::kLeftTurned, Phase<E>::kRightTurned>;

template <class E, template <class> class Phase, int Tile>
__global__ void __launch_bounds__(kProductThreads, sizeof(E) == 2 ? 2 : 1)
    cms_product_kernel(GRID_CONSTANT const CmsLaunch<E> of) {
    constexpr CmsResult kResult = Phase<E>::kResult;
    const int sequence = static_cast<int>(blockIdx.x) / of.blocks;
    int block = static_cast<int>(blockIdx.x) % of.blocks, layer = 0;
    if constexpr (kResult == CmsResult::matrices) {  // one layer's blocks, then the other's
        layer = block >= of.blocks / 2;
        block -= layer * (of.blocks / 2);
    }
    const CmsChunk<E> c(of, sequence);
    const bool of_rows = kResult != CmsResult::matrices;
    const int rows = of_rows ? c.rows : c.rows_of(layer),
              columns = c.columns_of(of_rows ? kResult == CmsResult::wide : layer);
    // Neighbouring blocks share what is larger, the columns of weights.
    const int in_column = ((of_rows ? of.most_rows : rows) + Tile - 1) / Tile;
    const int row = block % in_column * Tile, column = block / in_column * Tile;
    const Phase<E> phase(c, layer);
    if (!c.exists() || row >= rows || !phase.wanted()) return;
    SharedCarver shared(dynamic_shared());
    CmsProduct<E, Phase, Tile> product(shared, row, column, rows, columns);
    phase.multiply(product);
    // Found out again, since the product wants all registers.
    const CmsChunk<E> again(of, sequence);
    const Phase<E> end(again, layer);
    product.for_pairs([&](int i, int j, float x, float y) { end.leave(i, j, x, y); });
}

// Chunks that a sequence may have.
inline int64_t cms_most_chunks(const CmsParams& p) {
    if (p.tokens == 0) return 0;
    return p.position ? (p.tokens + p.chunk_size - 2) / p.chunk_size + 1
                      : (p.tokens - 1) / p.chunk_size + 1;
}

template <class E>
class CmsRun {
 public:
    CmsRun(const CmsParams& params, bool backward, void* scratch, void* stream)
        : stream_(static_cast<cudaStream_t>(stream)),
          multiprocessors_(device_attribute(cudaDevAttrMultiProcessorCount)),
          chunks_(static_cast<int>(cms_most_chunks(params))),
          group_(params.checkpoint_every && params.checkpoint_every < chunks_
                     ? static_cast<int>(params.checkpoint_every)
                     : chunks_) {
        of_.p = params;
        of_.most_rows = static_cast<int>(std::min(params.chunk_size, params.tokens));
        of_.one_start = params.sequences > 0;
        for (const MatrixTensor& weights : params.weights)
            of_.one_start = of_.one_start && (params.sequences == 1 || weights.batch == 0);
        of_.rows_by_token = params.cu_seqlens && params.sequences * of_.most_rows > params.tokens;
        CmsCarver carver(static_cast<char*>(scratch));
        carve(carver, backward);
        scratch_bytes_ = carver.used();
    }
    int64_t scratch_bytes() const { return scratch_bytes_; }

    void forward() {
        of_.pass = CmsPass::forward;
        of_.first_chunk = of_.chunk = 0, of_.end_chunk = chunks_;
        round();
        for (; of_.chunk < chunks_; of_.chunk++) forward_chunk();
        of_.chunk = 0;
        if (of_.p.keeps_state || of_.p.checkpoint_every)
            start(cms_finish_kernel<E>, blocks_of_state(), of_.p.sequences);
    }
    void backward() {
        of_.pass = CmsPass::backward;
        of_.first_chunk = of_.chunk = 0, of_.end_chunk = chunks_;
        start(cms_start_kernel<E>, blocks_of_state(), of_.p.sequences);
        if (chunks_ == 0) return;
        for (int first = (chunks_ - 1) / group_ * group_; first >= 0; first -= group_) {
            of_.first_chunk = of_.chunk = first, of_.end_chunk = std::min(chunks_, first + group_);
            of_.pass = CmsPass::again;
            round();
            for (; of_.chunk + 1 < of_.end_chunk; of_.chunk++) forward_chunk();
            of_.pass = CmsPass::backward;
            for (; of_.chunk >= first; of_.chunk--) backward_chunk();
        }
    }

 private:
    CmsLaunch<E> of_{};
    const cudaStream_t stream_;
    const int multiprocessors_;
    const int chunks_, group_;  // of the longest sequence there may be; between two checkpoints
    int64_t scratch_bytes_;

    void carve(CmsCarver& carver, bool backward) {
        const int64_t rows = of_.rows_by_token ? of_.p.tokens : of_.p.sequences * of_.most_rows;
        const int64_t wide = rows * of_.p.dim, hidden = rows * of_.p.hidden_dim;
        const int64_t states = of_.p.sequences * of_.state_size();
        CmsScratch<E>& s = of_.scratch;
        s.h = carver.take<E>(hidden), s.g = carver.take<E>(hidden), s.s = carver.take<E>(wide);
        if (of_.kRounds) {
            const int64_t kept = backward ? group_ : 1;
            const bool one = of_.one_start && chunks_ == 1;
            s.rounded = carver.take<E>(one ? of_.state_size() : kept * states);
        }
        if (!backward) {
            if (!of_.p.keeps_state && chunks_ > 1) s.kept = carver.take<float>(states);
            return;
        }
        const int64_t again = std::max(group_ - 1, 0);
        s.kept = carver.take<float>((of_.kRounds ? std::min<int64_t>(again, 1) : again) * states);
        s.z = carver.take<E>(hidden), s.d_u = carver.take<E>(hidden);
        s.d_z = carver.take<E>(hidden), s.d_y = carver.take<E>(wide);
        s.e = carver.take<float>(wide), s.d_s = carver.take<float>(wide);
        s.parked = carver.take<float>(hidden);
        if (of_.kRounds) s.lesson = carver.take<E>(states);
    }

    static unsigned grid(int64_t blocks) {
        if (blocks >= int64_t{1} << 31) throw std::invalid_argument("cms: too many sequences");
        return static_cast<unsigned>(blocks);
    }
    int64_t blocks_of_state() const { return (of_.state_size() + kCmsPart - 1) / kCmsPart; }
    // Both kinds of kernels have as many threads.
    void start(void (*kernel)(CmsLaunch<E>), int64_t blocks, int64_t sequences,
               size_t shared_bytes = 0) {
        static_assert(kCmsThreads == kProductThreads);
        of_.blocks = static_cast<int>(grid(blocks));
        if (blocks * sequences > 0)
            launch(kernel, dim3(grid(blocks * sequences)), dim3(kCmsThreads), shared_bytes, stream_,
                   of_);
    }
    void round() {
        if constexpr (CmsLaunch<E>::kRounds)
            if (chunks_)
                start(cms_round_kernel<E>, blocks_of_state(),
                      of_.chunk == 0 && of_.one_start ? 1 : of_.p.sequences);
    }

    // Blocks that a phase has for each sequence.
    int64_t blocks_of(CmsResult result, int64_t tile) const {
        const auto tiles = [tile](int64_t size) { return (size + tile - 1) / tile; };
        const int64_t dim = tiles(of_.p.dim), hidden = tiles(of_.p.hidden_dim);
        if (result == CmsResult::matrices) return 2 * dim * hidden;
        return tiles(of_.most_rows) * (result == CmsResult::wide ? dim : hidden);
    }
    template <template <class> class Phase>
    void product() {
        constexpr int kLarge = 128, kSmall = 64;
        // Small tiles read their factors twice as often, but keep more multiprocessors busy.
        const int64_t large = blocks_of(Phase<E>::kResult, kLarge) * of_.p.sequences;
        if (2 * large < multiprocessors_)
            product_of<Phase, kSmall>();
        else
            product_of<Phase, kLarge>();
    }
    template <template <class> class Phase, int Tile>
    void product_of() {
        const int64_t blocks = blocks_of(Phase<E>::kResult, Tile);
        start(cms_product_kernel<E, Phase, Tile>, blocks, of_.p.sequences,
              CmsProduct<E, Phase, Tile>::shared_bytes());
    }

    // Whether some sequence may learn this chunk, and something comes of it.
    bool may_learn() const {
        if (of_.chunk + 1 < chunks_) return true;
        if (of_.pass == CmsPass::forward) return of_.p.keeps_state;
        return of_.p.d_final_weights[0].data || of_.p.d_final_pending[0].data;
    }
    void forward_chunk() {
        product<CmsHidden>();
        product<CmsOutput>();
        if (!may_learn()) return;
        product<CmsBack>();
        product<CmsLearn>();
    }
    void backward_chunk() {
        product<CmsHidden>();
        if (may_learn()) {
            product<CmsOutput>();
            product<CmsBack>();
            product<CmsThroughLesson>();
            product<CmsThroughScaledErrors>();
        }
        const int64_t blocks = (of_.most_rows + kCmsWarps - 1) / kCmsWarps;
        start(cms_errors_kernel<E>, blocks, of_.p.sequences);
        product<CmsThroughActivated>();
        product<CmsThroughInput>();
        product<CmsThroughWeights>();
    }
};

// A dtype's kernels. Not inline, so that an extern template keeps them out of other sources.
template <class E>
struct CmsKernels {
    static int64_t scratch(const CmsParams& p, bool backward);
    static void forward(const CmsParams& p, void* scratch, void* stream);
    static void backward(const CmsParams& p, void* scratch, void* stream);
};

template <class E>
int64_t CmsKernels<E>::scratch(const CmsParams& p, bool backward) {
    return CmsRun<E>(p, backward, nullptr, nullptr).scratch_bytes();
}
template <class E>
void CmsKernels<E>::forward(const CmsParams& p, void* scratch, void* stream) {
    CmsRun<E>(p, false, scratch, stream).forward();
}
template <class E>
void CmsKernels<E>::backward(const CmsParams& p, void* scratch, void* stream) {
    CmsRun<E>(p, true, scratch, stream).backward();
}

// Compiled one by one.
extern template struct CmsKernels<float>;
extern template struct CmsKernels<bf16>;
extern template struct CmsKernels<fp16>;

}  // namespace hope
