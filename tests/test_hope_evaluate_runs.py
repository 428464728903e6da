"""What judges a trained run: reading in blocks and side by side, lm, needle, and their commands."""

import json
import math
import random
import re

import pytest
import torch
from hope import HopeError, LanguageModel, generate, preset
from hope.cli import main
from hope.config import override
from hope.evaluate.lm import predict
from hope.evaluate.needle import DIGITS, FILLER, Needle, find, haystack, make_needle, search, table
from hope.evaluate.reader import Reader
from hope.tokenizers import train_tokenizer
from torch import nn

SMALL = ["model.dim=32", "model.layers=2", "model.mixer.heads=2", "model.mixer.head_dim=16"]
MIXERS = (
    *("tiny", "tiny-deep", "tiny-mac", "tiny-mag", "tiny-mal", "tiny-conv-attention"),
    *("hope-tiny", "hope-tiny-cms", "hope-attention-tiny"),
)


def model(name="tiny"):
    settings = [*SMALL]
    if name in ("tiny-mac", "tiny-mag", "tiny-mal"):
        settings.append(f"model.mixer.{'segment' if name == 'tiny-mac' else 'window'}=12")
    if name != "tiny-conv-attention" and name != "hope-attention-tiny":
        settings.append("model.mixer.chunk_size=8")
    if name in ("hope-tiny-cms", "hope-attention-tiny"):
        settings.append("model.cms.chunk_sizes=[4, 8, 16, 32]")
    torch.manual_seed(0)
    return LanguageModel(override(preset(name), settings).model).eval()


def random_texts(*sizes):
    draw = torch.Generator().manual_seed(1)
    return [[256, *torch.randint(256, (n - 1,), generator=draw).tolist()] for n in sizes]


@torch.no_grad()
def at_once(m, text):
    """log p of text[1:] by one call."""
    log_p = m(torch.tensor([text]))[0].double().log_softmax(-1)
    return log_p[torch.arange(len(text) - 1), text[1:]]


@pytest.mark.parametrize("name", MIXERS)
def test_blocks_side_by_side_are_whole_texts_alone(name):
    m = model(name)
    reader, texts = Reader(m, block=7), random_texts(30, 5, 1, 17, 17)
    found = [torch.full((len(text) - 1,), torch.nan) for text in texts]
    for part in reader.read(texts):
        assert part.log_p.shape[1] <= 7
        for row, log_p, inside in zip(part.rows, part.log_p, part.inside, strict=True):
            here = found[row][part.start - 1 :][: int(inside.sum())]
            assert torch.isnan(here).all()  # no token is predicted twice
            here.copy_(log_p[inside])
    for text, log_p in zip(texts, found, strict=True):
        torch.testing.assert_close(log_p.double(), at_once(m, text), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MIXERS)
def test_a_state_is_what_all_answers_start_from(name):
    m = model(name)
    reader, contexts = Reader(m, block=7, batch=2), random_texts(20, 9, 20, 1)
    contexts.append([])
    answers = [[5, 6, 7], [5], [5, 9, 200, 1]]
    for context, state in zip(contexts, reader.states(contexts), strict=True):
        assert (state is None) == (not context)
        scores = reader.score(answers, [1] * 3, state)
        for answer, (log_p, _) in zip(answers, scores, strict=True):
            expected = at_once(m, context + answer)[len(context) :].sum().item()
            assert log_p == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", ["hope-tiny-cms", "tiny-mac", "tiny-conv-attention"])
def test_a_run_in_bfloat16_is_read_in_bfloat16(name):
    m, (text,) = model(name), random_texts(40)
    ((log_p, _),) = Reader(m, block=16, dtype="bfloat16").score([text], [1])
    assert log_p == pytest.approx(at_once(m, text).sum().item(), rel=0.05)
    ((exact, _),) = Reader(m, block=16).score([text], [1])
    assert log_p != exact
    with pytest.raises(HopeError, match=r"dtype must be .*, not 'float64'"):
        Reader(m, dtype="float64")


def sizes_read(m, monkeypatch) -> list[tuple[int, int]]:
    """The shapes of all tokens that the model is called with from now on."""
    sizes, features = [], m.features

    def noted(tokens, *args, **options):
        sizes.append(tuple(tokens.shape))
        return features(tokens, *args, **options)

    monkeypatch.setattr(m, "features", noted)
    return sizes


def test_no_call_is_longer_than_a_block(monkeypatch):
    m = model()
    sizes = sizes_read(m, monkeypatch)
    reader = Reader(m, block=16)
    (state,) = reader.states(random_texts(100))
    reader.score(random_texts(101), [1], state)
    assert max(tokens for _, tokens in sizes) == 16
    assert sum(tokens for _, tokens in sizes) == 200


