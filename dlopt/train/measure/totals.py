"""What an epoch's losses add up to, over all workers, to the same bits wherever the epoch was interrupted."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dlopt.train.checkpoint.state import Record
from dlopt.train.loop.steps import Step


class Totals:
    """Adds up losses and right answers into `record.sums`, one step after the other, but many at a time: each alone would cost
    several per cent of a short step. All workers must settle at the same steps."""

    STEPS = 1000

    def __init__(self, world: int) -> None:
        self.world = world
        self.steps: list[Step] = []
        self.rows: list[int] = []

    def add(self, step: Step, rows: int, record: Record) -> None:
        """rows: of the whole batch, over all workers."""
        self.steps.append(step)
        self.rows.append(rows)
        if len(self.steps) == self.STEPS:
            self.settle(record)

    def settle(self, record: Record) -> None:
        """What was added is in the record from now on."""
        if not self.steps:
            return
        columns = [torch.stack([step.loss for step in self.steps]).double()]
        correct = [step.correct for step in self.steps if step.correct is not None]
        if correct:
            columns.append(torch.stack(correct).double())
        found = torch.stack(columns)
        if self.world > 1:
            dist.all_reduce(found)
        losses, *right = found.tolist()
        sums = record.sums or [0.0] * len(columns)
        for loss, rows in zip(losses, self.rows, strict=True):
            sums[0] += loss * rows
        record.sums = [sums[0], *([sums[1] + sum(right[0])] if right else [])]
        self.forget()

    def forget(self) -> None:
        """What was added and is not settled counts for nothing."""
        self.steps, self.rows = [], []
