"""Weights that are 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dlopt.compress.base import Tuned

if TYPE_CHECKING:
    from dlopt.compress.model import Model


class Prune(Tuned):
    """The weights that count least become 0, and stay so while the others are trained on. The file is no smaller, but it can be packed: a
    download is; nor is it faster, since runtimes multiply with zeros as well."""

    kind: Literal["prune"] = "prune"
    sparsity: float = Field(0.9, gt=0, lt=1)
    """Share of the weights that become 0."""
    scope: Literal["global", "layer", "lamp"] = "global"
    """What a weight's size is compared with: all weights of the network, those of its own layer, or (lamp) all of them by their share of
    the squares of those in their layer that are no smaller (Lee et al. 2021), which leaves no layer without any."""
    over: float = Field(0.6, ge=0, le=1)
    """Share of the epochs over which weights become 0, by a cubic schedule (Zhu and Gupta 2017): many at first, few in the end. 0 for all
    at once, before the first step."""

    def apply(self, model: Model) -> None:
        from dlopt.train.tuning import Sparse

        if not self.epochs:
            Sparse(sparsity=self.sparsity, scope=self.scope, over=0.0, leave=self.leave).begin(model.network)
            return
        model.tune(self, Sparse(sparsity=self.sparsity, scope=self.scope, over=self.over, leave=self.leave))
