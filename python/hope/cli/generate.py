"""`hope generate`."""

import argparse
from pathlib import Path

from hope.checkpoint import find_checkpoint, load_model
from hope.cli.options import Commands, add_device
from hope.device import choose_device
from hope.generate import decode, generate
from hope.tokenizers import load_tokenizer


def add(commands: Commands) -> None:
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
        "--length",
        type=int,
        default=400,
        help="how many tokens (bytes) at most (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0: always the likeliest token; higher: more varied (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k", type=int, help="choose among the K likeliest tokens (default: all)"
    )
    parser.add_argument(
        "--seed", type=int, help="the same seed writes the same text (default: random)"
    )
    add_device(parser)
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    checkpoint = find_checkpoint(options.run)
    model = load_model(checkpoint, choose_device(options.device))
    tokenizer = load_tokenizer(checkpoint)
    tokens = generate(
        model,
        options.prompt,
        length=options.length,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        tokenizer=tokenizer,
    )
    print(options.prompt, end="", flush=True)
    for piece in decode(tokens, tokenizer):
        print(piece, end="", flush=True)
    print()
    return 0
