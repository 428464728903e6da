"""Processes that are joined by gloo, started once, and asked to run one function after another."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

_SECONDS = 60  # a test is given up after; hanging processes are killed


def worlds(*sizes: int) -> pytest.MarkDecorator:
    """A test of the fixture `world`, once with each number of processes."""
    return pytest.mark.parametrize("world", sizes, indirect=True, ids="world{}".format)


class World:
    """`size` processes; `run` gives what a function returns on each of them."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder, self.starts = size, folder, 0
        self.members: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls a module's function on all ranks; AssertionError with the first one's traceback."""
        if not self.members:
            self._start()
        for _, pipe in self.members:
            pipe.send((function, args))
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(self.members)}
        results, ends = {}, time.monotonic() + _SECONDS
        while ranks:
            # The first error ends it: other ranks may wait for the one that has failed.
            answered = wait(list(ranks), max(0, ends - time.monotonic()))
            for pipe in answered:
                ok, results[ranks[pipe]] = pipe.recv()
                if not ok:
                    self._fail(f"rank {ranks[pipe]}: {results[ranks[pipe]]}")
                del ranks[pipe]
            if not answered:
                self._fail(f"no answer of ranks {sorted(ranks.values())} in {_SECONDS} s")
        return [results[rank] for rank in range(self.size)]

    def _fail(self, why: str) -> NoReturn:
        self.stop()
        raise AssertionError(f"in a world of {self.size}, {why}")

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        # Once for all processes: these import torch, and what is slow to import.
        context.set_forkserver_preload(
            ["parallel_checks", "parallel_runs", "hope.training_state", "torch._dynamo"]
        )
        self.starts += 1
        store = self.folder / f"store-{self.size}-{self.starts}"
        for rank in range(self.size):
            pipe, end = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, store, end))
            process.start()
            self.members.append((process, pipe))

    def stop(self) -> None:
        for process, pipe in self.members:
            pipe.close()
            process.kill()
            process.join()
        self.members.clear()


def _serve(rank: int, size: int, store: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=_SECONDS),
    )
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            pipe.send((True, function(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
