"""`make gpu`: everything that only a machine with a GPU can show, in one command and 8 minutes.

    python -m benchmarks.gpu

In this order: the build for that GPU; the CUDA primitives' self-tests; the laws and the operators'
own tests on real CUDA; compute-sanitizer on the smallest cases, where it works; the benchmarks. It
works offline, from a checkout, with what is installed, and stops at the first thing that is red.
Every step has a limit, and a later one gets what time is left; what was cut short, or skipped, says
so. One JSON file says what came of it, with the GPU, the versions, the commit and a hash of each
operator's sources; it is written again after every step. `python -m benchmarks.status` reads it.

Exit status: 0 if build, self-tests and laws are green and nothing is red; else 1. Without a GPU it
says so, and nothing is built.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import build_config
from benchmarks import gpu_steps, sources
from benchmarks.gpu_steps import GREEN, LEAST_SECONDS, RED, SKIPPED, Outcome, Step

SECONDS = 465  # of 8 minutes; a command that has to be killed takes some more
NEEDED = ("build", "environment", "self-tests", "laws")


def run_steps(
    steps: Sequence[Step],
    seconds: float,
    record: Callable[[Step, Outcome, float], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Runs the steps in order and records each, with the seconds that it took.

    After the first that is red, or a gate that is not green, the others are skipped; so is one for
    which no time is left.
    """
    start, stopped = clock(), None
    for step in steps:
        began = clock()
        left = seconds - (began - start)
        if stopped:
            outcome = Outcome(SKIPPED, f"{stopped.name} did not pass")
        elif left < LEAST_SECONDS:
            outcome = Outcome(SKIPPED, f"no time: {max(left, 0):.0f} of {seconds:.0f} s are left")
        else:
            limit = min(step.seconds, left)
            print(f"{step.name}, for {limit:.0f} s at most ...", flush=True)
            outcome = step.run(limit)
        record(step, outcome, clock() - began)
        if outcome.status == RED or (step.gate and outcome.status != GREEN):
            stopped = stopped or step


# ---- the GPU -------------------------------------------------------------------------------------


def find_gpu() -> dict[str, Any] | str:
    """The first GPU's name, capability, memory and torch's versions; or why there is none."""
    try:
        import torch
    except ImportError as error:
        return f"torch is not installed for {sys.executable} ({error})"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    gpu = torch.cuda.get_device_properties(0)
    return {
        "name": gpu.name,
        "capability": [gpu.major, gpu.minor],
        "memory": gpu.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def architecture(capability: Sequence[int]) -> str:
    """What to compile for: the GPU's own code with its special instructions, where the build knows
    it; else that of an earlier one that it can run."""
    major, minor = capability
    earlier = [f"{major}.{least}" for least in range(minor, -1, -1)]
    known = [x for x in (f"{major}.{minor}a", *earlier) if x in build_config.ARCHITECTURES]
    return known[0] if known else "8.0+PTX"


# ---- the command ---------------------------------------------------------------------------------


class Report:
    """The result file: written again whenever something is added."""

    def __init__(self, path: Path, facts: dict[str, Any], stems: Sequence[str]) -> None:
        self.path = path
        self.facts = {**facts, "finished": False, "steps": []}
        self.facts["stems"] = {
            stem: {
                "sources_sha256": sources.sources_hash(stem),
                "cuda_kernels": None,
                "verified": False,
                "timed": False,
            }
            for stem in stems
        }
        sources.write_json(self.path, self.facts)

    def add(self, step: Step, outcome: Outcome, seconds: float) -> None:
        """Records a step, and prints what came of it."""
        self.facts["steps"].append(
            {
                **{"step": step.name, "status": outcome.status, "seconds": round(seconds, 1)},
                **{"detail": outcome.detail, **outcome.facts},
            }
        )
        print(f"{step.name}: {outcome.status}, {seconds:.0f} s  {outcome.detail}", flush=True)
        if "output_tail" in outcome.facts:
            print(outcome.facts["output_tail"], flush=True)
        sources.write_json(self.path, self.facts)

    def finish(self) -> int:
        """Says what was verified and timed; returns the command's exit status."""
        steps = {step["step"]: step for step in self.facts["steps"]}
        green = {name for name, step in steps.items() if step["status"] == GREEN}
        red = [name for name, step in steps.items() if step["status"] == RED]
        passed = green.issuperset(NEEDED) and not red
        with_kernels = steps.get("environment", {}).get("cuda_stems", [])
        laws = steps.get("laws", {}).get("passed_by_stem", {})
        timed = steps.get("benchmarks", {}).get("timed", [])
        for stem, facts in self.facts["stems"].items():
            unchanged = sources.sources_hash(stem) == facts["sources_sha256"]
            facts["cuda_kernels"] = stem in with_kernels
            facts["verified"] = bool(passed and unchanged and laws.get(stem))
            facts["timed"] = unchanged and stem in timed
            words = [("" if facts[what] else "NOT ") + what for what in ("verified", "timed")]
            kernels = "" if facts["cuda_kernels"] else " (no CUDA kernels in this build)"
            print(f"{stem}: {', '.join(words)}{kernels}")
        self.facts["finished"] = True
        sources.write_json(self.path, self.facts)
        print(self.path)
        return 0 if passed else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything; returns 0 or 1."""
    start = time.monotonic()
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    gpu = find_gpu()
    if isinstance(gpu, str):
        print(f"make gpu: {gpu}; it needs a GPU, so nothing was built or run", file=sys.stderr)
        return 1
    if options.commit:
        os.environ["HOPE_COMMIT"] = options.commit
    code = os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture(gpu["capability"])
    out, stems = options.out.resolve(), sources.stems()
    facts = {
        "benchmark": "gpu",
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *words]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": gpu,
        "architectures": code,
        **sources.revision(),
    }
    name = re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-")
    report = Report(sources.dated(out, f"gpu-{name}").with_suffix(".json"), facts, stems)
    print(f"{gpu['name']}, compiled for {code}; results in {report.path}", flush=True)
    gpu_steps.LOG.unlink(missing_ok=True)
    steps = gpu_steps.Steps(stems, code, out).plan()
    run_steps(steps, options.seconds - (time.monotonic() - start), report.add)
    return report.finish()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description="Builds, verifies and times everything on this machine's GPU.",
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="for all steps (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=sources.RESULTS,
        metavar="DIRECTORY",
        help="where the JSON files go (default: benchmarks/results)",
    )
    parser.add_argument("--commit", help="what this is a copy of, where the copy has no .git")
    return parser


if __name__ == "__main__":
    sys.exit(main())
