"""The model and its layers: carried state, packed documents, generation, stability, devices."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from hope import (
    AttentionConfig,
    CausalConv,
    CmsConfig,
    HopeConfig,
    HopeError,
    LanguageModel,
    MacConfig,
    MagConfig,
    MalConfig,
    ModelConfig,
    SelfModifyingMemory,
    TitansConfig,
    TitansMemory,
    decode,
    generate,
    parameter_count,
    preset,
)
from hope.layers import MIXERS
from hope.layers.unit import unit, unit_qk
from torch import nn
from torch.utils import _pytree as pytree

import hope_ext

SIZES = {"heads": 2, "head_dim": 16, "chunk_size": 8}
MIXER_CONFIGS = {
    "titans": TitansConfig(**SIZES),
    "titans, no momentum": TitansConfig(**SIZES, momentum_max=0.0),
    "titans, no convolution": TitansConfig(**SIZES, conv_width=1),
    "mac": MacConfig(**SIZES, segment=8),
    "mac, segments and chunks apart": MacConfig(**{**SIZES, "chunk_size": 3}, segment=5),
    "mag": MagConfig(**SIZES, window=5),
    "mag, window of 1": MagConfig(**SIZES, window=1, persistent=0),
    "mal": MalConfig(**SIZES, window=7),
    "attention": AttentionConfig(heads=2, head_dim=16),
    "attention, convolution": AttentionConfig(heads=2, head_dim=16, conv_width=4),
    "titans, deep": TitansConfig(**SIZES, memory="deep", expansion=2),
    "titans, deep with a norm": TitansConfig(
        **SIZES, memory="deep", expansion=1, norm="layer", activation="silu"
    ),
    "titans, linear with a norm": TitansConfig(**SIZES, norm="layer"),
    "hope": HopeConfig(**SIZES),
    "hope, wider, other settings": HopeConfig(
        **{**SIZES, "chunk_size": 5}, expansion=2, activation="silu", conv_width=1, read="after"
    ),
    "mac, deep": MacConfig(**SIZES, segment=8, memory="deep", expansion=2, norm="layer"),
}


CMS_CONFIGS = {
    "CMS": CmsConfig((3, 8, 16)),
    "CMS, nested": CmsConfig((2, 4, 8), variant="nested"),
    "CMS, independent": CmsConfig((3, 5), variant="independent", activation="silu"),
    "CMS, one nested level": CmsConfig((5,), variant="nested"),
    "CMS without updates": CmsConfig((3, 8), updates=False),
}


def small_model(name, layers=2):
    """A mixer with the usual MLP, or HOPE's with a CMS."""
    cms = CMS_CONFIGS.get(name)
    mixer = MIXER_CONFIGS["hope" if cms else name]
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(mixer=mixer, dim=32, layers=layers, cms=cms)).eval()
    if cms and cms.updates:  # higher rates than at the start
        for block in model.blocks:
            for rate in block.cms.rates:
                nn.init.ones_(rate.bias)
    return model


@pytest.fixture(params=[*MIXER_CONFIGS, *CMS_CONFIGS])
def model(request):
    return small_model(request.param)


def tensors(state):
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)]


def random_tokens(*shape, seed=1):
    return torch.randint(0, 257, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lengths", [[21], [8, 13], [5, 1, 1, 1, 13], [2, 19], [1] * 21])
def test_a_carried_state_continues_the_text(model, lengths):
    tokens = random_tokens(2, 21)
    state, logits = None, []
    for part in tokens.split(lengths, dim=1):
        output, state = model(part, state, return_state=True)
        logits.append(output)
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens), atol=1e-4, rtol=1e-4)


