"""Facts of the Titans memory: carried states, packed sequences, special cases, torch, refusals."""

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import all_close, close, device_of, each_backend, finest
from torch.utils import _pytree

import hope_ext
from hope_ext import testing
from hope_ext.testing import titans_inputs

TOKENS = ("q", "k", "v", "lr", "momentum", "decay")


def make(backend="cpu", dtype=None, **options):
    return titans_inputs(dtype or finest(backend), device_of(backend), **options)


def make_float32(**options):
    return make(dtype=torch.float32, **options)


def tokens(arguments, where):
    """The same call on a slice of the tokens."""
    return {
        name: x[:, where] if name in TOKENS and x is not None else x
        for name, x in arguments.items()
    }


# ---- carried states and packed sequences --------------------------------------------------------


@each_backend
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("read", ["after", "before", "chunk"])
@pytest.mark.parametrize("cuts", [[16], [1, 2, 5, 31, 32, 33], list(range(1, 37)), [0, 37]])
def test_split_anywhere(backend, momentum, read, cuts):
    arguments = make(backend, momentum=momentum, read=read, positions=[5, 16])
    whole, final = hope_ext.titans_memory(**arguments, return_state=True)
    state, pieces = arguments.pop("state"), []
    for begin, end in zip([0, *cuts], [*cuts, 37], strict=True):
        piece, state = hope_ext.titans_memory(
            **tokens(arguments, slice(begin, end)), state=state, return_state=True
        )
        pieces.append(piece)
    close(torch.cat(pieces, 1), whole)
    all_close(state, final)
    assert state.position.tolist() == [5 + 37, 16 + 37]


@each_backend
def test_gradients_flow_through_a_carried_state(backend):
    arguments = make(backend)
    names = [n for n in TOKENS if arguments[n] is not None]
    inputs = [arguments[n].requires_grad_() for n in names] + [
        arguments["weights"][0].requires_grad_()
    ]
    whole = hope_ext.titans_memory(**arguments)
    expected = torch.autograd.grad(whole.square().sum(), inputs)
    first, state = hope_ext.titans_memory(**tokens(arguments, slice(0, 21)), return_state=True)
    second = hope_ext.titans_memory(**tokens(arguments, slice(21, None)), state=state)
    for a, b in zip(
        torch.autograd.grad(first.square().sum() + second.square().sum(), inputs),
        expected,
        strict=True,
    ):
        close(a, b)


def test_detached_state_truncates_the_gradient():
    arguments = make()
    arguments["weights"][0].requires_grad_()
    _, state = hope_ext.titans_memory(**arguments, return_state=True)
    assert state.weights[0].requires_grad
    detached = state.detach()
    assert not any(
        x.requires_grad for x in _pytree.tree_leaves(detached) if isinstance(x, torch.Tensor)
    )
    all_close(detached, state.to("cpu"))


@each_backend
def test_packed_sequences_are_each_alone(backend):
    arguments = make(
        backend, batch=1, tokens=50, bounds=[0, 7, 7, 39, 40, 50], positions=[3, 5, 16, 31, 0]
    )
    out, final = hope_ext.titans_memory(**arguments, return_state=True)
    bounds, state = arguments.pop("cu_seqlens").tolist(), arguments.pop("state")
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        row = _pytree.tree_map(lambda x, i=i: x[i : i + 1], state)
        alone, alone_state = hope_ext.titans_memory(
            **tokens(arguments, slice(begin, end)), state=row, return_state=True
        )
        close(out[:, begin:end], alone)
        all_close(_pytree.tree_map(lambda x, i=i: x[i : i + 1], final), alone_state)


@each_backend
def test_anchor_equals_weights_at_a_chunk_boundary(backend):
    _, state = hope_ext.titans_memory(**make(backend, tokens=32), return_state=True)
    assert torch.equal(state.anchor[0], state.weights[0])
    _, state = hope_ext.titans_memory(**make(backend, tokens=33), return_state=True)
    assert not torch.equal(state.anchor[0], state.weights[0])


