"""The first steps of every job in jobs/, compared with those that were stored: a refactor that changes nothing shows it here.

After a change that means to move them, `python -m tests.jobs.test_golden` stores them anew; the diff tells by how much.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from dlopt import pipeline, spec
from dlopt.spec import Job
from dlopt.train.worker import Assignment, Worker
from tests.commands import ROOT

STORED = Path(__file__).parent / "golden"
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
STEPS = {"mnist_large_batch": 3}
"""How many are looked at of a job, if not ten."""
TOLERANCE = 2e-5
"""Relative. On one machine the bits are equal; another processor adds in another order."""
GROWTH = 1.5
"""What that difference may be multiplied with from step to step: as it is with large steps."""


def first_steps(job: Job, home: Path) -> dict[str, list[float]]:
    """Losses and gradient norms of the first steps, in this process."""
    data = pipeline.prepare(job, home)
    fit, cpu = job.fit, torch.device("cpu")
    worker = Worker(Assignment(fit=fit, data=data.path, out=home / "golden" / job.name, feed="resident"), 0, 1, cpu)
    worker.assignment.out.mkdir(parents=True)
    training = worker.training(data, worker.state(data)[0])
    found = [step for step, _ in itertools.islice(training.steps(1), STEPS.get(job.name, 10))]
    return {"loss": [step.loss.item() for step in found], "gradient_norm": [step.norm.item() for step in found]}


def test_every_job_has_its_golden_losses_and_no_other_has() -> None:
    assert {path.stem for path in JOBS} == {path.stem for path in STORED.glob("*.json")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What several jobs have in common is prepared once."""
    return tmp_path_factory.mktemp("home")


SLOW = ("mnist_full", "mnist_large_batch", "mnist_cnn", "lenet_300_100", "lenet_5")
"""Jobs of all of MNIST, whose like among the others is mnist, and of convolutions."""


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW)) for path in JOBS], ids=lambda path: path.stem
)
def test_the_first_ten_steps_of_a_job_are_those_that_are_stored(
    path: Path, ray_cluster: None, shared: Path, mnist: None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    stored = json.loads((STORED / f"{path.stem}.json").read_text())
    found = first_steps(spec.load(path), home)
    assert len(found["loss"]) == STEPS.get(path.stem, 10)
    for name, values in stored.items():
        for step, (one, other) in enumerate(zip(found[name], values, strict=True)):
            assert one == pytest.approx(other, rel=TOLERANCE * GROWTH**step), (name, step)


def main() -> None:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="golden-") as home:
        for path in JOBS:
            found = first_steps(spec.load(path), Path(home))
            (STORED / f"{path.stem}.json").write_text(json.dumps(found, indent=1) + "\n")
            print(path.stem, found["loss"][-1], file=sys.stderr)


if __name__ == "__main__":
    main()
