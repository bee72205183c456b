"""What lets networks be deep: residual layers, whose branch adds to what it was given, by a learned scale, and is left out at times."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from dlopt.models.noise import Noisy

Layer = TypeVar("Layer", bound=nn.Module)


class Residual(nn.Module):
    """shortcut(x) + leave_out(scale(branch(x))) (He et al. 2016); without a shortcut, x as it is."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None, scale: float | None = None, leave_out: float = 0.0) -> None:
        """scale: where one learned number for the whole branch starts; None leaves it out. leave_out: as StochasticDepth's."""
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.scale = nn.Identity() if scale is None else Scale(scale)
        self.leave_out = StochasticDepth(leave_out)

    def forward(self, values: Tensor) -> Tensor:
        total: Tensor = self.shortcut(values) + self.leave_out(self.scale(self.branch(values)))
        return total


class Scale(nn.Module):
    """Multiply by a learned number, which starts at `start` (SkipInit: De, Smith 2020; ReZero: Bachlechner et al. 2021)."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([start]))

    def forward(self, values: Tensor) -> Tensor:
        return values * self.factor


class StochasticDepth(Noisy):
    """In training, what a branch adds to a row becomes 0 with probability p, and is divided by 1 - p where it does not, so that its mean
    is what prediction has (Huang et al. 2016). Each row, the first dimension, draws for itself."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return values
        kept = self.kept(values.shape[:1], self.p, values.device).to(values.dtype).mul_(1 / (1 - self.p))
        return values * kept.view(-1, *[1] * (values.dim() - 1))


def rising(most: float, blocks: int) -> list[float]:
    """How often each of so many blocks is left out: linearly more with depth, the last one `most` (Huang et al. 2016)."""
    return [most * number / blocks for number in range(1, blocks + 1)]


def residual_end(layer: Layer) -> Layer:
    """The same layer, marked as the last one with weights of a residual branch: `layers.initialize` can start it with zeros."""
    for part in layer.modules():  # the norm itself may be inside of one that turns its input
        part.residual_end = True  # type: ignore[assignment]
    return layer
