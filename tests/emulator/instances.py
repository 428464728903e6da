"""Runs every instance of the CUDA kernels in the emulator and compares with the definition.

    python instances.py LIBRARY [--bounds FILE] [--seeds 1 2 3] [--match REGEX]

LIBRARY is one of ``library.make``, in a process that its variant can run in (``build.run`` with
``preload``). For every dtype and key dimension there are a few small cases, each on another device:
how values are divided into columns, how many stages a pipeline has and how much a window holds
follows from the device. The first case that fails ends it with its name and status 1. What the
definitions give is kept in FILE, since sanitizers slow Python down; without seeds there is no more.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from backends import NARROW
from laws import DRAWS, Bound, assert_as_good_as_torch, torchs_errors

import hope_ext
from hope_ext import testing
from hope_ext.testing import Case
from hope_ext.testing.multifreq import stepped

# Settings of tests/emulator/cuda_runtime.cpp.
IDLE = {"EMULATOR_MULTIPROCESSORS": "1000"}  # few value columns in a block
BUSY = {"EMULATOR_MULTIPROCESSORS": "1"}  # as many as there can be
SMALL = {  # the shared memory of compute capability 8.6, hardly any cache
    "EMULATOR_MULTIPROCESSORS": "1",
    "EMULATOR_SHARED_BYTES": str(99 << 10),
    "EMULATOR_L2_BYTES": "1",
}


TIGHT = {  # of a deep memory's tiles, 16 tokens fit; or float tiles leave it
    "EMULATOR_SHARED_BYTES": str(64 << 10),
}
TIGHTER = {"EMULATOR_SHARED_BYTES": str(40 << 10)}  # the same for a forward alone


class Instance(NamedTuple):
    case: Case
    dtype: torch.dtype
    device: dict[str, str]
    trains: bool = True

    def __str__(self) -> str:
        return f"{self.case}-{str(self.dtype).removeprefix('torch.')}"


def _titans(name: str, **options) -> Case:
    make = functools.partial(testing.titans_inputs, **{"heads": 4, **options})
    return Case("titans", name, hope_ext.titans_memory, make)


def _shifted_inputs(*args, **options) -> dict:
    """Rows of fours that begin where four elements cannot be loaded at once; no stride tells."""
    arguments = testing.conv_inputs(*args, **options)
    x = arguments["x"]
    arguments["x"] = x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    return arguments


def _shifted_pieces(*args, **options) -> dict:
    """Where a piece of a tensor, each time another, begins where four elements cannot be loaded at
    once; and in the end all pieces of one."""
    arguments = testing.multifreq_inputs(*args, **options)
    pieces = [
        arguments[piece]
        for piece in ("params", "grads", "pending", "exp_avgs", "exp_avg_sqs")
        if arguments[piece]
    ]
    for i, piece in enumerate(pieces):
        for shifted in (i, len(piece) - 1):
            x = piece[shifted]
            piece[shifted] = x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    return arguments


def _conv(name: str, inputs=testing.conv_inputs, **options) -> Case:
    make = functools.partial(inputs, **{"tail": True, **options})
    return Case("conv", name, hope_ext.causal_conv, make, everything="return_tail")


def _inputs_with_zeros(*args, **options) -> dict:
    """A token whose generated key has no length."""
    arguments = testing.selfmod_inputs(*args, **options)
    arguments["x"][:, 3] = 0
    return arguments


def _selfmod(name: str, inputs=testing.selfmod_inputs, **options) -> Case:
    make = functools.partial(inputs, **{"lr_bias": -4.0, **options})
    return Case("selfmod", name, hope_ext.self_modifying_memory, make)


def _without_derivative(function, make, stem: str, name: str, **options) -> Case:
    inputs = functools.partial(make, **options)
    return Case(stem, name, function, inputs, everything=None, differentiable=False)


_newton_schulz = functools.partial(
    _without_derivative, hope_ext.newton_schulz, testing.newton_schulz_inputs, "newton_schulz"
)
_multifreq = functools.partial(_without_derivative, stepped, testing.multifreq_inputs, "multifreq")


def _cms(name: str, **options) -> Case:
    make = functools.partial(testing.cms_inputs, **options)
    return Case("cms", name, hope_ext.cms_memory, make)


def _pending(**arguments) -> object:
    """A gradient for what the last chunk has so far, and none for the weights."""
    return hope_ext.cms_memory(**arguments)[1].pending


def _alone(case: Case) -> Iterator[Instance]:
    """Where nobody wants, or gives a gradient for, the final state; or only for that."""
    output = dataclasses.replace(case, name=f"{case.name}-output", everything=None)
    yield Instance(output, torch.float32, {})

    def state(**arguments) -> object:
        return case.function(**arguments)[1]

    of_state = dataclasses.replace(case, name=f"{case.name}-state", function=state)
    yield Instance(of_state, torch.float32, {})


def instances() -> Iterator[Instance]:
    yield from _of_optimizers()
    for width in (4, 9):
        yield from _alone(_conv(f"alone-{width}", width=width, batch=2, tokens=19, channels=8))
    one = {"batch": 1, "heads": 1, "tokens": 20}
    for kind, hidden in (("linear", None), ("deep", 32)):
        size = {"key": 32, "value": 32, "hidden": hidden}
        yield from _alone(_titans(f"{kind}-alone-32x32", **one, **size))
        yield from _alone(_selfmod(f"{kind}-alone", **one, hidden=hidden))
        zeros = _selfmod(f"{kind}-zero-key", _inputs_with_zeros, **one, hidden=hidden)
        yield Instance(zeros, torch.float32, {})
    yield from _alone(_cms("alone", tokens=20))
    pending = dataclasses.replace(_cms("pending", tokens=20), function=_pending)
    yield Instance(pending, torch.float32, {})
    for dtype in NARROW:
        for key, value, other, way in (
            (16, 64, 16, {}),
            (32, 16, 128, {"read": "before"}),
            (64, 128, 64, {"objective": "dot", "momentum": False, "decay": False}),
            (128, 32, 64, {"read": "chunk"}),
        ):
            size = {"key": key, "value": value}
            yield Instance(
                _titans(f"chunks-{key}x{value}", batch=1, tokens=41, **size), dtype, BUSY
            )
            steps = {"batch": 4, "tokens": 1, "positions": [0, 3, 14, 15]}
            yield Instance(
                _titans(f"step-{key}x{value}", **steps, **size, **way), dtype, BUSY, False
            )
            # Two segments in a chunk, or more; the second sequence goes on inside one and ends
            # inside the next.
            packed = {"bounds": [0, 20, 110], "positions": [0, 30]}
            yield Instance(
                _titans(f"packed-{key}x{other}", batch=1, heads=2, tokens=110, key=key,
                        value=other, chunk_size=80, read="before", **packed),
                dtype,
                SMALL,
            )  # fmt: skip
        # Sequences that are empty, that end in the chunk they begin in, or just where one ends.
        bounds = {"bounds": [0, 3, 3, 20, 36, 75], "positions": [12, 4, 31, 16, 7]}
        for read, device in (("after", {}), ("before", SMALL), ("chunk", {})):
            yield Instance(
                _titans(f"bounds_{read}-32x16", batch=1, tokens=75, key=32, read=read, **bounds),
                dtype,
                device,
            )
        # States are kept at every fourth chunk or so; a window holds several such stretches.
        yield Instance(
            _titans("stretches-32x16", batch=1, tokens=42, key=32, chunk_size=4), dtype, {}
        )
        # As many chunks as so many tokens can have, and chunks of one token more than segments.
        most = {"batch": 2, "heads": 2, "tokens": 67, "chunk_size": 65, "positions": [64, 0]}
        yield Instance(_titans("most-chunks-32x16", **most, key=32, value=16), dtype, SMALL)
        for gate, other in (("momentum", "decay"), ("decay", "momentum")):
            only = {"batch": 1, "heads": 1, "tokens": 20, "key": 32, other: False}
            yield Instance(_titans(f"only_{gate}-32x16", **only), dtype, {})
        # Chunks of several whole segments, the last one too.
        for key in (32, 128):
            whole = {"batch": 1, "heads": 1, "tokens": 192, "chunk_size": 64, "key": key}
            yield Instance(_titans(f"whole-{key}x16", **whole), dtype, BUSY)
        for read in ("before", "chunk"):
            plain = {"momentum": False, "decay": False, "objective": "dot", "read": read}
            yield Instance(
                _titans(f"plain_{read}-32x32", batch=1, tokens=33, key=32, value=32, **plain),
                dtype,
                IDLE,
            )
        yield from _networks(dtype)
        yield from _selfmods(dtype)
        yield from _continuum_memories(dtype)
        for width in (2, 3, 4, 1, 5, 9, 64):
            packed = {"batch": 1, "tokens": 45, "bounds": [0, 2, 2, 17, 45]}
            yield Instance(_conv(f"width-{width}", width=width, channels=20, **packed), dtype, {})
        for width in (4, 9):  # several blocks, over channels and over segments
            yield Instance(
                _conv(f"blocks-{width}", width=width, batch=1, tokens=140, channels=132), dtype, {}
            )
        # As many segments as one block has, not one less.
        yield Instance(_conv("whole-block", batch=1, tokens=128, channels=20), dtype, {})
        yield Instance(_conv("unaligned", batch=2, tokens=19, channels=6), dtype, {})
        yield Instance(_conv("one-channel", batch=2, tokens=19, channels=1), dtype, {})
        for width in (4, 9):  # zeros before the first token
            yield Instance(
                _conv(f"no-tail-{width}", width=width, batch=2, tokens=19, tail=False), dtype, {}
            )
            # ... and in the final tail, of fewer tokens than it has rows.
            yield Instance(
                _conv(f"short-{width}", width=width, batch=2, tokens=2, tail=False), dtype, {}
            )
        yield Instance(_conv("shifted", _shifted_inputs, batch=2, tokens=19, channels=8), dtype, {})


def _of_optimizers() -> Iterator[Instance]:
    """Several blocks with edges both ways, one block, one number; all endings in all dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns in ((1, 1), (20, 33), (33, 20), (140, 270), (270, 140)):
            sizes = {"batch": (1,), "rows": rows, "columns": columns, "steps": 2}
            yield Instance(_newton_schulz(f"{rows}x{columns}", **sizes), dtype, {}, False)
        # Several matrices, and both buffers again; the last is made of whole slabs.
        for rows, columns in ((20, 33), (33, 20), (32, 64)):
            sizes = {"batch": (3,), "rows": rows, "columns": columns, "steps": 3}
            yield Instance(_newton_schulz(f"batch-{rows}x{columns}", **sizes), dtype, {}, False)
        for rule in ("adamw", "sgd"):
            same = {"shapes": [(300,)] * 6, "periods": [1] * 6, "step": 2, "rule": rule}
            made = _without_derivative(
                stepped, _shifted_pieces, "multifreq", f"{rule}-unaligned", **same
            )
            yield Instance(made, dtype, {}, False)
            for grad_dtype in (torch.float32, torch.bfloat16):
                name = f"{rule}-{str(grad_dtype).removeprefix('torch.')}-gradients"
                many = [(n,) for n in (5000, 3, 4099, *range(1, 75))]
                options = {"rule": rule, "grad_dtype": grad_dtype, "nothing_pending": True}
                periods = [i % 3 + 1 for i in range(len(many))]
                made = _multifreq(name, shapes=many, periods=periods, step=2, **options)
                yield Instance(made, dtype, {}, False)
        # As many tensors as a launch takes, and no more.
        whole = {"shapes": [(3,)] * 70, "periods": [1] * 70, "step": 2}
        yield Instance(_multifreq("whole-launch", **whole), dtype, {}, False)


