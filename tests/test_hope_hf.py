"""The Hugging Face interface: what transformers computes with our models is what we compute."""

import copy
import json
import re
import subprocess
import sys
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
    MacConfig,
    MagConfig,
    ModelConfig,
    TitansConfig,
    generate,
    preset,
)

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
hf = pytest.importorskip("hope.hf", reason="the extra hf is not installed")

SIZES = {"heads": 2, "head_dim": 16, "chunk_size": 8}
CONFIGS = {
    "titans": ModelConfig(mixer=TitansConfig(**SIZES)),
    "mac": ModelConfig(mixer=MacConfig(**SIZES, segment=8)),
    "mag": ModelConfig(mixer=MagConfig(**SIZES, window=5)),
    "attention": ModelConfig(mixer=AttentionConfig(heads=2, head_dim=16)),
    "hope": ModelConfig(mixer=HopeConfig(**SIZES)),
    "hope, CMS": ModelConfig(mixer=HopeConfig(**SIZES), cms=CmsConfig((3, 8))),
    "hope, nested CMS": ModelConfig(
        mixer=HopeConfig(**SIZES), cms=CmsConfig((2, 4), variant="nested")
    ),
    "attention, convolution and CMS": ModelConfig(
        mixer=AttentionConfig(heads=2, head_dim=16, conv_width=4), cms=CmsConfig((3, 8))
    ),
}
CONFIGS = {name: replace(config, dim=32, layers=2) for name, config in CONFIGS.items()}
TOKENS = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}


def language_model(name="hope, CMS"):
    torch.manual_seed(0)
    model = LanguageModel(CONFIGS[name]).eval()
    with torch.no_grad():  # or an untrained model with a tied head repeats the last byte
        for block in model.blocks:
            block.mixer.out.weight.mul_(20)
            if block.cms is not None:
                block.cms.levels[0].mlp.down.weight.mul_(20)
    return model


def wrapped(name="hope, CMS"):
    return hf.HopeForCausalLM.from_language_model(language_model(name), **TOKENS)


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return wrapped(name)


def random_tokens(*shape, seed=1):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows, side="left", length=None):
    """Rows of different lengths as input_ids and attention_mask."""
    length = length or max(len(row) for row in rows)
    ids = torch.full((len(rows), length), 257)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def greedy(model, ids, new=8, **options):
    """Without an end of the text, which an untrained model may write."""
    options = {"eos_token_id": None, "pad_token_id": 257, **options}
    return model.generate(ids, max_new_tokens=new, do_sample=False, **options)


# ---- configuration -------------------------------------------------------------------------------


def test_a_config_is_our_model_config_both_ways(name, tmp_path):
    config = hf.HopeLMConfig(CONFIGS[name], pad_token_id=257)
    assert config.to_model_config() == CONFIGS[name]
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["mixer"]["kind"] == CONFIGS[name].mixer.kind
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(read) is hf.HopeLMConfig
    assert (read.to_model_config(), read.pad_token_id) == (CONFIGS[name], 257)


def test_keywords_replace_fields_of_a_config(tmp_path):
    config = hf.HopeLMConfig(preset("tiny").model, hidden_size=64, mixer="attention")
    expected = replace(preset("tiny").model, dim=64, mixer=AttentionConfig())
    assert config.to_model_config() == expected
    assert (config.hidden_size, config.num_hidden_layers) == (64, expected.layers)
    assert config == hf.HopeLMConfig(expected)
    assert config != hf.HopeLMConfig(expected, layers=1)
    config.save_pretrained(tmp_path)
    read = transformers.AutoConfig.from_pretrained(tmp_path, num_hidden_layers=1)
    assert read.to_model_config() == replace(expected, layers=1)
    assert hf.HopeLMConfig().to_model_config() == ModelConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, not 0"),
        ({"mixer": {"kind": "titan"}}, "mixer.kind must be one of .* not 'titan'"),
        ({"mixer": {"kind": "titans", "head": 2}}, "unknown field mixer.head; there are: heads"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
    ],
)
def test_a_wrong_config_is_refused(options, message):
    with pytest.raises(HopeError, match=message):
        hf.HopeLMConfig(**options)


# ---- weights -------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(name, model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is hf.HopeForCausalLM
    assert not loaded.training
    tokens = random_tokens(2, 13)
    expected = language_model(name)
    for key, weight in expected.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], weight), key
    torch.testing.assert_close(loaded(tokens).logits, expected(tokens))


