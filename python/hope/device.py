"""Which device a model runs on."""

import torch

import hope_ext
from hope.errors import HopeError


def choose_device(name: str) -> torch.device:
    """The device of that name; `"auto"` is a GPU if there is one that hope_ext has kernels for.

    Raises HopeError for one that cannot be had.
    """
    gpu = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if gpu and hope_ext.has_cuda_kernels() else "cpu"
    if name == "cuda" and not gpu:
        raise HopeError("--device cuda: torch sees no GPU here")
    if name == "cuda" and not hope_ext.has_cuda_kernels():
        raise HopeError("--device cuda: this build of hope_ext has no CUDA kernels (see hope info)")
    if name not in ("cpu", "cuda"):
        raise HopeError(f"device must be auto, cpu or cuda, not {name!r}")
    return torch.device(name)
