"""What the CUDA kernels of HOPE's self-modifying memory do otherwise than the CPU's.

Their laws and facts are those of every backend; every instance runs in tests/test_emulated.py.
"""

import pytest
import torch
from backends import device_of
from laws import assert_devices_do_not_show
from test_emulated import DEVICES_BY_ROOM, each_cuda_backend

import hope_ext
from hope_ext import testing
from hope_ext.testing import CASES, selfmod_inputs


@each_cuda_backend
def test_sizes_without_a_kernel_are_refused(backend):
    for sizes, message in (
        ({"dim": 48}, "x: expected a head size of 16, 32, 64 or 128 on CUDA, got 48"),
        ({"hidden": 24}, "memories: expected hidden sizes that are multiples of 16 .* got 24"),
    ):
        with pytest.raises(ValueError, match=message):
            hope_ext.self_modifying_memory(
                **selfmod_inputs(torch.float32, device_of(backend), **sizes)
            )
    with pytest.raises(TypeError, match="x: expected float32, bfloat16 or float16 on CUDA"):
        hope_ext.self_modifying_memory(**selfmod_inputs(torch.float64, device_of(backend)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES_BY_ROOM)
@pytest.mark.parametrize("dim", [16, 32, 64, 128])
def test_sizes_that_run(emulated, monkeypatch, dim, device, dtype):
    """All of docs/ops/selfmod.md, in training; what does not, says what would."""
    monkeypatch.setenv("EMULATOR_SHARED_BYTES", str(DEVICES_BY_ROOM[device]))
    for hidden in (None, dim, 2 * dim):
        sizes = {"batch": 1, "heads": 1, "tokens": 2, "dim": dim, "hidden": hidden}
        arguments = selfmod_inputs(dtype, "cpu", **sizes)
        arguments["q"].requires_grad_()
        with testing.backend("emulated"):
            out = hope_ext.self_modifying_memory(**arguments)
            if (device, dim, hidden, dtype) != ("8.6", 128, 256, torch.bfloat16):
                out.sum().backward()
                continue
            message = rf"a hidden size of {hidden} needs more shared memory .* expected at most \d+"
            with pytest.raises(ValueError, match=message):
                out.sum().backward()


NAMES = ("deep-l2-before", "linear-l2-before", "carried-in-a-long-chunk")


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.stem == "selfmod" and c.name in NAMES], ids=str
)
def test_neither_schedules_nor_memory_show_in_the_bits(emulated, monkeypatch, case):
    """What lies in scratch memory is the same there; the number of tokens at a time is not."""
    devices = (
        {"EMULATOR_SEED": "0"},
        {"EMULATOR_SEED": "7"},
        {"EMULATOR_THREADS": "2"},
        {"EMULATOR_SHARED_BYTES": str(99 << 10)},
    )
    assert_devices_do_not_show(case, case.make(torch.bfloat16, "cpu"), devices, monkeypatch)
