"""Every optimizer trains real, small problems: those that docs/optim.md shows, with its rates."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from benchmarks import optim
from benchmarks.optim import CONTESTANTS

each = pytest.mark.parametrize("name", CONTESTANTS)

# How much of the loss above the least is left. The printed form of M3 divides by a root of a sum
# that only grows; a deep memory that is not made orthogonal learns its gradients slowly.
LEFT = {"M3, printed": 0.2, "DMGD, deep": 1e-4}


@pytest.fixture(scope="module")
def digits() -> optim.Problem:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install .[test]")
    return optim.digits()


@each
def test_a_convex_problem_with_a_known_optimum(name):
    """Linear regression: within 1e-5 of the way to the optimum of the loss."""
    data = optim.Regression.drawn()
    run = optim.train(optim.regression(), CONTESTANTS[name])
    first, last = run.curve[0][1], run.curve[-1][1]
    if name == "DGD":  # whose steps shrink weights along the inputs, too
        optimum = data.optimum_of_dgd()
        torch.testing.assert_close(run.model.weight, optimum.weight, rtol=0, atol=1e-3)
        torch.testing.assert_close(run.model.bias, optimum.bias, rtol=0, atol=1e-3)
        return
    left = LEFT.get(name, 1e-5)
    assert -1e-9 < last < left * first
    if left == 1e-5:
        torch.testing.assert_close(run.model.weight, data.optimum().weight, rtol=0, atol=0.05)


def test_the_known_optima_are_optima():
    """By gradients: of the loss, and of the loss with DGD's regression on the inputs."""
    data = optim.Regression.drawn()
    for model, regularised in ((data.optimum(), False), (data.optimum_of_dgd(), True)):
        loss = data.loss(model)
        if regularised:
            units = F.normalize(data.x, dim=1)
            loss = loss + 0.5 * (units @ model.weight.mT).square().sum(1).mean()
        loss.backward()
        assert max(p.grad.abs().max() for p in model.parameters()) < 1e-12


@each
def test_handwritten_digits(name, digits):
    """An MLP gets 9 of 10 held-out digits right; without training it is 1 of 10."""
    run = optim.train(digits, CONTESTANTS[name], every=digits.steps)
    assert run.facts["accuracy"] > 0.9
    assert math.isfinite(run.curve[-1][1])


def test_the_command_writes_curves_and_a_picture(tmp_path, capsys):
    words = ["--problems", "regression", "--steps", "20", "--out", str(tmp_path)]
    assert optim.main(words) == 0
    (path,) = tmp_path.glob("*.json")
    problem = json.loads(path.read_text())["problems"]["regression"]
    assert set(problem["runs"]) == set(CONTESTANTS)
    for run in problem["runs"].values():
        assert [step for step, _ in run["curve"]] == [0, 10, 20]
        assert run["last"] == run["curve"][-1][1]
    picture = path.with_suffix(".svg").read_text()
    assert all(name in picture for name in CONTESTANTS)
    assert str(path) in capsys.readouterr().out


def test_a_problem_is_the_same_every_time():
    problem = replace(optim.regression(), steps=10)
    one, other = (optim.train(problem, CONTESTANTS["M3"]).curve for _ in range(2))
    assert one == other
