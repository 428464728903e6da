"""`hope export`."""

import argparse
from pathlib import Path

from hope.checkpoint import export_model
from hope.cli.options import Commands
from hope.extras import need


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "export",
        help="copy a trained model out of its run",
        description=(
            "Copies the weights of a run's newest checkpoint (model.safetensors), its config.json\n"
            "and, if there is one, its tokenizer.json to a directory of their own, which hope\n"
            "generate and hope.load_model read. What only training needs stays behind.\n"
            "--format hf: a model of Hugging Face's transformers (hope.hf), with its tokenizer."
        ),
        epilog=(
            "examples:\n"
            "  hope export runs/hope-tiny models/mine\n"
            "  hope export runs/hope-tiny models/mine-hf --format hf"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", type=Path, help="the directory of a run, or of one of its checkpoints"
    )
    parser.add_argument("out", type=Path, help="the new directory")
    parser.add_argument(
        "--format",
        choices=("hope", "hf"),
        default="hope",
        help="what is to read it: hope, or transformers (default: %(default)s)",
    )
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    if options.format == "hf":
        need("transformers", "hf", "an export for transformers")
        from hope.hf import export  # slow to import, needed only here

        export(options.run, options.out)
        files = sorted(options.out.iterdir())
    else:
        files = export_model(options.run, options.out)
    for path in files:
        print(f"{path}  {path.stat().st_size:,} bytes")
    return 0
