"""The operators' CUDA kernels in the emulator: every instance under its detectors (of 16-bit twins
one), with a mistake put into it, and on devices of other sizes.

The laws and the facts of each operator run there too, as the backend "emulated".
"""

from __future__ import annotations

import functools
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backends import device_of
from emulator import build, library
from laws import assert_devices_do_not_show, evaluate
from missing import missing

import hope_ext
from hope_ext import _check
from hope_ext.testing import (
    CASES,
    conv_inputs,
    multifreq_inputs,
    newton_schulz_inputs,
    titans_inputs,
)

INSTANCES = build.HERE / "instances.py"
PYTHONPATH = {"PYTHONPATH": f"{build.ROOT}:{build.HERE.parent}"}
ON_CUDA = [pytest.param(name, id=name) for name in ("emulated", "cuda")]
each_cuda_backend = pytest.mark.parametrize("backend", ON_CUDA, indirect=True)


def available(variant: str) -> str:
    try:
        build.require(variant)
    except build.Unavailable as reason:
        missing(reason)
    return variant


def python(variant: str, *command: object):
    """Minutes, under a sanitizer; the limit is only for what hangs."""
    return build.run(
        [sys.executable, *command], variant, preload=True, extra=PYTHONPATH, timeout=1800
    )


# ---- every instance ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bounds(emulator, tmp_path_factory) -> Callable[[str], Path]:
    """What the definitions give for the instances that a regular expression matches."""
    folder = tmp_path_factory.mktemp("bounds")

    @functools.cache
    def of(match: str) -> Path:
        file = folder / f"{len(list(folder.iterdir()))}.pt"
        which = ("--bounds", file, "--match", match)
        run = python("plain", INSTANCES, library.make(), *which, "--seeds")
        assert run.returncode == 0, run.stdout
        return file

    return of


@pytest.mark.parametrize(
    ("variant", "dtype", "seeds"),
    [
        (variant, dtype, [seed])
        for seed, variant in enumerate(("races", "address", "plain"), 1)
        for dtype in ("float32", "bfloat16")
    ]
    + [("plain", "float16", [1, 2, 3])],  # the lines of bfloat16, see library.make
)
def test_instances(bounds, variant, dtype, seeds):
    """As exact as torch under any of three schedules, and no detector objects."""
    made = library.make(available(variant))
    match = rf"\b{dtype}$"
    which = ("--bounds", bounds(match), "--seeds", *seeds, "--match", match)
    if variant != "plain":  # there, exactness has been looked at more closely
        which += ("--draws", 1)
    run = python(variant, INSTANCES, made, *which)
    assert run.returncode == 0, run.stdout


def test_kernels_compile_without_warnings(emulator):
    for kernel in library.kernels():
        assert build.warnings(kernel, **library.options()) == "", kernel


# ---- mistakes ------------------------------------------------------------------------------------

