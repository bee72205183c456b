"""What is seen of training: its steps are told to metrics.jsonl and health.jsonl, and it is ended where it diverges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dlopt.train.checkpoint.state import TrainingState
from dlopt.train.checkpoint.writer import Writer
from dlopt.train.job import Train
from dlopt.train.loop.precision import LossScale
from dlopt.train.loop.steps import Step
from dlopt.train.measure.totals import Totals
from dlopt.train.watch.divergence import Diverging
from dlopt.train.watch.layers import Look
from dlopt.train.watch.metrics_log import MetricsWriter
from dlopt.train.watch.speed import SpeedLog


class Diverged(Exception):
    """Training cannot go on from here; says why."""


@dataclass
class Diary:
    """What worker 0 writes while training runs."""

    writer: Writer
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
        """After what is being written is there. Raises DloptError when the last checkpoint could not be."""
        for log in (self.log, self.health, self.speed):
            log.close()
        self.writer.close()


class Taken(NamedTuple):
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
        record = self.state.record
        self.diverging = Diverging(self.train.divergence, record.start_loss)
        if record.diverging:
            self.diverging.recall(record.diverging)
        if self.scale:
            self.scale.recall(record.loss_scale)

    def remember(self) -> None:
        """What has been seen is in the record from now on."""
        record = self.state.record
        self.totals.settle(record)
        record.diverging, record.watched = self.diverging.memory, self.watch.memory
        record.loss_scale = self.scale.memory if self.scale else {}

    def begin_anew(self) -> None:
        """The record is that of an earlier step, of whose future nothing was seen."""
        self.totals.forget()
        self.diverging = Diverging(self.train.divergence, self.state.record.start_loss)
        self.watch.recall({}, {})
        if self.scale:
            self.scale.recall(self.state.record.loss_scale)

    def ready(self) -> None:
        """Before a step: layers are listened to if it is one to be watched."""
        self.watch.ready(self.state.record.step + 1)

    def step(self, step: Step, rows: int, epoch: int) -> None:
        """Log the step if it is one to be logged, watch over layers, and raise Diverged when training has. rows: over all workers."""
        record = self.state.record
        self.totals.add(step, rows, record)
        loss = self._loss_of(step) if self._to_be_told(record.step) else None
        if loss is not None and record.step % self.train.log_every == 0:
            self._log(step, loss, epoch, record.step, record.rows)
        look = self._watched(step, loss, epoch)
        self.refuse(self.diverging.step(step.taken or step.overflowed, loss, look), epoch)
        record.start_loss = self.diverging.start_loss

    def alone(self, step: Step, mine: int, rows: int, epoch: int) -> Taken:
        """See a step of a replica that has `mine` of its rows, of which it tells the others later."""
        number = self.state.record.step
        look = self._watched(step, step.loss.item() if self._to_be_told(number) else None, epoch)
        lost = not (step.taken or step.overflowed)
        return Taken(step._replace(loss=step.loss * (mine / rows)), lost, look, number, mine, rows)

    def together(self, taken: list[Taken], epoch: int) -> None:
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
                self._log(one.found, known, epoch, one.step, rows)
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

    def _watched(self, step: Step, loss: float | None, epoch: int) -> Look | None:
        """Watch over layers. loss: where it is known."""
        number, look = self.state.record.step, None
        if step.overflowed and self.scale:
            self.watch.pass_over()
            self.write_health(epoch, {"step": number, "loss_scale": self.scale.scale})
        elif loss is not None and self.watch.watched(number):
            clipped = self.train.clip.factor(step.gradient_norm) if self.train.clip and step.taken else 1.0
            look = self.watch.look(number, loss, step.gradient_norm, clipped)
            self.write_health(epoch, look.as_json() if look else {})
        elif loss is not None and (spike := self.watch.hear(number, loss)):
            self.write_health(epoch, {"step": number, "findings": [spike.as_json()]})
        return look

    def _log(self, step: Step, loss: float, epoch: int, number: int, rows: int) -> None:
        if not self.diary:
            return
        self.diary.log.write(
            step=number,
            epoch=epoch,
            rows=rows,
            loss=loss,
            rate=step.factor * self.state.record.peak,
            gradient_norm=step.gradient_norm,
        )
        if number % (100 * self.train.log_every) == 0:
            self.diary.log.flush()

    def _loss_of(self, step: Step) -> float:
        """Of the whole batch."""
        loss = step.loss.clone()
        if self.world > 1:
            dist.all_reduce(loss)
        return loss.item()