def test_another_chunk_size_is_fine_at_a_boundary_of_both():
    arguments = make(tokens=32, chunk_size=16)
    _, state = hope_ext.titans_memory(**arguments, return_state=True)
    again, _ = hope_ext.titans_memory(
        **{**arguments, "chunk_size": 32, "state": state}, return_state=True
    )
    fresh = {**arguments, "chunk_size": 32, "weights": (state.weights[0][0],)}
    with_momenta = hope_ext.titans_memory(**{**fresh, "state": None})
    assert again.shape == with_momenta.shape
    with pytest.raises(ValueError, match=r"chunk_size: expected 16, that of the state.*got 64"):
        hope_ext.titans_memory(**{**arguments, "chunk_size": 64, "state": state})


# ---- special cases ------------------------------------------------------------------------------


@each_backend
def test_delta_rule(backend):
    """chunk_size 1, no gates: DeltaNet's S_t = S_{t-1} - lr_t k_t^T (k_t S_{t-1} - v_t)."""
    a = make(backend, chunk_size=1, momentum=False, decay=False)
    w = a["weights"][0].expand(2, -1, -1, -1)
    expected = []
    for t in range(37):
        k, v = a["k"][:, t, :, None], a["v"][:, t, :, None]
        w = w - a["lr"][:, t, :, None, None] * k.mT @ (k @ w - v)
        expected.append((a["q"][:, t, :, None] @ w)[:, :, 0])
    close(hope_ext.titans_memory(**a), torch.stack(expected, 1))


@each_backend
@pytest.mark.parametrize("chunk_size", [1, 16, 64])
def test_gated_linear_attention(backend, chunk_size):
    """dot, no momentum: W_t = (1 - decay_t) W_{t-1} + lr_t k_t^T v_t, whatever the chunk size."""
    a = make(backend, chunk_size=chunk_size, momentum=False, objective="dot")
    keep = (1 - a["decay"]).log().cumsum(1)  # [B, T, H]
    ratio = (keep[:, :, None] - keep[:, None]).exp() * a["lr"][:, None]  # [B, t, s, H]
    causal = a["lr"].new_ones(37, 37).tril()
    scores = torch.einsum("bthd,bshd->btsh", a["q"], a["k"]) * ratio * causal[None, :, :, None]
    start = torch.einsum("bthk,hkv->bthv", a["q"], a["weights"][0]) * keep.exp()[..., None]
    close(hope_ext.titans_memory(**a), start + torch.einsum("btsh,bshv->bthv", scores, a["v"]))


@each_backend
def test_ttt_linear_dual_form(backend):
    """No momentum, no decay: TTT's dual form (arXiv 2407.04620, section 2.5) for the linear model
    without its norm.

    With G_t = lr_t (k_t W_0 - v_t) per chunk: O = Q W_0 - tril(Q K^T) G and W_0 <- W_0 - K^T G.
    """
    a = make(backend, tokens=48, momentum=False, decay=False)
    w, expected = a["weights"][0].expand(2, -1, -1, -1), []
    for begin in range(0, 48, 16):
        q, k, v = (a[n][:, begin : begin + 16].transpose(1, 2) for n in ("q", "k", "v"))
        g = a["lr"][:, begin : begin + 16].transpose(1, 2)[..., None] * (k @ w - v)
        expected.append(q @ w - (q @ k.mT).tril() @ g)
        w = w - k.mT @ g
    out, state = hope_ext.titans_memory(**a, return_state=True)
    close(out, torch.cat(expected, 2).transpose(1, 2))
    close(state.weights[0], w)


