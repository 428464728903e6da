"""Facts of the short causal convolution: tails, packed sequences, SiLU's ends, torch, refusals."""

import itertools
import math

import pytest
import torch
from backends import close, device_of, each_backend, each_backend_and_dtype, finest
from torch import Tensor
from torch.nn import functional as F

import hope_ext
from hope_ext import _load
from hope_ext.testing import conv_inputs

# Long enough for three of the kernel's blocks of tokens, wide enough for two of channels.
SIZES = {"tokens": 150, "channels": 150}
# CUDA has kernels for rows of fours, and others.
each_channels = pytest.mark.parametrize("channels", [22, 24])


def make(backend="cpu", dtype=None, **options):
    return conv_inputs(dtype or finest(backend), device_of(backend), **options)


def make_float32(**options):
    return make(dtype=torch.float32, **options)


def pieces(arguments, cuts):
    """The outputs of a call per piece, each with the tail of the one before; and the last tail."""
    x, tail = arguments["x"], arguments.get("tail")
    outputs = []
    for begin, end in itertools.pairwise([0, *cuts, x.shape[1]]):
        y, tail = hope_ext.causal_conv(
            **{**arguments, "x": x[:, begin:end], "tail": tail}, return_tail=True
        )
        outputs.append(y)
    return outputs, tail


