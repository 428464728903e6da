"""Facts of the multi-frequency step: torch's optimizers, periods, layouts, torch, refusals."""

import math

import pytest
import torch
from backends import BACKENDS, device_of, each_backend
from torch import Tensor, nn

import hope_ext
from hope_ext import _load
from hope_ext.testing import multifreq_inputs
from hope_ext.testing.multifreq import stepped

each_backend_and_dtype = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(backend, dtype, id=f"{backend}-{dtype}")
        for backend in BACKENDS
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
        if backend == "cpu" or dtype != torch.float64
    ],
    indirect=["backend"],
)
RULES = ("adamw", "sgd")
OPTIONS = {"lr": 0.02, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.3}


class Run:
    """Parameters with a fresh state, stepped with the gradients that a test gives."""

    def __init__(self, backend, dtype, rule, periods, seed=0, **options):
        draw = torch.Generator().manual_seed(seed)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shapes = [(7, 5), (300,), (2, 3, 4), (1,)][: len(periods)]
        self.params = [torch.randn(s, generator=draw).to(device_of(backend), dtype) for s in shapes]
        self.pending, self.means, self.squares = (
            [torch.zeros_like(p, dtype=wide) for p in self.params] for _ in range(3)
        )
        self.periods, self.draw = list(periods), draw
        self.options = {**OPTIONS, **options, "rule": rule}
        self.steps = 0

    def gradients(self) -> list[Tensor]:
        return [torch.randn(p.shape, generator=self.draw).to(p) for p in self.params]

    def step(self, gradients: list[Tensor]) -> None:
        self.steps += 1
        moments = (self.means, self.squares) if self.options["rule"] == "adamw" else ([], [])
        hope_ext.multi_frequency_step_(
            self.params, gradients, self.pending, *moments, self.periods, self.steps, **self.options
        )


# ---- torch's optimizers -------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("rule", RULES)
@each_backend_and_dtype
def test_periods_of_1_are_torchs_optimizer(backend, dtype, rule, weight_decay):
    """To rounding of the parameters; in bfloat16 torch rounds more, and is run in float32."""
    run = Run(backend, dtype, rule, [1, 1, 1], weight_decay=weight_decay)
    wide = torch.promote_types(dtype, torch.float32)
    theirs = [nn.Parameter(p.to(wide, copy=True)) for p in run.params]
    if rule == "adamw":
        betas = (OPTIONS["beta1"], OPTIONS["beta2"])
        adamw = {"betas": betas, "eps": OPTIONS["eps"], "weight_decay": weight_decay}
        optimizer = torch.optim.AdamW(theirs, lr=OPTIONS["lr"], **adamw)
    else:
        optimizer = torch.optim.SGD(theirs, lr=OPTIONS["lr"], weight_decay=weight_decay)
    steps = 20
    for _ in range(steps):
        gradients = run.gradients()
        run.step(gradients)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.to(wide)
        optimizer.step()
    tolerance = steps * torch.finfo(dtype).eps
    for ours, parameter in zip(run.params, theirs, strict=True):
        torch.testing.assert_close(
            ours.to(wide), parameter.detach(), rtol=tolerance, atol=4 * tolerance
        )
    assert not any(p.any() for p in run.pending)


# ---- periods ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@each_backend
def test_a_parameter_moves_when_its_period_is_over(backend, rule):
    periods = [1, 2, 3, 4]
    run = Run(backend, torch.float32, rule, periods)
    for step in range(1, 13):
        before = [p.clone() for p in run.params]
        run.step(run.gradients())
        for i, period in enumerate(periods):
            due = step % period == 0
            assert torch.equal(run.params[i], before[i]) != due
            assert run.pending[i].any() != due


