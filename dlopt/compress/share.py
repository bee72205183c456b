"""Few different numbers a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dlopt.compress.base import Tuned

if TYPE_CHECKING:
    import numpy as np

    from dlopt.compress.model import Model

ROUNDS = 50


class Share(Tuned):
    """Each layer has so few different weights that a byte tells which one it is (Han et al. 2016): found by k-means, trained on together,
    and kept as a table and the places in it. 0 stays 0, so that a pruned network stays one, and packs best."""

    keeps = True

    kind: Literal["share"] = "share"
    bits: int = Field(5, ge=1, le=8)
    """Each layer has at most 2 to the power of so many different weights, 0 among them."""

    def apply(self, model: Model) -> None:
        import torch

        from dlopt.export.coding import Codebook
        from dlopt.train.tuning import Tied, weights_of

        for weight in weights_of(model.network, self.leave).values():
            with torch.no_grad():
                weight.copy_(torch.from_numpy(clustered(weight.detach().numpy(), 2**self.bits)))
        if self.epochs:
            model.tune(self, Tied(leave=self.leave))
        for name, weight in weights_of(model.network, self.leave).items():
            model.coding[name] = Codebook.of(weight.detach().numpy())


def clustered(weight: np.ndarray, most: int) -> np.ndarray:
    """A weight with at most so many different values, 0 being one if it is there: k-means from evenly spaced values (Lloyd 1957)."""
    import numpy as np

    flat = weight.reshape(-1)
    there = np.sort(flat[flat != 0].astype(np.float64))
    count = most - int(len(there) < len(flat))
    if not len(there) or len(np.unique(there)) <= count:
        return weight
    sums = np.concatenate([[0.0], np.cumsum(there)])
    centres = np.linspace(there[0], there[-1], count)
    for _ in range(ROUNDS):
        ends = np.concatenate([[0], np.searchsorted(there, (centres[1:] + centres[:-1]) / 2), [len(there)]])
        sizes = np.diff(ends)
        moved = np.where(sizes > 0, (sums[ends[1:]] - sums[ends[:-1]]) / np.maximum(sizes, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    middles = (centres[1:] + centres[:-1]) / 2
    found = np.where(flat != 0, centres[np.searchsorted(middles, flat)], 0.0)
    return found.astype(weight.dtype).reshape(weight.shape)
