"""Learning while reading: against the operator and a plain loop, due levels alone, runs."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hope import (
    AttentionConfig,
    CmsConfig,
    HopeConfig,
    HopeError,
    LanguageModel,
    ModelConfig,
    RunConfig,
    TitansConfig,
    TrainingDiverged,
)
from hope.config import LearnConfig, from_dict, to_dict
from hope.continual import Learner, learn_config, learned_weights

import hope_ext

MIXERS = {
    "attention": AttentionConfig(heads=2, head_dim=8),
    "hope": HopeConfig(heads=2, head_dim=8, chunk_size=8),
    "titans": TitansConfig(heads=2, head_dim=8, chunk_size=8),
}
CHUNKS = (8, 16, 32)


def run_config(mixer="attention", variant="sequential", updates=True, chunks=CHUNKS):
    cms = None if chunks is None else CmsConfig(chunks, variant=variant, updates=updates)
    model = ModelConfig(mixer=MIXERS[mixer], dim=16, layers=2, cms=cms)
    train = RunConfig().train
    return RunConfig(preset="small", model=model, train=replace(train, batch=2, sequence=32))


def made(run):
    """A model in float64 in which levels learn and answer something."""
    torch.manual_seed(0)
    model = LanguageModel(run.model).double()
    for block in model.blocks:
        if block.cms is not None and block.cms.config.updates:
            for rate in block.cms.rates:
                torch.nn.init.ones_(rate.bias)
    return model


def text(count, seed=1):
    return torch.randint(0, 257, (count,), generator=torch.Generator().manual_seed(seed)).short()


def read(learner, tokens, start=0):
    """Whole segments of tokens from `start`; the nats."""
    segment = learner.config.segment
    return [
        learner.read(tokens[i : i + segment + 1])
        for i in range(start, len(tokens) - segment, segment)
    ]


def parameters(model):
    return {name: w.detach().clone() for name, w in model.named_parameters()}


@pytest.mark.parametrize("variant", ["sequential", "independent"])
def test_a_level_learns_what_the_operator_is_taught(variant):
    """Error signals and inputs of every level, read by hooks, given to cms_memory("teach")."""
    run, rate = run_config("hope", variant, updates=False), 0.05
    model = made(run)
    before = parameters(model)
    seen = {}
    for b, block in enumerate(model.blocks):
        for i, level in enumerate(block.cms.levels):

            def note(module, inputs, output, key=(b, i)):
                errors = seen.setdefault(key, ([], []))[1]
                seen[key][0].append(inputs[0].detach())
                output.register_hook(errors.append)

            level.mlp.register_forward_hook(note)
    config = learn_config(run, rule="sgd", lr=(rate,), clip=1e9, context=0)
    assert config.segment == 8
    assert config.chunks == CHUNKS
    read(Learner(model, run, config), text(8 * 11 + 1))
    for (b, i), (inputs, errors) in seen.items():
        x, error = torch.cat(inputs, 1), torch.cat(errors, 1)  # 88 tokens: not whole slow chunks
        assert x.shape[1] == 88
        name = f"blocks.{b}.cms.levels.{i}.mlp."
        start = tuple(before[name + part].mT.contiguous() for part in ("up.weight", "down.weight"))
        lr = torch.full(x.shape[:2], rate, dtype=torch.float64)
        _, state = hope_ext.cms_memory(
            x,
            start,
            lr,
            error,
            chunk_size=CHUNKS[i],
            objective="teach",
            residual=False,
            return_state=True,
        )
        mlp = model.blocks[b].cms.levels[i].mlp
        for learned, expected, first in zip(
            (mlp.up.weight.mT, mlp.down.weight.mT), state.weights, start, strict=True
        ):
            assert (expected - first).abs().max() > 1e-4
            torch.testing.assert_close(learned.detach(), expected[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("updates", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_learning_is_a_plain_loop(mixer, updates):
    """One segment after the other by autograd from functional weights, sums by hand.

    The levels' weights inside the text are W plus what the text has written.
    """
    run, rate = run_config(mixer, updates=updates), 0.05
    model, tokens = made(run), text(8 * 8 + 1)
    config = learn_config(run, rule="sgd", lr=(rate,), clip=1e9, context=0)
    by_hand = made(run)
    nats = read(Learner(model, run, config), tokens)

    weights = {name: w.detach().clone() for name, w in by_hand.named_parameters()}
    paces = learned_weights(by_hand, "cms")
    names = [[n for n, w in by_hand.named_parameters() if any(w is x for x in p)] for p in paces]
    pending = {name: torch.zeros_like(w) for name, w in weights.items()}
    offsets, state = None, None  # [block][level] of (W1, W2)
    for segment in range(8):
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        start = [
            [
                tuple(
                    leaves[f"blocks.{b}.cms.levels.{i}.mlp.{part}.weight"].mT
                    for part in ("up", "down")
                )
                for i in range(len(CHUNKS))
            ]
            for b in range(2)
        ]
        if state is not None and updates:
            state = replace(
                state,
                cms=tuple(
                    tuple(
                        replace(s, weights=(start[b][i][0] + o[0], start[b][i][1] + o[1]))
                        for i, (s, o) in enumerate(zip(levels, offsets[b], strict=True))
                    )
                    for b, levels in enumerate(state.cms)
                ),
            )
        part = tokens[8 * segment : 8 * segment + 9].long()[None]
        logits, state = torch.func.functional_call(
            by_hand, leaves, (part[:, :-1], state), {"return_state": True}
        )
        loss = F.cross_entropy(logits[0], part[0, 1:])
        assert nats[segment] == pytest.approx(8 * loss.item(), rel=1e-6)
        learned = [name for level in names for name in level]
        grads = torch.autograd.grad(loss, [leaves[n] for n in learned])
        state = state.detach()
        if updates:
            offsets = [
                [
                    tuple(w - s.detach() for w, s in zip(level.weights, start[b][i], strict=True))
                    for i, level in enumerate(levels)
                ]
                for b, levels in enumerate(state.cms)
            ]
        for name, grad in zip(learned, grads, strict=True):
            pending[name] += rate * grad
        for chunk, level in zip(CHUNKS, names, strict=True):
            if 8 * (segment + 1) % chunk == 0:
                for name in level:
                    weights[name] -= pending[name]
                    pending[name] = torch.zeros_like(pending[name])
    for name, w in model.named_parameters():
        torch.testing.assert_close(w.detach(), weights[name], rtol=1e-6, atol=1e-9, msg=name)
    assert any((weights[n] - w).abs().max() > 1e-4 for n, w in by_hand.named_parameters())


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_only_levels_that_are_due_move(rule):
    run = run_config("hope")
    model, tokens = made(run), text(8 * 8 + 1)
    learner = Learner(model, run, learn_config(run, rule=rule))
    paces = [{id(w) for w in level} for level in learned_weights(model, "cms")]
    for segment in range(8):
        before = parameters(model)
        learner.read(tokens[8 * segment : 8 * segment + 9])
        for name, w in model.named_parameters():
            due = [8 * (segment + 1) % c == 0 for c in CHUNKS]
            moves = any(id(w) in level and d for level, d in zip(paces, due, strict=True))
            assert torch.equal(w, before[name]) != moves, (segment, name)


@pytest.mark.parametrize("mixer", ["hope", "attention"])
def test_nested_levels_are_one_mlp_and_move_at_the_fastest_pace(mixer):
    run = run_config(mixer, "nested")
    config = learn_config(run, rule="sgd")
    assert config.chunks == (8,)
    model, tokens = made(run), text(8 * 5 + 1)
    learner = Learner(model, run, config)
    before = parameters(model)
    read(learner, tokens)
    moved = {name for name, w in model.named_parameters() if not torch.equal(w, before[name])}
    assert moved == {
        f"blocks.{b}.cms.levels.0.mlp.{part}.weight" for b in range(2) for part in ("up", "down")
    }


@pytest.mark.parametrize("method", ["finetune", "mlp"])
def test_fine_tuning_is_a_step_of_adamw_for_every_segment(method):
    run = run_config("attention", chunks=None)
    model, tokens = made(run), text(16 * 6 + 1)
    config = learn_config(run, method=method, segment=16, lr=(1e-3,), clip=0.5, context=16)
    by_torch = made(run)
    read(Learner(model, run, config), tokens)
    weights = [w for n, w in by_torch.named_parameters() if method == "finetune" or ".mlp." in n]
    train = run.train
    options = {"betas": (train.beta1, train.beta2), "eps": train.eps, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(weights, lr=1e-3, **options)
    for i in range(0, 96, 16):  # the context is one segment: windows that know nothing before
        part = tokens[i : i + 17].long()[None]
        optimizer.zero_grad()
        by_torch.loss(part[:, :-1], part[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
    expected = dict(by_torch.named_parameters())
    for name, w in model.named_parameters():
        torch.testing.assert_close(w, expected[name], rtol=1e-7, atol=1e-9, msg=name)
    assert len(weights) < len(expected) or method == "finetune"


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_learner_goes_on_from_its_state_bit_for_bit(mixer):
    run = run_config(mixer)
    config = learn_config(run, context=32)
    tokens = text(8 * 9 + 1)
    whole = made(run)
    nats = read(Learner(whole, run, config), tokens)
    model = made(run)
    first = Learner(model, run, config)
    assert read(first, tokens[: 8 * 5 + 1]) == nats[:5]  # in the middle of a context and a chunk
    saved, weights = first.state_dict(), parameters(model)
    again = made(run)
    again.load_state_dict(weights)
    second = Learner(again, run, config)
    second.load_state_dict(saved)
    assert read(second, tokens, 8 * 5) == nats[5:]
    for a, b in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_carried_does_not_grow_and_starts_anew_after_the_context():
    run = run_config("attention")
    config = learn_config(run)
    assert config.context == run.train.sequence == 32
    learner, tokens, sizes = Learner(made(run), run, config), text(8 * 16 + 1), []
    for i in range(16):
        learner.read(tokens[8 * i : 8 * i + 9])
        sizes.append(sum(x.numel() for x in learner.state_dict()["state"] if x is not None))
    assert sizes[:4] * 4 == sizes
    assert sizes[0] < sizes[3]


def test_a_last_part_is_read_and_not_learned():
    run = run_config("hope")
    model = made(run)
    learner, tokens = Learner(model, run, learn_config(run)), text(8)
    before = parameters(model)
    with torch.no_grad():
        cost = model.loss(tokens[None, :-1].long(), tokens[None, 1:].long())
    assert learner.read(tokens) == pytest.approx(7 * cost.item(), rel=1e-6)
    assert all(torch.equal(w, before[name]) for name, w in model.named_parameters())
    for wrong in (tokens[:1], text(10)):
        with pytest.raises(ValueError, match=r"tokens must be 2 to 9, not \d+"):
            learner.read(wrong)


def test_learning_that_diverges_says_so():
    run = run_config("hope")
    model = made(run)
    with torch.no_grad():
        model.blocks[0].cms.levels[0].mlp.up.weight[0, 0] = float("nan")
    with pytest.raises(TrainingDiverged, match=r"diverged \(loss nan, .*: .*levels.0.mlp.up"):
        Learner(model, run, learn_config(run)).read(text(9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sleep"}, "method must be 'cms', 'finetune' or 'mlp', not 'sleep'"),
        ({"rule": "adam"}, "rule must be 'adamw' or 'sgd', not 'adam'"),
        ({"segment": 0}, "segment must be at least 1, not 0"),
        ({"chunks": (8, 16)}, r"chunks must be 3 numbers, .* not \(8, 16\)"),
        ({"segment": 16}, r"chunks must be whole segments of 16 tokens, not \(8, 16, 32\)"),
        ({"context": 12}, "context must be whole segments of 8 tokens, not 12"),
        ({"context": -8}, "context must be at least 0, not -8"),
        ({"lr": (1e-3, 1e-4)}, "lr must be one number, or one for each of chunks, not"),
        ({"lr": (0.0,)}, r"lr must be above 0, not \(0.0,\)"),
        ({"clip": 0.0}, "clip must be above 0, not 0.0"),
        ({"method": "mlp", "chunks": (8,)}, r"chunks must be empty with the method mlp, not \(8,"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(HopeError, match=message):
        learn_config(run_config(), **settings)


def test_levels_need_a_cms():
    with pytest.raises(HopeError, match="method 'cms' needs a model with a CMS, and small has"):
        learn_config(run_config(chunks=None), method="cms")
    assert learn_config(run_config(chunks=None)).method == "finetune"


def test_settings_have_a_json_form():
    config = learn_config(run_config(), lr=(1e-3, 1e-4, 1e-5))
    assert from_dict(LearnConfig, json.loads(json.dumps(to_dict(config)))) == config