def _networks(dtype: torch.dtype) -> Iterator[Instance]:
    """Memories of two layers, or with a norm: on devices where segments have 32 tokens, or 16, and
    where states, or tiles, lie in scratch memory.
    """
    one = {"batch": 1, "heads": 2}
    # Two segments in a chunk, or three; the second sequence goes on inside one.
    packed = {"chunk_size": 40, "bounds": [0, 20, 75], "positions": [0, 30], "tokens": 75}
    for key, hidden, device in ((32, 64, {}), (64, 64, TIGHT), (128, 32, {}), (128, 48, SMALL)):
        size = {"key": key, "value": key, "hidden": hidden}
        yield Instance(_titans(f"deep-{key}x{hidden}", **one, **packed, **size), dtype, device)
    norm = {"norm": True, "activation": "silu"}
    size = {"key": 32, "value": 32, "hidden": 32}
    yield Instance(_titans("deep-norm", **one, **packed, **size, **norm), dtype, {})
    yield Instance(
        _titans("deep-forward", **one, tokens=20, key=64, value=64, hidden=128),
        dtype,
        TIGHTER,
        False,
    )
    yield Instance(
        _titans("norm-16x64", **one, tokens=41, key=16, value=64, norm=True, residual=False),
        dtype,
        {},
    )
    yield Instance(
        _titans("norm-128", **one, **packed, key=128, value=128, norm=True), dtype, SMALL
    )
    for read in ("before", "chunk"):
        plain = {"momentum": False, "decay": False, "objective": "dot", "read": read}
        yield Instance(
            _titans(f"deep-plain-{read}", **one, tokens=37, hidden=32, residual=False, **plain),
            dtype,
            {},
        )
        yield Instance(
            _titans(f"norm-plain-{read}", **one, tokens=37, norm=True, **plain), dtype, {}
        )
    # States are kept at every second chunk, or third: several stretches to go over.
    size = {"key": 16, "value": 16, "hidden": 16}
    yield Instance(_titans("deep-stretches", **one, tokens=67, **size), dtype, {})
    # Chunks of two segments, or three, a state kept at each.
    several = {**one, "tokens": 90, "chunk_size": 40}
    yield Instance(_titans("deep-segments", **several, **size), dtype, {})
    # One chunk, and all of it.
    whole = {"tokens": 16, "chunk_size": 16}
    yield Instance(_titans("deep-whole", **one, **whole, hidden=32), dtype, {})
    yield Instance(_titans("norm-whole", **one, **whole, norm=True), dtype, {})
    steps = {"batch": 4, "tokens": 1, "positions": [0, 3, 14, 15]}
    for read in ("after", "before", "chunk"):
        ways = {"read": read, "residual": read != "before"}
        deep = {**steps, "key": 32, "value": 32, "hidden": 64, **ways}
        yield Instance(_titans(f"deep-step-{read}", **deep), dtype, {}, False)
        of_norm = {**steps, "key": 32, "value": 32, **ways, **norm}
        yield Instance(_titans(f"norm-step-{read}", **of_norm), dtype, {}, False)


