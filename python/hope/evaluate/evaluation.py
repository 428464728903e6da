"""Small models of presets, trained on one task one after the other, and judged.

An evaluation is a directory with one file, `evaluate.json`: what was asked for and, of every model
that is done, its figures. One that was stopped goes on with the first model that is not.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from hope.config import ModelConfig, RunConfig, from_dict, override, to_dict
from hope.device import check_sizes
from hope.errors import HopeError
from hope.evaluate.aligned import aligned
from hope.evaluate.task import IGNORED, Task
from hope.files import atomic_file
from hope.model import parameter_count
from hope.provenance import provenance
from hope.train import TrainingDiverged, autocast, learning_rate, make_optimizer

FILE = "evaluate.json"
# About 0.1 M parameters, so that a few thousand steps take minutes on a CPU.
_DIM = 64
_SMALL = (f"model.dim={_DIM}", "model.layers=2", "model.mixer.heads=2", "model.mixer.head_dim=32")
_BATCH = 32
_EXAMPLES = 512  # that a model is judged by, for every setting
_TOLERANCE = 0.03  # by which sizes may differ


# Settings of a training that this one has no use for: texts are generated, models not kept.
_UNUSED = (
    *("accumulate", "checkpoint_activations", "compile", "tensorboard", "wandb"),
    *("validate_every", "validation_tokens", "checkpoint_every", "keep_checkpoints"),
)


def small(config: RunConfig, task: Task, steps: int, settings: Sequence[str] = ()) -> RunConfig:
    """`config` cut down to a model for `task`, trained for `steps`; with `settings` made last.

    HopeError for settings that have no effect here.
    """
    before = config
    config = override(
        config,
        [
            *_SMALL,
            *_cms_ratio(config.model),
            f"model.vocab_size={task.vocab_size}",
            f"train.batch={_BATCH}",
            f"train.sequence={task.longest}",
            *settings,
        ],
    )
    unused = [f"train.{n}" for n in _UNUSED if getattr(config.train, n) != getattr(before.train, n)]
    unused += [n for n in ("data", "parallel") if getattr(config, n) != getattr(before, n)]
    if unused:
        raise HopeError(f"--set {unused[0]} has no effect on models that are trained on a task")
    return override(config, [f"train.tokens={steps * config.train.tokens_per_step}"])


def _cms_ratio(model: ModelConfig) -> list[str]:
    """The setting that makes the MLPs of a CMS multiples of 16 wide, which CUDA's kernels want."""
    if model.cms is None:
        return []
    step = 16 * model.cms.mlps
    return [f"model.mlp_ratio={step * max(1, round(_DIM * model.mlp_ratio / step)) / _DIM}"]