@each_backend
def test_gates_at_their_ends(backend):
    """momentum 0 is no momentum, decay 0 no decay; decay 1 forgets all but the token's own step."""
    a = make(backend)
    zero = torch.zeros_like(a["lr"])
    close(
        hope_ext.titans_memory(**{**a, "momentum": zero, "decay": zero}),
        hope_ext.titans_memory(**{**a, "momentum": None, "decay": None}),
    )
    a = make(backend, momentum=False, chunk_size=1, objective="dot")
    out = hope_ext.titans_memory(**{**a, "decay": torch.ones_like(zero)})
    close(out, (a["lr"] * (a["q"] * a["k"]).sum(-1))[..., None] * a["v"])


@each_backend
@pytest.mark.parametrize("read", ["after", "before", "chunk"])
def test_causal(backend, read):
    """Later tokens change nothing; "before" does not see the token itself."""
    a = make(backend, read=read)
    b = {**a, "v": torch.cat((a["v"][:, :20], torch.randn_like(a["v"][:, 20:])), 1)}
    x, y = hope_ext.titans_memory(**a), hope_ext.titans_memory(**b)
    assert torch.equal(x[:, :20], y[:, :20])
    assert torch.equal(x[:, 20], y[:, 20]) == (read != "after")
    assert not torch.equal(x[:, 32:], y[:, 32:])


@each_backend
@pytest.mark.parametrize("name", ["q", "k", "v", "lr", "momentum", "decay"])
def test_nan_stays_in_its_batch_row_and_head(backend, name):
    a = make(backend, torch.float32, batch=3, heads=3)
    clean = hope_ext.titans_memory(**a)
    a[name][1, 4, 1] = torch.nan
    inputs = [a[n].requires_grad_() for n in TOKENS]
    out = hope_ext.titans_memory(**a)
    others = torch.ones(3, 3, dtype=torch.bool)
    others[1, 1] = False
    assert torch.equal(out.transpose(1, 2)[others], clean.transpose(1, 2)[others])
    for x in torch.autograd.grad(out.sum(), inputs):
        assert torch.isfinite(x.transpose(1, 2)[others]).all()


# ---- torch --------------------------------------------------------------------------------------


def test_autocast():
    """q, k, v go to the autocast dtype; gates and weights to float32."""
    a = make_float32()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = hope_ext.titans_memory(**a)
        mixed = hope_ext.titans_memory(**{**a, "v": a["v"].bfloat16(), "lr": a["lr"].bfloat16()})
    assert out.dtype == mixed.dtype == torch.bfloat16
    rounded = {n: a[n].bfloat16() for n in ("q", "k", "v")}
    assert torch.equal(out, hope_ext.titans_memory(**{**a, **rounded}))


