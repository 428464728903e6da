"""The multi-frequency step: public function and fake kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hope_ext import _check, _load
from hope_ext.reference import multifreq as reference

NARROW, WIDE = (torch.float32, torch.bfloat16), (torch.float64,)


@torch.no_grad()
def multi_frequency_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    pending: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    periods: Sequence[int],
    step: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rule: str,
) -> None:
    """An optimizer's step in which every parameter moves at its own frequency, in one pass.

    Equation 71 of Nested Learning (arXiv 2512.24695). In step i, for every parameter p with
    gradient g:

        adamw:  m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
                direction = (m / (1 - beta1^i)) / (sqrt(v / (1 - beta2^i)) + eps) + weight_decay p
        sgd:    direction = g + weight_decay p
        pending <- pending + lr direction
        where the period divides i:   p <- p - pending,   pending <- 0

    So a slow parameter is constant for a period, while its rule sees every gradient. With periods
    of 1 "adamw" is torch.optim.AdamW, and "sgd" torch.optim.SGD without momentum. Everything is
    computed in float32 and happens in place; any strides are accepted.

    Args:
        params: float32 or bfloat16, on one device (on the CPU also float64, then all of them).
        grads: one for each, of its shape; float32 or bfloat16, which need not be the parameter's.
        pending: one for each, of its shape; float32. Where a period is 1 it may have no elements
            instead: then nothing is ever pending.
        exp_avgs: m, likewise; with the rule "sgd" they are not used, and may be none.
        exp_avg_sqs: v, likewise.
        periods: positive integers, one for each.
        step: i, from 1.
        lr, eps, weight_decay: 0 or more.
        beta1, beta2: in [0, 1).
        rule: "adamw" or "sgd".

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check.choice("rule", rule, ("adamw", "sgd"))
    _check_numbers(step, lr, beta1, beta2, eps, weight_decay)
    lists = (params, grads, pending, exp_avgs, exp_avg_sqs)
    _check_tensors(*lists, periods, rule)
    if len(params) == 0:
        return
    if rule == "sgd":
        lists = (params, grads, pending, (), ())
    # float: an int may be longer than the operator's numbers.
    rates = (float(lr), float(beta1), float(beta2), float(eps), float(weight_decay))
    arguments = (*map(list, lists), list(periods), step, *rates, rule)
    if _load.use_reference():
        reference.multifreq_(*arguments)
    else:
        _load.operators().multifreq_(*arguments)


def _check_numbers(step, lr, beta1, beta2, eps, weight_decay) -> None:
    _check.positive("step", step)
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        _check.number(name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number, 0 or more, got {value}")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        _check.number(name, value)
        if not 0 <= value < 1:
            raise ValueError(f"{name}: expected a number in [0, 1), got {value}")


def _check_tensors(params, grads, pending, exp_avgs, exp_avg_sqs, periods, rule) -> None:
    moments = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists = {"params": params, "grads": grads, "pending": pending, **moments, "periods": periods}
    for name, values in lists.items():
        if not isinstance(values, list | tuple):
            raise TypeError(f"{name}: expected a list or tuple, got {type(values).__name__}")
        unused = rule == "sgd" and name in moments and len(values) == 0
        if len(values) != len(params) and not unused:
            raise ValueError(
                f"{name}: expected {len(params)} values, one for each of params, got {len(values)}"
            )
    if not params:
        return
    first = params[0]
    wide = isinstance(first, Tensor) and first.dtype == torch.float64
    dtypes, state_dtypes = (WIDE, WIDE) if wide else (NARROW, NARROW[:1])
    expected = [("grads", grads, dtypes), ("pending", pending, state_dtypes)]
    if rule == "adamw":
        expected += [(name, values, state_dtypes) for name, values in moments.items()]
    if not torch.compiler.is_compiling():  # traced code has no identities
        _check_each_once(params)
    for i, parameter in enumerate(params):
        _check.positive(f"periods[{i}]", periods[i])
        # The first decides whether all are float64, and where.
        _check.tensor(
            f"params[{i}]",
            parameter,
            dtypes if i else (*NARROW, *WIDE),
            first.device if i else None,
            like="params[0]",
        )
        shape, device = parameter.shape, parameter.device
        for name, values, allowed in expected:
            value = values[i]
            _check.tensor(f"{name}[{i}]", value, allowed, device, like="params[0]")
            without = name == "pending" and periods[i] == 1 and value.numel() == 0
            if value.shape != shape and not without:
                raise ValueError(
                    f"{name}[{i}]: expected shape {list(shape)}, that of its parameter, got "
                    f"{list(value.shape)}"
                )


def _check_each_once(params) -> None:
    seen: dict[int, int] = {}
    for i, parameter in enumerate(params):
        if (before := seen.setdefault(id(parameter), i)) != i:
            raise ValueError(f"params[{i}]: expected each parameter once, got params[{before}]")


# ---- fake kernel ---------------------------------------------------------------------------------


def _fake(params, grads, pending, exp_avgs, exp_avg_sqs, periods, step, *rest):
    return None


def _register(library: str) -> None:
    torch.library.register_fake(f"{library}::multifreq_", _fake)


_load.register(_register)
