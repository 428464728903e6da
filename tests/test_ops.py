"""The laws that every implementation of an operator keeps, over the cases of hope_ext.testing."""

import functools
import zlib
from dataclasses import replace

import pytest
import torch
from backends import BACKENDS, device_of
from laws import (
    Bound,
    assert_as_good_as_torch,
    evaluate,
    float_leaves,
    is_float,
    torchs_errors,
)
from torch.utils import _pytree

from hope_ext.testing import CASES, Case

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_differentiable_case = pytest.mark.parametrize(
    "case", [c for c in CASES if c.differentiable], ids=str
)
each_tiny_differentiable_case = pytest.mark.parametrize(
    "case", [c for c in CASES if c.tiny and c.differentiable], ids=str
)
each_tiny_case = pytest.mark.parametrize("case", [c for c in CASES if c.tiny], ids=str)
each_case_on_each_backend = pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(backend, case, id=f"{backend}-{case}")
        for backend in BACKENDS
        for case in CASES
        if case.runs_on(backend)
    ],
    indirect=["backend"],
)
each_case_on_each_backend_in_each_dtype = pytest.mark.parametrize(
    ("backend", "case", "dtype"),
    [
        pytest.param(backend, case, dtype, id=f"{backend}-{case}-{str(dtype).split('.')[1]}")
        for backend in BACKENDS
        for case in CASES
        if case.runs_on(backend)
        for dtype in case.dtypes
    ],
    indirect=["backend"],
)


@functools.cache
def in_float32(case: Case, backend: str) -> list[tuple[str, torch.Tensor]]:
    """What the laws compare with: a case's results, which must not be written to."""
    return evaluate(case, case.make(torch.float32, device_of(backend)), backend)


@functools.cache
def bounds(case: Case, dtype: torch.dtype) -> list[Bound]:
    """What the results of the first draw may err by."""
    return torchs_errors(case, case.make(dtype, "cpu"), dtype)


@each_case_on_each_backend_in_each_dtype
def test_as_good_as_torch(case: Case, dtype: torch.dtype, backend: str):
    """Errors against the float64 definition are at most twice torch's own in this dtype."""
    first = in_float32(case, backend) if dtype == torch.float32 else None
    assert_as_good_as_torch(case, dtype, backend, bounds=bounds(case, dtype), first=first)


@each_case
def test_exact_in_float64(case: Case):
    arguments = case.make(torch.float64, "cpu")
    exact, ours = evaluate(case, arguments, "reference"), evaluate(case, arguments, "cpu")
    for (name, truth), (_, x) in zip(exact, ours, strict=True):
        torch.testing.assert_close(
            x, truth, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@each_tiny_differentiable_case
def test_gradcheck(case: Case):
    """Gradients of every output by every input, against finite differences."""
    arguments = case.make(torch.float64, "cpu")
    leaves, structure = _pytree.tree_flatten(arguments)
    floats = [i for i, x in enumerate(leaves) if is_float(x)]

    def function(*inputs):
        filled = list(leaves)
        for i, x in zip(floats, inputs, strict=True):
            filled[i] = x
        arguments = _pytree.tree_unflatten(filled, structure)
        result = case.function(**case.returning_everything(arguments))
        return tuple(float_leaves(result))

    inputs = [leaves[i].clone().requires_grad_() for i in floats]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=False)


@each_case_on_each_backend
def test_repeat(case: Case, backend: str):
    """A second run gives the same bits, on the CPU with another number of threads, and leaves its
    inputs alone. Every element of every output, and of what a backward is given, is written: there,
    torch fills fresh memory with NaN."""
    arguments, kept = case.make(torch.float32, device_of(backend)), []
    before = [x.clone() for x in float_leaves(arguments)]
    first = in_float32(case, backend)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            second = evaluate(case, arguments, backend)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    # Without a token no CUDA kernel runs, neither forward nor backward.
    if second and not second[0][1].numel():
        kept.clear()
    for name, x in [*second, *((f"kept {i}", x) for i, x in enumerate(kept))]:
        assert torch.isfinite(x).all(), name
    for (name, a), (_, b) in zip(first, second, strict=True):
        assert torch.equal(a, b), name
    assert all(map(torch.equal, before, float_leaves(arguments)))


