"""Tokenizers: bytes and tokenizer.json, from training one to a model that writes with it."""

import itertools
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hope import (
    DataConfig,
    HopeError,
    LanguageModel,
    ModelConfig,
    RunConfig,
    TitansConfig,
    TrainConfig,
    Trainer,
    decode,
    generate,
    load_corpus,
    load_model,
    load_tokenizer,
)
from hope.checkpoint import find_checkpoint
from hope.cli import main
from hope.data import Batch, encode, training_sampler, validation_batches
from hope.data.documents import Document
from hope.tokenizers import BYTES, JsonTokenizer, open_tokenizer, train_tokenizer
from hope.train import bits_per_byte, target_bytes
from torch import nn

tokenizers = pytest.importorskip("tokenizers", reason="the extra `test` has tokenizers")

TEXT = "the quick brown fox jumps over the lazy dog, caf\u00e9 \u4e16\u754c \U0001f642\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT.encode() * 3] * 4, 320)


def content(tokenizer):
    return json.loads(tokenizer._content)


def test_a_trained_tokenizer_is_lossless_small_and_repeatable(tokenizer):
    assert 290 < tokenizer.vocab_size <= 320
    assert len(tokenizer.encode(TEXT.encode())) < len(TEXT.encode()) / 2
    again = train_tokenizer([TEXT.encode() * 3] * 4, 320)
    assert again.fingerprint == tokenizer.fingerprint
    assert train_tokenizer([b"other text " * 9], 280).fingerprint != tokenizer.fingerprint
    draw = random.Random(0)
    alphabet = [*map(chr, range(0x250)), "\u4e16", "\U0001f642", "\ufffd", "\n", " "]
    for length in range(60):
        text = "".join(draw.choices(alphabet, k=length)).encode()
        tokens = tokenizer.encode(text)
        assert tokenizer.separator not in tokens
        # The library's own way back, and ours, whole and token by token.
        assert tokenizer._tokenizer.decode(tokens.tolist()).encode() == text
        assert tokenizer.decode(tokens.tolist()) == text
        assert b"".join(tokenizer.decode([token]) for token in tokens.tolist()) == text
        assert tokenizer.byte_counts[tokens.astype(np.int64)].sum() == len(text)


def test_what_looks_like_a_separator_is_text(tokenizer):
    text = b"a<|endoftext|>b"
    tokens = tokenizer.encode(text)
    assert tokenizer.separator not in tokens
    assert tokenizer.decode(tokens.tolist()) == text
    assert tokenizer.decode([tokenizer.separator]) == b""
    assert tokenizer.byte_counts[tokenizer.separator] == 0
    stream = encode([Document("a", text), Document("b", b"c")], tokenizer)
    assert (stream == tokenizer.separator).nonzero()[:, 0].tolist() == [0, 1 + len(tokens)]


def test_what_a_tokenizer_adds_around_a_text_is_left_out(tokenizer):
    added = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    other = JsonTokenizer(json.dumps({**content(tokenizer), "post_processor": added}))
    assert other._tokenizer.encode("the").ids[0] == other.separator
    assert other.encode(b"the").tolist() == tokenizer.encode(b"the").tolist()


def test_many_texts_are_encoded_as_each_alone(tokenizer, monkeypatch):
    monkeypatch.setattr("hope.tokenizers._BATCH_BYTES", 100)
    texts = [TEXT.encode()[:n].decode(errors="ignore").encode() for n in range(1, 70)]
    for together, text in zip(tokenizer.encode_all(iter(texts)), texts, strict=True):
        assert together.tolist() == tokenizer.encode(text).tolist()


def test_a_tokenizer_is_kept_letter_by_letter(tmp_path, tokenizer):
    """A checkpoint's is the same one, whatever the library's version would write."""
    text = json.dumps(content(tokenizer), indent=7)
    (tmp_path / "mine.json").write_text(text)
    mine = open_tokenizer(tmp_path / "mine.json")
    mine.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == text
    assert load_tokenizer(tmp_path).fingerprint == mine.fingerprint != tokenizer.fingerprint


