"""`hope evaluate TASK`, one file for each kind of task."""

import argparse

from hope.cli import (
    evaluate_continual,
    evaluate_harness,
    evaluate_lm,
    evaluate_needle,
    evaluate_tasks,
)
from hope.cli.options import Commands

_KINDS = (evaluate_lm, evaluate_needle, evaluate_harness, evaluate_continual, evaluate_tasks)


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="judge trained models, or train small ones on a task and judge them",
        description=(
            "Judges a trained run on texts (lm), on finding what a long text hides (needle) or on\n"
            "the tasks of lm-evaluation-harness (harness); or trains small models of presets on a\n"
            "task that is generated, and judges those."
        ),
        epilog=(
            "examples:\n"
            "  hope evaluate lm runs/hope-tiny --data book.txt\n"
            "  hope evaluate needle runs/hope-tiny --length 256 1024\n"
            "  hope evaluate recall tiny tiny-transformer --steps 500\n"
            "\n"
            "hope evaluate TASK --help explains a task."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = parser.add_subparsers(title="tasks", required=True, metavar="TASK")
    for kind in _KINDS:
        kind.add(tasks)
