// The options that memories have in common.
#pragma once

namespace hope {

enum class Objective { l2, dot };
enum class Read { after, before, chunk };
enum class Activation { gelu, silu };

}  // namespace hope
