"""What checkpoints cost: the CNN on MNIST with one every 20 steps against one at the end, in turn, A B A B, in this process.

    python -m tests.bench.checkpoint --json

`cost` is the share of a step's time that a checkpoint every 20 steps adds, by each turn's fastest epoch, and the median of the turns;
`cpu_cost` is the same in CPU seconds of the whole turn, which say something on a machine that others use, too; `blocked` is the share of
time that training itself stood still for them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dlopt import session
from dlopt.artifact import Artifact
from dlopt.models import Cnn
from dlopt.optim.optimizers import Adam
from dlopt.train import metrics_log
from dlopt.train.checkpoints import Checkpointing, Every
from dlopt.train.section import Fit, Resources, Train
from dlopt.train.worker import Assignment, _Worker
from tests.bench.train import prepare

EPOCHS, BATCH, STEPS, TURNS = 4, 256, 20, 5


def epochs(data: Artifact, every: Every) -> tuple[float, float, float]:
    """Seconds of the fastest epoch but the first, CPU seconds of all, and the share of time that checkpoints stopped training."""
    fit = Fit(seed=1, model=Cnn(), augment=(), train=Train(epochs=EPOCHS, batch_size=BATCH, optimizer=Adam()))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out = Path(folder)
        resources = Resources(checkpoint=Checkpointing(every=every))
        computed = time.process_time()
        info = _Worker(Assignment(fit=fit, data=data.path, out=out, feed="resident", resources=resources), 0, 1, torch.device("cpu")).run()
        computed = time.process_time() - computed
        assert info
        seconds = [line["seconds"] for line in metrics_log.read(out / metrics_log.NAME) if "train" in line]
        *_, last = metrics_log.read(out / metrics_log.SPEED)
    return min(seconds[1:]), computed, last["checkpoint_seconds"] / info["seconds"]["train"]


def measure(data: Artifact, turns: int) -> dict[str, Any]:
    """The two in turn."""
    epochs(data, Every(epochs=EPOCHS))  # late imports and cold caches are nobody's
    found = [(epochs(data, Every(steps=STEPS)), epochs(data, Every(epochs=EPOCHS))) for _ in range(turns)]
    costs = [often / seldom - 1 for (often, _, _), (seldom, _, _) in found]
    cpu_costs = [often / seldom - 1 for (_, often, _), (_, seldom, _) in found]
    return {
        "cost": round(statistics.median(costs), 4),
        "costs": [round(cost, 4) for cost in costs],
        "cpu_cost": round(statistics.median(cpu_costs), 4),
        "blocked": round(statistics.median(blocked for (_, _, blocked), _ in found), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--turns", type=int, default=TURNS, help=f"of each (default: {TURNS})")
    options = parser.parse_args()
    with session.connected(None), tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = measure(prepare(Path(folder)), options.turns)
    print(json.dumps(found) if options.json else "\n".join(f"{name:>10}  {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
