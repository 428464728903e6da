"""`hope evaluate recall` and the other tasks on which small models are trained."""

import argparse

from hope.cli.options import (
    Commands,
    add_device,
    add_place,
    add_set,
    latest_run,
    new_run,
    positive,
)
from hope.device import choose_device
from hope.evaluate import TASKS, Evaluation, Task, equal_sized
from hope.evaluate.evaluation import FILE, small, table
from hope.presets import PRESETS, preset

_EVALUATED = ("hope-tiny", "tiny", "tiny-transformer")


def add(commands: Commands) -> None:
    for task in TASKS.values():
        _add_task(commands, task)


def _add_task(commands: Commands, task: Task) -> None:
    parser = commands.add_parser(
        task.name,
        help=task.title,
        description=(
            "Trains small models of presets, equal in size, on a task whose texts are generated,\n"
            f"and shows {task.description}.\n"
            f"Without presets: {', '.join(_EVALUATED)}."
        ),
        epilog=(
            "examples:\n"
            f"  hope evaluate {task.name}\n"
            f"  hope evaluate {task.name} tiny tiny-transformer --steps 500 --set train.seed=1\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "presets", nargs="*", metavar="PRESET", help=f"one or more of: {', '.join(PRESETS)}"
    )
    parser.add_argument(
        "--steps",
        type=positive,
        default=1000,
        help="optimizer steps for each (default: %(default)s)",
    )
    add_set(parser, "change one setting of every model")
    add_place(parser, task.name, "the same evaluation")
    add_device(parser)
    parser.set_defaults(command=_run, task=task)


def _run(options: argparse.Namespace) -> int:
    device, task = choose_device(options.device), options.task
    names = options.presets or _EVALUATED
    configs = equal_sized([small(preset(n), task, options.steps, options.set) for n in names])
    out = options.out or (latest_run if options.resume else new_run)(task.name)
    evaluation = Evaluation(task, configs, out, device, resume=options.resume)
    print(f"task   {task.name}: {task.description}")
    print(f"budget {configs[0].train.steps:,} steps for each, on {device}")
    print(f"out    {out / FILE}", flush=True)
    evaluation.run()
    print(f"\n{table(task, evaluation.runs)}")
    return 0
