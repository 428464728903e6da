"""`hope train`."""

import argparse
from pathlib import Path

import torch

from hope.checkpoint import find_checkpoint, load_config
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
from hope.config import RunConfig
from hope.data import load_corpus
from hope.device import choose_device
from hope.errors import HopeError
from hope.model import parameter_count
from hope.presets import PRESETS, preset
from hope.train import Trainer, TrainResult
from hope.train.ranks import agreed, is_first, launched

_TRAINED = "hope-tiny"


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model on text",
        description=(
            "Trains a language model on bytes, or on a tokenizer's tokens. Without options: the\n"
            "tiny HOPE model, on the source of Python's standard library. Ctrl-C stops after the\n"
            "current step, with a checkpoint that --resume continues from."
        ),
        epilog=(
            "examples:\n"
            "  hope train                                 hope-tiny on Python's own source\n"
            "  hope train --data book.txt notes/          your text: files, directories, globs\n"
            "  hope train --data a.jsonl --set data.packed=true --tokenizer tokenizer.json\n"
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
    add_settings(parser)
    add_place(parser, "PRESET", "the run")
    add_device(parser)
    parser.set_defaults(command=_run, many=True)


def _run(options: argparse.Namespace) -> int:
    device = choose_device(options.device)
    if not launched():
        return _train(options, device)
    from hope.parallel import process_group  # slow to import, needed only here

    with process_group(device) as device:
        return _train(options, device)


def _train(options: argparse.Namespace, device: torch.device) -> int:
    say = print if is_first() else _say_nothing
    if options.resume:
        out = options.out or agreed(lambda: latest_run(options.preset or _TRAINED))
        config = _resumed_config(options, out)
    else:
        config = configured(options, preset(options.preset or _TRAINED))
        out = options.out or agreed(lambda: new_run(config.preset))
    train = config.train
    corpus = load_corpus(config.data, window=train.sequence)
    unit = corpus.tokenizer.unit
    trainer = Trainer(config, corpus, out, device, resume=options.resume)
    millions = parameter_count(config.model) / 1e6
    say(f"model  {config.preset}: {millions:.2f} M parameters, on {device}")
    say(f"data   {corpus.description}")
    say(
        f"budget {train.steps:,} steps of {train.tokens_per_step:,} {unit} "
        f"({train.steps * train.tokens_per_step:,} in all)"
    )
    start = f", continued after step {trainer.step:,}" if options.resume else ""
    say(f"out    {out}{start}", flush=True)
    result = trainer.run()
    if is_first():
        _report(result, out, unit)
    return 0 if result.signal is None else 128 + result.signal


def _resumed_config(options: argparse.Namespace, out: Path) -> RunConfig:
    """The config of the run in `out`; what the command line says must agree with it."""
    saved = load_config(find_checkpoint(out))
    if options.preset not in (None, saved.preset):
        raise HopeError(f"{out} is a run of preset {saved.preset!r}, not {options.preset!r}")
    refuse_changes(saved, configured(options, saved))
    return saved


def _say_nothing(*words: object, **options: object) -> None:
    """What a rank says that is not the first."""


def _report(result: TrainResult, out: Path, unit: str) -> None:
    minutes, seconds = divmod(round(result.seconds), 60)
    after = f"after {result.tokens:,} {unit}, {minutes} min {seconds} s of training"
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
