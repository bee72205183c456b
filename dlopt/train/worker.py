"""What each worker of Ray Train runs: set up, go on from the newest checkpoint, train, keep the best, measure."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from dlopt.artifact import Artifact, write_atomically
from dlopt.data.counter import stream
from dlopt.data.feed import Feed, Resident, Stream
from dlopt.data.prepared import Split
from dlopt.data.share import Share
from dlopt.models import Network, build_network
from dlopt.optim.schedules import Plateau
from dlopt.part import DloptError, Part, Signature, Statistics
from dlopt.train import state as checkpoints
from dlopt.train.evaluate import evaluate, write_predictions
from dlopt.train.loop import Step, steps
from dlopt.train.metrics import SMALLER_IS_BETTER, Metrics
from dlopt.train.metrics_log import MetricsLog
from dlopt.train.objectives import Objective, class_weights, loss_of, plain, supervised
from dlopt.train.section import Fit, Train
from dlopt.train.state import Record, State

STARTS, PREDICTIONS = "starts.jsonl", "predictions.parquet"
PURPOSE = 5  # of the random numbers that dropout draws
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Assignment(Part):
    """All that a worker is told; JSON, since it travels to other machines."""

    fit: Fit
    data: Path
    out: Path
    feed: str
    threads: int | None


def train_worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """The function that Ray Train runs on every worker; worker 0 returns the info of the model's manifest."""
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    assignment = Assignment.model_validate(config)
    if assignment.threads:
        torch.set_num_threads(assignment.threads)
    return _Worker(assignment, context.get_world_rank(), context.get_world_size(), get_device()).run()


class _Setup(NamedTuple):
    """What stays from epoch to epoch."""

    network: Network
    model: nn.Module
    """The network, or that which synchronises its gradients with other workers."""
    feed: Feed
    share: Share
    objective: Objective
    validation: Split