def test_texts_that_have_ended_leave_the_batch(monkeypatch):
    m = model()
    sizes = sizes_read(m, monkeypatch)
    reader = Reader(m, block=16)
    list(reader.read(random_texts(10, 50, 33, 1)))
    assert sizes == [(3, 16), (2, 16), (1, 16), (1, 1)]
    sizes.clear()
    reader.states(random_texts(10, 50, 33, 10))
    assert sizes == [(4, 10), (2, 16), (2, 7), (1, 16), (1, 1)]


def test_scores_count_what_is_asked_and_tell_what_is_likeliest():
    m = model()
    reader, texts = Reader(m, block=4, batch=2), random_texts(12, 7, 9)
    for text in texts:  # from token 5 on, what the model would write itself
        text[5:] = generate(m, bytes(text[1:5]), length=len(text) - 5, temperature=0)
    log_p, greedy = zip(*reader.score(texts, [5] * 3), strict=True)
    assert greedy == (True, True, True)
    for text, value in zip(texts, log_p, strict=True):
        assert value == pytest.approx(at_once(m, text)[4:].sum().item(), abs=1e-4)
    texts[1][6] = (texts[1][6] + 1) % 256
    assert [g for _, g in reader.score(texts, [5] * 3)] == [True, False, True]
    assert [g for _, g in reader.score(texts, [7] * 3)] == [True, True, True]  # text 1 has no more
    assert reader.score([], []) == []


def test_a_continuation_is_what_generate_writes():
    m = model()
    reader = Reader(m)
    (state,) = reader.states([[256, *b"some tex"]])
    following = reader.continuation(ord("t"), state)
    written = [token for token, _ in zip(following, range(30), strict=False)]
    assert written == list(generate(m, b"some text", length=30, temperature=0))[: len(written)]
    assert written


def test_a_continuation_ends_where_the_model_ends_the_text():
    (state,) = Reader(Finder()).states([[256, *b"The pass key is 12345. The pass key i"]])
    assert bytes(Reader(Finder()).continuation(ord("s"), state)) == b" 12345"


def test_a_reader_refuses_nothing_to_read_with():
    with pytest.raises(HopeError, match="batch must be at least 1, not 0"):
        Reader(model(), batch=0)
    with pytest.raises(HopeError, match="block must be at least 1, not 0"):
        Reader(model(), block=0)


# ---- lm ----------------------------------------------------------------------------------------

TEXTS = [b"a first text" * 12, b"x", b"", b"another one\n" * 30, b"y" * 64]


