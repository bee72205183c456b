"""Every optimizer that there is, and small networks for them to move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dlopt.data.feed.batches import Batch
from dlopt.optim.optimizers import Optimizer
from dlopt.train.loop.gradients import curved, plain
from dlopt.train.loop.objectives import Losses

OTHER: dict[str, list[dict[str, Any]]] = {
    "sgd": [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}],
    "rmsprop": [{"momentum": 0.5, "centered": True}],
    "adam": [{"amsgrad": True}],
    "adamw": [{"amsgrad": True}],
    "nadam": [{"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "radam": [{"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "lbfgs": [{"max_iter": 3, "history_size": 4}, {"line_search_fn": None, "lr": 0.1, "max_iter": 3}],
    "muon": [{"companion": {"kind": "lion"}}, {"companion": {"kind": "adagrad"}}],
    "lars": [{"momentum": 0.0}, {"nesterov": True, "weight_decay": 0.01}],
    "soap": [{"precondition_frequency": 2}],
    "shampoo": [{"preconditioning_compute_steps": 2, "momentum": 0.5, "weight_decay": 0.01}],
    "sophia": [{"update_period": 2}],
    "prodigy": [{"safeguard_warmup": True, "bias_correction": True, "growth_rate": 1.5}],
    "ademamix": [{"t_alpha_beta3": 20, "weight_decay": 0.1}],
    "schedule_free_adamw": [{"weight_decay": 0.1, "r": 1.0}],
}
"""By kind: fields that make an optimizer keep other state than its defaults do."""
KINDS = {part.model_fields["kind"].default: part for part in get_args(get_args(Optimizer)[0])}
PARTS = [KINDS[kind](**fields) for kind in KINDS for fields in [{}, *OTHER.get(kind, [])]]


def named(part: Any) -> str:
    """What a test of it is called."""
    said = [getattr(value, "kind", f"{name}={value}") for name, value in part if name in part.model_fields_set]
    return "-".join([part.kind, *said])


class Small(nn.Module):
    """A filter, whose weight lies channels last, and two matrices."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.convolution, self.hidden, self.output = nn.Conv2d(2, 4, 3), nn.Linear(16, 5), nn.Linear(5, 3)
        self.to(dtype)
        self.convolution.to(memory_format=torch.channels_last)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.output(torch.tanh(self.hidden(torch.tanh(self.convolution(inputs["x"])).flatten(1))))


def batches(dtype: torch.dtype = torch.float32, rows: int = 12, classes: int = 3) -> Iterator[Batch]:
    """One after another, of rows that have something to learn."""
    generator = torch.Generator().manual_seed(5)
    while True:
        target = torch.randint(0, classes, (rows,), generator=generator)
        x = torch.randn(rows, 2, 4, 4, generator=generator, dtype=torch.float64) + target.view(-1, 1, 1, 1)
        yield Batch({"x": x.to(dtype)}, target, rows)


def cross_entropy(model: nn.Module, batch: Batch) -> Losses:
    """The objective."""
    return Losses(nn.functional.cross_entropy(model(batch.inputs), batch.target, reduction="sum") / batch.total, None)


def advance(network: nn.Module, optimizer: torch.optim.Optimizer, feed: Iterator[Batch], steps: int) -> list[float]:
    """Train as the loop does; the loss before each step."""
    gradient, losses = curved(plain, optimizer, 1), []
    for _ in range(steps):
        batch = next(feed)

        def again(batch: Batch = batch) -> Tensor:
            for parameter in network.parameters():
                parameter.grad = None
            return gradient(cross_entropy, network, batch).loss

        losses.append(again().item())
        optimizer.step(again)
    return losses


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}
