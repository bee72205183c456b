"""One worker's training: epoch after epoch, from where the state is to the end. All workers decide alike, by numbers that all have."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlopt.artifact import Artifact
from dlopt.data.counter import stream
from dlopt.data.feed import Feed, Resident, Stream
from dlopt.data.prepared import Split
from dlopt.data.share import Share
from dlopt.models import Network
from dlopt.models.norms import BatchNorm
from dlopt.optim.averages import reestimate
from dlopt.optim.health import Diverging, Watch
from dlopt.part import DloptError
from dlopt.train import state as checkpoints
from dlopt.train.evaluate import evaluate
from dlopt.train.gradients import Gradient, accumulated, curved, plain, sharpness_aware
from dlopt.train.judge import judge
from dlopt.train.loop import Step, steps
from dlopt.train.metrics import Metrics
from dlopt.train.metrics_log import MetricsLog
from dlopt.train.section import Fit, course_of
from dlopt.train.start import first_batches, objective_of, read_statistics
from dlopt.train.state import State
from dlopt.train.thresholds import fixed

PURPOSE = 5  # of the random numbers that dropout draws
REESTIMATED = 100
"""Batches that the statistics of batch normalization are made of, for averaged weights."""


class Diverged(Exception):
    """Training cannot go on from here; says why."""


@dataclass
class Training:
    """What one of `world` workers trains with. Logs are worker 0's."""

    fit: Fit
    data: Artifact
    out: Path
    feed_kind: str
    state: State
    rank: int
    world: int
    device: torch.device
    log: MetricsLog | None = None
    health_log: MetricsLog | None = None
    feed: Feed | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        train = self.fit.train
        self.split, self.validation = (Split.open(self.data, name) for name in ("train", "validation"))
        self.share = self._share()
        self.course = course_of(self.fit, len(self.split))
        self.model, self.gradient = self._model(), self._gradient()
        self.objective = objective_of(self.fit, self.data, self.network, self.device, self.world)
        self.diverging = Diverging(train.divergence, self.state.record.start_loss)
        if self.state.record.diverging:
            self.diverging.recall(self.state.record.diverging)
        self.watch = Watch(self.network, train.health)

    @property
    def network(self) -> Network:
        assert isinstance(self.state.model, Network)
        return self.state.model

    def run(self) -> None:
        """Train to the last epoch, or until it is stopped early. Raises DloptError when training diverges again and again."""
        while self.state.record.epoch < self.fit.train.epochs and not self.state.record.stopped:
            try:
                self._epoch()
            except Diverged as why:
                self._roll_back(str(why))
            else:
                if self.world > 1:
                    refuse_drift(self.network)
                self.save()

    def save(self) -> None:
        """A checkpoint of the epochs so far."""
        if self.rank == 0:
            checkpoints.save(self.state, self.out / checkpoints.CHECKPOINTS)

    def steps(self, epoch: int) -> Iterator[tuple[Step, int]]:
        """Every step of an epoch, and how many rows it has over all workers; what follows a step is done when the next one is asked for."""
        train, record = self.fit.train, self.state.record
        torch.manual_seed(int(stream(self.fit.seed, epoch, self.rank, PURPOSE)))
        schedule, course, history, before = train.schedule, self.course, tuple(record.history), (epoch - 1) * self.share.order.batches
        slower = train.divergence.factor**record.rollbacks
        found = steps(
            self.model,
            self.state.optimizer,
            self._feed(epoch).epoch(epoch),
            self.objective,
            self.gradient,
            lambda index: slower * schedule.factor(before + index, course, history),
            train.clip,
            train.centralize_gradients,
        )
        sizes = self.share.sizes()
        self.watch.ready(record.step + 1)
        for index, step in enumerate(found):
            record.step += 1
            record.rows += sizes[index][1]
            if step.taken:
                self._after_step(record.step)
            yield step, sizes[index][1]
            self.watch.ready(record.step + 1)

    def _after_step(self, step: int) -> None:
        if self.fit.train.max_norm:
            self.fit.train.max_norm.apply(self.network)
        if self.state.average:
            self.state.average.update(step)

    def _epoch(self) -> None:
        train, record = self.fit.train, self.state.record
        began, epoch, rows_before = time.monotonic(), record.epoch + 1, record.rows
        sums = _Sums(self.device)
        for step, rows in self.steps(epoch):
            sums.add(step, rows)
            self._look(step, epoch)
        total = sums.total()
        if self.world > 1:
            dist.all_reduce(total)
        means = (total / (record.rows - rows_before)).tolist()
        self._refuse_divergence(self.diverging.epoch(means[0]), epoch)
        with self.measured():
            if not self.state.finite():
                raise Diverged("weights are no longer finite")
            found = self._validated() if len(self.validation) else None
            record.epoch, record.diverging = epoch, self.diverging.memory
            judge(self.state, train, found)
        record.seconds += time.monotonic() - began
        if self.log:
            self.log.write(
                epoch=epoch,
                step=record.step,
                train=dict(zip(("loss", "accuracy"), means, strict=False)),
                validation=found,
                seconds=round(time.monotonic() - began, 4),
            )
            self.log.flush()

    def _validated(self) -> Metrics:
        train, target = self.fit.train, self.validation.signature.target
        given = fixed(train.threshold, target)
        return evaluate(self.network, self.validation, self.device, self.rank, self.world, loss=train.loss, thresholds=given)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Within it, the network has the weights that are measured and kept: the averages, where there are any."""
        average, optimizer = self.state.average, self.state.optimizer
        with ExitStack() as stack:
            averaged = False
            if hasattr(optimizer, "eval"):  # of schedule-free optimizers, whose weights in training are not those of their result
                optimizer.eval()
                stack.callback(optimizer.train)  # type: ignore[attr-defined]
                averaged = True
            if average and average.started:
                stack.enter_context(average.swapped())
                averaged = True
            if averaged and any(isinstance(layer, BatchNorm) for layer in self.network.modules()):
                stack.enter_context(_buffers_back(self.network))
                size = self.share.order.batch_size
                batches = first_batches(self.split, size, REESTIMATED, self.device)
                reestimate(self.network, (batch.inputs for batch in batches))
            yield

    def _look(self, step: Step, epoch: int) -> None:
        """Log the step if it is one to be logged, watch over layers, and refuse to go on when training has diverged."""
        train, record = self.fit.train, self.state.record
        logged, watched = record.step % train.log_every == 0 or record.start_loss is None, self.watch.watched(record.step)
        loss = self._loss_of(step) if logged or watched else None
        if loss is not None and record.step % train.log_every == 0:
            self._log_step(step, loss, epoch)
        look = None
        if loss is not None and watched:
            clipped = train.clip.factor(step.gradient_norm) if train.clip and step.taken else 1.0
            look = self.watch.look(record.step, loss, step.gradient_norm, clipped)
            self._write_health(epoch, look.as_json() if look else {})
        elif loss is not None and (spike := self.watch.hear(record.step, loss)):
            self._write_health(epoch, {"step": record.step, "findings": [spike.as_json()]})
        self._refuse_divergence(self.diverging.step(step.taken, loss, look), epoch)
        record.start_loss = self.diverging.start_loss

    def _log_step(self, step: Step, loss: float, epoch: int) -> None:
        record = self.state.record
        if not self.log:
            return
        self.log.write(
            step=record.step,
            epoch=epoch,
            rows=record.rows,
            loss=loss,
            rate=step.factor * record.peak,
            gradient_norm=step.gradient_norm,
        )
        if record.step % (100 * self.fit.train.log_every) == 0:
            self.log.flush()

    def _loss_of(self, step: Step) -> float:
        """Of the whole batch."""
        loss = step.loss.clone()
        if self.world > 1:
            dist.all_reduce(loss)
        return loss.item()

    def _write_health(self, epoch: int, line: dict[str, Any]) -> None:
        if self.health_log and line:
            self.health_log.write(epoch=epoch, **line)
            self.health_log.flush()

    def _refuse_divergence(self, why: str | None, epoch: int) -> None:
        if why:
            raise Diverged(f"epoch {epoch}, step {self.state.record.step}: {why}")

    def _roll_back(self, why: str) -> None:
        """Go back to the newest checkpoint, and on at a lower rate. Raises DloptError after too many of them."""
        train, rollbacks = self.fit.train, self.state.record.rollbacks + 1
        tried = f"{why}; lower train.optimizer.lr or set train.clip"
        if rollbacks > train.divergence.most:
            raise DloptError(f"train: training diverges even after {rollbacks - 1} roll-backs to a lower rate: {tried}")
        path, _ = newest_of_all(self.out, self.rank, self.world)
        assert path
        checkpoints.load(self.state, path)
        record = self.state.record
        record.rollbacks, record.diverging = rollbacks, {}
        self.feed = None
        rate = record.peak * train.divergence.factor**rollbacks
        self.diverging = Diverging(train.divergence, record.start_loss)
        self.watch = Watch(self.network, train.health)
        if self.log and self.health_log:
            self.log.undo(record.epoch)
            self.health_log.undo(record.epoch)
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

    def _model(self) -> nn.Module:
        if self.world == 1:
            return self.network
        return nn.parallel.DistributedDataParallel(self.network, gradient_as_bucket_view=True, broadcast_buffers=False)

    def _gradient(self) -> Gradient:
        train = self.fit.train
        found = plain(self.world) if train.micro_batch_size is None else accumulated(self.world, -(-train.micro_batch_size // self.world))
        found = sharpness_aware(found, train.sharpness.rho, train.sharpness.adaptive) if train.sharpness else found
        return curved(found, self.state.optimizer, self.world)

    def _feed(self, epoch: int) -> Feed:
        """The feed that gives this epoch and those after it."""
        if self.feed is None:
            stream = self.feed_kind == "stream"
            self.feed = Stream(self.share, epoch, self.fit.train.epochs, self.device) if stream else Resident(self.share, self.device)
        return self.feed


def newest_of_all(out: Path, rank: int, world: int) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, the same on all workers, since worker 0 chooses it, and a line for each damaged one."""
    found = [checkpoints.newest(out / checkpoints.CHECKPOINTS)] if rank == 0 else [None]
    if world > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0] or (None, [])