def test_a_new_model_is_drawn_as_ours_is():
    torch.manual_seed(5)
    ours = LanguageModel(CONFIGS["hope, CMS"]).state_dict()
    torch.manual_seed(5)
    theirs = hf.HopeForCausalLM(hf.HopeLMConfig(CONFIGS["hope, CMS"])).model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_that_a_file_lacks_are_drawn(model, tmp_path):
    """And only these."""
    state = {f"model.{name}": weight for name, weight in model.model.state_dict().items()}
    lacking = {"model.embedding.weight", "model.blocks.1.mixer.out.weight"}
    given = {name: weight for name, weight in state.items() if name not in lacking}
    model.save_pretrained(tmp_path, state_dict=given)
    torch.manual_seed(5)
    loaded, info = hf.HopeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == lacking
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, state[name]) == (name not in lacking), name
    torch.manual_seed(5)
    drawn = LanguageModel(model.config.to_model_config())
    assert torch.equal(loaded.model.embedding.weight, drawn.embedding.weight)


def test_the_vocabulary_can_grow():
    model = wrapped()
    tokens = random_tokens(1, 5)
    before = model(tokens).logits
    model.resize_token_embeddings(300)
    assert model.config.to_model_config().vocab_size == 300
    after = model(tokens).logits
    assert after.shape[-1] == 300
    torch.testing.assert_close(after[..., :264], before)
    model.resize_token_embeddings(4000, mean_resizing=False)
    scale = model.model.embedding.weight[300:].std().item()
    assert scale == pytest.approx(32**-0.5, rel=0.02)


# ---- forward -------------------------------------------------------------------------------------


def test_logits_are_ours(name, model):
    tokens = random_tokens(2, 13)
    expected = language_model(name)(tokens)
    assert torch.equal(model(tokens).logits, expected)
    torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, expected[:, -3:])
    which = torch.tensor([0, 5])
    torch.testing.assert_close(model(tokens, logits_to_keep=which).logits, expected[:, which])
    logits, cache = model(tokens, return_dict=False)
    assert torch.equal(logits, expected)
    assert isinstance(cache, hf.HopeCache)


def test_the_loss_is_that_of_the_next_token():
    model, tokens = wrapped(), random_tokens(2, 13)
    labels = tokens.clone()
    labels[0, :5] = labels[1, 7] = -100
    expected, count = torch.zeros(()), 0
    for row, of_row in zip(model(tokens).logits, labels, strict=True):
        for t in range(12):
            if of_row[t + 1] != -100:
                expected = expected - row[t].log_softmax(-1)[of_row[t + 1]]
                count += 1
    output = model(tokens, labels=labels)
    torch.testing.assert_close(output.loss, expected / count)
    output = model(tokens, labels=labels, num_items_in_batch=10)
    torch.testing.assert_close(output.loss, expected / 10)


def test_a_cache_continues_the_text(model):
    tokens = random_tokens(2, 13)
    cache, logits = None, []
    for part in tokens.split([5, 1, 1, 6], dim=1):
        output = model(part, cache=cache, use_cache=True)
        cache = output.cache
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens).logits, atol=1e-4, rtol=1e-4)
    assert (cache.get_seq_length(), cache.batch_size, len(cache)) == (13, 2, 2)
    assert "13 positions of 2 texts" in repr(cache)
    with pytest.warns(FutureWarning, match="past_key_values"):
        old = model(tokens[:, :1], past_key_values=cache)
    assert old.cache.get_seq_length() == 14


