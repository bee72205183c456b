"""What keyed masks of dropout cost: a step of the MLP (784-128-10, batch 128) with dlopt's dropout, which draws by row of the whole batch,
against the same step with torch's, whose masks depend on the number of workers, and with none.

    python -m tests.bench.masks

Blocks of steps in turn, A B C A B C; times of a step are medians over blocks, ratios medians over neighbouring blocks.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from dlopt.models import noise

BLOCKS, STEPS, ROWS = 40, 50, 128


def stepper(dropout: nn.Module) -> Callable[[int], None]:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), dropout, nn.Linear(128, 10))
    noise.key(nn.Sequential(dropout) if isinstance(dropout, noise.Dropout) else nn.Identity())
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    images, labels = torch.rand(ROWS, 784), torch.randint(10, (ROWS,))

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with noise.step(1, number):
            noise.part(0, ROWS, images.device)
            F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    torch.set_num_threads(1)  # two would wait for each other wherever something else runs
    steppers = {"dlopt": stepper(noise.Dropout(0.2)), "torch": stepper(nn.Dropout(0.2)), "none": stepper(nn.Identity())}
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for block in range(BLOCKS):
        for name, step in steppers.items():
            began = time.perf_counter()
            for number in range(block * STEPS, (block + 1) * STEPS):
                step(number)
            seconds[name].append((time.perf_counter() - began) / STEPS)
    told = {f"{name}_us": round(1e6 * statistics.median(times[1:]), 1) for name, times in seconds.items()}
    for other in ("torch", "none"):
        ratio = statistics.median(a / b for a, b in zip(seconds["dlopt"][1:], seconds[other][1:], strict=True))
        told[f"dlopt_against_{other}"] = round(ratio, 3)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