@pytest.mark.parametrize("length", [None, 50])
def test_texts_are_predicted_as_by_one_call_for_each(length):
    m = model()
    result = predict(Reader(m, block=40, batch=3), iter(TEXTS), length)
    nats, counts, bytes_ = {}, {}, {}
    for text in TEXTS:
        tokens = [256, *text, 256]
        step = length or len(tokens)
        for start in range(0, len(tokens) - 1, step):
            piece = tokens[start : start + step + 1]
            for place, log_p in enumerate(at_once(m, piece).tolist()):
                limits = 0 if place < 64 else 2 ** int(math.log2(place))
                nats[limits] = nats.get(limits, 0) - log_p
                counts[limits] = counts.get(limits, 0) + 1
                bytes_[limits] = bytes_.get(limits, 0) + (piece[place + 1] != 256)
    assert result["documents"] == len(TEXTS)
    assert result["tokens"] == sum(counts.values()) == sum(map(len, TEXTS)) + len(TEXTS)
    assert result["bytes"] == sum(map(len, TEXTS))
    assert result["nats"] == pytest.approx(sum(nats.values()), rel=1e-5)
    bits = sum(nats.values()) / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / result["bytes"], rel=1e-5)
    mean = sum(nats.values()) / result["tokens"]
    assert result["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert [place["from"] for place in result["positions"]] == sorted(counts)
    for place in result["positions"]:
        first = place["from"]
        assert place["to"] == (2 * first or 64)
        assert (place["tokens"], place["bytes"]) == (counts[first], bytes_[first])
        assert place["nats"] == pytest.approx(nats[first], rel=1e-5)


def test_only_a_separator_has_no_bits_per_byte():
    result = predict(Reader(model()), [b"", b"z" * 64])
    last = result["positions"][-1]
    assert (last["from"], last["tokens"], last["bytes"], last["bits_per_byte"]) == (64, 1, 0, None)
    with pytest.raises(HopeError, match="texts must hold at least one document, not none"):
        predict(Reader(model()), [])
    with pytest.raises(HopeError, match="length must be at least 1, not 0"):
        predict(Reader(model()), [b"text"], 0)


def test_tokens_of_a_vocabulary_count_as_the_bytes_they_are():
    pytest.importorskip("tokenizers", reason="a tokenizer.json is read with it: extra data")
    texts = [b"the quick brown fox " * 9, "caf\u00e9 und Caf\u00e9".encode() * 3]
    tokenizer = train_tokenizer(texts, 300)
    torch.manual_seed(0)
    settings = [*SMALL, f"model.vocab_size={tokenizer.vocab_size}"]
    m = LanguageModel(override(preset("tiny"), settings).model).eval()
    reader = Reader(m, tokenizer, block=5)
    result = predict(reader, texts)
    nats = 0.0
    for text in texts:
        tokens = [tokenizer.separator, *tokenizer.encode(text).tolist(), tokenizer.separator]
        nats -= at_once(m, tokens).sum().item()
    size = sum(map(len, texts))
    assert result["bytes"] == sum(place["bytes"] for place in result["positions"]) == size
    assert result["tokens"] < size / 2
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    # A needle's length is one in tokens, too, and what is written is text.
    needle = make_needle(reader, 200, 0.5, random.Random(0))
    whole = 1 + len(reader.encode(needle.text)) + len(reader.encode(f" {needle.key}"))
    assert 150 < whole <= 200
    (answer,) = find(reader, [needle])
    assert answer["ranked"] in needle.choices
    assert len(answer["written"].encode()) <= 3 * (1 + DIGITS)


# ---- needle ------------------------------------------------------------------------------------


class Finder(nn.Module):
    """Answers right where the needle is among the last `sight` bytes, and else with a space and
    zeros; its state is the text.
    """

    def __init__(self, sight=10**9):
        super().__init__()
        self.nothing, self.sight = nn.Parameter(torch.zeros(1)), sight

    def features(self, tokens, state=None):
        return None, tokens if state is None else torch.cat((state, tokens), 1)

    def forward(self, tokens, state=None, *, return_state):
        _, texts = self.features(tokens, state)
        logits = torch.zeros(*tokens.shape, 257)
        for row, text in enumerate(texts.tolist()):
            for place in range(tokens.shape[1]):
                end = texts.shape[1] - tokens.shape[1] + place + 1
                logits[row, place, self.next(bytes(text[1:end]))] = 9
        return logits, texts

    def next(self, text):
        asked = re.search(rb"The pass key is( \d*)?$", text)
        if asked is None:
            return ord("?")
        told = re.search(rb"key is (\d{5})\.", text[-self.sight :])
        answer = b" " + (told[1] if told else b"0" * DIGITS)
        return [*answer, 256][len(asked[1] or b"")]


def test_a_needle_is_told_once_and_asked_for_at_the_end():
    reader = Reader(Finder())
    for length in (90, 200, 333, 1000):
        for depth in (0, 0.25, 0.5, 1):
            needle = make_needle(reader, length, depth, random.Random(0))
            told = list(re.finditer(r"The pass key is (\d{5})\. Remember it\.", needle.text))
            assert [match[1] for match in told] == [needle.key]
            assert needle.text.endswith("What is the pass key? The pass key is")
            assert needle.key in needle.choices
            assert len(set(needle.choices)) == 10
            assert all(re.fullmatch(r"[1-9]\d{4}", choice) for choice in needle.choices)
            hay = [needle.text[: told[0].start()], needle.text[told[0].end() :]]
            before, after = (len(re.findall(r"(green|blue|yellow|go|again)\.", h)) for h in hay)
            assert before == round(depth * (before + after))
            whole = 1 + len(needle.text) + 1 + DIGITS  # the separator, and the answer
            one_more = re.findall(r"[^.]+\.", FILLER)[(before + after) % 5].strip()
            assert whole <= length < whole + len(f" {one_more}")


def test_needles_are_drawn_by_the_seed():
    reader = Reader(Finder())
    one, same, other = (make_needle(reader, 200, 0.5, random.Random(seed)) for seed in (1, 1, 2))
    assert one == same
    assert one.key != other.key
    many = [make_needle(reader, 90, 0, random.Random(seed)) for seed in range(60)]
    assert {needle.choices.index(needle.key) for needle in many} == set(range(10))
    assert {sorted(needle.choices).index(needle.key) for needle in many} == set(range(10))


def test_a_haystack_of_ones_own():
    sentences = haystack("One is\nshort. Is it?  Yes! Dr. No")
    assert sentences == ["One is short.", "Is it?", "Yes!", "Dr.", "No"]
    needle = make_needle(Reader(Finder()), 150, 0.5, random.Random(0), sentences=sentences)
    assert needle.text.startswith("One is short. Is it? Yes!")
    with pytest.raises(HopeError, match="at least two sentences, not 1"):
        haystack("only one")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((50, 0.5), "length must be at least 80 for the needle alone, not 50"),
        ((500, 1.5), "depth must be between 0 and 1, not 1.5"),
        ((500, -0.1), "depth must be between 0 and 1, not -0.1"),
    ],
)
def test_what_needles_cannot_be(arguments, message):
    with pytest.raises(HopeError, match=message):
        make_needle(Reader(Finder()), *arguments, random.Random(0))
    with pytest.raises(HopeError, match="choices must be between 2 and 90000, not 1"):
        make_needle(Reader(Finder()), 500, 0.5, random.Random(0), choices=1)


