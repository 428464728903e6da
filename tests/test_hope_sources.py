"""JSON lines, Parquet, data sets and shards, and what is wrong with them."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from hope import DataConfig, HopeError, load_corpus
from hope.cli import main
from hope.config import RunConfig, from_dict, override, to_dict
from hope.data import (
    SEPARATOR,
    Document,
    PackedSampler,
    WindowSampler,
    encode,
    load_shards,
    open_documents,
    tokenized,
    write_shards,
)
from hope.tokenizers import BYTES, open_tokenizer, train_tokenizer

TEXTS = [f"document {i}: caf\u00e9 \u4e16\u754c\n" + "abc \t\n" * (i % 7) for i in range(60)]
PARQUET = "the extra `test` has pyarrow"
DATASETS = "the extra `test` has datasets"


def read(*paths, field="text"):
    return [document.text.decode() for document in open_documents(DataConfig(paths, field=field))]


def write_lines(path, texts=TEXTS, field="text"):
    lines = (json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))
    path.write_text("".join(lines))
    return str(path)


def write_parquet(path, texts=TEXTS, field="text"):
    pyarrow = pytest.importorskip("pyarrow", reason=PARQUET)
    table = pyarrow.table({"id": list(range(len(texts))), field: texts})
    # Small row groups: there are several.
    pytest.importorskip("pyarrow.parquet", reason=PARQUET).write_table(
        table, path, row_group_size=7
    )
    return str(path)


def write_data_set(path, texts=TEXTS, field="text"):
    datasets = pytest.importorskip("datasets", reason=DATASETS)
    datasets.Dataset.from_dict({"id": list(range(len(texts))), field: texts}).save_to_disk(path)
    return str(path)


SOURCES = {
    "text.jsonl": write_lines,
    "lines.json": write_lines,
    "table.parquet": write_parquet,
    "saved": write_data_set,
}


@pytest.mark.parametrize("field", ["text", "content"])
@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_its_documents_in_order(tmp_path, name, field):
    path = SOURCES[name](tmp_path / name, field=field)
    assert read(path, field=field) == TEXTS
    # A .json file without the field in its first line is a text.
    if name == "lines.json":
        assert read(path, field="body") == [(tmp_path / name).read_text()]
    else:
        there = rf"\(data.field\); there are: 'id', '{field}'"
        with pytest.raises(HopeError, match=rf"{name}.* has no (field|column) 'body' {there}"):
            read(path, field="body")


def test_a_data_set_by_name_is_streamed(tmp_path):
    pytest.importorskip("datasets", reason=DATASETS)
    hub = tmp_path / "hub"  # what a name may be, too
    hub.mkdir()
    write_lines(hub / "train.jsonl")
    write_lines(hub / "test.jsonl", TEXTS[:3])
    assert read(f"hf:{hub}") == TEXTS
    assert read(f"hf:{hub}:test") == TEXTS[:3]
    assert read(f"hf:{hub}:default:test") == TEXTS[:3]
    for name, message in (
        (f"hf:{hub}:absent", "cannot read hf:.*absent"),
        ("hf:", "a data set is hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, not 'hf:'"),
        ("hf:a:b:c:d", "a data set is .*, not 'hf:a:b:c:d'"),
        (f"hf:{tmp_path / 'nowhere'}", "cannot read hf:.*nowhere"),
    ):
        with pytest.raises(HopeError, match=message):
            read(name)
    with pytest.raises(HopeError, match=r"hf:.* has no column 'body'|row 0: 'body' must be text"):
        read(f"hf:{hub}", field="body")


def test_splits_of_a_saved_data_set_are_named_one_by_one(tmp_path):
    datasets = pytest.importorskip("datasets", reason=DATASETS)
    one = datasets.Dataset.from_dict({"text": TEXTS[:4]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "both")
    with pytest.raises(HopeError, match=r"holds several data sets; name one of: .*both/train, "):
        read(str(tmp_path / "both"))
    assert read(str(tmp_path / "both" / "train")) == TEXTS[:4]


def test_sources_mix_and_are_described(tmp_path):
    write_lines(tmp_path / "a.jsonl")
    write_parquet(tmp_path / "b.parquet", [*TEXTS[:5], ""])
    (tmp_path / "c.txt").write_text("plain")
    (tmp_path / "d.json").write_text('{\n "text": "of several lines"\n}\n')
    (tmp_path / "e.png").write_bytes(b"\0")
    documents = open_documents(DataConfig((str(tmp_path),)))
    texts = [document.text.decode() for document in documents]
    assert texts == [*TEXTS, *TEXTS[:5], "plain", (tmp_path / "d.json").read_text()]
    assert documents.description == (
        f"{tmp_path} (4 files, 67 documents, 1 empty or not text left out, "
        "1 empty documents left out)"
    )
    corpus = load_corpus([str(tmp_path)], window=16)
    assert "split by document" in corpus.description
    assert len(corpus.train) + len(corpus.validation) == 67 + sum(len(t.encode()) for t in texts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": "b"\n', "bad.jsonl, line 3 is not JSON: "),
        ('{"text": "a"}\n{"body": "b"}', r"line 2 has no field 'text' \(data.field\); .* 'body'"),
        ('{"text": "a"}\n{"text": 5}', "line 2: 'text' must be text, not int"),
        ('{"text": null}', "line 1: 'text' must be text, not NoneType"),
        ('["text"]', "line 1 must be an object with the field 'text'"),
        ('{"text": "a\\ud800"}', r"line 1: 'text' is not text: half a .*'\\ud800'.* character 1"),
        ('{"text": "\xff"}'.encode("latin-1"), "line 1 is not JSON: .*0xff"),
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"text": ""}', "no text in .*bad.jsonl: all 1 documents there are empty"),
    ],
)
def test_broken_lines_are_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(HopeError, match=message):
        read(str(path))


def test_broken_tables_are_named(tmp_path):
    pytest.importorskip("pyarrow", reason=PARQUET)
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(HopeError, match=r"cannot read .*text.parquet: "):
        read(str(tmp_path / "text.parquet"))
    write_parquet(tmp_path / "null.parquet", [*TEXTS, None])
    with pytest.raises(HopeError, match=r"null.parquet, row 60: 'text' must be text, not NoneType"):
        read(str(tmp_path / "null.parquet"))
    write_parquet(tmp_path / "numbers.parquet", [1, 2])
    with pytest.raises(HopeError, match=r"numbers.parquet, row 0: 'text' must be text, not int"):
        read(str(tmp_path / "numbers.parquet"))


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(HopeError, match=r"needs the package pyarrow.parquet, .*hope_ext\[data\]"):
        read(path)


def test_settings_of_data_and_the_lists_of_old_checkpoints():
    data = DataConfig(("a.txt", "b"), "t.json", "body", True)
    assert from_dict(RunConfig, to_dict(RunConfig(data=data))).data == data
    assert from_dict(RunConfig, {"data": ["a.txt", "b"]}).data == DataConfig(("a.txt", "b"))
    assert from_dict(RunConfig, {"data": []}).data == DataConfig()
    changed = override(RunConfig(), ["data.packed=true", "data.tokenizer=t.json"]).data
    assert changed == DataConfig(tokenizer="t.json", packed=True)
    for wrong, message in (
        ({"data": 5}, "data must be a list of strings, not 5"),
        ({"data": {"paths": "a"}}, "data.paths must be a list of strings, not 'a'"),
        ({"data": {"packed": 1}}, "data.packed must be of type bool, not 1"),
        ({"data": {"field": ""}}, "data.field must be the name of a field, not ''"),
        ({"data": {"path": "a"}}, "unknown field data.path; there are: paths, tokenizer, "),
    ):
        with pytest.raises(HopeError, match=message):
            from_dict(RunConfig, wrong)


# ---- shards --------------------------------------------------------------------------------------


@pytest.fixture(params=["bytes", "tokens"])
def tokenizer(request):
    if request.param == "bytes":
        return BYTES
    pytest.importorskip("tokenizers", reason="the extra `test` has tokenizers")
    return train_tokenizer([text.encode() for text in TEXTS], 300)


def named(texts):
    return [Document(f"{i}", text.encode()) for i, text in enumerate(texts)]


def test_shards_are_the_stream_in_memory(tmp_path, tokenizer):
    documents = named(TEXTS)
    index = write_shards(tokenized(documents, tokenizer), tokenizer, tmp_path / "shards", 200)
    train, validation, description = load_shards([tmp_path / "shards"])
    held = [document.is_validation for document in documents]
    assert 0 < sum(held) < 30
    for side, mapped in ((False, train), (True, validation)):
        chosen = [d for d, h in zip(documents, held, strict=True) if h is side]
        memory = encode(chosen, tokenizer)
        assert len(mapped) == len(memory)
        assert torch.equal(mapped[torch.arange(len(memory))], memory.long())
        starts = (memory == tokenizer.separator).nonzero()[:, 0]
        assert mapped.starts().tolist() == starts.tolist()
        # A part of it, which begins and ends inside documents and shards.
        part = mapped.part(3, len(mapped) - 2)
        assert torch.equal(part[torch.arange(len(part))], memory[3:-2].long())
        assert part.starts().tolist() == [s - 3 for s in starts.tolist() if 3 <= s < len(part) + 3]
        # And so are the batches.
        for sampler in (WindowSampler, PackedSampler):
            extra = {"separator": tokenizer.separator} if sampler is PackedSampler else {}
            samplers = [sampler(tokens, 16, 3, 1, **extra) for tokens in (mapped, memory)]
            for _ in range(60):
                a, b = (s.next_batch() for s in samplers)
                assert all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert len(index["train"]["files"]) > 3
    assert index["dtype"] == "uint16"
    files = len(index["train"]["files"]) + len(index["validation"]["files"])
    assert f"(shards: {files}, documents: 60)" in description
    with pytest.raises(IndexError, match="positions -1 to -1 of a stream of"):
        train[torch.tensor([-1])]


def test_documents_are_tokenized_as_they_come(tokenizer):
    """Few of them are in memory at a time."""
    endless = (Document(f"{i}", b"text " * 1000) for i in itertools.count())
    for _, tokens in itertools.islice(tokenized(endless, tokenizer), 5):
        assert tokenizer.decode(tokens.tolist()) == b"text " * 1000
    assert int(next(endless).name) < 300


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Large(type(BYTES)):
        vocab_size = 70_000

        def encode(self, text):
            return np.frombuffer(text, np.uint8).astype(np.uint32) + 69_000

    index = write_shards(tokenized(named(TEXTS), Large()), Large(), tmp_path / "shards")
    assert index["dtype"] == "uint32"
    train, *_ = load_shards([tmp_path / "shards"])
    memory = encode([d for d in named(TEXTS) if not d.is_validation], Large())
    assert memory.dtype == torch.int32
    assert torch.equal(train[torch.arange(len(train))], memory.long())


def test_shards_of_several_directories_are_one_corpus(tmp_path):
    for name, texts in (("a", TEXTS[:30]), ("b", TEXTS[30:])):
        write_shards(tokenized(named(texts), BYTES), BYTES, tmp_path / name)
    both = load_corpus([str(tmp_path / "a"), str(tmp_path / "b")], window=16)
    alone = [load_corpus([str(tmp_path / name)], window=16) for name in "ab"]
    assert len(both.train) == sum(len(corpus.train) for corpus in alone)
    assert len({corpus.fingerprint for corpus in (both, *alone)}) == 3
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(HopeError, match=r"must all be shards or none, but .*a is .*c.txt is"):
        load_corpus([str(tmp_path / "a"), str(tmp_path / "c.txt")])
    with pytest.raises(HopeError, match=r"data.paths must name text here, not shards: .*a"):
        open_documents(DataConfig((str(tmp_path / "a"),)))


def test_shards_without_validation_are_cut_at_their_end(tmp_path):
    text = "word " * 200
    write_shards([(False, BYTES.encode(text.encode()))] * 3, BYTES, tmp_path / "one", 900)
    corpus = load_corpus([str(tmp_path / "one")], window=32)
    assert "validation: the end of the text" in corpus.description
    assert (len(corpus.train), len(corpus.validation), corpus.cut) == (3003 - 150, 150, True)
    whole = torch.cat([part[torch.arange(len(part))] for part in (corpus.train, corpus.validation)])
    assert torch.equal(whole, torch.tensor([SEPARATOR, *text.encode()]).repeat(3))
    with pytest.raises(HopeError, match=r"too little text: 3,003 bytes in .*one \(shards: 3, "):
        load_corpus([str(tmp_path / "one")], window=2000)


def test_damaged_shards_are_named(tmp_path):
    out = tmp_path / "shards"
    write_shards(tokenized(named(TEXTS), BYTES), BYTES, out)
    with pytest.raises(HopeError, match="shards is not empty; shards need a new directory"):
        write_shards([], BYTES, out)
    data = out / "train-00000.bin"
    whole = data.read_bytes()
    data.write_bytes(whole[:-2])
    with pytest.raises(HopeError, match=r"train-00000.bin is damaged: it must have .* bytes, not "):
        load_corpus([str(out)])
    data.unlink()
    with pytest.raises(HopeError, match=r"cannot read .*train-00000.bin: No such file"):
        load_corpus([str(out)])
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps({**index, "byteorder": "middle"}))
    with pytest.raises(HopeError, match=r"another byte order \(middle\)"):
        load_corpus([str(out)])
    (out / "index.json").write_text(json.dumps({**index, "tokenizer": "another"}))
    with pytest.raises(HopeError, match=r"shards is damaged: its tokens were not made with bytes"):
        load_corpus([str(out)])
    (out / "index.json").write_text(json.dumps({k: index[k] for k in ("format", "tokenizer")}))
    with pytest.raises(HopeError, match=r"index.json is damaged: KeyError\('byteorder'\)"):
        load_corpus([str(out)])


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    at_work = set()

    def documents():
        yield False, BYTES.encode(b"some text")
        at_work.update(path.name for path in tmp_path.iterdir())
        raise HopeError("a broken line")

    other = ".partial-other"  # of another process, which is still at work
    (tmp_path / other).mkdir()
    with pytest.raises(HopeError, match="a broken line"):
        write_shards(documents(), BYTES, tmp_path / "shards")
    assert [path.name for path in tmp_path.iterdir()] == [other]
    # What a writer leaves that was killed is removed by the next one.
    (left,) = at_work - {other}
    (tmp_path / left).mkdir()
    write_shards(tokenized(named(TEXTS), BYTES), BYTES, tmp_path / "shards")
    assert {path.name for path in tmp_path.iterdir()} == {other, "shards"}


def test_the_command_writes_shards_that_the_trainer_reads(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers", reason="the extra `test` has tokenizers")
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", TEXTS * 3, field="body")
    source = ("--data", "a.jsonl", "--field", "body")
    assert main(["tokenizer", *source, "--vocab-size", "300", "--out", "t.json"]) == 0
    tokens = int(re.search(r"tokens (\d+)", capsys.readouterr().out)[1])
    shards = ["shards", *source, "--tokenizer", "t.json", "--shard-tokens", "400"]
    assert main([*shards, "--out", "shards"]) == 0
    out = capsys.readouterr().out
    assert "data   a.jsonl (1 file, 180 documents)" in out
    assert "train: hope train --data shards" in out
    settings = ("model.dim=16", "model.layers=1", "model.mixer.head_dim=8", "model.mixer.heads=2")
    settings += ("train.batch=2", "train.sequence=32", "data.packed=true")
    small = [word for setting in settings for word in ("--set", setting)]
    call = ["train", "--data", "shards", "--preset", "tiny", "--steps", "3", *small]
    assert main([*call, "--out", "run"]) == 0
    out = capsys.readouterr().out
    assert "budget 3 steps of 64 tokens" in out
    assert "split by document" in out
    config = json.loads((tmp_path / "run/checkpoints/step-00000003/config.json").read_text())
    assert config["data"] == {
        "paths": ["shards"],
        "tokenizer": None,
        "field": "text",
        "packed": True,
    }
    assert tokens <= config["model"]["vocab_size"] < tokens + 8
    # A tokenizer that the shards were not made with.
    train_tokenizer([b"other text"], 260).write(tmp_path / "u.json")
    assert main([*call, "--tokenizer", "u.json", "--out", "other"]) == 2
    assert "the shards in shards were made with" in capsys.readouterr().err
    assert main([*call, "--tokenizer", "t.json", "--out", "same"]) == 0
    (tmp_path / "shards" / "tokenizer.json").unlink()
    assert main([*call, "--out", "other"]) == 2
    assert "shards is damaged" in capsys.readouterr().err
    assert open_tokenizer("t.json").vocab_size == tokens
