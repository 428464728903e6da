"""The short causal convolution that mixers share."""

import torch
from torch import Tensor, nn

import hope_ext


class CausalConv(nn.Module):
    """Depthwise causal convolution over the last K tokens of each channel, then SiLU on request.

    `forward(x [B, T, C], tail=None, cu_seqlens=None)` returns the output [B, T, C] and the
    last inputs [B, K - 1, C], which a later call takes as `tail`; with `cu_seqlens` the tails' rows
    are the N documents.
    """

    def __init__(self, channels: int, width: int, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        # [C, K]; the last tap is the token itself.
        self.weight = nn.Parameter(torch.empty(channels, width))

    def init_weights(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(
        self, x: Tensor, tail: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return hope_ext.causal_conv(
            x,
            self.weight,
            tail=None if tail is None else tail.to(x.dtype),
            activation=self.activation,
            cu_seqlens=cu_seqlens,
            return_tail=True,
        )
