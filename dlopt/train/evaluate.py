"""Metrics of a split, exact however many workers share it out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.data.prepared import Chunk, Split

BATCH_BYTES = 2**22


class Metrics(NamedTuple):
    """Means over the rows of a split."""

    loss: float
    """Cross-entropy, in nats."""
    accuracy: float
    """Share of rows whose most probable class is the right one."""


def evaluate(model: nn.Module, split: Split, device: torch.device, rank: int = 0, world: int = 1) -> Metrics:
    """Loss and accuracy over a split; each worker computes its part of the chunks and the sums are added up."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for logits, target in _outputs(model, split, device, split.chunks[rank::world]):
        total[0] += F.cross_entropy(logits, target, reduction="sum")
        total[1] += (logits.argmax(dim=1) == target).sum()
    if world > 1:
        dist.all_reduce(total)
    loss, correct = (total / len(split)).tolist()
    return Metrics(loss, correct)


def probabilities(model: nn.Module, split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """Softmax outputs float64 (rows, classes) and target classes (rows,) of a whole split, in row order."""
    found = [(logits.double().softmax(dim=1).cpu(), target.cpu()) for logits, target in _outputs(model, split, device, split.chunks)]
    return torch.cat([output for output, _ in found]), torch.cat([target for _, target in found])


@torch.no_grad()
def _outputs(model: nn.Module, split: Split, device: torch.device, chunks: tuple[Chunk, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and targets, a chunk at a time; the model is put back into the mode it was in."""
    training = model.training
    model.eval()
    size = max(1, min(1024, BATCH_BYTES // split.row_bytes))
    for chunk in chunks:
        rows = {name: torch.from_numpy(values.copy()).to(device) for name, values in split.read([chunk]).items()}
        target = rows.pop(split.signature.target.name)
        for start in range(0, len(target), size):
            yield model({name: values[start : start + size] for name, values in rows.items()}), target[start : start + size]
    model.train(training)
