"""`hope evaluate continual`."""

import argparse
import re

from hope.cli.options import (
    Commands,
    add_device,
    add_place,
    add_set,
    latest_run,
    new_run,
    positive,
)
from hope.config import RunConfig, override
from hope.config.learn import METHODS
from hope.continual import learn_config
from hope.continual.domains import DOMAINS
from hope.continual.evaluation import (
    FILE,
    PICTURE,
    ContinualEvaluation,
    Curriculum,
    Pupil,
    load_continual,
    table,
)
from hope.device import choose_device
from hope.errors import HopeError
from hope.presets import PRESETS, preset

_EVALUATED = ("hope-tiny-cms", "hope-attention-tiny", "tiny-transformer")
_DEFAULT = Curriculum()


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "continual",
        help="kinds of text one after the other: what is forgotten, what is transferred",
        description=(
            "Trains models on the first of several kinds of text, lets them learn the others one\n"
            "after the other, each read once, and shows what every kind costs after each. Models\n"
            "with a continuum memory system learn by its levels, others by fine-tuning; a preset\n"
            "with :METHOD says another way, with @RATE another rate. Without presets:\n"
            + ", ".join(_EVALUATED)
            + "."
        ),
        epilog=(
            f"domains: {', '.join(DOMAINS)}\nmethods: {', '.join(METHODS)}\n"
            "\nexamples:\n"
            "  hope evaluate continual\n"
            "  hope evaluate continual hope-tiny-cms hope-tiny-cms:finetune@3e-4\n"
            "  hope evaluate continual --resume\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "presets",
        nargs="*",
        metavar="PRESET[:METHOD][@RATE]",
        help=f"presets: {', '.join(PRESETS)}",
    )
    parser.add_argument(
        "--domains",
        nargs="+",
        choices=list(DOMAINS),
        default=list(_DEFAULT.domains),
        metavar="DOMAIN",
        help="in their order (default: %(default)s)",
    )
    parser.add_argument(
        "--first",
        type=positive,
        default=_DEFAULT.first,
        help="tokens of the first domain, which is trained on (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        default=_DEFAULT.tokens,
        help="of each later one, read once (default: %(default)s)",
    )
    parser.add_argument(
        "--held-out",
        type=positive,
        default=_DEFAULT.held_out,
        help="tokens of each, to be judged by (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of texts and models (default: 0)")
    parser.add_argument(
        "--segment",
        type=positive,
        default=64,
        help="tokens that are read with the same weights (default: %(default)s)",
    )
    parser.add_argument(
        "--chunks",
        type=positive,
        nargs="+",
        help="tokens between two moves of each level of a CMS (default: the segment, 4, 16 and 64 "
        "of them, ... as many as there are levels)",
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=1e-4,
        help="rate where a model names none (default: %(default)s)",
    )
    add_set(parser, "change one setting of every model")
    add_place(parser, "continual", "the evaluation, with its settings,")
    add_device(parser)
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    device = choose_device(options.device)
    if options.resume:
        out = options.out or latest_run("continual")
        curriculum, pupils = load_continual(out)
    else:
        out = options.out or new_run("continual")
        curriculum = Curriculum(
            tuple(options.domains), options.first, options.tokens, options.held_out, options.seed
        )
        pupils = [_pupil(options, name) for name in options.presets or _EVALUATED]
    evaluation = ContinualEvaluation(curriculum, pupils, out, device, resume=options.resume)
    sizes = f"{curriculum.first:,} bytes, then {curriculum.tokens:,} of each"
    print(f"learn  {', '.join(curriculum.domains)}: {sizes}, on {device}")
    print(f"out    {out / FILE}", flush=True)
    stopped = evaluation.run()
    if stopped is not None:
        print(
            f"\nstopped by {stopped.signal.name}; continue with: "
            f"hope evaluate continual --resume --out {out}"
        )
        return 128 + stopped.signal
    print(f"\n{table(evaluation.results, curriculum.domains)}\n\nfiles:")
    for name in (FILE, PICTURE):
        print(f"  {out / name}")
    return 0


def _pupil(options: argparse.Namespace, name: str) -> Pupil:
    parts = re.fullmatch(r"([^:@]+)(?::([^@]*))?(?:@(.*))?", name)
    if parts is None:
        raise HopeError(f"a model is PRESET, PRESET:METHOD or either @RATE, not {name!r}")
    known, method, rate = parts.groups()
    if method is not None and method not in METHODS:
        raise HopeError(f"the method of {name!r} must be one of {', '.join(METHODS)}")
    try:
        rate = options.lr if rate is None else float(rate)
    except ValueError:
        raise HopeError(f"the rate of {name!r} must be a number, not {rate!r}") from None
    run: RunConfig = override(
        preset(known),
        [f"train.tokens={options.first}", f"train.seed={options.seed}", *options.set],
    )
    method = method or ("finetune" if run.model.cms is None else "cms")
    chunks = None
    if method == "cms" and run.model.cms is not None:
        chunks = tuple(
            options.chunks or [options.segment * 4**i for i in range(run.model.cms.mlps)]
        )
    segment = options.segment
    learn = learn_config(run, method=method, segment=segment, chunks=chunks, lr=(rate,))
    return Pupil(name, run, learn)
