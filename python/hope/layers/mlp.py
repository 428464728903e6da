"""The MLPs between token mixers."""

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from hope.config import ModelConfig

# The operators' gelu is this form, too.
ACTIVATIONS = {"gelu": functools.partial(F.gelu, approximate="tanh"), "silu": F.silu}


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


class MLP(nn.Module):
    """The MLP of two matrices: `act(x W1) W2`, x [..., dim]; act "gelu" (the tanh form), "silu"."""

    def __init__(self, dim: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


def make_mlp(config: ModelConfig) -> SwiGLU | MLP:
    """The MLP of a block that has no continuum memory system."""
    return {"swiglu": SwiGLU, "gelu": MLP}[config.mlp](config.dim, config.mlp_dim)
