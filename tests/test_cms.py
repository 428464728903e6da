"""Facts of the continuum memory system: its definition, states, special cases, extremes, torch."""

import itertools

import pytest
import torch
from backends import all_close, close
from laws import assert_as_good_as_torch, float_leaves
from torch.nn import functional as F
from torch.utils import _pytree

import hope_ext
from hope_ext import _load, testing
from hope_ext.testing import Case, cms_chain_inputs, cms_inputs

TOKENS = ("x", "lr", "target")
OBJECTIVES = ("l2", "dot", "teach")
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)


def make(dtype=torch.float64, **options):
    return cms_inputs(dtype, "cpu", **options)


def make_float32(**options):
    return make(torch.float32, **options)


def run(arguments, **changes):
    return hope_ext.cms_memory(**{**arguments, **changes})


def tokens(arguments, where):
    return {n: x[:, where] if n in TOKENS else x for n, x in arguments.items()}


def mlp(x, w1, w2, activation="gelu", residual=True):
    act = F.silu if activation == "silu" else lambda z: F.gelu(z, approximate="tanh")
    y = act(x @ w1) @ w2
    return x + y if residual else y


# ---- the definition ------------------------------------------------------------------------------


@each_objective
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("residual", [True, False])
def test_it_learns_by_the_gradients_of_its_tokens(objective, activation, residual):
    """One sequence, token by token, in words of its own: inner gradients by autograd."""
    a = make(
        batch=1, tokens=15, chunk_size=4, objective=objective, activation=activation,
        residual=residual,
    )  # fmt: skip
    weights, outputs = [w.clone() for w in a["weights"]], []
    gradients = [torch.zeros_like(w) for w in weights]
    for t in range(15):
        x, target, lr = a["x"][0, t], a["target"][0, t], a["lr"][0, t]
        leaves = [w.detach().requires_grad_() for w in weights]
        y = mlp(x, *leaves, activation, residual)
        loss = {
            "l2": (y - target).square().sum() / 2,
            "dot": -(y * target).sum(),
            "teach": (y * target).sum(),
        }[objective]
        for gradient, of_token in zip(gradients, torch.autograd.grad(loss, leaves), strict=True):
            gradient += lr * of_token
        outputs.append(y.detach())
        if t % 4 == 3:
            weights = [0.9 * w - g for w, g in zip(weights, gradients, strict=True)]
            gradients = [torch.zeros_like(w) for w in weights]
    for backend in ("reference", "cpu"):
        with testing.backend(backend):
            out, state = run(a, return_state=True)
        close(out[0], torch.stack(outputs))
        all_close([w[0] for w in state.weights], weights)
        all_close([p[0] for p in state.pending], gradients)
        assert state.position.tolist() == [15]


# ---- carried states and packed sequences ---------------------------------------------------------


@each_objective
@pytest.mark.parametrize("cuts", [[16], [1, 2, 5, 31, 32, 33], list(range(1, 37)), [0, 37]])
def test_split_anywhere(objective, cuts):
    arguments = make(objective=objective, positions=[5, 16])
    whole, final = run(arguments, return_state=True)
    state, pieces = arguments.pop("state"), []
    for begin, end in zip([0, *cuts], [*cuts, 37], strict=True):
        piece, state = run(tokens(arguments, slice(begin, end)), state=state, return_state=True)
        pieces.append(piece)
    close(torch.cat(pieces, 1), whole)
    all_close(state, final)
    assert state.position.tolist() == [5 + 37, 16 + 37]


@each_objective
def test_gradients_flow_through_a_carried_state(objective):
    arguments = make(objective=objective)
    leaves = [x.requires_grad_() for x in float_leaves(arguments)]

    def loss(out, state):
        return out.square().sum() + sum(w.sin().sum() for w in float_leaves(state))

    expected = torch.autograd.grad(loss(*run(arguments, return_state=True)), leaves)
    first, state = run(tokens(arguments, slice(0, 21)), return_state=True)
    second, state = run(tokens(arguments, slice(21, None)), state=state, return_state=True)
    parts = torch.cat((first, second), 1)
    all_close(torch.autograd.grad(loss(parts, state), leaves), expected)


