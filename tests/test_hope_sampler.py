"""Batches: their order, packed documents, shares of processes, and that nothing leaks."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hope import (
    AttentionConfig,
    CmsConfig,
    Corpus,
    HopeConfig,
    HopeError,
    LanguageModel,
    MacConfig,
    MagConfig,
    MalConfig,
    ModelConfig,
    TitansConfig,
    TrainConfig,
)
from hope.data import PackedSampler, WindowSampler, training_sampler, validation_batches

LENGTHS = (1, 9, 40, 3, 3, 17, 64, 2, 28, 5)


def numbered(lengths=LENGTHS):
    """A stream whose token at position p is p + 1, but 0, the separator, where documents begin."""
    tokens = torch.arange(1, sum(lengths) + 1, dtype=torch.int32)
    tokens[[0, *np.cumsum(lengths)[:-1].tolist()]] = 0
    return tokens


def pieces(batch):
    """Tokens and targets of each packed text."""
    assert batch.tokens.shape == batch.targets.shape == (1, batch.cu_seqlens[-1])
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens[0] == 0
    for start, stop in itertools.pairwise(batch.cu_seqlens.tolist()):
        assert start < stop
        yield batch.tokens[0, start:stop], batch.targets[0, start:stop]


def test_packed_texts_are_parts_of_one_document_each_and_end_with_a_separator():
    stream, ends = numbered(), set(np.cumsum(LENGTHS).tolist())
    sampler = PackedSampler(stream, window=16, batch=2, seed=3, separator=0)
    cut = 0
    for _ in range(40):
        for tokens, targets in pieces(sampler.next_batch()):
            assert len(tokens) <= 16
            assert torch.equal(targets[:-1], tokens[1:])
            assert (tokens[1:] > 0).all()  # a separator is at the front alone
            if targets[-1] != 0:  # the rest of the document is elsewhere
                cut += 1
                assert len(tokens) == 1 or targets[-1] == tokens[-1] + 1
                assert tokens[-1] not in ends
            elif tokens[-1] > 0:
                assert int(tokens[-1]) in ends
    assert cut > 0


def test_an_epoch_of_packed_documents_reads_every_token_once_in_another_order():
    stream = numbered()
    sampler = PackedSampler(stream, window=4, batch=43, seed=0, separator=0)
    assert len(stream) == 43 * 4
    epochs = []
    for epoch in range(3):
        batch = sampler.next_batch()
        # One batch is an epoch: all tokens, each with the one that follows it in its document.
        pairs = sorted(zip(batch.tokens[0].tolist(), batch.targets[0].tolist(), strict=True))
        follow = [*stream.tolist()[1:], 0]
        assert pairs == sorted(zip(stream.tolist(), follow, strict=True))
        assert (sampler.epoch, sampler.cursor) == (epoch, 43)
        epochs.append(batch.tokens[0].tolist())
    assert epochs[0] != epochs[1] != epochs[2]


def test_packed_documents_get_new_neighbours_in_every_epoch():
    stream = numbered()
    sampler = PackedSampler(stream, window=len(stream) - 1, batch=1, seed=0, separator=0)
    orders = []
    for _ in range(4):
        batch = sampler.next_batch()
        # The whole stream but one token is one row: what follows a document's separator names it.
        seconds = (tokens[1] for tokens, _ in pieces(batch) if len(tokens) > 1)
        orders.append([int(token) for token in seconds])
        assert len(orders[-1]) >= len(LENGTHS) - 2
        assert orders[-1] != sorted(orders[-1])
    assert len(set(map(tuple, orders))) == 4


def test_a_document_that_the_split_has_cut_has_no_last_target():
    for cut, target in ((True, -100), (False, 0)):
        sampler = PackedSampler(numbered((5, 7)), 12 // 4, 4, seed=0, separator=0, cut=cut)
        batch = sampler.next_batch()
        assert batch.targets[batch.tokens == 12].tolist() == [target]
        assert (batch.targets == -100).sum() == cut


def test_targets_of_minus_100_are_no_part_of_the_loss():
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(mixer=TitansConfig(heads=1, head_dim=8), dim=8, layers=1))
    tokens, targets = torch.randint(0, 256, (2, 1, 12))
    targets[0, 5:] = -100
    logits = model(tokens)[0, :5]
    expected = -logits.log_softmax(-1).gather(1, targets[0, :5, None]).mean()
    torch.testing.assert_close(model.loss(tokens, targets), expected)


SAMPLERS = (
    lambda seed=5, **share: WindowSampler(numbered(), 10, 6, seed, **share),
    lambda seed=5, **share: PackedSampler(numbered(), 10, 6, seed, separator=0, **share),
)
both_samplers = pytest.mark.parametrize("make", SAMPLERS, ids=("windows", "packed"))


def same(a, b):
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@both_samplers
@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_shares_of_processes_are_the_batches_of_one(make, world):
    whole = make()
    shares = [make(rank=rank, world=world) for rank in range(world)]
    for _ in range(12):  # several epochs, which end inside batches
        batch, parts = whole.next_batch(), [sampler.next_batch() for sampler in shares]
        assert len({part.tokens.numel() for part in parts}) == 1
        dim = 0 if batch.cu_seqlens is None else 1
        assert torch.equal(torch.cat([part.tokens for part in parts], dim), batch.tokens)
        assert torch.equal(torch.cat([part.targets for part in parts], dim), batch.targets)
        if dim == 1:
            size = batch.tokens.shape[1] // world
            bounds = [part.cu_seqlens[1:] + i * size for i, part in enumerate(parts)]
            assert torch.equal(torch.cat(bounds), batch.cu_seqlens[1:])
        assert all(sampler.state_dict() == whole.state_dict() for sampler in shares)
    assert whole.epoch >= 3


@both_samplers
def test_every_sampler_resumes_anywhere(make):
    sampler = make()
    for skipped in range(7):
        other = make(seed=0)
        other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
        straight = make()
        for _ in range(skipped):
            straight.next_batch()
        assert all(same(other.next_batch(), straight.next_batch()) for _ in range(5)), skipped
        sampler.next_batch()


@both_samplers
def test_wrong_shares_are_refused(make):
    with pytest.raises(HopeError, match=r"rank must be at least 0 and below world \(2\), not 2"):
        make(rank=2, world=2)
    message = r"batch must be a multiple of the number of processes \(4\), not 6"
    with pytest.raises(HopeError, match=message):
        make(rank=0, world=4)


def test_packed_validation_reads_everything_once_and_never_changes():
    stream = numbered()
    batches = list(validation_batches(stream, 4, 5, 10**9, packed=True, separator=0))
    assert torch.equal(torch.cat([batch.tokens[0] for batch in batches]), stream.long())
    follow = torch.cat((stream[1:], stream.new_zeros(1))).long()
    assert torch.equal(torch.cat([batch.targets[0] for batch in batches]), follow)
    for batch in batches:
        for tokens, _ in pieces(batch):
            assert len(tokens) <= 4
            assert (tokens[1:] > 0).all()
    some = list(validation_batches(stream, 4, 5, 40, packed=True, separator=0))
    assert sum(batch.tokens.numel() for batch in some) == 40
    again = list(validation_batches(stream, 4, 5, 40, packed=True, separator=0))
    assert all(same(a, b) for a, b in zip(some, again, strict=True))


def test_the_training_sampler_is_that_of_the_settings():
    corpus = Corpus(numbered(), numbered(), "numbers")
    train = TrainConfig(batch=4, sequence=8)
    assert training_sampler(corpus, train).next_batch().tokens.shape == (4, 8)
    share = training_sampler(corpus, train, packed=True, rank=1, world=2).next_batch()
    assert share.tokens.shape == (1, 16)
    assert share.cu_seqlens[-1] == 16


# ---- no memory passes from one document to the next ----------------------------------------------

SIZES = {"heads": 2, "head_dim": 8}
MIXERS = {
    "titans": TitansConfig(**SIZES, chunk_size=4),
    "titans-deep": TitansConfig(**SIZES, chunk_size=4, memory="deep"),
    "hope": HopeConfig(**SIZES, chunk_size=4),
    "attention": AttentionConfig(**SIZES, conv_width=4),
    "mac": MacConfig(**SIZES, chunk_size=4, segment=6),
    "mag": MagConfig(**SIZES, chunk_size=4, window=6),
    "mal": MalConfig(**SIZES, chunk_size=4, window=6),
}
CMS = {
    variant: CmsConfig((4, 8), variant=variant)
    for variant in ("sequential", "independent", "nested")
}
MODELS = {
    **{name: ModelConfig(mixer=mixer, dim=16, layers=2) for name, mixer in MIXERS.items()},
    **{
        f"cms-{variant}": ModelConfig(mixer=MIXERS["attention"], dim=16, layers=2, cms=cms)
        for variant, cms in CMS.items()
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_documents_of_a_pack_know_nothing_of_each_other(name):
    torch.manual_seed(0)
    model = LanguageModel(MODELS[name]).eval()
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 256, (n - 1,), generator=draw) for n in (9, 23, 14, 18)]
    stream = torch.cat([part for text in texts for part in (torch.tensor([256]), text)])
    tokens, targets, bounds = PackedSampler(stream, 32, 2, seed=0).next_batch()
    assert len(bounds) > 4
    with torch.no_grad():
        before = model(tokens, cu_seqlens=bounds)[0]
        loss = model.loss(tokens, targets, bounds)
        for start, stop in itertools.pairwise(bounds.tolist()):
            own = torch.zeros(64, dtype=torch.bool)
            own[start:stop] = True
            changed = tokens.clone()
            changed[0, start:stop] = (tokens[0, start:stop] + 1) % 256
            after = model(changed, cu_seqlens=bounds)[0]
            assert torch.equal(after[~own], before[~own])
            assert not torch.equal(after[own], before[own])
        # Without bounds what comes first is remembered: the test above can fail.
        assert not torch.equal(model(changed)[0][-1], model(tokens)[0][-1])
        # And each reads as if it were alone.
        alone = [
            model(tokens[:, start:stop])[0] for start, stop in itertools.pairwise(bounds.tolist())
        ]
        torch.testing.assert_close(torch.cat(alone), before, rtol=1e-4, atol=1e-4)
        expected = F.cross_entropy(torch.cat(alone), targets[0])
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
