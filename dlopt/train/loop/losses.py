"""Losses: what a row costs. The union at the end is the list of what a job can name; without a name the kind of the target decides.

| kind | targets | a row's loss | source |
|---|---|---|---|
| cross_entropy | category | -log p of its class | |
| binary | multi_label | mean over the labels of -log p of having the label, or of not having it | |
| focal | category, multi_label | the same, each term times (1 - p)^gamma | Lin et al., Focal Loss for Dense Object Detection, 2017 |
| squared | number | mean over the numbers of e^2 | |
| absolute | number | mean over the numbers of abs(e) | |
| huber | number | mean of e^2 / 2 up to delta, and of delta (abs(e) - delta / 2) beyond | Huber 1964 |
| quantile | number | mean of q e where the prediction is too low, and of (1 - q) abs(e) where too high | Koenker, Bassett 1978 |

p is the probability that the model gives to what is so; e is the error in standard deviations of the training rows, so that every
number weighs the same. Label smoothing (Szegedy et al., Rethinking the Inception Architecture, 2016) takes (1 - s) of the target as
it is and spreads s evenly over all classes, or over having and not having a label. Class weights multiply the term of their class.
No loss is divided by anything that depends on the batch, so those of any parts of a batch add up to that of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.models import Units
from dlopt.part import Part, Target

Loss = Callable[[Tensor, Tensor, str], Tensor]
"""Outputs (rows, outputs), targets and "none" or "sum" to the losses of the rows (rows,), or their sum."""
Smoothing = Annotated[float, Field(ge=0, lt=1)]


class _Kind(Protocol):
    """What the parts of the union have in common."""

    targets: ClassVar[tuple[str, ...]]

    def of(self, target: Target, output: nn.Module, weights: Tensor | None) -> Loss: ...


class CrossEntropy(Part):
    """Cross-entropy of one of several classes."""

    targets: ClassVar[tuple[str, ...]] = ("category",)
    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Smoothing = 0.0
    """How much of the target is spread evenly over all classes."""

    def of(self, target: Target, output: nn.Module, weights: Tensor | None) -> Loss:
        smoothing = self.label_smoothing
        return lambda outputs, wanted, reduction: F.cross_entropy(outputs, wanted, weights, reduction=reduction, label_smoothing=smoothing)


class Binary(Part):
    """Binary cross-entropy of each of any number of labels."""

    targets: ClassVar[tuple[str, ...]] = ("multi_label",)
    kind: Literal["binary"] = "binary"
    label_smoothing: Smoothing = 0.0
    """How much of the target is spread evenly over having a label and not having it."""

    def of(self, target: Target, output: nn.Module, weights: Tensor | None) -> Loss:
        absent, ratio = (None, None) if weights is None else (weights[0], weights[1] / weights[0])

        def loss(outputs: Tensor, wanted: Tensor, reduction: str) -> Tensor:
            share = _smoothed(wanted.to(outputs.dtype), self.label_smoothing)
            each = F.binary_cross_entropy_with_logits(outputs, share, absent, pos_weight=ratio, reduction="none")
            return _mean(each, reduction)

        return loss


class Focal(Part):
    """Cross-entropy that counts a row the less the surer the model is of it: for classes of which one is rare."""

    targets: ClassVar[tuple[str, ...]] = ("category", "multi_label")
    kind: Literal["focal"] = "focal"
    gamma: float = Field(2.0, ge=0)
    """How much less: the loss is multiplied by (1 - p)^gamma; 0 is cross-entropy. The paper's alpha is `class_weights`."""
    label_smoothing: Smoothing = 0.0
    """How much of the target is spread evenly over all classes, or over having a label and not having it."""

    def of(self, target: Target, output: nn.Module, weights: Tensor | None) -> Loss:
        return self._labels(weights) if target.kind == "multi_label" else self._classes(weights)

    def _classes(self, weights: Tensor | None) -> Loss:
        """Sum over the classes of what they have of the smoothed target; without smoothing only the row's own class has any."""

        def loss(outputs: Tensor, wanted: Tensor, reduction: str) -> Tensor:
            logs = F.log_softmax(outputs, dim=1)
            own = _focal(logs.gather(1, wanted[:, None])[:, 0], self.gamma)
            losses = own if weights is None else own * weights[wanted]
            if self.label_smoothing:
                each = _focal(logs, self.gamma) * (1 if weights is None else weights)
                losses = (1 - self.label_smoothing) * losses + self.label_smoothing * each.mean(dim=1)
            return losses.sum() if reduction == "sum" else losses

        return loss

    def _labels(self, weights: Tensor | None) -> Loss:
        absent, present = (1.0, 1.0) if weights is None else (weights[0], weights[1])

        def loss(outputs: Tensor, wanted: Tensor, reduction: str) -> Tensor:
            share = _smoothed(wanted.to(outputs.dtype), self.label_smoothing)
            has = present * share * _focal(F.logsigmoid(outputs), self.gamma)
            has_not = absent * (1 - share) * _focal(F.logsigmoid(-outputs), self.gamma)
            return _mean(has + has_not, reduction)

        return loss