def test_packed_sequences_are_each_alone():
    arguments = make(
        batch=1, tokens=50, bounds=[0, 7, 7, 39, 40, 50], positions=[3, 5, 16, 31, 0]
    )  # fmt: skip
    out, final = run(arguments, return_state=True)
    bounds, state = arguments.pop("cu_seqlens").tolist(), arguments.pop("state")
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        row = _pytree.tree_map(lambda x, i=i: x[i : i + 1], state)
        alone, alone_state = run(tokens(arguments, slice(begin, end)), state=row, return_state=True)
        close(out[:, begin:end], alone)
        all_close(_pytree.tree_map(lambda x, i=i: x[i : i + 1], final), alone_state)


def test_the_state():
    """A pytree; nothing is pending at a boundary; detach() truncates the gradient."""
    arguments = make(tokens=32)
    arguments["x"].requires_grad_()
    _, state = run(arguments, return_state=True)
    assert not any(p.any() for p in state.pending)
    leaves, structure = _pytree.tree_flatten(state)
    assert len(leaves) == 5
    all_close(_pytree.tree_unflatten(leaves, structure), state)
    _, state = run(tokens(arguments, slice(0, 20)), return_state=True)
    assert all(p.any() for p in state.pending)
    assert all(w.requires_grad for w in float_leaves(state))
    assert not any(w.requires_grad for w in float_leaves(state.detach()))
    all_close(state.detach(), state.to("cpu"))


def test_a_state_that_nobody_asks_for_changes_nothing():
    """Without it the last chunk is not learned: same outputs, same gradients of them."""
    for length in (11, 32, 37):
        arguments = make(tokens=length)
        leaves = [x.requires_grad_() for x in float_leaves(arguments)]
        with_state, _ = run(arguments, return_state=True)
        alone = run(arguments)
        assert torch.equal(alone, with_state)
        expected = torch.autograd.grad(with_state.square().sum(), leaves, allow_unused=True)
        all_close(torch.autograd.grad(alone.square().sum(), leaves, allow_unused=True), expected)


# ---- special cases -------------------------------------------------------------------------------


