"""What the self-modifying memory refuses, and in which words."""

from dataclasses import replace

import pytest
import torch

import hope_ext
from hope_ext.testing import selfmod_inputs


def make(**options):
    return selfmod_inputs(torch.float32, "cpu", **options)


def memories(**changes):
    """Changes some of the memories; each is given as it was."""

    def change(weights):
        return replace(weights, **{n: f(getattr(weights, n)) for n, f in changes.items()})

    return change


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [0.0]}, TypeError, r"x: expected a torch.Tensor, got list"),
        ({"x": torch.ones(2, 37, 32)}, ValueError, r"x: expected \[B, T, H, D\], got shape"),
        ({"x": torch.ones(2, 37, 2, 16).int()}, TypeError, r"x: expected dtype float32 or .*int32"),
        (
            {"q": torch.ones(2, 36, 2, 16)},
            ValueError,
            r"q: expected shape \[B, T, H, D\] = \[2, 37, 2, 16\], got \[2, 36, 2, 16\]",
        ),
        (
            {"q": torch.ones(2, 37, 2, 16).half()},
            TypeError,
            "q: expected dtype float32, got float16",
        ),
        ({"memories": ()}, TypeError, "memories: expected a SelfModifyingWeights, got tuple"),
        (
            {"memories": memories(k=lambda m: m[0])},
            TypeError,
            r"memories.k: expected a tuple \(W,\) or \(W1, W2\) of tensors, got Tensor",
        ),
        (
            {"memories": memories(k=lambda m: m * 2)},
            ValueError,
            r"memories.k: expected \(W,\) or \(W1, W2\), .* got a tuple of 4",
        ),
        (
            {"memories": memories(lr=lambda m: m[:1])},
            ValueError,
            r"memories.lr: expected \(W1, W2\), as deep as memories.k, got a tuple of 1",
        ),
        (
            {"memories": memories(lr=lambda m: (m[0], m[1].expand(-1, -1, 16)))},
            ValueError,
            r"memories.lr\[1\]: expected shape \[H, F, 1\] = \[2, 32, 1\], got \[2, 32, 16\]",
        ),
        (
            {"memories": memories(v=lambda m: (m[0][:, 1:], m[1]))},
            ValueError,
            r"memories.v\[0\]: expected shape \[H, D, F\] = \[2, 16, 32\], got \[2, 15, 32\]",
        ),
        (
            {"memories": memories(memory=lambda m: (m[0][..., :0], m[1][:, :0]))},
            ValueError,
            r"memories.memory\[0\]: expected shape \[H, D, F\]",
        ),
        (
            {"memories": memories(retention=lambda m: (m[0].double(), m[1]))},
            TypeError,
            r"memories.retention\[0\]: expected dtype float32, got float64",
        ),
        ({"lr_bias": 0.0}, TypeError, "lr_bias: expected a torch.Tensor, got float"),
        ({"lr_bias": torch.ones(3)}, ValueError, r"lr_bias: expected shape \[H\] = \[2\]"),
        (
            {"retention_bias": torch.ones(2).bfloat16()},
            TypeError,
            "retention_bias: expected dtype float32, got bfloat16",
        ),
        ({"chunk_size": 0}, ValueError, r"chunk_size: expected a positive integer below .* got 0"),
        ({"chunk_size": 2.5}, TypeError, "chunk_size: expected a positive integer, got 2.5"),
        ({"lr_max": "1"}, TypeError, "lr_max: expected a number, got '1'"),
        ({"lr_max": -1}, ValueError, "lr_max: expected a finite number of at least 0, got -1"),
        ({"lr_max": float("nan")}, ValueError, "lr_max: expected a finite number"),
        ({"activation": "relu"}, ValueError, "activation: expected one of 'gelu', 'silu'"),
        ({"objective": "l1"}, ValueError, "objective: expected one of 'l2', 'dot', got 'l1'"),
        ({"read": "during"}, ValueError, "read: expected one of .* got 'during'"),
        ({"state": ()}, TypeError, "state: expected a SelfModifyingState, got tuple"),
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
        hope_ext.self_modifying_memory(**arguments)


def test_refuses_bad_bounds():
    arguments = make(batch=1)
    for bounds in ([0, 20], [1, 37], [0, 30, 20, 37], [-1, 37]):
        bounds = torch.tensor(bounds, dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens: expected values that rise from 0 to T"):
            hope_ext.self_modifying_memory(**arguments, cu_seqlens=bounds)


def test_refuses_states_that_do_not_fit():
    a = make()
    _, state = hope_ext.self_modifying_memory(**a, return_state=True)
    _, linear = hope_ext.self_modifying_memory(**make(hidden=None), return_state=True)
    one_row = {**a, "x": a["x"][:1], "q": a["q"][:1]}
    for arguments, given, error, message in (
        (a, linear, ValueError, "state.weights.k: expected a tuple of 2 tensors, like memories.k"),
        (a, replace(state, anchor=None), TypeError, "state.anchor: expected a SelfModifyingWei"),
        (one_row, state, ValueError, r"state.weights.k\[0\]: expected shape .* = \[1, 2, 16, 32\]"),
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
            hope_ext.self_modifying_memory(**arguments, state=given)
    # A state that does not say its chunk size fits any.
    hope_ext.self_modifying_memory(**{**a, "chunk_size": 8}, state=replace(state, chunk_size=None))
