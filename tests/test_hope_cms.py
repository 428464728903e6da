"""The continuum memory system in the MLP's place: its definition, its variants, its stability."""

import pytest
import torch
import torch.nn.functional as F
from hope import MLP, AttentionConfig, CmsConfig, HopeError, LanguageModel, ModelConfig
from hope.layers import ContinuumMemory
from torch import nn

import hope_ext

DIM = 8


def made(config, seed=0, dim=DIM, ratio=3.0, dtype=torch.float64):
    """The layer with initial weights, rates of about a half, and gains that are not one."""
    torch.manual_seed(seed)
    layer = ContinuumMemory(ModelConfig(dim=dim, mlp_ratio=ratio, cms=config))
    for part in layer.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
        if isinstance(part, nn.RMSNorm):
            nn.init.uniform_(part.weight, 0.7, 1.3)
    layer.init_weights()
    if config.updates:
        for rate in layer.rates:
            nn.init.zeros_(rate.bias)
    return layer.to(dtype)


def tokens(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Level:
    """A level as its definition has it: one token after the other, gradients by autograd."""

    def __init__(self, layer, i, weights):
        self.layer, self.i, self.size = layer, i, layer.config.chunk_sizes[i]
        self.restart(weights)

    def restart(self, weights):
        self.weights = [w.detach().clone().requires_grad_() for w in weights]
        self.pending = [torch.zeros_like(w) for w in weights]

    def read(self, n, t):
        """The answer to token t, n [dim]; the chunk's last token rewrites the weights."""
        w1, w2 = self.weights
        act = F.silu if self.layer.config.activation == "silu" else torch.nn.GELU("tanh")
        y = act(n @ w1) @ w2
        target = n @ self.layer.target.weight.T
        share = torch.sigmoid(self.layer.rates[self.i](n)).item()
        dim, hidden = w1.shape
        rate = self.layer.config.lr_max * share / self.size / (1 + hidden / (2 * dim))
        loss = (y - target.detach()).square().mean() / 2
        for pending, grad in zip(
            self.pending, torch.autograd.grad(loss, self.weights), strict=True
        ):
            pending += rate * grad
        if (t + 1) % self.size == 0:
            self.restart([w - p for w, p in zip(self.weights, self.pending, strict=True)])
        return y.detach()


def start(layer, i):
    return layer.levels[i].mlp.up.weight.T, layer.levels[i].mlp.down.weight.T


def by_definition(layer, x):
    """y [T, dim] of x [T, dim]."""
    sizes, variant = layer.config.chunk_sizes, layer.config.variant
    nested = variant == "nested"
    levels = [Level(layer, i, start(layer, 0 if nested else i)) for i in range(len(sizes))]
    outputs = []
    for t, token in enumerate(x):
        h = token
        if nested:
            n = layer.levels[0].norm(token)
            for i in reversed(range(len(sizes) - 1)):
                if t % sizes[i + 1] == 0:
                    levels[i].restart(levels[i + 1].weights)
            answers = [level.read(n, t) for level in levels]
            h = token + answers[0]
        else:
            for i, level in enumerate(levels):
                h = h + level.read(layer.levels[i].norm(h if variant == "sequential" else token), t)
        outputs.append(h)
    return torch.stack(outputs).detach()


@pytest.mark.parametrize(
    "config",
    [
        CmsConfig((4,)),
        CmsConfig((3, 5, 8), activation="silu", lr_max=0.7),
        CmsConfig((3, 5, 8), variant="independent"),
        CmsConfig((2, 4, 8), variant="nested"),
        CmsConfig((3, 3, 9), variant="nested"),
    ],
    ids=lambda config: f"{config.variant} {len(config.chunk_sizes)}",
)
def test_it_is_its_definition(config):
    layer = made(config)
    x = tokens(2, 21, DIM)
    y, states = layer(x)
    expected = torch.stack([by_definition(layer, row) for row in x])
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    assert [state.position.tolist() for state in states] == [[21, 21]] * len(config.chunk_sizes)
    still = made(CmsConfig(**{**vars(config), "updates": False}))
    still.load_state_dict(layer.state_dict(), strict=False)
    if config.variant != "nested":
        first = config.chunk_sizes[0]
        difference = (y - still(x)[0]).norm(dim=-1) / y.norm(dim=-1)
        assert difference[:, :first].max() < 1e-12
        assert difference[:, -1].min() > 1e-3  # or the rates would be too small for this test


@pytest.mark.parametrize("variant", ["sequential", "independent", "nested"])
def test_what_nobody_asks_for_is_not_learned_and_changes_nothing(variant, monkeypatch):
    """The same answers and gradients; and level for level no state is asked of the operator."""
    layer, x = made(CmsConfig((2, 4), variant=variant)), tokens(2, 8, DIM)
    asked, operator = [], hope_ext.cms_memory
    monkeypatch.setattr(
        hope_ext, "cms_memory", lambda *a, **k: asked.append(k["return_state"]) or operator(*a, **k)
    )
    found = []
    for whether in (True, False):
        layer.zero_grad()
        y, states = layer(x, return_states=whether)
        y.square().sum().backward()
        assert len(states) == (2 if whether or variant == "nested" else 0)
        found.append((y.detach(), *(p.grad for p in layer.parameters())))
    assert asked.count(False) == (0 if variant == "nested" else 2)
    for a, b in zip(*found, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_a_nested_level_forgets_when_the_slower_one_moves():
    """After the slower level's chunk, the fastest one answers from the slower's weights."""
    layer = made(CmsConfig((2, 8), variant="nested"))
    x = tokens(1, 8, DIM)
    _, (fast, slow) = layer(x)
    assert not torch.allclose(fast.weights[0], slow.weights[0])
    more = tokens(1, 1, DIM, seed=5)
    y, (fast, _) = layer(more, (fast, slow))
    w1, w2 = slow.weights
    n = layer.levels[0].norm(more)
    torch.testing.assert_close(y, more + F.gelu(n @ w1, approximate="tanh") @ w2)
    assert torch.equal(fast.weights[0], slow.weights[0])


@pytest.mark.parametrize("variant", ["sequential", "independent", "nested"])
def test_one_level_without_updates_is_the_mlp_block_bit_for_bit(variant):
    """Parameters, initial values, logits and gradients; and so it is trained the same."""
    models, mixer = [], AttentionConfig(heads=2, head_dim=8)
    for options in ({"cms": CmsConfig((4,), updates=False, variant=variant)}, {"mlp": "gelu"}):
        torch.manual_seed(0)
        models.append(LanguageModel(ModelConfig(mixer=mixer, dim=16, layers=2, **options)))
    cms, mlp = models
    text = torch.randint(0, 256, (2, 20))
    logits = [model(text) for model in models]
    assert torch.equal(*logits)
    for output in logits:
        output.square().mean().backward()
    pairs = zip(cms.parameters(), mlp.parameters(), strict=True)
    assert all(torch.equal(a, b) and torch.equal(a.grad, b.grad) for a, b in pairs)
    _, state = cms(text, return_state=True)
    assert state.cms == ((), ())
    assert isinstance(mlp.blocks[0].mlp, MLP)


def test_the_usual_mlp_is_still_there():
    model = LanguageModel(ModelConfig(layers=1))
    assert [name for name, _ in model.blocks[0].named_children()][2:] == ["mlp_norm", "mlp"]
    assert model.state_dict()["blocks.0.mlp.gate.weight"].shape == (344, 128)


def test_without_updates_levels_are_a_chain_of_mlps():
    layer = made(CmsConfig((2, 4), updates=False))
    x = tokens(2, 9, DIM)
    h = x
    for level in layer.levels:
        h = h + level.mlp(level.norm(h))
    torch.testing.assert_close(layer(x)[0], h)
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} == {"levels"}


def test_the_levels_share_the_mlp_s_width():
    assert ModelConfig(dim=64, mlp_ratio=4.0, cms=CmsConfig()).mlp_dims == (64, 64, 64, 64)
    assert ModelConfig(dim=64, mlp_ratio=4.25, cms=CmsConfig()).mlp_dims == (72, 72, 64, 64)
    assert ModelConfig(dim=64, mlp_ratio=0.1, cms=CmsConfig()).mlp_dims == (8, 8, 8, 8)
    nested = ModelConfig(dim=64, mlp_ratio=4.0, cms=CmsConfig(variant="nested"))
    assert nested.mlp_dims == (256,)
    assert ModelConfig(dim=64, mlp_ratio=4.0).mlp_dims == (256,)


def test_everything_learns():
    """Also what is only seen through the inner updates: targets, rates."""
    layer = made(CmsConfig((3, 6)))
    y, _ = layer(tokens(2, 14, DIM))
    y.square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 1e-8, name


@pytest.mark.parametrize("bias", [-2.2, 8.0])
def test_a_level_learns_its_target(bias):
    """On a repeated text the error shrinks, also at the highest rates."""
    layer = made(CmsConfig((16, 64)), dim=32)
    for rate in layer.rates:
        nn.init.constant_(rate.bias, bias)
    x = tokens(1, 16, 32).repeat(1, 64, 1)
    n = layer.levels[0].norm(x[:, :16])
    _, (state, _) = layer(x)

    def error(w1, w2):
        y = F.gelu(n @ w1, approximate="tanh") @ w2
        return (y - layer.target(n)).square().mean().item()

    assert error(*state.weights) < 0.5 * error(*start(layer, 0))


@pytest.mark.parametrize("bias", [None, 8.0], ids=["at the start", "at the highest rates"])
@pytest.mark.parametrize("ratio", [4.0, 16.0])
@pytest.mark.parametrize("variant", ["sequential", "independent", "nested"])
@torch.no_grad()
def test_levels_are_bounded_on_long_texts(variant, ratio, bias):
    """16,384 tokens: random, constant, and of period 2."""
    layer = made(CmsConfig((16, 64, 256, 1024), variant=variant), 0, 32, ratio, torch.float32)
    layer.init_weights()
    if bias is not None:
        for rate in layer.rates:
            nn.init.constant_(rate.bias, bias)
    a, b = tokens(2, 32).float()
    random = tokens(16_384, 32).float()
    x = torch.stack((random, a.expand_as(random), torch.stack((a, b)).repeat(8_192, 1)))
    y, states = layer(x)
    assert y.isfinite().all()
    for i, state in enumerate(states):
        matrices = start(layer, 0 if variant == "nested" else i)
        for now, before in zip(state.weights, matrices, strict=True):
            ratios = now.flatten(1).norm(dim=1) / before.norm()
            assert ratios.min() > 0.1
            assert ratios.max() < 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_sizes": ()}, r"chunk_sizes must be at least one .* not \(\)"),
        ({"chunk_sizes": (8, 4)}, r"chunk_sizes must be .*none falling, not \(8, 4\)"),
        ({"chunk_sizes": (0, 4)}, r"chunk_sizes must be .* above 0"),
        ({"chunk_sizes": (4, 6), "variant": "nested"}, "chunk_sizes must be multiples"),
        ({"variant": "parallel"}, "variant must be 'sequential', 'independent' or 'nested'"),
        ({"activation": "relu"}, "activation must be 'gelu' or 'silu', not 'relu'"),
        ({"lr_max": 1.5}, r"lr_max must be in \(0, 1\], .* not 1.5"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(HopeError, match=message):
        CmsConfig(**options)


def test_a_state_of_another_model_is_refused():
    layer = made(CmsConfig((2, 4)))
    _, states = layer(tokens(1, 3, DIM))
    with pytest.raises(ValueError, match="state must hold 2 levels of a CMS, not 1"):
        layer(tokens(1, 3, DIM), states[:1])
    with pytest.raises(ValueError, match="state must hold 0 levels of a CMS, not 2"):
        made(CmsConfig((2, 4), updates=False))(tokens(1, 3, DIM), states)
