"""Facts of `torch.ops.hope.titans`, the operator beneath the public function."""

import pytest
import torch
from backends import all_close, close, device_of, each_backend
from torch.utils import _pytree

import hope_ext
from hope_ext import _load
from hope_ext.testing import titans_inputs

TOKENS = ("q", "k", "v", "lr", "momentum", "decay")
NORMS = ("norm_weight", "norm_bias")


def make(backend, dtype, **options):
    return titans_inputs(dtype, device_of(backend), **options)


def operator_tensors(a):
    """What `titans_memory` would give its operator of these arguments (batch 2)."""

    def of_two(matrices):
        return [None, None] if matrices is None else [*matrices, None][:2]

    state = a.get("state")
    position = None if state is None else state.position
    start = [w.expand(2, -1, -1, -1).clone() for w in a["weights"]]
    states = (start, None, None)
    if state is not None:
        states = (state.weights, state.momenta, state.anchor)
    norms = [a[n].expand(2, -1, -1).clone() if n in a else None for n in NORMS]
    matrices = [w for matrices in states for w in of_two(matrices)]
    return [*(a[n] for n in TOKENS), *matrices, *norms, position, None]


@each_backend
@pytest.mark.parametrize(
    "options", [{}, {"momentum": False, "decay": False}, {"positions": [3, 16]}]
)
def test_opcheck(backend, options):
    a = make(backend, torch.float32, tokens=20, **options)
    operators = _load.operators()
    inputs = operator_tensors(a)
    for x in inputs:
        if x is not None and x.is_floating_point():
            x.requires_grad_()
    options = (16, "gelu", True, "l2", "after", 1e-6, 2)
    torch.library.opcheck(operators.titans, (*inputs, *options))
    with torch.no_grad():
        *out, checkpoints = operators.titans(*inputs, *options)
    cotangents = [torch.randn_like(x) if x.numel() else None for x in out]
    detached = [x if x is None else x.detach() for x in inputs]
    torch.library.opcheck(
        operators.titans_backward, (*cotangents, *detached, checkpoints, *options)
    )


@each_backend
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("bounds", [None, [0, 9, 9, 26, 27, 50]])
def test_checkpoints(backend, bounds, momentum, every):
    """The states at the start of every `every`-th chunk, in their slots; nothing in the others."""
    chunk, positions = 4, [3, 4] if bounds is None else [3, 7, 1, 2, 4]
    size = {"batch": 2 if bounds is None else 1, "tokens": 50 // (2 if bounds is None else 1)}
    a = make(
        backend, torch.float32, **size, chunk_size=chunk, momentum=momentum, bounds=bounds,
        positions=positions,
    )  # fmt: skip
    tensors = [*operator_tensors(a)[:-1], a.pop("cu_seqlens", None)]
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    try:
        *_, found = _load.operators().titans(
            *tensors, chunk, "gelu", True, "l2", "after", 1e-6, every
        )
    finally:
        torch.use_deterministic_algorithms(False)
    expected, whole = torch.zeros_like(found), a.pop("state")
    for n, position in enumerate(positions):
        row, begin, end = (n, 0, 25) if bounds is None else (0, bounds[n], bounds[n + 1])
        given = _pytree.tree_map(lambda x, n=n: x[n : n + 1] if torch.is_tensor(x) else x, whole)
        first_slot = (row * 25 + begin) // (chunk * every) + n
        for c in range(every, (position % chunk + end - begin - 1) // chunk + 1, every):
            start = begin + c * chunk - position % chunk
            before = {
                name: x[row : row + 1, begin:start] if name in TOKENS and x is not None else x
                for name, x in a.items()
            }
            _, state = hope_ext.titans_memory(**before, state=given, return_state=True)
            parts = [state.weights[0], *(state.momenta or ())]
            expected[first_slot + c // every - 1] = torch.cat([x.flatten(2) for x in parts], 2)[0]
    close(found, expected)


@each_backend
def test_the_operator_itself_protects_memory(backend):
    """A caller of torch.ops with a gradient of the wrong shape gets an error, not other memory."""
    a, operators = make(backend, torch.float32), _load.operators()
    tensors = operator_tensors(a)
    start, nothing = tensors[len(TOKENS)], [None] * 5
    options = (16, "gelu", True, "l2", "after", 1e-6, 1)
    o, *_, checkpoints = operators.titans(*tensors, *options)
    for gradients in ([o[:, 1:], None, *nothing], [None, start[:1], *nothing]):
        with pytest.raises(ValueError, match="expected shape"):
            operators.titans_backward(*gradients, *tensors, checkpoints, *options)
    with pytest.raises(ValueError, match="checkpoints: not those of this forward"):
        operators.titans_backward(o, None, *nothing, *tensors, checkpoints[1:], *options)


@each_backend
@pytest.mark.parametrize("length", [1, 20])
def test_the_operator_without_an_anchor_takes_the_weights(backend, length):
    a, titans = make(backend, torch.float32, tokens=length, positions=[5, 16]), _load.operators()
    tensors, options = operator_tensors(a), (16, "gelu", True, "l2", "after", 1e-6, 0)
    start, anchor = len(TOKENS), len(TOKENS) + 4
    tensors[anchor] = tensors[start]
    expected = titans.titans(*tensors, *options)
    tensors[anchor] = None
    all_close(titans.titans(*tensors, *options), expected)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("tokens", [1, 37])  # a step's kernel, and those of chunks
def test_a_graph_holds_a_call_and_its_backward(backend, tokens):
    """Nothing in them waits for the GPU, and what is replayed gives the same bits."""
    a = make(backend, torch.bfloat16, tokens=tokens)
    inputs = [a[name].requires_grad_() for name in TOKENS]

    def call():
        with torch.no_grad():
            alone = hope_ext.titans_memory(**a)
        o = hope_ext.titans_memory(**a)
        return alone, o, *torch.autograd.grad(o.float().sum(), inputs)

    expected = [x.clone() for x in call()]
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # CUDA wants a first call where it captures
        call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, expected))