def test_compiled_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(
        hope_ext.titans_memory, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for length in (20, 33, 70):
        a = make_float32(tokens=length)
        out, state = compiled(**a, return_state=True)
        expected, expected_state = hope_ext.titans_memory(**a, return_state=True)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(state.weights, expected_state.weights)
        assert torch.equal(state.position, expected_state.position)


def test_state_is_a_pytree():
    _, state = hope_ext.titans_memory(**make(), return_state=True)
    leaves, structure = _pytree.tree_flatten(state)
    assert len(leaves) == 4
    all_close(_pytree.tree_unflatten(leaves, structure), state)


def test_memory_grows_with_inputs_only():
    """The training forward keeps less than q, k and v (and a few states) beside its inputs."""
    for chunk_size, dtype in itertools.product((1, 16, 64), (torch.float32, torch.bfloat16)):
        saved = []
        a = make(dtype, batch=1, tokens=1024, key=64, value=64, chunk_size=chunk_size)
        a["weights"][0].requires_grad_()
        own = {a[n].untyped_storage().data_ptr() for n in TOKENS}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, s=saved: s.append(x) or x, lambda x: x
        ):
            hope_ext.titans_memory(**a)
        extra = sum(
            x.untyped_storage().nbytes() for x in saved if x.untyped_storage().data_ptr() not in own
        )
        rows = sum(a[n].nbytes for n in ("q", "k", "v"))
        assert extra <= rows + 4 * a["weights"][0].nbytes, chunk_size


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets(isa):
    """The CPU kernel's variants for older machines are as exact (in a process of their own)."""
    mine = torch.backends.cpu.get_cpu_capability()
    if isa == "avx2" and mine not in ("AVX2", "AVX512"):
        pytest.skip(f"this machine has no AVX2, but {mine}")
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_ops, torch\n"
        "for i, case in enumerate(test_ops.CASES):\n"
        "    test_ops.test_exact_in_float64(case)\n"
        "    if i % 3 == 0: test_ops.test_as_good_as_torch(case, torch.float32, 'cpu')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HOPE_CPU_ISA": isa},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def test_an_unknown_instruction_set_is_named():
    code = (
        "import torch; from hope_ext.testing import CASES\n"
        "CASES[0].function(**CASES[0].make(torch.float32, 'cpu'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HOPE_CPU_ISA": "avx3"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "HOPE_CPU_ISA: expected baseline, avx2 or avx512" in run.stderr


# ---- refusals -----------------------------------------------------------------------------------


def _bad(error, match, **changes):
    return pytest.param(error, match, changes, id=match[:40])


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        _bad(TypeError, r"q: expected a torch.Tensor, got list", q=[1.0]),
        _bad(TypeError, r"q: expected dtype float32 or bfloat16 .*got int64", q=lambda x: x.long()),
        _bad(ValueError, r"q: expected \[B, T, H, D\], got shape \[37, 2, 16\]", q=lambda x: x[0]),
        _bad(TypeError, r"k: expected dtype float32, got float64", k=lambda x: x.double()),
        _bad(
            ValueError,
            r"k: expected shape \[B, T, H, D\] = \[2, 37, 2, 16\], got",
            k=lambda x: x[:, 1:],
        ),
        _bad(
            ValueError,
            r"v: expected shape \[B, T, H, D_v\] .*got \[2, 37, 1, 16\]",
            v=lambda x: x[:, :, :1],
        ),
        _bad(TypeError, r"lr: expected a torch.Tensor, got NoneType", lr=None),
        _bad(TypeError, r"lr: expected dtype float32, got bfloat16", lr=lambda x: x.bfloat16()),
        _bad(ValueError, r"momentum: expected shape \[B, T, H\]", momentum=lambda x: x[..., None]),
        _bad(ValueError, r"decay: expected shape \[B, T, H\]", decay=lambda x: x[:, :5]),
        _bad(
            ValueError,
            r"decay: expected a tensor on cpu, like q, got one on meta",
            decay=lambda x: x.to("meta"),
        ),
        _bad(
            TypeError,
            r"weights: expected a tuple \(W,\) or \(W1, W2\) of tensors, got Tensor",
            weights=lambda x: x[0],
        ),
        _bad(
            ValueError,
            r"weights: expected a linear memory \(W,\).* a tuple of 3",
            weights=lambda x: x * 3,
        ),
        _bad(
            ValueError,
            r"weights\[0\]: expected shape \[H, D, D_v\]",
            weights=lambda x: (x[0][:, 1:],),
        ),
        _bad(TypeError, r"weights\[0\]: expected dtype float32", weights=lambda x: (x[0].half(),)),
        _bad(ValueError, r"chunk_size: expected a positive integer below .* got 0", chunk_size=0),
        _bad(
            ValueError,
            r"chunk_size: expected .* below 2\*\*31, got 99999999999",
            chunk_size=99999999999,
        ),
        _bad(TypeError, r"chunk_size: expected a positive integer, got 2.5", chunk_size=2.5),
        _bad(
            ValueError, r"activation: expected one of 'gelu', 'silu', got 'relu'", activation="relu"
        ),
        _bad(ValueError, r"objective: expected one of 'l2', 'dot', got 'l1'", objective="l1"),
        _bad(ValueError, r"read: expected one of .* got 'during'", read="during"),
        _bad(TypeError, r"residual: expected a bool, got 1", residual=1),
        _bad(TypeError, r"state: expected a TitansState, got tuple", state=()),
        _bad(
            TypeError,
            r"cu_seqlens: expected dtype int32, got int64",
            cu_seqlens=torch.tensor([0, 37]),
        ),
        _bad(
            ValueError,
            r"cu_seqlens: packed sequences need q with batch size 1, got 2",
            cu_seqlens=torch.tensor([0, 37], dtype=torch.int32),
        ),
    ],
)
def test_refuses(error, match, changes):
    arguments = make_float32()
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(error, match=match):
        hope_ext.titans_memory(**arguments)


