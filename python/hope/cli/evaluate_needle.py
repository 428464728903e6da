"""`hope evaluate needle`."""

import argparse
from pathlib import Path

from hope.cli.options import Commands, add_judged, judged_out, positive
from hope.device import choose_device
from hope.errors import HopeError
from hope.evaluate.needle import haystack, search, table
from hope.evaluate.reader import Reader
from hope.evaluate.result import write_result


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "needle",
        help="whether a trained run finds a number that a long text hides",
        description=(
            "Hides a pass key in generated texts, asks for it at their end, and shows how often\n"
            "the right key is the likeliest of some, and how often it is written."
        ),
        epilog=(
            "examples:\n"
            "  hope evaluate needle runs/hope-tiny\n"
            "  hope evaluate needle runs/hope-tiny --length 1024 8192 --depth 0 1 --examples 50\n"
            "  hope evaluate needle runs/hope-tiny --haystack book.txt"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_judged(parser, "needle")
    parser.add_argument(
        "--length",
        nargs="+",
        type=positive,
        default=[256, 512, 1024, 2048],
        metavar="N",
        help="tokens of a text, at most (default: 256 512 1024 2048)",
    )
    parser.add_argument(
        "--depth",
        nargs="+",
        type=float,
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        metavar="D",
        help="where the key is, from 0 (start) to 1 (end) (default: 0 0.25 0.5 0.75 1)",
    )
    parser.add_argument(
        "--examples",
        type=positive,
        default=20,
        help="texts for every length and depth (default: %(default)s)",
    )
    parser.add_argument(
        "--choices",
        type=positive,
        default=10,
        help="keys to choose the likeliest from (default: %(default)s)",
    )
    parser.add_argument(
        "--haystack",
        type=Path,
        metavar="FILE",
        help="hide the key in this text, repeated (default: a few dull sentences)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed makes the same texts (default: 0)"
    )
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    sentences = [] if options.haystack is None else haystack(_read(options.haystack))
    reader = Reader.of_run(options.run, choose_device(options.device), batch=options.batch)
    out = judged_out(options, "needle")
    results = search(
        reader,
        options.length,
        options.depth,
        examples=options.examples,
        choices=options.choices,
        seed=options.seed,
        sentences=sentences,
    )
    print("the share that was likeliest of the choices / that was written:\n")
    print(table(results))
    print(f"\nguessing is right in {1 / options.choices:.2f} of the choices")
    asked = {
        "choices": options.choices,
        "seed": options.seed,
        "haystack": None if options.haystack is None else str(options.haystack),
    }
    write_result(out, options.run, reader.device, "needle", {**asked, "results": results})
    print(f"\nout    {out}")
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise HopeError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise HopeError(f"{path} is not UTF-8 text") from error
