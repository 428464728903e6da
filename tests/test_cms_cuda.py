"""What the CUDA kernels of the continuum memory system do otherwise than the CPU's.

Their laws are those of every backend; every instance runs in tests/test_emulated.py.
"""

import pytest
import torch
from backends import device_of
from laws import assert_devices_do_not_show, float_leaves
from test_emulated import each_cuda_backend

import hope_ext
from hope_ext import testing
from hope_ext.testing import CASES, cms_chain_inputs, cms_inputs


@each_cuda_backend
def test_sizes_without_a_kernel_are_refused(backend):
    device = device_of(backend)
    for sizes, message in (
        ({"dim": 24}, "x: expected a size D that is a multiple of 16 on CUDA, got 24"),
        (
            {"hidden": 40},
            "weights: expected a hidden size that is a multiple of 16 on CUDA, got 40",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            hope_ext.cms_memory(**cms_inputs(torch.float32, device, **sizes))
    with pytest.raises(TypeError, match="x: expected float32, bfloat16 or float16 on CUDA"):
        hope_ext.cms_memory(**cms_inputs(torch.float64, device))


@each_cuda_backend
def test_a_chain_refuses_before_its_first_level_runs(backend, monkeypatch):
    arguments = cms_chain_inputs(torch.float32, device_of(backend), hidden=(32, 40))
    monkeypatch.setattr("hope_ext.cms._Level.run", lambda *_: pytest.fail("a level has run"))
    message = r"levels\[1\]: expected a hidden size that is a multiple of 16 on CUDA, got 40"
    with pytest.raises(ValueError, match=message):
        hope_ext.cms_chain(**arguments)


def test_definitions_take_any_size_anywhere():
    with testing.backend("reference"):
        out = hope_ext.cms_memory(**cms_inputs(torch.float64, "cpu", dim=5, hidden=7))
    assert out.shape == (2, 37, 5)


@each_cuda_backend
def test_the_operator_itself_refuses_sizes_too(backend):
    """It is what keeps a caller of torch.ops within the tensors."""
    a = cms_inputs(torch.float32, device_of(backend), hidden=40)
    weights = [w.expand(2, -1, -1) for w in a["weights"]]
    tensors = (a["x"], a["target"], a["lr"], *weights, None, None, None, None)
    operators = torch.ops.hope_emulated if backend == "emulated" else torch.ops.hope
    with pytest.raises(ValueError, match="weights: expected a hidden size that is a multiple of"):
        operators.cms(*tensors, 16, "gelu", "l2", 0.0, True, True, 0)


NAMES = ("blocks", "packed-carried", "groups", "carried-in-a-long-chunk")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.stem == "cms" and c.name in NAMES], ids=str)
def test_the_device_does_not_show_in_the_bits(emulated, monkeypatch, case, dtype):
    """Neither the order of threads nor the size of tiles, which is chosen by multiprocessors."""
    devices = (
        {"EMULATOR_SEED": "0"},
        {"EMULATOR_SEED": "7"},
        {"EMULATOR_THREADS": "2"},
        {"EMULATOR_MULTIPROCESSORS": "1"},
        {"EMULATOR_MULTIPROCESSORS": "1000"},
    )
    assert_devices_do_not_show(case, case.make(dtype, "cpu"), devices, monkeypatch)


STATELESS = ("cms-whole-chunks", "cms-groups", "cms-packed-carried", "cms-within-a-chunk")


@each_cuda_backend
def test_a_sequences_result_does_not_depend_on_its_neighbours(backend):
    """Bit for bit, though products go over all of them at once and rows of scratch memory are dealt
    out by sequence, or by token."""
    a = cms_inputs(
        torch.bfloat16, device_of(backend), batch=1, tokens=50, bounds=[0, 7, 39, 50],
        positions=[3, 16, 31],
    )  # fmt: skip
    out, state = hope_ext.cms_memory(**a, return_state=True)
    alone = {
        **a,
        **{name: a[name][:, 7:39] for name in ("x", "lr", "target")},
        "cu_seqlens": None,
        "state": hope_ext.CmsState(
            weights=tuple(w[1:2] for w in a["state"].weights),
            pending=tuple(p[1:2] for p in a["state"].pending),
            position=a["state"].position[1:2],
        ),
    }
    out_alone, state_alone = hope_ext.cms_memory(**alone, return_state=True)
    assert torch.equal(out[:, 7:39], out_alone)
    for packed, single in zip(
        (*state.weights, *state.pending), (*state_alone.weights, *state_alone.pending), strict=True
    ):
        assert torch.equal(packed[1], single[0])


@each_cuda_backend
@pytest.mark.parametrize("case", [c for c in CASES if str(c) in STATELESS], ids=str)
def test_outputs_do_not_depend_on_who_wants_the_state(backend, case):
    """Without it a last chunk is not learned, and the weights on the way are in other memory."""
    arguments = case.make(torch.bfloat16, device_of(backend))
    leaves = [x.requires_grad_() for x in float_leaves(arguments)]
    results = []
    for return_state in (True, False):
        out = hope_ext.cms_memory(**arguments, return_state=return_state)
        out = out[0] if return_state else out
        gradients = torch.autograd.grad(out.float().square().sum(), leaves, allow_unused=True)
        results.append([out.detach(), *gradients])
    for with_state, without in zip(*results, strict=True):
        assert (with_state is None) == (without is None)
        assert with_state is None or torch.equal(with_state, without)


@each_cuda_backend
def test_nan_stays_in_its_sequence(backend):
    a = cms_inputs(torch.float32, device_of(backend), batch=3)
    clean = hope_ext.cms_memory(**a)
    a["x"] = a["x"].clone()
    a["x"][1, 5] = torch.nan
    out, state = hope_ext.cms_memory(**a, return_state=True)
    assert torch.equal(out[::2], clean[::2])
    assert out[1, 16:].isnan().all(), "the second chunk's weights have learned from the first"
    for matrix in (*state.weights, *state.pending):
        assert torch.isfinite(matrix[::2]).all()
