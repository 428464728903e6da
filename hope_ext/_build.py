"""How the extension was built, and what the compiler made of its CUDA kernels."""

from __future__ import annotations

from importlib import metadata

import torch

from hope_ext import _load

WARP = 32
WARPS_GRANTED = (
    4  # warps are given to a block in groups of four, registers to a warp in units of 256
)
REGISTERS_GRANTED = 256
SHARED_RESERVED = 1024  # bytes of every block that the system keeps


def build_info() -> dict[str, object]:
    """The facts of the build.

    Returns:
        A dict with the keys version, torch (that it was built against), cuda (nvcc's version, None
        for a CPU-only build), architectures (a list such as ["8.0+PTX", "9.0"]), compiler,
        revision (the git commit, None if unknown) and flags (a dict: "c++" and, with CUDA, "nvcc").
        With HOPE_REFERENCE=1 there is no extension: compiler, revision and flags are None too.
    """
    if _load.extension is None:
        return {
            "version": metadata.version("hope_ext"),
            "torch": torch.__version__,
            "cuda": None,
            "architectures": [],
            "compiler": None,
            "revision": None,
            "flags": None,
        }
    facts = _load.extension.build_facts()
    flags = {"c++": facts["cxx_flags"]}
    if facts["cuda"]:
        flags["nvcc"] = facts["nvcc_flags"]
    return {
        "version": facts["version"],
        "torch": facts["torch"],
        "cuda": facts["cuda"] or None,
        "architectures": facts["architectures"].split(";") if facts["architectures"] else [],
        "compiler": facts["compiler"],
        "revision": facts["revision"] or None,
        "flags": flags,
    }


def kernel_report() -> list[dict[str, object]]:
    """One row per CUDA kernel instance and architecture; [] for a build without CUDA.

    The compiler's own report, kept with the build, so no GPU is needed.

    Returns:
        Dicts with the keys name, architecture ("9.0a"), registers (per thread), shared_bytes
        (static: what a launch asks for is not known to the compiler), spill_bytes (written and
        read), threads (the block that its launch bounds allow), source, compile_seconds (of the
        whole source file) and, where a GPU is present, occupancy: the part of a multiprocessor's
        warps that registers, threads and static shared memory allow to be resident, or None in the
        rows of an architecture that this GPU does not run.
    """
    if _load.extension is None:
        return []
    rows = [
        {key: value for key, value in kernel.items() if key != "symbol"}
        for kernel in _load.build_report()["kernels"]
    ]
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        for row in rows:
            runs = _runs(row["architecture"], (gpu.major, gpu.minor))
            row["occupancy"] = _occupancy(row, gpu) if runs else None
    return rows


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code of an architecture runs on a GPU: the same major version, and not a later minor.

    Code of an architecture with a letter runs on exactly that capability."""
    major, minor = (int(part.rstrip("af")) for part in architecture.split("."))
    if architecture[-1].isalpha():
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]


def _occupancy(row: dict, gpu) -> float:
    """Resident warps over the multiprocessor's limit, by CUDA's occupancy rules."""
    warps = -(-row["threads"] // WARP)
    registers = -(-row["registers"] * WARP // REGISTERS_GRANTED) * REGISTERS_GRANTED
    by_registers = (
        gpu.regs_per_multiprocessor // registers // WARPS_GRANTED * WARPS_GRANTED // warps
    )
    most = gpu.max_threads_per_multi_processor // WARP
    shared = row["shared_bytes"] + SHARED_RESERVED
    by_shared = gpu.shared_memory_per_multiprocessor // shared
    return min(by_registers, most // warps, by_shared) * warps / most
