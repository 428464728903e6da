"""`hope profile`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hope.checkpoint import find_checkpoint, load_config, load_model
from hope.cli.options import (
    Commands,
    add_device,
    add_set,
    new_run,
    positive,
)
from hope.config import override
from hope.device import choose_device
from hope.errors import HopeError
from hope.model import parameter_count
from hope.presets import PRESETS, preset
from hope.profile import OperatorFigures, Profile, TrainingStep, profile_step

_PROFILED = "hope-tiny"
_ROWS = 20


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "profile",
        help="show where the time and memory of a training step go",
        description=(
            "Runs a few training steps of a model on random text, and shows what one of them\n"
            "consists of: every operator's time, memory and, where they are known, operations per\n"
            "second, also as a share of what a large product of matrices reaches here."
        ),
        epilog=(
            "examples:\n"
            "  hope profile                                 hope-tiny, at its training's sizes\n"
            "  hope profile --preset tiny --sequence 4096 --batch 1\n"
            "  hope profile runs/hope-tiny --out traces     the model of a run\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a run or a checkpoint")
    model.add_argument(
        "--preset",
        choices=list(PRESETS),
        metavar="PRESET",
        help=f"a new model, one of: {', '.join(PRESETS)} (default: {_PROFILED})",
    )
    parser.add_argument("--sequence", type=positive, help="tokens of a text (default: as trained)")
    parser.add_argument("--batch", type=positive, help="texts in a step (default: as trained)")
    add_set(parser, "change one setting, such as train.dtype=bfloat16")
    parser.add_argument(
        "--rows", type=positive, default=_ROWS, help="operators to show (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIRECTORY",
        help="where profile.json and trace.json go (default: runs/profile, or runs/profile-2, ...)",
    )
    add_device(parser)
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    device = choose_device(options.device)
    if options.run is not None:
        saved = load_config(find_checkpoint(options.run))
    else:
        saved = preset(options.preset or _PROFILED)
    sizes = [
        f"train.{name}={getattr(options, name)}"
        for name in ("sequence", "batch")
        if getattr(options, name) is not None
    ]
    config = override(saved, [*options.set, *sizes])
    if options.run is not None and config.model != saved.model:
        raise HopeError(f"--set: the model of {options.run} is there and cannot be changed")
    model = None if options.run is None else load_model(options.run, device)
    out = options.out or new_run("profile")
    train = config.train
    print(f"model  {config.preset}: {parameter_count(config.model) / 1e6:.2f} M parameters")
    sizes = f"{train.batch} x {train.sequence:,} tokens, {train.dtype}"
    print(f"step   {sizes}, on {device}", flush=True)
    result = profile_step(TrainingStep(config, device, model), out)
    print(f"time   {1e3 * result.step_seconds:,.1f} ms, {result.tokens_per_second:,.0f} tokens/s")
    print(f"memory {result.peak_bytes / 2**20:,.1f} MiB at the peak of a step, over the model's")
    peak = f"{result.peak_flops_per_second / 1e9:,.1f} GFLOP/s"
    print(f"peak   {peak}, a large product in {train.dtype}")
    print(f"\n{operators_table(result, options.rows)}\n\n{kinds_table(result)}\n\nfiles:")
    for name in ("profile.json", "trace.json"):
        print(f"  {out / name}")
    return 0


def operators_table(result: Profile, rows: int) -> str:
    """The costliest operators, and a line for the rest."""
    shown, rest = result.operators[:rows], result.operators[rows:]
    lines = [
        ("operator", "kind", "calls", "ms", "share", "MiB", "GFLOP", "GFLOP/s", "of peak"),
        *(
            (operator.name, operator.kind, *_figures([operator]), *_rates(operator, result))
            for operator in shown
        ),
    ]
    if rest:
        lines.append((f"{len(rest)} others", "", *_figures(rest), "", "", ""))
    return _aligned(lines, left=2)


def kinds_table(result: Profile) -> str:
    """All operators, by kinds."""
    kinds = dict.fromkeys(operator.kind for operator in result.operators)
    groups = {k: [o for o in result.operators if o.kind == k] for k in kinds}
    ordered = sorted(groups.items(), key=lambda item: -sum(o.share for o in item[1]))
    lines = [("kind", "calls", "ms", "share", "MiB")]
    lines += [(kind, *_figures(operators)) for kind, operators in ordered]
    return _aligned(lines, left=1)


def _figures(operators: Sequence[OperatorFigures]) -> tuple[str, ...]:
    calls, seconds, share, size = (
        sum(getattr(operator, name) for operator in operators)
        for name in ("calls", "seconds", "share", "bytes")
    )
    mebibytes = round(size / 2**20, 1) + 0.0  # not -0.0
    return f"{calls:,}", f"{1e3 * seconds:,.2f}", f"{share:.1%}", f"{mebibytes:,.1f}"


def _rates(operator: OperatorFigures, result: Profile) -> tuple[str, ...]:
    if operator.flops_per_second is None:
        return "", "", ""
    rate = operator.flops_per_second
    share = rate / result.peak_flops_per_second
    return f"{operator.flops / 1e9:,.3f}", f"{rate / 1e9:,.1f}", f"{share:.0%}"


def _aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns side by side, the first `left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
