"""How a case is evaluated, and how exact it has to be: for tests/test_ops.py and the emulator's
checks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import pytest
import torch
from backends import device_of
from torch import Tensor
from torch.utils import _pytree

from hope_ext import testing
from hope_ext.testing import Case


def is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def float_leaves(tree) -> list[Tensor]:
    return [x for x in _pytree.tree_leaves(tree) if is_float(x)]


def evaluate(
    case: Case,
    arguments: dict,
    backend: str,
    product_dtype: torch.dtype | None = None,
    *,
    trains: bool = True,
    dtypes: Sequence[torch.dtype] = (),
) -> list[tuple[str, Tensor]]:
    """All outputs, final states and, of an operator that has them, gradients of one random scalar
    of them, named.

    Outputs twice, since kernels go other ways where nobody differentiates; once if not `trains`.
    `dtypes` are those that the gradients of the outputs are rounded to, if not the outputs' own.
    """
    trains = trains and case.differentiable
    arguments = _pytree.tree_map(
        lambda x: x.detach().requires_grad_(trains) if is_float(x) else x, arguments
    )
    leaves = float_leaves(arguments)
    outputs, gradients = [], []
    with testing.backend(backend, product_dtype):

        def call() -> list[Tensor]:
            return float_leaves(case.function(**case.returning_everything(arguments)))

        if trains:
            outputs = call()
            draw = torch.Generator().manual_seed(7)
            cotangents = [
                torch.randn(x.shape, generator=draw).to(dtype)
                for x, dtype in zip(outputs, dtypes or [x.dtype for x in outputs], strict=True)
            ]
            gradients = torch.autograd.grad(
                [x for x in outputs if x.requires_grad],
                leaves,
                [g.to(x) for x, g in zip(outputs, cotangents, strict=True) if x.requires_grad],
                allow_unused=True,
            )
        untrained = outputs
        if not trains or backend not in ("reference", "rounded"):
            with torch.no_grad():
                untrained = call()
    results = [(f"output {i}", x.detach()) for i, x in enumerate(outputs)]
    results += [(f"output {i} without gradient", x.detach()) for i, x in enumerate(untrained)]
    for i, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=bool(gradients))):
        results.append((f"gradient {i}", torch.zeros_like(leaf) if gradient is None else gradient))
    return results


def to_float64(tree):
    return _pytree.tree_map(lambda x: x.double().cpu() if is_float(x) else x, tree)


class Bound(NamedTuple):
    """What a result may err by."""

    name: str
    truth: Tensor
    dtype: torch.dtype
    torchs: float  # error

    @property
    def allowed(self) -> float:
        floor = 2 * torch.finfo(self.dtype).eps * self.truth.norm()
        return 2 * self.torchs + floor.item() + 1e-7 * self.truth.numel() ** 0.5


def torchs_errors(
    case: Case, arguments: dict, dtype: torch.dtype, *, trains: bool = True
) -> list[Bound]:
    """The float64 definition's results, and how far torch itself is from them in this dtype."""
    on_cpu = _pytree.tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, arguments)
    own = ("reference", None) if dtype == torch.float32 else ("rounded", dtype)
    torchs = evaluate(case, on_cpu, *own, trains=trains)
    # The definition starts from the same gradients of the outputs, digit for digit.
    dtypes = [x.dtype for name, x in torchs if re.fullmatch(r"output \d+", name)]
    exact = evaluate(case, to_float64(on_cpu), "reference", trains=trains, dtypes=dtypes)
    return [
        Bound(name, truth, x.dtype, (x.double() - truth).norm().item())
        for (name, truth), (_, x) in zip(exact, torchs, strict=True)
    ]


HALF, DRAWS, BEYOND_DOUBT = 4, 8, 4


def assert_as_good_as_torch(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    *,
    trains: bool = True,
    bounds: list[Bound] | None = None,
    first: list[tuple[str, Tensor]] | None = None,
    draws: int = DRAWS,
) -> None:
    """Errors against the float64 definition are at most twice torch's own in this dtype.

    A result may be a few numbers with a common error, and torch's own small by luck. So if the
    first draw of the inputs speaks against us, the errors of several are added up, ours and
    torch's, unless there is no doubt. `bounds` are those of the first draw, if they are known, and
    `first` are its results. With fewer `draws` a doubt that is left counts for us.
    """
    ours, torchs, allowed, numbers = {}, {}, {}, {}
    for seed in range(draws):
        arguments = case.make(dtype, device_of(backend), seed=seed)
        if seed or bounds is None:
            bounds = torchs_errors(case, arguments, dtype, trains=trains)
        known = first if seed == 0 else None
        results = known or evaluate(case, arguments, backend, trains=trains)
        for (name, x), bound in zip(results, bounds, strict=True):
            assert (x.shape, x.dtype) == (bound.truth.shape, bound.dtype), name
            error = (x.cpu().double() - bound.truth).norm().item()
            numbers[name] = max(1, x.numel())
            ours[name] = math.hypot(ours.get(name, 0), error)
            torchs[name] = math.hypot(torchs.get(name, 0), bound.torchs)
            allowed[name] = math.hypot(allowed.get(name, 0), bound.allowed)
        bad = [name for name in ours if not ours[name] <= allowed[name]]  # or NaN
        if not bad and seed in (0, HALF - 1, DRAWS - 1):
            return
        for name in bad:
            # Torch's own error of a single number is often hardly anything.
            doubt = BEYOND_DOUBT * max(1, 16 / numbers[name])
            if seed == DRAWS - 1 or not ours[name] <= doubt * allowed[name]:
                raise AssertionError(
                    f"{name}: error {ours[name]:.3g}, torch's {torchs[name]:.3g} ({seed + 1} draws)"
                )


def assert_devices_do_not_show(
    case: Case,
    arguments: dict,
    devices: Iterable[Mapping[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The emulated kernels give the same bits whatever the device's settings are."""
    expected = evaluate(case, arguments, "emulated")
    for settings in devices:
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            results = evaluate(case, arguments, "emulated")
        for (name, a), (_, b) in zip(results, expected, strict=True):
            assert torch.equal(a, b), f"{settings}: {name}"
