"""Models in lm-evaluation-harness, on tasks made here, against direct computation. Offline."""

import importlib
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hope import HopeError, LanguageModel, generate, preset
from hope.cli import main
from hope.config import override
from hope.evaluate.reader import Reader

lm_eval = pytest.importorskip("lm_eval", reason="the harness is an optional extra: eval")
datasets = pytest.importorskip("datasets", reason="the harness reads its tasks' data with it")

from hope.evaluate import harness  # noqa: E402
from hope.evaluate.harness import PAPER, HopeLM, run_tasks  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

SMALL = ["model.dim=32", "model.layers=1", "model.mixer.heads=2", "model.mixer.head_dim=16"]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module", params=["hope-tiny", "tiny-transformer"])
def model(request):
    torch.manual_seed(0)
    return LanguageModel(override(preset(request.param), SMALL).model).eval()


def requests(kind, *arguments):
    return [Instance(kind, {}, arguments_, 0) for arguments_ in arguments]


@torch.no_grad()
def log_p(model, text, answer):
    """log p of an answer after a text, and whether it is likeliest, by one call over both."""
    tokens = torch.tensor([[256, *text.encode(), *answer.encode()]])
    first = 1 + len(text.encode())
    logits = model(tokens)[0, first - 1 : -1].double().log_softmax(-1)
    targets = tokens[0, first:]
    likeliest = bool((logits[:, :257].argmax(-1) == targets).all())
    return logits.gather(1, targets[:, None]).sum().item(), likeliest


def written(model, text, length):
    return bytes(generate(model, text, length=length, temperature=0)).decode(errors="replace")


# ---- the requests ------------------------------------------------------------------------------


def test_likelihoods_are_those_of_one_call(model):
    asked = [
        ("Question: one?\nAnswer:", " yes"),
        ("Question: one?\nAnswer:", " no"),
        ("Question: one?\nAnswer:", " perhaps, who knows"),
        ("Question: another, longer one?\nAnswer:", " yes"),
        ("Question: another, longer one?\nAnswer:", " né"),
        ("alone", " in its context"),
        ("", "with no context at all"),
        ("", "twice"),
        ("Question: one?\nAnswer:", ""),
        ("the end", written(model, "the end", 3)),
    ]
    lm = HopeLM(Reader(model, batch=2, block=8))
    results = lm.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    for (text, answer), (value, greedy) in zip(asked, results, strict=True):
        expected, likeliest = log_p(model, text, answer)
        assert value == pytest.approx(expected, abs=1e-3)
        assert greedy == likeliest
    assert results[-1][1]


def test_a_context_is_read_once_for_all_its_answers(model, monkeypatch):
    read = []
    features = model.features
    monkeypatch.setattr(
        model, "features", lambda x, *a, **k: read.append(x.numel()) or features(x, *a, **k)
    )
    context, answers = "a context of some length " * 8 + "?", [" a", " b", " c", " d"]
    lm = HopeLM(Reader(model, batch=4))
    lm.loglikelihood(
        requests("loglikelihood", *((context, answer) for answer in answers)), disable_tqdm=True
    )
    # The context with its separator, and the tokens that predict each answer's two.
    assert sum(read) == len(context) + 2 * len(answers)


def test_rolling_likelihoods_are_those_of_whole_texts(model):
    texts = ["short", "a longer one, " * 20, "", "é"]
    lm = HopeLM(Reader(model, batch=3, block=16))
    asked = requests("loglikelihood_rolling", *((text,) for text in texts))
    results = lm.loglikelihood_rolling(asked, disable_tqdm=True)
    for text, value in zip(texts, results, strict=True):
        assert value == pytest.approx(log_p(model, "", text)[0], abs=1e-3)


def test_what_is_generated_is_what_generate_writes_up_to_a_stop(model, monkeypatch):
    whole = [written(model, text, 40) for text in ("some text", "x")]
    stop = whole[0][5:7]
    lm = HopeLM(Reader(model, batch=2, block=4))

    def generated(*pairs):
        return lm.generate_until(requests("generate_until", *pairs), disable_tqdm=True)

    limit = {"max_gen_toks": 40}
    assert generated(("some text", limit), ("x", limit)) == whole
    assert generated(("some text", {**limit, "until": [stop]})) == [whole[0].split(stop)[0]]
    assert generated(("x", {"max_gen_toks": 0})) == [""]
    assert len(generated(("some text", {"until": ["no such"]}))[0]) <= 256

    calls, features = [], model.features  # what comes after a stop is not written
    monkeypatch.setattr(
        model, "features", lambda x, *a, **k: calls.append(x) or features(x, *a, **k)
    )
    generated(("some text", {**limit, "until": [stop]}))
    context = math.ceil(len("some text") / 4)
    assert len(calls) == context + len((whole[0].split(stop)[0] + stop).encode())


