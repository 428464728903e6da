"""Tokenizers of transformers for our runs, runs as models of transformers, and training there."""

import json

import pytest
import torch
from hope import HopeError, LanguageModel, ModelConfig, RunConfig, TitansConfig, decode, generate
from hope.cli import main
from hope.config import to_dict
from hope.tokenizers import BYTES, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
hf = pytest.importorskip("hope.hf", reason="the extra hf is not installed")

CONFIG = ModelConfig(
    mixer=TitansConfig(heads=2, head_dim=16, chunk_size=8), dim=32, layers=1, vocab_size=264
)


def write_run(path, vocab_size=264, seed=0, tokenizer=BYTES):
    """A checkpoint with an untrained model, which a run's directory stands for, too."""
    torch.manual_seed(seed)
    config = RunConfig(model=ModelConfig(**{**vars(CONFIG), "vocab_size": vocab_size}))
    model = LanguageModel(config.model).eval()
    with torch.no_grad():  # or it repeats the last byte
        model.blocks[0].mixer.out.weight.mul_(20)
    path.mkdir()
    tokenizer.save(path)
    save_file(model.state_dict(), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(to_dict(config)))
    return model


# ---- the tokenizer of bytes ----------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_every_text_comes_back(text):
    tokenizer = hf.HopeByteTokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == [256, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_no_text_is_a_special_token():
    tokenizer = hf.HopeByteTokenizer()
    text = "<|separator|> <|pad|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode([256, 97, 257]) == "<|separator|>a<|pad|>"
    assert tokenizer.convert_ids_to_tokens([256, 97, 257]) == ["<|separator|>", "a", "<|pad|>"]
    assert tokenizer.convert_tokens_to_ids(["<|separator|>", "a", "<|pad|>"]) == [256, 97, 257]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        256,
        256,
        257,
    )
    assert len(tokenizer) == len(tokenizer.get_vocab()) == 258


def test_a_batch_of_texts_is_padded_on_the_left():
    batch = hf.HopeByteTokenizer()(["ab", "é"], ["c", ""], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[256, 97, 98, 256, 99], [257, 256, 195, 169, 256]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]


def test_bytes_that_are_no_text_are_replaced():
    tokenizer = hf.HopeByteTokenizer()
    assert tokenizer.decode([97, 255, 195]) == "".join(decode(b"a\xff\xc3")) == "a\ufffd\ufffd"
    assert tokenizer.decode([97, 260]) == "a<|260|>"


def test_a_saved_tokenizer_is_the_same(tmp_path):
    hf.HopeByteTokenizer(padding_side="right").save_pretrained(tmp_path)
    read = hf.HopeByteTokenizer.from_pretrained(tmp_path)
    text = "aé<|pad|>"
    assert read(text)["input_ids"] == [256, *text.encode()]
    assert (read.padding_side, read.pad_token_id, len(read)) == ("right", 257, 258)


# ---- runs ----------------------------------------------------------------------------------------


def test_an_exported_run_writes_what_hope_generate_writes(tmp_path):
    ours = write_run(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "hf"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(model) is hf.HopeForCausalLM
    assert type(tokenizer) is hf.HopeByteTokenizer
    prompts = ["def f(x):", "é"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    written = model.generate(**batch, max_new_tokens=20, do_sample=False)
    for prompt, row in zip(prompts, written[:, batch["input_ids"].shape[1] :], strict=True):
        expected = list(generate(ours, prompt, length=20, temperature=0))
        ended = row.tolist().index(256) if 256 in row else 20
        assert row[:ended].tolist() == expected
        assert set(row[ended + 1 :].tolist()) <= {257}


@pytest.mark.parametrize("room", [0, 1, 4])
def test_a_run_with_a_tokenizer_json_takes_it_along(tmp_path, room):
    """room: how many ids the model has that are no tokens; padding takes the first."""
    trained = train_tokenizer([b"def f(x):\n    return x\n", "été 世界".encode()] * 9, 290)
    ours = write_run(tmp_path / "run", trained.vocab_size + room, tokenizer=trained)
    hf.export(tmp_path / "run", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
    text = "def g(é界):  <|endoftext|> <|pad|> x .\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == [trained.separator, *trained.encode(text.encode())]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == model.config.eos_token_id == trained.separator
    assert model.config.pad_token_id == (trained.vocab_size if room else trained.separator)
    prompts = ["def f(x):", "é"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    assert batch["attention_mask"][1, 0] == 0
    written = model.generate(**batch, max_new_tokens=12, do_sample=False)
    for prompt, row in zip(prompts, written[:, batch["input_ids"].shape[1] :], strict=True):
        expected = list(generate(ours, prompt, length=12, temperature=0, tokenizer=trained))
        assert row[: len(expected)].tolist() == expected


def test_generation_stops_at_the_separator_and_writes_no_unused_id(tmp_path):
    write_run(tmp_path / "run")
    model, tokenizer = hf.from_run(tmp_path / "run")
    assert not model.training
    prompt = tokenizer("a", return_tensors="pt")["input_ids"]
    with torch.no_grad():  # the likeliest id is an unused one, and after it the separator
        model.model.embedding.weight[:, 0] = -10.0
        model.model.embedding.weight[256, 0], model.model.embedding.weight[260, 0] = 10.0, 20.0
        model.model.norm.weight.zero_()[0] = 1
        model.model.norm.weight[0] = model(prompt).logits[0, -1, 260].sign()
    assert model(prompt).logits[0, -1].topk(2).indices.tolist() == [260, 256]
    assert model.generate(prompt, max_new_tokens=5, do_sample=False).tolist() == [[256, 97, 256]]


def test_a_pipeline_and_a_streamer_write_the_same_text(tmp_path, capsys):
    write_run(tmp_path / "run")
    model, tokenizer = hf.from_run(tmp_path / "run")
    write = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False}
    texts = write(["def f(x):", "é"], batch_size=2, **options)
    prompt = tokenizer("def f(x):", return_tensors="pt")["input_ids"]
    capsys.readouterr()
    streamer = transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    written = model.generate(prompt, streamer=streamer, **options)[0]
    expected = tokenizer.decode(written, skip_special_tokens=True)
    assert expected.startswith("def f(x):")
    assert texts[0][0]["generated_text"] == expected
    assert capsys.readouterr().out == expected + "\n"


def test_a_vocabulary_without_padding_pads_with_the_separator(tmp_path):
    write_run(tmp_path / "run", vocab_size=257)
    model, _ = hf.from_run(tmp_path / "run")
    assert model.config.pad_token_id == 256
    assert model.generation_config.suppress_tokens is None


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(HopeError, match="no such run or checkpoint"):
        hf.export(tmp_path / "nowhere", tmp_path / "out")
    write_run(tmp_path / "run", vocab_size=64)
    with pytest.raises(HopeError, match=r"run: vocab_size must be at least 257, .* not 64"):
        hf.export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(HopeError, match="exists already"):
        hf.export(tmp_path / "run", tmp_path)


# ---- training ------------------------------------------------------------------------------------


def test_a_loop_with_transformers_own_batches_trains():
    """(transformers' Trainer needs accelerate.) Rows of all lengths, padded by the collator."""
    torch.manual_seed(0)
    tokenizer = hf.HopeByteTokenizer()
    model = hf.HopeForCausalLM(hf.HopeLMConfig(CONFIG)).train()
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    texts = [f"{i} and {i + 1} " * (1 + i % 4) for i in range(32)]
    rows = [tokenizer(text) for text in texts]
    batches = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[0] > 5
    assert losses[-1] < 1.5
