"""What is seen of training: its steps are told to metrics.jsonl and health.jsonl, and it is ended where it diverges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dlopt.train.checkpoint.state import TrainingState
from dlopt.train.job import Train
from dlopt.train.loop.precision import LossScale
from dlopt.train.loop.steps import Step
from dlopt.train.measure.totals import Totals
from dlopt.train.watch.divergence import Diverging
from dlopt.train.watch.layers import Look
from dlopt.train.watch.metrics_log import MetricsWriter
from dlopt.train.watch.speed import SpeedLog

UNREAD = 10
"""Steps whose norms are read at once, where each would be waited for."""


class Diverged(Exception):
    """Training cannot go on from here; says why."""


class NotFinite(Exception):
    """A step was taken with a gradient that was not finite, as is known only now."""


@dataclass
class Diary:
    """What worker 0 writes while training runs, beside checkpoints."""

    log: MetricsWriter
    health: MetricsWriter
    speed: SpeedLog

    def undo(self, epoch: int, step: int) -> None:
        """Training goes on from an earlier step."""
        self.log.undo(epoch, step)
        self.health.undo(epoch, step)

    def flush(self) -> None:
        self.log.flush()
        self.health.flush()

    def close(self) -> None:
        for log in (self.log, self.health, self.speed):
            log.close()


class LocalStep(NamedTuple):
    """A step of a replica, of which the others do not know yet."""

    found: Step
    """Its loss is the replica's part of that of the whole batch."""
    lost: bool
    """Whether it was left out, for no good reason."""
    look: Look | None
    step: int
    """Its number."""
    mine: int
    """Rows of the replica."""
    rows: int
    """Of all replicas."""


