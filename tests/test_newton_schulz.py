"""Facts of the Newton-Schulz iteration: exactness, what it does to singular values, torch's Muon,
torch, refusals."""

import math

import pytest
import torch
from backends import device_of, each_backend
from torch import Tensor, nn

import hope_ext
from hope_ext import _load
from hope_ext.testing import newton_schulz_inputs

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(16, 16), (24, 80), (80, 24), (150, 260), (300, 140), (1, 7)]
each_shape = pytest.mark.parametrize(("rows", "columns"), SHAPES)


def make(rows=24, columns=40, dtype=torch.float32, backend="cpu", **options) -> Tensor:
    sizes = {"rows": rows, "columns": columns, **options}
    return newton_schulz_inputs(dtype, device_of(backend), **sizes)["g"]


def by_singular_values(g: Tensor, steps: int) -> Tensor:
    """The same by a decomposition: the polynomial of every singular value, in float64."""
    a, b, c = COEFFICIENTS
    u, s, vh = torch.linalg.svd(g.double().cpu(), full_matrices=False)
    s = s / (s.norm(dim=-1, keepdim=True) + 1e-7)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ (s[..., None] * vh)


# ---- exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 5, 9])
@each_shape
@each_backend
def test_float32_against_a_decomposition(backend, rows, columns, steps):
    """The contract: within 1e-4 of the iteration in float64."""
    g = make(rows, columns, backend=backend)
    x = hope_ext.newton_schulz(g, steps=steps).cpu().double()
    assert (x - by_singular_values(g, steps)).abs().max() < 1e-4


@pytest.mark.parametrize(("rows", "columns"), [(24, 80), (300, 140)])
def test_float64_is_float64(rows, columns):
    g = make(rows, columns, torch.float64)
    torch.testing.assert_close(
        hope_ext.newton_schulz(g), by_singular_values(g, 5), rtol=0, atol=1e-11
    )


def muons(g: Tensor) -> Tensor:
    """What torch.optim.Muon subtracts from a parameter whose first gradient is g."""
    parameter = nn.Parameter(torch.zeros_like(g))
    parameter.grad = g
    options = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    torch.optim.Muon([parameter], **options).step()
    return -parameter.detach() / math.sqrt(max(1, g.shape[0] / g.shape[1]))


@each_shape
@each_backend
def test_bfloat16_is_as_good_as_muons(backend, rows, columns):
    """The contract: at most twice the error of torch.optim.Muon's own iteration."""
    g = make(rows, columns, torch.bfloat16, backend, batch=())
    exact = by_singular_values(g, 5)
    ours = (hope_ext.newton_schulz(g).cpu().double() - exact).norm()
    assert ours <= 2 * (muons(g.cpu()).double() - exact).norm()


def test_the_default_is_muons_iteration():
    g = make(40, 24, batch=())
    difference = hope_ext.newton_schulz(g) - muons(g)
    assert difference.abs().max() < 0.02  # Muon computes in bfloat16


@each_backend
def test_singular_values_become_alike(backend):
    values = torch.linspace(0.02, 1, 24, dtype=torch.float64)
    u, v = (torch.linalg.qr(make(n, 24, torch.float64, batch=(), seed=n))[0] for n in (24, 60))
    g = (u * values) @ v.mT
    x = hope_ext.newton_schulz(g.to(device_of(backend), torch.float32)).cpu().double()
    after = torch.diagonal(u.mT @ x @ v)
    assert 0.65 < after.min() < after.max() < 1.25
    torch.testing.assert_close((u * after) @ v.mT, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_backend
def test_a_batch_is_each_alone(backend, dtype):
    g = make(70, 130, dtype, backend, batch=(3, 2))
    x = hope_ext.newton_schulz(g)
    for i in range(3):
        for j in range(2):
            assert torch.equal(x[i, j], hope_ext.newton_schulz(g[i, j]))


@each_backend
def test_a_transpose_gives_the_transpose(backend):
    g = make(70, 130, backend=backend)
    torch.testing.assert_close(
        hope_ext.newton_schulz(g.mT), hope_ext.newton_schulz(g).mT, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1e25])
@each_backend
def test_no_size_of_the_numbers_matters(backend, scale):
    """Squares of them have no place in float32."""
    g = make(backend=backend)
    x = hope_ext.newton_schulz(g * scale, eps=0)
    torch.testing.assert_close(x, hope_ext.newton_schulz(g, eps=0), rtol=0, atol=1e-5)


