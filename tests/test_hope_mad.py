"""MAD's tasks against their rules, told in Python by reading each text from left to right."""

import itertools
import math

import pytest
import torch
from hope import preset
from hope.config import override
from hope.evaluate import IGNORED, TASKS
from hope.evaluate.mad import MAD_TASKS, Compressor, Memorization
from torch import nn


def in_context(row):
    """Keys are 0 to 7, values 8 to 15, noise is 16 and above."""
    told, answers, known = {}, [], None
    for key, value in zip(row[::2], row[1::2], strict=True):
        if key >= 16:
            assert value >= 16
            known = None
        else:
            assert 0 <= key < 8 <= value < 16
            known = told.get(key)
            assert told.setdefault(key, value) == value
        answers += [IGNORED if known is None else known, IGNORED]
    assert known is not None  # the last key has occurred before
    return answers


def fuzzy(row):
    """Keys have tokens below 7, values below 15, padding is 15 and in front."""
    text = list(itertools.dropwhile(lambda token: token == 15, row))
    runs = [list(run) for _, run in itertools.groupby(text, key=lambda token: token < 7)]
    told, answers, known = {}, [IGNORED] * (len(row) - len(text)), False
    for key, value in zip(runs[::2], runs[1::2], strict=True):
        assert max(key) < 7 <= min(value)
        assert max(value) < 15
        for motif in (key, value):
            assert len(motif) <= 3
            assert len(set(motif)) == len(motif)
        known = tuple(key) in told
        assert told.setdefault(tuple(key), value) == value
        answers += [IGNORED] * (len(key) - 1)
        answers += value if known else [IGNORED] * len(value)
        answers += [IGNORED]  # after the value's last token anything may come
    assert known
    return answers


def copying(row):
    mark = row.index(15)
    assert row[mark + 1 :] == [14] * 16
    symbols = [token for token in row[:mark] if token != 14]
    assert len(symbols) == 16
    return [IGNORED] * (mark + 1) + symbols


def compressed(row):
    assert max(row[:-1]) < 15 == row[-1]
    return [*row[:-1], IGNORED]


FACTS = {}


def memorized(row):
    """The facts are nowhere in the texts: the same key always asks for the same."""
    assert set(row[1::2]) == {255}
    assert max(row[::2]) < 127
    return [x for key in row[::2] for x in (IGNORED, FACTS[key])]


RULES = {
    "in-context-recall": in_context,
    "noisy-in-context-recall": in_context,
    "fuzzy-in-context-recall": fuzzy,
    "selective-copying": copying,
    "compression": compressed,
    "memorization": memorized,
}
every_task = pytest.mark.parametrize("task", MAD_TASKS, ids=lambda task: task.name)


def learn_facts():
    generator = torch.Generator().manual_seed(5)
    for _ in range(40):
        tokens, targets = TASKS["memorization"].sample(16, generator)
        asked, answers = tokens[:, ::2].flatten(), targets[:, 1::2].flatten()
        FACTS.update(zip(asked.tolist(), answers.tolist(), strict=True))
    assert sorted(FACTS) == list(range(127))
    assert len(set(FACTS.values())) == 127
    assert set(FACTS.values()) <= set(range(127, 255))


@every_task
def test_texts_follow_the_rule(task):
    learn_facts()
    generator = torch.Generator().manual_seed(0)
    for setting in ({}, *task.settings.values()) * 3:
        tokens, targets = task.sample(8, generator, **setting)
        assert tokens.shape == targets.shape
        assert tokens.dtype == targets.dtype == torch.int64
        assert tokens.max() < task.vocab_size
        if not setting:
            assert tokens.shape[1] <= task.longest
        assert [RULES[task.name](row) for row in tokens.tolist()] == targets.tolist()