def silu(x: Tensor) -> Tensor:
    """SiLU of the numbers x [n], by a convolution of width 1."""
    weight = torch.ones(1, 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return hope_ext.causal_conv(x[None, :, None], weight, activation="silu").flatten()


# ---- tails and packed sequences -----------------------------------------------------------------

each_cuts = pytest.mark.parametrize(
    "cuts",
    [[64], [1, 2, 5, 63, 64, 66, 131], [0, 0, 3, 3, 150], list(range(1, 150))],
    ids=["block", "odd", "empty", "single"],
)


@each_cuts
@pytest.mark.parametrize("activation", ["none", "silu"])
@each_backend_and_dtype
def test_split_anywhere(backend, dtype, activation, cuts):
    """With the tail carried, pieces have the bits of one call."""
    arguments = make(backend, dtype, activation=activation, tail=True, **SIZES)
    whole, last = hope_ext.causal_conv(**arguments, return_tail=True)
    outputs, tail = pieces(arguments, cuts)
    assert torch.equal(torch.cat(outputs, 1), whole)
    assert torch.equal(tail, last)


@each_cuts
@pytest.mark.parametrize("width", [1, 4, 9])
@each_backend
def test_gradients_flow_through_a_carried_tail(backend, width, cuts):
    """Also through pieces shorter than the tail, whose tails hold inputs of several pieces."""
    arguments = make(backend, width=width, tail=True, **SIZES)
    inputs = [arguments[name].requires_grad_() for name in ("x", "weight", "tail")]

    def gradients(outputs, tail):
        loss = sum(y.square().sum() for y in outputs) + tail.pow(3).sum()
        return torch.autograd.grad(loss, inputs)

    whole, last = hope_ext.causal_conv(**arguments, return_tail=True)
    expected = gradients([whole], last)
    for a, b in zip(gradients(*pieces(arguments, cuts)), expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("with_tail", [True, False])
@each_channels
@each_backend
def test_a_tail_is_the_last_inputs(backend, channels, with_tail):
    arguments = make(backend, tail=with_tail, width=4, tokens=2, channels=channels)
    _, tail = hope_ext.causal_conv(**arguments, return_tail=True)
    before = arguments["tail"] if with_tail else tail.new_zeros(2, 3, channels)
    assert torch.equal(tail, torch.cat((before, arguments["x"]), 1)[:, -3:])


@each_backend
def test_no_tail_is_a_tail_of_zeros(backend):
    arguments = make(backend)
    zeros = arguments["x"].new_zeros(2, 3, 24)
    assert torch.equal(
        hope_ext.causal_conv(**arguments), hope_ext.causal_conv(**arguments, tail=zeros)
    )


@pytest.mark.parametrize("width", [4, 5])
@each_channels
@each_backend
def test_gradient_of_the_tail_alone(backend, channels, width):
    """A loss that sees only the returned tail: its gradient is that of a copy."""
    arguments = make(backend, tail=True, width=width, tokens=3, channels=channels)
    inputs = [arguments[name].requires_grad_() for name in ("x", "weight", "tail")]
    _, tail = hope_ext.causal_conv(**arguments, return_tail=True)
    cotangent = torch.randn_like(tail)
    d_x, d_weight, d_tail = torch.autograd.grad(tail, inputs, cotangent)
    assert torch.equal(torch.cat((d_tail, d_x), 1)[:, 1 - width :], cotangent)
    assert not torch.cat((d_tail, d_x), 1)[:, : 1 - width].any()
    assert not d_weight.any()


@pytest.mark.parametrize("with_tail", [True, False])
@each_backend_and_dtype
def test_packed_sequences_are_each_alone(backend, dtype, with_tail):
    bounds = [0, 2, 2, 67, 68, 150]
    arguments = make(backend, dtype, batch=1, bounds=bounds, tail=with_tail, **SIZES)
    y, last = hope_ext.causal_conv(**arguments, return_tail=True)
    x, tails = arguments.pop("x"), arguments.pop("tail", None)
    del arguments["cu_seqlens"]
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        tail = tails[i : i + 1] if with_tail else None
        alone, alone_last = hope_ext.causal_conv(
            x[:, begin:end], **arguments, tail=tail, return_tail=True
        )
        assert torch.equal(y[:, begin:end], alone)
        assert torch.equal(last[i : i + 1], alone_last)


# ---- special cases ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4, 64])
@pytest.mark.parametrize("activation", ["none", "silu"])
@each_backend
def test_torchs_own_convolution(backend, width, activation):
    """torch.nn.functional.conv1d with a group per channel, zeros in front; gradients too."""
    arguments = make(backend, width=width, activation=activation, **SIZES)
    x, weight = inputs = [arguments[name].requires_grad_() for name in ("x", "weight")]
    z = F.conv1d(F.pad(x.mT, (width - 1, 0)), weight[:, None], groups=x.shape[2]).mT
    expected = F.silu(z) if activation == "silu" else z
    y = hope_ext.causal_conv(**arguments)
    close(y, expected)
    cotangent = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    ):
        close(a, b)


@each_backend
def test_causal(backend):
    """Token 70 changes itself and the K - 1 after it, and no other channel."""
    arguments = make(backend, width=4, **SIZES)
    before = hope_ext.causal_conv(**arguments)
    arguments["x"][0, 70, 33] += 1
    changed = (hope_ext.causal_conv(**arguments) != before).nonzero().tolist()
    assert changed == [[0, t, 33] for t in range(70, 74)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_backend
def test_every_16_bit_number_passes(backend, dtype):
    """A weight of 1 changes none of the 65536: subnormal ones, infinities and NaN included."""
    numbers = torch.arange(-(2**15), 2**15, device=device_of(backend))
    x = numbers.to(torch.int16).view(dtype).view(1, 1024, 64)
    y = hope_ext.causal_conv(x, x.new_ones(64, 1, dtype=torch.float32))
    torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)


# ---- SiLU ---------------------------------------------------------------------------------------


@each_backend
def test_silu_is_accurate(backend):
    """In float32, to 3 ulp where it is not tiny; so are the terms of its derivative."""
    x = torch.linspace(-100, 100, 400_001, device=device_of(backend)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, truth = silu(x), F.silu(exact)
    (d_x,) = torch.autograd.grad(y.sum(), x)
    (d_truth,) = torch.autograd.grad(truth.sum(), exact)
    ulp = torch.finfo(torch.float32).eps
    assert ((y.double() - truth).abs() <= 3 * ulp * truth.abs() + 2e-36).all()
    # s (1 + x (1 - s)): for negative x the terms cancel, so the scale is that of the larger.
    scale = exact.sigmoid() * (1 + exact.abs())
    assert ((d_x.double() - d_truth).abs() <= 3 * ulp * scale + 2e-36).all()


@each_backend_and_dtype
def test_silu_far_out(backend, dtype):
    """The line x on one side and 0 on the other, derivatives 1 and 0; exactly 0 at 0."""
    on = {"dtype": dtype, "device": device_of(backend)}
    x = torch.tensor([1e4, -1e4, 100, -100, 0], **on, requires_grad=True)
    y = silu(x)
    (d_x,) = torch.autograd.grad(y.sum(), x)
    far = {"rtol": 0, "atol": 1e-30}
    torch.testing.assert_close(y, x.detach().relu(), **far)
    torch.testing.assert_close(d_x, torch.tensor([1, 0, 1, 0, 0.5], **on), **far)


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@each_backend_and_dtype
def test_what_is_not_finite_stays_in_its_channel_and_window(backend, dtype, bad, activation):
    """Never masked: the K outputs that see it are not finite (NaN if it is); all else is as before.

    Backward the channel's weights have no finite gradient, nor, through SiLU, the inputs that share
    an output with it.
    """
    arguments = make(backend, dtype, width=4, batch=2, activation=activation, **SIZES)
    clean = hope_ext.causal_conv(**arguments)
    arguments["x"][1, 62, 33] = bad  # its window reaches into the next block of tokens
    inputs = [arguments[name].requires_grad_() for name in ("x", "weight")]
    y = hope_ext.causal_conv(**arguments)
    seen = torch.zeros_like(y, dtype=torch.bool)
    seen[1, 62:66, 33] = True
    assert torch.equal(y[~seen], clean[~seen])
    assert not torch.isfinite(y[seen]).any()
    if math.isnan(bad):
        assert y[seen].isnan().all()
    d_x, d_weight = torch.autograd.grad(y.sum(), inputs)
    near = torch.zeros_like(seen)
    near[1, 59:66, 33] = activation == "silu"
    assert torch.isfinite(d_x[~near]).all()
    assert not torch.isfinite(d_weight[33]).any()
    assert torch.isfinite(d_weight[torch.arange(150) != 33]).all()


@pytest.mark.parametrize("activation", ["none", "silu"])
@each_channels
@each_backend
def test_what_is_not_finite_stays_in_its_sequence(backend, channels, activation):
    """Of packed ones: the sequences before and after it do not see it, nor do their gradients."""
    bounds = [0, 1, 7, 9]
    arguments = make(
        backend, batch=1, tokens=9, bounds=bounds, channels=channels, activation=activation
    )
    others = [0, 7, 8]

    def evaluate():
        x = arguments["x"].requires_grad_()
        y = hope_ext.causal_conv(**arguments)
        (d_x,) = torch.autograd.grad(y.sum(), x)
        return y[:, others], d_x[:, others]

    clean = evaluate()
    arguments["x"] = arguments["x"].detach().clone()
    arguments["x"][:, 1:7] = torch.nan
    for with_nan, without in zip(evaluate(), clean, strict=True):
        assert torch.equal(with_nan, without)


# ---- torch --------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "none", "tail": True},
        {"batch": 1, "bounds": [0, 2, 2, 20], "tail": True},
        {"dtype": torch.bfloat16, "tail": True},
    ],
    ids=["silu", "tail", "packed", "bfloat16"],
)
def test_opcheck(backend, options):
    a, operators = (
        make(backend, **{"dtype": torch.float32, "tokens": 20, **options}),
        _load.operators(),
    )
    inputs = [a["x"], a["weight"], a.get("tail")]
    rest = (a.get("cu_seqlens"), a["activation"])
    y, tail = operators.conv(*inputs, *rest)
    for cotangents in ((torch.randn_like(y), torch.randn_like(tail)), (torch.randn_like(y), None)):
        torch.library.opcheck(operators.conv_backward, (*cotangents, *inputs, *rest))
    for x in inputs:
        if x is not None:
            x.requires_grad_()
    torch.library.opcheck(operators.conv, (*inputs, *rest))