class _OfNumbers(Part):
    """A loss of numbers is a function of their errors, (rows, numbers), in standard deviations; above 0 they are too high."""

    targets: ClassVar[tuple[str, ...]] = ("number",)

    def of(self, target: Target, output: nn.Module, weights: Tensor | None) -> Loss:
        assert isinstance(output, Units)
        return lambda outputs, wanted, reduction: _mean(self.of_errors((outputs - wanted) / output.std), reduction)

    def of_errors(self, errors: Tensor) -> Tensor:
        raise NotImplementedError


class Squared(_OfNumbers):
    """Squared error: the best prediction is the mean."""

    kind: Literal["squared"] = "squared"

    def of_errors(self, errors: Tensor) -> Tensor:
        return errors.square()


class Absolute(_OfNumbers):
    """Absolute error: the best prediction is the median, and outliers pull less."""

    kind: Literal["absolute"] = "absolute"

    def of_errors(self, errors: Tensor) -> Tensor:
        return errors.abs()


class Huber(_OfNumbers):
    """Squared error where it is small, absolute error where it is large."""

    kind: Literal["huber"] = "huber"
    delta: float = Field(1.0, gt=0)
    """From which error on it is absolute, in standard deviations of the training rows."""

    def of_errors(self, errors: Tensor) -> Tensor:
        return F.huber_loss(errors, torch.zeros_like(errors), reduction="none", delta=self.delta)


class Quantile(_OfNumbers):
    """Pinball loss: the best prediction is a quantile."""

    kind: Literal["quantile"] = "quantile"
    quantile: float = Field(0.5, gt=0, lt=1)
    """Which one: so large a share of the values is to lie below the prediction; 0.5 is the median."""

    def of_errors(self, errors: Tensor) -> Tensor:
        return torch.maximum((1 - self.quantile) * errors, -self.quantile * errors)


LOSSES: tuple[type[_Kind], ...] = (CrossEntropy, Binary, Focal, Squared, Absolute, Huber, Quantile)
LossPart = Annotated[CrossEntropy | Binary | Focal | Squared | Absolute | Huber | Quantile, Field(discriminator="kind")]
DEFAULTS: dict[str, LossPart] = {"category": CrossEntropy(), "multi_label": Binary(), "number": Squared()}
"""What there is without a word, by the kind of the target."""


def loss_of(part: LossPart | None, target: Target, output: nn.Module, weights: Tensor | None = None) -> Loss:
    """The loss that a job names, or that of the target's kind. output: the network's output layer. weights: as `class_weights` gives
    them: (classes,), or (2, labels) of not having a label and of having it."""
    return (part or DEFAULTS[target.kind]).of(target, output, weights)


def unsmoothed(part: LossPart | None) -> LossPart | None:
    """The loss that splits are measured by: smoothed targets are for training, and true ones tell how good the model is."""
    return part.model_copy(update={"label_smoothing": 0.0}) if isinstance(part, CrossEntropy | Binary | Focal) else part


def losses_for(kind: str) -> tuple[str, ...]:
    """The losses of a kind of target, by their names."""
    return tuple(str(loss.model_fields["kind"].default) for loss in LOSSES if kind in loss.targets)  # type: ignore[attr-defined]


def _focal(logs: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma times -log p. Just below p = 1, where the slope of a power less than 1 has no bound, the factor is held."""
    most = -torch.finfo(logs.dtype).eps
    return -logs * (-torch.expm1(logs.clamp(max=most))).pow(gamma)


def _smoothed(share: Tensor, smoothing: float) -> Tensor:
    """How much of a label a row has: 0 or 1, moved towards a half."""
    return share * (1 - smoothing) + smoothing / 2 if smoothing else share


def _mean(losses: Tensor, reduction: str) -> Tensor:
    """(rows, outputs) to the mean of each row, or the sum of these means."""
    return losses.mean(dim=1) if reduction == "none" else losses.sum() / losses.shape[1]
