"""What the time of a step goes into: each worker divides it among a few parts, and records a trace of some steps.

profile/breakdown.json    milliseconds a step and shares of each part, of each worker: of all steps after the first ones
profile/worker-00000.json a trace of a few of the first steps, for https://ui.perfetto.dev or chrome://tracing

Not by torch.profiler.schedule: that has the profiler step along from the first step to the last, and no clock of the parts beside it.

Without --profile, `Unprofiled` hands back what it is given, so that nothing is measured and nothing gets slower.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlopt.artifact import write_atomically
from dlopt.data.feed.batches import Batch
from dlopt.progress import BLOCK, Progress
from dlopt.train.loop.gradients import Gradient
from dlopt.train.loop.objectives import Losses, Objective

FOLDER, BREAKDOWN = "profile", "breakdown.json"
Phase = Literal["data wait", "forward", "backward", "all-reduce", "optimizer", "checkpoint", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""all-reduce: from a worker's last gradient of a batch to the time that those of all workers are there; what goes on beside the way back
is in it. checkpoint: what training waits for it. other: norms and clipping, logs, looks at layers, agreements of workers."""
WARM, TRACED = 20, 10
"""Steps that count for nothing, and steps that are traced after them, which count for nothing either: less of both in short trainings."""
BARS = 30
EXCHANGES = ("dlopt:swap", "gloo:", "ncclDevKernel", "nccl:")
"""What events of exchanges between workers are called in a trace: only the first kind that there is counts."""

Given = ParamSpec("Given")
Made = TypeVar("Made")