def test_a_cache_is_returned_when_it_is_wanted():
    model, tokens = wrapped(), random_tokens(1, 3)
    assert model(tokens).cache is not None
    assert model(tokens, use_cache=False).cache is None
    assert model.train()(tokens).cache is None
    assert model.train()(tokens, use_cache=True).cache is not None


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_each_as_alone(model, side):
    rows = [random_tokens(n, seed=n) for n in (9, 2, 14, 1)]
    ids, mask = padded(rows, side, length=16)
    output = model(ids, attention_mask=mask)
    for row, logits, real in zip(rows, output.logits, mask.bool(), strict=True):
        torch.testing.assert_close(logits[real], model(row[None]).logits[0], atol=1e-4, rtol=1e-4)
    # They go on as a batch: with tokens alone, and with more padding.
    cache, more = output.cache, random_tokens(4, 4, seed=3)
    new = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]])
    first = model(more, attention_mask=torch.cat((mask, torch.ones(4, 4)), 1), cache=cache)
    second = model(more, attention_mask=torch.cat((mask, torch.ones(4, 4), new), 1), cache=cache)
    for i, row in enumerate(rows):
        text = torch.cat((row, more[i], more[i][new[i].bool()]))
        alone = model(text[None]).logits[0, len(row) :]
        together = torch.cat((first.logits[i], second.logits[i][new[i].bool()]))
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_padding_alone_changes_nothing(model):
    """Before the text, and after it."""
    row, more = random_tokens(1, 9), random_tokens(1, 3, seed=2)
    cache, mask = hf.HopeCache(), torch.tensor([[0] * 4 + [1] * 9 + [0] * 2 + [1] * 3])
    ids = torch.cat((torch.full((1, 4), 257), row, torch.full((1, 2), 257), more), 1)
    logits, start = [], 0
    for stop in (2, 13, 15, 18):
        part = model(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache)
        logits.append(part.logits)
        start = stop
    actual = torch.cat(logits, 1)[mask.bool()]
    expected = model(torch.cat((row, more), 1)).logits[0]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_a_cache_of_attention_holds_no_more_than_the_longest_text():
    model = wrapped("attention")
    ids, mask = padded([random_tokens(9), random_tokens(2), random_tokens(4)], length=20)
    cache = model(ids, attention_mask=mask).cache
    assert [layer.keys.shape[2] for layer in cache.state.layers] == [9, 9]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_padded_rows_is_that_of_their_texts(side):
    model, rows = wrapped(), [random_tokens(n, seed=n) for n in (9, 2, 14)]
    ids, mask = padded(rows, side)
    total = sum(
        F.cross_entropy(model(row[None, :-1]).logits[0], row[1:], reduction="sum") for row in rows
    )
    loss = model(ids, attention_mask=mask, labels=ids).loss
    torch.testing.assert_close(loss, total / (8 + 1 + 13))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.autograd.grad(total / (8 + 1 + 13), list(model.parameters()))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("length", [9, 4])
def test_activation_checkpointing_computes_blocks_twice_and_the_same(name, length):
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = wrapped(name).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        count = []
        model.model.blocks[0].mixer_norm.register_forward_hook(lambda *_, n=count: n.append(1))
        ids, mask = padded([random_tokens(9), random_tokens(length)])
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        calls.append(len(count))
    assert calls == [1, 2]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# ---- generation ----------------------------------------------------------------------------------


def test_greedy_generation_is_ours_one_token_a_step(name, model):
    prompt = torch.tensor([[256, *b"def f"]])
    ours = list(generate(language_model(name), b"def f", length=12, temperature=0))
    assert len(ours) == 12
    assert len(set(ours)) > 2
    read = []
    model.model.embedding.register_forward_hook(lambda _, args, __: read.append(args[0].shape[1]))
    unused = {"suppress_tokens": list(range(257, 264))}
    assert greedy(model, prompt, 12, **unused)[0, 6:].tolist() == ours
    assert read == [6] + [1] * 11
    read.clear()
    assert greedy(model, prompt, 12, use_cache=False, **unused)[0, 6:].tolist() == ours
    assert read == list(range(6, 18))


def test_a_batch_of_prompts_writes_what_each_does_alone(model):
    """Prompts of one length, of several with padding, and padded ones read in parts."""
    rows = [random_tokens(n, seed=i) for i, n in enumerate((9, 2, 14, 9))]
    alone = [greedy(model, row[None])[0, len(row) :] for row in rows]
    assert len({tuple(written.tolist()) for written in alone}) == 4
    together = greedy(model, torch.stack((rows[0], rows[3])))[:, 9:]
    assert torch.equal(together, torch.stack((alone[0], alone[3])))
    ids, mask = padded(rows)
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 5}):
        written = greedy(model, ids, attention_mask=mask, **options)[:, 14:]
        assert torch.equal(written, torch.stack(alone)), options


def test_generation_goes_on_from_a_cache(model):
    """Two turns of a conversation; a copy of the cache goes on in another way."""
    text, cache = random_tokens(1, 6), hf.HopeCache()
    first = greedy(model, text, cache=cache)
    assert torch.equal(first, greedy(model, text))
    before = copy.deepcopy(cache)
    read = []
    model.model.embedding.register_forward_hook(lambda _, args, __: read.append(args[0].shape[1]))
    for seed, state in ((3, cache), (4, before)):
        text = torch.cat((first, random_tokens(1, 4, seed=seed)), 1)
        second = greedy(model, text, cache=state)
        assert read == [5] + [1] * 7  # the last token of the first turn, and the four of the second
        read.clear()
        assert torch.equal(second, greedy(model, text))
        read.clear()


def test_beam_search_reorders_the_cache(model):
    ids, mask = padded([random_tokens(5), random_tokens(3)])
    options = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask}
    beams = greedy(model, ids, 10, **options)
    assert torch.equal(beams, greedy(model, ids, 10, use_cache=False, **options))
    assert not torch.equal(beams[::2, 5:], greedy(model, ids, 10, attention_mask=mask)[:, 5:])


