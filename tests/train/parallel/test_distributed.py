"""The result is a function of the job, not of the cluster: one worker and several, both feeds, and through a worker's death."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.artifact import Artifact
from dlopt.data.feed.batches import Batch, Feed
from dlopt.models import Cnn
from dlopt.models.custom import custom
from dlopt.part import Signature
from dlopt.train import training, worker
from dlopt.train.job import Fit
from dlopt.train.watch import metrics_log
from tests.cases import few
from tests.served import descendants
from tests.trained import curve, fit, prepare_digits, quick

pytestmark = pytest.mark.usefixtures("ray_cluster", "mnist")


@pytest.fixture(scope="module")
def data(ray_cluster: None, mnist: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return prepare_digits(tmp_path_factory.mktemp("digits"), 1000)


@dataclass
class Recording(training.Training):
    """Writes down what each worker's parameters are at each checkpoint, and which rows it was given for each step."""

    def save(self, needed: bool = True) -> None:
        found = hashlib.sha256()
        for parameter in self.network.parameters():
            found.update(parameter.detach().cpu().numpy().tobytes())
        self._note("weights", found.hexdigest())
        super().save(needed)

    def _feed(self, epoch: int) -> Feed:
        return Noted(super()._feed(epoch), self._note)

    def _note(self, what: str, value: Any) -> None:
        with open(self.out / f"{what}-{self.rank}", "a") as file:
            file.write(json.dumps(value) + "\n")


@dataclass
class Noted:
    """A feed that writes down which rows it gives."""

    feed: Feed
    note: Callable[[str, Any], None]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for batch in self.feed.epoch(epoch, start):
            assert batch.rows is not None
            self.note("rows", batch.rows.tolist())
            yield batch


def noted(out: Path, what: str, workers: int) -> list[list[Any]]:
    """By worker."""
    return [[json.loads(line) for line in (out / f"{what}-{rank}").read_text().splitlines()] for rank in range(workers)]


def orders(out: Path, workers: int) -> list[str]:
    """For each step a hash of the rows of the whole batch, in their order."""
    shares = zip(*noted(out, "rows", workers), strict=True)
    return [hashlib.sha256(json.dumps([row for share in step for row in share]).encode()).hexdigest() for step in shares]


SECTIONS = {"whole": quick(precision="float64", dropout=0.2), "hundred": quick(batch_size=16, dropout=0.2)}
"""50 steps in float64, 100 in float32; augmented, with dropout."""
FEEDS = ("resident", "stream")


GROUPS = [(2, ("whole",)), *((workers, tuple(SECTIONS)) for workers in (1, 3, 4)), (2, ("hundred",))]
"""Groups of so many workers, and which sections they go through with both feeds: the first one always, the others are slow."""


def work(config: dict[str, Any]) -> None:
    """What a group of workers does: these sections with these feeds, one after the other."""
    import ray.train

    worker.Training = Recording  # type: ignore[misc]
    torch.set_num_threads(1)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    for name, feed in config["combinations"]:
        out = Path(config["out"]) / f"{name}-{feed}"
        assignment = worker.Assignment(fit=SECTIONS[name], data=Path(config["data"]), out=out, feed=feed)
        worker.Worker(assignment, rank, world, torch.device("cpu")).run()


@pytest.fixture(scope="module", params=few(1, GROUPS), ids=lambda group: f"{group[0]}-{'-'.join(group[1])}")
def group(request: pytest.FixtureRequest, data: Artifact, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, tuple[str, ...], Path]:
    """What so many workers leave, in a folder for each section and feed."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    (workers, names), out = request.param, tmp_path_factory.mktemp("workers")
    combinations = [(name, feed) for name in names for feed in FEEDS]
    for name, feed in combinations:
        (out / f"{name}-{feed}").mkdir()
    TorchTrainer(
        work,
        train_loop_config={"data": str(data.path), "out": str(out), "combinations": combinations},
        torch_config=TorchConfig(timeout_s=120),
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=str(out / "ray")),
    ).fit()
    return workers, names, out


def lines(out: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_log.read(out / metrics_log.NAME) if "loss" in line]


def far(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """The largest relative difference of the losses of all steps."""
    pairs = list(zip(one, other, strict=True))
    assert all((a["step"], a["epoch"], a["rows"], a["rate"]) == (b["step"], b["epoch"], b["rows"], b["rate"]) for a, b in pairs)
    assert len(pairs) >= 50
    return max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in pairs)


@pytest.fixture(scope="module")
def oracle(data: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One worker without Ray Train, resident: what all others are measured against."""
    home, original = tmp_path_factory.mktemp("oracle"), worker.Training
    try:
        worker.Training = Recording  # type: ignore[misc]
        for name, section in SECTIONS.items():
            (home / name).mkdir()
            worker.Worker(worker.Assignment(fit=section, data=data.path, out=home / name, feed="resident"), 0, 1, torch.device("cpu")).run()
    finally:
        worker.Training = original  # type: ignore[misc]
    return home