def _selfmods(dtype: torch.dtype) -> Iterator[Instance]:
    """Self-modifying memories: on devices where segments have 32 tokens, or 16, and where states,
    or tiles, lie in scratch memory.
    """
    one = {"batch": 1, "heads": 2}
    # Two segments in a chunk, or three; the second sequence goes on inside one.
    packed = {"chunk_size": 40, "bounds": [0, 20, 75], "positions": [0, 30], "tokens": 75}
    for heads, dim, hidden, device in (
        (2, 32, 48, {}),
        (2, 64, 32, TIGHT),
        (1, 128, 32, {}),
        (1, 128, 16, SMALL),
        (2, 32, None, {}),
        (2, 64, None, SMALL),
        (1, 128, None, {}),
        (1, 128, None, SMALL),
    ):
        name = f"{dim}x{hidden}" if hidden else f"linear-{dim}"
        size = {"batch": 1, "heads": heads, "dim": dim, "hidden": hidden}
        yield Instance(_selfmod(f"{name}-{len(device)}", **packed, **size), dtype, device)
    for hidden in (16, None):
        kind = "deep" if hidden else "linear"
        for read in ("after", "before", "chunk"):
            other = {"objective": "dot", "activation": "silu", "read": read, "hidden": hidden}
            yield Instance(_selfmod(f"{kind}-{read}", **one, tokens=37, **other), dtype, {})
        # States are kept at every second chunk, to every ninth: several stretches to go over.
        yield Instance(_selfmod(f"{kind}-stretches", **one, tokens=163, hidden=hidden), dtype, {})
        # Chunks of two segments, or three; of a linear memory, a state is kept at each.
        several = {
            "batch": 1,
            "heads": 1,
            "chunk_size": 40,
            "retention_bias": 1.0,
            "hidden": hidden,
        }
        yield Instance(_selfmod(f"{kind}-segments", **several, tokens=90), dtype, {})
        # It learns and forgets so much that no token's part is less than bfloat16 rounds away;
        # after more than one such chunk errors grow to where chance decides whose are larger.
        fast = {**several, "tokens": 40, "lr_bias": -1.0}
        yield Instance(_selfmod(f"{kind}-fast", **fast), dtype, {})
        # One chunk, and all of it.
        whole = {"tokens": 16, "chunk_size": 16, "hidden": hidden}
        yield Instance(_selfmod(f"{kind}-whole", **one, **whole), dtype, {})
        for read in ("after", "before", "chunk"):
            step = {"batch": 4, "tokens": 1, "positions": [0, 3, 14, 15], "read": read}
            made = _selfmod(f"{kind}-step-{read}", **step, hidden=hidden)
            yield Instance(made, dtype, {}, False)


