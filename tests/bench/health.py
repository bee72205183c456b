"""What watching over the layers costs: the time of steps with `train.health` at its default, over that of the same steps without.

    python -m tests.bench.health

The two are measured in turn, A B A B, each turn over steps 51 to 1,050 (fewer of the slower network), among which looks come at the
usual interval; the ratio is the median over the pairs. Looks at the first 50 steps, six of them, come on top once.
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

from dlopt.optim.health import Health, Watch

FIRST = 51


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))


def cnn() -> nn.Module:
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(1568, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "mlp_128": (mlp, (128, 784), 1000, 9),
    "cnn_256": (cnn, (256, 1, 28, 28), 200, 7),
}
"""Network, shape of a batch, steps of a turn, pairs of turns."""


def seconds(make: Callable[[], nn.Module], shape: tuple[int, ...], steps: int, health: Health) -> float:
    """Of so many steps."""
    torch.manual_seed(0)
    network, inputs, target = make(), torch.rand(shape), torch.randint(0, 10, shape[:1])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    parameters, watch = list(network.parameters()), Watch(network, health)
    began = 0.0
    for step in range(FIRST - 10, FIRST + steps):
        if step == FIRST:
            began = time.perf_counter()
        watch.ready(step)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(network(inputs), target)
        loss.backward()
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]).item()
        optimizer.step()
        if watch.watched(step):
            watch.look(step, loss.item(), norm)
    return time.perf_counter() - began


def measure(case: str) -> dict[str, Any]:
    make, shape, steps, pairs = CASES[case]
    found = [(seconds(make, shape, steps, Health()), seconds(make, shape, steps, Health(every=0))) for _ in range(pairs)]
    ratios = [watched / alone for watched, alone in found]
    return {
        "ratio": round(statistics.median(ratios), 4),
        "best_ratio": round(min(watched for watched, _ in found) / min(alone for _, alone in found), 4),
        "ms_a_step": round(1000 * min(alone for _, alone in found) / steps, 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = {case: measure(case) for case in CASES} | {"every": Health().every, "threads": torch.get_num_threads()}
    print(json.dumps(found) if options.json else "\n".join(f"{name:>10}  {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
