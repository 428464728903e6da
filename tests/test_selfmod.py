"""Facts of HOPE's self-modifying memory: its definition, states, special cases, extremes, torch."""

import itertools
import math

import pytest
import torch
from backends import all_close, close, device_of, each_backend
from laws import evaluate, float_leaves
from torch.nn import functional as F
from torch.utils import _pytree

import hope_ext
from hope_ext import _load, testing
from hope_ext.reference.selfmod import GATES, NAMES, Rules
from hope_ext.testing import selfmod_inputs

TOKENS = ("x", "q")
KINDS = {"linear": {"hidden": None}, "deep": {"hidden": 32}}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
LONG = ("chunk-of-64", "stretches", "carried-in-a-long-chunk", "no-token", "no-batch")
CASES = [case for case in testing.CASES if case.stem == "selfmod"]


def make(dtype=torch.float64, **options):
    return selfmod_inputs(dtype, "cpu", **options)


def make_float32(**options):
    return make(torch.float32, **options)


def run(arguments, **changes):
    return hope_ext.self_modifying_memory(**{**arguments, **changes})


def tokens(arguments, where):
    return {n: x[:, where] if n in TOKENS else x for n, x in arguments.items()}


def matrices(weights):
    return {name: getattr(weights, name) for name in NAMES}