@pytest.mark.parametrize("feed", FEEDS)
def test_any_number_of_workers_follows_the_curve_of_one_on_the_same_rows_in_the_same_order(
    feed: str, group: tuple[int, tuple[str, ...], Path], oracle: Path
) -> None:
    workers, names, out = group
    allowed = {"whole": 1e-9, "hundred": 1e-4}
    for name in names:
        assert far(lines(oracle / name), lines(out / f"{name}-{feed}")) < allowed[name]
        assert orders(oracle / name, 1) == orders(out / f"{name}-{feed}", workers)
        weights = noted(out / f"{name}-{feed}", "weights", workers)
        assert all(found == weights[0] for found in weights)  # to the bit
        assert len(set(weights[0])) == 2  # one an epoch, and they differ


def largest_difference(one: Artifact, other: Artifact) -> float:
    return far(curve(one), curve(other))


@pytest.fixture(scope="module")
def alone(data: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Through the stage itself."""
    return fit(SECTIONS["whole"], tmp_path_factory.mktemp("alone"), data, workers=1, feed="resident")


@pytest.mark.parametrize("feed", ["resident", pytest.param("stream", marks=pytest.mark.slow)])
def test_the_process_of_the_run_follows_the_same_curve(feed: str, data: Artifact, oracle: Path, tmp_path: Path) -> None:
    assert far(lines(oracle / "whole"), curve(fit(SECTIONS["whole"], tmp_path, data, workers=0, feed=feed))) < 1e-9


@pytest.mark.slow
def test_three_workers_and_a_convolutional_network_follow_the_curve_too(data: Artifact, tmp_path: Path) -> None:
    """A batch of 32 over three workers is shared out unevenly."""
    section = quick(precision="float64")
    section = Fit(seed=section.seed, model=Cnn(channels=(4, 8), hidden=16, dropout=0.2), augment=section.augment, train=section.train)
    one, three = (fit(section, tmp_path / str(workers), data, workers=workers) for workers in (0, 3))
    assert largest_difference(one, three) < 1e-9


class Squares(nn.Module):
    """A user's own network."""

    def __init__(self, signature: Signature, width: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(signature.inputs[0].size, width), nn.Linear(width, signature.num_outputs)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.out(self.hidden(inputs["image"].flatten(1)).square())


@pytest.mark.slow
def test_a_network_of_the_users_own_is_trained_by_two_workers_as_in_the_process_of_the_run(data: Artifact, tmp_path: Path) -> None:
    section = quick(precision="float64").model_copy(update={"model": custom(Squares, width=16)})
    one, two = fit(section, tmp_path / "0", data, workers=0), fit(section, tmp_path / "2", data, workers=2)
    assert largest_difference(one, two) < 1e-9


@pytest.mark.slow
def test_elastic_workers_follow_the_same_curve(data: Artifact, alone: Artifact, tmp_path: Path) -> None:
    """And so does one worker, through the stage itself."""
    model = fit(SECTIONS["whole"], tmp_path, data, workers=(1, 2), feed="resident")
    assert model.info["workers"] in (1, 2)
    assert largest_difference(alone, model) < 1e-9


def train_workers() -> dict[int, str]:
    """Processes of Ray Train's workers below this one, by id."""
    return {pid: line for pid, line in descendants(os.getpid()).items() if "RayTrainWorker" in line}


def wait_for_epoch(home: Path, epoch: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for path in home.glob(f"model/*/{metrics_log.NAME}"):
            if any("train" in line and line["epoch"] >= epoch for line in metrics_log.read(path)):
                return
        time.sleep(0.02)
    raise TimeoutError(f"no epoch {epoch} within {seconds} seconds")


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_curve_goes_on_as_if_nothing_had_happened(data: Artifact, tmp_path: Path) -> None:
    section = quick(epochs=12, batch_size=8, dropout=0.2)
    undisturbed = fit(section, tmp_path / "undisturbed", data, workers=2)
    killed: list[int] = []

    def kill() -> None:
        wait_for_epoch(tmp_path / "killed", 3, 120)
        killed.append(max(train_workers()))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    model = fit(section, tmp_path / "killed", data, workers=2)
    killer.join()
    assert killed
    starts = [json.loads(line)["epoch"] for line in (model.path / worker.STARTS).read_text().splitlines()]
    assert model.info["restarts"] == 1
    assert starts[0] == 0
    assert 3 <= starts[1] < 12
    assert curve(model) == curve(undisturbed)  # to the last digit, no step twice, none missing
    assert (model.path / "weights.safetensors").read_bytes() == (undisturbed.path / "weights.safetensors").read_bytes()
    assert not (model.path / "checkpoints").exists()