def test_compiled_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(
        hope_ext.causal_conv, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for length in (20, 33, 70):
        a = make_float32(tokens=length, tail=True)
        inputs = [a[name].requires_grad_() for name in ("x", "weight", "tail")]
        results = []
        for function in (compiled, hope_ext.causal_conv):
            y, tail = function(**a, return_tail=True)
            gradients = torch.autograd.grad(y.square().sum() + tail.sum(), inputs)
            results.append((y, tail, *gradients))
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype):
    """x is what a projection gave, and its dtype decides; the weight stays float32."""
    arguments = make(dtype=dtype, tail=True)
    expected = hope_ext.causal_conv(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, tail = hope_ext.causal_conv(**arguments, return_tail=True)
    assert y.dtype == tail.dtype == dtype
    assert torch.equal(y, expected)


def test_nothing_is_kept_but_the_inputs():
    """The backward computes the sums under SiLU again."""
    arguments = make_float32(tail=True)
    inputs = [arguments[name].requires_grad_() for name in ("x", "weight", "tail")]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        hope_ext.causal_conv(**arguments)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in inputs}


# ---- refusals -----------------------------------------------------------------------------------


def _bad(error, match, **changes):
    return pytest.param(error, match, changes, id=match[:40])


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        _bad(TypeError, r"x: expected a torch.Tensor, got list", x=[1.0]),
        _bad(
            TypeError,
            r"x: expected dtype float32 or bfloat16 or float16 or float64, got int64",
            x=lambda x: x.long(),
        ),
        _bad(ValueError, r"x: expected \[B, T, C\], got shape \[37, 24\]", x=lambda x: x[0]),
        _bad(TypeError, r"weight: expected a torch.Tensor, got NoneType", weight=None),
        _bad(
            TypeError,
            r"weight: expected dtype float32, got bfloat16",
            weight=lambda w: w.bfloat16(),
        ),
        _bad(TypeError, r"weight: expected dtype float64, got float32", x=lambda x: x.double()),
        _bad(
            ValueError,
            r"weight: expected a tensor on cpu, like x, got one on meta",
            weight=lambda w: w.to("meta"),
        ),
        _bad(
            ValueError,
            r"weight: expected \[C, K\], got shape \[24, 1, 4\]",
            weight=lambda w: w[:, None],
        ),
        _bad(
            ValueError,
            r"weight: expected shape \[C, K\] = \[24, 4\], got \[23, 4\]",
            weight=lambda w: w[1:],
        ),
        _bad(
            ValueError,
            r"weight: expected \[C, K\] with K from 1 to 64, got K = 0",
            weight=lambda w: w[:, :0],
        ),
        _bad(
            ValueError,
            r"weight: expected \[C, K\] with K from 1 to 64, got K = 65",
            weight=torch.zeros(24, 65),
        ),
        _bad(ValueError, r"activation: expected one of 'none', 'silu', got None", activation=None),
        _bad(
            ValueError, r"activation: expected one of 'none', 'silu', got 'gelu'", activation="gelu"
        ),
        _bad(TypeError, r"tail: expected a torch.Tensor, got tuple", tail=()),
        _bad(TypeError, r"tail: expected dtype float32, got float16", tail=lambda t: t.half()),
        _bad(
            ValueError,
            r"tail: expected a tensor on cpu, like x, got one on meta",
            tail=lambda t: t.to("meta"),
        ),
        _bad(
            ValueError,
            r"tail: expected shape \[B, K-1, C\] = \[2, 3, 24\], got \[2, 4, 24\]",
            tail=lambda t: torch.cat((t, t[:, :1]), 1),
        ),
        _bad(
            ValueError,
            r"tail: expected shape \[B, K-1, C\] = \[2, 3, 24\], got \[1, 3, 24\]",
            x=lambda x: x[:1],
            tail=lambda t: t[:1],
            cu_seqlens=torch.tensor([0, 5, 37], dtype=torch.int32),
        ),
        _bad(TypeError, r"cu_seqlens: expected a torch.Tensor, got list", cu_seqlens=[0, 37]),
        _bad(
            TypeError,
            r"cu_seqlens: expected dtype int32, got int64",
            cu_seqlens=torch.tensor([0, 37]),
        ),
        _bad(
            ValueError,
            r"cu_seqlens: expected shape \[N \+ 1\], got \[1, 2\]",
            cu_seqlens=torch.tensor([[0, 37]], dtype=torch.int32),
        ),
        _bad(
            ValueError,
            r"cu_seqlens: packed sequences need x with batch size 1, got 2",
            cu_seqlens=torch.tensor([0, 37], dtype=torch.int32),
        ),
    ],
)
def test_refuses(error, match, changes):
    arguments = make_float32(tail=True)
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(error, match=match):
        hope_ext.causal_conv(**arguments)