def test_a_model_that_finds_the_needle_and_one_that_forgets():
    found = search(Reader(Finder(), batch=3), [150, 300], [0, 1], examples=4, progress=False)
    assert [(r["ranked"], r["written"]) for r in found] == [(1, 1)] * 4
    short = search(Reader(Finder(sight=120)), [300], [0, 1], examples=4, progress=False)
    assert short[0]["written"] == 0  # it writes zeros, which are no key
    assert short[0]["ranked"] < 1
    assert (short[1]["ranked"], short[1]["written"]) == (1, 1)
    lines = table(found).splitlines()
    assert lines[0].split() == ["length", "depth", "0", "depth", "1"]
    assert re.split("  +", lines[2]) == ["300", "1.00 / 1.00", "1.00 / 1.00"]


def test_what_a_model_answers_is_kept():
    needle = Needle(
        "The pass key is 12345. Remember it. The pass key is", "12345", ("54321", "12345")
    )
    (answer,) = find(Reader(Finder()), [needle])
    assert answer == {
        "key": "12345",
        "ranked": "12345",
        "written": " 12345",
        "ranked_right": True,
        "written_right": True,
    }
    with pytest.raises(HopeError, match="examples must be at least 1, not 0"):
        search(Reader(Finder()), [300], [0], examples=0)


# ---- the commands ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A directory with a text, and a run that was trained on it."""
    directory = tmp_path_factory.mktemp("evaluate")
    text = directory / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    small = [
        *("model.dim=16", "model.layers=1", "model.mixer.head_dim=8", "train.batch=2"),
        *("train.sequence=32", "train.validation_tokens=64"),
    ]
    settings = [part for setting in small for part in ("--set", setting)]
    arguments = ["--data", str(text), "--steps", "2", "--out", str(directory / "run"), *settings]
    assert main(["train", "--preset", "tiny", *arguments]) == 0
    return directory / "run"


@pytest.fixture
def here(run, monkeypatch):
    monkeypatch.chdir(run.parent)


def test_evaluate_lm(run, here, capsys):
    assert main(["evaluate", "lm", "run", "--data", "text.txt", "--length", "32", "1e3"]) == 0
    out = capsys.readouterr().out
    content = json.loads((run / "lm.json").read_text())
    assert (content["task"], content["run"], content["data"]) == ("lm", "run", ["text.txt"])
    assert content["checkpoint"] == "step-00000002"
    assert [result["length"] for result in content["results"]] == [32, 1000]
    for result in content["results"]:
        assert result["bytes"] == 2200
        assert f"{result['bits_per_byte']:.4f}" in out
    expected = predict(Reader.of_run(run), [(run.parent / "text.txt").read_bytes()], 32)
    assert content["results"][0] == expected


def test_evaluate_needle(run, here, capsys):
    call = ["evaluate", "needle", "run", "--length", "100", "--depth", "0", "1", "--examples", "2"]
    assert main([*call, "--choices", "3", "--out", "found.json"]) == 0
    assert "length      depth 0      depth 1" in capsys.readouterr().out
    content = json.loads((run.parent / "found.json").read_text())
    assert (content["task"], content["choices"], content["haystack"]) == ("needle", 3, None)
    assert content["results"] == search(
        Reader.of_run(run), [100], [0.0, 1.0], examples=2, choices=3, progress=False
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lm", "absent", "--data", "text.txt"], "no such run or checkpoint: absent"),
        (["lm", "run", "--data", "absent"], "no such file or directory: absent"),
        (["lm", "run", "--data", "text.txt", "--out", "no/x.json"], "there is no directory no"),
        (["needle", "run", "--haystack", "absent"], "cannot read absent: No such file"),
        (["needle", "run", "--length", "9"], "length must be at least 80"),
    ],
)
def test_a_mistake_is_one_line(run, here, capsys, arguments, message):
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hope: error: ")
    assert message in error