@dataclass
class _Worker:
    assignment: Assignment
    rank: int
    world: int
    device: torch.device

    def run(self) -> dict[str, Any] | None:
        started = time.monotonic()
        fit, out = self.assignment.fit, self.assignment.out
        data = Artifact.open(self.assignment.data)
        splits = {name: Split.open(data, name) for name in ("train", "validation", "test")}
        network = load_network(fit, data).to(self.device)
        state = State(network, fit.train.optimizer.build(network.parameters()), {}, Record())
        damaged = self._resume(state)
        log = MetricsLog(out, state.record.epoch) if self.rank == 0 else None
        self._note_start(state.record, damaged)
        loop_started = time.monotonic()
        if state.record.epoch < fit.train.epochs and not state.record.stopped:
            self._train(state, splits, log)
        if self.rank != 0 or log is None:
            return None
        log.close()
        trained = time.monotonic()
        network.load_state_dict(state.best)
        info = self._finish(network, splits, state.record)
        seconds = {
            "start": round(loop_started - started, 3),
            "train": round(state.record.seconds, 3),
            "evaluate": round(time.monotonic() - trained, 3),
        }
        speed = round(state.record.rows / state.record.seconds, 1) if state.record.seconds else None
        return info | {"seconds": seconds, "rows_per_second": speed, "workers": self.world, "feed": self.assignment.feed}

    def _resume(self, state: State) -> list[str]:
        """Go on from the newest whole checkpoint, the same on all workers: worker 0 chooses."""
        found = [checkpoints.newest(self.assignment.out / checkpoints.CHECKPOINTS)] if self.rank == 0 else [None]
        if self.world > 1:
            dist.broadcast_object_list(found, src=0)
        path, damaged = found[0] or (None, [])
        if path is not None:
            checkpoints.load(state, path)
        return damaged

    def _note_start(self, record: Record, damaged: list[str]) -> None:
        """One line for each time that a group of workers set out: how restarts and resizes can be told afterwards."""
        if self.rank == 0:
            with open(self.assignment.out / STARTS, "a") as file:
                file.write(json.dumps({"epoch": record.epoch, "workers": self.world, "damaged": damaged}) + "\n")

    def _train(self, state: State, splits: dict[str, Split], log: MetricsLog | None) -> None:
        fit, record, network = self.assignment.fit, state.record, state.model
        assert isinstance(network, Network)
        model: nn.Module = network
        if self.world > 1:
            model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        share = self._share(splits["train"])
        feed, objective = self._feed(share, record.epoch + 1), self._objective(network, splits["train"])
        setup = _Setup(network, model, feed, share, objective, splits["validation"])
        while record.epoch < fit.train.epochs and not record.stopped:
            self._epoch(state, setup, log)
            self._refuse_drift(network)
            if self.rank == 0:
                checkpoints.save(state, self.assignment.out / checkpoints.CHECKPOINTS)

    def _share(self, split: Split) -> Share:
        fit, statistics = self.assignment.fit, read_statistics(Artifact.open(self.assignment.data))
        size, sampling = fit.train.batch_size, fit.train.sampling
        return Share.of(split, fit.seed, size, self.rank, self.world, fit.augment, sampling=sampling, statistics=statistics)

    def _objective(self, network: Network, split: Split) -> Objective:
        train = self.assignment.fit.train
        loss = loss_of(split.signature.target, network.output, self._weights(split))
        return supervised(loss, train.l1, train.l2, self.world)

    def _weights(self, split: Split) -> Tensor | None:
        train = self.assignment.fit.train
        if train.class_weights is None:
            return None
        rows = Artifact.open(self.assignment.data).info["labels"]["train"]
        found = class_weights(train.class_weights, split.signature.target, rows, len(split), train.sampling == "balanced")
        return found.to(self.device, DTYPES[train.precision])

    def _feed(self, share: Share, first: int) -> Feed:
        if self.assignment.feed == "stream":
            return Stream(share, first, self.assignment.fit.train.epochs, self.device)
        return Resident(share, self.device)

    def _epoch(self, state: State, setup: _Setup, log: MetricsLog | None) -> None:
        fit, record, train = self.assignment.fit, state.record, self.assignment.fit.train
        began, epoch = time.monotonic(), record.epoch + 1
        torch.manual_seed(int(stream(fit.seed, epoch, self.rank, PURPOSE)))
        sums = _Sums(self.device)
        sizes, rows_before = setup.share.sizes(), record.rows
        rate = rates(train, record.epoch, setup.share.order.batches, record.validation_losses)
        batches, gradient = setup.feed.epoch(epoch), plain(self.world)
        for index, step in enumerate(steps(setup.model, state.optimizer, batches, setup.objective, gradient, rate, train.clip_norm)):
            sums.add(step, sizes[index][1])
            record.step += 1
            record.rows += sizes[index][1]
            if record.step % train.log_every == 0:
                self._log_step(step, epoch, record, log)
        total = sums.total()
        if self.world > 1:
            dist.all_reduce(total)
        means = (total / (record.rows - rows_before)).tolist()
        found = evaluate(setup.network, setup.validation, self.device, self.rank, self.world) if len(setup.validation) else None
        record.epoch = epoch
        record.seconds += time.monotonic() - began
        _judge(state, train, found)
        if log:
            log.write(
                epoch=epoch,
                step=record.step,
                train=dict(zip(("loss", "accuracy"), means, strict=False)),
                validation=found,
                seconds=round(time.monotonic() - began, 4),
            )
            log.flush()

    def _log_step(self, step: Step, epoch: int, record: Record, log: MetricsLog | None) -> None:
        loss = step.loss.clone()
        if self.world > 1:
            dist.all_reduce(loss)
        if log:
            log.write(
                step=record.step,
                epoch=epoch,
                rows=record.rows,
                loss=loss.item(),
                rate=step.rate,
                gradient_norm=step.gradient_norm,
            )
            if record.step % (100 * self.assignment.fit.train.log_every) == 0:
                log.flush()

    def _refuse_drift(self, network: nn.Module) -> None:
        """Workers must hold the same bits: a sum of each parameter's, compared across workers after each epoch."""
        if self.world == 1:
            return
        mine = torch.stack([_sum_of_bits(parameter.detach()) for parameter in network.parameters()])
        lowest, highest = mine.clone(), mine.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        if not torch.equal(lowest, highest):
            raise RuntimeError("the workers' parameters are no longer identical")

    def _finish(self, network: Network, splits: dict[str, Split], record: Record) -> dict[str, Any]:
        """Write the artifact's files from the best epoch's weights, and measure them on every split."""
        out = self.assignment.out
        metrics = {name: evaluate(network, split, self.device) for name, split in splits.items() if len(split) and name != "test"}
        if len(splits["test"]):
            metrics["test"] = write_predictions(out / PREDICTIONS, network, splits["test"], self.device)
        tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
        write_atomically(out / "weights.safetensors", save_tensors(tensors))
        for name in ("signature.json", "statistics.json"):
            write_atomically(out / name, Artifact.open(self.assignment.data).read(name))
        starts = (out / STARTS).read_text().count("\n")
        return {
            "metrics": metrics,
            "best_epoch": record.best_epoch,
            "epochs": record.epoch,
            "steps": record.step,
            "stopped": "early" if record.stopped else "finished",
            "restarts": starts - 1,
        }