PIPELINE, FORWARD = "titans_pipeline.cuh", "titans_linear_fwd_cuda.cu"
# (variant, a line of the forward kernel, what becomes of it, parts of the report)
MISTAKES = {
    "no-barrier": (
        "races",
        r"named_barrier_sync\(kHelpersOnly, kHelpers\);  // A is complete",
        "",
        ["ThreadSanitizer: data race", r"pair_at\(shared_\.coefficients"],
    ),
    "no-wait": (
        "plain",
        r"wait_for_copies<[^>]*>\(ahead\);",
        "",
        ["without waiting for an asynchronous copy", r"cp_async_16\("],
    ),
    "overrun": (
        "address",
        r"(const float lr = gates\.lr;)",
        r"\1 if (helper_ == 0) shared_.gates[2 * kRows] = float2{};  // overrun",
        ["AddressSanitizer: use-after-poison", "// overrun"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_titans_kernel_is_found(bounds, tmp_path, mistake):
    """The report names its line; of a missing barrier, the line that should have waited."""
    variant, pattern, replacement, (message, line) = MISTAKES[mistake]
    csrc = tmp_path / "csrc"
    shutil.copytree(build.ROOT / "csrc", csrc)
    source = csrc / "titans" / PIPELINE
    broken, count = re.subn(pattern, replacement, source.read_text())
    assert count == 1, f"{PIPELINE} has changed: {pattern}"
    source.write_text(broken)
    launch = csrc / "titans/titans_launch.cuh"  # without the instances that nobody runs here
    others = r"case (?:16|64|128):\s*return body\(\w+, Constant<\w+>\(\)\);"
    fewer, count = re.subn(others, "", launch.read_text())
    assert count == 3, f"{launch.name} has changed: {others}"
    launch.write_text(fewer)
    instead = {build.ROOT / "csrc/titans" / FORWARD: csrc / "titans" / FORWARD}
    made = library.make(available(variant), instead=instead, csrc=csrc)
    match = "chunks-32x16-bfloat16"
    run = python(variant, INSTANCES, made, "--bounds", bounds(match), "--match", match)
    assert run.returncode != 0, "not noticed"
    assert message in run.stdout, run.stdout
    numbers = [n for n, text in enumerate(broken.splitlines(), 1) if re.search(line, text)]
    assert any(f"{source}:{n}" in run.stdout for n in numbers), f"{numbers}\n{run.stdout}"


# ---- the device ----------------------------------------------------------------------------------

DEVICES = {
    "in-order": {"EMULATOR_SEED": "0"},
    "shuffled": {"EMULATOR_SEED": "7"},
    "threads": {"EMULATOR_THREADS": "2"},
    "one-multiprocessor": {"EMULATOR_MULTIPROCESSORS": "1"},
    "many-multiprocessors": {"EMULATOR_MULTIPROCESSORS": "1000"},
    "little-shared-memory": {"EMULATOR_SHARED_BYTES": str(99 << 10)},
    "no-cache": {"EMULATOR_L2_BYTES": "1"},
    "large-cache": {"EMULATOR_L2_BYTES": str(1 << 30)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case.name in ("stretches", "stretches-packed", "packed-long-chunks", "blocks")
        and case.stem != "cms"  # test_cms_cuda.py
        and case.runs_on("emulated")
    ],
    ids=str,
)
def test_the_device_does_not_show_in_the_bits(emulated, monkeypatch, case, dtype):
    """Neither the order of threads nor how a device's size divides the work."""
    devices = DEVICES.values()
    assert_devices_do_not_show(case, case.make(dtype, "cpu"), devices, monkeypatch)


# ---- what CUDA's kernels do otherwise than the CPU's ---------------------------------------------


@each_cuda_backend
@pytest.mark.parametrize(("argument", "sizes"), [("q", {"key": 48}), ("v", {"value": 8})])
def test_sizes_without_a_kernel_are_refused(backend, argument, sizes):
    message = (
        rf"{argument}: expected a head size of 16, 32, 64 or 128 on CUDA, got {sum(sizes.values())}"
    )
    with pytest.raises(ValueError, match=message):
        hope_ext.titans_memory(**titans_inputs(torch.float32, device_of(backend), **sizes))


@each_cuda_backend
def test_float64_is_refused(backend):
    with pytest.raises(TypeError, match="q: expected float32, bfloat16 or float16 on CUDA"):
        hope_ext.titans_memory(**titans_inputs(torch.float64, device_of(backend)))
    with pytest.raises(TypeError, match="x: float64 is for the CPU"):
        hope_ext.causal_conv(**conv_inputs(torch.float64, device_of(backend)))
    with pytest.raises(TypeError, match="g: float64 is for the CPU"):
        hope_ext.newton_schulz(**newton_schulz_inputs(torch.float64, device_of(backend)))
    with pytest.raises(TypeError, match="params: float64 is for the CPU"):
        hope_ext.multi_frequency_step_(**multifreq_inputs(torch.float64, device_of(backend)))


@pytest.fixture
def unchecked_bounds(monkeypatch):
    """Nobody looks at the values of cu_seqlens, as if they were on a GPU."""
    monkeypatch.setattr(_check, "cu_seqlens", lambda bounds, rows, like="q": len(bounds) - 1)


PACKED = {
    case.stem: case
    for case in CASES
    if str(case) in ("conv-packed", "titans-packed-long-chunks", "selfmod-packed", "cms-packed")
}


@each_cuda_backend
@pytest.mark.parametrize("case", PACKED.values(), ids=str)
def test_bounds_are_clamped(backend, unchecked_bounds, case):
    arguments = case.make(torch.float32, device_of(backend))
    expected = evaluate(case, arguments, backend)
    for first, last in ((-7, 1000), (-(2**31), 2**31 - 1)):
        bounds = arguments["cu_seqlens"].clone()
        bounds[0], bounds[-1] = first, last
        results = evaluate(case, {**arguments, "cu_seqlens": bounds}, backend)
        for (name, a), (_, b) in zip(results, expected, strict=True):
            assert torch.equal(a, b), name


def test_nonsense_touches_no_other_memory(emulator):
    made = library.make(available("address"))
    run = python("address", build.HERE / "nonsense.py", made)
    assert run.stdout.endswith("all done\n"), run.stdout


# ---- memories of two layers, or with a norm ------------------------------------------------------

HEADS_AND_HIDDEN = [(dim, ratio * dim) for dim in (16, 32, 64, 128) for ratio in (1, 2, 4)]
DEVICES_BY_ROOM = {"8.0": 163 << 10, "8.6": 99 << 10, "9.0": 227 << 10}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES_BY_ROOM)
def test_hidden_sizes_that_run(emulated, monkeypatch, device, dtype):
    """All of docs/ops/titans.md; what does not, says what would."""
    monkeypatch.setenv("EMULATOR_SHARED_BYTES", str(DEVICES_BY_ROOM[device]))
    for dim, hidden in HEADS_AND_HIDDEN:
        sizes = {"batch": 1, "heads": 1, "tokens": 2, "key": dim, "value": dim, "hidden": hidden}
        arguments = titans_inputs(dtype, "cpu", **sizes)
        arguments["q"].requires_grad_()
        with hope_ext.testing.backend("emulated"):
            out = hope_ext.titans_memory(**arguments)
            if (device, dim, hidden, dtype) == ("8.6", 128, 512, torch.bfloat16):
                message = r"a hidden size of 512 needs more shared memory .* expected at most \d+"
                with pytest.raises(ValueError, match=message):
                    out.sum().backward()
            else:
                out.sum().backward()


def test_the_hidden_size_is_a_multiple_of_16(emulated):
    arguments = titans_inputs(torch.float32, "cpu", hidden=24)
    with (
        hope_ext.testing.backend("emulated"),
        pytest.raises(ValueError, match="hidden size that is a multiple of 16 on CUDA, got 24"),
    ):
        hope_ext.titans_memory(**arguments)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("deep-carried", "norm")], ids=str)
def test_no_schedule_shows_in_the_bits_of_a_network(emulated, monkeypatch, case):
    devices = ({"EMULATOR_SEED": "0"}, {"EMULATOR_SEED": "7"}, {"EMULATOR_THREADS": "2"})
    assert_devices_do_not_show(case, case.make(torch.bfloat16, "cpu"), devices, monkeypatch)
