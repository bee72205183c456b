"""Mixed precision: layers and losses computed in half of the bits, by torch's autocast; weights, optimizer and averages stay float32.

Gradients that float16 has no room for are kept by a loss that is multiplied by a scale for the way back (Micikevicius et al. 2018);
bfloat16 reaches as far as float32 and needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlopt.data.feed.batches import Batch
from dlopt.train.loop.objectives import Losses, Objective

Precision = Literal["float32", "float64", "bfloat16", "float16"]
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LOWEST, HIGHEST = 1.0, 2.0**24
"""Below the one, a scale does not make gradients larger; above the other there is nothing left that it could save."""


@dataclass
class LossScale:
    """What losses are multiplied with before gradients are taken, which are divided by it then. A gradient that is not finite makes it
    smaller, many that are make it larger, as torch.amp.GradScaler does. That one looks at the gradients of one worker, which
    in replicas and shares of weights are not those of all, and so could step on some workers and not on others."""

    INTERVAL = 2000
    """After so many good steps in a row a larger scale is tried."""

    scale: float = 2.0**16
    good: int = 0
    """Steps in a row with a finite gradient since the scale was changed."""

    def note(self, finite: bool) -> bool:
        """Take note of a step's gradient; whether it was too large for the scale, which is lower now."""
        if not finite:
            lowered, self.good = self.scale > LOWEST, 0
            self.scale = max(LOWEST, self.scale / 2)
            return lowered
        self.good += 1
        if self.good == self.INTERVAL:
            self.scale, self.good = min(HIGHEST, self.scale * 2), 0
        return False

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be where one was that said this; {} is the start."""
        self.scale, self.good = (state.get(name, start) for name, start in asdict(LossScale()).items())


def scale_of(precision: Precision) -> LossScale | None:
    """At its start, where a precision needs one."""
    return LossScale() if precision == "float16" else None


def computing(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Within it, layers compute in this precision."""
    return torch.autocast(device.type, HALF[precision]) if precision in HALF else nullcontext()


def mixed(objective: Objective, precision: Precision, device: torch.device, scale: LossScale | None = None) -> Objective:
    """The objective computed in this precision, its gradients `scale` times as large; its losses are what they are."""
    if precision not in HALF:
        return objective

    def halved(model: nn.Module, batch: Batch) -> Losses:
        with computing(precision, device):
            losses = objective(model, batch)
        if scale is None:
            return losses
        return losses._replace(loss=_Amplified.apply(losses.loss, scale.scale))

    return halved


class _Amplified(torch.autograd.Function):
    """A number as it is, whose gradient is so many times as large."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None
