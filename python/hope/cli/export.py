"""`hope export`."""

import argparse
from pathlib import Path

from hope.checkpoint import export_model
from hope.cli.options import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "export",
        help="copy a trained model out of its run",
        description=(
            "Copies the weights of a run's newest checkpoint (model.safetensors), its config.json\n"
            "and, if there is one, its tokenizer.json to a directory of their own, which hope\n"
            "generate and hope.load_model read. What only training needs stays behind."
        ),
        epilog="example:\n  hope export runs/hope-tiny models/mine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", type=Path, help="the directory of a run, or of one of its checkpoints"
    )
    parser.add_argument("out", type=Path, help="the new directory")
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    for path in export_model(options.run, options.out):
        print(f"{path}  {path.stat().st_size:,} bytes")
    return 0
