"""What the continuum memory system refuses, and in which words."""

from dataclasses import replace

import pytest
import torch

import hope_ext
from hope_ext.testing import cms_chain_inputs, cms_inputs


def make(**options):
    return cms_inputs(torch.float32, "cpu", **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [0.0]}, TypeError, r"x: expected a torch.Tensor, got list"),
        ({"x": torch.ones(2, 37)}, ValueError, r"x: expected \[B, T, D\], got shape \[2, 37\]"),
        ({"x": torch.ones(2, 37, 16).int()}, TypeError, r"x: expected dtype float32 or .*int32"),
        (
            {"target": torch.ones(2, 36, 16)},
            ValueError,
            r"target: expected shape \[B, T, D\] = \[2, 37, 16\], got \[2, 36, 16\]",
        ),
        (
            {"target": torch.ones(2, 37, 16).half()},
            TypeError,
            "target: expected dtype float32, got float16",
        ),
        ({"lr": 0.1}, TypeError, "lr: expected a torch.Tensor, got float"),
        ({"lr": torch.ones(2, 37, 1)}, ValueError, r"lr: expected shape \[B, T\] = \[2, 37\]"),
        (
            {"lr": torch.ones(2, 37).bfloat16()},
            TypeError,
            "lr: expected dtype float32, got bfloat16",
        ),
        (
            {"weights": torch.ones(2, 16, 32)},
            TypeError,
            r"weights: expected a tuple \(W1, W2\) of tensors, got Tensor",
        ),
        (
            {"weights": lambda w: w[:1]},
            ValueError,
            r"weights: expected \(W1 \[D, F\], W2 \[F, D\]\), got a tuple of 1",
        ),
        (
            {"weights": lambda w: (w[0][1:], w[1])},
            ValueError,
            r"weights\[0\]: expected shape \[D, F\] = \[16, 32\], got \[15, 32\]",
        ),
        (
            {"weights": lambda w: (w[0], w[1].mT)},
            ValueError,
            r"weights\[1\]: expected shape \[F, D\] = \[32, 16\], got \[16, 32\]",
        ),
        (
            {"weights": lambda w: (w[0][:, :0], w[1][:0])},
            ValueError,
            r"weights\[0\]: expected shape \[D, F\] = \[16, 1\], got \[16, 0\]",
        ),
        (
            {"weights": lambda w: (w[0], w[1].double())},
            TypeError,
            r"weights\[1\]: expected dtype float32, got float64",
        ),
        ({"chunk_size": 0}, ValueError, r"chunk_size: expected a positive integer below .* got 0"),
        ({"chunk_size": 2.5}, TypeError, "chunk_size: expected a positive integer, got 2.5"),
        ({"activation": "relu"}, ValueError, "activation: expected one of 'gelu', 'silu'"),
        ({"objective": "l1"}, ValueError, "objective: expected one of 'l2', 'dot', 'teach', got"),
        ({"decay": "0"}, TypeError, "decay: expected a number, got '0'"),
        ({"decay": -0.1}, ValueError, "decay: expected a number from 0 to 1, got -0.1"),
        ({"decay": float("nan")}, ValueError, "decay: expected a number from 0 to 1, got nan"),
        ({"residual": 1}, TypeError, "residual: expected a bool, got 1"),
        ({"state": ()}, TypeError, "state: expected a CmsState, got tuple"),
        (
            {"cu_seqlens": torch.tensor([0, 37])},
            TypeError,
            "cu_seqlens: expected dtype int32, got int64",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 37], dtype=torch.int32)},
            ValueError,
            "cu_seqlens: packed sequences need x with batch size 1, got 2",
        ),
    ],
)
def test_refuses(changes, error, message):
    arguments = make()
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(error, match=message):
        hope_ext.cms_memory(**arguments)


def test_refuses_bad_bounds():
    arguments = make(batch=1)
    for bounds in ([0, 20], [1, 37], [0, 30, 20, 37], [-1, 37]):
        bounds = torch.tensor(bounds, dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens: expected values that rise from 0 to T"):
            hope_ext.cms_memory(**arguments, cu_seqlens=bounds)


def test_refuses_states_that_do_not_fit():
    a = make()
    _, state = hope_ext.cms_memory(**a, return_state=True)
    one_row = {**a, **{name: a[name][:1] for name in ("x", "lr", "target")}}
    for arguments, given, error, message in (
        (a, replace(state, pending=None), ValueError, "state.pending: expected a tuple of 2 tens"),
        (one_row, state, ValueError, r"state.weights\[0\]: expected shape \[B, D, F\] = \[1, 16, "),
        (
            a,
            replace(state, pending=tuple(p.double() for p in state.pending)),
            TypeError,
            r"state.pending\[0\]: expected dtype float32, got float64",
        ),
        (
            a,
            replace(state, position=state.position.int()),
            TypeError,
            "state.position: expected dtype int64, got int32",
        ),
        (
            {**a, "chunk_size": 8},
            state,
            ValueError,
            "chunk_size: expected 16, that of the state, which is inside a chunk, got 8",
        ),
    ):
        with pytest.raises(error, match=message):
            hope_ext.cms_memory(**arguments, state=given)
    # A state that does not say its chunk size fits any.
    hope_ext.cms_memory(**{**a, "chunk_size": 8}, state=replace(state, chunk_size=None))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"levels": None}, TypeError, "levels: expected a sequence with one entry .* got NoneType"),
        ({"lrs": torch.ones(2, 2, 37)}, TypeError, "lrs: expected a sequence .* got Tensor"),
        ({"levels": []}, ValueError, "levels: expected at least one level, got none"),
        ({"targets": []}, ValueError, "targets: expected 2 entries, like levels, got 0"),
        ({"chunk_sizes": 8}, ValueError, "chunk_sizes: expected 2 entries, like levels, got 8"),
        ({"states": [None]}, ValueError, "states: expected 2 entries, like levels, got 1"),
        (
            {"chunk_sizes": [8, 4]},
            ValueError,
            r"chunk_sizes\[1\]: expected at least 8, that of the level before it, got 4",
        ),
        ({"chunk_sizes": [8, 0]}, ValueError, r"chunk_sizes\[1\]: expected a positive integer"),
        (
            {"lrs": lambda lrs: [lrs[0], lrs[1][:, 1:]]},
            ValueError,
            r"lrs\[1\]: expected shape \[B, T\] = \[2, 37\], got \[2, 36\]",
        ),
        (
            {"targets": lambda targets: [targets[0].half(), targets[1]]},
            TypeError,
            r"targets\[0\]: expected dtype float32, got float16",
        ),
        (
            {"levels": lambda levels: [levels[0], levels[1][::-1]]},
            ValueError,
            r"levels\[1\]\[0\]: expected shape \[D, F\] = \[16, 16\], got \[48, 16\]",
        ),
        ({"states": [None, 1]}, TypeError, r"states\[1\]: expected a CmsState, got int"),
        (
            {"chunk_sizes": [8, 12]},
            ValueError,
            r"chunk_sizes\[1\]: expected 16, that of the state, which is inside a chunk, got 12",
        ),
        ({"objective": "l1"}, ValueError, "objective: expected one of 'l2', 'dot', 'teach'"),
    ],
)
def test_a_chain_refuses(changes, error, message):
    arguments = cms_chain_inputs(torch.float32, "cpu", positions=[3, 8])
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(error, match=message):
        hope_ext.cms_chain(**arguments)
