"""`hope evaluate harness`."""

import argparse
import os
from pathlib import Path

from hope.cli.options import Commands, add_judged, judged_out, positive
from hope.device import choose_device
from hope.evaluate.reader import Reader
from hope.evaluate.result import write_result


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "harness",
        help="judge a trained run on tasks of EleutherAI's lm-evaluation-harness",
        description=(
            "Judges a trained run on tasks of EleutherAI's lm-evaluation-harness, which has to be\n"
            "installed (pip install 'hope_ext[eval]'). --tasks paper: WikiText, LAMBADA, PIQA,\n"
            "HellaSwag, WinoGrande, ARC, SIQA and BoolQ, as in the papers. Nothing is downloaded\n"
            "without --download."
        ),
        epilog=(
            "examples:\n"
            "  hope evaluate harness runs/hope-tiny --tasks paper\n"
            "  hope evaluate harness runs/hope-tiny --tasks my_task --include_path tasks/"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_judged(parser, "harness")
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="NAME",
        help="the harness's tasks, groups or tags; paper: those of the papers",
    )
    parser.add_argument(
        "--include_path", type=Path, metavar="DIRECTORY", help="has further tasks, as YAML files"
    )
    parser.add_argument(
        "--shots",
        type=int,
        metavar="N",
        help="examples in front of every question (default: as the task says)",
    )
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="questions of each task, at most (default: all)",
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="let the harness fetch data that is not on this machine",
    )
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    if not options.download:  # before the harness and its libraries are loaded, which read it
        os.environ["HF_HUB_OFFLINE"] = "1"
    from hope.evaluate import harness

    reader = Reader.of_run(options.run, choose_device(options.device), batch=options.batch)
    out = judged_out(options, "harness")
    results = harness.run_tasks(
        reader, options.tasks, options.include_path, shots=options.shots, limit=options.limit
    )
    print(harness.table(results))
    kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
    write_result(
        out, options.run, reader.device, "harness", {key: results.get(key) for key in kept}
    )
    print(f"out    {out}")
    return 0
