"""Weights that are 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from dlopt.compress.base import Tuned

if TYPE_CHECKING:
    from dlopt.compress.model import Model


class Prune(Tuned):
    """The weights that count least become 0, and stay so while the others are trained on. The file is no smaller, but it can be packed: a
    download is; nor is it faster, since runtimes multiply with zeros as well."""

    kind: Literal["prune"] = "prune"
    sparsity: float = Field(0.9, gt=0, lt=1)
    """Share of the weights that become 0."""
    scope: Literal["global", "layer", "lamp", "movement"] = "global"
    """What a weight's size is compared with: all weights of the network, those of its own layer, or (lamp) all of them by their share of
    the squares of those in their layer that are no smaller (Lee et al. 2021), which leaves no layer without any. By movement, what counts
    is not how large a weight is, but how much further from 0 it has got in these epochs (Sanh et al. 2020)."""
    over: float = Field(0.6, ge=0, le=1)
    """Share of the epochs over which weights become 0, by a cubic schedule (Zhu and Gupta 2017): many at first, few in the end. 0 for all
    at once, before the first step."""
    rewind: float | None = Field(None, ge=0, lt=1)
    """Then the network is trained again as the job says, from its first weights, and from this share of its epochs on without those that
    had become 0: 0 for a lottery ticket (Frankle and Carbin 2019), a tenth for one that large networks need (Frankle et al. 2020)."""
    rounds: int = Field(1, ge=1)
    """With rewind: how often, each time with more zeros, and a whole training each."""

    @model_validator(mode="after")
    def movement_is_seen_in_training(self) -> Self:
        if self.scope == "movement" and not (self.epochs and self.over):
            raise ValueError("scope: movement is seen while weights are trained: give epochs, and over above 0")
        return self

    @model_validator(mode="after")
    def rounds_go_back(self) -> Self:
        if self.rounds > 1 and self.rewind is None:
            raise ValueError(f"rounds: {self.rounds} of them need rewind, the share of the epochs that each goes back to, such as 0")
        return self

    def apply(self, model: Model) -> None:
        from dlopt.train.tuning import Sparse

        out = model.out
        for done in range(1, self.rounds + 1):
            if self.rewind is not None:
                model.out = out
                model.out = model.scratch(f"round-{done}")
            sparsity = 1 - (1 - self.sparsity) ** (done / self.rounds)
            hold = Sparse(sparsity=sparsity, scope=self.scope, over=self.over if self.epochs else 0.0, leave=self.leave)
            if self.epochs:
                model.tune(self, hold)
            else:
                hold.begin(model.network)
            if self.rewind is not None:
                model.out = model.scratch("again")
                model.again(self.rewind, self.leave)
        model.out = out