def load_network(fit: Fit, data: Artifact) -> Network:
    """The network of a job as it starts, its sizes and preprocessing from the prepared data."""
    signature = Signature.model_validate_json(data.read("signature.json"))
    return build_network(fit.model, signature, read_statistics(data), fit.seed, DTYPES[fit.train.precision])


def read_statistics(data: Artifact) -> dict[str, Statistics]:
    """Of a prepared set, by the name of the input or the target."""
    return {name: Statistics.model_validate(found) for name, found in json.loads(data.read("statistics.json")).items()}


def rates(train: Train, epoch: int, batches: int, validation_losses: list[float]) -> Callable[[int], float]:
    """The learning rate of every batch of the epoch after `epoch` epochs: a function of progress and, for plateau, of history."""
    schedule = train.schedule
    peak = train.optimizer.lr
    if isinstance(schedule, Plateau):
        peak *= schedule.decay ** schedule.falls(validation_losses)
    return lambda batch: peak * schedule.rate(epoch + batch / batches, train.epochs)


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


def _judge(state: State, train: Train, found: Metrics | None) -> None:
    """Keep the weights if this epoch is the best one, and end training when it has been too long ago."""
    record, stopping = state.record, train.early_stopping
    if found is None:
        record.best_epoch = record.epoch
        state.keep_best()
        return
    loss = found["loss"]
    record.validation_losses.append(math.nan if loss is None else loss)
    value = _monitored(train, found)
    if record.best_value is None or value < record.best_value:
        record.best_value, record.best_epoch = value, record.epoch
        state.keep_best()
    margin = stopping.min_delta if stopping else 0.0
    if record.bar is None or value < record.bar - margin:
        record.bar, record.bar_epoch = value, record.epoch
    if stopping and record.epoch - record.bar_epoch >= stopping.patience:
        record.stopped = True


def _monitored(train: Train, found: Metrics) -> float:
    """The value that decides, the smaller the better; infinite when the model's outputs are not finite.

    Raises DloptError when the split cannot tell it, which is no fault of the model.
    """
    value = found[train.monitor]
    if value is not None:
        return value if train.monitor in SMALLER_IS_BETTER else -value
    if found["loss"] is not None:
        raise DloptError(
            f"train.monitor: the validation split cannot tell {train.monitor} (it has too few rows or no row of a class): "
            "use monitor: loss or give data.split.validation a larger share"
        )
    return math.inf


def _sum_of_bits(values: Tensor) -> Tensor:
    """A 64-bit sum that changes with any bit and with the place of any value."""
    words = values.contiguous().view(-1).view(torch.int32).to(torch.int64)
    return (words * torch.arange(1, 2 * len(words), 2, device=words.device)).sum()
