"""Every public operator with random sizes, dtypes and values, right ones and wrong ones.

What comes back is either what the definition gives, or a ValueError or TypeError that begins with
the argument's name; a crash would end the process. Failures print the inputs, made small.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import hope_ext
from hope_ext import testing

# More of them on demand: HOPE_FUZZ=10000 pytest tests/test_fuzz.py
EXAMPLES = int(os.environ.get("HOPE_FUZZ", "60"))
some = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="HOPE_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Operator(NamedTuple):
    """What is called, what makes its right arguments, and which options of that may be drawn."""

    function: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    options: dict[str, st.SearchStrategy]
    public: Callable[..., Any] | None = None  # whose parameters messages name; None: the function

    @property
    def parameters(self) -> set[str]:
        return set(inspect.signature(self.public or self.function).parameters)


def stepped(**arguments: Any) -> dict[str, Any]:
    """What `multi_frequency_step_` makes of a copy of its arguments."""
    copy = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, arguments)
    hope_ext.multi_frequency_step_(**copy)
    return copy


def sizes(least: int, most: int) -> st.SearchStrategy[int]:
    return st.integers(least, most)


ROWS = {"batch": sizes(0, 3), "tokens": sizes(0, 19), "seed": sizes(0, 3)}
CHUNK = {"chunk_size": st.sampled_from([1, 2, 5, 16, 40])}
ACTIVATION = {"activation": st.sampled_from(["gelu", "silu"])}
READ = {"read": st.sampled_from(["after", "before", "chunk"])}
OBJECTIVE = {"objective": st.sampled_from(["l2", "dot"])}
OPERATORS = {
    "titans_memory": Operator(
        hope_ext.titans_memory,
        testing.titans_inputs,
        {
            **{**ROWS, **CHUNK, **ACTIVATION, **READ, **OBJECTIVE},
            **{"heads": sizes(1, 3), "key": sizes(1, 20), "value": sizes(1, 20)},
            **{name: st.booleans() for name in ("momentum", "decay")},
        },
    ),
    "titans_memory, deep": Operator(
        hope_ext.titans_memory,
        lambda dtype, device, *, dim, **options: testing.titans_inputs(
            dtype, device, key=dim, value=dim, **options
        ),
        {
            **{**ROWS, **CHUNK, **ACTIVATION, **READ, "heads": sizes(1, 3), "dim": sizes(1, 20)},
            **{"hidden": st.none() | sizes(1, 20), "norm": st.booleans()},
            **{name: st.booleans() for name in ("momentum", "decay", "residual")},
        },
    ),
    "self_modifying_memory": Operator(
        hope_ext.self_modifying_memory,
        functools.partial(testing.selfmod_inputs, lr_bias=-4.0),  # or inner loops may overflow
        {
            **{**ROWS, **CHUNK, **ACTIVATION, **READ, "heads": sizes(1, 3), "dim": sizes(1, 20)},
            "hidden": st.none() | sizes(1, 20),
        },
    ),
    "cms_memory": Operator(
        hope_ext.cms_memory,
        testing.cms_inputs,
        {
            **{**ROWS, **CHUNK, **ACTIVATION, "dim": sizes(1, 20), "hidden": sizes(1, 40)},
            **{"objective": st.sampled_from(["l2", "dot", "teach"]), "residual": st.booleans()},
        },
    ),
    "cms_chain": Operator(
        hope_ext.cms_chain,
        lambda dtype, device, *, levels, **options: testing.cms_chain_inputs(
            dtype,
            device,
            hidden=[hidden for hidden, _ in levels],
            chunk_sizes=[size for _, size in levels],
            **options,
        ),
        {
            **ROWS,
            "dim": sizes(1, 20),
            "levels": st.lists(st.tuples(sizes(1, 20), sizes(1, 30)), min_size=1, max_size=3).map(
                lambda levels: sorted(levels, key=lambda level: level[1])
            ),
        },
    ),
    "causal_conv": Operator(
        hope_ext.causal_conv,
        testing.conv_inputs,
        {
            **{**ROWS, "channels": sizes(1, 40), "width": sizes(1, 9), "tail": st.booleans()},
            "activation": st.sampled_from(["silu", "none"]),
        },
    ),
    "newton_schulz": Operator(
        hope_ext.newton_schulz,
        testing.newton_schulz_inputs,
        {
            "batch": st.lists(sizes(0, 3), max_size=2),
            **{"rows": sizes(1, 40), "columns": sizes(1, 40), "steps": sizes(1, 6)},
        },
    ),
    "multi_frequency_step_": Operator(
        stepped,
        lambda dtype, device, *, tensors, **options: testing.multifreq_inputs(
            dtype,
            device,
            shapes=[shape for shape, _ in tensors],
            periods=[period for _, period in tensors],
            **options,
        ),
        {
            "tensors": st.lists(
                st.tuples(st.lists(sizes(0, 9), max_size=3).map(tuple), sizes(1, 5)), max_size=4
            ),
            **{"step": sizes(1, 20), "rule": st.sampled_from(["adamw", "sgd"])},
        },
        hope_ext.multi_frequency_step_,
    ),
}
each_operator = pytest.mark.parametrize("name", OPERATORS)


def answers(operator: Operator, arguments: dict[str, Any]) -> tuple[list[Any], Exception | None]:
    """The leaves of what comes back, or the error."""
    try:
        with torch.no_grad():
            return pytree.tree_leaves(operator.function(**arguments)), None
    except Exception as error:
        return [], error


def assert_right(operator: Operator, arguments: dict[str, Any], leaves: list[Any]) -> None:
    """What the definition gives in float64, but for the dtype's precision.

    Of inputs that are huge, or no numbers, only shapes are the definition's: they may overflow, and
    kernels multiply them with zeros.
    """
    tame = all(
        bool((x.abs() < 100).all())  # False of NaN
        for x in pytree.tree_leaves(arguments)
        if isinstance(x, Tensor) and x.is_floating_point()
    )
    wide = pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, arguments
    )
    with testing.backend("reference"):
        truths, error = answers(operator, wide)
    assert error is None, f"an answer where the definition says: {error!r}"
    for x, truth in zip(leaves, truths, strict=True):
        if not isinstance(x, Tensor):
            assert x == truth
            continue
        assert x.shape == truth.shape
        if not x.is_floating_point():
            assert torch.equal(x, truth)
        elif (
            tame and bool(truth.isfinite().all()) and truth.abs().sum() < 1e3 * (1 + truth.numel())
        ):
            # Above rounding, and far below what a wrong row or step would make.
            often = {torch.float64: 1e5, torch.float32: 1e3}.get(x.dtype, 30)
            allowed = often * torch.finfo(x.dtype).eps * (1 + truth.norm().item())
            assert (x.double() - truth).norm().item() <= allowed


@each_operator
@some
@given(data=st.data())
def test_right_arguments_give_the_definitions_answer(name, data):
    operator = OPERATORS[name]
    options = {key: data.draw(values, key) for key, values in operator.options.items()}
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), "dtype")
    arguments = operator.inputs(dtype, "cpu", **options)
    leaves, error = answers(operator, arguments)
    assert error is None, repr(error)
    assert_right(operator, arguments, leaves)


# ---- wrong arguments -----------------------------------------------------------------------------

NUMBERS = (True, 0, -1, 2, 3, 2**31, 2**63, 2**70, 0.5, math.nan, math.inf, -1e300)
OBJECTS = (None, "l2", "", b"x", (), [], {}, object, torch.float32)
TENSORS = (torch.zeros(()), torch.ones(3), torch.zeros(2, 0))
ANYTHING = st.sampled_from([*NUMBERS, *OBJECTS, *TENSORS])
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
DTYPES = st.sampled_from([*FLOATS, torch.complex64, torch.int64, torch.int32, torch.bool])
VALUES = st.sampled_from([0.0, -1.0, 1.0, 1e4, 1e30, math.nan, math.inf, -math.inf])


def changes(x: Tensor) -> st.SearchStrategy[Tensor]:
    """The tensor in another dtype, shape, layout, on another device, or with other values."""
    axes = range(x.ndim)
    whole = [x[None], x.flatten(), x.to("meta"), x.to_sparse(), *([x.mT] if x.ndim > 1 else [])]
    cut = [x.narrow(i, 0, x.shape[i] - 1) for i in axes if x.shape[i]]
    ways = [
        DTYPES.map(x.to),
        VALUES.map(lambda value: torch.full_like(x, value) if x.is_floating_point() else x - 1),
        st.sampled_from(whole),
        st.sampled_from([x, *(torch.cat([x, x], i) for i in axes)]),
        st.sampled_from([x, *cut]),
        st.sampled_from([x, *(x.select(i, 0) for i in axes if x.shape[i])]),
        st.just(torch.stack([x, x], -1)[..., 0]),  # the same values elsewhere in memory: right
        ANYTHING,
    ]
    return st.one_of(ways)


def elsewhere(draw: Callable, value: Any) -> Any:
    """Another value in an argument's place, or somewhere inside it."""
    if isinstance(value, Tensor):
        return draw(changes(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        field = draw(st.sampled_from([f.name for f in dataclasses.fields(value)]))
        return dataclasses.replace(value, **{field: elsewhere(draw, getattr(value, field))})
    if isinstance(value, (tuple, list)) and value and draw(st.booleans()):
        items = list(value)
        where = draw(st.integers(0, len(items) - 1))
        if draw(st.booleans()):
            items[where] = elsewhere(draw, items[where])
        elif draw(st.booleans()):
            del items[where]
        else:
            items.insert(where, items[where])
        return type(value)(items)
    return draw(ANYTHING)


@each_operator
@some
@given(data=st.data())
def test_a_wrong_argument_is_refused_by_name_or_answered_rightly(name, data):
    operator = OPERATORS[name]
    options = {key: data.draw(values, key) for key, values in operator.options.items()}
    if "titans" in name or "conv" in name or "self" in name or name == "cms_memory":
        packed = data.draw(st.booleans(), "packed")
        if packed:
            options |= {"batch": 1, "bounds": [0, options["tokens"] // 2, options["tokens"]]}
        if "conv" not in name and data.draw(st.booleans(), "carried"):
            options["positions"] = [0] * (2 if packed else options["batch"])
    # In float64, since another chunk size or rate may make an inner loop chaotic.
    arguments = operator.inputs(torch.float64, "cpu", **options)
    argument = data.draw(st.sampled_from(sorted(arguments)), "argument")
    arguments[argument] = elsewhere(data.draw, arguments[argument])
    leaves, error = answers(operator, arguments)
    if error is None:
        if not any(isinstance(x, Tensor) and x.is_meta for x in leaves):  # shapes alone
            assert_right(operator, arguments, leaves)
        return
    assert isinstance(error, (ValueError, TypeError)), repr(error)
    named = re.match(r"(\w+)", str(error))
    assert named is not None, repr(error)
    assert named[1] in operator.parameters, f"{argument}: {error!r}"
