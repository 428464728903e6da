"""`hope memory`."""

import argparse
from typing import TYPE_CHECKING

from hope.cli.options import (
    Commands,
    add_set,
    positive,
)
from hope.config import override
from hope.presets import PRESETS, preset

if TYPE_CHECKING:
    from hope.parallel.memory import Memory


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "memory",
        help="compute what training needs in memory",
        description=(
            "Computes what a training step needs in memory on each process, without training:\n"
            "weights, gradients, the optimizer's state, and the activations that are kept."
        ),
        epilog=(
            "examples:\n"
            "  hope memory                                    all presets, one process\n"
            "  hope memory hope-1.3b --world 8 --set parallel.data=fsdp\n"
            "  hope memory 1.3b --world 8 --set parallel.data=fsdp --set parallel.tensor=2\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "presets", nargs="*", metavar="PRESET", help="which (default: all there are)"
    )
    parser.add_argument(
        "--world", type=positive, default=1, help="how many processes (default: %(default)s)"
    )
    parser.add_argument(
        "--rows",
        type=positive,
        help="sequences that a process computes at once (default: its share of train.batch)",
    )
    add_set(parser)
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from hope.parallel.memory import training_memory  # slow to import, needed only here

    columns = ("parameters", "batch", "weights", "gradients", "AdamW", "gathered")
    columns += ("layers", "memories", "head", "together")
    print(f"{'GiB on each of ' + str(options.world):<20}" + "".join(f"{c:>12}" for c in columns))
    for name in options.presets or PRESETS:
        run = override(preset(name), options.set)
        print(
            _line(name, training_memory(run, run.parallel, options.world, options.rows)), flush=True
        )
    return 0


def _line(name: str, memory: "Memory") -> str:
    kept = memory.activations
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.gathered)
    parts += (kept.layers, kept.memories, kept.head, memory.total)
    words = (f"{memory.parameters / 1e6:.2f} M", f"{memory.rows} x {memory.tokens}")
    words += tuple(f"{part / 2**30:.3f}" for part in parts)
    return f"{name:<20}" + "".join(f"{word:>12}" for word in words)
