"""hope.optim: each rule against its equation, and the special cases that are torch's optimizers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from hope.optim import DGD, DMGD, M3, DeltaMomentum, MultiFrequency, Muon, PreconditionedMomentum
from networks import batches, network, parameters, train
from torch import Tensor, nn
from torch.nn import functional as F

import hope_ext

Make = Callable[[nn.Module], torch.optim.Optimizer]


def same_training(make: Make, make_other: Make, steps: int = 7, tolerance: float = 1e-12) -> None:
    """Two optimizers do the same to a network."""
    one = network()
    other = copy.deepcopy(one)
    start = parameters(one)
    train(one, make(one), batches(steps))
    train(other, make_other(other), batches(steps))
    for a, b, before in zip(parameters(one), parameters(other), start, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
        assert (a - before).abs().max() > 1e-3, "nothing has moved"


# ---- special cases ------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_multi_frequency_of_period_1_is_torchs(weight_decay):
    options = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": weight_decay}
    same_training(
        lambda m: MultiFrequency(m.parameters(), **options),
        lambda m: torch.optim.AdamW(m.parameters(), **options),
    )
    same_training(
        lambda m: MultiFrequency(m.parameters(), 0.02, rule="sgd", weight_decay=weight_decay),
        lambda m: torch.optim.SGD(m.parameters(), 0.02, weight_decay=weight_decay),
    )


def test_multi_frequency_has_adamws_defaults():
    same_training(
        lambda m: MultiFrequency(m.parameters()), lambda m: torch.optim.AdamW(m.parameters())
    )


def test_preconditioned_momentum_is_the_heavy_ball():
    same_training(
        lambda m: PreconditionedMomentum(m.parameters(), 0.02, alpha=0.8),
        lambda m: torch.optim.SGD(m.parameters(), 0.02, momentum=0.8),
    )


def test_a_diagonal_preconditioner_without_momentum_is_adam():
    same_training(
        lambda m: PreconditionedMomentum(
            m.parameters(), 0.02, alpha=0, preconditioner="diagonal", beta2=0.9
        ),
        lambda m: torch.optim.Adam(m.parameters(), 0.02, betas=(0.0, 0.9)),
    )


def test_a_function_as_preconditioner():
    """The sign of the gradient: given as a matrix, also of vectors."""
    shapes = set()

    def sign(g: Tensor) -> Tensor:
        shapes.add(tuple(g.shape))
        return g.sign()

    model = network()
    start = parameters(model)
    train(
        model,
        PreconditionedMomentum(model.parameters(), 0.02, alpha=0, preconditioner=sign),
        batches(1),
    )
    for before, parameter in zip(start, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), before - 0.02 * parameter.grad.sign())
    assert shapes == {(8, 6), (1, 8), (3, 4), (1, 3)}


@pytest.mark.parametrize("preconditioner", [None, "diagonal"])
def test_delta_momentum_without_beta_is_preconditioned_momentum(preconditioner):
    same_training(
        lambda m: DeltaMomentum(m.parameters(), 0.02, beta=0, preconditioner=preconditioner),
        lambda m: PreconditionedMomentum(m.parameters(), 0.02, preconditioner=preconditioner),
    )


def test_a_matrix_as_memory_is_the_heavy_ball():
    same_training(
        lambda m: DMGD(m.parameters(), lr=1, eta=0.02, alpha=0.8),
        lambda m: torch.optim.SGD(m.parameters(), 0.02, momentum=0.8),
    )


def test_a_matrix_as_memory_with_newton_schulz_is_muon():
    """torch's computes in bfloat16, which is as far as they differ."""
    torch.manual_seed(0)
    one = [nn.Parameter(torch.randn(12, 20)), nn.Parameter(torch.randn(9, 9))]
    other = copy.deepcopy(one)
    start = copy.deepcopy(one)
    ours = DMGD(one, lr=0.1, alpha=0.8, eta=0.2, sigma="newton_schulz")
    muon = Muon(other, lr=0.1, momentum=0.8, nesterov=False, weight_decay=0)
    for _ in range(6):
        for a, b in zip(one, other, strict=True):
            a.grad = b.grad = torch.randn_like(a)
        ours.step()
        muon.step()
    for a, b, before in zip(one, other, start, strict=True):
        assert (a - b).norm() < 0.02 * (a - before).norm()


@pytest.mark.parametrize("form", ["ema", "printed"])
def test_m3_of_vectors_without_slow_momentum(form):
    """Is Adam; or, as printed, sums in place of its averages."""

    def by_hand(model: nn.Module) -> torch.optim.Optimizer:
        if form == "ema":
            return torch.optim.Adam(model.parameters(), 0.02, betas=(0.8, 0.9))
        return _Sums(model.parameters(), {})

    class _Sums(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                state["m"] = state.get("m", 0) + 0.8 * p.grad
                state["v"] = state.get("v", 0) + 0.9 * p.grad.square()
                p -= 0.02 * state["m"] / (state["v"].sqrt() + 1e-8)

    def vectors(seed=0):
        torch.manual_seed(seed)
        return _Product(nn.Parameter(torch.randn(6, dtype=torch.float64)))

    one, other = vectors(), vectors()
    train(one, M3(one.parameters(), 0.02, b1=0.8, b2=0.9, a=0, form=form), batches(7))
    train(other, by_hand(other), batches(7))
    torch.testing.assert_close(one.vector, other.vector, rtol=0, atol=1e-12)


class _Product(nn.Module):
    def __init__(self, vector: nn.Parameter):
        super().__init__()
        self.vector = vector

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.vector).sum(1, keepdim=True)


# ---- equations ----------------------------------------------------------------------------------


def gradients(shape: tuple[int, ...], count: int, seed: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=draw, dtype=torch.float64)


def stepped(make: Callable, start: Tensor, grads: Tensor) -> Tensor:
    """A parameter after a step with every gradient."""
    parameter = nn.Parameter(start.clone())
    optimizer = make([parameter])
    for g in grads:
        parameter.grad = g.clone()
        optimizer.step()
    return parameter.detach()


def as_matrix(x: Tensor) -> Tensor:
    return x.reshape(1, -1) if x.dim() == 1 else x.flatten(1)


@pytest.mark.parametrize("shape", [(5, 8), (8, 3), (7,), (3, 2, 2)])
def test_delta_momentum(shape):
    lr, alpha, beta = 0.1, 0.8, 0.6
    start, *grads = gradients(shape, 6)
    w, m = as_matrix(start).clone(), torch.zeros_like(as_matrix(start))
    for g in map(as_matrix, grads):
        u = g / g.norm()
        m = m @ (alpha * torch.eye(g.shape[1], dtype=g.dtype) - beta * u.mT @ u) - lr * g
        w = w + m
    ours = stepped(lambda p: DeltaMomentum(p, lr, alpha=alpha, beta=beta), start, grads)
    torch.testing.assert_close(as_matrix(ours), w, rtol=0, atol=1e-12)


def test_delta_momentum_cannot_expand():
    """Whatever the gradients' size, once they are 0 the momentum only shrinks."""
    parameter = nn.Parameter(torch.zeros(4, 6))
    optimizer = DeltaMomentum([parameter], lr=0.0, alpha=1.0, beta=1.0)
    draw = torch.Generator().manual_seed(0)
    parameter.grad = torch.randn(4, 6, generator=draw)
    optimizer.step()
    optimizer.state[parameter]["momentum"].normal_(generator=draw)
    norms = []
    for _ in range(20):
        parameter.grad = 1e3 * torch.randn(4, 6, generator=draw)
        optimizer.step()
        norms.append(optimizer.state[parameter]["momentum"].norm().item())
    assert all(b <= a for a, b in itertools.pairwise(norms))


@pytest.mark.parametrize("shape", [(5, 8), (8, 3), (7,), (3, 2, 2), (1, 1)])
@pytest.mark.parametrize("sigma", [None, "newton_schulz"])
def test_deep_momentum(shape, sigma):
    """The memory's step by autograd."""
    lr, eta, alpha, hidden = 0.1, 0.7, 0.9, 5
    start, *grads = gradients(shape, 5)
    w = as_matrix(start).clone()
    draw = torch.Generator().manual_seed(2)
    w1 = torch.randn(w.shape[1], hidden, generator=draw, dtype=w.dtype)
    w2 = torch.zeros(hidden, w.shape[1], dtype=w.dtype)

    def memory(keys, w1, w2):
        return F.gelu(keys @ w1, approximate="tanh") @ w2

    for g in map(as_matrix, grads):
        lengths = g.norm(dim=1, keepdim=True)
        keys = g / lengths
        weights = [x.requires_grad_() for x in (w1, w2)]
        loss = 0.5 * (memory(keys, *weights) + g).square().sum(1).mean()
        steps = torch.autograd.grad(loss, weights)
        w1, w2 = ((alpha * x - eta * step).detach() for x, step in zip(weights, steps, strict=True))
        output = lengths * memory(keys, w1, w2)
        w = w + lr * (output if sigma is None else hope_ext.newton_schulz(output))

    options = {"eta": eta, "alpha": alpha, "hidden": hidden, "seed": 2, "sigma": sigma}
    ours = stepped(lambda p: DMGD(p, lr, memory="mlp", **options), start, grads)
    torch.testing.assert_close(as_matrix(ours), w, rtol=0, atol=1e-9)


