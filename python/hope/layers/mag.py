"""Memory as a gate (Titans, arXiv 2501.00663, section 4.2)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass

from hope.config import MagConfig
from hope.layers.memory import NeuralMemory, TitansMemoryState
from hope.layers.unit import RMSNorm
from hope.layers.window import WindowAttention, WindowState


@dataclass
class MagState:
    """What MemoryAsGate and MemoryAsLayer carry: the states of their two parts."""

    attention: WindowState
    memory: TitansMemoryState

    def detach(self) -> "MagState":
        return MagState(self.attention.detach(), self.memory.detach())


register_dataclass(MagState)


class MemoryAsGate(nn.Module):
    """Sliding-window attention and a memory read the same x; the one is gated by the other.

    Both outputs are normalised, with a weight for each channel; the memory's then passes SiLU.
    """

    def __init__(self, dim: int, config: MagConfig) -> None:
        super().__init__()
        width = config.heads * config.head_dim
        self.attention = WindowAttention(dim, config)
        self.memory = NeuralMemory(dim, config)
        self.attention_norm = RMSNorm(width)
        self.memory_norm = RMSNorm(width)
        self.out = nn.Linear(width, dim, bias=False)

    def init_weights(self) -> None:
        self.attention.init_weights()
        self.memory.init_weights()

    def forward(
        self, x: Tensor, state: MagState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MagState]:
        near, attention = self.attention(x, None if state is None else state.attention, cu_seqlens)
        far, memory = self.memory(x, None if state is None else state.memory, cu_seqlens)
        y = self.out(self.attention_norm(near) * F.silu(self.memory_norm(far)))
        return y, MagState(attention, memory)