def test_bytes_are_the_default(tmp_path):
    assert load_tokenizer(tmp_path) is BYTES is open_tokenizer(None)
    assert BYTES.encode(b"\x00\xff").tolist() == [0, 255]
    assert BYTES.decode([256, 104, 105, 256]) == b"hi"
    assert BYTES.byte_counts.tolist() == [1] * 256 + [0]


def sentencepiece(prepend):
    """A BPE as SentencePiece makes it: blanks as U+2581, bytes where a character is not known."""
    words = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abcdef", "ab", "\u2581a"]
    model = {
        "type": "BPE",
        "vocab": {word: i for i, word in enumerate(words)},
        "merges": [["a", "b"], ["\u2581", "a"]],
        "byte_fallback": True,
        "unk_token": None,
        "fuse_unk": True,
    }
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    first = [{"type": "Prepend", "prepend": "\u2581"}] if prepend else []
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    end = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prepend else []
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "</s>", "special": True, **special}],
        "normalizer": {"type": "Sequence", "normalizers": [*first, blank]},
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *end],
        },
        "model": model,
    }


def test_a_tokenizer_with_a_byte_fallback():
    tokenizer = JsonTokenizer(json.dumps(sentencepiece(prepend=False)))
    text = "ab a  cafe\u0301 \u4e16".encode()
    tokens = tokenizer.encode(text).tolist()
    assert len(tokens) < len(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.byte_counts[tokens].sum() == len(text)
    assert tokenizer.separator == 0


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path, tokenizer):
    good = content(tokenizer)
    renamed = json.loads(json.dumps(good).replace("<|endoftext|>", "<|end|>"))
    ordinary = json.loads(json.dumps(good))
    ordinary["added_tokens"][0]["special"] = False
    no_byte = {**good, "model": {**good["model"], "merges": []}}
    no_byte["model"]["vocab"] = {
        word: index for word, index in good["model"]["vocab"].items() if word != "\u010a"
    }
    for wrong, message in (
        (renamed, r"has no token to put between documents.*<\|endoftext\|>, "),
        (ordinary, "has no token to put between documents"),
        ({**good, "decoder": None}, "must have a decoder of type ByteLevel or ByteFallback, .* no"),
        ({**good, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "WordPiece"),
        ({**good, "normalizer": {"type": "Lowercase"}}, "keeps a text as it is: b'Two  words"),
        (sentencepiece(prepend=True), r"keeps a text as it is: b'Two .* comes back as b' Two"),
        (no_byte, "must have a token for every one of the 256 bytes"),
    ):
        with pytest.raises(HopeError, match=message):
            JsonTokenizer(json.dumps(wrong))
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_bytes(b"\xff")
    for name, message in (
        ("a.json", "a.json is not a tokenizer.json: "),
        ("b.json", "cannot read the tokenizer .*b.json: not UTF-8 text"),
        ("c.json", "cannot read the tokenizer .*c.json: No such file"),
    ):
        with pytest.raises(HopeError, match=message):
            open_tokenizer(tmp_path / name)
    with pytest.raises(HopeError, match=r"vocab_size must be at least 257, .*, not 256"):
        train_tokenizer([b"text"], 256)
    with pytest.raises(HopeError, match="must be UTF-8, which byte 0xff at offset 1 is not"):
        tokenizer.encode(b"a\xff")


def test_a_missing_library_names_its_extra(monkeypatch, tokenizer):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(HopeError, match=r"needs the package tokenizers, .*hope_ext\[data\]"):
        JsonTokenizer(tokenizer._content)


# ---- training and generating ---------------------------------------------------------------------

MODEL = ModelConfig(
    mixer=TitansConfig(heads=2, head_dim=8, chunk_size=8), dim=16, layers=1, vocab_size=320
)
TRAIN = TrainConfig(
    tokens=6 * 4 * 16, batch=4, sequence=16, lr=1e-2, validate_every=3, checkpoint_every=2
)


@pytest.fixture
def data(tmp_path, tokenizer):
    """Documents as JSON lines, and the tokenizer; some documents are for validation."""
    lines = [json.dumps({"text": TEXT * (1 + i % 3)}) + "\n" for i in range(80)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    tokenizer.write(tmp_path / "t.json")
    return DataConfig((str(tmp_path / "text.jsonl"),), str(tmp_path / "t.json"))


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_with_a_tokenizer_stops_resumes_bitwise_and_writes(tmp_path, data, packed):
    config = RunConfig(model=MODEL, train=TRAIN, data=replace(data, packed=packed))
    corpus = load_corpus(config.data, TRAIN.sequence)
    whole = Trainer(config, corpus, tmp_path / "whole")
    result = whole.run(progress=False)
    assert math.isfinite(result.validation_bits_per_byte)
    # Its first two steps, and then the rest in another trainer.
    Trainer(
        replace(config, train=replace(TRAIN, keep_checkpoints=9)), corpus, tmp_path / "part"
    ).run(progress=False)
    checkpoints = sorted((tmp_path / "part" / "checkpoints").iterdir())
    for later in checkpoints[1:]:
        later.rename(tmp_path / later.name)
    resumed = Trainer(config, corpus, tmp_path / "part", resume=True)
    assert resumed.step == 2
    resumed.run(progress=False)
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name]), name
    # A checkpoint is complete: the tokenizer is in it.
    tokenizer = load_tokenizer(find_checkpoint(tmp_path / "whole"))
    assert tokenizer.fingerprint == corpus.tokenizer.fingerprint
    model = load_model(tmp_path / "whole")
    again = "".join(decode(generate(model, seed=TRAIN.seed, tokenizer=tokenizer), tokenizer))
    assert again == result.sample != ""
    value = bits_per_byte(model, corpus.validation, TRAIN, tokenizer, packed=packed)
    assert value == result.validation_bits_per_byte


