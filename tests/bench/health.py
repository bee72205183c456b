"""What watching over the layers costs: steps with `train.health` at its default against steps without.

    python -m tests.bench.health

Watched steps and others are taken in turn, A B A B, so that what else the machine does comes over both alike; their medians tell what a
look costs. The ratio is that of the time of `every` steps with one look among them, and the question before each whether it is watched,
to the time of as many without. Looks at the first 50 steps, six of them, come on top once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dlopt.train.watch.health import Watch
from dlopt.train.watch.layers import Health


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))


def cnn() -> nn.Module:
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(1568, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp_128": (mlp, (128, 784), 2000),
    "cnn_256": (cnn, (256, 1, 28, 28), 100),
}
"""Network, shape of a batch, steps of each sort."""


def measure(case: str) -> dict[str, Any]:
    make, shape, steps = CASES[case]
    torch.manual_seed(0)
    network, inputs, target = make(), torch.rand(shape), torch.randint(0, 10, shape[:1])
    optimizer, watch = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True), Watch(network, Health(every=2))
    seconds: tuple[list[float], list[float]] = ([], [])
    for step in range(51, 51 + 2 * steps):
        began = time.perf_counter()
        watch.ready(step)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(network(inputs), target)
        loss.backward()
        norm = nn.utils.get_total_norm([parameter.grad for parameter in network.parameters() if parameter.grad is not None]).item()
        optimizer.step()
        if watch.watched(step):
            watch.look(step, loss.item(), norm)
        seconds[watch.watched(step)].append(time.perf_counter() - began)
    plain, watched = (statistics.median(found) for found in seconds)
    look, every = watched - plain, Health().every
    return {
        "ratio": round(1 + (look / every + asking(watch)) / plain, 4),
        "ms_a_step": round(1000 * plain, 3),
        "ms_a_look": round(1000 * look, 3),
    }


def asking(watch: Watch) -> float:
    """Seconds of a step that is not watched, for being asked."""
    began = time.perf_counter()
    for _ in range(10_000):
        watch.ready(51)
        watch.watched(51)
    return (time.perf_counter() - began) / 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = {case: measure(case) for case in CASES} | {"every": Health().every, "threads": torch.get_num_threads()}
    print(json.dumps(found) if options.json else "\n".join(f"{name:>10}  {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
