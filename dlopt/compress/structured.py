"""Layers with fewer channels."""

from __future__ import annotations

import copy
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dlopt.compress.base import Tuned
from dlopt.part import DloptError

if TYPE_CHECKING:
    from torch import nn

    from dlopt.compress.model import Model
    from dlopt.models import Network

SHARES = tuple(step / 40 for step in range(1, 40))
"""Shares of channels that are tried, until what is left is little enough work."""


class Structured(Tuned):
    """Whole channels and units are taken out, those whose weights are least in all layers that share them: matrices are really smaller, so
    the network is faster in any runtime. By torch-pruning (Fang et al. 2023), which finds what belongs together, as in residual blocks."""

    kind: Literal["structured"] = "structured"
    work: float = Field(0.5, gt=0, lt=1)
    """Share of the multiplications of a row that are left at most."""
    scope: Literal["layer", "global"] = "layer"
    """Whether each layer loses the same share of its channels, or those go first that count least in the whole network."""
    multiple: int = Field(8, ge=1)
    """Of what number of channels layers keep a multiple, where they have as many: processors compute with 8 or 16 at once."""

    def check(self) -> None:
        try:
            import torch_pruning  # noqa: F401
        except ImportError:
            raise DloptError("compress: structured: needs the package torch_pruning: pip install 'dlopt[structured]'") from None

    def apply(self, model: Model) -> None:
        from dlopt.compress.measure import counted

        self.check()
        plain = least = counted(model.network, model.signature)["multiply_adds"]
        for share in SHARES:
            network = self._narrower(model, share)
            left = counted(network, model.signature)["multiply_adds"]
            least = min(least, left)
            if left <= self.work * plain:
                break
        else:
            raise DloptError(f"compress: structured: {least / plain:.2f} of the work is left at least: raise work, or lower multiple")
        model.network, model.coding = self._built_anew(model, network), {}
        if self.epochs:
            model.tune(self, None)

    def _narrower(self, model: Model, share: float) -> Network:
        """A copy without this share of its channels. Raises DloptError for a network that is not cut so."""
        import torch
        import torch_pruning

        from dlopt.export.trained import examples

        network = copy.deepcopy(model.network)
        inputs = {feature.name: one for feature, one in zip(model.signature.inputs, examples(model.signature), strict=True)}
        given = network.preprocess({name: values.float() if values.dtype == torch.float64 else values for name, values in inputs.items()})
        try:
            torch_pruning.BasePruner(
                network.body,
                given,
                importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=share,
                max_pruning_ratio=0.95,
                global_pruning=self.scope == "global",
                ignored_layers=_kept(network, self.leave),
                round_to=self.multiple,
                customized_pruners=_norms(),
                forward_fn=lambda body, values: body(values),
            ).step()
        except Exception as error:  # of torch-pruning, whose own are of many types
            raise DloptError(f"compress: structured: a network of kind {model.fit.model.kind} cannot be cut: {_said(error)}") from error
        return network

    def _built_anew(self, model: Model, network: Network) -> Network:
        """The same, as it will be built of its weights. Raises DloptError where that is another one."""
        import torch

        from dlopt.export.trained import examples
        from dlopt.train.start import network_with

        inputs = {feature.name: one for feature, one in zip(model.signature.inputs, examples(model.signature), strict=True)}
        inputs = {name: values.float() if values.dtype == torch.float64 else values for name, values in inputs.items()}
        try:
            built = network_with(model.fit, model.data, network.state_dict()).float()
            with torch.no_grad():
                wanted, found = network.eval()(inputs), built(inputs)
            if found.shape[1] != model.signature.num_outputs:
                raise ValueError("its outputs would be fewer")
            torch.testing.assert_close(found, wanted)
        except Exception as error:  # whatever a layer does that has another size than it was made for
            kind = model.fit.model.kind
            raise DloptError(
                f"compress: structured: a network of kind {kind} cannot be built with fewer channels: {_said(error)}"
            ) from error
        return built


def _kept(network: Network, leave: tuple[str, ...]) -> list[nn.Module]:
    """The layers that keep all that they give: the last one, whose outputs are the answer, and those that are to be left."""
    from dlopt.train.tuning import weights_of

    names = list(weights_of(network))
    return [
        network.get_submodule(name.rpartition(".")[0])
        for place, name in enumerate(names)
        if place == len(names) - 1 or any(fnmatch(name, pattern) for pattern in leave)
    ]


def _norms() -> dict[Any, Any]:
    """How our batch normalisation, which is none of torch's, loses channels."""
    import torch
    from torch import nn
    from torch_pruning.pruner.function import BasePruningFunc

    from dlopt.models.norms import BatchNorm

    class Channels(BasePruningFunc):
        def prune_out_channels(self, layer: Any, idxs: Any) -> Any:
            gone = set(idxs)
            left = torch.tensor([place for place in range(len(layer.weight)) if place not in gone])
            for name in ("weight", "bias"):
                setattr(layer, name, nn.Parameter(getattr(layer, name).detach()[left]))
            for name in ("running_mean", "running_var"):
                setattr(layer, name, getattr(layer, name)[left])
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: Any) -> int:
            return len(layer.weight)

        get_in_channels = get_out_channels

    return {BatchNorm: Channels()}


def _said(error: Exception) -> str:
    """A line of it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