def test_bits_per_byte_count_the_bytes_of_tokens(data, tokenizer):
    """A model that knows nothing: each target costs log2 of the vocabulary, whatever it holds."""
    corpus = load_corpus(data, TRAIN.sequence)
    model = LanguageModel(MODEL)
    nn.init.zeros_(model.embedding.weight)
    config = replace(TRAIN, validation_tokens=10**9)
    # What is read of the stream: all but the first token and a remainder.
    windows = (len(corpus.validation) - 1) // TRAIN.sequence
    targets = corpus.validation[1 : 1 + windows * TRAIN.sequence].tolist()
    text = tokenizer.decode(targets)
    expected = math.log2(320) * len(targets) / len(text)
    value = bits_per_byte(model, corpus.validation, config, tokenizer)
    assert value == pytest.approx(expected, rel=1e-5)
    ignored = torch.tensor([targets[:8]])
    ignored[0, ::2] = -100
    kept = targets[1:8:2]
    assert target_bytes(Batch(ignored, ignored), tokenizer) == len(tokenizer.decode(kept))


def test_packed_documents_are_trained_on_and_judged_each_alone(tmp_path, data, tokenizer):
    config = RunConfig(model=MODEL, train=TRAIN, data=replace(data, packed=True))
    corpus = load_corpus(config.data, TRAIN.sequence)
    trainer = Trainer(config, corpus, tmp_path / "run")

    def bits(batches):
        """As if every text were alone, with the logarithms that the definition has."""
        nats, size = 0.0, 0
        for tokens, targets, bounds in batches:
            for start, stop in itertools.pairwise(bounds.tolist()):
                here = targets[0, start:stop]
                logs = trainer.model(tokens[:, start:stop])[0].double().log_softmax(-1)
                nats -= logs[torch.arange(len(here)), here].sum().item()
                size += len(tokenizer.decode(here.tolist()))
        return nats / size / math.log(2)

    validation = validation_batches(
        corpus.validation, 16, 4, TRAIN.validation_tokens, packed=True, separator=0
    )
    expected = bits(validation)
    assert trainer._validate() == pytest.approx(expected, rel=1e-4)
    expected = bits([training_sampler(corpus, TRAIN, packed=True).next_batch()])
    assert trainer._train_step()["train_bits_per_byte"] == pytest.approx(expected, rel=1e-4)


