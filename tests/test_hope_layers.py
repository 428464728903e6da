"""The mixers against their definitions, token by token, and what is special in each."""

import math

import pytest
import torch
import torch.nn.functional as F
from hope import (
    HopeConfig,
    HopeError,
    LanguageModel,
    MacConfig,
    MagConfig,
    ModelConfig,
    TitansConfig,
)
from hope.layers import MemoryAsContext, SelfModifyingMemory, TitansMemory
from hope.layers.attention import rotate_half
from hope.layers.spectral import limited
from hope.layers.window import WindowAttention
from torch import nn

import hope_ext
from hope_ext import testing

SIZES = {"heads": 2, "head_dim": 8, "chunk_size": 3}


def made(module, seed=0):
    """The module in float64 with initial weights, none of which is zero."""
    torch.manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
    module.init_weights()
    if hasattr(module, "persistent"):
        nn.init.normal_(module.persistent.values)
    return module.double()


def weigh(q, keys, values):
    """What a query [D] reads with softmax from lists of keys and values [D]."""
    scores = torch.stack([q @ key for key in keys]) / math.sqrt(len(q))
    return scores.softmax(0) @ torch.stack(values)


def turned(x, position, base=10_000.0):
    return rotate_half(x[None], torch.tensor([position]), base)[0]


def heads_of(rows, config):
    """[T, n, H, D] of rows [1, T, n H D]."""
    return rows[0].unflatten(-1, (-1, config.heads, config.head_dim))


