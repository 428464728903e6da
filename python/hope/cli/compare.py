"""`hope compare`."""

import argparse
from pathlib import Path

from hope.cli.options import (
    Commands,
    add_device,
    add_place,
    add_settings,
    configured,
    latest_run,
    new_run,
    refuse_changes,
)
from hope.compare import Comparison, comparable, load_comparison, table
from hope.config import RunConfig
from hope.data import load_corpus
from hope.device import choose_device
from hope.errors import HopeError
from hope.presets import PRESETS, preset


def add(commands: Commands) -> None:
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
    add_settings(parser)
    add_place(parser, "compare", "the comparison")
    add_device(parser)
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    device = choose_device(options.device)
    if options.resume:
        out = options.out or latest_run("compare")
        configs = _resumed_comparison(options, out)
    else:
        configs = [configured(options, preset(name)) for name in options.presets]
        configs = comparable(configs)
        out = options.out or new_run("compare")
    train = configs[0].train
    corpus = load_corpus(configs[0].data, window=train.sequence)
    comparison = Comparison(configs, corpus, out, device, resume=options.resume)
    print(f"data   {corpus.description}")
    unit = corpus.tokenizer.unit
    print(f"budget {train.steps * train.tokens_per_step:,} {unit} for each, on {device}")
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


def _resumed_comparison(options: argparse.Namespace, out: Path) -> list[RunConfig]:
    """The configs of the comparison in `out`; what the command line says must agree with them."""
    saved = load_comparison(out)
    names = [config.preset for config in saved]
    if options.presets and options.presets != names:
        raise HopeError(
            f"{out} is a comparison of {' '.join(names)}, not of {' '.join(options.presets)}"
        )
    for config in saved:
        refuse_changes(config, configured(options, config))
    return saved