@pytest.mark.parametrize("rule", RULES)
@each_backend
def test_a_slow_parameter_takes_the_steps_of_its_period_at_once(backend, rule):
    """The sum of the directions that the rule gives at the parameter that stands still."""
    period, lr = 4, OPTIONS["lr"]
    run = Run(backend, torch.float32, rule, [period], weight_decay=0.0)
    (start,) = (p.double().clone() for p in run.params)
    total, mean, square = (torch.zeros_like(start) for _ in range(3))
    for i in range(1, period + 1):
        gradients = run.gradients()
        run.step(gradients)
        g = gradients[0].double()
        if rule == "sgd":
            total += g
            continue
        mean = OPTIONS["beta1"] * mean + (1 - OPTIONS["beta1"]) * g
        square = OPTIONS["beta2"] * square + (1 - OPTIONS["beta2"]) * g * g
        mean_hat = mean / (1 - OPTIONS["beta1"] ** i)
        square_hat = square / (1 - OPTIONS["beta2"] ** i)
        total += mean_hat / (square_hat.sqrt() + OPTIONS["eps"])
    torch.testing.assert_close(run.params[0].double(), start - lr * total, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@each_backend_and_dtype
def test_without_pending_tensors_the_bits_are_the_same(backend, dtype, rule):
    """Where the period is 1 they are zeros all the time."""
    one, other = (Run(backend, dtype, rule, [1, 2, 1]) for _ in range(2))
    other.pending[0], other.pending[2] = (other.pending[0].new_empty(0) for _ in range(2))
    for _ in range(5):
        gradients = one.gradients()
        one.step(gradients)
        other.step(gradients)
    assert all(map(torch.equal, one.params, other.params))


@each_backend
def test_a_parameter_does_not_notice_the_others(backend):
    """Its bits do not depend on where it begins in the line of all elements."""
    a = multifreq_inputs(torch.float32, device_of(backend), **_MANY)
    together = stepped(**a)
    names = ("params", "pending", "exp_avgs", "exp_avg_sqs")
    for i in range(len(a["params"])):
        lists = {name: a[name][i : i + 1] for name in (*names, "grads", "periods")}
        alone = stepped(**{**a, **lists})
        for (x,), several in zip(alone, together, strict=True):
            assert torch.equal(x, several[i])


_MANY = {"shapes": [(n,) for n in (1, 40000, 3, 0, 17, 20001, 5)], "periods": [1, 2, 3, 1, 4, 1, 2]}


@each_backend
@pytest.mark.parametrize("name", ["params", "grads", "pending", "exp_avgs", "exp_avg_sqs"])
def test_one_tensor_may_lie_otherwise(backend, name):
    """A transposed parameter with a contiguous gradient, or the other way round."""
    arguments = multifreq_inputs(
        torch.float32, device_of(backend), shapes=[(3, 5)], periods=[2], step=2
    )
    expected = stepped(**arguments)
    arguments[name] = [x.mT.contiguous().mT for x in arguments[name]]
    for a, b in zip(expected, stepped(**arguments), strict=True):
        assert torch.equal(a[0], b[0])


@each_backend
def test_more_parameters_than_a_launch_takes(backend):
    shapes = [(i % 5 + 1, 3) for i in range(300)]
    periods = [i % 3 + 1 for i in range(300)]
    a = multifreq_inputs(torch.float32, device_of(backend), shapes=shapes, periods=periods, step=2)
    with hope_ext.testing.backend("reference"):
        expected = stepped(**a)
    for xs, ys in zip(stepped(**a), expected, strict=True):
        for x, y in zip(xs, ys, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


# ---- torch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@each_backend
def test_opcheck(backend, rule):
    a = multifreq_inputs(torch.float32, device_of(backend), rule=rule)
    torch.library.opcheck(_load.operators().multifreq_, tuple(a[name] for name in _ORDER))


_ORDER = (
    *("params", "grads", "pending", "exp_avgs", "exp_avg_sqs", "periods", "step"),
    *("lr", "beta1", "beta2", "eps", "weight_decay", "rule"),
)


def test_a_saved_parameter_has_changed():
    """A backward that needs its old value says so."""
    a = multifreq_inputs(torch.float32, "cpu", periods=[1, 1, 1])
    parameter = a["params"][0].requires_grad_()
    loss = parameter.square().sum()
    hope_ext.multi_frequency_step_(**a)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_leaf_may_require_a_gradient():
    a = multifreq_inputs(torch.float32, "cpu")
    for parameter in a["params"]:
        parameter.requires_grad_()
    before = [p.detach().clone() for p in a["params"]]
    hope_ext.multi_frequency_step_(**a)
    assert all(p.requires_grad and p.is_leaf for p in a["params"])
    assert not any(map(torch.equal, a["params"], before))


@each_backend
def test_what_is_not_finite_stays_where_it_is(backend):
    a = multifreq_inputs(torch.float32, device_of(backend), **_MANY)
    expected = stepped(**a)
    a["grads"][1][7] = math.nan
    for xs, ys in zip(stepped(**a), expected, strict=True):
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            different = (x != y).nonzero().flatten().tolist()
            assert different == ([7] if i == 1 and different else [])


# ---- refusals -----------------------------------------------------------------------------------


def _bad(error, match, **changes):
    return pytest.param(error, match, changes, id=match[:45])


def _at(index, change):
    def changed(values):
        values = list(values)
        values[index] = change(values[index]) if callable(change) else change
        return values

    return changed


EACH = r"expected 3 values, one for each of params, got 2"


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        _bad(TypeError, "params: expected a list or tuple, got Tensor", params=torch.ones(3)),
        _bad(TypeError, r"params\[1\]: expected a torch.Tensor, got int", params=_at(1, 7)),
        _bad(
            TypeError,
            r"params\[0\]: expected dtype float32 or bfloat16 or float64, got float16",
            params=_at(0, Tensor.half),
        ),
        _bad(
            TypeError,
            r"params\[2\]: expected dtype float32 or bfloat16, got float64",
            params=_at(2, Tensor.double),
        ),
        _bad(
            ValueError,
            r"params\[1\]: expected a tensor on cpu, like params\[0\], got one on meta",
            params=_at(1, lambda x: x.to("meta")),
        ),
        _bad(
            ValueError,
            r"params\[2\]: expected each parameter once, got params\[0\]",
            params=lambda x: [x[0], x[1], x[0]],
        ),
        _bad(ValueError, "grads: " + EACH, grads=lambda x: x[1:]),
        _bad(
            ValueError,
            r"grads\[0\]: expected shape \[7, 5\], that of its parameter, got \[5, 7\]",
            grads=_at(0, lambda x: x.mT),
        ),
        _bad(TypeError, r"grads\[1\]: expected a torch.Tensor, got NoneType", grads=_at(1, None)),
        _bad(
            TypeError,
            r"pending\[0\]: expected dtype float32, got bfloat16",
            pending=_at(0, Tensor.bfloat16),
        ),
        _bad(
            ValueError,
            r"pending\[1\]: expected shape \[33\], that of its parameter, got \[0\]",
            pending=_at(1, torch.empty(0)),
        ),
        _bad(ValueError, "exp_avgs: " + EACH, exp_avgs=lambda x: x[1:]),
        _bad(TypeError, "exp_avg_sqs: expected a list or tuple, got NoneType", exp_avg_sqs=None),
        _bad(
            TypeError,
            r"exp_avg_sqs\[2\]: expected dtype float32, got float64",
            exp_avg_sqs=_at(2, Tensor.double),
        ),
        _bad(ValueError, "periods: " + EACH, periods=[1, 2]),
        _bad(
            ValueError,
            r"periods\[1\]: expected a positive integer below 2\*\*31, got 0",
            periods=[1, 0, 1],
        ),
        _bad(TypeError, r"periods\[2\]: expected a positive integer, got 1.0", periods=[1, 1, 1.0]),
        _bad(ValueError, r"step: expected a positive integer below 2\*\*31, got 0", step=0),
        _bad(TypeError, "step: expected a positive integer, got True", step=True),
        _bad(ValueError, "lr: expected a finite number, 0 or more, got -0.1", lr=-0.1),
        _bad(TypeError, "lr: expected a number, got tensor", lr=torch.tensor(0.1)),
        _bad(ValueError, r"beta1: expected a number in \[0, 1\), got 1", beta1=1),
        _bad(ValueError, r"beta2: expected a number in \[0, 1\), got nan", beta2=math.nan),
        _bad(ValueError, "eps: expected a finite number, 0 or more, got inf", eps=math.inf),
        _bad(
            ValueError, "weight_decay: expected a finite number, 0 or more, got -1", weight_decay=-1
        ),
        _bad(ValueError, "rule: expected one of 'adamw', 'sgd', got 'adam'", rule="adam"),
    ],
)
def test_refuses(error, match, changes, reference):
    arguments = multifreq_inputs(torch.float32, "cpu")
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    before = [x.clone() for x in arguments["exp_avgs"]]
    called = _load.REFERENCE if reference else _load.LIBRARY
    with _load.forced(called), pytest.raises(error, match=match):
        hope_ext.multi_frequency_step_(**arguments)
    assert all(map(torch.equal, before, arguments["exp_avgs"])), "it began to work"


