"""Learning while reading: against the operator and a plain loop, due levels alone, runs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hope import (
    AttentionConfig,
    CmsConfig,
    HopeConfig,
    LanguageModel,
    ModelConfig,
    RunConfig,
    TitansConfig,
)
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
