"""Networks with fewer channels and units."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dlopt.compress.base import Tuned
from dlopt.part import DloptError

if TYPE_CHECKING:
    from dlopt.compress.model import Model

STEPS = 100
"""Into so many small steps the way is cut, of which those are taken that are needed."""


class Channels(Tuned):
    """Channels of convolutions and units of layers go that count least, with all that depends on them, by torch-pruning (Fang et al. 2023):
    matrices are smaller, and so are the file and the time. Training on afterwards brings most of the metric back."""

    kind: Literal["channels"] = "channels"
    work: float = Field(0.5, gt=0, lt=1)
    """Share of the multiply-adds that is left."""
    round_to: int = Field(4, ge=1)
    """How many channels each layer keeps is a multiple of this, which processors are fast at."""

    def check(self) -> None:
        try:
            import torch_pruning  # noqa: F401
        except ImportError:
            raise DloptError("compress: channels: needs the package torch-pruning: pip install 'dlopt[compress]'") from None

    def apply(self, model: Model) -> None:
        import torch
        import torch_pruning as tp
        from torch import nn

        from dlopt.compress.measure import counted
        from dlopt.export.trained import examples

        given = dict(zip((feature.name for feature in model.signature.inputs), examples(model.signature), strict=True))
        with torch.no_grad():
            inputs = model.network.preprocess(given)
        head = [layer for layer in model.network.modules() if isinstance(layer, nn.Linear)][-1]
        left: list[Any] = [head, *(model.network.get_submodule(name.rpartition(".")[0]) for name in self._left(model))]
        before = counted(model.network, model.signature)["multiply_adds"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.network.body.train()
            pruner = tp.pruner.BasePruner(
                model.network.body,
                inputs,
                forward_fn=lambda body, tensors: body(tensors),
                importance=tp.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=1.0,
                max_pruning_ratio=0.95,
                iterative_steps=STEPS,
                global_pruning=True,
                isomorphic=True,
                ignored_layers=left,
                round_to=self.round_to,
            )
            model.network.body.eval()
            for _ in range(STEPS):
                if counted(model.network, model.signature)["multiply_adds"] <= self.work * before:
                    break
                pruner.step()
            else:
                raise DloptError(f"compress: channels: {self.work:g} of the multiply-adds cannot be had: raise work, or lower round_to")
        model.coding = {}
        if self.epochs:
            model.tune(self, None)

    def _left(self, model: Model) -> list[str]:
        from fnmatch import fnmatch

        from dlopt.train.tuning import weights_of

        return [name for name in weights_of(model.network) if any(fnmatch(name, pattern) for pattern in self.leave)]