def test_gradients_flow_through_a_carried_state(model):
    tokens = random_tokens(2, 20)
    whole = model(tokens)[:, 12:].square().mean()
    _, state = model(tokens[:, :12], return_state=True)
    split = model(tokens[:, 12:], state).square().mean()
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(whole, parameters.values())
    actual = torch.autograd.grad(split, parameters.values())
    for name, a, b in zip(parameters, actual, expected, strict=True):
        torch.testing.assert_close(
            a, b, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    with pytest.raises(RuntimeError, match="does not require grad"):
        tensors(state.detach())[0].sum().backward()


@pytest.mark.parametrize("lengths", [[9, 12], [1, 2, 3, 15], [21], [0, 9, 0, 12]])
def test_packed_documents_are_each_alone(model, lengths):
    tokens = random_tokens(1, 21)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = model(tokens, cu_seqlens=bounds)
    documents = [part for part in tokens.split(lengths, dim=1) if part.numel() > 0]
    alone = torch.cat([model(part) for part in documents], 1)
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


WITH_MEMORY = [name for name in MIXER_CONFIGS if not name.startswith("attention")]


def test_packed_documents_continue_from_a_state_row_each(model):
    documents = [random_tokens(1, length, seed=length) for length in (11, 2, 17)]
    cuts = [4, 1, 10]

    def packed(parts, state):
        bounds = torch.tensor([0, *(part.shape[1] for part in parts)]).cumsum(0).to(torch.int32)
        return model(torch.cat(parts, 1), state, bounds, return_state=True)

    _, state = packed([d[:, :cut] for d, cut in zip(documents, cuts, strict=True)], None)
    ends, _ = packed([d[:, cut:] for d, cut in zip(documents, cuts, strict=True)], state)
    alone = [model(d)[:, cut:] for d, cut in zip(documents, cuts, strict=True)]
    torch.testing.assert_close(ends, torch.cat(alone, 1), atol=1e-4, rtol=1e-4)
    # The rows go on as a batch, too, though each is at another place of its chunk, window, segment.
    more = random_tokens(len(documents), 9, seed=2)
    batch = model(more, state)
    rows = [
        torch.cat((d[:, :cut], more[i : i + 1]), 1)
        for i, (d, cut) in enumerate(zip(documents, cuts, strict=True))
    ]
    alone = [model(row)[:, -9:] for row in rows]
    torch.testing.assert_close(batch, torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("position", [1, 7, 8, 20])
def test_no_token_sees_a_later_one(model, position):
    tokens = random_tokens(1, 21)
    other = tokens.clone()
    other[:, position] = (other[:, position] + 1) % 256
    before, after = model(tokens), model(other)
    torch.testing.assert_close(before[:, :position], after[:, :position], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, position], after[:, position], atol=1e-3)


def test_the_convolution_is_causal_and_has_its_width():
    conv = CausalConv(3, 4)
    nn.init.ones_(conv.weight)
    x = torch.zeros(1, 9, 3)
    x[0, 2] = 1
    y, tail = conv(x)
    assert y[0, :, 0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]
    assert torch.equal(tail, x[:, 6:])


def test_the_last_tap_is_the_token_itself():
    conv = CausalConv(2, 4)
    nn.init.zeros_(conv.weight)
    conv.weight.data[:, -1] = 1
    x = torch.randn(2, 5, 2)
    torch.testing.assert_close(conv(x)[0], x)
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    torch.testing.assert_close(conv(x[:1], cu_seqlens=bounds)[0], x[:1])


@pytest.mark.parametrize("name", ["attention", "attention, convolution"])
def test_an_attention_state_without_unused_slots_is_the_same_state(name):
    model, documents = small_model(name), [random_tokens(1, n, seed=n) for n in (5, 1, 9)]
    bounds = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    _, state = model(torch.cat(documents, 1), cu_seqlens=bounds, return_state=True)
    compact = replace(state, layers=tuple(layer.compact() for layer in state.layers))
    assert [layer.keys.shape[2] for layer in state.layers] == [15, 15]
    assert [layer.keys.shape[2] for layer in compact.layers] == [9, 9]
    more = random_tokens(3, 4, seed=3)
    torch.testing.assert_close(model(more, compact), model(more, state))
    alone = [
        model(torch.cat((d, m[None]), 1))[:, -4:] for d, m in zip(documents, more, strict=True)
    ]
    torch.testing.assert_close(model(more, compact), torch.cat(alone))
    with pytest.raises(ValueError, match="state must have 2 rows, one for each text, not 3"):
        model(random_tokens(1, 4), state, torch.tensor([0, 2, 4], dtype=torch.int32))


def test_wrong_input_is_named(model):
    with pytest.raises(
        ValueError, match=r"tokens must be \[B, T\] int64 with T >= 1, not \(2, 0\)"
    ):
        model(torch.empty(2, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens must be .* torch.float32"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="cu_seqlens needs a batch of 1, not 2"):
        model(random_tokens(2, 3), cu_seqlens=torch.tensor([0, 3], dtype=torch.int32))


def test_the_state_is_a_pytree(model):
    _, state = model(random_tokens(1, 5), return_state=True)
    copy = pytree.tree_map(lambda leaf: leaf, state)
    assert type(copy) is type(state)
    assert any(leaf.shape[0] == 1 for leaf in tensors(copy))


def test_the_meta_device_has_shapes_and_no_memory():
    with torch.device("meta"):
        model = LanguageModel(ModelConfig())
        logits = model(torch.zeros(2, 70, dtype=torch.int64))
    assert (logits.shape, logits.device.type) == ((2, 70, 264), "meta")
    assert parameter_count(ModelConfig()) == sum(p.numel() for p in model.parameters())


def test_logits_are_float32_under_autocast(model):
    tokens = random_tokens(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(tokens), atol=0.2, rtol=0.1)


@pytest.mark.parametrize("name", ["titans", "mac", "mag", "mal", "hope", "CMS", "CMS, nested"])
def test_compiles_without_graph_breaks(name):
    torch._dynamo.reset()  # the compiler counts how often it has compiled a function
    model = small_model(name, layers=1)
    tokens = random_tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens), atol=1e-4, rtol=1e-4)


def test_greedy_generation_is_the_argmax_of_the_full_forward(model):
    with torch.no_grad():  # or an untrained model with a tied head repeats the last byte
        for block in model.blocks:
            out = block.mlp.down if block.cms is None else block.mixer.out
            out.weight.mul_(20)
    written = list(generate(model, b"def f", length=12, temperature=0))
    assert len(written) == 12
    assert len(set(written)) > 2
    text = [256, *b"def f", *written]
    for position in range(6, len(text)):
        logits = model(torch.tensor([text[:position]]))[0, -1, :257]
        assert logits.argmax() == text[position]


def test_generation_is_repeatable_by_seed_and_varied_without(model):
    def write(**options):
        return list(generate(model, "x", length=30, **options))

    assert write(seed=3) == write(seed=3)
    assert write(seed=3) != write(seed=4)
    assert write(top_k=1, seed=0) == write(temperature=0)
    assert write(temperature=1e-6, seed=0) == write(temperature=0)
    assert list(generate(model, length=0)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": -1}, "length must be at least 0"),
        ({"temperature": -0.5}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
    ],
)
def test_wrong_generation_options(model, options, message):
    with pytest.raises(HopeError, match=message):
        list(generate(model, **options))


@pytest.mark.parametrize("name", [*WITH_MEMORY, *CMS_CONFIGS])
def test_a_memory_s_state_does_not_grow(name):
    model = small_model(name)
    _, short = model(random_tokens(1, 10), return_state=True)
    _, long = model(random_tokens(1, 300), return_state=True)
    for a, b in zip(tensors(short), tensors(long), strict=True):
        assert a.shape == b.shape
        assert b.untyped_storage().nbytes() <= a.untyped_storage().nbytes()  # nor what it is cut of


def test_text_is_decoded_as_soon_as_a_character_is_complete():
    assert list(decode("aé".encode())) == ["a", "é"]
    assert list(decode(b"a\xff\xc3")) == ["a", "\ufffd", "\ufffd"]


def long_texts():
    """16,384 tokens: random, constant, and of period 2."""
    length = 16_384
    constant = torch.full((1, length), 97)
    period = torch.tensor([[97, 98]]).repeat(1, length // 2)
    return torch.cat((random_tokens(1, length, seed=0), constant, period))


def memory_of(mixer_state):
    """The state of the memory in a mixer's state."""
    while not isinstance(mixer_state, (hope_ext.TitansState, hope_ext.SelfModifyingState)):
        mixer_state = mixer_state.memory
    return mixer_state


def growth(memory, state):
    """How many times their norm at the start the matrices of memories have, [B, H] each.

    A Titans memory's are measured by its first one, because a deep one's second starts near zero;
    a self-modifying memory's are measured together.
    """
    if isinstance(memory, SelfModifyingMemory):
        for field in dataclasses.fields(state.weights):
            now = [w.flatten(2) for w in getattr(state.weights, field.name)]
            start = [w.flatten(1) for w in memory.memories[field.name]]
            yield torch.cat(now, -1).norm(dim=-1) / torch.cat(start, -1).norm(dim=-1)
    else:
        for weights in state.weights:
            yield weights.flatten(2).norm(dim=2) / memory.memory[0].flatten(1).norm(dim=1)


def assert_bounded(mixer, state):
    """The memory's norm is within a factor of its start's. A normed one may shrink: its norm scales
    it back.
    """
    memory = mixer if isinstance(mixer, (TitansMemory, SelfModifyingMemory)) else mixer.memory
    for ratio in growth(memory, memory_of(state)):
        assert ratio.isfinite().all()
        assert ratio.min() > (0.05 if getattr(memory.config, "norm", "none") == "none" else 0.005)
        assert ratio.max() < 10


@pytest.mark.parametrize("name", ["tiny", "tiny-deep", "hope-tiny"])
@torch.no_grad()
def test_the_tiny_model_is_stable_over_long_texts(name):
    torch.manual_seed(0)
    model = LanguageModel(preset(name).model)
    logits, state = model(long_texts(), return_state=True)
    assert logits.isfinite().all()
    for block, layer in zip(model.blocks, state.layers, strict=True):
        assert_bounded(block.mixer, layer)


@pytest.mark.parametrize("name", WITH_MEMORY)
@torch.no_grad()
def test_every_memory_layer_is_stable_on_long_inputs(name):
    """The same for a layer alone, on unit-scale inputs of the same three kinds."""
    torch.manual_seed(0)
    config = MIXER_CONFIGS[name]
    if isinstance(config, MacConfig):
        config = replace(config, segment=512)  # a text takes as many steps as it has segments
    layer = MIXERS[type(config)](32, config)
    layer.init_weights()
    a, b = torch.randn(2, 32)
    random = torch.randn(16_384, 32)
    x = torch.stack((random, a.expand_as(random), torch.stack((a, b)).repeat(8_192, 1)))
    y, state = layer(x)
    assert y.isfinite().all()
    assert_bounded(layer, state)


def test_unit_scales_to_a_length_and_keeps_zeros():
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    x[0, 0] = 0
    y = unit(x, 2.0, eps=1e-300)
    expected = 2 * torch.nn.functional.normalize(x, dim=-1)
    torch.testing.assert_close(y, expected)
    qkv = torch.randn(2, 5, 3, 2, 4, dtype=torch.float64)
    q, k, v = unit_qk(qkv)
    torch.testing.assert_close(torch.stack((q, k), 2), unit(qkv[:, :, :2]))
    assert torch.equal(v, qkv[:, :, 2])


def test_the_gradients_of_unit_are_exact():
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unit(x, 3.0, eps=0.1), x)
    qkv = torch.randn(2, 3, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unit_qk(x, eps=0.1), qkv)