@each_backend
def test_zeros_stay_zeros(backend):
    g = make(backend=backend)
    g[0] = 0
    x = hope_ext.newton_schulz(g)
    assert not x[0].any()
    assert torch.isfinite(x[1]).all()


@pytest.mark.parametrize("culprit", [math.nan, math.inf])
@each_backend
def test_what_is_not_finite_stays_in_its_matrix(backend, culprit):
    g = make(150, 260, backend=backend)
    expected = hope_ext.newton_schulz(g, steps=2)
    g[0, 3, 5] = culprit
    x = hope_ext.newton_schulz(g, steps=2)
    assert not torch.isfinite(x[0]).any()
    assert torch.equal(x[1], expected[1])


# ---- torch --------------------------------------------------------------------------------------


@each_backend
def test_opcheck(backend):
    g = make(8, 5, backend=backend)
    torch.library.opcheck(_load.operators().newton_schulz, (g, 5, *COEFFICIENTS, 1e-7))


def test_compiled_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(
        hope_ext.newton_schulz, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for columns, steps, eps in ((20, 3, 1e-7), (33, 4, 1e-3), (70, 5, 0.5)):
        g, options = make(24, columns), {"steps": steps, "eps": eps}
        assert torch.equal(compiled(g, **options), hope_ext.newton_schulz(g, **options))


def test_a_derivative_is_refused_not_zero():
    g = make().requires_grad_()
    x = hope_ext.newton_schulz(g)
    with pytest.raises(RuntimeError, match="newton_schulz: has no derivative"):
        x.sum().backward()
    with torch.no_grad():
        assert not hope_ext.newton_schulz(g).requires_grad


# ---- refusals -----------------------------------------------------------------------------------


def _bad(error, match, **changes):
    return pytest.param(error, match, changes, id=match[:40])


NUMBERS = r"coefficients: expected three numbers \(a, b, c\), got "


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        _bad(TypeError, "g: expected a torch.Tensor, got list", g=[[1.0]]),
        _bad(
            TypeError,
            "g: expected dtype float32 or bfloat16 or float64, got float16",
            g=torch.ones(2, 2).half(),
        ),
        _bad(ValueError, r"g: expected \[..., M, N\], got shape \[3\]", g=torch.ones(3)),
        _bad(TypeError, "steps: expected an integer, 0 or more, got 2.0", steps=2.0),
        _bad(TypeError, "steps: expected an integer, 0 or more, got True", steps=True),
        _bad(ValueError, r"steps: .* 0 or more and below 2\*\*31, got -1", steps=-1),
        _bad(TypeError, NUMBERS + "1.0", coefficients=1.0),
        _bad(TypeError, NUMBERS + "'abc'", coefficients="abc"),
        _bad(ValueError, NUMBERS + "2 of them", coefficients=(1.0, 2.0)),
        _bad(
            TypeError,
            r"coefficients\[1\]: expected a number, got None",
            coefficients=(1.0, None, 1.0),
        ),
        _bad(
            ValueError,
            r"coefficients\[2\]: expected a finite number, got inf",
            coefficients=(1.0, 1.0, math.inf),
        ),
        _bad(TypeError, "eps: expected a number, got '1'", eps="1"),
        _bad(ValueError, "eps: expected a finite number, 0 or more, got -1", eps=-1),
        _bad(ValueError, "eps: expected a finite number, 0 or more, got nan", eps=math.nan),
    ],
)
def test_refuses(error, match, changes, reference):
    arguments = {"g": make(), **changes}
    called = _load.REFERENCE if reference else _load.LIBRARY
    with _load.forced(called), pytest.raises(error, match=match):
        hope_ext.newton_schulz(**arguments)


@each_backend
def test_the_operator_itself_protects_memory(backend):
    """Callers of torch.ops pass the public function's checks by."""
    g, operators = make(backend=backend), _load.operators()
    for match, arguments in {
        "g: expected float32, bfloat16": (g.half(), 5),
        r"g: expected \[..., M, N\]": (g[0, 0], 5),
        "steps: expected 0 or more": (g, -1),
        "expected float32, float64, bfloat16 or float16": (g.long(), 5),
    }.items():
        with pytest.raises((TypeError, ValueError), match=match):
            operators.newton_schulz(*arguments, *COEFFICIENTS, 1e-7)
