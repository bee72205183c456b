"""From which probability on a row is called positive, or is given a label: as the job says, or the best one on the validation split.

The best one is found among all that make a difference: of n different probabilities there are n ways to draw the line, and each is
tried. The line is drawn midway between the two probabilities that it separates, so that rounding in another runtime moves no row of
that split across it. Of several that are as good, the one nearest to a half is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dlopt.part import Part, Signature, Target
from dlopt.train.measure.curves import Curve

HALF = 0.5
"""Where nothing else is known: a label of which the split has no row, or that all rows have."""


class Tuned(Part):
    """The threshold that is best on the validation split, found once training has ended; of labels, one for each. While it goes on, epochs
    are judged at one half."""

    kind: Literal["tuned"] = "tuned"
    metric: Literal["f1", "balanced_accuracy", "youden"] = "f1"
    """What it is best for: F1; or the mean of the shares of positive and of other rows that are right, which is greatest where their sum
    less 1 is, Youden's J (1950): these two choose the same."""


Threshold = Annotated[float, Field(gt=0, lt=1)] | Tuned


def fixed(threshold: Threshold | None, target: Target) -> tuple[float, ...]:
    """The target's thresholds while a model is trained: one number for the positive class, or for each label; () for a half."""
    if threshold is None or isinstance(threshold, Tuned):
        return ()
    return (threshold,) * (target.size if target.kind == "multi_label" else 1)


def tuned(section: Tuned, curves: Sequence[Curve | None]) -> tuple[float, ...]:
    """The best thresholds for some rows: of the positive one of two classes, or of each label, of which there are curves."""
    return tuple(best(section.metric, curve) for curve in curves)


def best(metric: str, curve: Curve | None) -> float:
    """A half where there are no rows of both sorts, or a probability is NaN."""
    if curve is None or not curve.right[-1] or not curve.wrong[-1]:
        return HALF
    value, cuts = _values(metric, curve), _cuts(curve.scores) if curve.exact else curve.scores
    cuts = cuts[value == value.max()]
    return float(cuts[(cuts - HALF).abs().argmin()])


def signed(content: str | bytes, thresholds: tuple[float, ...]) -> bytes:
    """A signature.json whose target has these thresholds; as it is without any."""
    if not thresholds:
        return content.encode() if isinstance(content, str) else content
    signature = Signature.model_validate_json(content)
    target = signature.target.model_copy(update={"thresholds": thresholds})
    return signature.model_copy(update={"target": target}).model_dump_json().encode()


def _values(metric: str, curve: Curve) -> Tensor:
    """For each line that can be drawn: F1, or what is greatest where J is, in whole numbers so that equal ones are equal."""
    if metric == "f1":
        return 2 * curve.right.double() / (curve.right + curve.wrong + curve.right[-1])
    return curve.right * curve.wrong[-1] - curve.wrong * curve.right[-1]


def _cuts(scores: Tensor) -> Tensor:
    """A number above the next lower score (for the lowest one, above 0) and not above each of these, which fall; all float32 (n,)."""
    lower = torch.cat([scores[1:], scores.new_zeros(1)])
    middle = ((scores.double() + lower.double()) / 2).float()
    return torch.where(middle > lower, middle, scores)
