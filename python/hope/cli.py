"""The command line: `hope train`, `compare`, `evaluate`, `generate` and `info`."""

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hope_ext
from hope.checkpoint import find_checkpoint, load_config, load_model
from hope.compare import Comparison, comparable, load_comparison, table
from hope.config import RunConfig, override, to_dict
from hope.data import load_corpus
from hope.device import choose_device
from hope.errors import HopeError
from hope.evaluate import TASKS, Evaluation, equal_sized
from hope.evaluate.evaluation import FILE, small
from hope.evaluate.evaluation import table as accuracies
from hope.generate import decode, generate
from hope.model import parameter_count
from hope.presets import PRESETS, preset
from hope.train import Trainer, TrainingDiverged, TrainResult

_RUNS = Path("runs")
_TRAINED = "hope-tiny"
_EVALUATED = ("hope-tiny", "tiny", "tiny-transformer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 (it failed), 2 (wrong use) or 128 + n (stopped by signal n)."""
    options = _parser().parse_args(arguments)
    try:
        status = options.command(options)
        sys.stdout.flush()
        return status
    except HopeError as error:
        print(f"hope: error: {error}", file=sys.stderr)
        return 2
    except TrainingDiverged as error:
        print(f"hope: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hope: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hope info | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hope",
        description="Train and use language models with memories that learn while they read.",
        epilog="Start with: hope train    (minutes on a CPU; downloads nothing)",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_compare(commands)
    _add_evaluate(commands)
    _add_generate(commands)
    info = commands.add_parser(
        "info",
        help="show the build, the devices and the kernels",
        description="Shows how hope_ext was built, the devices here, and the CUDA kernels.",
    )
    info.set_defaults(command=_info)
    return parser


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "train",
        help="train a model on text",
        description=(
            "Trains a byte-level language model. Without options: the tiny HOPE model, on the\n"
            "source of Python's standard library. Ctrl-C stops after the current step, with a\n"
            "checkpoint that --resume continues from."
        ),
        epilog=(
            "examples:\n"
            "  hope train                                 hope-tiny on Python's own source\n"
            "  hope train --data book.txt notes/          your text: files, directories, globs\n"
            "  hope train --preset tiny                   the Titans model\n"
            "  hope train --preset tiny-transformer       the Transformer to compare with\n"
            "  hope train --steps 100 --set model.dim=192 --set train.lr=2e-3\n"
            "  hope train --resume --out runs/hope-tiny   continue a stopped run\n"
            "\n"
            "--set takes any field of a run's config.json, for example model.layers, train.batch,\n"
            "model.mixer.heads, train.sequence, train.seed; model.mixer=attention swaps the mixer."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        metavar="PRESET",
        help=f"settings to start from, one of: {', '.join(PRESETS)} (default: {_TRAINED})",
    )
    _add_settings(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIRECTORY",
        help="where the files go (default: runs/PRESET, or runs/PRESET-2, ... if that is taken)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out (default: the preset's latest)",
    )
    _add_device(parser)
    parser.set_defaults(command=_train)


def _add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "compare",
        help="train presets side by side",
        description=(
            "Trains presets one after the other, on the same text in the same order and the same\n"
            "number of bytes, and shows parameters, bits per byte and seconds side by side."
        ),
        epilog=(
            "examples:\n"
            "  hope compare tiny tiny-transformer --steps 200\n"
            "  hope compare tiny tiny-mac tiny-mag tiny-mal --data notes/ --out runs/variants\n"
            "  hope compare --resume --out runs/variants  continue a stopped comparison\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "presets",
        nargs="*",
        metavar="PRESET",
        help=f"two or more (with --resume: none are needed) of: {', '.join(PRESETS)}",
    )
    _add_settings(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIRECTORY",
        help="where the files go (default: runs/compare, or runs/compare-2, ... if it is taken)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the comparison in --out (default: the latest)",
    )
    _add_device(parser)
    parser.set_defaults(command=_compare)


def _add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "evaluate",
        help="train small models on a task and judge them",
        description=(
            "Trains small models of presets, equal in size, on a task whose texts are generated,\n"
            "and shows how often each is right. Without presets: "
            f"{', '.join(_EVALUATED)}."
        ),
        epilog=(
            "tasks:\n"
            + "".join(f"  {task.name:<15} {task.description}\n" for task in TASKS.values())
            + "\nexamples:\n"
            "  hope evaluate recall\n"
            "  hope evaluate state-tracking tiny tiny-transformer --steps 500 --set train.seed=1\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument(
        "presets", nargs="*", metavar="PRESET", help=f"one or more of: {', '.join(PRESETS)}"
    )
    parser.add_argument(
        "--steps",
        type=_positive,
        default=1000,
        help="optimizer steps for each (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one setting of every model; may be repeated",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIRECTORY",
        help="where the figures go (default: runs/TASK, or runs/TASK-2, ... if it is taken)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the same evaluation in --out (default: the latest)",
    )
    _add_device(parser)
    parser.set_defaults(command=_evaluate)


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "generate",
        help="write text with a trained model",
        description="Writes text that continues a prompt, with the newest checkpoint of a run.",
        epilog=(
            "examples:\n"
            "  hope generate runs/hope-tiny\n"
            "  hope generate runs/hope-tiny --prompt 'def main():' --length 1000 --temperature 0.5"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", type=Path, help="the directory of a run, or of one of its checkpoints"
    )
    parser.add_argument("--prompt", default="", help="text to continue (default: none)")
    parser.add_argument(
        "--length", type=int, default=400, help="how many bytes at most (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0: always the likeliest byte; higher: more varied (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k", type=int, help="choose among the K likeliest bytes (default: all)"
    )
    parser.add_argument(
        "--seed", type=int, help="the same seed writes the same text (default: random)"
    )
    _add_device(parser)
    parser.set_defaults(command=_generate)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that change a preset's settings."""
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="text to train on: files, directories, globs (default: Python's standard library)",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--tokens", type=_positive, help="how many bytes of text to train on")
    budget.add_argument("--steps", type=_positive, help="the same, in optimizer steps")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one setting; may be repeated",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one that the build has kernels for (default: %(default)s)",
    )


def _positive(text: str) -> int:
    """A count such as 3000000, 3_000_000 or 3e6."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < 2**63 or not value.is_integer():
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(value)


def _train(options: argparse.Namespace) -> int:
    device = choose_device(options.device)
    if options.resume:
        out = options.out or _latest_run(options.preset or _TRAINED)
        config = _resumed_config(options, out)
    else:
        config = _configured(options, preset(options.preset or _TRAINED))
        out = options.out or _new_run(config.preset)
    train = config.train
    corpus = load_corpus(config.data, window=train.sequence)
    trainer = Trainer(config, corpus, out, device, resume=options.resume)
    millions = parameter_count(config.model) / 1e6
    print(f"model  {config.preset}: {millions:.2f} M parameters, on {device}")
    print(f"data   {corpus.description}")
    print(
        f"budget {train.steps:,} steps of {train.tokens_per_step:,} bytes "
        f"({train.steps * train.tokens_per_step:,} in all)"
    )
    start = f", continued after step {trainer.step:,}" if options.resume else ""
    print(f"out    {out}{start}", flush=True)
    result = trainer.run()
    _report(result, out)
    return 0 if result.signal is None else 128 + result.signal


def _compare(options: argparse.Namespace) -> int:
    device = choose_device(options.device)
    if options.resume:
        out = options.out or _latest_run("compare")
        configs = _resumed_comparison(options, out)
    else:
        configs = [_configured(options, preset(name)) for name in options.presets]
        configs = comparable(configs)
        out = options.out or _new_run("compare")
    train = configs[0].train
    corpus = load_corpus(configs[0].data, window=train.sequence)
    comparison = Comparison(configs, corpus, out, device, resume=options.resume)
    print(f"data   {corpus.description}")
    print(f"budget {train.steps * train.tokens_per_step:,} bytes for each, on {device}")
    print(f"out    {out}", flush=True)
    stopped = comparison.run()
    if stopped is not None:
        print(
            f"\nstopped by {stopped.signal.name}; continue with: hope compare --resume --out {out}"
        )
        return 128 + stopped.signal
    print(f"\n{table(comparison.runs)}\n\nfiles:")
    for name in ("compare.json", "compare.png", *(config.preset for config in configs)):
        print(f"  {out / name}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    device, task = choose_device(options.device), TASKS[options.task]
    names = options.presets or _EVALUATED
    configs = equal_sized([small(preset(n), task, options.steps, options.set) for n in names])
    out = options.out or (_latest_run if options.resume else _new_run)(task.name)
    evaluation = Evaluation(task, configs, out, device, resume=options.resume)
    print(f"task   {task.name}: {task.description}")
    print(f"budget {configs[0].train.steps:,} steps for each, on {device}")
    print(f"out    {out / FILE}", flush=True)
    evaluation.run()
    print(f"\n{accuracies(task, evaluation.runs)}")
    return 0


def _resumed_comparison(options: argparse.Namespace, out: Path) -> list[RunConfig]:
    """The configs of the comparison in `out`; what the command line says must agree with them."""
    saved = load_comparison(out)
    names = [config.preset for config in saved]
    if options.presets and options.presets != names:
        raise HopeError(
            f"{out} is a comparison of {' '.join(names)}, not of {' '.join(options.presets)}"
        )
    for config in saved:
        _refuse_changes(config, _configured(options, config))
    return saved


def _configured(options: argparse.Namespace, config: RunConfig) -> RunConfig:
    """`config` with what the command line asks for."""
    config = override(config, options.set)
    if options.tokens is not None:
        config = override(config, [f"train.tokens={options.tokens}"])
    if options.steps is not None:
        tokens = options.steps * config.train.tokens_per_step
        config = override(config, [f"train.tokens={tokens}"])
    if options.data is not None:
        config = dataclasses.replace(config, data=tuple(options.data))
    return config


def _resumed_config(options: argparse.Namespace, out: Path) -> RunConfig:
    """The config of the run in `out`; what the command line says must agree with it."""
    saved = load_config(find_checkpoint(out))
    if options.preset not in (None, saved.preset):
        raise HopeError(f"{out} is a run of preset {saved.preset!r}, not {options.preset!r}")
    _refuse_changes(saved, _configured(options, saved))
    return saved


def _refuse_changes(saved: RunConfig, asked: RunConfig) -> None:
    if changes := _differences(to_dict(saved), to_dict(asked)):
        raise HopeError(f"a resumed run keeps its settings, but these differ: {', '.join(changes)}")


def _differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{path}{name}.")
        elif before != after:
            found.append(f"{path}{name} ({before} in the run, {after} asked for)")
    return found


def _numbered_run(name: str, number: int) -> Path:
    return _RUNS / (name if number == 1 else f"{name}-{number}")


def _is_used(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _new_run(name: str) -> Path:
    number = 1
    while _is_used(_numbered_run(name, number)):
        number += 1
    return _numbered_run(name, number)


def _latest_run(name: str) -> Path:
    number = 1
    while _is_used(_numbered_run(name, number + 1)):
        number += 1
    return _numbered_run(name, number)


def _report(result: TrainResult, out: Path) -> None:
    minutes, seconds = divmod(round(result.seconds), 60)
    after = f"after {result.tokens:,} bytes, {minutes} min {seconds} s of training"
    if result.validation_bits_per_byte is not None:
        print(f"\nvalidation: {result.validation_bits_per_byte:.4f} bits per byte {after}")
    if result.sample is not None:
        print(f"\na sample:\n{result.sample}")
    print("\nfiles:")
    for name, path in result.files.items():
        print(f"  {name:<11} {path}")
    if result.signal is not None:
        print(
            f"\nstopped by {result.signal.name} {after}; "
            f"continue with: hope train --resume --out {out}"
        )
    else:
        print(f"\nmore text: hope generate {out} --prompt 'def '")


def _generate(options: argparse.Namespace) -> int:
    model = load_model(options.run, choose_device(options.device))
    tokens = generate(
        model,
        options.prompt,
        length=options.length,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    print(options.prompt, end="", flush=True)
    for piece in decode(tokens):
        print(piece, end="", flush=True)
    print()
    return 0


def _info(options: argparse.Namespace) -> int:
    print("build")
    for name, value in hope_ext.build_info().items():
        if isinstance(value, dict):  # flags: one line per compiler
            for compiler, flags in value.items():
                print(f"  {name} {compiler}: {flags}")
        else:
            print(f"  {name:<13} {', '.join(value) if isinstance(value, list) else value}")
    print("devices")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"  cpu           {torch.get_num_threads()} threads, {capability}")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        print(f"  cuda:{index}        {gpu.name}, {memory}, sm_{gpu.major}{gpu.minor}")
    print(f"  auto          {choose_device('auto')}")
    kernels = hope_ext.kernel_report()
    spilling = [kernel for kernel in kernels if kernel["spill_bytes"]]
    print(f"CUDA kernels    {len(kernels)} in the build, {len(spilling)} that spill registers")
    for kernel in spilling:
        print(f"  {kernel['name']} ({kernel['architecture']}): {kernel['spill_bytes']} bytes")
    return 0
