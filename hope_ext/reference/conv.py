"""The short causal convolution of each channel, as sequence models put before their memories.

Legend: B batch, N sequences, T tokens, C channels, K width.
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F


def conv(
    x: Tensor,  # [B, T, C]
    weight: Tensor,  # [C, K]; the last tap is the token itself
    tail: Tensor | None,  # [N, K - 1, C], the inputs before the first; None: zeros
    cu_seqlens: Tensor | None,  # [N + 1]; then B is 1
    activation: str,
) -> tuple[Tensor, Tensor]:
    """y_t = activation(sum_k weight_k x_{t + k - (K - 1)}) [B, T, C]; and the last K - 1 inputs."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        if len(bounds) == 1:
            return torch.zeros_like(x), x.new_zeros(0, weight.shape[1] - 1, x.shape[2])
        results = [
            conv(
                x[:, begin:end], weight, None if tail is None else tail[i : i + 1], None, activation
            )
            for i, (begin, end) in enumerate(itertools.pairwise(bounds))
        ]
        return torch.cat([y for y, _ in results], 1), torch.cat([last for _, last in results])
    before = weight.shape[1] - 1
    if tail is None:
        tail = x.new_zeros(x.shape[0], before, x.shape[2])
    inputs = torch.cat((tail, x), dim=1)
    z = sum(
        inputs[:, k : k + x.shape[1]].to(weight.dtype) * weight[:, k] for k in range(before + 1)
    )
    y = F.silu(z) if activation == "silu" else z
    return y.to(x.dtype), inputs[:, x.shape[1] :]
