"""Facts of Titans memories that are networks: two layers, or a norm."""

import itertools
import math

import pytest
import torch
from backends import all_close, close
from torch.nn import functional as F
from torch.utils import _pytree

import hope_ext
from hope_ext.reference.titans import Network
from hope_ext.testing import titans_inputs

TOKENS = ("q", "k", "v", "lr", "momentum", "decay")
KINDS = {
    "deep": {"hidden": 24},
    "deep-norm": {"hidden": 24, "norm": True, "activation": "silu"},
    "norm": {"norm": True},
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def make(dtype=torch.float64, **options):
    return titans_inputs(dtype, "cpu", **options)


def tokens(arguments, where):
    return {n: x[:, where] if n in TOKENS and x is not None else x for n, x in arguments.items()}


# ---- the inner gradient --------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["l2", "dot"])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_definition_takes_the_gradient_of_the_inner_loss(
    objective, activation, residual, norm, layers
):
    """Its formulas against autograd on the loss as the papers write it."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    sizes = [(5, 5)] if layers == 1 else [(5, 7), (7, 5)]
    weights = [normal(1, 2, *size).requires_grad_() for size in sizes]
    norms = (normal(1, 2, 1, 5), normal(1, 2, 1, 5)) if norm else (None, None)
    network = Network(activation, residual, *norms, 1e-6)
    k, v = normal(1, 2, 1, 5), normal(1, 2, 1, 5)
    core = k @ weights[0]
    if layers == 2:
        act = F.silu if activation == "silu" else lambda z: F.gelu(z, approximate="tanh")
        core = act(core) @ weights[1]
    out = core
    if norm:
        out = F.layer_norm(core, (5,), eps=1e-6) * norms[0] + norms[1]
    if residual and (norm or layers == 2):
        out = k + out
    close(network.read(weights, k), out)
    loss = 0.5 * (out - v).square().sum() if objective == "l2" else -(out * v).sum()
    expected = torch.autograd.grad(loss, weights)
    gradients = [x.mT @ e for x, e in network.gradients(weights, k, v, objective)]
    all_close(gradients, list(expected))


# ---- carried states and packed sequences ---------------------------------------------------------


@each_kind
@pytest.mark.parametrize("read", ["after", "before", "chunk"])
@pytest.mark.parametrize("cuts", [[16], [1, 2, 5, 31, 32, 33], list(range(1, 37)), [0, 37]])
def test_split_anywhere(kind, read, cuts):
    arguments = make(read=read, positions=[5, 16], **kind)
    whole, final = hope_ext.titans_memory(**arguments, return_state=True)
    state, pieces = arguments.pop("state"), []
    for begin, end in zip([0, *cuts], [*cuts, 37], strict=True):
        piece, state = hope_ext.titans_memory(
            **tokens(arguments, slice(begin, end)), state=state, return_state=True
        )
        pieces.append(piece)
    close(torch.cat(pieces, 1), whole)
    all_close(state, final)


@each_kind
def test_gradients_flow_through_a_carried_state(kind):
    arguments = make(**kind)
    leaves = [x for x in _pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)]
    for x in leaves:
        x.requires_grad_()
    expected = torch.autograd.grad(hope_ext.titans_memory(**arguments).square().sum(), leaves)
    first, state = hope_ext.titans_memory(**tokens(arguments, slice(0, 21)), return_state=True)
    second = hope_ext.titans_memory(**tokens(arguments, slice(21, None)), state=state)
    loss = first.square().sum() + second.square().sum()
    all_close(torch.autograd.grad(loss, leaves), expected)


@each_kind
def test_packed_sequences_are_each_alone(kind):
    arguments = make(
        batch=1, tokens=50, bounds=[0, 7, 7, 39, 40, 50], positions=[3, 5, 16, 31, 0], **kind
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


# ---- special cases -------------------------------------------------------------------------------


def layer_norm_error(core, target, weight, bias):
    """TTT's fused gradient (arXiv 2407.04620): of 1/2 |LN(core) - target|^2, by core."""
    mean, deviation = core.mean(-1, keepdim=True), core.var(-1, unbiased=False, keepdim=True)
    deviation = (deviation + 1e-6).sqrt()
    hat = (core - mean) / deviation
    g = (weight * hat + bias - target) * weight
    size = core.shape[-1]
    total, along = g.sum(-1, keepdim=True), (g * hat).sum(-1, keepdim=True)
    return (size * g - total - hat * along) / (size * deviation)