@every_task
def test_settings_ask_what_their_names_say(task):
    for name, setting in task.settings.items():
        tokens, _ = task.sample(64, torch.Generator().manual_seed(1), **setting)
        number, _, unit = name.partition(" ")
        if unit == "tokens":
            assert tokens.shape[1] - (task.name == "compression") == int(number)
        elif unit == "noise":
            noise = (tokens >= 16).float().mean().item()
            assert noise == pytest.approx(int(number[:-1]) / 100, abs=0.03)


def test_fuzzy_recall_is_judged_with_keys_of_three_tokens():
    task = TASKS["fuzzy-in-context-recall"]
    for setting, sizes in (({}, {1, 2, 3}), (task.settings["128 tokens"], {3})):
        tokens, _ = task.sample(32, torch.Generator().manual_seed(2), **setting)
        found = {
            len(list(run))
            for row in tokens.tolist()
            for is_key, run in itertools.groupby(row, key=lambda token: token < 7)
            if is_key
        }
        assert found == sizes


def test_facts_are_the_same_in_every_evaluation():
    assert torch.equal(Memorization().facts, Memorization().facts)


def test_scattered_tokens_are_anywhere():
    tokens, _ = TASKS["selective-copying"].sample(2000, torch.Generator().manual_seed(3))
    share = (tokens[:, :239] < 14).float().mean(0)
    assert ((share - 16 / 239).abs() < 6 * math.sqrt(16 / 239 / 2000)).all()


def test_a_probe_is_any_of_the_keys_seen():
    """With two keys of very different counts, the last one is each in half of the texts."""
    tokens, _ = TASKS["in-context-recall"].sample(4000, torch.Generator().manual_seed(4), tokens=8)
    keys = tokens[:, ::2]
    two_of_one = (keys[:, 0] == keys[:, 1]) & (keys[:, 2] != keys[:, 0])  # a a b, then a or b
    share = (keys[two_of_one, 3] == keys[two_of_one, 2]).float().mean().item()
    assert share == pytest.approx(0.5, abs=3 * 0.5 / math.sqrt(int(two_of_one.sum())))


# ---- the compressor ----------------------------------------------------------------------------

SMALL = ["model.dim=16", "model.layers=1", "model.mixer.heads=2", "model.mixer.head_dim=8"]


def compressor():
    torch.manual_seed(0)
    config = override(preset("tiny"), [*SMALL, "model.vocab_size=16"]).model
    return TASKS["compression"].model(config)


def test_a_compressor_reads_one_vector():
    model = compressor()
    assert isinstance(model, Compressor)
    tokens = torch.randint(15, (3, 12))
    encodings = torch.randn(3, 12, 16)
    model.encoder.features = lambda _: (encodings, None)
    first = model(tokens)
    assert first.shape == (3, 12, 16)
    encodings[:, :-1] = 0
    assert torch.equal(model(tokens), first)
    encodings[:, -1] = 0
    assert not torch.equal(model(tokens), first)


def test_a_compressor_by_hand():
    model = compressor()
    tokens = torch.randint(15, (2, 5))
    last = model.encoder.features(tokens)[0][:, -1]
    for place in range(5):
        waves = [place * 10_000 ** (-i / 7) for i in range(8)]
        y = last + torch.tensor([*map(math.sin, waves), *map(math.cos, waves)])
        for layer in model.decoder:
            if isinstance(layer, nn.Linear):
                y = y @ layer.weight.mT + layer.bias
            elif isinstance(layer, nn.GELU):
                y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
            else:
                y = layer.weight * y / (y.square().mean(-1, keepdim=True) + 1e-7).sqrt()
        torch.testing.assert_close(model(tokens)[:, place], y, rtol=1e-4, atol=1e-4)


def test_a_compressor_learns():
    """Four tokens fit into one vector of 16 numbers; guessing is right in 1/15."""
    task, model = TASKS["compression"], compressor()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(150):
        tokens, targets = task.sample(32, generator, tokens=4)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 0.9 * math.log(15)
    assert sum(losses[-10:]) / 10 < 0.85 * math.log(15)