@pytest.mark.parametrize("bounds", [[0, 20], [1, 37], [0, 30, 20, 37], [0, 40, 37], [-1, 37]])
def test_refuses_bad_bounds(bounds):
    bounds = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens: expected values that rise from 0 to T = 37"):
        hope_ext.causal_conv(**make_float32(batch=1), cu_seqlens=bounds)


def test_refuses_bad_bounds_in_compiled_code():
    torch._dynamo.reset()
    compiled = torch.compile(hope_ext.causal_conv, fullgraph=True, backend="aot_eager")
    bounds = torch.tensor([0, 20, 36], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens: expected values that rise from 0 to T = 37"):
        compiled(**make_float32(batch=1), cu_seqlens=bounds)


@each_backend
def test_the_operator_itself_protects_memory(backend):
    """Callers of torch.ops pass the public function's checks by."""
    a, operators = make(backend, torch.float32, tail=True), _load.operators()
    x, weight, tail = a["x"], a["weight"], a["tail"]
    for match, arguments in {
        "weight: expected 24 channels": (x, weight[1:], None, None, "silu"),
        "weight: expected Float": (x, weight.double(), None, None, "silu"),
        "tail: does not fit x": (x, weight, tail[:, 1:], None, "silu"),
        "x: expected batch 1": (x, weight, None, torch.tensor([0, 37]).int(), "silu"),
        "activation: unknown value 'gelu'": (x, weight, None, None, "gelu"),
    }.items():
        with pytest.raises((TypeError, ValueError), match=match):
            operators.conv(*arguments)