def test_sampling_follows_torchs_seed(model):
    lm = HopeLM(Reader(model))

    def sampled(seed, **settings):
        torch.manual_seed(seed)
        asked = {"max_gen_toks": 20, "do_sample": True, **settings}
        texts = requests("generate_until", ("text", asked), ("text", asked))
        return lm.generate_until(texts, disable_tqdm=True)

    assert sampled(1) == sampled(1) != sampled(2)
    assert sampled(1)[0] != sampled(1)[1]
    assert sampled(1, top_k=1) == [written(model, "text", 20)] * 2
    with pytest.raises(HopeError, match="generation_kwargs: top_p is none of until"):
        sampled(1, top_p=0.5)


def test_the_harness_knows_the_model(model):
    assert get_model("hope") is HopeLM
    with pytest.raises(HopeError, match="batch_size must be a number, not 'auto'"):
        HopeLM("run", batch_size="auto")
    with pytest.raises(HopeError, match="max_batch_size must be None, not 64"):
        HopeLM("run", max_batch_size=64)


# ---- whole tasks -------------------------------------------------------------------------------

QUESTIONS = [
    {"question": "What is green?", "choices": ["grass", "the sky"], "label": 0},
    {"question": "What is blue?", "choices": ["grass", "the sky", "all"], "label": 1},
    {"question": "And yellow?", "choices": ["a lemon", "it"], "label": 1},
    {"question": "And black?", "choices": ["night", "day"], "label": 0},
]
PAGES = [{"page": "A first page. " * 9}, {"page": "Another\npage with words."}]
ENDINGS = [{"text": "the quick brown fox"}, {"text": "jumps over a dog"}]


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def tasks(tmp_path):
    """A directory with four tasks and the data of three; local_sums gets its by the test."""

    def add(name, metrics, *, better=True, **config):
        metrics = [
            {"metric": metric, "aggregation": how, "higher_is_better": better}
            for metric, how in metrics.items()
        ]
        data = {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}}
        config |= {"task": name, "dataset_path": "json", "dataset_kwargs": data}
        config |= {"test_split": "test", "metric_list": metrics}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))

    add(
        "local_choice",
        {"acc": "mean", "acc_norm": "mean"},
        output_type="multiple_choice",
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_choice="{{choices}}",
        doc_to_target="label",
    )
    add(
        "local_pages",
        {"word_perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"},
        better=False,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="page",
    )
    add(
        "local_endings",
        {"perplexity": "perplexity"},
        better=False,
        output_type="loglikelihood",
        doc_to_text="{{text.split(' ')[:-1]|join(' ')}}",
        doc_to_target="{{' '+text.split(' ')[-1]}}",
    )
    add(
        "local_sums",
        {"exact_match": "mean"},
        output_type="generate_until",
        doc_to_text="{{sum}}",
        doc_to_target="result",
        generation_kwargs={"until": ["."], "max_gen_toks": 5},
    )
    save(tmp_path / "local_choice.jsonl", QUESTIONS)
    save(tmp_path / "local_pages.jsonl", PAGES)
    save(tmp_path / "local_endings.jsonl", ENDINGS)
    return tmp_path