def test_text_begins_with_the_separator_and_ends_with_it(tokenizer):
    torch.manual_seed(0)
    model = LanguageModel(MODEL)
    prompt = tokenizer.encode(b"the quick").tolist()
    seen = []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].tolist()))
    written = list(generate(model, "the quick", length=9, temperature=0, tokenizer=tokenizer))
    hook.remove()
    assert seen[0] == [[tokenizer.separator, *prompt]]
    tokens = torch.tensor([[tokenizer.separator, *prompt, *written]])
    likeliest = model(tokens)[0, len(prompt) :, : tokenizer.vocab_size].argmax(-1).tolist()
    assert written == likeliest[: len(written)]
    assert len(written) == 9 or likeliest[len(written)] == tokenizer.separator
    nn.init.zeros_(model.embedding.weight)  # all tokens are as likely: the first is the separator
    assert list(generate(model, temperature=0, tokenizer=tokenizer)) == []


def test_a_model_of_another_vocabulary_is_refused(tmp_path, data, tokenizer):
    corpus = load_corpus(data, TRAIN.sequence)
    small = replace(MODEL, vocab_size=264)
    config = RunConfig(model=small, train=TRAIN, data=data)
    message = rf"vocab_size must be at least {tokenizer.vocab_size} for the tokens of .*, not 264"
    with pytest.raises(HopeError, match=message):
        Trainer(config, corpus, tmp_path / "run")
    with pytest.raises(HopeError, match="the model knows 264: it was trained with another"):
        next(generate(LanguageModel(small), tokenizer=tokenizer))


def test_the_corpus_tells_tokenizers_apart(data, tmp_path):
    corpus = load_corpus(data, 16)
    other = train_tokenizer([TEXT.encode()], 300)
    assert replace(corpus, tokenizer=other).fingerprint != corpus.fingerprint
    assert load_corpus(data, 16).fingerprint == corpus.fingerprint


def test_the_command_trains_a_tokenizer_that_others_use(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT * 60)
    call = ["tokenizer", "--data", "text.txt", "--vocab-size"]
    assert main([*call, "280", "--out", "t.json"]) == 0
    out = capsys.readouterr().out
    assert "data   text.txt (1 file)" in out
    assert "tokens 280" in out
    library = tokenizers.Tokenizer.from_file("t.json")
    assert library.decode(library.encode(TEXT).ids) == TEXT
    for arguments, message in (
        ([*call, "280", "--out", "t.json"], "t.json exists; a tokenizer is not written over"),
        ([*call, "280", "--out", "a/t.json"], "there is no directory a"),
        ([*call, "9", "--out", "u.json"], "vocab_size must be at least 257"),
        (["train", "--tokenizer", "u.json"], "cannot read the tokenizer u.json: No such file"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert main([*call, "9000", "--out", "all.json"]) == 0
    assert "(9,000 were asked for: there is nothing left to merge)" in capsys.readouterr().out
    sizes = ("model.dim=16", "model.layers=1", "model.mixer.heads=2", "model.mixer.head_dim=8")
    sizes += ("train.batch=2", "train.sequence=16", "model.mixer.chunk_size=8")
    small = [word for size in sizes for word in ("--set", size)]
    train = ["train", "--data", "text.txt", "--tokenizer", "t.json", "--preset", "tiny", *small]
    assert main([*train, "--steps", "2", "--out", "run"]) == 0
    assert "after 64 tokens" in capsys.readouterr().out
    prompt = ["generate", "run", "--prompt", "caf\u00e9", "--length", "5", "--seed", "1"]
    assert main(prompt) == 0
    assert capsys.readouterr().out.startswith("caf\u00e9")
    assert main([*train[:5], "--resume", "--out", "run"]) == 0
    mixed = ["compare", "tiny", "tiny-mag", "--data", "text.txt", "--tokenizer", "t.json", *small]
    assert main([*mixed, "--steps", "1", "--out", "both"]) == 0
    assert "budget 32 tokens for each" in capsys.readouterr().out
