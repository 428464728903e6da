"""Models that begin as a trained Transformer, and the evaluation of learning in sequence."""

import json
import operator
import re
import signal
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from random import Random

import pytest
import torch
from hope import (
    AttentionConfig,
    CmsConfig,
    HopeError,
    LanguageModel,
    ModelConfig,
    RunConfig,
    TrainConfig,
    Trainer,
    load_config,
    load_corpus,
    load_model,
    preset,
)
from hope.checkpoint import find_checkpoint
from hope.cli import main
from hope.continual import from_transformer
from hope.continual.domains import DOMAINS, make_domain
from hope.continual.transfer import FIGURES, figures
from hope.train import bits_per_byte, make_optimizer

CONFIG = ModelConfig(mixer=AttentionConfig(heads=2, head_dim=8), dim=16, layers=2, mlp="gelu")
TRAIN = TrainConfig(
    tokens=8 * 4 * 32, batch=4, sequence=32, lr=1e-2, validation_tokens=128, checkpoint_every=8
)
VARIANTS = ("sequential", "independent", "nested")


def text(*shape):
    return torch.randint(0, 257, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def source():
    torch.manual_seed(0)
    return LanguageModel(CONFIG).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_updates_the_outputs_are_the_source_s_bit_for_bit(source, variant):
    model = from_transformer(source, CmsConfig((4, 8, 16), updates=False, variant=variant))
    tokens = text(2, 40)
    assert torch.equal(model(tokens), source(tokens))


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_updates_the_outputs_are_the_source_s_at_the_start(source, variant):
    model = from_transformer(source, CmsConfig((4, 8, 16), variant=variant))
    tokens = text(2, 200)
    logits, state = model(tokens, return_state=True)
    torch.testing.assert_close(logits, source(tokens), rtol=1e-4, atol=1e-4)
    for levels in state.cms:
        if variant != "nested":
            assert all(level.weights[1].count_nonzero() == 0 for level in levels[1:])
    assert (logits - source(tokens)).abs().max() > 0  # there are updates


def test_a_checkpoint_is_a_source_and_the_source_is_left_alone(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    corpus = load_corpus([str(path)], window=32)
    trainer = Trainer(RunConfig(model=CONFIG, train=TRAIN), corpus, tmp_path / "run")
    trainer.run(progress=False)
    model = from_transformer(tmp_path / "run", CmsConfig((4, 8), updates=False))
    tokens = text(1, 30)
    before = trainer.model(tokens)
    assert torch.equal(model(tokens), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(trainer.model(tokens), before)


@pytest.mark.parametrize("updates", [False, True])
def test_new_levels_learn(source, updates):
    model = from_transformer(source, CmsConfig((4, 8), updates=updates)).train()
    optimizer = make_optimizer(model, replace(TRAIN, weight_decay=0.0))
    tokens = text(2, 33)
    curve = []
    for _ in range(20):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < 0.7 * curve[0]
    for block in model.blocks:
        assert block.cms.levels[1].mlp.down.weight.abs().max() > 0.01
        if updates:
            assert block.cms.target.weight.abs().max() > 0.01


def test_every_level_is_as_wide_as_the_mlp(source):
    model = from_transformer(source, CmsConfig((4, 8, 16)))
    assert model.config.mlp_dims == (CONFIG.mlp_dim,) * 3
    nested = from_transformer(source, CmsConfig((4, 8, 16), variant="nested"))
    assert nested.config.mlp_dims == (CONFIG.mlp_dim,)
    with torch.device("meta"):  # the preset that is made for it
        big = LanguageModel(preset("tiny-gelu").model)
        assert from_transformer(big, CmsConfig((4, 8))).config.mlp_dims == (600, 600)


def test_what_a_level_cannot_begin_as_is_refused(source):
    with pytest.raises(HopeError, match=r"source must have model.mlp 'gelu', .* not 'swiglu'"):
        from_transformer(LanguageModel(replace(CONFIG, mlp="swiglu")), CmsConfig((4,)))
    with pytest.raises(HopeError, match=r"source must have model.mlp 'gelu', .* not a CMS"):
        from_transformer(from_transformer(source, CmsConfig((4,))), CmsConfig((4,)))
    with pytest.raises(HopeError, match=r"cms.activation must be 'gelu', .* not 'silu'"):
        from_transformer(source, CmsConfig((4,), activation="silu"))


# ---- figures and texts ---------------------------------------------------------------------------


def test_figures_are_those_of_their_definitions():
    losses = [[2.0, 5.0, 7.0], [2.5, 3.0, 6.5], [3.5, 2.0, 4.0]]
    assert figures(losses) == pytest.approx(
        {
            "average_loss": (3.5 + 2.0 + 4.0) / 3,
            "learned": ((5.0 - 3.0) + (6.5 - 4.0)) / 2,
            "forgetting": ((3.5 - 2.0) + 0.0) / 2,  # domain 1 has only become better
            "backward_transfer": ((2.0 - 3.5) + (3.0 - 2.0)) / 2,
            "forward_transfer": 7.0 - 6.5,
        }
    )
    again = [[2.0, 5.0, 7.0], [1.0, 3.0, 6.5], [3.5, 2.0, 4.0]]
    assert figures(again)["forgetting"] == pytest.approx((3.5 - 1.0) / 2)  # from its best
    assert figures([[1.0, 2.0], [1.0, 2.0]])["forward_transfer"] == 0.0
    unlearned = [[2.0, 1.0, 7.0], [2.0, 3.0, 7.0], [2.0, 3.5, 4.0]]
    assert figures(unlearned)["forgetting"] == pytest.approx((3.5 - 3.0) / 2)  # once it is learned


def lines(tokens):
    """Whole lines of a domain's tokens, documents apart."""
    text = bytes(b if b < 256 else 10 for b in tokens.tolist()).decode(errors="replace")
    return [line for line in text.split("\n")[1:-1] if line]


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_is_as_long_as_asked_and_the_same_every_time(name):
    domain, again, other = (make_domain(name, 9000, 2000, seed) for seed in (0, 0, 1))
    assert (len(domain.train), len(domain.held_out)) == (9000, 2000)
    assert domain.train.dtype == torch.int16
    assert domain.train[0] == 256
    assert torch.equal(domain.train, again.train)
    assert torch.equal(domain.held_out, again.held_out)
    assert not torch.equal(domain.train, other.train)
    longer = make_domain(name, 9500, 2000)
    assert torch.equal(longer.train[:9000], domain.train)


def test_arithmetic_is_right_and_no_pair_is_on_both_sides():
    domain = make_domain("arithmetic", 20_000, 20_000)
    pairs = []
    for tokens in (domain.train, domain.held_out):
        told = [re.fullmatch(r"(\d+) ([-+*]) (\d+) = (-?\d+)", line) for line in lines(tokens)]
        for problem in told:
            a, sign, b, answer = problem.groups()
            operation = {"+": operator.add, "-": operator.sub, "*": operator.mul}[sign]
            assert operation(int(a), int(b)) == int(answer)
        pairs.append({(problem[1], problem[3]) for problem in told})
    assert len(pairs[0]) > 500
    assert not pairs[0] & pairs[1]


def test_log_files_have_rising_times_and_days_of_their_own():
    domain = make_domain("logs", 20_000, 20_000)
    days = []
    for tokens in (domain.train, domain.held_out):
        documents = bytes(b if b < 256 else 0 for b in tokens.tolist()).decode().split("\0")[1:-1]
        for document in documents:
            stamps = [datetime.fromisoformat(row.split("Z ")[0]) for row in document.splitlines()]
            assert stamps == sorted(stamps)
        days.append({document[:10] for document in documents})
    assert min(map(len, days)) > 5
    assert not days[0] & days[1]


def test_docstrings_are_those_of_files_that_the_source_leaves_out():
    said = lines(make_domain("docstrings", 30_000, 3000).train)
    text = "".join(text for side in (False, True) for text in DOMAINS["source"](Random(0), side))
    told = [line for line in said if len(line) > 60]
    assert len(told) > 50
    assert sum(line in text for line in told) < 0.1 * len(told)  # some sentences repeat
    assert sum(line.startswith("def ") for line in said) < 0.01 * len(said)


def test_a_domain_that_cannot_be():
    with pytest.raises(HopeError, match=r"domain must be one of source, .*, not 'poems'"):
        make_domain("poems", 10, 10)
    with pytest.raises(HopeError, match=r"domain docstrings has .* bytes here, not 900,000,000"):
        make_domain("docstrings", 10, 900_000_000)


# ---- hope evaluate continual ---------------------------------------------------------------------

SMALL = [
    *("--set", "model.dim=16", "--set", "model.layers=1", "--set", "model.mixer.head_dim=8"),
    *("--set", "model.mixer.heads=2", "--set", "train.batch=2", "--set", "train.sequence=32"),
]
SIZES = ["--first", "640", "--tokens", "256", "--held-out", "128", "--segment", "16"]
NAMES = ["hope-tiny-cms", "tiny-transformer:mlp@1e-2", "tiny-transformer"]
QUICK = ["--domains", "arithmetic", "logs"]  # the others read the standard library


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(*arguments, names=NAMES):
    return main(["evaluate", "continual", *names, *SIZES, *QUICK, *SMALL, *arguments])


def without_times(results):
    return [{k: v for k, v in result.items() if not k.endswith("seconds")} for result in results]


def test_continual_teaches_judges_and_writes(here, capsys):
    assert evaluate() == 0
    out = capsys.readouterr().out
    result = json.loads((here / "runs/continual/continual.json").read_text())
    assert [r["name"] for r in result["results"]] == NAMES
    methods = [pupil["learn"]["method"] for pupil in result["pupils"]]
    assert methods == ["cms", "mlp", "finetune"]
    assert [pupil["learn"]["lr"] for pupil in result["pupils"]] == [[1e-4], [1e-2], [1e-4]]
    assert result["pupils"][0]["learn"]["chunks"] == [16, 64, 256, 1024]
    domains = [make_domain("arithmetic", 641, 129), make_domain("logs", 257, 129)]
    for r in result["results"]:
        losses = r["bits_per_byte"]
        assert losses != [losses[0]] * 2
        assert figures(losses) == pytest.approx({name: r[name] for name in FIGURES})
        preset_ = r["name"].split(":")[0]
        model = load_model(f"runs/continual/{preset_}")
        train = load_config(find_checkpoint(Path(f"runs/continual/{preset_}"))).train
        assert train.tokens == 640
        before = [bits_per_byte(model, domain.held_out, train) for domain in domains]
        assert losses[0] == pytest.approx(before)
    for line in result["table"]:
        assert line in out
    assert (here / "runs/continual/continual.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_continual_evaluation_goes_on(here, capsys, monkeypatch):
    names = ["tiny-transformer", "hope-attention-tiny"]
    assert evaluate("--out", "whole", names=names) == 0
    step = Trainer._train_step

    def stopped(trainer):
        if trainer.config.preset == names[1] and trainer.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopped)
        assert evaluate("--out", "cut", names=names) == 128 + signal.SIGTERM
    assert "hope evaluate continual --resume --out cut" in capsys.readouterr().out
    saved = json.loads(Path("cut/continual.json").read_text())
    assert [r["name"] for r in saved["results"]] == names[:1]
    assert main(["evaluate", "continual", "--resume", "--out", "cut"]) == 0
    whole, cut = (
        json.loads(Path(name, "continual.json").read_text())["results"] for name in ("whole", "cut")
    )
    assert without_times(cut) == without_times(whole)


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (["tiny", "tiny"], [], "'tiny' is named twice"),
        (["mamba"], [], "unknown preset 'mamba'"),
        (["tiny:sleep"], [], "the method of 'tiny:sleep' must be one of cms, finetune, mlp"),
        (["tiny@fast"], [], "the rate of 'tiny@fast' must be a number, not 'fast'"),
        ([":cms"], [], "a model is PRESET, PRESET:METHOD or either @RATE, not ':cms'"),
        (["tiny:cms"], [], "method 'cms' needs a model with a CMS"),
        (["tiny"], ["--domains", "logs"], "domains must be two or more that differ, not logs"),
        (["hope-tiny-cms"], ["--chunks", "16"], "chunks must be 4 numbers"),
        (["tiny"], ["--out", "."], "is not empty; continue that evaluation with --resume"),
        (["tiny"], ["--resume"], "there is no evaluation in runs/continual"),
    ],
)
def test_what_continual_refuses(here, capsys, names, more, message):
    (here / "notes.txt").write_text("x")
    assert evaluate(*more, names=names) == 2
    error = capsys.readouterr().err
    assert error.startswith("hope: error: ")
    assert error.count("\n") == 1
    assert message in error
