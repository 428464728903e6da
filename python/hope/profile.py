"""Where the time and the memory of a training step go, operator by operator.

A profile is a directory: `profile.json` (the figures of every operator) and `trace.json`, which a
viewer of chrome traces shows (chrome://tracing, Perfetto).
"""

import errno
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

import hope_ext
from hope.config import RunConfig, to_dict
from hope.device import check_sizes
from hope.errors import HopeError
from hope.files import atomic_file
from hope.model import LanguageModel
from hope.provenance import provenance
from hope.train import autocast, make_optimizer

WARM_UP_STEPS, TIMED_STEPS = 2, 3
_PEAK_SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrices whose product shows the peak
_PEAK_CALLS = 5

# Parts of an operator's name, and what it then is; the first that fits counts.
_KINDS = (
    ("ours", ("hope::", "_hope_")),
    ("attention", ("scaled_dot_product", "flash_attention", "efficient_attention")),
    ("matmul", ("::mm", "::bmm", "::addmm", "::baddbmm", "::matmul", "::linear", "::_scaled_mm")),
    ("convolution", ("conv",)),
    ("optimizer", ("adam", "Optimizer.", "_foreach_")),
    ("norm and softmax", ("norm", "softmax", "nll_loss", "cross_entropy")),
    ("embedding", ("embedding", "::index")),
    ("memory", ("copy", "::cat", "::fill_", "::zero", "::empty", "::clone", "::to")),
    ("autograd", ("autograd::", "Backward")),
)
_OTHER = "elementwise and other"


