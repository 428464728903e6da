"""What the tests of the operators run on, and how exact they are there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

BACKENDS = ("cpu", "emulated", "cuda")  # of hope_ext.testing; the fixture `backend` provides them
WIDE, *NARROW = DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
each_backend_and_dtype = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(backend, dtype, id=f"{backend}-{dtype}")
        for backend in BACKENDS
        for dtype in (DTYPES if backend == "cpu" else NARROW)
    ],
    indirect=["backend"],
)


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def finest(backend: str) -> torch.dtype:
    """The most exact dtype there is: facts of arithmetic are checked in it."""
    return WIDE if backend == "cpu" else torch.float32


def close(a: Tensor, b: Tensor) -> None:
    """Equal but for rounding: in float64 to 1e-10 of each number, else to 1e-5 of the largest."""
    if b.dtype == torch.float64:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    else:
        scale = b.abs().max().item() if b.numel() else 0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * scale)


def all_close(a: object, b: object) -> None:
    """The same of all tensors in a tree; integers and the rest are equal."""
    for x, y in zip(_pytree.tree_leaves(a), _pytree.tree_leaves(b), strict=True):
        if isinstance(y, Tensor) and y.is_floating_point():
            close(x, y)
        else:
            torch.testing.assert_close(x, y)