def test_rows_of_a_cache_are_picked_and_repeated(model):
    ids, mask = padded([random_tokens(5), random_tokens(3), random_tokens(7)])
    cache, more = model(ids, attention_mask=mask).cache, random_tokens(3, 2)
    expected = model(more, cache=copy.deepcopy(cache)).logits
    twice = copy.deepcopy(cache)
    twice.batch_repeat_interleave(2)
    logits = model(more.repeat_interleave(2, 0), cache=twice).logits
    torch.testing.assert_close(logits, expected.repeat_interleave(2, 0), atol=1e-5, rtol=1e-5)
    cache.batch_select_indices(torch.tensor([2, 0]))
    logits = model(more[[2, 0]], cache=cache).logits
    torch.testing.assert_close(logits, expected[[2, 0]], atol=1e-5, rtol=1e-5)
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, -1, False)
    assert torch.equal(model(more, cache=cache).logits, model(more).logits)


def test_sampling_follows_the_probabilities():
    model, prompt = wrapped(), torch.tensor([[256, 97, 98]])
    options = {"do_sample": True, "max_new_tokens": 1, "top_k": 0, "num_return_sequences": 4000}
    torch.manual_seed(0)
    written = model.generate(prompt, **options)[:, 3]
    expected = model(prompt).logits[0, -1].softmax(-1)
    frequencies = torch.bincount(written, minlength=264) / 4000
    # The variance of a frequency is p (1 - p) / 4000.
    deviation = (frequencies - expected) / (expected * (1 - expected) / 4000).sqrt()
    assert deviation.square().mean().sqrt() < 1.3


# ---- refusals ------------------------------------------------------------------------------------


def test_a_cache_cannot_be_cropped():
    cache = wrapped()(random_tokens(1, 3)).cache
    cache.crop(0)
    with pytest.raises(HopeError, match="cache cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(HopeError, match="cache cannot be rolled back"):
        cache.activate_past_recording()
    with pytest.raises(HopeError, match="takes no keys and values"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_ids": torch.zeros(2, 3)}, r"input_ids must be \[B, T\] int64, not \(2, 3\)"),
        ({"input_ids": torch.zeros(2, 0).long()}, "input_ids must hold at least one token"),
        ({"inputs_embeds": torch.zeros(2, 3, 32)}, "inputs_embeds is not supported"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must be \[2, 3\], not \[2, 4\]"),
        ({"attention_mask": torch.full((2, 3), -1.0)}, "attention_mask must be 1 for a token"),
        ({"cache": transformers.DynamicCache()}, "cache must be a HopeCache, not a DynamicCache"),
        ({"labels": torch.zeros(2, 2).long()}, r"labels must have the shape .* \(2, 3\), not"),
        (
            {"labels": torch.zeros(2, 3).long(), "logits_to_keep": 1},
            "logits_to_keep must be 0 with labels",
        ),
        ({"output_attentions": True}, "output_attentions is not supported"),
    ],
)
def test_wrong_arguments_of_forward_are_named(options, message):
    with pytest.raises(HopeError, match=message):
        wrapped()(**{"input_ids": random_tokens(2, 3), **options})


def test_a_cache_of_other_rows_is_refused():
    model = wrapped()
    cache = model(random_tokens(2, 3)).cache
    with pytest.raises(HopeError, match="cache must hold a row for each of the 3 rows"):
        model(random_tokens(3, 1), cache=cache)
    mask = torch.ones(2, 3)
    with pytest.raises(HopeError, match=r"must be \[2, 1\] or \[2, 4\], not \[2, 3\]"):
        model(random_tokens(2, 1), attention_mask=mask, cache=cache)


def test_half_precision_weights_are_refused():
    with pytest.raises(HopeError, match=r"dtype must be torch.float32, not torch.bfloat16"):
        wrapped().bfloat16()(random_tokens(1, 3))


def test_what_generation_cannot_do_is_refused():
    model = wrapped()
    ids, mask = padded([random_tokens(5), random_tokens(3)], "right")
    with pytest.raises(HopeError, match=r"attention_mask must end with 1 .*padding_side='left'"):
        greedy(model, ids, attention_mask=mask)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        greedy(model, ids[:1], prompt_lookup_num_tokens=3)
    with pytest.raises(HopeError, match="cache_implementation must be None, not 'static'"):
        greedy(model, ids[:1], cache_implementation="static")
    cache = model(ids[:1]).cache
    with pytest.raises(HopeError, match="input_ids must hold the whole text, the 5 tokens"):
        greedy(model, ids[:1, :2], cache=cache)


def test_without_transformers_the_extra_is_named():
    program = "import sys; sys.modules['transformers'] = None; import hope.hf"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode != 0
    assert re.search(
        r"HopeError: hope.hf needs the package transformers.*hope_ext\[hf\]", run.stderr
    )
