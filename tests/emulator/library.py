"""The project's CUDA operators in the emulator, as a library that torch loads.

It has the schemas and the host code of the extension, and the CUDA kernels behind them, as
``torch.ops.hope_emulated`` on CPU tensors. ``hope_ext.testing.use_emulated`` loads it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import build_config
from emulator import build

LIBRARIES = ("c10", "torch_cpu")


def options() -> dict[str, list[str]]:
    """How its sources are compiled."""
    defines = ["HOPE_EMULATED", "HOPE_WITH_CUDA"]
    return {"defines": defines, "flags": [build_config.cxx_standard(torch)]}


def kernels() -> list[Path]:
    """The CUDA sources of every operator."""
    sources = [build.ROOT / source for source in build_config.cuda_sources()]
    return [source for source in sources if source.parent.name != "selftest"]


def _is_float16(source: Path) -> bool:
    return "_fp16_" in source.name


def make(
    variant: str = "plain",
    *,
    instead: Mapping[Path, Path] | None = None,
    csrc: Path = build.ROOT / "csrc",
    link: Iterable[str] = (),
) -> Path:
    """Builds the library.

    Args:
        variant: of the kernels, see ``build``. Sanitizers do not look at the host code, nor at the
            kernels for float16 in sources of their own: those for bfloat16 are the same lines.
        instead: other files for some of ``kernels()``, sources or what ``build.compile_object``
            made of them. What headers define comes from these.
        csrc: where they find the project's headers.
        link: further arguments for the linker.

    Raises:
        build.Unavailable, build.CompileError
    """
    compiled = functools.partial(build.compile_object, **options())
    include, libraries = build_config.torch_dirs(torch)
    host = [build.ROOT / source for source in build_config.host_sources()]
    instead = instead or {}
    others = [source for source in kernels() if source not in instead]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # The linker keeps the first of equal inline functions.
        sources = [other for other in instead.values() if other.suffix != ".o"]
        tasks = [pool.submit(compiled, source, variant, csrc=csrc) for source in sources]
        tasks += [pool.submit(compiled, source, include=include) for source in host]
        tasks += [pool.submit(compiled, s, variant) for s in others if not _is_float16(s)]
        # Last, so that what they share with the others comes from those.
        tasks += [pool.submit(compiled, source) for source in others if _is_float16(source)]
        objects = [other for other in instead.values() if other.suffix == ".o"]
        objects += [task.result() for task in tasks]
    link = [f"-L{libraries}", *(f"-l{library}" for library in LIBRARIES), *link]
    return build.build(objects, variant, shared=True, link=link)