@each_objective
def test_without_rates_it_is_an_mlp_that_fades(objective):
    a = make(objective=objective)
    a["lr"] = torch.zeros_like(a["lr"])
    expected = [
        mlp(a["x"][:, i : i + 16], *(0.9 ** (i // 16) * w for w in a["weights"]))
        for i in range(0, 37, 16)
    ]
    close(run(a), torch.cat(expected, 1))


def test_a_first_chunk_is_an_mlp():
    a = make(chunk_size=37, activation="silu", residual=False)
    close(run(a), mlp(a["x"], *a["weights"], "silu", residual=False))


def test_to_teach_the_error_is_to_regress():
    """l2 is teach with y - target, and dot is teach with -target."""
    a = make(tokens=30)
    y, expected = run(a, return_state=True)
    _, state = run(a, objective="teach", target=y - a["target"], return_state=True)
    all_close(state, expected)
    _, expected = run(a, objective="dot", return_state=True)
    _, state = run(a, objective="teach", target=-a["target"], return_state=True)
    all_close(state, expected)


def test_one_step_of_sgd():
    """A chunk is a step of gradient descent with weight decay on the mean loss of its tokens."""
    a = make(batch=1, tokens=16, decay=0.0)
    a["lr"] = torch.full_like(a["lr"], 0.01)
    layers = [torch.nn.Parameter(w.clone()) for w in a["weights"]]
    optimizer = torch.optim.SGD(layers, lr=0.01 * 16 * 16)
    F.mse_loss(mlp(a["x"], *layers), a["target"]).mul(0.5).backward()  # mean over 16 features, too
    optimizer.step()
    _, state = run(a, return_state=True)
    all_close([w[0] for w in state.weights], [p.data for p in layers])


def test_a_rewritten_memory_forgets_its_start():
    """decay = 1: what a chunk finds does not depend on the weights before the last update, but
    through that update's gradient."""
    a = make(decay=1.0, objective="teach", tokens=32)
    _, state = run(a, return_state=True)
    _, first = run(tokens(a, slice(0, 16)), return_state=True)
    chunk = {n: x[:, 16:] if n in TOKENS else x for n, x in a.items()}
    for row in range(2):
        weights = [w[row].clone().requires_grad_() for w in first.weights]
        y = mlp(chunk["x"][row], *weights)
        loss = (chunk["lr"][row, :, None] * y * chunk["target"][row]).sum()
        expected = [-g for g in torch.autograd.grad(loss, weights)]
        all_close([w[row] for w in state.weights], expected)


def test_causal():
    """Later tokens and targets change nothing; a chunk's targets change the next one."""
    a = make()
    for name in TOKENS:
        changed = a[name].clone()
        changed[:, 20:] = changed[:, 20:].flip(1) * 1.5
        out, other = run(a), run(a, **{name: changed})
        assert torch.equal(out[:, :20], other[:, :20])
        assert torch.equal(out[:, 20:32], other[:, 20:32]) == (name != "x")
        assert not torch.equal(out[:, 32:], other[:, 32:])


@pytest.mark.parametrize("name", TOKENS)
def test_nan_stays_in_its_batch_row(name):
    a = make_float32(batch=3)
    clean = run(a)
    a[name][1, 4] = torch.nan
    inputs = [a[n].requires_grad_() for n in TOKENS]
    out = run(a)
    assert torch.equal(out[::2], clean[::2])
    for x in torch.autograd.grad(out.sum(), inputs):
        assert torch.isfinite(x[::2]).all()


@pytest.mark.parametrize("sizes", [{"dim": 0}, {"batch": 0}, {"batch": 0, "dim": 0}, {"tokens": 0}])
def test_nothing_to_do(sizes):
    a = make_float32(**sizes)
    a["x"].requires_grad_()
    out, state = run(a, return_state=True)
    assert out.shape == a["x"].shape
    assert state.weights[0].shape == (len(out), *a["weights"][0].shape)
    out.sum().backward()


# ---- a chain -------------------------------------------------------------------------------------


def test_a_chain_is_one_level_after_the_other():
    a = cms_chain_inputs(torch.float64, "cpu", positions=[3, 8])
    out, states = hope_ext.cms_chain(**a, return_state=True)
    x, expected = a["x"], []
    for i, chunk_size in enumerate(a["chunk_sizes"]):
        x, state = hope_ext.cms_memory(
            x, a["levels"][i], a["lrs"][i], a["targets"][i], state=a["states"][i],
            chunk_size=chunk_size, decay=0.1, return_state=True,
        )  # fmt: skip
        expected.append(state)
    assert torch.equal(out, x)
    all_close(states, tuple(expected))
    assert torch.equal(hope_ext.cms_chain(**a), x)


def test_a_chain_may_be_split():
    a = cms_chain_inputs(torch.float64, "cpu")
    whole, final = hope_ext.cms_chain(**a, return_state=True)

    def part(where):
        cut = {n: [x[:, where] for x in a[n]] for n in ("lrs", "targets")}
        return {**a, "x": a["x"][:, where], **cut}

    first, states = hope_ext.cms_chain(**part(slice(0, 13)), return_state=True)
    second, states = hope_ext.cms_chain(**part(slice(13, None)), states=states, return_state=True)
    close(torch.cat((first, second), 1), whole)
    all_close(states, final)


def test_a_chain_may_continue_some_levels_only():
    a = cms_chain_inputs(torch.float64, "cpu", positions=[3, 8])
    fresh = {**a, "states": [None, a["states"][1]]}
    out = hope_ext.cms_chain(**fresh)
    assert not torch.equal(out, hope_ext.cms_chain(**a))
    assert torch.equal(hope_ext.cms_chain(**{**a, "states": [None, None]}), hope_ext.cms_chain(
        **{**a, "states": None}
    ))  # fmt: skip


# ---- torch ---------------------------------------------------------------------------------------


def operator_tensors(a):
    """What `cms_memory` would give its operator of these arguments (batch 2)."""
    if "state" in a:
        state = a["state"]
        carried = [*state.weights, *state.pending, state.position]
    else:
        carried = [*(w.expand(2, -1, -1).clone() for w in a["weights"]), None, None, None]
    return [a["x"], a["target"], a["lr"], *carried, None]


OPTIONS = (16, "gelu", "l2", 0.1, True)


@pytest.mark.parametrize("keeps_state", [False, True])
@pytest.mark.parametrize("options", [{}, {"positions": [3, 16]}])
def test_opcheck(options, keeps_state):
    operators = _load.operators()
    inputs = operator_tensors(make_float32(**options))
    for x in float_leaves(inputs):
        x.requires_grad_()
    torch.library.opcheck(operators.cms, (*inputs, *OPTIONS, keeps_state, 2))
    with torch.no_grad():
        *out, checkpoints = operators.cms(*inputs, *OPTIONS, keeps_state, 2)
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    cotangents = [torch.randn_like(x) for x in out] if keeps_state else [torch.randn_like(out[0])]
    cotangents += [None] * (5 - len(cotangents))
    torch.library.opcheck(operators.cms_backward, (*cotangents, *inputs, checkpoints, *OPTIONS, 2))


def test_the_operator_itself_protects_memory():
    """A caller of torch.ops with a tensor of the wrong shape gets an error, not other memory."""
    tensors, operators = operator_tensors(make_float32(positions=[3, 16])), _load.operators()
    y, *_, checkpoints = operators.cms(*tensors, *OPTIONS, True, 2)
    none = (None,) * 4
    for gradients in ((y[:, 1:], *none), (None, tensors[4], *none[:3]), (*none, tensors[3])):
        with pytest.raises(ValueError, match="expected shape"):
            operators.cms_backward(*gradients, *tensors, checkpoints, *OPTIONS, 2)
    with pytest.raises(ValueError, match="checkpoints: not those of this forward"):
        operators.cms_backward(y, *none, *tensors, checkpoints[1:], *OPTIONS, 2)
    for i, tensor in enumerate(tensors[:8]):
        for wrong in (tensor[1:], tensor.to(torch.float16)):
            changed = [*tensors[:i], wrong, *tensors[i + 1 :]]
            with pytest.raises((ValueError, TypeError), match="expected"):
                operators.cms(*changed, *OPTIONS, True, 2)
    with pytest.raises(ValueError, match="p1, p2: expected both or none"):
        operators.cms(*tensors[:6], None, *tensors[7:], *OPTIONS, True, 2)


def test_autocast():
    """x and target go to the autocast dtype; weights and rates to float32."""
    a = make_float32()
    rounded = {n: a[n].bfloat16() for n in ("x", "target")}
    half = tuple(w.bfloat16() for w in a["weights"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, mixed = run(a), run(a, weights=half, lr=a["lr"].bfloat16())
        chained = hope_ext.cms_chain(
            a["x"], [a["weights"]], [a["lr"]], [a["target"]], chunk_sizes=[16], decay=0.1
        )
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert torch.equal(out, run(a, **rounded))
    assert torch.equal(out, chained)


def test_compiled_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(hope_ext.cms_memory, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (20, 33, 150):
        a = make_float32(tokens=length)
        a["x"].requires_grad_()
        out, state = compiled(**a, return_state=True)
        expected, expected_state = run(a, return_state=True)
        torch.testing.assert_close(out, expected)
        all_close(state, expected_state)
        gradient, expected = (torch.autograd.grad(y.sum(), a["x"])[0] for y in (out, expected))
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_holds_at_the_sizes_of_models(dtype):
    """The law of accuracy at sizes where products have many blocks, which CASES have not."""

    def large(dtype, device, seed):
        return make(
            dtype, batch=1, tokens=300, dim=256, hidden=640, chunk_size=96, seed=seed, rate=0.5
        )  # fmt: skip

    case = Case("cms", "large", hope_ext.cms_memory, large)
    assert_as_good_as_torch(case, dtype, "cpu")


def test_memory_grows_with_the_square_root_of_the_chunks():
    """The training forward keeps the weights of every fourth of 16 chunks, beside its inputs."""
    saved, a = [], make_float32(batch=1, tokens=16 * 8, chunk_size=8)
    own = {x.untyped_storage().data_ptr() for x in float_leaves(a)}
    a["x"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        run(a)
    extra = sum(
        x.untyped_storage().nbytes() for x in saved if x.untyped_storage().data_ptr() not in own
    )
    state = sum(w.nbytes for w in a["weights"])
    assert 3 * state <= extra <= 4 * state