def test_sgd_ignores_moments():
    """Its lists of them may be empty, and need not be."""
    a = multifreq_inputs(torch.float32, "cpu", rule="sgd")
    moments = [torch.full_like(p, math.nan) for p in a["params"]]
    with_moments = stepped(**{**a, "exp_avgs": moments, "exp_avg_sqs": moments})
    assert all(map(torch.equal, with_moments[0], stepped(**a)[0]))


@each_backend
def test_the_operator_itself_protects_memory(backend):
    """Callers of torch.ops pass the public function's checks by."""
    for match, changes in {
        "grads, pending, periods, moments": {"grads": lambda x: x[1:]},
        "grads: expected shape": {"grads": _at(1, lambda x: x[1:])},
        "params, grads: expected float32 or bfloat16": {"params": _at(0, Tensor.half)},
        "pending: expected shape": {"pending": _at(1, torch.empty(0, device=device_of(backend)))},
        "exp_avgs: expected Float": {"exp_avgs": _at(1, Tensor.double)},
        "exp_avg_sqs: expected shape": {"exp_avg_sqs": _at(2, lambda x: x[1:])},
        "periods: expected 1 or more": {"periods": _at(1, 0)},
        "step: expected 1 or more": {"step": lambda _: 0},
        "rule: unknown value 'adam'": {"rule": lambda _: "adam"},
    }.items():
        a = multifreq_inputs(torch.float32, device_of(backend))
        for name, change in changes.items():
            a[name] = change(a[name])
        with pytest.raises((TypeError, ValueError), match=match):
            _load.operators().multifreq_(*(a[name] for name in _ORDER))