@dataclass
class Observer:
    """Sees what one of `world` workers does; all see the same numbers, and so come to the same judgement. The diary is worker 0's."""

    train: Train
    state: TrainingState
    world: int
    scale: LossScale | None
    diary: Diary | None

    def __post_init__(self) -> None:
        assert self.state.watch
        self.watch, self.totals = self.state.watch, Totals(self.world)
        self.diverging = Diverging(self.train.divergence)
        self.state.register("diverging", self.diverging)
        if self.scale:
            self.state.register("loss_scale", self.scale)
        self.begin()

    def begin(self) -> None:
        """Go on from the record, of whose future nothing was seen."""
        self.unread: list[Step] = []
        self.totals.forget()
        self.diverging.start_loss = self.state.record.start_loss

    def ready(self) -> None:
        """Before a step: layers are listened to if it is one to be watched."""
        self.watch.ready(self.state.record.step + 1)

    def step(self, step: Step, rows: int, epoch: int, sure: bool = True) -> None:
        """Log the step if it is one to be logged, watch over layers, and raise Diverged when training has. rows: over all workers. sure:
        whether its norm is known to be finite, if it was taken; else that is found out within UNREAD steps."""
        number = self.state.record.step
        self.totals.add(step, rows, self.state.record)
        self.unread.append(step)
        if sure or self._to_be_told(number) or len(self.unread) == UNREAD:
            self.settle(epoch, sure, self._to_be_told(number))

    def settle(self, epoch: int, sure: bool = False, told: bool = False) -> None:
        """See the steps that have not been seen yet. told: whether the loss of the last one is needed. Raises NotFinite and Diverged."""
        record, unread, self.unread = self.state.record, self.unread, []
        if not unread:
            return
        last = unread[-1]
        norms, loss, measured = self._read(unread, self._loss_of(last) if told else None) if told or not sure else ([], None, None)
        if not sure and not all(map(math.isfinite, norms)):
            raise NotFinite
        if loss is not None and record.step % self.train.log_every == 0:
            self._log(last, loss, norms[-1], epoch, record.step, record.rows)
        look = self._watched(last, loss, norms, measured, epoch)
        for step in unread[:-1]:
            self.diverging.step(step.taken)
        self.refuse(self.diverging.step(last.taken or last.overflowed, loss, look), epoch)
        record.start_loss = self.diverging.start_loss

    def local_step(self, step: Step, mine: int, rows: int, epoch: int) -> LocalStep:
        """See a step of a replica that has `mine` of its rows, of which it tells the others later."""
        number = self.state.record.step
        norms, loss, measured = self._read([step], step.loss) if self._to_be_told(number) else ([], None, None)
        look = self._watched(step, loss, norms, measured, epoch)
        lost = not (step.taken or step.overflowed)
        return LocalStep(step._replace(loss=step.loss * (mine / rows)), lost, look, number, mine, rows)

    def synchronised(self, taken: list[LocalStep], epoch: int) -> None:
        """Log steps of all replicas, and raise Diverged when training has. A step counts as one if all have taken it."""
        record = self.state.record
        told = torch.stack([torch.stack([one.found.loss, one.found.loss.new_tensor(one.lost)]) for one in taken]).double()
        dist.all_reduce(told)
        rows = record.rows - sum(one.rows for one in taken)
        for one, (loss, lost) in zip(taken, told.tolist(), strict=True):
            rows += one.rows
            self.totals.add(one.found, one.rows, record)
            known = loss if self._to_be_told(one.step) else None
            if known is not None and one.step % self.train.log_every == 0:
                self._log(one.found, known, one.found.norm.item(), epoch, one.step, rows)
            self.refuse(self.diverging.step(not lost, known, one.look), epoch, one.step)
            record.start_loss = self.diverging.start_loss

    def epoch(self, epoch: int, rows: int) -> dict[str, float]:
        """At the end of an epoch: its mean loss and accuracy over its rows. Raises Diverged when training has."""
        self.totals.settle(self.state.record)
        means = [total / rows for total in self.state.record.sums]
        self.refuse(self.diverging.epoch(means[0]), epoch)
        return dict(zip(("loss", "accuracy"), means, strict=False))

    def refuse(self, why: str | None, epoch: int, step: int | None = None) -> None:
        if why:
            raise Diverged(f"epoch {epoch}, step {step or self.state.record.step}: {why}")

    def write_health(self, epoch: int, line: dict[str, Any]) -> None:
        if self.diary and line:
            self.diary.health.write(epoch=epoch, **line)
            self.diary.health.flush()

    def _to_be_told(self, step: int) -> bool:
        """Whether the loss of step number `step` is needed."""
        return step % self.train.log_every == 0 or self.state.record.start_loss is None or self.watch.watched(step)

    def _read(self, steps: list[Step], loss: Tensor | None) -> tuple[list[float], float | None, list[float] | None]:
        """Norms of steps, and where its loss is needed that of the last one and what its layers show if it is watched: all that the device
        is waited for at once."""
        watched = loss is not None and self.watch.watched(self.state.record.step) and not steps[-1].overflowed
        measured = self.watch.measure() if watched else None
        parts = [*(step.norm.detach() for step in steps), *(part for part in (loss, measured) if part is not None)]
        numbers = torch.cat([part.double().reshape(-1) for part in parts]).tolist()
        norms, rest = numbers[: len(steps)], numbers[len(steps) :]
        return norms, None if loss is None else rest[0], None if measured is None else rest[1:]

    def _watched(self, step: Step, loss: float | None, norms: list[float], measured: list[float] | None, epoch: int) -> Look | None:
        """Watch over layers. loss: where it is known."""
        number, look = self.state.record.step, None
        if step.overflowed and self.scale:
            self.watch.pass_over()
            self.write_health(epoch, {"step": number, "loss_scale": self.scale.scale})
        elif loss is not None and self.watch.watched(number):
            clipped = self.train.clip.factor(norms[-1]) if self.train.clip and step.taken else 1.0
            look = self.watch.look(number, loss, norms[-1], clipped, measured)
            self.write_health(epoch, look.as_json() if look else {})
        elif loss is not None and (spike := self.watch.hear(number, loss)):
            self.write_health(epoch, {"step": number, "findings": [spike.as_json()]})
        return look

    def _log(self, step: Step, loss: float, norm: float, epoch: int, number: int, rows: int) -> None:
        if not self.diary:
            return
        rate = step.factor * self.state.record.peak
        self.diary.log.write(step=number, epoch=epoch, rows=rows, loss=loss, rate=rate, gradient_norm=norm)
        if number % (100 * self.train.log_every) == 0:
            self.diary.log.flush()

    def _loss_of(self, step: Step) -> Tensor:
        """Of the whole batch."""
        loss = step.loss.clone()
        if self.world > 1:
            dist.all_reduce(loss)
        return loss
