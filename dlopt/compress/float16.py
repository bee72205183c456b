"""Weights in half of the bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from dlopt.compress.base import Compressor

if TYPE_CHECKING:
    from dlopt.compress.model import Model


class Float16(Compressor):
    """Weights are kept in float16, and computed with in float32: half of the file, as fast as before."""

    keeps = fills = True

    kind: Literal["float16"] = "float16"

    def apply(self, model: Model) -> None:
        from dlopt.export.coding import Half

        model.keep(Half.of, self.leave)