@each_case_on_each_backend
def test_layout(case: Case, backend: str):
    """Strides do not matter: of tiny cases with every argument one way, then another; of others
    with one argument this way and the next that way."""

    def transposed(x):  # the last two dimensions swapped in memory
        return x.mT.contiguous().mT

    def spread(x):  # every second element of the last dimension
        return torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2]

    def offset(x):  # a slice of a wider tensor, as of a fused projection
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]

    arguments, expected = case.make(torch.float32, device_of(backend)), in_float32(case, backend)
    ways = transposed, spread, offset
    first = zlib.crc32(str(case).encode())
    turns = [[way] for way in ways] if case.tiny else [[ways[(first + i) % 3] for i in range(3)]]
    for turn in turns:
        leaves, structure = _pytree.tree_flatten(arguments)
        for i, x in enumerate(leaves):
            if is_float(x) and x.dim() > 1:
                leaves[i] = turn[i % len(turn)](x)
        restrided = _pytree.tree_unflatten(leaves, structure)
        for (name, a), (_, b) in zip(expected, evaluate(case, restrided, backend), strict=True):
            assert torch.equal(a, b), f"{name}, {[way.__name__ for way in turn]}"


@each_differentiable_case
def test_no_double_backward(case: Case):
    arguments = case.make(torch.float32, "cpu")
    leaf = float_leaves(arguments)[0]
    if leaf.numel() == 0:
        pytest.skip("no gradient to speak of")
    leaf.requires_grad_()
    (output, *_) = float_leaves(case.function(**arguments))
    (gradient,) = torch.autograd.grad(output.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.sum(), leaf)


def assert_compiles(case: Case, compiler: str) -> None:
    """torch.compile(fullgraph=True) gives what eager gives, gradients included."""
    torch._dynamo.reset()
    arguments = case.make(torch.float32, "cpu")
    compiled = torch.compile(case.function, fullgraph=True, backend=compiler)
    expected = evaluate(case, arguments, "cpu")
    compiled_case = replace(case, function=compiled)
    for (name, a), (_, b) in zip(expected, evaluate(compiled_case, arguments, "cpu"), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{case}, {n}: {m}")


@each_tiny_case
def test_compile(case: Case):
    assert_compiles(case, "aot_eager")


def test_inductor():
    """One case of each operator, in two graphs: a process's first takes as long as many others, and
    each takes seconds, however small it is."""
    tiny = {case.stem: case for case in CASES if case.tiny}.values()
    for trains in (True, False):
        cases = [case for case in tiny if case.differentiable == trains]

        def every(cases=cases, **arguments):
            return [case.function(**arguments[case.stem]) for case in cases]

        def make(dtype, device, cases=cases):
            made = ((case, case.make(dtype, device)) for case in cases)
            return {case.stem: case.returning_everything(arguments) for case, arguments in made}

        every_case = Case("every", "operator", every, make, False, None, differentiable=trains)
        # With more threads it starts processes, to no avail.
        with torch._inductor.config.patch(compile_threads=1):
            assert_compiles(every_case, "inductor")


@each_tiny_differentiable_case
def test_activation_checkpointing(case: Case):
    arguments = case.make(torch.float32, "cpu")

    def checkpointed(**kwargs):
        return torch.utils.checkpoint.checkpoint(
            lambda: case.function(**kwargs), use_reentrant=False
        )

    again = replace(case, function=checkpointed)
    for (name, a), (_, b) in zip(
        evaluate(case, arguments, "cpu"), evaluate(again, arguments, "cpu"), strict=True
    ):
        assert torch.equal(a, b), name
