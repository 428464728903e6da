"""The command line: `hope COMMAND`, one file for each command."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence

import torch

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
    _print_any_text()
    try:
        if not options.many and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise HopeError("of all commands only `hope train` runs on many processes")
        status = options.command(options)
        sys.stdout.flush()
        return status
    except HopeError as error:
        return _failed(f"error: {error}", 2)
    except TrainingDiverged as error:
        return _failed(error)
    except BrokenPipeError:  # `hope info | head`: the reader has seen enough
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, a directory that may not be written
        name = error.filename2 or error.filename  # of two, what was to be written
        where = f"{name}: " if name else ""
        return _failed(f"{where}{error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not _is_about_memory(error):
            raise
        return _failed(
            f"not enough memory: {str(error).splitlines()[0] if str(error) else 'out of memory'}; "
            "a smaller model, train.batch or train.sequence needs less"
        )
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    finally:
        _drop_what_cannot_be_printed()


def _failed(why: object, status: int = 1) -> int:
    print(f"hope: {why}", file=sys.stderr)
    return status


def _is_about_memory(error: Exception) -> bool:
    """Whether memory was short; on the CPU, torch has no class of its own for that."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "size calculation over"))


def _print_any_text() -> None:
    """Names of files, and what a model writes, may be nothing that the terminal can show."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_what_cannot_be_printed() -> None:
    """Python would try once more at its end, and print a traceback: stdout is closed, or full."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hope",
        description="Train and use language models with memories that learn while they read.",
        epilog="Start with: hope train    (minutes on a CPU; downloads nothing)",
    )
    parser.set_defaults(many=False)  # whether torchrun may start it
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser
