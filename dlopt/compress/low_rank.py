"""Matrices as products of two narrow ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dlopt.compress.base import Tuned
from dlopt.part import DloptError

if TYPE_CHECKING:
    from torch import Tensor

    from dlopt.compress.model import Model


class LowRank(Tuned):
    """The weight of a layer becomes the product of two narrower ones, by its singular values (Eckart and Young 1936), wherever that has
    fewer numbers: smaller and faster at once."""

    kind: Literal["low_rank"] = "low_rank"
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the sum of squared singular values that is kept."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """How many singular values are kept of each layer."""

    @model_validator(mode="after")
    def one_of_energy_and_rank(self) -> Self:
        if (self.energy is None) == (self.rank is None):
            raise ValueError("give one of energy and rank")
        return self

    def apply(self, model: Model) -> None:
        import torch
        from torch import nn

        from dlopt.models.shape import in_two, put
        from dlopt.train.tuning import weights_of

        changed = 0
        for name in weights_of(model.network, self.leave):
            layer = model.network.get_submodule(name.removesuffix(".weight"))
            if not isinstance(layer, nn.Linear | nn.Conv2d) or (isinstance(layer, nn.Conv2d) and layer.groups > 1):
                continue
            matrix = layer.weight.detach().flatten(1).double()
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            kept = self._kept(values)
            if kept * sum(matrix.shape) >= matrix.numel():
                continue
            two: Any = in_two(layer, kept)
            root = values[:kept].sqrt()
            with torch.no_grad():
                two[0].weight.copy_((root[:, None] * right[:kept]).view_as(two[0].weight))
                two[1].weight.copy_((left[:, :kept] * root).view_as(two[1].weight))
                if layer.bias is not None:
                    two[1].bias.copy_(layer.bias)
            put(model.network, name.removesuffix(".weight"), two)
            changed += 1
        if not changed:
            what = f"energy {self.energy:g}" if self.energy else f"rank {self.rank}"
            raise DloptError(f"compress: low_rank: with {what} no layer has fewer numbers than before: lower it")
        model.coding = {}
        if self.epochs:
            model.tune(self, None)

    def _kept(self, values: Tensor) -> int:
        if self.rank is not None:
            return min(self.rank, len(values))
        shares = values.square().cumsum(0) / values.square().sum().clamp_min(1e-300)
        return min(len(values), int((shares < (self.energy or 1.0) - 1e-12).sum()) + 1)
