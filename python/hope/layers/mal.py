"""Memory as a layer (Titans, arXiv 2501.00663, section 4.3)."""

from torch import Tensor, nn

from hope.config import MalConfig
from hope.layers.mag import MagState
from hope.layers.memory import NeuralMemory
from hope.layers.window import WindowAttention


class MemoryAsLayer(nn.Module):
    """A memory reads x, and sliding-window attention what the memory answers."""

    def __init__(self, dim: int, config: MalConfig) -> None:
        super().__init__()
        width = config.heads * config.head_dim
        self.memory = NeuralMemory(dim, config)
        self.attention = WindowAttention(width, config)
        self.out = nn.Linear(width, dim, bias=False)

    def init_weights(self) -> None:
        self.attention.init_weights()
        self.memory.init_weights()

    def forward(
        self, x: Tensor, state: MagState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MagState]:
        o, memory = self.memory(x, None if state is None else state.memory, cu_seqlens)
        o, attention = self.attention(o, None if state is None else state.attention, cu_seqlens)
        return self.out(o), MagState(attention, memory)
