"""When to go back and slow down, from numbers that are the same on all workers, so that all decide alike."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from dlopt.part import Part
from dlopt.train.watch.layers import Look


class Divergence(Part):
    """When training counts as diverged, and what is done: back to the newest checkpoint of an epoch's end, and on at a lower rate."""

    patience: int = Field(5, ge=1)
    """Steps in a row with a gradient that is not finite, each of which is left out, before training goes back."""
    factor: float = Field(0.1, gt=0, lt=1)
    """What the learning rate is multiplied with each time."""
    most: int = Field(3, ge=0)
    """How often training goes back before it gives up; 0 gives up at once."""
    loss_factor: float = Field(3.0, gt=1)
    """Training has diverged when five known losses in a row are more than so many times the loss at its start; or when it has blown
    up at its beginning, to the square of that, and after an epoch is hardly better than at the start. A start of less than 1 counts
    as 1."""


class Diverging:
    """Whether training has diverged, from the losses of some steps, means of epochs, and whether gradients are finite.

    It is worse than an untrained network for long; or was so at once and has not recovered: at a rate that is a thousand times too
    high, a network soon gives the same for every row, and then its loss is no more than that at the start. What begins badly and
    recovers, single batches of large loss, and what does not learn, have not diverged. All numbers must be the same on all workers.
    """

    LOSSES, BEGINNING = 5, 50
    """Losses that decide, and steps that are the beginning of training, after which an epoch decides too."""
    BESIDE, RECOVERED = 1.5, 0.8
    """A loss that blew up must have one beside it that is so many times that at the start: a single batch may be odd. Training has
    recovered when its loss is less than this share of that at the start."""

    def __init__(self, divergence: Divergence, start_loss: float | None = None) -> None:
        """start_loss: that of the first step of training, where it is known from before."""
        self.divergence, self.start_loss = divergence, start_loss
        self.load_state_dict({})

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on, but for the loss at the start."""
        kept = {"steps": self.steps, "lost": self.lost, "finite": self.finite, "blown": self.blown}
        return {"losses": list(self.losses), **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another one was that said this; {} is the start."""
        self.losses: deque[float] = deque(state.get("losses", ()), maxlen=self.LOSSES)
        self.steps, self.lost, self.finite = (state.get(name, 0) for name in ("steps", "lost", "finite"))
        self.blown: float = state.get("blown", 0.0)
        self.layer: str | None = None

    def step(self, finite: bool, loss: float | None = None, look: Look | None = None) -> str | None:
        """Take note of a step: whether its gradient was finite, its loss over all workers where that is known (at the first step it
        must be; the more of the early ones the better), and the look at it. Returns why training has diverged, or None."""
        self.steps += 1
        self.lost = 0 if finite else self.lost + 1
        self.finite += finite
        if look:
            self.layer = look.worst
        if loss is not None:
            self._hear(_finite(loss))
        if self.lost >= self.divergence.patience:
            return self._because(f"the gradient was not finite for {self.lost} steps in a row")
        return self._high()

    def epoch(self, mean: float) -> str | None:
        """Take note of the mean loss of an epoch that has ended; it counts as one more loss. Returns why, as `step`."""
        none_finite, self.finite = self.lost > 0 and self.finite == 0, 0
        if none_finite:
            return self._because("no step of the epoch had a gradient that was finite")
        self.losses.append(_finite(mean))
        recent = statistics.median(self.losses)
        if recent < self.RECOVERED * (self.start_loss or 0.0):
            self.blown = 0.0
        elif self.blown and self.steps >= self.BEGINNING:
            return self._because(f"the loss blew up to {self._said(self.blown)}, and is {recent:.3g} now")
        return self._high()

    def _hear(self, loss: float) -> None:
        if self.start_loss is None and loss < math.inf:
            self.start_loss = loss
        less, more = sorted((self.losses[-1] if self.losses else 0.0, loss))
        if self.steps <= self.BEGINNING and more > self.divergence.loss_factor**2 * self._start and less > self.BESIDE * self._start:
            self.blown = max(self.blown, more)
        self.losses.append(loss)

    def _high(self) -> str | None:
        if len(self.losses) < self.LOSSES or min(self.losses) <= self._limit:
            return None
        return self._because(f"the last {self.LOSSES} losses that were looked at were {self._said(min(self.losses))} or more")

    @property
    def _start(self) -> float:
        return max(self.start_loss or 0.0, 1.0)

    @property
    def _limit(self) -> float:
        return self.divergence.loss_factor * self._start

    def _said(self, loss: float) -> str:
        began = "" if self.start_loss is None else f" (training began with {self.start_loss:.3g})"
        return f"{loss:.3g}{began}" if loss < math.inf else f"infinity{began}"

    def _because(self, why: str) -> str:
        return f"{why}; the gradient was largest against the weights in {self.layer}" if self.layer else why


def _finite(loss: float) -> float:
    """Not a number is as bad as infinity."""
    return math.inf if math.isnan(loss) else loss
