"""Areas under curves: what comes of giving a class to all rows that score so much or more, for every score, or of too many for bins of
them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

EXACT = 2**24
"""The most probabilities of a split, of rows times classes or labels, that are kept for the areas under curves (128 MiB, over all workers);
of more they are counted in bins."""
FINE, LEAST_FINE, COUNTS = 2**16, 2**8, 2**23
"""Bins of a class's probabilities, as many as COUNTS leave to each. They are equally wide in asinh(STEEP * logit): narrow around a half,
and against their distance from 0 and from 1."""
STEEP, WIDEST = 10.0, 88.0
"""WIDEST is the logit beyond which float32 has no probability."""


class Curve(NamedTuple):
    """What comes of giving the class to all rows that score so much or more, for each different score, the highest first."""

    scores: Tensor
    """float32 (n,)."""
    right: Tensor
    """Rows of the class among them, int64 (n,)."""
    wrong: Tensor
    """Other rows among them."""
    exact: bool = True
    """Or each score stands for all from it to the next one."""


def curve_of(scores: Tensor, truths: Tensor) -> Curve | None:
    """scores: float32 (rows,); truths: bool (rows,). None where a score is NaN."""
    if scores.isnan().any():
        return None
    ordered, order = scores.sort(descending=True)
    ends = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool, device=scores.device)]).nonzero()[:, 0]
    right = truths[order].cumsum(0)[ends]
    return Curve(ordered[ends], right, ends + 1 - right)


def roc_auc(curve: Curve) -> float | None:
    """How often a row of the class scores above one that is not, ties counting half: the area under the true positive rate by the false
    one, in whole numbers (Hanley, McNeil 1982). None without rows of both sorts."""
    positive, negative = int(curve.right[-1]), int(curve.wrong[-1])
    if not positive or not negative:
        return None
    heights = 2 * curve.right - curve.right.diff(prepend=curve.right.new_zeros(1))
    twice = (curve.wrong.diff(prepend=curve.wrong.new_zeros(1)) * heights).sum().item()
    return twice / (2 * positive * negative)


def average_precision(curve: Curve) -> float | None:
    """Sum over the thresholds of precision times the recall that each adds; None without a row of the class."""
    positive = int(curve.right[-1])
    if not positive:
        return None
    added = curve.right.diff(prepend=curve.right.new_zeros(1))
    return (added * (curve.right.double() / (curve.right + curve.wrong))).sum().item() / positive


class Bins:
    """How many rows score so much for each class, of those that ought to and of the others: what is told of them is off by what happens
    within a bin."""

    def __init__(self, scored: int, device: torch.device) -> None:
        self.fine = bins_of(scored)
        self.counts = torch.zeros(2, scored, self.fine + 1, dtype=torch.int64, device=device)
        """Of others and of rows of the class, by the score; NaN comes last."""

    def add(self, scores: Tensor, truths: Tensor) -> None:
        """(rows, scored) each."""
        steep = (STEEP * scores.float().double().logit()).asinh() / math.asinh(STEEP * WIDEST)
        place = ((steep + 1) * (self.fine / 2)).floor().clamp(0, self.fine - 1)
        place = place.nan_to_num(self.fine).long() + (self.fine + 1) * torch.arange(scores.shape[1], device=scores.device)
        place = place + self.counts[0].numel() * truths.long()
        self.counts += place.reshape(-1).bincount(minlength=self.counts.numel()).view(self.counts.shape)

    def curves(self) -> list[Curve | None]:
        steep = torch.arange(self.fine, device=self.counts.device, dtype=torch.float64) * (2 / self.fine) - 1
        edges = ((steep * math.asinh(STEEP * WIDEST)).sinh() / STEEP).sigmoid().float().flip(0)
        return [self._curve(*pair, edges) for pair in zip(self.counts[0], self.counts[1], strict=True)]

    def _curve(self, others: Tensor, right: Tensor, edges: Tensor) -> Curve | None:
        if int(others[-1] + right[-1]):
            return None
        there = (others[:-1] + right[:-1]).flip(0) > 0
        above = [counts[:-1].flip(0).cumsum(0)[there] for counts in (right, others)]
        return Curve(edges[there], above[0], above[1], exact=False)


def bins_of(scored: int) -> int:
    """How many bins each of so many classes or labels has, a power of two."""
    return 1 << max(LEAST_FINE, min(FINE, COUNTS // max(2 * scored, 1))).bit_length() - 1
