"""The result is a function of the job, not of the cluster: one worker and several, both feeds, and through a worker's death."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from dlopt.artifact import Artifact
from dlopt.models import Cnn
from dlopt.models.own import own
from dlopt.part import Signature
from dlopt.train import metrics_log, training, worker
from dlopt.train.section import Fit
from tests.served import descendants
from tests.trained import curve, fit, prepare_digits, quick

pytestmark = pytest.mark.usefixtures("ray_cluster", "mnist")


@pytest.fixture(scope="module")
def data(ray_cluster: None, mnist: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return prepare_digits(tmp_path_factory.mktemp("digits"), 1000)


@dataclass
class Recording(training.Training):
    """Writes down what each worker's parameters are after each epoch."""

    def save(self) -> None:
        found = hashlib.sha256()
        for parameter in self.network.parameters():
            found.update(parameter.detach().cpu().numpy().tobytes())
        with open(self.out / f"rank-{self.rank}", "a") as file:
            file.write(found.hexdigest() + "\n")
        super().save()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "Training", Recording)
    monkeypatch.setattr(worker, "train_worker", recording_worker)


def recording_worker(config: dict[str, Any], factory: Any = None) -> dict[str, Any] | None:
    """`train_worker` in a process that has not seen the fixture."""
    worker.Training = Recording  # type: ignore[misc]
    return original(config, factory)


original = worker.train_worker


def largest_difference(one: Artifact, other: Artifact) -> float:
    """Of the losses of all steps, relative."""
    pairs = list(zip(curve(one), curve(other), strict=True))
    assert all((a["step"], a["epoch"], a["rows"], a["rate"]) == (b["step"], b["epoch"], b["rows"], b["rate"]) for a, b in pairs)
    assert len(pairs) >= 50
    return max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in pairs)


@pytest.fixture(scope="module")
def alone(data: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """One worker, resident, float64: what all others are measured against."""
    return fit(quick(precision="float64"), tmp_path_factory.mktemp("alone"), data, workers=1, feed="resident")


@pytest.mark.parametrize("feed", ["resident", pytest.param("stream", marks=pytest.mark.slow)])
def test_two_workers_follow_the_curve_of_one_to_nine_digits(
    feed: str, data: Artifact, alone: Artifact, tmp_path: Path, recorded: None
) -> None:
    model = fit(quick(precision="float64"), tmp_path, data, workers=2, feed=feed)
    assert (model.info["workers"], model.info["feed"]) == (2, feed)
    assert largest_difference(alone, model) < 1e-9
    ranks = [(model.path / f"rank-{rank}").read_text().split() for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert len(set(ranks[0])) == 2  # one an epoch, and they differ
    assert model.info["metrics"]["test"]["accuracy"] == alone.info["metrics"]["test"]["accuracy"]


@pytest.mark.parametrize("feed", ["resident", "stream"])
def test_the_process_of_the_run_follows_the_same_curve(feed: str, data: Artifact, alone: Artifact, tmp_path: Path) -> None:
    assert largest_difference(alone, fit(quick(precision="float64"), tmp_path, data, workers=0, feed=feed)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("feed", ["resident", "stream"])
def test_two_workers_follow_the_curve_of_one_in_float32_over_100_steps(feed: str, data: Artifact, tmp_path: Path) -> None:
    section = quick(batch_size=16)
    one, two = (fit(section, tmp_path / str(workers), data, workers=workers, feed=feed) for workers in (1, 2))
    assert len(curve(one)) == len(curve(two)) == 100
    assert largest_difference(one, two) < 1e-4


@pytest.mark.slow
def test_three_workers_and_a_convolutional_network_follow_the_curve_too(data: Artifact, tmp_path: Path) -> None:
    """A batch of 32 over three workers is shared out unevenly."""
    section = quick(precision="float64")
    section = Fit(seed=section.seed, model=Cnn(channels=(4, 8), hidden=16, dropout=0), augment=section.augment, train=section.train)
    one, three = (fit(section, tmp_path / str(workers), data, workers=workers) for workers in (0, 3))
    assert largest_difference(one, three) < 1e-9


@pytest.mark.slow
class Squares(nn.Module):
    """A user's own network."""

    def __init__(self, signature: Signature, width: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(signature.inputs[0].size, width), nn.Linear(width, signature.num_outputs)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.out(self.hidden(inputs["image"].flatten(1)).square())


def test_a_network_of_the_users_own_is_trained_by_two_workers_as_in_the_process_of_the_run(data: Artifact, tmp_path: Path) -> None:
    section = quick(precision="float64").model_copy(update={"model": own(Squares, width=16)})
    one, two = fit(section, tmp_path / "0", data, workers=0), fit(section, tmp_path / "2", data, workers=2)
    assert largest_difference(one, two) < 1e-9


def test_elastic_workers_follow_the_same_curve(data: Artifact, alone: Artifact, tmp_path: Path) -> None:
    model = fit(quick(precision="float64"), tmp_path, data, workers=(1, 2), feed="resident")
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