class Unprofiled:
    """Measures nothing."""

    def batches(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """The batches of an epoch; a step is from the time that one is asked for to the time that the next one is."""
        return batches

    def timed(self, part: Phase, work: Callable[Given, Made]) -> Callable[Given, Made]:
        """The same, and its time is that of a part; but for the time of other parts within it."""
        return work

    def within(self, part: Phase) -> AbstractContextManager[None]:
        """What is done in it is of a part."""
        return nullcontext()

    def reduced(self, gradient: Gradient) -> Gradient:
        """The same, of all workers; its time is the way back's, but for what comes after this worker's last gradient."""
        return gradient

    def close(self) -> None:
        """Write down what was found. All workers call it."""


class Profile(Unprofiled):
    """One worker's. On a GPU it waits for what was begun whenever a part ends, so that the steps themselves are slower."""

    def __init__(self, folder: Path, network: nn.Module, rank: int, world: int, device: torch.device, steps: int) -> None:
        """folder: of the model. steps: about how many there will be."""
        self.folder, self.network, self.rank, self.world, self.device = folder / FOLDER, network, rank, world, device
        self.clock = Clock(device)
        self.warm, self.traced = min(WARM, steps // 4), min(TRACED, -(-steps // 4))
        self.begun = 0
        self.tracer: torch.profiler.profile | None = None
        self.exchanged: float | None = None
        self.newest: Tensor | None = None
        self.last: Tensor | None = None
        """The parameter whose gradient came last, the time before."""
        self.last_at = 0.0

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        feed = iter(batches)
        batch: Batch | None
        while True:
            self._before_step()
            with self.clock.within("other"):
                with self.clock.within("data wait"):
                    batch = next(feed, None)
                if batch is None:
                    return
                self.begun += 1
                self.clock.steps += 1
                yield batch

    def timed(self, part: Phase, work: Callable[Given, Made]) -> Callable[Given, Made]:
        def timed(*args: Given.args, **kwargs: Given.kwargs) -> Made:
            with self.clock.within(part):
                return work(*args, **kwargs)

        return timed

    def within(self, part: Phase) -> AbstractContextManager[None]:
        return self.clock.within(part)

    def reduced(self, gradient: Gradient) -> Gradient:
        for parameter in self.network.parameters() if self.world > 1 else ():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._note_gradient)

        def reduced(objective: Objective, model: nn.Module, batch: Batch) -> Losses:
            self.last_at = 0.0
            with self.clock.within("backward"):
                losses = gradient(objective, model, batch)
                if self.last_at:
                    self.clock.move("all-reduce", self.last_at)
            self.last = self.newest
            return losses

        return reduced

    def close(self) -> None:
        if self.tracer:
            self._end_trace()
        mine = {"worker": self.rank, **self.clock.found(), "communication_ms": self.exchanged}
        everyones: list[Any] = [mine]
        if self.world > 1:
            everyones = [None] * self.world
            dist.all_gather_object(everyones, mine)
        if self.rank == 0 and self.clock.steps:
            self.folder.mkdir(exist_ok=True)
            write_atomically(self.folder / BREAKDOWN, json.dumps({"device": self.device.type, "workers": everyones}, indent=1))

    def _before_step(self) -> None:
        """Begin the trace, and end it; from then on time counts."""
        if self.begun == self.warm and not self.tracer:
            self.folder.mkdir(exist_ok=True)
            self.tracer = self.clock.tracer = _tracer(self.device)
            self.tracer.start()
        elif self.begun == self.warm + self.traced and self.tracer:
            self._end_trace()
            self.clock.restart()

    def _end_trace(self) -> None:
        assert self.tracer
        self.tracer.stop()
        self.tracer.export_chrome_trace(str(self.folder / f"worker-{self.rank:05d}.json"))
        if self.world > 1:
            self.exchanged = round(_exchanged(self.tracer) / self.traced, 4)
        self.tracer = self.clock.tracer = None

    def _note_gradient(self, parameter: Tensor) -> None:
        self.newest = parameter
        if parameter is self.last:
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # not for exchanges, which have a stream of their own
            self.last_at = time.perf_counter()


class PartOfStep(NamedTuple):
    """A part of a step."""

    ms: float
    share: float


class Clock:
    """Divides time among parts, which can be within each other. What is outside of steps counts if it is within a part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: list[Phase] = []
        self.tracer: torch.profiler.profile | None = None
        self.restart()

    def restart(self) -> None:
        """Forget what was."""
        self.seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self.wall, self.steps, self.mark = 0.0, 0, 0.0

    @contextmanager
    def within(self, part: Phase) -> Iterator[None]:
        depth, began = len(self.parts), self._divide()
        self.parts.append(part)
        named = torch.profiler.record_function(part) if self.tracer and part != "other" else nullcontext()
        try:
            with named:
                yield
        finally:
            ended = self._divide()
            del self.parts[depth:]
            if depth == 0:
                self.wall += ended - began

    def move(self, part: Phase, since: float) -> None:
        """What was since then, until now, is another part's than the one that is under way."""
        now = self._divide()
        self.seconds[self.parts[-1]] -= now - since
        self.seconds[part] += now - since

    def found(self) -> dict[str, Any]:
        """Of all steps since the start, as JSON has it."""
        steps, wall = max(self.steps, 1), self.wall or 1.0
        parts = {
            part: PartOfStep(round(1e3 * self.seconds[part] / steps, 4), round(self.seconds[part] / wall, 4))._asdict() for part in PHASES
        }
        return {"steps": self.steps, "step_ms": round(1e3 * self.wall / steps, 4), "parts": parts}

    def _divide(self) -> float:
        """What has gone by is of the part that is under way."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.parts:
            self.seconds[self.parts[-1]] += now - self.mark
        self.mark = now
        return now


def drawn(breakdown: dict[str, Any]) -> str:
    """breakdown.json as a few lines of text: worker 0, and how long the steps of the others are."""
    first, *others = breakdown["workers"]
    lines = [f"a step of {first['step_ms']:.2f} ms, the mean of {first['steps']:,} (worker 0 of {1 + len(others)}, {breakdown['device']}):"]
    for name, part in first["parts"].items():
        bar = "█" * round(BARS * part["share"])
        lines.append(f"  {name:<10} {part['ms']:>9.3f} ms {part['share']:>7.1%}  {bar}".rstrip())
    if first["communication_ms"] is not None:
        lines.append(f"  workers exchange for {first['communication_ms']:.3f} ms of a traced step, in part while they compute")
    if others:
        steps = [f"{other['step_ms']:.2f} ms" for other in others]
        lines.append(f"  steps of the other workers: {', '.join(steps)}")
    return "\n".join(lines)


def say(folder: Path, progress: Progress) -> None:
    """Draw the breakdown of the model in a folder, if there is one."""
    path = folder / FOLDER / BREAKDOWN
    if path.is_file():
        progress("fit", 1.0, f"{BLOCK}{drawn(json.loads(path.read_text()))}\n  {path.parent} has traces for https://ui.perfetto.dev")


def _tracer(device: torch.device) -> torch.profiler.profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says that it begins and ends
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=kinds)


def _exchanged(tracer: torch.profiler.profile) -> float:
    """Milliseconds of exchanges between workers in a trace."""
    spans = [(event.name, event.time_range.elapsed_us() / 1e3) for event in tracer.events() or ()]
    for kind in EXCHANGES:
        if those := [span for name, span in spans if name.startswith(kind)]:
            return sum(those)
    return 0.0
