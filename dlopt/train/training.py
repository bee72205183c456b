"""One worker's training: step after step, from where the state is to the end. All workers decide alike, by numbers that all have."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dlopt.artifact import Artifact
from dlopt.data.counter import bits
from dlopt.data.feed.batches import Feed, Resident, Stream, ahead
from dlopt.data.feed.sampler import Sampler
from dlopt.data.prepared import Split
from dlopt.models import Network
from dlopt.optim.optimizers import Lbfgs
from dlopt.part import DloptError
from dlopt.train.checkpoint.checkpoints import Wanted, newest_of_all
from dlopt.train.checkpoint.state import TrainingState
from dlopt.train.checkpoint.stores import Store
from dlopt.train.checkpoint.writer import Writer
from dlopt.train.cluster.stopping import Preempted, Reason, Stopped, reason
from dlopt.train.job import Fit, Resources, course_of
from dlopt.train.loop.gradients import split
from dlopt.train.loop.pipeline import Pipeline
from dlopt.train.loop.precision import computing
from dlopt.train.loop.steps import Step
from dlopt.train.measure.averaged import averaged
from dlopt.train.measure.evaluate import evaluate
from dlopt.train.measure.judge import judge
from dlopt.train.measure.metrics import Metrics
from dlopt.train.measure.thresholds import fixed
from dlopt.train.parallel.agreement import Agreement, agreed, patiently
from dlopt.train.parallel.base import Parallel
from dlopt.train.parallel.drift import refuse_drift
from dlopt.train.parallel.local_sgd import LocalSGDParallel
from dlopt.train.start import first_batches, objective_of, read_statistics
from dlopt.train.tuning import Held, Tuning
from dlopt.train.watch.observer import Diary, Diverged, LocalStep, NotFinite, Observer
from dlopt.train.watch.profile import Profile, Unprofiled
from dlopt.train.watch.speed import Pace
from dlopt.train.watch.watchdog import Watchdog

PURPOSE = 5  # of the random numbers that a user's own network draws from torch's generator
MOMENT = 1.0
"""Seconds that a checkpoint in the midst of an epoch waits for the one before."""
REESTIMATED = 100
"""Batches that the statistics of batch normalization are made of, for averaged weights."""


@dataclass
class Training:
    """What one of `world` workers trains with. The diary is worker 0's; a writer has who writes a part of checkpoints."""

    fit: Fit
    resources: Resources
    data: Artifact
    out: Path
    store: Store
    wanted: Wanted
    feed_kind: str
    state: TrainingState
    rank: int
    world: int
    device: torch.device
    diary: Diary | None = None
    writer: Writer | None = None
    watchdog: Watchdog | None = None
    tuning: Tuning = field(default_factory=Tuning)
    feed: Feed | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        train = self.fit.train
        self.split, self.validation = (Split.open(self.data, name) for name in ("train", "validation"))
        self.sampler = self._sampler()
        self.sizes = self.sampler.sizes()
        self.course = course_of(self.fit, len(self.split))
        self.profile, self.pace = self._profile(), Pace(self.device)
        self.local_steps: list[LocalStep] = []
        self.due = False
        objective = objective_of(self.fit, self.data, self.network, self.device, self.parallel.copies)
        if self.tuning.teacher:
            objective = self.tuning.teacher.teach(objective, self.split.signature.target, self.device)
        self.held = self._hold()
        stepped = self.state.optimizer, self.parallel, self.fit.seed
        self.pipeline = Pipeline(train, objective, *stepped, self.profile, self.pace.timed, self._hold_on if self.held else None)
        self.scale = self.pipeline.scale
        self.observer = Observer(train, self.state, self.world, self.scale, self.diary)
        self.agreement = Agreement(self.rank, self.world, self.device, self.state.record.step)
        self.marked = self.saved = time.monotonic()

    @property
    def parallel(self) -> Parallel:
        return self.state.parallel

    @property
    def network(self) -> Network:
        assert isinstance(self.state.model, Network)
        return self.state.model

    @property
    def sure(self) -> bool:
        """Whether each step is waited for, to know that its gradient was finite: where that takes no time, is needed for the next one
        anyway, or is known to happen. All others are taken, and training goes back to a checkpoint if it happens for the first time."""
        alone = isinstance(self.parallel, LocalSGDParallel) or isinstance(self.fit.train.optimizer, Lbfgs)
        return self.device.type == "cpu" or self.scale is not None or alone or self.state.record.careful

    def run(self) -> None:
        """Train to the last epoch, or until it is stopped early. Raises DloptError when training diverges again and again or a
        checkpoint cannot be written, Stopped and Preempted when it is told to end and has saved where it stands."""
        while self.state.record.epoch < self.fit.train.epochs and not self.state.record.stopped:
            try:
                self._epoch()
            except Diverged as why:
                self._roll_back(str(why))
            except NotFinite:
                self._take_back()
            else:
                if self.world > 1:
                    refuse_drift(self.parallel.alike())
                record, epochs = self.state.record, self.fit.train.epochs
                if record.epoch % (self.resources.checkpoint.every.epochs or 1) == 0 or record.epoch == epochs or record.stopped:
                    self.save(needed=not self.parallel.in_step)
        self.profile.close()

    def save(self, needed: bool = True) -> None:
        """A checkpoint of where training stands; if it is not needed, none while the one before is still being written. All workers call it
        at the same step."""
        with self._unwatched():
            if not needed and not agreed(self.writer is None or self.writer.ready(MOMENT), self.world, self.device):
                return
            if needed and self.parallel.in_step:  # all write the same ones
                self._written()
        record = self.state.record
        self.observer.settle(record.epoch + 1, self.sure)
        record.seconds, self.marked = record.seconds + time.monotonic() - self.marked, time.monotonic()
        self.observer.totals.settle(record)
        with self.profile.within("checkpoint"):
            packed = self.state.packed()
            if self.diary:
                self.diary.flush()  # lines of steps that a checkpoint has are never written again
            if self.writer:
                self.writer.write(packed)
        self.saved = time.monotonic()

    def steps(self, epoch: int) -> Iterator[tuple[Step, int]]:
        """Every step of an epoch from where it stands, and how many rows it has over all workers; what follows a step is done when the
        next one is asked for."""
        train, record, order = self.fit.train, self.state.record, self.sampler.order
        schedule, course, history, before, start = train.schedule, self.course, tuple(record.history), record.step, record.batch
        slower, begun = train.divergence.factor**record.rollbacks, (epoch - 1) * order.batches + start
        seeds = bits(np.arange(before, before + order.batches), self.fit.seed, self.rank, PURPOSE) >> np.uint64(1)
        batches = self.profile.batches(self.pace.waiting(ahead(self._feed(epoch).epoch(epoch, start), self.device)))
        steps = self.pipeline.steps(batches, lambda index: slower * schedule.factor(begun + index, course, history), before, self.sure)
        self.observer.ready()
        for index, (_, rows) in enumerate(self.sizes[start:]):
            _seed(int(seeds[index]), self.device)
            self.parallel.begin(record.step)
            step = next(steps)
            if self.watchdog:
                self.watchdog.beat()
            record.step += 1
            record.batch += 1
            record.rows += rows
            if not step.taken:
                self.parallel.undo()
            elif self.state.average and not isinstance(self.parallel, LocalSGDParallel):
                self.state.average.update(record.step)
            yield step, rows
            self.observer.ready()

    def _epoch(self) -> None:
        train, record = self.fit.train, self.state.record
        began, epoch = time.monotonic(), record.epoch + 1
        for step, rows in self.steps(epoch):
            if isinstance(self.parallel, LocalSGDParallel):
                self._local_step(self.parallel, step, rows, epoch)
            else:
                self.observer.step(step, rows, epoch, self.sure)
            self._between_steps()
        self.observer.settle(epoch, self.sure)
        means = self.observer.epoch(epoch, self.sampler.order.rows)
        with self.measured():
            self._refuse_not_finite()
            metrics = self._validated() if len(self.validation) else None
            record.epoch, record.batch, record.sums = epoch, 0, []
            judge(self.state, train, metrics if not self.held or self.held.settled(record.epoch / train.epochs) else None)
        if self.diary:
            self.diary.log.write(
                epoch=epoch,
                step=record.step,
                train=means,
                validation=metrics,
                seconds=round(time.monotonic() - began, 4),
            )
            self.diary.flush()

    def _between_steps(self) -> None:
        """Save if it is time to, and end if it is asked for."""
        record, every = self.state.record, self.resources.checkpoint.every
        due, stop = (every.steps is not None and record.step % every.steps == 0) or self.due, None
        if self.local_steps:  # between two synchronisations
            self.due = due
            return
        self.due = False
        if self.agreement.due(record.step):
            due, stop = self._agreed(due)
        if (due and record.batch < self.sampler.order.batches) or stop:  # after the last batch of an epoch comes a checkpoint anyway
            self.observer.settle(record.epoch + 1, self.sure)
            self._refuse_not_finite()
            self.save(needed=stop is not None)
        if stop:
            raise Stopped(f"stopped at step {record.step}") if stop == "stop" else Preempted(f"preempted at step {record.step}")

    def _agreed(self, due: bool) -> tuple[bool, Reason | None]:
        """Whether a checkpoint is due, and whether training is to end, by what all workers know."""
        seconds, first = self.resources.checkpoint.every.seconds, self.writer if self.rank == 0 else None
        late = seconds is not None and time.monotonic() - self.saved >= seconds and first is not None and first.ready()
        told = self.agreement.exchange(self.state.record.step, reason(self.out), late, self.pace.lap())
        if self.diary:
            self.diary.speed.lap(self.state.record, self.pace, told.busy, first.as_json() if first else {})
            self.diary.log.flush()  # about twice a second: who follows it sees training as it is
        return due or told.checkpoint, told.stop

    def _refuse_not_finite(self) -> None:
        if not self.state.finite():
            raise Diverged("weights are no longer finite")

    def _validated(self) -> Metrics:
        train, target = self.fit.train, self.validation.signature.target
        given = fixed(train.threshold, target)
        where = self.device, self.rank, self.world, self.parallel.in_step
        return evaluate(self.network, self.validation, *where, loss=train.loss, thresholds=given)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Within it, the network has the weights that are measured and kept, and no step is waited for."""
        with self._unwatched(), averaged(self.state, self.network, self._seen, computing(self.fit.train.precision, self.device)):
            yield

    def _seen(self) -> Iterator[dict[str, Tensor]]:
        """Inputs as batch normalization sees them in training: in micro batches."""
        rows = self.fit.train.micro_batch_size or self.sampler.order.batch_size
        for batch in first_batches(self.split, self.sampler.order.batch_size, REESTIMATED, self.device):
            yield from (part.inputs for part in split(batch, rows, -(-batch.total // rows)))

    def _unwatched(self) -> AbstractContextManager[None]:
        """Within it, training may take its time."""
        return self.watchdog.paused() if self.watchdog else nullcontext()

    def _local_step(self, replicas: LocalSGDParallel, step: Step, rows: int, epoch: int) -> None:
        """After a replica's step. Each looks at its own; what workers must know of each other's steps they tell when they synchronise."""
        record = self.state.record
        mine, _ = self.sizes[record.batch - 1]
        self.local_steps.append(self.observer.local_step(step, mine, rows, epoch))
        if replicas.due(record.batch, len(self.sizes)):
            taken, self.local_steps = self.local_steps, []
            with self.profile.within("all-reduce"):
                replicas.synchronise(self.state.optimizer, sum(one.mine for one in taken) / sum(one.rows for one in taken))
            self._after_synchronisation(taken)
            self.observer.synchronised(taken, epoch)

    def _after_synchronisation(self, taken: list[LocalStep]) -> None:
        """Averages take the weights that there are now for those of all steps since the last time."""
        if self.fit.train.max_norm:
            self.fit.train.max_norm.apply(self.parallel.local)
        for one in taken if self.state.average else []:
            assert self.state.average
            self.state.average.update(one.step)
        if self.scale:
            least = torch.tensor([self.scale.scale, self.scale.good], dtype=torch.float64, device=self.device)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            self.scale.load_state_dict({"scale": least[0].item(), "good": int(least[1])})

    def _roll_back(self, why: str) -> None:
        """Go back to the newest checkpoint of an epoch's end, and on at a lower rate. Raises DloptError after too many of them."""
        train, rollbacks = self.fit.train, self.state.record.rollbacks + 1
        tried = f"{why}; lower train.optimizer.lr or set train.clip"
        if rollbacks > train.divergence.most:
            raise DloptError(f"train: training diverges even after {rollbacks - 1} roll-backs to a lower rate: {tried}")
        self._go_back(epoch_ends=True)
        record = self.state.record
        record.rollbacks = rollbacks
        for part in (self.observer.diverging, self.observer.watch):
            part.load_state_dict({})
        self.observer.begin()
        rate = record.peak * train.divergence.factor**rollbacks
        self.observer.write_health(record.epoch, {"step": record.step, "rollback": why, "rate": rate})
        self.save()

    def _take_back(self) -> None:
        """Go back to the newest checkpoint, and on with each step waited for."""
        self._go_back(epoch_ends=False)
        self.state.record.careful = True
        self.observer.begin()

    def _go_back(self, epoch_ends: bool) -> None:
        """To the newest checkpoint, or the newest one of an epoch's end."""
        with self._unwatched():
            self._written()
            checkpoint, _ = newest_of_all(self.store, self.wanted, self.device, epoch_ends)
        assert checkpoint
        checkpoint.load(self.state)
        if self.held:
            self.held.release()
        self.feed, self.local_steps, self.due, self.held = None, [], False, self._hold()
        if self.diary:
            self.diary.undo(self.state.record.epoch, self.state.record.step)

    def _written(self) -> None:
        """Wait, however long it takes, until all checkpoints are there that were begun."""
        patiently(self.writer.wait if self.writer else lambda: None, self.world, self.device)

    def _hold(self) -> Held | None:
        """What weights are held to, of them as they are now."""
        return self.tuning.hold.begin(self.network) if self.tuning.hold else None

    def _hold_on(self) -> None:
        """After a step, which the record does not count yet."""
        record = self.state.record
        if self.held:
            self.held.after((record.epoch + (record.batch + 1) / self.sampler.order.batches) / self.fit.train.epochs)

    def _sampler(self) -> Sampler:
        train = self.fit.train
        return Sampler.of(
            self.split,
            self.fit.seed,
            train.rows_of_batch(len(self.split)),
            self.rank,
            self.world,
            self.fit.augment,
            sampling=train.sampling,
            statistics=read_statistics(self.data),
        )

    def _profile(self) -> Unprofiled:
        if not self.resources.profile:
            return Unprofiled()
        steps = self.sampler.order.batches * self.fit.train.epochs - self.state.record.step
        profile = Profile(self.out, self.network, self.rank, self.world, self.device, steps)
        self.state.optimizer.step = profile.timed("optimizer", self.state.optimizer.step)  # type: ignore[method-assign, assignment]
        return profile

    def _feed(self, epoch: int) -> Feed:
        """The feed that gives this epoch and those after it."""
        if self.feed is None:
            stream = self.feed_kind == "stream"
            last, start = self.fit.train.epochs, self.state.record.batch
            self.feed = Stream(self.sampler, epoch, last, self.device, start) if stream else Resident(self.sampler, self.device)
        return self.feed


def _seed(seed: int, device: torch.device) -> None:
    """Random numbers of this device begin here. `torch.manual_seed` asks every kind of device that there may be, for ten times as long."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
