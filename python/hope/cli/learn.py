"""`hope learn`."""

import argparse
from pathlib import Path

from hope.checkpoint import find_checkpoint, load_config
from hope.cli.options import (
    Commands,
    add_device,
    add_place,
    latest_run,
    new_run,
    positive,
)
from hope.config.learn import METHODS
from hope.continual import learn_config
from hope.continual.run import LearnRun, Lesson, load_lesson, table
from hope.device import choose_device
from hope.errors import HopeError

_SETTINGS = ("method", "segment", "chunks", "context", "rule", "lr", "clip")


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "learn",
        help="let a trained model learn from a new text",
        description=(
            "Reads a text once and learns from it while it reads. Of a model with a continuum\n"
            "memory system only the levels' MLPs learn, each when its chunk of tokens is\n"
            "complete. The loss on held-out new and old text is shown before and after. Ctrl-C\n"
            "stops after the current segment, with a checkpoint that --resume continues from."
        ),
        epilog=(
            "examples:\n"
            "  hope learn --checkpoint runs/hope-tiny-cms --text manual.txt\n"
            "  hope learn --checkpoint runs/hope-tiny-cms --text notes/ --old book.txt --lr 3e-4\n"
            "  hope learn --checkpoint runs/learn --text more/    goes on with what is pending\n"
            "  hope learn --checkpoint runs/tiny-transformer --text manual.txt --method finetune\n"
            "  hope learn --resume --out runs/learn               continue a stopped run\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    paths = {"nargs": "+", "metavar": "PATH"}
    parser.add_argument("--checkpoint", type=Path, help="a run, or one of its checkpoints")
    parser.add_argument("--text", help="what to learn: files, directories, globs", **paths)
    parser.add_argument(
        "--old",
        help="held-out text of what it should not forget (default: the validation side of the "
        "run's own data)",
        **paths,
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="what learns: the levels of a CMS, all weights, or all MLPs (default: cms where the "
        "model has one, else finetune)",
    )
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        metavar="RATE",
        help="learning rate: one, or one for each level (default: 1e-4)",
    )
    parser.add_argument("--rule", choices=("adamw", "sgd"), help="(default: adamw)")
    parser.add_argument(
        "--segment",
        type=positive,
        metavar="TOKENS",
        help="read with the same weights (default: the fastest level's chunk, or 64)",
    )
    parser.add_argument(
        "--chunks",
        type=positive,
        nargs="+",
        metavar="TOKENS",
        help="between two moves of each level (default: the model's)",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help="after which the carried state starts anew; 0: never (default: the training's "
        "sequence)",
    )
    parser.add_argument("--clip", type=float, help="largest norm of a gradient (default: 1)")
    parser.add_argument(
        "--anew",
        action="store_true",
        help="drop what the checkpoint has pending from an earlier text",
    )
    add_place(parser, "learn", "the run")
    add_device(parser)
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    device = choose_device(options.device)
    if options.resume:
        lesson, out = _resumed_lesson(options)
    else:
        lesson, out = _lesson(options), options.out or new_run("learn")
    run = LearnRun(lesson, out, device, resume=options.resume, anew=options.anew)
    learn = lesson.learn
    every = f" every {', '.join(f'{c:,}' for c in learn.chunks)} tokens" if learn.chunks else ""
    learned = sum(w.numel() for w in run.learner.parameters)
    print(f"model  {run.config.preset} of {lesson.checkpoint}, on {device}")
    print(f"new    {run.descriptions['new']}")
    print(f"old    {run.descriptions['old']}")
    print(f"learn  {learn.method}: {learned / 1e6:.2f} M parameters{every}, {learn.rule}")
    start = f", continued after {run.position:,} tokens" if options.resume else ""
    print(f"out    {out}{start}", flush=True)
    result = run.run()
    if result.signal is not None:
        print(
            f"\nstopped by {result.signal.name} after {result.tokens:,} tokens; continue with: "
            f"hope learn --resume --out {out}"
        )
        return 128 + result.signal
    print(f"\n{table(result)}\n\nfiles:")
    for name, path in result.files.items():
        print(f"  {name:<11} {path}")
    return 0


def _lesson(options: argparse.Namespace) -> Lesson:
    for name in ("checkpoint", "text"):
        if getattr(options, name) is None:
            raise HopeError(f"--{name} is missing; --resume alone takes it from the run")
    config = load_config(find_checkpoint(options.checkpoint))
    settings = {name: getattr(options, name) for name in _SETTINGS}
    for name in ("chunks", "lr"):
        settings[name] = None if settings[name] is None else tuple(settings[name])
    before = None if options.anew else load_lesson(options.checkpoint)
    if before is not None:  # goes on as it learned before
        settings = {
            name: getattr(before.learn, name) if value is None else value
            for name, value in settings.items()
        }
    learn = learn_config(config, **settings)
    return Lesson(str(options.checkpoint), tuple(options.text), tuple(options.old or ()), learn)


def _resumed_lesson(options: argparse.Namespace) -> tuple[Lesson, Path]:
    """The lesson of the run in --out; a resumed one keeps its settings."""
    out = options.out or latest_run("learn")
    names = ("checkpoint", "text", "old", *_SETTINGS)
    given = [n for n in names if getattr(options, n) is not None] + ["anew"] * options.anew
    if given:
        names = ", ".join(f"--{name}" for name in given)
        raise HopeError(f"a resumed run keeps its settings: --resume takes no {names}")
    lesson = load_lesson(out)
    if lesson is None:
        raise HopeError(f"{out} is no run of hope learn: there is no learner's state in it")
    return lesson, out