def test_local_tasks_give_what_direct_computation_gives(model, tasks):
    sums = [{"sum": "1 + 1 =", "result": "2"}, {"sum": "7 + 2 =", "result": ""}]
    answers = [written(model, row["sum"], 5).split(".")[0] for row in sums]
    sums[1]["result"] = answers[1]
    save(tasks / "local_sums.jsonl", sums)
    names = ["local_choice", "local_pages", "local_endings", "local_sums"]
    results = run_tasks(Reader(model, batch=2, block=16), names, tasks)["results"]
    found = {name: {k.split(",")[0]: v for k, v in results[name].items()} for name in names}

    right = normed = 0
    for row in QUESTIONS:
        text = f"Question: {row['question']}\nAnswer:"
        scores = [log_p(model, text, f" {choice}")[0] for choice in row["choices"]]
        means = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right += scores.index(max(scores)) == row["label"]
        normed += means.index(max(means)) == row["label"]
    assert found["local_choice"]["acc"] == right / len(QUESTIONS)
    assert found["local_choice"]["acc_norm"] == normed / len(QUESTIONS)

    total = sum(log_p(model, "", row["page"])[0] for row in PAGES)
    size = sum(len(row["page"]) for row in PAGES)
    words = sum(len(re.split(r"\s+", row["page"])) for row in PAGES)
    pages = found["local_pages"]
    assert pages["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert math.log(pages["word_perplexity"]) == pytest.approx(-total / words, rel=1e-5)

    ends = [row["text"].rpartition(" ") for row in ENDINGS]
    mean = sum(log_p(model, start, f" {end}")[0] for start, _, end in ends) / len(ends)
    assert math.log(found["local_endings"]["perplexity"]) == pytest.approx(-mean, rel=1e-5)

    assert found["local_sums"]["exact_match"] == (1 + (answers[0] == "2")) / 2


def test_the_command(tasks, monkeypatch, capsys):
    monkeypatch.chdir(tasks)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    small = ["model.dim=16", "model.layers=1", "model.mixer.head_dim=8", "train.sequence=32"]
    settings = [part for setting in small for part in ("--set", setting)]
    train = ["train", "--data", "text.txt", "--preset", "tiny", "--steps", "1", "--out", "run"]
    assert main([*train, *settings]) == 0
    call = ["evaluate", "harness", "run", "--include_path", "."]
    assert main([*call, "--tasks", "local_choice", "local_pages", "--limit", "2"]) == 0
    out = capsys.readouterr().out
    content = json.loads(Path("run/harness.json").read_text())
    assert content["n-samples"]["local_choice"] == {"original": 4, "effective": 2}
    expected = run_tasks(Reader.of_run("run"), ["local_pages"], tasks)["results"]["local_pages"]
    assert content["results"]["local_pages"]["bits_per_byte,none"] == pytest.approx(
        expected["bits_per_byte,none"]
    )
    assert "bits_per_byte" in out
    assert "local_choice" in out

    Path("local_choice.jsonl").unlink()
    assert main([*call, "--tasks", "local_choice"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hope: error: the data of task 'local_choice' is not on this machine")


def test_other_parts_of_the_data_do_not_help():
    """Where another configuration is in its cache, datasets raises a ValueError."""

    class Manager:
        def __init__(self, error: str) -> None:
            self.error = error

        def load(self, names):
            raise ValueError(self.error)

    absent = Manager("Couldn't find cache for allenai/ai2_arc for config 'ARC-Challenge'")
    with pytest.raises(HopeError, match=r"data of task 'arc' is not on this machine .*Challenge"):
        harness._load(absent, "arc")
    with pytest.raises(ValueError, match="another mistake"):
        harness._load(Manager("another mistake"), "arc")


def test_a_missing_harness_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "hope.evaluate.harness")
    with pytest.raises(HopeError, match=r"needs the package lm_eval.*hope_ext\[eval\]"):
        importlib.import_module("hope.evaluate.harness")


def test_the_papers_tasks_are_the_harnesss_own(model, monkeypatch):
    """Their data is not here, which is said; the whole index of the harness takes long to read."""
    folders = ("wikitext", "lambada", "piqa", "hellaswag", "winogrande", "arc", "siqa")
    paths = [Path(lm_eval.__file__).parent / "tasks" / name for name in folders]
    paths.append(Path(lm_eval.__file__).parent / "tasks/super_glue/boolq")
    manager = TaskManager(include_path=paths, include_defaults=False)
    assert set(PAPER) <= set(manager.all_subtasks)
    monkeypatch.setattr(harness, "TaskManager", lambda **_: manager)
    with pytest.raises(HopeError, match="the data of task 'wikitext' is not on this machine"):
        run_tasks(Reader(model), ["paper"])
    with pytest.raises(HopeError, match="the harness has no task 'no_such_task'"):
        run_tasks(Reader(model), ["piqa", "no_such_task"])
    with pytest.raises(HopeError, match="include_path must be a directory with tasks, not absent"):
        run_tasks(Reader(model), ["piqa"], Path("absent"))