def _continuum_memories(dtype: torch.dtype) -> Iterator[Instance]:
    """Continuum memories: on devices where products are made in large tiles, or in small ones."""
    one = {"batch": 1}
    for size, tile, device in (("large", 128, BUSY), ("small", 64, IDLE)):
        # Several tiles in all directions and steps along all depths; the last chunk is partial.
        tiles = {
            "dim": tile + 16,
            "hidden": tile + 32,
            "chunk_size": tile + 12,
            "tokens": tile + 20,
        }
        yield Instance(_cms(f"tiles-{size}", **one, **tiles), dtype, device)
        # Sequences that are empty, that end in the chunk they begin in, or just where one ends.
        packed = {"bounds": [0, 3, 3, 20, 36, 75], "positions": [12, 4, 31, 16, 7]}
        for objective in ("l2", "teach"):
            yield Instance(
                _cms(f"packed-{objective}-{size}", **one, tokens=75, objective=objective, **packed),
                dtype,
                device,
            )
        yield Instance(
            _cms(f"alone-{size}", tokens=37, objective="dot", activation="silu", residual=False),
            dtype,
            device,
        )
        # Weights are kept at every third chunk or so: several groups to go over.
        yield Instance(_cms(f"groups-{size}", tokens=23, chunk_size=3), dtype, device)
    # Nothing but whole tiles; one chunk, and as many as so many tokens can have.
    whole = {"tokens": 70, "dim": 64, "hidden": 128, "chunk_size": 64}
    yield Instance(_cms("whole", **one, **whole), dtype, IDLE)
    yield Instance(_cms("one-chunk", tokens=9), dtype, IDLE)
    # The first sequence is empty, the last has few of the chunks; all begin with the same weights.
    packed = {"tokens": 23, "chunk_size": 3, "bounds": [0, 0, 20, 23]}
    yield Instance(_cms("empty-first", **one, **packed), dtype, IDLE)
    yield Instance(_cms("most-chunks", tokens=18, positions=[15, 0]), dtype, IDLE)
    yield Instance(_cms("step", batch=4, tokens=1, positions=[0, 3, 14, 15]), dtype, {}, False)