def equal_sized(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """The configs with MLPs such that every model has about as many parameters as the first.

    HopeError where one comes no nearer than 3 %.
    """
    size = parameter_count(configs[0].model)
    return [replace(c, model=_resized(c.model, size, c.preset)) for c in configs]


def _resized(model: ModelConfig, size: int, name: str) -> ModelConfig:
    # The width of all MLPs of a block is a multiple of 8. Those of a CMS are multiples of 16 each,
    # for CUDA's kernels, if that is near enough.
    count = len(model.mlp_dims)
    matrices = 3 if model.cms is None and model.mlp == "swiglu" else 2
    for unit in (8,) if model.cms is None else (16 * count, 8):
        each = matrices * model.dim * model.layers * unit
        steps = round((size - parameter_count(model)) / each)
        width = max(8 * count, model.mlp_dim + unit * steps)
        resized = replace(model, mlp_ratio=width / model.dim) if steps else model
        if abs(parameter_count(resized) / size - 1) <= _TOLERANCE:
            return resized
    raise HopeError(
        f"a model of {name} for this task has {parameter_count(resized):,} parameters at "
        f"least, and the first one has {size:,}; --set makes them smaller or larger"
    )


class Evaluation:
    """Trains and judges `configs` on `task`, one after the other; figures go to `out`.

    resume: models that `out` has figures of are not trained again. Raises HopeError where `out` has
    files without it, or what is there is of another task or other configs.
    """

    def __init__(
        self,
        task: Task,
        configs: Sequence[RunConfig],
        out: Path,
        device: str | torch.device = "cpu",
        *,
        resume: bool = False,
    ) -> None:
        self.task, self.configs, self.out = task, list(configs), out
        self.device = torch.device(device)
        names = [config.preset for config in configs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise HopeError(f"preset {twice[0]!r} is named twice; an evaluation's must differ")
        self.runs: list[dict[str, Any]] = []
        for config in self.configs:
            check_sizes(config.model, self.device)
        if resume:
            name, saved, self.runs = load_evaluation(out)
            if (name, saved) != (task.name, self.configs):
                raise HopeError(
                    f"{out} is an evaluation of {name} with {', '.join(c.preset for c in saved)} "
                    "and its own settings; a resumed one keeps them"
                )
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise HopeError(
                f"{out} is not empty; continue that evaluation with --resume, or choose another "
                "--out"
            )

    def run(self, *, progress: bool = True) -> None:
        """Goes on to the end. progress: shows bars on stderr.

        A KeyboardInterrupt loses the model that is being trained. Raises TrainingDiverged.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self._write()
        for config in self.configs[len(self.runs) :]:
            self.runs.append(_figures(self.task, config, self.device, progress))
            self._write()

    def _write(self) -> None:
        content = {
            "task": self.task.name,
            **provenance(self.device),
            "examples": _EXAMPLES,
            "configs": [to_dict(config) for config in self.configs],
            "runs": self.runs,
            "table": table(self.task, self.runs).splitlines(),
        }
        with atomic_file(self.out / FILE) as path:
            path.write_text(json.dumps(content, indent=1) + "\n")


def load_evaluation(out: Path) -> tuple[str, list[RunConfig], list[dict[str, Any]]]:
    """The task's name, the configs, and the figures so far of the evaluation in `out`."""
    path = out / FILE
    if not path.is_file():
        raise HopeError(f"there is no evaluation in {out}: {path} is missing")
    try:
        content = json.loads(path.read_text())
        task, runs = content["task"], content["runs"]
        configs = [from_dict(RunConfig, config) for config in content["configs"]]
    except (HopeError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise HopeError(f"cannot read {path}: {error}") from error
    return task, configs, runs


def _figures(task: Task, config: RunConfig, device: torch.device, progress: bool) -> dict[str, Any]:
    train = config.train
    torch.manual_seed(train.seed)
    model = task.model(config.model).to(device)
    optimizer = make_optimizer(model, train)
    generator = torch.Generator().manual_seed(train.seed)
    losses, start = [], time.perf_counter()
    bar = trange(train.steps, desc=config.preset, dynamic_ncols=True, disable=not progress)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step)
        tokens, targets = (part.to(device) for part in task.sample(train.batch, generator))
        with autocast(device, train):
            loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        losses.append(round(loss.item(), 4))
        if not (math.isfinite(losses[-1]) and math.isfinite(norm.item())):
            raise TrainingDiverged(
                f"training of {config.preset} on {task.name} diverged at step {step + 1} (loss "
                f"{losses[-1]}, gradient norm {norm.item()}); a lower train.lr usually helps"
            )
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=losses[-1], refresh=False)
    seconds = time.perf_counter() - start
    return {
        "preset": config.preset,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": train.steps,
        "seconds": seconds,
        "accuracy": accuracy(task, model.eval(), train.seed),
        "loss": losses,
    }


@torch.no_grad()
def accuracy(task: Task, model: nn.Module, seed: int = 0) -> dict[str, float]:
    """The share of right answers in each of the task's settings, over the same examples always.

    They are other ones than those of a training with the same seed.
    """
    device, result = next(model.parameters()).device, {}
    for number, (name, setting) in enumerate(task.settings.items(), 1):
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + number)
        right = asked = 0
        for _ in range(_EXAMPLES // _BATCH):
            tokens, targets = task.sample(_BATCH, generator, **setting)
            where = targets != IGNORED
            right += int((model(tokens.to(device)).argmax(-1).cpu() == targets)[where].sum())
            asked += int(where.sum())
        result[name] = right / asked
    return result


def table(task: Task, runs: Sequence[dict[str, Any]]) -> str:
    """Aligned text with a line for each model's figures."""
    rows = [("preset", "parameters", "steps", "seconds", *task.settings)]
    rows += [
        (
            run["preset"],
            f"{run['parameters']:,}",
            f"{run['steps']:,}",
            f"{run['seconds']:,.0f}",
            *(f"{run['accuracy'][name]:.3f}" for name in task.settings),
        )
        for run in runs
    ]
    return aligned(rows)
