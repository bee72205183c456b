"""The largest batch that fits into memory: found by training a copy of a job's network for two steps, on ever more rows.

Measured is by how much a trial raises the memory that the process has, on a CPU, or that torch has from the device: weights, gradients,
optimizer state, the batch and what the layers keep of it. What a trial would take far more than there is for is not tried.
"""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dlopt.artifact import Artifact
from dlopt.data.feed.batches import Batch
from dlopt.data.prepared import Split
from dlopt.models import Network
from dlopt.models.recompute import recompute
from dlopt.part import DloptError
from dlopt.progress import Progress, silent
from dlopt.train.job import Fit
from dlopt.train.start import load_network, pipeline_of
from dlopt.train.watch.mistakes import is_lack_of_memory

FINE = 16
"""The search ends when it knows the number of rows within one part in so many."""
SHARE = 0.8
"""How much of the memory that is free now may be used."""
RISK = 1.2
"""A trial that is expected to take more than so many times the limit is not made."""
RATE = 1e-6
"""Of the steps of a trial, whose results are thrown away."""
MIB = 2**20
PROCESS = Path("/proc/self")


class LargestBatch(NamedTuple):
    """The largest batch, and what it takes."""

    rows: int
    most: int
    """Rows of the training split, of which a batch cannot have more."""
    bytes: int
    limit: int


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The most rows up to `most` that fit, within one part in FINE: doubled until they do not, then bisected. 0 where one row does not."""
    if not fits(1):
        return 0
    low = 1
    while low < most:
        high = min(2 * low, most)
        if not fits(high):
            return _bisected(fits, low, high)
        low = high
    return low


def _bisected(fits: Callable[[int], bool], low: int, high: int) -> int:
    """low fits and high does not."""
    while high - low > max(1, low // FINE):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_batch(
    fit: Fit, data: Artifact, device: torch.device, limit: int | None = None, progress: Progress = silent, recomputed: bool = False
) -> LargestBatch:
    """The largest batch of a job that takes at most `limit` bytes; without it, SHARE of what is free. Raises DloptError if none does.

    recomputed: whether activations are computed again on the way back (resources.checkpoint_activations).
    """
    allowed = int(SHARE * free_bytes(device)) if limit is None else limit
    trials = Trials(fit, data, device, allowed, progress, recomputed)
    rows = largest(trials.fits, len(trials.split))
    if not rows:
        raise DloptError(
            f"train.batch_size: not even one row fits into {allowed / MIB:,.0f} MiB: make the model smaller or give it more memory"
        )
    return LargestBatch(rows, len(trials.split), trials.taken[rows], allowed)


@dataclass
class Trials:
    """Trains a job's network on so many rows, and knows what that took before."""

    fit: Fit
    data: Artifact
    device: torch.device
    limit: int
    """In bytes."""
    progress: Progress = silent
    recomputed: bool = False
    """Whether activations are computed again on the way back."""
    taken: dict[int, int] = field(default_factory=dict)
    """Bytes by rows."""

    def __post_init__(self) -> None:
        self.split = Split.open(self.data, "train")
        self.network: Network = load_network(self.fit, self.data).to(self.device)
        self.sample = {name: torch.from_numpy(values.copy()) for name, values in self.split.read(self.split.chunks[:1]).items()}
        self.bytes_of(1)  # what is set up but once

    def fits(self, rows: int) -> bool:
        """Whether a step on so many rows takes no more than the limit."""
        self.progress("find-batch", None, f"trying {rows:,} rows")
        if self.expected(rows) > RISK * self.limit:
            return False
        try:
            self.taken[rows] = self.bytes_of(rows)
        except RuntimeError as error:
            if not is_lack_of_memory(error):
                raise
            return False
        return self.taken[rows] <= self.limit

    def expected(self, rows: int) -> float:
        """What so many rows will take, on the line through the two largest trials so far."""
        if len(self.taken) < 2:
            return 0.0
        (few, low), (many, high) = sorted(self.taken.items())[-2:]
        return high + max(high - low, 0) / (many - few) * (rows - many)

    def bytes_of(self, rows: int) -> int:
        """What two steps take, the second one with the state that the first leaves."""
        return _growth(lambda: self._train(rows), self.device)

    def _train(self, rows: int) -> None:
        model = copy.deepcopy(self.network)
        if self.recomputed:
            recompute(model)
        pipeline = pipeline_of(self.fit, self.data, model, RATE, self.device)
        batch = self._batch(rows)
        for _ in pipeline.steps([batch, batch], lambda _: 1.0):
            pass

    def _batch(self, rows: int) -> Batch:
        """The first rows, again and again; texts as wide as the widest may be."""
        index = torch.from_numpy(np.arange(rows) % len(next(iter(self.sample.values()))))
        values = {name: some[index].to(self.device) for name, some in self.sample.items()}
        target = values.pop(self.split.signature.target.name)
        return Batch(values, target, rows)


def free_bytes(device: torch.device) -> int:
    """The memory that is free now: the device's; or the machine's, or of it what a container may have more."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    machine = _status(Path("/proc/meminfo"), "MemAvailable")
    return machine if limit is None or used is None else min(machine, max(limit - used, 0))


def _growth(work: Callable[[], None], device: torch.device) -> int:
    """By how many bytes work raises the memory in use, at its highest."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    _tidy()
    (PROCESS / "clear_refs").write_text("5")  # the highest since now: proc(5)
    before = _status(PROCESS / "status", "VmRSS")
    work()
    return _status(PROCESS / "status", "VmHWM") - before


def _tidy() -> None:
    """Give freed memory back, so that the next trial's is new."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _status(path: Path, name: str) -> int:
    """A number of bytes out of a file of Linux's. Raises DloptError where there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise DloptError("find-batch: measures memory as Linux or CUDA tell it, and here is neither: run it where training will run")


def _number(path: Path) -> int | None:
    """What a file holds, if it is there and holds a number."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None


def rates_for(fit: Fit, rows: int, training_rows: int) -> dict[str, float]:
    """The peak rate for a batch of `rows` by the job's scale_lr; without it by either rule from the job's own batch; with lr: auto none."""
    rate, scale = fit.train.optimizer.lr, fit.train.scale_lr
    if isinstance(rate, str):
        return {}
    if scale:
        return {scale.rule: rate * scale.factor(rows)}
    ratio = rows / fit.train.rows_of_batch(training_rows)
    return {"linear": rate * ratio, "sqrt": rate * ratio**0.5}