def refuse_drift(network: nn.Module) -> None:
    """Workers must hold the same bits: a sum of each tensor's, compared across workers. Raises RuntimeError."""
    mine = torch.stack([_sum_of_bits(value) for value in network.state_dict().values() if value.is_floating_point()])
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


class _Sums:
    """Loss and, of classes, right answers of an epoch, added up many steps at a time: after each step it would cost several per cent."""

    STEPS = 1000

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sum = torch.zeros(2, dtype=torch.float64, device=device)
        self.steps: list[Step] = []
        self.rows: list[int] = []
        self.counted = True

    def add(self, step: Step, rows: int) -> None:
        """rows: of the whole batch, over all workers."""
        self.steps.append(step)
        self.rows.append(rows)
        if len(self.steps) == self.STEPS:
            self.total()

    def total(self) -> Tensor:
        """(sum of the rows' losses, right answers) of this worker so far, float64; without the latter where nothing is right or wrong."""
        if self.steps:
            rows = torch.tensor(self.rows, dtype=torch.float64, device=self.device)
            self.sum[0] += torch.stack([step.loss for step in self.steps]).double() @ rows
            correct = [step.correct for step in self.steps if step.correct is not None]
            self.counted = bool(correct)
            if self.counted:
                self.sum[1] += torch.stack(correct).sum()
            self.steps, self.rows = [], []
        return self.sum[: 1 + self.counted]


def _sum_of_bits(values: Tensor) -> Tensor:
    """A 64-bit sum that changes with any bit and with the place of any value."""
    words = values.contiguous().view(-1).view(torch.int32).to(torch.int64)
    return (words * torch.arange(1, 2 * len(words), 2, device=words.device)).sum()
