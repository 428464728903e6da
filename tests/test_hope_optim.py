"""What any optimizer has to do, of each in hope.optim: resume, closures, schedulers, groups,
dtypes, and refuse what it cannot do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hope.optim import DGD, DMGD, M3, DeltaMomentum, MultiFrequency, PreconditionedMomentum
from networks import batches, network, parameters, train
from torch import Tensor, nn

import hope_ext

Make = Callable[[nn.Module], torch.optim.Optimizer]


def in_periods(model: nn.Module) -> MultiFrequency:
    first, *rest = model.parameters()
    groups = [{"params": [first], "period": 3}, {"params": rest, "period": 1}]
    return MultiFrequency(groups, lr=0.01)


OPTIMIZERS: dict[str, Make] = {
    "multi-frequency": in_periods,
    "multi-frequency-sgd": lambda m: MultiFrequency(m.parameters(), 0.01, period=2, rule="sgd"),
    "heavy-ball": lambda m: PreconditionedMomentum(m.parameters(), lr=0.01),
    "diagonal": lambda m: PreconditionedMomentum(
        m.parameters(), lr=0.01, preconditioner="diagonal"
    ),
    "delta": lambda m: DeltaMomentum(m.parameters(), lr=0.01, preconditioner="diagonal"),
    "matrix": lambda m: DMGD(m.parameters(), lr=0.01),
    "newton-schulz": lambda m: DMGD(m.parameters(), lr=0.01, sigma="newton_schulz"),
    "mlp": lambda m: DMGD(m.parameters(), lr=0.3, memory="mlp", hidden=5, alpha=0.99, eta=0.1),
    "dgd": lambda m: DGD(m.parameters(), m, lr=0.1),
    "m3": lambda m: M3(m.parameters(), lr=0.01, f=3),
    "m3-printed": lambda m: M3(m.parameters(), lr=0.01, f=3, form="printed"),
}
each = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("before", [1, 4, 5])
def test_a_run_goes_on_from_its_state(make, dtype, before):
    """Bit by bit, in the middle of a period too; states of bfloat16 parameters are float32."""
    whole = network(dtype)
    inputs = batches(10, dtype)
    train(whole, make(whole), inputs)
    first = network(dtype)
    optimizer = make(first)
    train(first, optimizer, inputs[:before])
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    second = network(dtype, seed=5)
    second.load_state_dict(saved[0])
    resumed = make(second)
    resumed.load_state_dict(saved[1])
    states = [x for state in resumed.state.values() for x in state.values()]
    assert all(x.dtype == torch.float32 for x in states if isinstance(x, Tensor))
    train(second, resumed, inputs[before:])
    assert all(map(torch.equal, parameters(second), parameters(whole)))


@each
def test_a_closure_is_called_once_with_gradients(make):
    model, (x,) = network(), batches(1)
    optimizer = make(model)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        calls.append(loss.item())
        return loss

    start = parameters(model)
    with torch.no_grad():
        losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses == calls
    assert not any(map(torch.equal, start, parameters(model)))


@each
def test_a_scheduler_sets_the_rate(make):
    """With a rate of 0 from the third step on nothing moves: not by what is new."""
    model = network()
    optimizer = make(model)
    factors = [1.0, 0.5, *[0.0] * 20]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: factors[epoch])
    rates = []
    for x in batches(20):
        rates.append(optimizer.param_groups[0]["lr"])
        train(model, optimizer, [x])
        scheduler.step()
    assert rates[1] == rates[0] / 2
    assert set(rates[2:]) == {0}
    before = parameters(model)
    train(model, optimizer, batches(1))
    for a, b in zip(parameters(model), before, strict=True):
        assert (a - b).norm() <= 0.2**2 * b.norm()  # what is left of a momentum


@each
def test_parameters_without_gradient_stay(make):
    model = network()
    optimizer = make(model)
    train(model, optimizer, batches(2))
    before = parameters(model)
    optimizer.zero_grad()
    model[0].bias.grad = torch.ones_like(model[0].bias)
    for _ in range(3):
        optimizer.step()
    same = list(map(torch.equal, before, parameters(model)))
    assert same == [True, False, True, True]


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_trains(make, dtype):
    model = network(dtype)
    (x,) = batches(1, dtype)
    target = x.sum(1, keepdim=True)
    losses = []
    optimizer = make(model)
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(p.dtype == dtype for p in model.parameters())


@each
def test_sparse_gradients_are_refused(make):
    model = network()
    optimizer = make(model)
    model(batches(1)[0]).sum().backward()
    model[0].weight.grad = model[0].weight.grad.to_sparse()
    with pytest.raises(ValueError, match="params: expected dense gradients, got one with layout"):
        optimizer.step()


def test_multi_frequency_is_one_pass_for_all_groups(monkeypatch):
    """Whatever their periods; another rate is another pass."""
    calls = []
    step = hope_ext.multi_frequency_step_

    def counted(params, *rest, **options):
        calls.append(len(params))
        return step(params, *rest, **options)

    monkeypatch.setattr(hope_ext, "multi_frequency_step_", counted)
    model = network()
    optimizer = in_periods(model)
    train(model, optimizer, batches(1))
    assert calls == [4]
    optimizer.param_groups[1]["lr"] = 0.5
    train(model, optimizer, batches(1))
    assert sorted(calls[1:]) == [1, 3]


def test_multi_frequency_keeps_nothing_pending_for_periods_of_1():
    model = network()
    optimizer = in_periods(model)
    train(model, optimizer, batches(2))
    first, *rest = model.parameters()
    assert optimizer.state[first]["pending"].any()
    assert not any("pending" in optimizer.state[p] for p in rest)
    before = first.detach().clone()
    optimizer.param_groups[0]["period"] = 1  # what was pending is not forgotten
    pending = optimizer.state[first]["pending"].clone()
    first.grad.zero_()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    torch.testing.assert_close(first.detach(), before - pending)


def test_groups_have_settings_of_their_own():
    model = network()
    first, *rest = model.parameters()
    optimizer = PreconditionedMomentum(
        [{"params": [first], "lr": 0.0}, {"params": rest, "alpha": 0.5}], lr=0.1
    )
    before = parameters(model)
    train(model, optimizer, batches(1))
    assert torch.equal(first, before[0])
    assert not torch.equal(rest[0], before[1])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "alpha": 1.0})
    assert optimizer.param_groups[-1]["lr"] == 0.1


# ---- refusals -----------------------------------------------------------------------------------


def _bad(make, error, match, **options):
    return pytest.param(make, error, match, options, id=f"{make.__name__}-{match[:30]}")


NUMBER = r": expected a number in \[0, "


@pytest.mark.parametrize(
    ("make", "error", "match", "options"),
    [
        _bad(MultiFrequency, ValueError, "lr" + NUMBER + r"inf\), got -1", lr=-1),
        _bad(MultiFrequency, TypeError, "lr: expected a number, got '1'", lr="1"),
        _bad(MultiFrequency, ValueError, "period: expected a positive integer, got 0", period=0),
        _bad(MultiFrequency, TypeError, "period: expected a positive integer, got 2.0", period=2.0),
        _bad(
            MultiFrequency,
            ValueError,
            "rule: expected one of 'adamw', 'sgd', got 'adam'",
            rule="adam",
        ),
        _bad(MultiFrequency, ValueError, "betas: expected two numbers, got 0.9", betas=0.9),
        _bad(MultiFrequency, ValueError, r"betas\[1\]" + NUMBER + r"1\), got 1", betas=(0.9, 1)),
        _bad(MultiFrequency, ValueError, "eps" + NUMBER + r"inf\), got nan", eps=math.nan),
        _bad(MultiFrequency, ValueError, "weight_decay" + NUMBER, weight_decay=-0.1),
        _bad(PreconditionedMomentum, ValueError, "alpha" + NUMBER + r"1\], got 1.1", alpha=1.1),
        _bad(
            PreconditionedMomentum,
            ValueError,
            "preconditioner: expected None, 'diagonal' or a function, got 'full'",
            preconditioner="full",
        ),
        _bad(PreconditionedMomentum, ValueError, "beta2" + NUMBER + r"1\), got 1", beta2=1),
        _bad(DeltaMomentum, ValueError, "beta" + NUMBER + r"1\], got 2", beta=2),
        _bad(DeltaMomentum, ValueError, "norm_eps" + NUMBER + r"inf\), got -1", norm_eps=-1),
        _bad(DMGD, ValueError, "eta" + NUMBER + r"inf\), got -1", eta=-1),
        _bad(DMGD, ValueError, "sigma: expected one of None, 'newton_schulz'", sigma="tanh"),
        _bad(DMGD, ValueError, "memory: expected one of 'matrix', 'mlp'", memory="linear"),
        _bad(DMGD, ValueError, "hidden: expected a positive integer, got 0", hidden=0),
        _bad(M3, ValueError, "b1" + NUMBER + r"1\), got 1.0", b1=1.0),
        _bad(M3, ValueError, "b3" + NUMBER + r"inf\), got -1", b3=-1, form="printed"),
        _bad(M3, ValueError, "form: expected one of 'ema', 'printed'", form="nesterov"),
        _bad(M3, TypeError, "f: expected a positive integer, got True", f=True),
        _bad(M3, ValueError, "a" + NUMBER + r"inf\), got -1", a=-1),
    ],
)
def test_refuses(make, error, match, options):
    good = [nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(error, match=f"^{match}"):
        make(good, **options)
    optimizer = make(good)
    with pytest.raises(error, match=f"^{match}"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    assert len(optimizer.param_groups) == 1


def test_refuses_other_dtypes_and_models():
    with pytest.raises(
        TypeError, match="params: expected float32, bfloat16 or float64, got float16"
    ):
        M3([nn.Parameter(torch.ones(2).half())])
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        DGD([nn.Parameter(torch.ones(2))], [])


@pytest.mark.parametrize("result", [lambda g: g[0], lambda g: None], ids=["shape", "nothing"])
def test_refuses_what_a_preconditioner_gives(result):
    parameter = nn.Parameter(torch.ones(2, 3))
    parameter.grad = torch.ones(2, 3)
    optimizer = PreconditionedMomentum([parameter], preconditioner=result)
    with pytest.raises(ValueError, match=r"expected it to give a tensor of shape \[2, 3\], got"):
        optimizer.step()
