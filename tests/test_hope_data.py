"""The corpus, its split and its order."""

import hashlib

import numpy as np
import pytest
import torch
from hope import HopeError, load_corpus
from hope.data import SEPARATOR, Document, WindowSampler, encode, validation_batches


def test_a_separator_precedes_every_document():
    tokens = encode([Document("a", b"hi"), Document("b", b"\xff")])
    assert tokens.tolist() == [SEPARATOR, 104, 105, SEPARATOR, 255]


def test_the_standard_library_is_split_by_file():
    corpus = load_corpus()
    assert len(corpus.train) > 4_000_000
    share = len(corpus.validation) / (len(corpus.train) + len(corpus.validation))
    assert 0.02 < share < 0.10
    assert (corpus.train == SEPARATOR).sum() > (corpus.validation == SEPARATOR).sum() > 10
    assert "standard library" in corpus.description
    assert load_corpus().fingerprint == corpus.fingerprint


def test_the_fingerprint_of_bytes_is_that_of_the_first_runs(tmp_path):
    """Runs that began before there were tokenizers can be resumed."""
    (tmp_path / "a.txt").write_bytes(b"some text " * 40)
    corpus = load_corpus([str(tmp_path / "a.txt")], window=32)
    tokens = np.array([256, *b"some text " * 40], np.int16)
    digest = hashlib.sha256()
    for side in (tokens[:-33], tokens[-33:]):
        digest.update(len(side).to_bytes(8, "big") + side.tobytes())
    assert corpus.fingerprint == digest.hexdigest()


def test_the_standard_library_is_its_source_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(HopeError, match="no source of Python's standard library"):
        load_corpus()
    for name in ("a.py", "b/c.py", "site-packages/d.py", "dist-packages/e/f.py", "g.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name * 100)
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n\xe9" * 100)
    corpus = load_corpus(window=32)
    tokens = torch.cat((corpus.train, corpus.validation)).tolist()
    assert tokens == [SEPARATOR, *b"a.py" * 100, SEPARATOR, *b"b/c.py" * 100]


def test_directories_and_globs_leave_out_what_is_not_text(tmp_path):
    for index in range(40):
        (tmp_path / f"{index}.txt").write_text(f"document {index}\n" * 20)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\x00\x00")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "secret.txt").write_text("secret")
    (tmp_path / "empty.txt").touch()
    whole = load_corpus([str(tmp_path)], window=32)
    assert "40 files, 2 empty or not text left out" in whole.description
    assert "split by file" in whole.description
    both = torch.cat((whole.train, whole.validation))
    assert sorted(both[both != SEPARATOR].tolist()) == sorted(
        b"".join(path.read_bytes() for path in tmp_path.glob("[0-9]*.txt"))
    )
    by_glob = load_corpus([str(tmp_path / "*.txt"), str(tmp_path / "1.txt")], window=32)
    assert "40 files, 1 empty" in by_glob.description  # each file once


def test_a_single_file_is_validated_on_its_end(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {number}\n" for number in range(1000)))
    corpus = load_corpus([str(path)], window=64)
    assert bytes(corpus.validation.tolist()).endswith(b"line 999\n")
    joined = corpus.train.tolist()[1:] + corpus.validation.tolist()
    assert bytes(joined) == path.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("tiny.txt", b"too short", "too little text: 10 bytes"),
        ("nul.bin", b"abc\0" * 1000, r"nul.bin is not UTF-8 text \(a zero byte at offset 3\)"),
        ("latin.txt", b"caf\xe9 " * 1000, r"latin.txt is not UTF-8 text \(byte 0xe9 at offset 3\)"),
    ],
)
def test_a_file_that_cannot_be_trained_on(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HopeError, match=message):
        load_corpus([str(tmp_path / name)])


def test_missing_data(tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.bin").write_bytes(b"\0\1")
    for pattern, message in (
        ("absent.txt", "no such file or directory: .*absent.txt"),
        ("*.rst", r"no file matches .*\*.rst"),
        ("nothing", "no files in the directory"),
        ("binary", "no text in .*: all 1 files there are empty or not UTF-8 text"),
    ):
        with pytest.raises(HopeError, match=message):
            load_corpus([str(tmp_path / pattern)])


def test_an_epoch_reads_every_window_once_and_the_next_another_order():
    tokens = torch.arange(1000, dtype=torch.int16)
    sampler = WindowSampler(tokens, window=10, batch=3, seed=1)
    first, orders = sampler._starts, []
    while sampler.epoch < 2:
        inputs, targets, _ = sampler.next_batch()
        assert inputs.dtype == torch.int64
        assert torch.equal(inputs + 1, targets)
        orders += inputs[:, 0].tolist()
    count = len(first)
    assert orders[:count] == first.tolist()
    assert len(set(orders[:count])) == count >= 98
    assert np.all(np.diff(sorted(first)) == 10)
    assert orders[count : 2 * count] != orders[:count]


def test_the_sampler_resumes_anywhere():
    tokens = torch.arange(300, dtype=torch.int16)
    sampler = WindowSampler(tokens, window=10, batch=7, seed=5)
    for _ in range(6):
        sampler.next_batch()
    state = sampler.state_dict()
    expected = [sampler.next_batch()[0] for _ in range(9)]
    other = WindowSampler(tokens, window=10, batch=7, seed=0)
    other.load_state_dict(state)
    for batch in expected:
        assert torch.equal(other.next_batch()[0], batch)


def test_validation_windows_are_spread_evenly_and_never_change():
    tokens = torch.arange(1001, dtype=torch.int16)
    batches = list(validation_batches(tokens, window=10, batch=4, limit=100))
    starts = torch.cat([inputs[:, 0] for inputs, *_ in batches])
    assert len(starts) == 10
    assert (starts[0], starts[-1]) == (0, 990)
    again = torch.cat([inputs[:, 0] for inputs, *_ in validation_batches(tokens, 10, 4, 100)])
    assert torch.equal(starts, again)
    everything = list(validation_batches(tokens, window=10, batch=4, limit=10**9))
    assert sum(len(inputs) for inputs, *_ in everything) == 100
