"""The laws that every implementation of an operator keeps, over the cases of hope_ext.testing."""

import zlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from hope_ext import testing
from hope_ext.testing import CASES, Case

BACKENDS = [
    pytest.param("cpu", id="cpu"),
    pytest.param(
        "cuda",
        id="cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    ),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_tiny_case = pytest.mark.parametrize("case", [c for c in CASES if c.tiny], ids=str)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def float_leaves(tree) -> list[Tensor]:
    return [x for x in _pytree.tree_leaves(tree) if is_float(x)]


def returning_everything(case: Case, arguments: dict) -> dict:
    return {**arguments, case.everything: True}


def evaluate(
    case: Case, arguments: dict, backend: str, product_dtype=None
) -> list[tuple[str, Tensor]]:
    """All outputs, final states and gradients of one random scalar of them, named."""
    arguments = _pytree.tree_map(
        lambda x: x.detach().requires_grad_() if is_float(x) else x, arguments
    )
    with testing.backend(backend, product_dtype):
        outputs = float_leaves(case.function(**returning_everything(case, arguments)))
        draw = torch.Generator().manual_seed(7)
        cotangents = [torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in outputs]
        leaves = float_leaves(arguments)
        gradients = torch.autograd.grad(
            [x for x in outputs if x.requires_grad],
            leaves,
            [g.to(x) for x, g in zip(outputs, cotangents, strict=True) if x.requires_grad],
            allow_unused=True,
        )
    results = [(f"output {i}", x.detach()) for i, x in enumerate(outputs)]
    for i, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        results.append((f"gradient {i}", torch.zeros_like(leaf) if gradient is None else gradient))
    return results


def to_float64(tree):
    return _pytree.tree_map(lambda x: x.double().cpu() if is_float(x) else x, tree)


@each_case
@each_dtype
@each_backend
def test_as_good_as_torch(case: Case, dtype: torch.dtype, backend: str):
    """Errors against the float64 definition are at most twice torch's own in this dtype."""
    arguments = case.make(dtype, device_of(backend))
    on_cpu = _pytree.tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, arguments)
    exact = evaluate(case, to_float64(on_cpu), "reference")
    torch_like = (
        evaluate(case, on_cpu, "reference")
        if dtype == torch.float32
        else evaluate(case, on_cpu, "rounded", dtype)
    )
    ours = evaluate(case, arguments, backend)
    assert len(ours) == len(exact) == len(torch_like)
    for (name, x), (_, yardstick), (_, truth) in zip(ours, torch_like, exact, strict=True):
        assert x.shape == truth.shape
        assert x.dtype == yardstick.dtype
        error = (x.cpu().double() - truth).norm()
        allowed = 2 * (yardstick.double() - truth).norm()
        floor = 2 * torch.finfo(x.dtype).eps * truth.norm() + 1e-7 * truth.numel() ** 0.5
        assert error <= allowed + floor, f"{name}: error {error:.3g}, torch's {allowed / 2:.3g}"


@each_case
@each_backend
def test_exact_in_float64(case: Case, backend: str):
    if backend == "cuda":
        pytest.skip("float64 is for the CPU")
    arguments = case.make(torch.float64, "cpu")
    exact, ours = evaluate(case, arguments, "reference"), evaluate(case, arguments, backend)
    for (name, truth), (_, x) in zip(exact, ours, strict=True):
        torch.testing.assert_close(
            x, truth, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@each_tiny_case
def test_gradcheck(case: Case):
    """Gradients of every output by every input, against finite differences."""
    arguments = case.make(torch.float64, "cpu")
    leaves, structure = _pytree.tree_flatten(arguments)
    floats = [i for i, x in enumerate(leaves) if is_float(x)]

    def function(*inputs):
        filled = list(leaves)
        for i, x in zip(floats, inputs, strict=True):
            filled[i] = x
        result = case.function(
            **returning_everything(case, _pytree.tree_unflatten(filled, structure))
        )
        return tuple(float_leaves(result))

    inputs = [leaves[i].clone().requires_grad_() for i in floats]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=False)


@each_case
@each_backend
def test_poison(case: Case, backend: str):
    """Every element of every output is written: torch fills fresh memory with NaN here."""
    arguments = case.make(torch.float32, device_of(backend))
    torch.use_deterministic_algorithms(True)
    try:
        results = evaluate(case, arguments, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, x in results:
        assert torch.isfinite(x).all(), name


@each_case
@each_backend
def test_repeat(case: Case, backend: str):
    """Two runs give the same bits, and on the CPU any number of threads does."""
    arguments = case.make(torch.float32, device_of(backend))
    first = evaluate(case, arguments, backend)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        second = evaluate(case, arguments, backend)
    finally:
        torch.set_num_threads(threads)
    for (name, a), (_, b) in zip(first, second, strict=True):
        assert torch.equal(a, b), name


@each_case
@each_backend
@pytest.mark.parametrize("how", ["transposed", "spread", "offset"])
def test_layout(case: Case, backend: str, how: str):
    """Strides do not matter."""

    def restride(x):
        if not is_float(x) or x.dim() < 2:
            return x
        if how == "transposed":  # the last two dimensions swapped in memory
            return x.mT.contiguous().mT
        if how == "spread":  # every second element of the last dimension
            return torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2]
        wide = torch.full(
            (*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype, device=x.device
        )
        wide[..., 1:-2] = x  # a slice of a wider tensor, as of a fused projection
        return wide[..., 1:-2]

    arguments = case.make(torch.float32, device_of(backend))
    expected = evaluate(case, arguments, backend)
    for (name, a), (_, b) in zip(
        expected, evaluate(case, _pytree.tree_map(restride, arguments), backend), strict=True
    ):
        assert torch.equal(a, b), name


@each_case
@each_backend
def test_inputs_are_left_alone(case: Case, backend: str):
    arguments = case.make(torch.float32, device_of(backend))
    before = [x.clone() for x in float_leaves(arguments)]
    evaluate(case, arguments, backend)
    assert all(map(torch.equal, before, float_leaves(arguments)))


@each_case
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


@each_tiny_case
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(case: Case, compiler: str):
    """torch.compile(fullgraph=True) gives what eager gives, gradients included."""
    if compiler == "inductor" and zlib.crc32(str(case).encode()) % 4:
        pytest.skip("inductor takes long; aot_eager covers this case")
    torch._dynamo.reset()
    arguments = case.make(torch.float32, "cpu")
    compiled = torch.compile(case.function, fullgraph=True, backend=compiler)
    expected = evaluate(case, arguments, "cpu")
    compiled_case = replace(case, function=compiled)
    for (name, a), (_, b) in zip(expected, evaluate(compiled_case, arguments, "cpu"), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


@each_tiny_case
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