def check(
    match: str,
    seeds: Iterable[int],
    bounds: Mapping[str, list[Bound]],
    *,
    backward: bool = True,
    draws: int = DRAWS,
) -> None:
    """Runs the instances whose names match in the loaded library; raises at the first mistake.

    ``bounds`` are those of some instances, by name; the others' are computed.
    """
    for instance in instances():
        if re.search(match, str(instance)):
            check_one(instance, seeds, bounds, backward=backward, draws=draws)


def check_one(
    instance: Instance,
    seeds: Iterable[int],
    bounds: Mapping[str, list[Bound]],
    *,
    backward: bool = True,
    draws: int = DRAWS,
) -> None:
    name, (case, dtype, device, trains) = str(instance), instance
    known = bounds.get(name)
    if trains and not backward:
        trains, known = False, known and [b for b in known if "without gradient" in b.name]
    for seed in seeds:
        settings = {**device, "EMULATOR_SEED": str(seed)}
        before = {setting: os.environ.get(setting) for setting in settings}
        os.environ.update(settings)
        print(f"{name}, seed {seed}", end=": ", flush=True)
        begin = time.monotonic()
        assert_as_good_as_torch(case, dtype, "emulated", trains=trains, bounds=known, draws=draws)
        print(f"{time.monotonic() - begin:.1f} s")
        draws = 1  # no schedule changes a bit, so that doubts about rounding are settled
        for setting, value in before.items():
            os.environ.pop(setting, None)
            if value is not None:
                os.environ[setting] = value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--bounds", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1])
    parser.add_argument("--match", default="")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of inputs that speak against us")
    options = parser.parse_args()
    testing.use_emulated(options.library)
    bounds = {}
    if options.bounds and options.bounds.exists():
        bounds = torch.load(options.bounds, weights_only=False)
    elif options.bounds:
        for instance in instances():
            if not re.search(options.match, str(instance)):
                continue
            case, dtype, _, trains = instance
            arguments = case.make(dtype, "cpu")
            bounds[str(instance)] = torchs_errors(case, arguments, dtype, trains=trains)
        torch.save(bounds, options.bounds)
    check(options.match, options.seeds, bounds, draws=options.draws)
    return 0


if __name__ == "__main__":
    sys.exit(main())