# ---- the definition ------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["l2", "dot"])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("name", ["v", "lr"])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_definition_takes_the_gradient_of_the_inner_loss(objective, activation, name, layers):
    """Its formulas against autograd on the loss as the paper writes it."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    columns = 1 if name in GATES else 5
    sizes = [(5, columns)] if layers == 1 else [(5, 7), (7, columns)]
    memory = [normal(1, 2, *size).requires_grad_() for size in sizes]
    rules = Rules(1.0, activation, objective)
    k, value = normal(1, 2, 1, 5), normal(1, 2, 1, columns)
    out = k @ memory[0]
    if layers == 2:
        act = F.silu if activation == "silu" else lambda z: F.gelu(z, approximate="tanh")
        out = act(out) @ memory[1]
        if name not in GATES:
            out = k + out
    close(rules.read(name, memory, k), out)
    loss = 0.5 * (out - value).square().sum() if objective == "l2" else -(out * value).sum()
    expected = torch.autograd.grad(loss, memory)
    all_close([x.mT @ e for x, e in rules.gradients(name, memory, k, value)], list(expected))


@each_kind
@pytest.mark.parametrize("objective", ["l2", "dot"])
def test_it_is_the_rule_of_the_paper(kind, objective):
    """One sequence and head, in words of its own: inner gradients by autograd, and the transition
    alpha I - eta k^T k as a matrix."""
    a = make(batch=1, heads=1, tokens=11, chunk_size=4, lr_max=0.7, objective=objective, **kind)
    memories = {n: [w[0] for w in m] for n, m in matrices(a["memories"]).items()}
    eye, outputs = torch.eye(16, dtype=torch.float64), []

    def read(memory, x):
        if len(memory) == 1:
            return x @ memory[0]
        core = F.gelu(x @ memory[0], approximate="tanh") @ memory[1]
        return x + core if core.shape[-1] > 1 else core

    for t in range(11):
        if t % 4 == 0:
            anchor = memories
        x, q = a["x"][0, t], a["q"][0, t]  # [1, D]
        k, v, lr, retention = (read(anchor[n], x) for n in NAMES[:4])
        k = k / k.norm()
        eta = 0.7 * (lr + a["lr_bias"]).sigmoid()
        alpha = (retention + a["retention_bias"]).sigmoid()
        outputs.append(read(memories["memory"], q))
        learned = {}
        for name, memory in memories.items():
            leaves = [w.detach().requires_grad_() for w in anchor[name]]
            out, value = read(leaves, k), read(anchor[name], v)
            loss = (out - value).square().sum() / 2 if objective == "l2" else -(out * value).sum()
            first, *second = torch.autograd.grad(loss, leaves)
            learned[name] = [(alpha * eye - eta * k.mT @ k) @ memory[0] - eta * first]
            for w, gradient in zip(memory[1:], second, strict=True):
                learned[name].append(alpha * w - eta * gradient)
        memories = learned
    for backend in ("reference", "cpu"):
        with testing.backend(backend):
            out, state = run(a, return_state=True)
        close(out[0, :, 0], torch.cat(outputs))
        for name, memory in matrices(state.weights).items():
            for ours, w in zip(memory, memories[name], strict=True):
                close(ours[0, 0], w)


@pytest.mark.parametrize("case", [c for c in CASES if c.tiny or c.name in LONG], ids=str)
def test_the_chunked_form_is_the_same(case):
    """The WY form in PyTorch against token by token: outputs, final states and gradients."""
    a = case.make(torch.float64, "cpu")
    expected, chunked = evaluate(case, a, "reference"), evaluate(case, a, "rounded")
    for (name, x), (_, y) in zip(expected, chunked, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# ---- carried states and packed sequences ---------------------------------------------------------


@each_kind
@pytest.mark.parametrize("read", ["after", "before", "chunk"])
@pytest.mark.parametrize("cuts", [[16], [1, 2, 5, 31, 32, 33], list(range(1, 37)), [0, 37]])
def test_split_anywhere(kind, read, cuts):
    arguments = make(read=read, positions=[5, 16], **kind)
    whole, final = run(arguments, return_state=True)
    state, pieces = arguments.pop("state"), []
    for begin, end in zip([0, *cuts], [*cuts, 37], strict=True):
        piece, state = run(tokens(arguments, slice(begin, end)), state=state, return_state=True)
        pieces.append(piece)
    close(torch.cat(pieces, 1), whole)
    all_close(state, final)
    assert state.position.tolist() == [5 + 37, 16 + 37]


@each_kind
def test_gradients_flow_through_a_carried_state(kind):
    arguments = make(**kind)
    leaves = [x.requires_grad_() for x in float_leaves(arguments)]
    expected = torch.autograd.grad(run(arguments).square().sum(), leaves)
    first, state = run(tokens(arguments, slice(0, 21)), return_state=True)
    second = run(tokens(arguments, slice(21, None)), state=state)
    loss = first.square().sum() + second.square().sum()
    all_close(torch.autograd.grad(loss, leaves), expected)


@each_kind
def test_packed_sequences_are_each_alone(kind):
    arguments = make(
        batch=1, tokens=50, bounds=[0, 7, 7, 39, 40, 50], positions=[3, 5, 16, 31, 0], **kind
    )
    out, final = run(arguments, return_state=True)
    bounds, state = arguments.pop("cu_seqlens").tolist(), arguments.pop("state")
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        row = _pytree.tree_map(lambda x, i=i: x[i : i + 1], state)
        alone, alone_state = run(tokens(arguments, slice(begin, end)), state=row, return_state=True)
        close(out[:, begin:end], alone)
        all_close(_pytree.tree_map(lambda x, i=i: x[i : i + 1], final), alone_state)


def test_the_state():
    """A pytree; its anchor is its weights at a boundary; detach() truncates the gradient."""
    arguments = make(tokens=32)
    arguments["x"].requires_grad_()
    _, state = run(arguments, return_state=True)
    all_close(state.anchor, state.weights)
    leaves, structure = _pytree.tree_flatten(state)
    assert len(leaves) == 2 * 10 + 1
    all_close(_pytree.tree_unflatten(leaves, structure), state)
    assert all(w.requires_grad for w in float_leaves(state))
    assert not any(w.requires_grad for w in float_leaves(state.detach()))
    all_close(state.detach(), state.to("cpu"))
    all_close(state.weights.detach(), state.weights.to("cpu"))
    _, state = run(tokens(arguments, slice(0, 20)), return_state=True)
    assert not torch.equal(state.anchor.k[0], state.weights.k[0])


# ---- special cases -------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["l2", "dot"])
def test_linear_memories_of_chunks_of_one_token(objective):
    """The anchor is what is learned into, so W <- (alpha I - eta k^T (2 k - v)) W for l2, and
    (alpha I - eta k^T (k - v)) W for dot, whatever the memory."""
    a = make(hidden=None, chunk_size=1, read="after", objective=objective)
    w = {n: m[0].expand(2, -1, -1, -1) for n, m in matrices(a["memories"]).items()}
    eye, expected = torch.eye(16, dtype=torch.float64), []
    for t in range(37):
        x, q = a["x"][:, t, :, None], a["q"][:, t, :, None]  # [B, H, 1, D]
        k, v = F.normalize(x @ w["k"], dim=-1), x @ w["v"]
        eta = (x @ w["lr"] + a["lr_bias"][:, None, None]).sigmoid()
        alpha = (x @ w["retention"] + a["retention_bias"][:, None, None]).sigmoid()
        seen = 2 * k - v if objective == "l2" else k - v
        w = {n: (alpha * eye - eta * k.mT @ seen) @ m for n, m in w.items()}
        expected.append((q @ w["memory"])[:, :, 0])
    out, state = run(a, return_state=True)
    close(out, torch.stack(expected, 1))
    all_close(state.weights, hope_ext.SelfModifyingWeights(**{n: (m,) for n, m in w.items()}))


def test_a_chunk_moves_all_linear_memories_by_one_matrix():
    """docs/derivations.md: W' = P W; a memory that starts as the unit matrix ends as P."""
    a = make(hidden=None, tokens=16)
    _, state = run(a, return_state=True)
    unit = torch.eye(16, dtype=torch.float64).expand(2, -1, -1)
    memories = hope_ext.SelfModifyingWeights(**{**matrices(a["memories"]), "memory": (unit,)})
    _, moved = run(a, memories=memories, return_state=True)
    for name in NAMES:
        (start,), (end,) = getattr(a["memories"], name), getattr(state.weights, name)
        close(end, moved.weights.memory[0] @ start)


