"""The cases that tests and benchmarks iterate: for every operator its inputs, odd shapes included,
and its costs.

A `Case` makes the keyword arguments of a public function; each operator's are in a module of its
own. `backend` chooses what runs behind that function:

    reference   the definition in plain PyTorch (hope_ext.reference), on whatever device and dtype
                the inputs have
    rounded     its chunked form, with the operands of every product rounded to a 16-bit dtype: what
                a kernel of that dtype may err by
    cpu, cuda   the kernels for the device that the inputs are on
    emulated    the CUDA kernels on CPU tensors, in a library that tests/emulator builds and
                `use_emulated` loads: the same host code and the same .cu files, compiled by a C++
                compiler
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from hope_ext import _load
from hope_ext._flops import (
    cms_flops,
    conv_flops,
    newton_schulz_flops,
    selfmod_flops,
    titans_flops,
)
from hope_ext.reference import cms as cms_reference
from hope_ext.reference import newton_schulz as newton_schulz_reference
from hope_ext.reference import selfmod as selfmod_reference
from hope_ext.reference import titans as titans_reference
from hope_ext.testing import cms, conv, multifreq, newton_schulz, selfmod, titans
from hope_ext.testing.case import Case
from hope_ext.testing.cms import cms_chain_inputs, cms_inputs
from hope_ext.testing.conv import conv_inputs
from hope_ext.testing.multifreq import multifreq_inputs
from hope_ext.testing.newton_schulz import newton_schulz_inputs
from hope_ext.testing.selfmod import selfmod_inputs
from hope_ext.testing.titans import CUDA_HEAD_SIZES, titans_inputs

__all__ = [
    "BACKENDS",
    "CASES",
    "CUDA_HEAD_SIZES",
    "Case",
    "backend",
    "cms_chain_inputs",
    "cms_flops",
    "cms_inputs",
    "conv_flops",
    "conv_inputs",
    "multifreq_inputs",
    "newton_schulz_flops",
    "newton_schulz_inputs",
    "selfmod_flops",
    "selfmod_inputs",
    "titans_flops",
    "titans_inputs",
    "use_emulated",
]

CASES: tuple[Case, ...] = (
    *conv.CASES,
    *titans.CASES,
    *selfmod.CASES,
    *cms.CASES,
    *newton_schulz.CASES,
    *multifreq.CASES,
)

BACKENDS = ("reference", "rounded", "cpu", "cuda", "emulated")
_EMULATED = "hope_emulated"  # csrc/common/library.h


def use_emulated(library: Path | str) -> None:
    """Loads the library that `backend("emulated")` runs; once in a process."""
    _load.load_library(_EMULATED, library)


@contextlib.contextmanager
def backend(name: str, product_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Public functions run on this backend inside the block."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    with contextlib.ExitStack() as stack:
        if name in ("reference", "rounded"):
            stack.enter_context(_load.forced(_load.REFERENCE))
        if name == "emulated":
            stack.enter_context(_load.forced(_EMULATED))
        if name == "rounded":
            for module, operator, chunked in (
                (titans_reference, "titans", titans_reference.titans_network_chunked),
                (selfmod_reference, "selfmod", selfmod_reference.selfmod_chunked),
                (cms_reference, "cms", cms_reference.cms),
                (
                    newton_schulz_reference,
                    "newton_schulz",
                    newton_schulz_reference.newton_schulz,
                ),
            ):
                rounded = functools.partial(chunked, product_dtype=product_dtype)
                stack.callback(setattr, module, operator, getattr(module, operator))
                setattr(module, operator, rounded)
        yield
