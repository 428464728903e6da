"""The MLP between token mixers."""

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """The MLP: `(silu(x G) * x U) D`, x [..., dim]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        # G and U are not one matrix: cutting its output costs a copy in the backward.
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