@pytest.mark.parametrize("deep", [False, True], ids=["linear", "mlp"])
def test_ttt_dual_form(deep):
    """TTT-Linear and TTT-MLP without biases, one chunk, in the paper's dual form: its target is
    v - k, its output q + LN(core), its learning rate the last token's for all."""
    size, heads, length = 16, 2, 12
    a = make(
        batch=1, tokens=length, heads=heads, chunk_size=length, momentum=False, decay=False,
        norm=True, hidden=64 if deep else None,
    )  # fmt: skip
    ours = hope_ext.titans_memory(**a)
    q, k, v = (a[n][0].transpose(0, 1) for n in ("q", "k", "v"))  # [H, T, D]
    eta = a["lr"][0].T[:, None, :].expand(heads, length, length).tril()
    weight, bias = a["norm_weight"][:, None], a["norm_bias"][:, None]

    def gelu(x):
        return F.gelu(x, approximate="tanh")

    def gelu_slope(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(gelu(x).sum(), x)[0]

    if not deep:
        (w,) = a["weights"]
        gradient = layer_norm_error(k @ w, v - k, weight, bias)
        core = q @ w - (eta * (q @ k.mT)) @ gradient
    else:
        w1, w2 = a["weights"]
        z1 = k @ w1
        x2 = gelu(z1)
        gradient2 = layer_norm_error(x2 @ w2, v - k, weight, bias)
        gradient1 = gradient2 @ w2.mT * gelu_slope(z1)
        z1_bar = q @ w1 - (eta * (q @ k.mT)) @ gradient1
        x2_bar = gelu(z1_bar)
        core = x2_bar @ w2 - (eta * (x2_bar @ x2.mT)) @ gradient2
    normalised = F.layer_norm(core, (size,), eps=1e-6) * weight + bias
    close(ours[0].transpose(0, 1), q + normalised)


def test_no_norm_tensors_are_ones_and_zeros():
    a = make(norm=True)
    for name in ("norm_weight", "norm_bias"):
        a.pop(name)
    given = {"norm_weight": torch.ones(2, 16), "norm_bias": torch.zeros(2, 16)}
    given = {name: x.double() for name, x in given.items()}
    assert torch.equal(hope_ext.titans_memory(**a), hope_ext.titans_memory(**a, **given))


@each_kind
def test_momentum_and_decay_of_zero_are_none(kind):
    a = make(momentum=False, decay=False, **kind)
    zero = torch.zeros_like(a["lr"])
    close(
        hope_ext.titans_memory(**{**a, "momentum": zero, "decay": zero}),
        hope_ext.titans_memory(**a),
    )


# ---- torch ---------------------------------------------------------------------------------------


@each_kind
def test_compiled_with_dynamic_shapes(kind):
    torch._dynamo.reset()
    compiled = torch.compile(
        hope_ext.titans_memory, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for length in (20, 33):
        a = make(torch.float32, tokens=length, **kind)
        out, state = compiled(**a, return_state=True)
        expected, expected_state = hope_ext.titans_memory(**a, return_state=True)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(state.weights, expected_state.weights)


def test_autocast():
    a = make(torch.float32, hidden=24, norm=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = hope_ext.titans_memory(**a)
    rounded = {n: a[n].bfloat16() for n in ("q", "k", "v")}
    assert torch.equal(out, hope_ext.titans_memory(**{**a, **rounded}))


def test_memory_grows_with_inputs_only():
    """The training forward keeps less than q, k and v, and a state per sequence and head, beside
    its inputs: the state of two layers at F = 4 D is larger than a chunk's rows."""
    saved = []
    a = make(torch.bfloat16, batch=1, tokens=4096, heads=2, key=64, value=64, chunk_size=64,
             hidden=256)  # fmt: skip
    for w in a["weights"]:
        w.requires_grad_()
    own = {a[n].untyped_storage().data_ptr() for n in TOKENS}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        hope_ext.titans_memory(**a)
    extra = sum(
        x.untyped_storage().nbytes() for x in saved if x.untyped_storage().data_ptr() not in own
    )
    rows, state = sum(a[n].nbytes for n in ("q", "k", "v")), sum(w.nbytes for w in a["weights"])
    assert extra <= rows + 4 * state
    assert extra <= 2 * rows


def test_saturated_activations_are_finite():
    """Far outside of the exponential's range, values and gradients are those of the limits."""
    for activation in ("gelu", "silu"):
        a = make(torch.float32, hidden=24, activation=activation, momentum=False, decay=False)
        a["weights"] = (a["weights"][0] * 1e4, a["weights"][1] * 1e-4)
        a["lr"] = a["lr"] * 1e-9
        inputs = [a[n].requires_grad_() for n in ("q", "k", "v")]
        out = hope_ext.titans_memory(**a)
        exact = hope_ext.titans_memory(
            **{n: _pytree.tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) else x, x)
               for n, x in a.items()}
        )  # fmt: skip
        assert (out - exact).norm() <= 1e-5 * exact.norm()
        for gradient in torch.autograd.grad(out.sum(), inputs):
            assert torch.isfinite(gradient).all()


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": ()}, ValueError, r"weights: expected a linear memory \(W,\).* tuple of 0"),
        (
            {"weights": (torch.ones(2, 16, 24), torch.ones(2, 24, 15))},
            ValueError,
            r"weights\[1\]: expected shape \[H, F, D\] = \[2, 24, 16\], got \[2, 24, 15\]",
        ),
        (
            {"weights": (torch.ones(2, 15, 24), torch.ones(2, 24, 16))},
            ValueError,
            r"weights\[0\]: expected shape \[H, D, F\] = \[2, 16, 24\], got \[2, 15, 24\]",
        ),
        (
            {"weights": (torch.ones(2, 16, 0), torch.ones(2, 0, 16))},
            ValueError,
            r"weights\[0\]: expected shape \[H, D, F\]",
        ),
        (
            {"weights": (torch.ones(2, 16, 24).double(), torch.ones(2, 24, 16))},
            TypeError,
            r"weights\[0\]: expected dtype float32, got float64",
        ),
        ({"v": torch.ones(2, 37, 2, 8)}, ValueError, "v: expected D_v = D = 16 for a deep memory"),
        ({"activation": "relu"}, ValueError, "activation: expected one of 'gelu', 'silu'"),
        ({"residual": 1}, TypeError, "residual: expected a bool, got 1"),
        ({"norm": "batch"}, ValueError, "norm: expected one of None, 'layer', got 'batch'"),
        ({"norm": None}, ValueError, "norm_weight: expected None without a norm, got Tensor"),
        ({"norm_weight": torch.ones(16)}, ValueError, r"norm_weight: expected shape \[H, D_v\]"),
        ({"norm_bias": [0.0]}, TypeError, r"norm_bias: expected a torch.Tensor, got list"),
        ({"norm_eps": 0}, ValueError, "norm_eps: expected a positive number, got 0"),
        ({"norm_eps": "small"}, TypeError, "norm_eps: expected a number, got 'small'"),
    ],
)
def test_refuses(changes, error, message):
    a = make(torch.float32, hidden=24, norm=True)
    with pytest.raises(error, match=message):
        hope_ext.titans_memory(**{**a, **changes})


