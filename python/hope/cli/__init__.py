"""The command line: `hope COMMAND`, one file for each command."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from hope.cli import (
    bench,
    compare,
    evaluate,
    export,
    generate,
    info,
    learn,
    memory,
    profile,
    shards,
    tokenizer,
    train,
)
from hope.errors import HopeError
from hope.train import TrainingDiverged

_COMMANDS = (
    *(train, compare, learn, evaluate, generate, export),
    *(tokenizer, shards, memory, profile, bench, info),
)


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
    except BrokenPipeError:  # `hope info | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, a directory that may not be written
        where = f"{error.filename}: " if error.filename else ""
        print(f"hope: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hope: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hope",
        description="Train and use language models with memories that learn while they read.",
        epilog="Start with: hope train    (minutes on a CPU; downloads nothing)",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser
