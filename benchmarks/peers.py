"""Other people's implementations, each behind an optional import.

The `bench` extra of pyproject.toml pins their versions: pip install .[bench]
"""

from __future__ import annotations

from importlib import metadata

from torch import nn

import build_config

INSTALL = "pip install .[bench]"


def pinned() -> dict[str, str]:
    """The version of every peer that pyproject.toml asks for."""
    return dict(requirement.split("==") for requirement in build_config.requirements(["bench"]))


def installed(peer: str) -> str | None:
    """The version of a peer that is here; None if it is not."""
    try:
        return metadata.version(peer)
    except metadata.PackageNotFoundError:
        return None


def why_not(peer: str) -> str | None:
    """Why a peer cannot be measured; None if it can."""
    found = installed(peer)
    if found is None:
        return f"not installed: {INSTALL}"
    if found != pinned()[peer]:
        return f"version {found} instead of {pinned()[peer]}: {INSTALL}"
    return None


def titans_pytorch(heads: int, head_dim: int, chunk_size: int) -> nn.Module:
    """titans-pytorch's layer with a linear memory, momentum and decay; x [B, T, heads * head_dim].

    Its memory is a matrix per head with a residual LayerNorm around it.
    """
    from titans_pytorch import NeuralMemory

    return NeuralMemory(
        dim=heads * head_dim,
        heads=heads,
        dim_head=head_dim,
        chunk_size=chunk_size,
        default_model_kwargs={"depth": 1},
    )
