"""One worker's training: step after step, from where the state is to the end. All workers decide alike, by numbers that all have."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlopt.artifact import Artifact
from dlopt.data.counter import bits
from dlopt.data.feed import Feed, Resident, Stream
from dlopt.data.prepared import Split
from dlopt.data.share import Share
from dlopt.models import Network
from dlopt.models.norms import BatchNorm
from dlopt.optim.averages import reestimate
from dlopt.optim.health import Diverging, Look
from dlopt.part import DloptError
from dlopt.train import checkpoints
from dlopt.train.agreement import Agreement
from dlopt.train.checkpoints import Store, Writer
from dlopt.train.communication import Apart
from dlopt.train.evaluate import evaluate
from dlopt.train.gradients import Gradient, accumulated, curved, plain, sharpness_aware, unscaled
from dlopt.train.judge import judge
from dlopt.train.loop import Step, steps
from dlopt.train.metrics import Metrics
from dlopt.train.metrics_log import MetricsLog
from dlopt.train.pace import Pace, SpeedLog
from dlopt.train.parallel import Replicated
from dlopt.train.precision import mixed, scale_of
from dlopt.train.profile import Profile, Unprofiled
from dlopt.train.section import Fit, Resources, course_of
from dlopt.train.start import first_batches, objective_of, read_statistics
from dlopt.train.state import State
from dlopt.train.stopping import Preempted, Reason, Stopped, reason
from dlopt.train.thresholds import fixed
from dlopt.train.totals import Totals
from dlopt.train.watchdog import Watchdog

PURPOSE = 5  # of the random numbers that dropout draws
REESTIMATED = 100
"""Batches that the statistics of batch normalization are made of, for averaged weights."""


class Diverged(Exception):
    """Training cannot go on from here; says why."""


@dataclass
class Diary:
    """What worker 0 writes while training runs."""

    writer: Writer
    log: MetricsLog
    health: MetricsLog
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
class Training:
    """What one of `world` workers trains with. The diary is worker 0's."""

    fit: Fit
    resources: Resources
    data: Artifact
    out: Path
    store: Store
    feed_kind: str
    state: State
    rank: int
    world: int
    device: torch.device
    diary: Diary | None = None
    watchdog: Watchdog | None = None
    feed: Feed | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        train = self.fit.train
        self.split, self.validation = (Split.open(self.data, name) for name in ("train", "validation"))
        self.share = self._share()
        self.sizes = self.share.sizes()
        self.course = course_of(self.fit, len(self.split))
        self.scale = scale_of(train.precision)
        if self.scale:
            self.scale.recall(self.state.record.loss_scale)
        self.profile = self._profile()
        self.model, self.gradient = self.parallel.module(), self.profile.timed("backward", self._gradient())
        self.pace, self.totals = Pace(), Totals(self.world)
        self.taken_apart: list[Taken] = []
        self.due = False
        objective = objective_of(self.fit, self.data, self.network, self.device, self.parallel.copies)
        self.objective = self.profile.timed("forward", self.pace.timed(mixed(objective, train.precision, self.device, self.scale)))
        self.diverging = Diverging(train.divergence, self.state.record.start_loss)
        if self.state.record.diverging:
            self.diverging.recall(self.state.record.diverging)
        assert self.state.watch
        self.watch = self.state.watch
        self.agreement = Agreement(self.rank, self.world, self.device, self.state.record.step)
        self.marked = self.saved = time.monotonic()

    @property
    def parallel(self) -> Replicated:
        return self.state.parallel

    @property
    def network(self) -> Network:
        assert isinstance(self.state.model, Network)
        return self.state.model

    def run(self) -> None:
        """Train to the last epoch, or until it is stopped early. Raises DloptError when training diverges again and again or a
        checkpoint cannot be written, Stopped and Preempted when it is told to end and has saved where it stands."""
        while self.state.record.epoch < self.fit.train.epochs and not self.state.record.stopped:
            try:
                self._epoch()
            except Diverged as why:
                self._roll_back(str(why))
            else:
                if self.world > 1:
                    refuse_drift(self.parallel.alike())
                if self._worth_saving():
                    self.save()
        self.profile.close()

    def save(self) -> None:
        """A checkpoint of where training stands. All workers call it at the same step."""
        record = self.state.record
        record.seconds, self.marked = record.seconds + time.monotonic() - self.marked, time.monotonic()
        self.totals.settle(record)
        record.diverging, record.watched = self.diverging.memory, self.watch.memory
        record.loss_scale = self.scale.memory if self.scale else {}
        with self.profile.within("checkpoint"):
            packed = self.state.packed()
            if self.diary:
                self.diary.flush()  # lines of steps that a checkpoint has are never written again
                self.diary.writer.write(self.state, *packed)
        self.saved = time.monotonic()

    def steps(self, epoch: int) -> Iterator[tuple[Step, int]]:
        """Every step of an epoch from where it stands, and how many rows it has over all workers; what follows a step is done when the
        next one is asked for."""
        train, record, order = self.fit.train, self.state.record, self.share.order
        schedule, course, history, before, start = train.schedule, self.course, tuple(record.history), record.step, record.batch
        slower, begun = train.divergence.factor**record.rollbacks, (epoch - 1) * order.batches + start
        seeds = bits(np.arange(before, before + order.batches), self.fit.seed, self.rank, PURPOSE) >> np.uint64(1)
        found = steps(
            self.model,
            self.state.optimizer,
            self.profile.batches(self.parallel.batches(self.pace.waiting(self._feed(epoch).epoch(epoch, start)))),
            self.objective,
            self.gradient,
            lambda index: slower * schedule.factor(begun + index, course, history),
            train.clip,
            train.centralize_gradients,
            self.scale,
            self.parallel.norm,
        )
        self.watch.ready(record.step + 1)
        for index, (_, rows) in enumerate(self.sizes[start:]):
            _seed(int(seeds[index]), self.device)
            self.parallel.begin(record.step)
            step = next(found)
            if self.watchdog:
                self.watchdog.beat()
            record.step += 1
            record.batch += 1
            record.rows += rows
            if step.taken:
                self._after_step(record.step)
            else:
                self.parallel.undo()
            yield step, rows
            self.watch.ready(record.step + 1)

    def _after_step(self, step: int) -> None:
        if self.fit.train.max_norm:
            self.fit.train.max_norm.apply(self.parallel.held)
        if self.state.average and not isinstance(self.parallel, Apart):
            self.state.average.update(step)

    def _epoch(self) -> None:
        train, record = self.fit.train, self.state.record
        began, epoch = time.monotonic(), record.epoch + 1
        for step, rows in self.steps(epoch):
            if isinstance(self.parallel, Apart):
                self._apart(self.parallel, step, rows, epoch)
            else:
                self.totals.add(step, rows, record)
                self._look(step, epoch)
            self._between_steps()
        self.totals.settle(record)
        means = [total / self.share.order.rows for total in record.sums]
        self._refuse_divergence(self.diverging.epoch(means[0]), epoch)
        with self.measured():
            self._refuse_not_finite()
            found = self._validated() if len(self.validation) else None
            record.epoch, record.batch, record.sums = epoch, 0, []
            judge(self.state, train, found)
        if self.diary:
            self.diary.log.write(
                epoch=epoch,
                step=record.step,
                train=dict(zip(("loss", "accuracy"), means, strict=False)),
                validation=found,
                seconds=round(time.monotonic() - began, 4),
            )
            self.diary.flush()

    def _between_steps(self) -> None:
        """Save if it is time to, and end if it is asked for."""
        record, every = self.state.record, self.resources.checkpoint.every
        due, stop = (every.steps is not None and record.step % every.steps == 0) or self.due, None
        if self.taken_apart:  # between two synchronisations
            self.due = due
            return
        self.due = False
        if self.agreement.due(record.step):
            due, stop = self._agreed(due)
        if (due and record.batch < self.share.order.batches) or stop:  # after the last batch of an epoch comes a checkpoint anyway
            self._refuse_not_finite()
            self.save()
        if stop:
            raise Stopped(f"stopped at step {record.step}") if stop == "stop" else Preempted(f"preempted at step {record.step}")

    def _agreed(self, due: bool) -> tuple[bool, Reason | None]:
        """Whether a checkpoint is due, and whether training is to end, by what all workers know."""
        seconds = self.resources.checkpoint.every.seconds
        late = seconds is not None and time.monotonic() - self.saved >= seconds
        agreed = self.agreement.exchange(self.state.record.step, reason(self.out), late, self.pace.lap())
        if self.diary:
            self.diary.speed.lap(self.state.record, self.pace, agreed.busy, self.diary.writer.seconds)
            self.diary.log.flush()  # about twice a second: who follows it sees training as it is
        return due or agreed.checkpoint, agreed.stop

    def _worth_saving(self) -> bool:
        """Whether a checkpoint is due at the end of this epoch."""
        record, epochs = self.state.record, self.resources.checkpoint.every.epochs or 1
        return record.epoch % epochs == 0 or record.epoch == self.fit.train.epochs or record.stopped

    def _refuse_not_finite(self) -> None:
        if not self.state.finite():
            raise Diverged("weights are no longer finite")

    def _validated(self) -> Metrics:
        train, target = self.fit.train, self.validation.signature.target
        given = fixed(train.threshold, target)
        return evaluate(self.network, self.validation, self.device, self.rank, self.world, loss=train.loss, thresholds=given)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Within it, the network has the weights that are measured and kept: the averages, where there are any."""
        average, optimizer = self.state.average, self.state.optimizer
        with ExitStack() as stack:
            if self.watchdog:
                stack.enter_context(self.watchdog.paused())
            averaged = False
            if hasattr(optimizer, "eval"):  # of schedule-free optimizers, whose weights in training are not those of their result
                optimizer.eval()
                stack.callback(optimizer.train)  # type: ignore[attr-defined]
                averaged = True
            if average and average.started:
                stack.enter_context(average.swapped())
                averaged = True
            stack.enter_context(self.parallel.gathered())
            if averaged and any(isinstance(layer, BatchNorm) for layer in self.network.modules()):
                stack.enter_context(_buffers_back(self.network))
                size = self.share.order.batch_size
                batches = first_batches(self.split, size, REESTIMATED, self.device)
                reestimate(self.network, (batch.inputs for batch in batches))
            yield

    def _look(self, step: Step, epoch: int) -> None:
        """Log the step if it is one to be logged, watch over layers, and refuse to go on when training has diverged."""
        record = self.state.record
        loss = self._loss_of(step) if self._to_be_told(record.step) else None
        if loss is not None and record.step % self.fit.train.log_every == 0:
            self._log_step(step, loss, epoch, record.step, record.rows)
        look = self._watched(step, loss, epoch)
        self._refuse_divergence(self.diverging.step(step.taken or step.overflowed, loss, look), epoch)
        record.start_loss = self.diverging.start_loss

    def _to_be_told(self, step: int) -> bool:
        """Whether the loss of step number `step` is needed."""
        return step % self.fit.train.log_every == 0 or self.state.record.start_loss is None or self.watch.watched(step)

    def _watched(self, step: Step, loss: float | None, epoch: int) -> Look | None:
        """Watch over layers. loss: where it is known."""
        train, record, look = self.fit.train, self.state.record, None
        if step.overflowed and self.scale:
            self.watch.pass_over()
            self._write_health(epoch, {"step": record.step, "loss_scale": self.scale.scale})
        elif loss is not None and self.watch.watched(record.step):
            clipped = train.clip.factor(step.gradient_norm) if train.clip and step.taken else 1.0
            look = self.watch.look(record.step, loss, step.gradient_norm, clipped)
            self._write_health(epoch, look.as_json() if look else {})
        elif loss is not None and (spike := self.watch.hear(record.step, loss)):
            self._write_health(epoch, {"step": record.step, "findings": [spike.as_json()]})
        return look

    def _apart(self, replicas: Apart, step: Step, rows: int, epoch: int) -> None:
        """After a replica's step. Each looks at its own; what workers must know of each other's steps they tell when they synchronise."""
        record = self.state.record
        look = self._watched(step, step.loss.item() if self._to_be_told(record.step) else None, epoch)
        mine, _ = self.sizes[record.batch - 1]
        lost = not (step.taken or step.overflowed)
        self.taken_apart.append(Taken(step._replace(loss=step.loss * (mine / rows)), lost, look, record.step, mine, rows))
        if replicas.due(record.batch, len(self.sizes)):
            taken, self.taken_apart = self.taken_apart, []
            with self.profile.within("all-reduce"):
                replicas.synchronise(self.state.optimizer, sum(one.mine for one in taken) / sum(one.rows for one in taken))
            self._after_synchronisation(taken)
            self._tell(taken, epoch)

    def _after_synchronisation(self, taken: list[Taken]) -> None:
        """Averages take the weights that there are now for those of all steps since the last time."""
        if self.fit.train.max_norm:
            self.fit.train.max_norm.apply(self.parallel.held)
        for one in taken if self.state.average else []:
            assert self.state.average
            self.state.average.update(one.step)
        if self.scale:
            least = torch.tensor([self.scale.scale, self.scale.good], dtype=torch.float64, device=self.device)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            self.scale.recall({"scale": least[0].item(), "good": int(least[1])})

    def _tell(self, taken: list[Taken], epoch: int) -> None:
        """Log steps of all replicas, and refuse to go on when training has diverged. A step counts as one if all have taken it."""
        record = self.state.record
        told = torch.stack([torch.stack([one.found.loss, one.found.loss.new_tensor(one.lost)]) for one in taken]).double()
        dist.all_reduce(told)
        rows = record.rows - sum(one.rows for one in taken)
        for one, (loss, lost) in zip(taken, told.tolist(), strict=True):
            rows += one.rows
            self.totals.add(one.found, one.rows, record)
            known = loss if self._to_be_told(one.step) else None
            if known is not None and one.step % self.fit.train.log_every == 0:
                self._log_step(one.found, known, epoch, one.step, rows)
            self._refuse_divergence(self.diverging.step(not lost, known, one.look), epoch, one.step)
            record.start_loss = self.diverging.start_loss

    def _log_step(self, step: Step, loss: float, epoch: int, number: int, rows: int) -> None:
        record = self.state.record
        if not self.diary:
            return
        self.diary.log.write(
            step=number,
            epoch=epoch,
            rows=rows,
            loss=loss,
            rate=step.factor * record.peak,
            gradient_norm=step.gradient_norm,
        )
        if number % (100 * self.fit.train.log_every) == 0:
            self.diary.log.flush()

    def _loss_of(self, step: Step) -> float:
        """Of the whole batch."""
        loss = step.loss.clone()
        if self.world > 1:
            dist.all_reduce(loss)
        return loss.item()

    def _write_health(self, epoch: int, line: dict[str, Any]) -> None:
        if self.diary and line:
            self.diary.health.write(epoch=epoch, **line)
            self.diary.health.flush()

    def _refuse_divergence(self, why: str | None, epoch: int, step: int | None = None) -> None:
        if why:
            raise Diverged(f"epoch {epoch}, step {step or self.state.record.step}: {why}")

    def _roll_back(self, why: str) -> None:
        """Go back to the newest checkpoint of an epoch's end, and on at a lower rate. Raises DloptError after too many of them."""
        train, rollbacks = self.fit.train, self.state.record.rollbacks + 1
        tried = f"{why}; lower train.optimizer.lr or set train.clip"
        if rollbacks > train.divergence.most:
            raise DloptError(f"train: training diverges even after {rollbacks - 1} roll-backs to a lower rate: {tried}")
        if self.diary:
            self.diary.writer.wait()
        found, _ = newest_of_all(self.store, self.rank, self.world, epoch_ends=True)
        assert found
        found.load(self.state)
        record = self.state.record
        record.rollbacks, record.diverging = rollbacks, {}
        self.feed, self.taken_apart, self.due = None, [], False
        self.totals.forget()
        rate = record.peak * train.divergence.factor**rollbacks
        self.diverging = Diverging(train.divergence, record.start_loss)
        self.watch.recall({}, {})
        if self.scale:
            self.scale.recall(record.loss_scale)
        if self.diary:
            self.diary.undo(record.epoch, record.step)
            self._write_health(record.epoch, {"step": record.step, "rollback": why, "rate": rate})
        self.save()

    def _share(self) -> Share:
        train = self.fit.train
        return Share.of(
            self.split,
            self.fit.seed,
            train.rows_of_batch(len(self.split)),
            self.rank,
            self.world,
            self.fit.augment,
            sampling=train.sampling,
            statistics=read_statistics(self.data),
        )

    def _gradient(self) -> Gradient:
        train, micro, factor = self.fit.train, self.fit.train.micro_batch_size, self.parallel.factor
        together = self.parallel.together
        found = plain(factor) if micro is None else accumulated(together, -(-micro // self.world), factor)
        found = unscaled(self.profile.reduced(self.parallel.gradient(found)), self.scale)
        if train.sharpness:
            found = sharpness_aware(found, train.sharpness.rho, train.sharpness.adaptive, self.parallel.norm)
        return curved(found, self.state.optimizer, together, self.scale)

    def _profile(self) -> Unprofiled:
        if not self.resources.profile:
            return Unprofiled()
        steps = self.share.order.batches * self.fit.train.epochs - self.state.record.step
        found = Profile(self.out, self.network, self.rank, self.world, self.device, steps)
        self.state.optimizer.step = found.timed("optimizer", self.state.optimizer.step)  # type: ignore[method-assign, assignment]
        return found

    def _feed(self, epoch: int) -> Feed:
        """The feed that gives this epoch and those after it."""
        if self.feed is None:
            stream = self.feed_kind == "stream"
            last, start = self.fit.train.epochs, self.state.record.batch
            self.feed = Stream(self.share, epoch, last, self.device, start) if stream else Resident(self.share, self.device)
        return self.feed


def newest_of_all(store: Store, rank: int, world: int, epoch_ends: bool = False) -> tuple[checkpoints.Checkpoint | None, list[str]]:
    """The newest whole checkpoint, the same on all workers, since worker 0 chooses it, and a line for each damaged one."""
    found, damaged = checkpoints.newest(store, epoch_ends) if rank == 0 else (None, [])
    if world == 1:
        return found, damaged
    told = [(found and found.name, damaged)]
    dist.broadcast_object_list(told, src=0)
    name, damaged = told[0]
    return (found or checkpoints.read(store, name) if name else None), damaged


def refuse_drift(alike: Mapping[str, Tensor]) -> None:
    """Workers must hold the same bits: a sum of each tensor's, compared across workers. Raises RuntimeError."""
    sums = [_sum_of_bits(value) for value in alike.values() if value.is_floating_point()]
    if not sums:
        return
    mine = torch.stack(sums)
    lowest, highest = mine.clone(), mine.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    if not torch.equal(lowest, highest):
        raise RuntimeError("the workers' parameters are no longer identical")


@contextmanager
def _buffers_back(network: nn.Module) -> Iterator[None]:
    """Buffers are afterwards as they were before."""
    before = {name: value.clone() for name, value in network.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in network.named_buffers():
                value.copy_(before[name])


def _seed(seed: int, device: torch.device) -> None:
    """Random numbers of this device begin here. `torch.manual_seed` asks every kind of device that there may be, for ten times as long."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _sum_of_bits(values: Tensor) -> Tensor:
    """A 64-bit sum that changes with any bit and with the place of any value."""
    words = values.contiguous().view(-1).view(torch.int32).to(torch.int64)
    return (words * torch.arange(1, 2 * len(words), 2, device=words.device)).sum()
