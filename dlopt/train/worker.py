"""What each worker of Ray Train runs: set up, go on from the newest checkpoint, train, measure what was best."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from dlopt import remote
from dlopt.artifact import Artifact, sweep, write_atomically, writing
from dlopt.data.prepared import Split
from dlopt.models import Network
from dlopt.models.custom import Custom, draws_by_row, register
from dlopt.models.recompute import recompute
from dlopt.models.spread import spread
from dlopt.part import Part
from dlopt.train.checkpoint.checkpoints import Wanted, newest_of_all
from dlopt.train.checkpoint.state import Record, TrainingState
from dlopt.train.checkpoint.stores import CHECKPOINTS, Store, store_of
from dlopt.train.checkpoint.writer import Writer
from dlopt.train.cluster.stopping import RESIZE, STOP, Preempted, Stopped
from dlopt.train.job import Fit, Resources, course_of
from dlopt.train.loop.compiled import compile_network
from dlopt.train.loop.precision import mixed
from dlopt.train.measure.evaluate import evaluate, thresholds_of, write_predictions
from dlopt.train.measure.metrics import Metrics, approximated
from dlopt.train.measure.thresholds import signed
from dlopt.train.parallel.agreement import patiently
from dlopt.train.parallel.base import Parallel
from dlopt.train.parallel.fsdp import without_weights
from dlopt.train.parallel.strategies import parallel_of
from dlopt.train.start import (
    first_batches,
    first_rows,
    load_network,
    network_with,
    objective_of,
    optimizer_of,
    peak_of,
    scaled_by_data,
    swept,
)
from dlopt.train.training import Training
from dlopt.train.tuning import Tuning
from dlopt.train.watch.health import Watch
from dlopt.train.watch.metrics_log import HEALTH, LAYERS, NAME, RANGE, STARTS, WRITTEN, MetricsWriter
from dlopt.train.watch.observer import Diary
from dlopt.train.watch.speed import SpeedLog
from dlopt.train.watch.watchdog import Watchdog

PREDICTIONS = "predictions.parquet"


class Assignment(Part):
    """All that a worker is told; JSON, since it travels to other machines."""

    fit: Fit
    data: Path
    out: Path
    feed: str
    threads: int | None = None
    resources: Resources = Resources()
    tuning: Tuning = Tuning()
    """What is special about where training begins, and what weights are held to."""


def train_worker(
    config: dict[str, Any], factory: Callable[..., nn.Module] | None = None, store: Store | None = None
) -> dict[str, Any] | None:
    """The function that Ray Train runs on every worker; worker 0 returns the info of the model's manifest.

    factory: of a user's own model, which the section names only. store: of checkpoints, where they are not in the model's folder.
    """
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    assignment = Assignment.model_validate(config)
    if factory is not None and isinstance(assignment.fit.model, Custom):
        register(assignment.fit.model, factory)
    if assignment.threads:
        torch.set_num_threads(assignment.threads)
    rank, out = context.get_world_rank(), assignment.out
    remote.go_on(out, WRITTEN if rank == 0 else ())
    with remote.exchanged(out, gives=WRITTEN if rank == 0 else WRITTEN[-1:], takes=(STOP, RESIZE)):
        info = Worker(assignment, rank, context.get_world_size(), get_device(), store).run()
    return info and info | {"given": remote.give_all(out, CHECKPOINTS)}


@dataclass
class Worker:
    assignment: Assignment
    rank: int
    world: int
    device: torch.device
    elsewhere: Store | None = None
    """Where checkpoints lie, if not in the model's folder."""

    def run(self) -> dict[str, Any] | None:
        started = time.monotonic()
        data = Artifact.open(self.assignment.data)
        _set_numerics(self.device, self.assignment.resources)
        writer = self._writer()
        state, hosts = self.state(data, writer)
        record = state.record
        diary = self._diary(record, hosts) if self.rank == 0 else None
        loop_started = time.monotonic()
        try:
            if record.epoch < self.assignment.fit.train.epochs and not record.stopped:
                with self._watched() as watchdog:
                    self.training(data, state, diary, writer, watchdog).run()
            self._close_together(writer)
        except Stopped:
            return {"stopped": "asked", "steps": state.record.step}
        except Preempted:
            self._close_together(writer)
            raise
        finally:
            if diary:
                diary.close()
            if writer:
                writer.close()
        trained, record = time.monotonic(), state.record
        best = state.parallel.gather(state.best)
        if self.rank and not state.parallel.in_step:
            return None
        info = self._finish(state, best, data)
        seconds = {
            "start": round(loop_started - started, 3),
            "train": round(record.seconds, 3),
            "evaluate": round(time.monotonic() - trained, 3),
        }
        speed = round(record.rows / record.seconds, 1) if record.seconds else None
        more = {"seconds": seconds, "rows_per_second": speed, "workers": self.world, "feed": self.assignment.feed}
        return info | more if self.rank == 0 else None

    def _writer(self) -> Writer | None:
        """Of this worker's part of checkpoints, if it has one; whoever has trained here before writes no more, and what it has left half
        written goes."""
        keep, together = self.assignment.resources.checkpoint.keep, self._wanted.rows
        writer = Writer(self.store, keep, uuid.uuid4().hex, 0, self.world if together else 1) if self.rank == 0 else None
        if writer:
            sweep(self.assignment.out)
        if together:
            told: list[Any] = [writer and (writer.owner, writer.serial)]
            dist.broadcast_object_list(told, src=0)
            writer = writer or Writer(self.store, keep, told[0][0], self.rank, self.world, told[0][1])
        return writer

    def _close_together(self, writer: Writer | None) -> None:
        """Once the last checkpoint is written, however long that takes: Ray Train ends all workers as soon as one of them has."""
        patiently(writer.close if writer else lambda: None, self.world, self.device)

    @property
    def store(self) -> Store:
        return self.elsewhere or store_of(self.assignment.out, self.assignment.resources.checkpoint)

    def training(
        self,
        data: Artifact,
        state: TrainingState,
        diary: Diary | None = None,
        writer: Writer | None = None,
        watchdog: Watchdog | None = None,
    ) -> Training:
        """Ready for the next step."""
        given = self.assignment
        workers = (self.rank, self.world, self.device)
        where = given.out, self.store, self._wanted, given.feed
        return Training(given.fit, given.resources, data, *where, state, *workers, diary, writer, watchdog, given.tuning)

    @contextmanager
    def _watched(self) -> Iterator[Watchdog]:
        """Within it, this worker may not stand still; it is ended then, unless its process is that of the run."""
        given = self.assignment
        watchdog = Watchdog(given.out, self.rank, given.resources.hang_seconds, fatal=given.threads is not None)
        try:
            yield watchdog
        finally:
            watchdog.close()

    def _diary(self, record: Record, hosts: list[str]) -> Diary:
        out = self.assignment.out
        log, health = (MetricsWriter(out, record.epoch, record.step, name) for name in (NAME, HEALTH))
        return Diary(log, health, SpeedLog(out, record, hosts))

    def state(self, data: Artifact, writer: Writer | None = None) -> tuple[TrainingState, list[str]]:
        """Where training goes on: the newest whole checkpoint, the same on all workers, since worker 0 chooses it; or the start. And the
        host of each worker."""
        fit, shared_out = self.assignment.fit, self._wanted.rows
        checkpoint, damaged = newest_of_all(self.store, self._wanted, self.device)
        split, custom = Split.open(data, "train"), isinstance(fit.model, Custom)
        with without_weights() if shared_out and not custom and (checkpoint or self.rank) else nullcontext():
            network = self._network(data)
        if not shared_out:
            network.to(self.device)
        record = checkpoint.record if checkpoint else self._beginning(network, split, data)
        watch: Watch | None = None
        warnings = self._warnings_of_custom(network, split)
        if self.assignment.resources.checkpoint_activations:
            recompute(network)
        why = self._compiled(network, data, lambda: watch is not None and bool(watch.hooks))
        parallel = self._parallel(network)
        optimizer = optimizer_of(fit, network, record.peak, parallel)
        average = fit.train.average.build(parallel.local, course_of(fit, len(split))) if fit.train.average else None
        watch = Watch(network, fit.train.health, parallel.share, parallel.norms)
        state = TrainingState(network, optimizer, {}, record, average, watch, parallel)
        if checkpoint:
            checkpoint.load(state)
        else:
            packed = state.packed()
            if writer:
                writer.write(packed)
        hosts = self._hosts()
        if self.rank == 0:
            rows = {name: len(Split.open(data, name)) for name in ("train", "validation", "test")}
            warnings += filter(None, (why, approximated(split.signature.target, rows)))
            self._note_start(state.record, hosts, damaged, warnings)
        return state, hosts

    def _network(self, data: Artifact) -> Network:
        """As it is before the first step."""
        fit, begins = self.assignment.fit, self.assignment.tuning.model
        if begins is None:
            return load_network(fit, data)
        return network_with(fit, data, load_file(begins)).train()

    def _warnings_of_custom(self, network: Network, split: Split) -> list[str]:
        """A line where the result of a user's network depends on how many workers there are."""
        model = self.assignment.fit.model
        device = next(network.parameters()).device
        if self.rank or not isinstance(model, Custom) or len(split) < 2 or draws_by_row(network, first_rows(split, device)):
            return []
        return [
            f"model: {model.name} gives rows other outputs when they are computed in two parts, so the result depends on the number of "
            "workers: draw with torch.nn.Dropout, AlphaDropout or RReLU, rows in the first dimension"
        ]

    def _compiled(self, network: Network, data: Artifact, plainly: Callable[[], bool]) -> str | None:
        """Compile the network if that is asked for; a line on why not. plainly: whether layers must be called one by one."""
        if not self.assignment.resources.compile:
            return None
        fit, split = self.assignment.fit, Split.open(data, "train")
        rows = -(-min(fit.train.rows_of_batch(len(split)), fit.train.micro_batch_size or len(split)) // self.world)
        batch = next(first_batches(split, rows, 1, self.device))
        objective = mixed(objective_of(fit, data, network, self.device), fit.train.precision, self.device)
        return compile_network(network, split.signature.inputs, objective, batch, plainly)

    def _parallel(self, network: Network) -> Parallel:
        """What of training this worker holds, and how it comes together with the others."""
        fit, custom = self.assignment.fit, isinstance(self.assignment.fit.model, Custom)
        part = fit.train.synchronization or (fit.train.compression if self.world > 1 else None)
        if part:
            return part.build(network, self.rank, self.world, fit.seed)
        return parallel_of(self.assignment.resources.parallelism, network, self.rank, self.world, custom, self.device)

    @property
    def _wanted(self) -> Wanted:
        """What of a checkpoint this worker needs."""
        rows = self.world > 1 and self.assignment.resources.parallelism == "fsdp"
        return Wanted(self.rank, self.world, rows, best=self.rank == 0 or rows)

    def _hosts(self) -> list[str]:
        """Of each worker."""
        hosts = [socket.gethostname()] * self.world
        if self.world > 1:
            dist.all_gather_object(hosts, socket.gethostname())
        return hosts

    def _beginning(self, network: Network, split: Split, data: Artifact) -> Record:
        """Before the first step. Worker 0's weights are those of all, who wait for it."""
        chosen = [patiently(lambda: self._begun(network, split, data) if self.rank == 0 else 0.0, self.world, self.device)]
        if self.world > 1:
            dist.broadcast_object_list(chosen, src=0)
        return Record(peak=chosen[0])

    def _begun(self, network: Network, split: Split, data: Artifact) -> float:
        """Weights scaled by data and a rate found by trying, where they are asked for; a look at the layers. Returns the peak rate."""
        fit, out, device = self.assignment.fit, self.assignment.out, next(network.parameters()).device
        if self.assignment.tuning.model is None:
            scaled_by_data(network, fit, split, device)
        write_atomically(out / LAYERS, json.dumps(spread(network, first_rows(split, device))))
        peak = peak_of(fit, len(split))
        if peak is None:
            trial = swept(fit, network, data, device)
            write_atomically(out / RANGE, json.dumps(trial._asdict()))
            peak = trial.suggested
        return peak

    def _note_start(self, record: Record, hosts: list[str], damaged: list[str], warnings: list[str]) -> None:
        """One line for each time that a group of workers set out: how restarts and resizes can be told afterwards."""
        where = {"epoch": record.epoch, "batch": record.batch, "step": record.step}
        line = where | {"workers": self.world, "hosts": hosts, "damaged": damaged, "time": round(time.time(), 3), "warnings": warnings}
        with writing(self.assignment.out / STARTS), open(self.assignment.out / STARTS, "a") as file:
            file.write(json.dumps(line) + "\n")

    def _finish(self, state: TrainingState, best: dict[str, Tensor], data: Artifact) -> dict[str, Any]:
        """Measure the best epoch's weights on every split, and on worker 0 write the artifact's files. Of workers that can compute only
        together all call it."""
        out, record, network = self.assignment.out, state.record, state.model
        assert isinstance(network, Network)
        state.parallel.load(state.best)
        with state.parallel.measuring():
            metrics, thresholds = self._measured(network, data, state.parallel.in_step)
        if self.rank:
            return {}
        write_atomically(out / "weights.safetensors", save_tensors({name: value.contiguous() for name, value in best.items()}))
        write_atomically(out / "signature.json", signed(data.read("signature.json"), thresholds))
        write_atomically(out / "statistics.json", data.read("statistics.json"))
        starts = (out / STARTS).read_text().count("\n")
        return {
            "metrics": metrics,
            "best_epoch": record.best_epoch,
            "epochs": record.epoch,
            "steps": record.step,
            "stopped": "early" if record.stopped else "finished",
            "rate": record.peak,
            "rollbacks": record.rollbacks,
            "restarts": starts - 1,
        }

    def _measured(self, network: Network, data: Artifact, in_step: bool) -> tuple[dict[str, Metrics], tuple[float, ...]]:
        """Metrics by split, and thresholds."""
        train, where = self.assignment.fit.train, (self.rank, self.world, True) if in_step else (0, 1, False)
        splits = {name: Split.open(data, name) for name in ("train", "validation", "test")}
        thresholds = thresholds_of(train.threshold, network, splits["validation"], self.device)
        given: dict[str, Any] = {"loss": train.loss, "thresholds": thresholds}
        metrics = {
            name: evaluate(network, splits[name], self.device, *where, **given) for name in ("train", "validation") if len(splits[name])
        }
        if len(splits["test"]):
            path = self.assignment.out / PREDICTIONS if self.rank == 0 else None
            metrics["test"] = write_predictions(path, network, splits["test"], self.device, **given)
        return metrics, thresholds


def _set_numerics(device: torch.device, resources: Resources) -> None:
    """The same job gives the same bits on the same machine, and float32 is float32, unless resources say otherwise. On a CPU it does so
    anyhow; torch says where a GPU's kernels cannot."""
    if device.type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = resources.tf32
    if resources.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True, warn_only=True)
