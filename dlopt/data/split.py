"""Splits as pure functions of a row's stable hash: independent of the order of rows, of blocks and of workers.

Equal rows have equal hashes, so they never fall into two splits.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from dlopt.data.counter import mix, stream
from dlopt.part import DloptError, Part

NAMES = ("train", "validation", "test")

Thresholds = dict[int | str, tuple[float, float]]
"""label: the positions in [0, 1) below which a row of that class is for training, and for training or validation."""


class Shares(Part):
    """What all splits have in common."""

    train: float = Field(0.8, gt=0, le=1)
    """Share of the rows to train on."""
    validation: float = Field(0.1, ge=0, lt=1)
    """Share to choose the best epoch by."""
    test: float = Field(0.1, ge=0, lt=1)
    """Share to measure the final result on; 0 when `data.test` names a source of its own."""
    seed: int = Field(0, ge=0)
    """Another seed, another split; apart from the job's seed, so that repeated trainings compare on the same rows."""

    @model_validator(mode="after")
    def shares_sum_to_one(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train, validation and test sum to {total:g}: make them sum to 1")
        return self

    def position(self, keys: np.ndarray) -> np.ndarray:
        """Where each row stands in [0, 1). keys: uint64 of shape (rows, 2)."""
        return (mix(keys[:, 0] ^ stream(17, self.seed)) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    @property
    def cuts(self) -> tuple[float, float]:
        return self.train, 1.0 if self.test == 0 else self.train + self.validation


class RandomSplit(Shares):
    """Each row by its own hash: a row stays in its split whatever other rows come or go; sizes vary by chance."""

    kind: Literal["random"] = "random"


class StratifiedSplit(Shares):
    """Exact shares of every class: its rows in the order of their hashes, cut at the rounded counts."""

    kind: Literal["stratified"] = "stratified"

    def thresholds(self, positions: dict[int | str, np.ndarray]) -> Thresholds:
        """Cut every class. positions: label to the positions of its rows. Raises DloptError on a class that is too small."""
        return {label: self._cut(label, np.sort(values)) for label, values in positions.items()}

    def _cut(self, label: int | str, ordered: np.ndarray) -> tuple[float, float]:
        wanted = sum(share > 0 for share in (self.train, self.validation, self.test))
        if len(ordered) < wanted:
            raise DloptError(
                f"data.split: class {label!r} has {len(ordered)} row(s), too few for {wanted} stratified splits: "
                "add rows, drop the class, or use kind: random"
            )
        counts = shares_of(len(ordered), (self.train, self.validation, self.test))
        first, second = counts[0], counts[0] + counts[1]
        bounds = np.append(ordered, 1.0)
        return float(bounds[first]), float(bounds[second])


def shares_of(rows: int, shares: tuple[float, ...]) -> list[int]:
    """Whole rows for each share, summing to `rows`; every share above 0 gets at least one row (there are enough)."""
    counts = [max(round(rows * share), 1) if share else 0 for share in shares]
    largest = counts.index(max(counts))
    counts[largest] += rows - sum(counts)
    return counts


Split = Annotated[RandomSplit | StratifiedSplit, Field(discriminator="kind")]
