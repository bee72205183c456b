"""Three workers, without Ray, go on from a checkpoint within an epoch to the same bits: three numbers have several orders of adding up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dlopt.artifact import Artifact
from dlopt.models import Cnn, Mlp, Model
from dlopt.train.job import Fit, Resources
from dlopt.train.watch.metrics_log import STARTS
from dlopt.train.worker import Assignment, Worker
from tests import sets
from tests.processes import together
from tests.train.loop.test_worker import CPU, section

MODELS: dict[str, Model] = {"mlp": Mlp(hidden=(64, 64), dropout=0.1, norm="batch"), "cnn": Cnn(channels=(8, 16), hidden=64, dropout=0.0)}
WORKERS = 3


def _data(home: Path) -> Artifact:
    return sets.prepared(home, sets.signature(sets.IMAGE, target=sets.THREE), train=400)


def _train(rank: int, world: int, home: Path) -> None:
    for name, model in MODELS.items():
        out = Path(home, name)
        out.mkdir(exist_ok=True)
        fit: Fit = section(epochs=2).model_copy(update={"model": model})
        resources = Resources.model_validate({"checkpoint": {"every": {"steps": 5}, "keep": 50}})
        Worker(Assignment(fit=fit, data=_data(Path(home)).path, out=out, feed="resident", resources=resources), rank, world, CPU).run()


@pytest.mark.slow
def test_three_workers_go_on_within_an_epoch_to_the_same_bits(tmp_path: Path) -> None:
    _data(tmp_path)
    together(WORKERS, _train, tmp_path)
    whole = {name: (tmp_path / name / "weights.safetensors").read_bytes() for name in MODELS}
    for name in MODELS:
        for later in sorted((tmp_path / name / "checkpoints").glob("0*"))[2:]:
            shutil.rmtree(later)
    together(WORKERS, _train, tmp_path)
    for name, content in whole.items():
        assert '"step": 5' in (tmp_path / name / STARTS).read_text().splitlines()[-1]
        assert (tmp_path / name / "weights.safetensors").read_bytes() == content, name