@each_kind
def test_without_a_learning_rate_memories_only_fade(kind):
    a = make(lr_max=0, read="after", **kind)
    out, state = run(a, return_state=True)
    memories = {n: [w.expand(2, -1, -1, -1) for w in m] for n, m in matrices(a["memories"]).items()}
    if kind["hidden"] is None:
        # x meets the anchor, which fades, too: retention is not the same in every chunk.
        assert all((state.weights.k[0].abs() < memories["k"][0].abs()).flatten())
    a["retention_bias"] = torch.full_like(a["retention_bias"], 60.0)
    out, state = run(a, return_state=True)
    read = Rules(1.0, "gelu", "l2").read("memory", memories["memory"], a["q"].transpose(1, 2))
    close(out, read.transpose(1, 2))
    all_close([*state.weights.v], memories["v"])


@pytest.mark.parametrize("read", ["after", "before", "chunk"])
def test_causal(read):
    """Later tokens change nothing; "before" does not see the token itself."""
    a = make(read=read)
    x = torch.cat((a["x"][:, :20], a["x"][:, 20:].flip(1)), 1)
    out, other = run(a), run(a, x=x)
    assert torch.equal(out[:, :20], other[:, :20])
    assert torch.equal(out[:, 20], other[:, 20]) == (read != "after")
    assert not torch.equal(out[:, 32:], other[:, 32:])


@pytest.mark.parametrize("name", ["x", "q"])
def test_nan_stays_in_its_batch_row_and_head(name):
    a = make_float32(batch=3, heads=3)
    clean = run(a)
    a[name][1, 4, 1] = torch.nan
    inputs = [a[n].requires_grad_() for n in TOKENS]
    out = run(a)
    others = torch.ones(3, 3, dtype=torch.bool)
    others[1, 1] = False
    assert torch.equal(out.transpose(1, 2)[others], clean.transpose(1, 2)[others])
    for x in torch.autograd.grad(out.sum(), inputs):
        assert torch.isfinite(x.transpose(1, 2)[others]).all()


# ---- extremes ------------------------------------------------------------------------------------


@each_kind
@each_backend
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize(
    ("retention_bias", "lr_bias"),
    [(-200.0, -3.0), (-12.0, -3.0), (12.0, -3.0), (200.0, -200.0), (200.0, -4.0), (-1.0, 200.0)],
)
def test_exact_at_the_extremes_of_the_gates(kind, backend, repeats, retention_bias, lr_bias):
    """Retention of 0 and 1, which underflows within a chunk or not at all, and eta = lr_max = 1
    with keys of length 1, also one that repeats: in float32 as exact as the definition in float32,
    since nothing is divided by what may vanish."""
    options = {"batch": 1, "tokens": 80, "chunk_size": 64, **kind}
    a, exact = make_float32(**options), make(**options)
    for arguments in (a, exact):
        arguments["retention_bias"] = torch.full_like(arguments["retention_bias"], retention_bias)
        arguments["lr_bias"] = torch.full_like(arguments["lr_bias"], lr_bias)
        if repeats:
            arguments["x"] = arguments["x"][:, :1].expand(-1, 80, -1, -1)

    def results(arguments, device="cpu"):
        arguments = _pytree.tree_map(
            lambda x: (
                x.detach().to(device).requires_grad_() if isinstance(x, torch.Tensor) else x
            ),
            arguments,
        )
        out, state = run(arguments, return_state=True)
        outputs = [out, *float_leaves(state.weights)]
        loss = sum(x.square().sum() for x in outputs)
        gradients = torch.autograd.grad(loss, float_leaves(arguments))
        return [x.cpu() for x in (*outputs, *gradients)]

    ours = results(a, device_of(backend))
    with testing.backend("reference"):
        truth, torchs = results(exact), results(a)
    for x, y, reference in zip(truth, ours, torchs, strict=True):
        assert torch.isfinite(y).all()
        allowed = 4 * (reference - x).norm() + 1e-5 * x.norm() + 1e-6 * math.sqrt(x.numel())
        assert (y - x).norm() <= allowed


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-4])
def test_keys_next_to_nothing(scale):
    """Below 1e-6 a key is divided by 1e-6 instead of its length, and its gradient knows."""
    a = make(tokens=9, hidden=None)
    a["x"] = a["x"] * scale
    leaves = [a["x"].requires_grad_(), a["memories"].k[0].requires_grad_()]
    gradients = torch.autograd.grad(run(a).square().sum(), leaves)
    with testing.backend("reference"):
        all_close(gradients, torch.autograd.grad(run(a).square().sum(), leaves))