def test_a_row_of_zeros_is_no_direction():
    start = torch.ones(3, 4)
    grads = torch.ones(1, 3, 4)
    grads[0, 1] = 0
    ours = stepped(lambda p: DMGD(p, 0.1, memory="mlp", hidden=5), start, grads)
    assert torch.isfinite(ours).all()
    assert torch.equal(ours[1], start[1])


@pytest.mark.parametrize("lr", [0.1, 5.0])
def test_delta_gradient_descent(lr):
    model = network()
    x, y = batches(2)
    optimizer = DGD(model.parameters(), model, lr=lr)
    linear, convolution = model[0], model[3]
    w, bias, others = (z.detach().clone() for z in (linear.weight, linear.bias, convolution.weight))
    for inputs in (x, y):  # gradients of two batches are accumulated
        model(inputs).square().mean().backward()
    with torch.no_grad():
        model(100 * x)  # nobody learns from it
    optimizer.step()
    units = F.normalize(torch.cat((x, y)), dim=1)
    mean = sum(torch.outer(unit, unit) for unit in units) / len(units)
    rate = lr / (1 + lr)
    expected = w @ (torch.eye(6, dtype=w.dtype) - rate * mean) - rate * linear.weight.grad
    torch.testing.assert_close(linear.weight.detach(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(linear.bias.detach(), bias - lr * linear.bias.grad)
    torch.testing.assert_close(convolution.weight.detach(), others - lr * convolution.weight.grad)


def test_dgd_without_inputs_is_an_error():
    model = network()
    optimizer = DGD(model.parameters(), model)
    train(model, optimizer, batches(1))
    with pytest.raises(RuntimeError, match="no inputs of the linear layer '0' were seen"):
        optimizer.step()
    optimizer.close()
    with pytest.raises(RuntimeError, match="no inputs"):
        train(model, optimizer, batches(1))


@pytest.mark.parametrize("shape", [(5, 8), (7,)])
@pytest.mark.parametrize("form", ["ema", "printed"])
def test_m3(form, shape):
    lr, b1, b2, b3, a, f = 0.1, 0.8, 0.9, 0.7, 0.3, 3
    start, *grads = gradients(shape, 9)
    w, fast, square, slow, recent = (torch.zeros_like(start) for _ in range(5))
    slow_direction = torch.zeros_like(start)
    w += start

    def direction(x):
        return hope_ext.newton_schulz(x) if x.dim() == 2 else x

    for i, g in enumerate(grads, 1):
        recent = recent + g
        if form == "printed":
            fast, square = fast + b1 * g, square + b2 * g * g
            fast_now, square_now = fast, square
        else:
            fast, square = b1 * fast + (1 - b1) * g, b2 * square + (1 - b2) * g * g
            fast_now, square_now = fast / (1 - b1**i), square / (1 - b2**i)
        if i % f == 0:
            if form == "printed":
                slow = slow + b3 * recent
                slow_direction = direction(slow)
            else:
                slow = b3 * slow + (1 - b3) * recent
                slow_direction = direction(slow / (1 - b3 ** (i // f)))
            recent = torch.zeros_like(g)
        w = w - lr * (direction(fast_now) + a * slow_direction) / (square_now.sqrt() + 1e-8)
    options = {"b1": b1, "b2": b2, "b3": b3, "a": a, "f": f, "form": form}
    ours = stepped(lambda p: M3(p, lr, **options), start, grads)
    torch.testing.assert_close(ours, w, rtol=0, atol=1e-10)