def persistent(layer, head):
    keys = F.pad(layer.persistent.keys[head], (layer.config.head_dim // 2, 0))
    return [*keys], [*layer.persistent.values[head]]


@pytest.mark.parametrize("window", [1, 4, 64])
def test_window_attention_is_its_definition(window):
    config = MagConfig(**SIZES, window=window, persistent=2)
    layer = made(WindowAttention(12, config))
    x = torch.randn(1, 11, 12, dtype=torch.float64)
    y, _ = layer(x)
    qkv = heads_of(layer.conv(layer.qkv(x))[0], config)
    for t in range(11):
        for head in range(2):
            keys, values = persistent(layer, head)
            for s in range(max(0, t - window + 1), t + 1):
                keys.append(turned(qkv[s, 1, head], s))
                values.append(qkv[s, 2, head])
            expected = weigh(turned(qkv[t, 0, head], t), keys, values)
            torch.testing.assert_close(y[0, t].view(2, 8)[head], expected)


def test_window_attention_is_linear_in_space():
    """No mask or score of T x T: the largest tensor grows as T does."""

    def largest(tokens):
        sizes = []

        class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                for item in result if isinstance(result, (tuple, list)) else [result]:
                    if isinstance(item, torch.Tensor):
                        sizes.append(item.numel())
                return result

        layer = made(WindowAttention(12, MagConfig(**SIZES, window=16)))
        with Sizes(), torch.no_grad():
            layer(torch.zeros(1, tokens, 12, dtype=torch.float64))
        return max(sizes)

    assert largest(2048) <= 4.1 * largest(512)


@pytest.mark.parametrize("segment", [1, 4, 64])
def test_memory_as_context_is_its_definition(segment):
    """One token after the other: the memory is told of each, and read before its segment."""
    config = MacConfig(**SIZES, segment=segment, persistent=2)
    layer = made(MemoryAsContext(16, config))
    x = torch.randn(1, 11, 16, dtype=torch.float64)
    o, _ = layer(x)
    qkv = heads_of(layer.conv(layer.qkv(x))[0], config)
    state, before, outputs = None, layer.memory.start(1), []
    for t in range(11):
        place = t % segment
        if place == 0:
            keys, values = zip(*(persistent(layer, head) for head in range(2)), strict=True)
            before = before if state is None else state.memory.weights
        h = layer.memory.retrieve(x[:, t : t + 1], before)
        retrieved = heads_of(layer.qkv(h), config)[0]  # [3, H, D]
        y = []
        for head in range(2):
            keys[head].extend([turned(k, place) for k in (retrieved[1, head], qkv[t, 1, head])])
            values[head].extend([retrieved[2, head], qkv[t, 2, head]])
            y.append(weigh(turned(qkv[t, 0, head], place), keys[head], values[head]))
        y = layer.attention_norm(torch.cat(y)[None, None])
        read, state = layer.memory(y, state)
        outputs.append(layer.out(y * 2 * layer.memory_norm(read).sigmoid()))
    torch.testing.assert_close(o, torch.cat(outputs, 1))


def test_retrieving_is_reading_at_the_start_of_a_chunk():
    config = TitansConfig(**SIZES, conv_width=1, read="chunk")
    layer = made(TitansMemory(12, config))
    nn.init.ones_(layer.conv.weight)  # or the operator's queries would be scaled otherwise
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    nn.init.zeros_(layer.rates.weight)
    nn.init.zeros_(layer.rates.bias)  # the output's gate, 2 * sigmoid(0), is 1
    layer.out = nn.Identity()
    y, _ = layer(x)
    torch.testing.assert_close(y, layer.retrieve(x, layer.start(2)))


def test_memory_as_context_needs_heads_as_wide_as_the_model():
    with pytest.raises(HopeError, match=r"heads \* head_dim must be model.dim \(24\).*, not 16"):
        LanguageModel(ModelConfig(mixer=MacConfig(**SIZES), dim=24))


@pytest.fixture
def told(monkeypatch):
    """The arguments of the operator's last call, which answers with the queries."""
    arguments = {}

    def operator(q, k, v, lr, weights, momentum, decay, **options):
        arguments.update(options, q=q, k=k, v=v, lr=lr, weights=weights, decay=decay)
        return q, None

    monkeypatch.setattr(hope_ext, "titans_memory", operator)
    return arguments


def test_a_linear_memory_without_a_norm_names_no_norm(told):
    made(TitansMemory(12, TitansConfig(**SIZES)))(torch.randn(1, 5, 12, dtype=torch.float64))
    assert not {"norm", "norm_weight", "norm_bias", "norm_eps"} & set(told)
    assert [tuple(w.shape) for w in told["weights"]] == [(2, 8, 8)]


def test_a_deep_memory_has_two_matrices_slower_rates_and_longer_half_lives(told):
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    made(TitansMemory(12, TitansConfig(**SIZES)))(x)
    linear = dict(told)
    deep = TitansConfig(**SIZES, memory="deep", expansion=2, activation="silu", norm="layer")
    layer = made(TitansMemory(12, deep))
    layer(x)
    assert [tuple(w.shape) for w in told["weights"]] == [(2, 8, 16), (2, 16, 8)]
    assert (told["activation"], told["norm"], told["norm_eps"]) == ("silu", "layer", 1e-6)
    assert told["norm_weight"] is layer.norm_weight
    assert told["norm_bias"] is layer.norm_bias
    assert told["lr"].max() <= deep.lr_max / deep.chunk_size / 1.5
    assert told["decay"].mean() < 0.1 * linear["decay"].mean()
    torch.testing.assert_close(
        told["v"].norm(dim=-1), torch.ones(1, 5, 2).double(), atol=1e-3, rtol=0
    )


def test_a_deep_memory_starts_near_the_identity():
    torch.manual_seed(0)
    layer = TitansMemory(128, TitansConfig(heads=2, head_dim=64, memory="deep"))
    layer.init_weights()
    k = F.normalize(torch.randn(2, 500, 64), dim=-1)
    hidden = F.gelu(k @ layer.memory[0], approximate="tanh")
    assert hidden.square().sum(-1).mean().item() == pytest.approx(1.0, rel=0.15)
    assert (hidden @ layer.memory[1]).norm(dim=-1).max() < 0.3


@pytest.mark.parametrize("read", ["before", "after"])
def test_a_self_modifying_layer_is_its_definition(read):
    """The operator's definition between the projections, their convolution, and the output."""
    config = HopeConfig(**SIZES, expansion=2, read=read)
    layer = made(SelfModifyingMemory(12, config))
    memories = {name: [w / 2 for w in weights] for name, weights in layer.memories.items()}
    with torch.no_grad():  # far below the limits of their norms
        for name, weights in layer.memories.items():
            for mine, smaller in zip(weights, memories[name], strict=True):
                mine.copy_(smaller)
    x = torch.randn(2, 11, 12, dtype=torch.float64)
    y, _ = layer(x)
    taps = F.pad(layer.qx(x), (0, 0, 3, 0)).unfold(1, 4, 1)  # [B, T, C, K]
    q, inputs = F.silu((taps * layer.conv.weight).sum(-1)).unflatten(-1, (2, 2, 8)).unbind(2)
    with testing.backend("reference"):
        o = hope_ext.self_modifying_memory(
            F.normalize(inputs, dim=-1) / 8,
            F.normalize(q, dim=-1),
            hope_ext.SelfModifyingWeights(**{n: tuple(w) for n, w in memories.items()}),
            layer.lr_bias,
            layer.retention_bias,
            chunk_size=3,
            lr_max=0.2 / 3,  # over the chunk
            read=read,
        )
    o = F.normalize(o, dim=-1) * 8**0.5 * 2 * layer.gate(x).sigmoid()[..., None]
    torch.testing.assert_close(y, layer.out(o.flatten(2)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("head_dim", "chunk_size", "rate", "half_life"),
    [(32, 16, 0.003906, 16_384), (64, 64, 0.001563, 64_000), (64, 8, 0.007813, 16_384)],
)
def test_a_self_modifying_layer_starts_where_it_is_stable(head_dim, chunk_size, rate, half_life):
    config = HopeConfig(heads=2, head_dim=head_dim, chunk_size=chunk_size, expansion=2)
    layer = made(SelfModifyingMemory(64, config))
    for share in (layer.lr_bias.sigmoid() * 0.2 / chunk_size).tolist():
        assert share == pytest.approx(rate, rel=0.02)
    for retention in layer.retention_bias.sigmoid().tolist():
        assert retention**half_life == pytest.approx(0.5, rel=1e-3)
    k = F.normalize(torch.randn(2, 400, head_dim, dtype=torch.float64), dim=-1)
    for first, second in layer.memories.values():
        assert (k @ first).norm(dim=-1).mean().item() == pytest.approx(5, rel=0.05)
        assert second.std().item() == pytest.approx(0.02, rel=0.3)


def with_grown_memories(config: HopeConfig) -> SelfModifyingMemory:
    """A layer in which the outer loop has made the initial memories 30 times as large."""
    layer = made(SelfModifyingMemory(16, config)).float()
    with torch.no_grad():
        for weights in layer.memories.values():
            for w in weights:
                w.mul_(30)
    return layer


def test_values_of_a_self_modifying_layer_start_shorter_than_keys():
    """Whatever the outer loop has made of the initial memories."""
    start = with_grown_memories(HopeConfig(**SIZES, expansion=2)).start()
    x = F.normalize(torch.randn(2, 2_000, 8), dim=-1) / 8
    first, second = start.v
    value = x + F.gelu(x @ first, approximate="tanh") @ second
    assert 0.15 < value.norm(dim=-1).max() <= 0.5
    for name in ("lr", "retention"):
        first, second = getattr(start, name)
        assert (F.gelu(x @ first, approximate="tanh") @ second).abs().max() < 3


@pytest.mark.parametrize(("head_dim", "chunk_size", "expansion"), [(64, 16, 1), (64, 64, 2)])
@torch.no_grad()
def test_self_modifying_memories_are_bounded_at_the_highest_rates(head_dim, chunk_size, expansion):
    """16,384 tokens of three kinds, with grown memories and all that the lr gates can ask for."""
    config = HopeConfig(heads=2, head_dim=head_dim, chunk_size=chunk_size, expansion=expansion)
    layer = with_grown_memories(config)
    layer.lr_bias.fill_(8.0)
    a, b = torch.randn(2, 16)
    random = torch.randn(16_384, 16)
    x = torch.stack((random, a.expand_as(random), torch.stack((a, b)).repeat(8_192, 1)))
    y, state = layer(x)
    assert y.isfinite().all()
    start = layer.start()
    for name in ("k", "v", "lr", "retention", "memory"):
        now = torch.cat([w.flatten(2) for w in getattr(state.memory.weights, name)], -1)
        before = torch.cat([w.flatten(1) for w in getattr(start, name)], -1)
        ratio = now.norm(dim=-1) / before.norm(dim=-1)
        assert ratio.min() > 0.05
        assert ratio.max() < 2


def test_limited_scales_what_is_above_the_limit():
    torch.manual_seed(0)
    w = torch.randn(3, 8, 5, dtype=torch.float64)
    w[0] *= 0.01
    norms = torch.linalg.matrix_norm(w, 2)
    scaled = limited(w, 1.5)
    assert torch.equal(scaled[0], w[0])
    torch.testing.assert_close(
        torch.linalg.matrix_norm(scaled[1:], 2), torch.full_like(norms[1:], 1.5), rtol=0.05, atol=0
    )
    torch.testing.assert_close(
        scaled[1:] / norms[1:, None, None] ** -1, 1.5 * w[1:], rtol=0.05, atol=0
    )
    assert limited(torch.zeros(2, 3, 3), 1.0).count_nonzero() == 0
    w.requires_grad_()
    limited(w, 1.5).sum().backward()
    assert w.grad.isfinite().all()