def test_refuses_a_residual_norm_of_other_columns():
    a = make(torch.float32, norm=True, residual=True, value=32)
    with pytest.raises(ValueError, match="v: expected D_v = D = 16 for residual=True with a norm"):
        hope_ext.titans_memory(**a)


def test_refuses_a_state_of_another_depth():
    deep, linear = make(torch.float32, hidden=24), make(torch.float32)
    _, state = hope_ext.titans_memory(**linear, return_state=True)
    message = r"state.weights: expected a tuple of 2 tensors, like weights"
    with pytest.raises(ValueError, match=message):
        hope_ext.titans_memory(**deep, state=state)


def test_finite_at_the_extremes_of_the_gates():
    a = make(torch.float32, chunk_size=64, tokens=128, batch=1, hidden=24)
    exact = make(chunk_size=64, tokens=128, batch=1, hidden=24)
    for decay, momentum in ((1.0, 0.0), (1.0 - 1e-7, 1.0), (0.0, 1.0), (0.999, 0.001)):

        def gates(arguments, decay=decay, momentum=momentum):
            return {
                "decay": torch.full_like(arguments["lr"], decay),
                "momentum": torch.full_like(arguments["lr"], momentum),
                "lr": arguments["lr"] * 1e-3,
            }

        ours = hope_ext.titans_memory(**{**a, **gates(a)})
        expected = hope_ext.titans_memory(**{**exact, **gates(exact)})
        assert torch.isfinite(ours).all()
        assert (ours - expected).norm() <= 1e-5 * expected.norm() + 1e-6 * math.sqrt(ours.numel())
