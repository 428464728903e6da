// How the kernels of the continuum memory system go over a sequence's chunks.
#pragma once

namespace hope {

enum class CmsPass {
    forward,
    again,    // forward within a group of chunks, for the backward: weights alone
    backward  // of one chunk
};

}  // namespace hope