@pytest.mark.parametrize("bounds", [[0, 20], [1, 37], [0, 30, 20, 37], [0, 40, 37], [-1, 37]])
def test_refuses_bad_bounds(bounds):
    arguments = make_float32(batch=1)
    bounds = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens: expected values that rise from 0 to T = 37"):
        hope_ext.titans_memory(**arguments, cu_seqlens=bounds)


def test_refuses_bad_bounds_in_compiled_code():
    torch._dynamo.reset()
    compiled = torch.compile(hope_ext.titans_memory, fullgraph=True, backend="aot_eager")
    bounds = torch.tensor([0, 20, 36], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens: expected values that rise from 0 to T = 37"):
        compiled(**make_float32(batch=1), cu_seqlens=bounds)


@each_backend
def test_positions_below_zero_count_chunks_too(backend):
    """Nobody gives them on purpose, and nobody looks: no other memory may be read for them."""
    a = make(backend, torch.float32, positions=[5, 0])
    expected = hope_ext.titans_memory(**a)
    position = torch.tensor([5 - 32, -16], device=device_of(backend))
    a["state"] = dataclasses.replace(a["state"], position=position)
    close(hope_ext.titans_memory(**a), expected)


def test_refuses_states_that_do_not_fit():
    a = make_float32()
    _, state = hope_ext.titans_memory(**a, return_state=True)
    with pytest.raises(
        ValueError, match="state: expected one made without momentum, like this call"
    ):
        hope_ext.titans_memory(**{**a, "momentum": None}, state=state)
    _, without = hope_ext.titans_memory(**{**a, "momentum": None}, return_state=True)
    with pytest.raises(ValueError, match="state: expected one made with momentum"):
        hope_ext.titans_memory(**a, state=without)
    with pytest.raises(ValueError, match=r"chunk_size: expected 16, that of the state"):
        hope_ext.titans_memory(**{**a, "chunk_size": 8}, state=state)
    with pytest.raises(ValueError, match=r"state.weights\[0\]: expected shape \[B, H, D, D_v\]"):
        hope_ext.titans_memory(
            **{n: x[:1] if n in TOKENS else x for n, x in a.items()}, state=state
        )


def test_no_heads():
    a = make_float32(heads=0)
    a["q"].requires_grad_()
    hope_ext.titans_memory(**a).sum().backward()


@each_backend
def test_finite_at_the_extremes_of_the_gates(backend):
    """Retention that underflows within a chunk, and momentum 1, stay exact: nothing is divided."""
    a = make(backend, torch.float32, chunk_size=64, tokens=128, batch=1)
    for decay, momentum in ((1.0, 0.0), (1.0 - 1e-7, 1.0), (0.0, 1.0), (0.999, 0.001)):
        gates = {
            "decay": torch.full_like(a["lr"], decay),
            "momentum": torch.full_like(a["lr"], momentum),
            "lr": a["lr"] * 1e-3,
        }
        ours = hope_ext.titans_memory(**{**a, **gates})
        with testing.backend("reference"):
            expected = hope_ext.titans_memory(**{**a, **gates})
        assert torch.isfinite(ours).all()
        assert (ours - expected).norm() <= 1e-5 * expected.norm() + 1e-6 * math.sqrt(ours.numel())
