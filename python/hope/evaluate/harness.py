"""A trained model in EleutherAI's lm-evaluation-harness: its tasks, for any run of `hope train`.

Needs the package lm_eval: `pip install 'hope_ext[eval]'`. Importing this module also makes the
model "hope" known to the harness.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hope.device import choose_device
from hope.errors import HopeError
from hope.evaluate.reader import Reader
from hope.extras import need
from hope.generate import choose

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ImportError:
    need("lm_eval", "eval", "the tasks of lm-evaluation-harness")  # says what installs it
    raise

# The tasks of the first table of Titans and of Nested Learning, by the harness's names.
PAPER = (
    "wikitext",
    "lambada_openai",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "social_iqa",
    "boolq",
)
_WRITTEN = 256  # tokens that are written at most where a task does not say
_BOOTSTRAPS = 1000  # of standard errors that have no formula


@register_model("hope")
class HopeLM(TemplateLM):
    """A run for the harness; every text begins with the separator, as in training.

    A context is read once for all that may follow it: each choice of a question starts from the
    state after the context. Contexts of different lengths are read side by side, and no text is cut
    short, however long.

    run: a run, a checkpoint or a Reader. device: as of `hope evaluate`. batch_size: how many texts
    are read side by side. max_batch_size is the harness's, for batches found by trying, and has to
    be None.
    """

    def __init__(
        self,
        run: str | Path | Reader,
        device: str | None = "auto",
        batch_size: int | str | None = 16,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if max_batch_size is not None:
            raise HopeError(f"max_batch_size must be None, not {max_batch_size}: name a batch_size")
        if not isinstance(run, Reader):
            try:
                batch = int(batch_size or 16)
            except ValueError:
                raise HopeError(f"batch_size must be a number, not {batch_size!r}") from None
            run = Reader.of_run(run, choose_device(device or "auto"), batch=batch)
        self.reader, self._device = run, run.device

    @property
    def eot_token_id(self) -> int:
        """The separator, in front of every text."""
        return self.reader.tokenizer.separator

    @property
    def tokenizer_name(self) -> str:
        """What tells the harness's caches of requests apart."""
        return f"hope-{self.reader.tokenizer.fingerprint}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """The tokens of a text: behind a separator, but for add_special_tokens=False."""
        tokens = self.reader.encode(string)
        return tokens if add_special_tokens is False else [self.eot_token_id, *tokens]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        """log p of each continuation after its context, and whether it is the likeliest."""
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, (_, context, _) in enumerate(requests):
            by_context[tuple(context)].append(place)
        alone = [places[0] for places in by_context.values() if len(places) == 1]
        shared = [context for context, places in by_context.items() if len(places) > 1]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        bar = tqdm(total=len(requests), desc="likelihoods", disable=disable_tqdm)

        def keep(places: Sequence[int], scores: Iterable[tuple[float, bool]]) -> None:
            for place, score in zip(places, scores, strict=True):
                results[place] = score
                self.cache_hook.add_partial("loglikelihood", requests[place][0], score)
            bar.update(len(places))

        texts = {place: requests[place][1] + requests[place][2] for place in alone}
        for places in self._batches(alone, key=lambda place: len(texts[place])):
            first = [len(requests[place][1]) for place in places]
            keep(places, self.reader.score([texts[place] for place in places], first))
        for contexts in self._batches(shared, key=len):
            states = self.reader.states([context[:-1] for context in contexts])
            for context, state in zip(contexts, states, strict=True):
                places = by_context[context]
                answers = [[context[-1], *requests[place][2]] for place in places]
                keep(places, self.reader.score(answers, [1] * len(answers), state))
        bar.close()
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts, each read in one pass after a separator."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        results = [0.0] * len(texts)
        bar = tqdm(total=len(texts), desc="whole texts", disable=disable_tqdm)
        for places in self._batches(range(len(texts)), key=lambda place: len(texts[place])):
            scores = self.reader.score([texts[place] for place in places], [1] * len(places))
            for place, (log_p, _) in zip(places, scores, strict=True):
                results[place] = log_p
                self.cache_hook.add_partial("loglikelihood_rolling", requests[place].args, log_p)
            bar.update(len(places))
        bar.close()
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop sequence or a separator.

        The likeliest token always, or with do_sample one by temperature and top_k, seeded as torch
        is. HopeError for other settings.
        """
        results: list[str] = [""] * len(requests)
        texts = [self.tok_encode(request.args[0]) for request in requests]
        random = torch.Generator(self.device).manual_seed(torch.initial_seed())
        bar = tqdm(total=len(texts), desc="texts written", disable=disable_tqdm)
        for places in self._batches(range(len(texts)), key=lambda place: len(texts[place])):
            states = self.reader.states([texts[place][:-1] for place in places])
            for place, state in zip(places, states, strict=True):
                asked = requests[place].args[1]
                results[place] = self._write(texts[place][-1], state, asked, random)
                self.cache_hook.add_partial("generate_until", requests[place].args, results[place])
                bar.update()
        bar.close()
        return results

    def _write(self, token: int, state: Any, asked: dict[str, Any], random: torch.Generator) -> str:
        """What follows a text whose last token is `token`, and what is before it in the state."""
        settings = normalize_gen_kwargs(asked, _WRITTEN)
        stops, limit = settings.pop("until"), settings.pop("max_gen_toks")
        sampled = settings.pop("do_sample")
        temperature, top_k = settings.pop("temperature", 1.0), settings.pop("top_k", None)
        if settings:
            raise HopeError(
                f"generation_kwargs: {next(iter(settings))} is none of until, max_gen_toks, "
                "do_sample, temperature and top_k"
            )

        def pick(logits: Tensor) -> Tensor:
            return choose(logits, temperature if sampled else 0.0, top_k, random)

        tokens: list[int] = []
        for following in itertools.islice(self.reader.continuation(token, state, pick), limit):
            tokens.append(following)
            written = self.reader.decode(tokens)
            if any(stop and stop in written for stop in stops):
                break
        return postprocess_generated_text(self.reader.decode(tokens), stops, None)

    def _batches(self, items: Iterable[Any], key: Any) -> Iterator[list[Any]]:
        """Items of like size together, the largest first: what needs too much memory fails soon."""
        ordered = sorted(items, key=key, reverse=True)
        for start in range(0, len(ordered), self.reader.batch):
            yield ordered[start : start + self.reader.batch]


