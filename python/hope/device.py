"""Which device a model runs on."""

import warnings

import torch

import hope_ext
from hope.config import AttentionConfig, ModelConfig
from hope.errors import HopeError

# What hope_ext's CUDA kernels are compiled for: docs/ops.
_HEAD_DIMS, _CMS_WIDTHS = (16, 32, 64, 128), 16


def choose_device(name: str) -> torch.device:
    """The device of that name; `"auto"` is a GPU if there is one that hope_ext has kernels for.

    Raises HopeError for one that cannot be had.
    """
    gpu = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if gpu and hope_ext.has_cuda_kernels() else "cpu"
        if gpu and name == "cpu":
            warnings.warn(
                "torch sees a GPU, but this build of hope_ext has no CUDA kernels (see hope info): "
                "the CPU is used",
                stacklevel=2,
            )
    if name == "cuda" and not gpu:
        raise HopeError("--device cuda: torch sees no GPU here")
    if name == "cuda" and not hope_ext.has_cuda_kernels():
        raise HopeError("--device cuda: this build of hope_ext has no CUDA kernels (see hope info)")
    if name not in ("cpu", "cuda"):
        raise HopeError(f"device must be auto, cpu or cuda, not {name!r}")
    return torch.device(name)


def check_sizes(model: ModelConfig, device: str | torch.device) -> None:
    """HopeError where hope_ext has no kernels for the model's sizes on `device`.

    On the CPU any will do. On CUDA a memory's head_dim is 16, 32, 64 or 128, and the sizes of a CMS
    that updates are multiples of 16.
    """
    if torch.device(device).type != "cuda":
        return
    mixer, cms = model.mixer, model.cms
    if not isinstance(mixer, AttentionConfig) and mixer.head_dim not in _HEAD_DIMS:
        raise HopeError(
            f"model.mixer.head_dim must be 16, 32, 64 or 128 on CUDA, not {mixer.head_dim}"
        )
    if cms is None or not cms.updates:
        return
    if model.dim % _CMS_WIDTHS:
        raise HopeError(
            f"model.dim must be a multiple of {_CMS_WIDTHS} on CUDA where a CMS updates, not "
            f"{model.dim}"
        )
    for width in model.mlp_dims:
        if width % _CMS_WIDTHS:
            step = _CMS_WIDTHS * cms.mlps
            raise HopeError(
                f"model.mlp_ratio must make the MLPs of a CMS that updates multiples of "
                f"{_CMS_WIDTHS} wide on CUDA, not {width}: model.dim * model.mlp_ratio "
                f"({model.mlp_dim}) as a multiple of {step} does"
            )
