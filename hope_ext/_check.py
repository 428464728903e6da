"""Argument checks shared by the operators: they name what was expected and what came."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(
    name: str,
    value: object,
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
    like: str = "q",
) -> Tensor:
    """`device`: where it has to be, as the argument `like` is."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{name}: expected dtype {names}, got {str(value.dtype).removeprefix('torch.')}"
        )
    if value.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if device is not None and value.device != device:
        raise ValueError(
            f"{name}: expected a tensor on {device}, like {like}, got one on {value.device}"
        )
    return value


def shape(name: str, value: Tensor, expected: Sequence[int], letters: str) -> None:
    """`letters` names the dimensions, as in "B T H"."""
    if len(value.shape) != len(expected) or any(
        a != b for a, b in zip(value.shape, expected, strict=True)
    ):
        names = ", ".join(letters.split())
        raise ValueError(
            f"{name}: expected shape [{names}] = {list(expected)}, got {list(value.shape)}"
        )


def dimensions(name: str, value: Tensor, letters: str) -> None:
    if value.dim() != len(letters.split()):
        raise ValueError(
            f"{name}: expected [{', '.join(letters.split())}], got shape {list(value.shape)}"
        )


def choice(name: str, value: object, options: Sequence[str]) -> str:
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def positive(name: str, value: object) -> int:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a positive integer, got {value!r}")
    if value <= 0 or value >= 2**31:  # kernels multiply it by token counts in 64 bits
        raise ValueError(f"{name}: expected a positive integer below 2**31, got {value}")
    return value


def cu_seqlens(value: object, rows: Tensor, like: str = "q") -> int:
    """Checks packed sequences' bounds (values only on the CPU); returns their number."""
    bounds = tensor("cu_seqlens", value, (torch.int32,), rows.device, like)
    if bounds.dim() != 1 or bounds.numel() < 1:
        raise ValueError(f"cu_seqlens: expected shape [N + 1], got {list(bounds.shape)}")
    if rows.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens: packed sequences need {like} with batch size 1, got {rows.shape[0]}"
        )
    # A traced graph has no values to look at; there and on a GPU the kernels keep to [0, T].
    if bounds.device.type == "cpu" and not torch.compiler.is_compiling():
        values, tokens = bounds.tolist(), rows.shape[1]
        ordered = all(a <= b for a, b in itertools.pairwise(values))
        if values[0] != 0 or values[-1] != tokens or not ordered:
            raise ValueError(
                f"cu_seqlens: expected values that rise from 0 to T = {tokens}, got {values}"
            )
    return bounds.numel() - 1


def number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def chunk_size_of_state(
    of_state: object,
    position: Tensor,
    chunk_size: int,
    state: str = "state",
    name: str = "chunk_size",
) -> None:
    """A carried state fits a call with another chunk size at a boundary of both sizes only.

    `state` and `name` are what the caller calls the state and its own chunk size.
    """
    positive(f"{state}.chunk_size", of_state)
    if of_state == chunk_size:
        return
    # The one case that looks at values on the device; a traced graph has none and refuses.
    traced = torch.compiler.is_compiling()
    if traced or ((position % chunk_size != 0) | (position % of_state != 0)).any():
        raise ValueError(
            f"{name}: expected {of_state}, that of the state, which is inside a chunk"
            f"{' (or may be: traced code cannot tell)' if traced else ''}, got {chunk_size}"
        )
