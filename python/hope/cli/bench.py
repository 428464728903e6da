"""`hope bench`."""

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from hope.cli.options import Commands
from hope.errors import HopeError


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="time an operator against its definition and other code",
        description=(
            "Runs `python -m benchmarks.ops` of the checkout that hope_ext is installed from,\n"
            "with all options that it has."
        ),
        epilog=(
            "examples:\n"
            "  hope bench                     titans, on a GPU where there is one\n"
            "  hope bench cms --quick         another operator, only to see that it runs\n"
            "  hope bench titans --help       all operators and options\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("op", nargs="?", metavar="OP", help="an operator (default: titans)")
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="...", help="options of the benchmark"
    )
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    checkout = Path(find_spec("hope_ext").origin).resolve().parent.parent
    if not (checkout / "benchmarks" / "ops.py").is_file():
        raise HopeError(
            "the benchmarks are in the checkout and not in the installed package, and hope_ext is "
            f"imported from {checkout}; in a checkout: pip install --no-build-isolation --no-deps "
            "-e ."
        )
    chosen = [] if options.op is None else ["--op", options.op]
    command = [sys.executable, "-m", "benchmarks.ops", *chosen, *options.options]
    return subprocess.run(command, cwd=checkout, check=False).returncode