@pytest.mark.parametrize("sizes", [{"heads": 0}, {"dim": 0}, {"batch": 0, "heads": 0}])
def test_nothing_to_do(sizes):
    a = make_float32(**sizes)
    a["x"].requires_grad_()
    out = run(a)
    assert out.shape == a["x"].shape
    out.sum().backward()


# ---- torch ---------------------------------------------------------------------------------------


def operator_tensors(a):
    """What `self_modifying_memory` would give its operator of these arguments (batch 2)."""
    state = a.get("state")
    if state is None:
        start = [w.expand(2, -1, -1, -1).clone() for w in float_leaves(a["memories"])]
        anchor, position = [], None
    else:
        start, anchor = float_leaves(state.weights), float_leaves(state.anchor)
        position = state.position
    biases = [a[n].expand(2, -1).clone() for n in ("lr_bias", "retention_bias")]
    return [a["x"], a["q"], start, *biases, anchor, position, None]


OPTIONS = (16, 1.0, "gelu", "l2", "before", 2)


@pytest.mark.parametrize("options", [{}, {"hidden": None}, {"positions": [3, 16]}])
def test_opcheck(options):
    operators = _load.operators()
    inputs = operator_tensors(make_float32(tokens=20, **options))
    for x in float_leaves(inputs):
        x.requires_grad_()
    torch.library.opcheck(operators.selfmod, (*inputs, *OPTIONS))
    with torch.no_grad():
        *out, checkpoints = operators.selfmod(*inputs, *OPTIONS)
    inputs = _pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, inputs)
    cotangents = _pytree.tree_map(torch.randn_like, out)
    torch.library.opcheck(operators.selfmod_backward, (*cotangents, *inputs, checkpoints, *OPTIONS))


def test_the_operator_itself_protects_memory():
    """A caller of torch.ops with a gradient of the wrong shape gets an error, not other memory."""
    tensors, operators = operator_tensors(make_float32()), _load.operators()
    start, *_ = tensors[2]
    o, *_, checkpoints = operators.selfmod(*tensors, *OPTIONS)
    for gradients in (
        (o[:, 1:], [], []),
        (None, [start] * 10, []),
        (None, [], [start[:1]] * 10),
        (None, [start], []),
    ):
        with pytest.raises(ValueError, match=r"expected shape|expected as many matrices"):
            operators.selfmod_backward(*gradients, *tensors, checkpoints, *OPTIONS)
    with pytest.raises(ValueError, match="checkpoints: not those of this forward"):
        operators.selfmod_backward(o, [], [], *tensors, checkpoints[1:], *OPTIONS)
    with pytest.raises(ValueError, match="weights: expected one or two matrices for each"):
        operators.selfmod(*tensors[:2], tensors[2][:7], *tensors[3:], *OPTIONS)


def test_autocast():
    """x and q go to the autocast dtype; memories and biases to float32."""
    a = make_float32()
    rounded = {n: a[n].bfloat16() for n in TOKENS}
    half = a["memories"]._map(torch.Tensor.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, mixed = run(a), run(a, memories=half, lr_bias=a["lr_bias"].bfloat16())
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert torch.equal(out, run(a, **rounded))


@each_kind
def test_compiled_with_dynamic_shapes(kind):
    torch._dynamo.reset()
    compiled = torch.compile(
        hope_ext.self_modifying_memory, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for length in (20, 33):
        a = make_float32(tokens=length, **kind)
        out, state = compiled(**a, return_state=True)
        expected, expected_state = run(a, return_state=True)
        torch.testing.assert_close(out, expected)
        all_close(state, expected_state)


def test_memory_grows_with_inputs_only():
    """The training forward keeps less than x and q, and a few states, beside its inputs: the five
    memories are larger than a chunk's rows."""
    for dtype in (torch.float32, torch.bfloat16):
        saved = []
        a = make(dtype, batch=1, tokens=2048, heads=1, dim=64, hidden=64, chunk_size=64)
        own = {x.untyped_storage().data_ptr() for x in float_leaves(a)}
        a["x"].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, s=saved: s.append(x) or x, lambda x: x
        ):
            run(a)
        extra = sum(
            x.untyped_storage().nbytes() for x in saved if x.untyped_storage().data_ptr() not in own
        )
        state = sum(w.nbytes for w in float_leaves(a["memories"]))
        assert 0 < extra <= a["x"].nbytes + a["q"].nbytes + 2 * state