class TrainingStep:
    """An optimizer step on random tokens, with all that the Trainer's has: call it.

    config.train says which batch [batch, sequence] in how many parts, which optimizer and which
    dtype of the activations.
    model: what is trained (default: a new one).
    """

    def __init__(
        self, config: RunConfig, device: str | torch.device, model: LanguageModel | None = None
    ) -> None:
        self.config, self.device = config, torch.device(device)
        train = config.train
        check_sizes(config.model, self.device)
        torch.manual_seed(train.seed)
        self.model = (model or LanguageModel(config.model)).to(self.device).train()
        self.model.checkpoint_activations = train.checkpoint_activations
        self.loss = torch.compile(self.model.loss) if train.compile else self.model.loss
        self.optimizer = make_optimizer(self.model, train)
        shape = (train.accumulate, train.batch // train.accumulate, train.sequence + 1)
        tokens = torch.randint(config.model.vocab_size, shape, device=self.device)
        self.inputs, self.targets = tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()

    def __call__(self) -> None:
        watched, train = torch.profiler.record_function, self.config.train
        for inputs, targets in zip(self.inputs, self.targets, strict=True):
            with watched("step: forward"), autocast(self.device, train):
                loss = self.loss(inputs, targets) / train.accumulate
            with watched("step: backward"):
                loss.backward()
        with watched("step: optimizer"):
            nn.utils.clip_grad_norm_(self.model.parameters(), train.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()


@dataclass(frozen=True)
class OperatorFigures:
    """What an operator costs in one step.

    Attributes:
        seconds: its own, on the device, without the operators that it calls.
        bytes: that it allocates, less those that it frees.
        flops: None where nobody has counted them.
        flops_per_second: over the time with what it calls.
    """

    name: str
    kind: str
    calls: int
    seconds: float
    share: float
    bytes: int
    flops: int | None
    flops_per_second: float | None


@dataclass(frozen=True)
class Profile:
    """A step's figures; operators are in order of their time.

    Attributes:
        step_seconds: of a step that nobody watches.
        peak_bytes: the most that is allocated at once in a step, over what was there before.
        peak_flops_per_second: what a large product of matrices reaches here, in that dtype.
    """

    config: dict[str, Any]
    device: str
    step_seconds: float
    peak_bytes: int
    peak_flops_per_second: float
    operators: tuple[OperatorFigures, ...]

    @property
    def tokens_per_second(self) -> float:
        train = self.config["train"]
        return train["batch"] * train["sequence"] / self.step_seconds


def profile_step(step: TrainingStep, out: Path) -> Profile:
    """Profiles one step of `step`, after a few; writes `profile.json` and `trace.json` to `out`.

    Raises HopeError where `out` is not new or empty, OSError where it cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HopeError(f"{out} is not empty; choose another --out for the profile")
    out.mkdir(parents=True, exist_ok=True)
    device = step.device.type
    for _ in range(WARM_UP_STEPS):
        step()
    seconds = statistics.median(_seconds(step, device) for _ in range(TIMED_STEPS))
    with FlopCounterMode(display=False, custom_mapping=hope_ext.flop_formulas()) as counter:
        step()
    counts = counter.get_flop_counts().get("Global", {})
    flops = {str(packet).replace(".", "::", 1): count for packet, count in counts.items()}
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as watched:
        step()
        _wait(device)
    with atomic_file(out / "trace.json") as path:
        watched.export_chrome_trace(str(path))
        try:  # it says nothing where it cannot write
            events = json.loads(path.read_text())["traceEvents"]
        except ValueError:
            path.with_name(path.name + ".tmp").unlink(missing_ok=True)  # its own first half
            name = str(out / "trace.json")
            raise OSError(errno.EIO, "cannot be written whole", name) from None
    result = Profile(
        to_dict(step.config),
        device,
        seconds,
        _peak_bytes(events, device),
        peak_flops_per_second(device, step.config.train.dtype),
        _operators(watched, flops, device),
    )
    content = provenance(device) | asdict(result) | {"tokens_per_second": result.tokens_per_second}
    with atomic_file(out / "profile.json") as path:
        path.write_text(json.dumps(content, indent=1) + "\n")
    return result


def _operators(
    watched: torch.profiler.profile, flops: dict[str, int], device: str
) -> tuple[OperatorFigures, ...]:
    # What runs on a GPU is listed twice: with the operator that launched it, which counts here, and
    # by itself.
    rows = [
        row
        for row in watched.key_averages()
        if row.device_type == DeviceType.CPU and not row.key.startswith(("step: ", "Profiler"))
    ]
    clock = "cpu" if device == "cpu" else "device"

    def microseconds(row: Any, which: str) -> float:
        return getattr(row, f"{which}{clock}_time_total")

    total = sum(microseconds(row, "self_") for row in rows) or 1.0
    figures = [
        OperatorFigures(
            name=row.key,
            kind=kind_of(row.key),
            calls=row.count,
            seconds=microseconds(row, "self_") / 1e6,
            share=microseconds(row, "self_") / total,
            bytes=getattr(row, f"self_{clock}_memory_usage"),
            flops=flops.get(row.key),
            flops_per_second=(
                1e6 * flops[row.key] / microseconds(row, "")
                if flops.get(row.key) and microseconds(row, "") > 0
                else None
            ),
        )
        for row in rows
    ]
    return tuple(sorted(figures, key=lambda operator: -operator.seconds))


def kind_of(name: str) -> str:
    """What an operator is, of its profiler's name."""
    for kind, parts in _KINDS:
        if any(part in name for part in parts):
            return kind
    return _OTHER


def _peak_bytes(events: list[dict[str, Any]], device: str) -> int:
    """The highest sum of what was allocated and freed until then, of a trace's events."""
    kind = DeviceType.CPU if device == "cpu" else DeviceType.CUDA
    moves = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event["name"] == "[memory]" and event["args"]["Device Type"] == kind.value
    ]
    now = most = 0
    for _, size in sorted(moves, key=lambda move: move[0]):
        now += size
        most = max(most, now)
    return most


def peak_flops_per_second(device: str, dtype: str) -> float:
    """What a product of two large square matrices reaches here, the best of a few."""
    size = _PEAK_SIZE[device]
    # Random numbers: a GPU multiplies zeros faster than data.
    a, b = torch.randn(2, size, size, device=device, dtype=getattr(torch, dtype)).unbind()
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, b, out=out)

    product()
    return 2 * size**3 / min(_seconds(product, device) for _ in range(_PEAK_CALLS))


def _seconds(call: Callable[[], object], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