def run_tasks(
    reader: Reader,
    tasks: Sequence[str],
    include_path: Path | None = None,
    *,
    shots: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """The harness's results for tasks, groups or tags by name; "paper" stands for all of PAPER.

    include_path: a directory with further tasks (YAML). shots: examples in front of every question
    (None: as the task says). limit: questions of each task, at most. HopeError where a task is
    unknown or its data is not here.
    """
    names = [name for task in tasks for name in (PAPER if task == "paper" else (task,))]
    names = list(dict.fromkeys(names))
    if include_path is not None and not include_path.is_dir():
        raise HopeError(f"include_path must be a directory with tasks, not {include_path}")
    if shots is not None and shots < 0:
        raise HopeError(f"shots must be at least 0, not {shots}")
    manager = _manager(names, include_path)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise HopeError(
            f"the harness has no task {unknown[0]!r}; `lm_eval ls tasks` lists its own, and "
            "--include_path names a directory with others"
        )
    loaded: list[Any] = []
    for name in names:
        found = _load(manager, name)
        groups = found["groups"]
        loaded += [groups[name]] if name in groups else found["tasks"].values()
    results = lm_eval.simple_evaluate(
        HopeLM(reader),
        tasks=loaded,
        num_fewshot=shots,
        limit=limit,
        batch_size=reader.batch,
        bootstrap_iters=_BOOTSTRAPS,
        log_samples=False,
        task_manager=manager,
    )
    assert results is not None  # it is None in other processes than the first
    return results


def table(results: dict[str, Any]) -> str:
    """The harness's own tables: of tasks, and of groups where there are some."""
    groups = [make_table(results, "groups")] if results.get("groups") else []
    return "\n".join([make_table(results), *groups])


def _manager(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """Knows the tasks in include_path, and the harness's own, which take a while, if needed."""
    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=include_path)


def _load(manager: TaskManager, name: str) -> dict[str, Any]:
    try:
        return manager.load([name])
    except (OSError, ValueError) as error:  # what datasets raises for data that it has not got
        if isinstance(error, ValueError) and "find cache" not in str(error):
            raise  # (a ValueError where only other parts of the data are in its cache)
        raise HopeError(
            f"the data of task {name!r} is not on this machine ({error}). Only what is in the "
            "cache of Hugging Face's datasets (HF_HOME) is read; --download fetches the rest"
        ) from error
