"""Parameter groups: which parameters are trained, at which share of the rate, with which weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

from pydantic import Field
from torch import nn
from torch.nn import Parameter

from dlopt.part import DloptError, Part

MATRICES = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.modules.conv._ConvNd)
"""Modules whose parameters of two dimensions or more are matrices, or filters, from inputs to outputs."""
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
MOST_NAMED = 8


class HasRate(Protocol):
    """An optimizer's part of a job; perhaps it has a `weight_decay`, too."""

    @property
    def lr(self) -> Any: ...

    @property
    def kind(self) -> Any: ...


@runtime_checkable
class TellsHidden(HasRate, Protocol):
    """An optimizer's part of a job that treats matrices of hidden layers apart from the rest, which has a `companion`."""

    @property
    def companion(self) -> Any: ...


class Group(Part):
    """What is different for some parameters."""

    names: str = Field(min_length=1)
    """Which: a pattern on their names as `network.named_parameters()` has them, where * is any text: `body.0.*`, `*.bias`. A parameter
    belongs to the first group that it matches."""
    lr_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """In place of the optimizer's; null leaves it as it is."""
    freeze: bool = False
    """Leave them as they start."""


class Parameters(Part):
    """Differences between the parameters of a network."""

    groups: tuple[Group, ...] = ()
    """Parameters by name, and what is different for them."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate from each layer to the one before it; the last one has the optimizer's. A block counts as a layer."""
    decay_bias_and_norm: bool = False
    """Whether weight decay is for biases and norm layers, too."""

    def of(self, network: nn.Module, optimizer: HasRate) -> list[dict[str, Any]]:
        """torch's parameter groups, in the order of `named_parameters()`; what is frozen needs no gradient from now on and is in none.

        Each has params, names, lr (its peak), weight_decay where it is not the optimizer's own, and for an optimizer that treats matrices
        of hidden layers apart also hidden, whether they are such. There are no more groups than need be, since each costs time in a step.
        Raises DloptError where a pattern matches nothing, and where nothing is left to train.
        """
        assert not isinstance(optimizer.lr, str), "the rate is a number by now"
        chosen, depths, kinds = self._chosen(network, optimizer), layers(network), _kinds(network)
        last, apart = max(depths.values(), default=0), isinstance(optimizer, TellsHidden)
        merged: dict[tuple[float, float | None, bool], dict[str, Any]] = {}
        for name, parameter in network.named_parameters():
            group, kind = chosen.get(name, Group(names=name)), kinds[name]
            if group.freeze:
                parameter.requires_grad_(False)
            if not parameter.requires_grad:
                continue
            rate = optimizer.lr * group.lr_scale * self.layer_decay ** (last - depths[name])
            decay = self._decay(group, kind, optimizer)
            hidden = {"hidden": kind.hidden} if apart else {}
            made = {"params": [], "names": [], "lr": rate} | hidden | ({} if decay is None else {"weight_decay": decay})
            members = merged.setdefault((rate, decay, apart and kind.hidden), made)
            members["params"].append(parameter)
            members["names"].append(name)
        if not merged:
            raise DloptError("train.parameters.groups: all parameters are frozen: leave some to train")
        return list(merged.values())

    def _decay(self, group: Group, kind: _Kind, optimizer: HasRate) -> float | None:
        """A weight decay of its own; None is the optimizer's."""
        if not hasattr(optimizer, "weight_decay"):
            if group.weight_decay is not None:
                raise DloptError(f"train.parameters.groups: {optimizer.kind} has no weight_decay: take it out of {group.names!r}")
            return None
        if group.weight_decay is not None:
            return group.weight_decay
        none_at_all = not optimizer.weight_decay and not isinstance(optimizer, TellsHidden)  # a companion has its own
        return None if self.decay_bias_and_norm or not kind.bias_or_norm or none_at_all else 0.0

    def _chosen(self, network: nn.Module, optimizer: HasRate) -> dict[str, Group]:
        """The group of each parameter that has one."""
        names = [name for name, _ in network.named_parameters()]
        chosen: dict[str, Group] = {}
        for index, group in enumerate(self.groups):
            matched = [name for name in names if fnmatchcase(name, group.names) and name not in chosen]
            if not matched:
                free = [name for name in names if name not in chosen]
                there = ", ".join(free[:MOST_NAMED]) + (", ..." if len(free) > MOST_NAMED else "")
                raise DloptError(f"train.parameters.groups.{index}.names: {group.names!r} matches no parameter: there are {there}")
            chosen |= dict.fromkeys(matched, group)
        return chosen


class _Kind(NamedTuple):
    bias_or_norm: bool
    hidden: bool


def _kinds(network: nn.Module) -> dict[str, _Kind]:
    """What each parameter is. The last matrix is the output layer's, and so no hidden one."""
    owners = {f"{prefix}{name}": (module, value) for prefix, module in _modules(network) for name, value in _own(module)}
    matrices = [name for name, (module, value) in owners.items() if isinstance(module, MATRICES) and value.dim() > 1]
    hidden = set(matrices[:-1])
    return {
        name: _Kind(value.dim() < 2 or isinstance(owners[name][0], NORMS), name in hidden) for name, value in network.named_parameters()
    }


def _modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(what the names of its parameters begin with, module)."""
    for name, module in network.named_modules():
        yield f"{name}." if name else "", module


def _own(module: nn.Module) -> list[tuple[str, Parameter]]:
    return list(module.named_parameters(recurse=False))


def layers(network: nn.Module) -> dict[str, int]:
    """The number of the layer, from 0 and in the order in which they are defined, of each parameter by its name.

    An element of a Sequential or a ModuleList is one layer with all that is in it (a residual block, say), unless it is a list itself.
    Norm layers belong to the layer before them, and parameters of a module around layers (a class token) to the one after them.
    """
    depths: dict[str, int] = {}
    waiting: list[str] = []
    number = -1
    shapes = {name: value.dim() for name, value in network.named_parameters()}
    for names, loose in _stretches(network, "", False):
        if loose:
            waiting += names
            continue
        if number < 0 or any(shapes.get(name, 0) > 1 for name in names):
            number += 1
        depths |= dict.fromkeys(waiting + names, number)
        waiting = []
    return depths | dict.fromkeys(waiting, max(number, 0))


def _stretches(module: nn.Module, prefix: str, whole: bool) -> Iterator[tuple[list[str], bool]]:
    """(names of parameters that stay together, whether they are those of a module around others)."""
    inside = [(name, child) for name, child in module.named_children() if next(child.parameters(), None) is not None]
    if whole or not inside:
        if names := [f"{prefix}{name}" for name, _ in module.named_parameters()]:
            yield names, False
        return
    if own := [f"{prefix}{name}" for name, _ in _own(module)]:
        yield own, True
    lists = (nn.Sequential, nn.ModuleList)
    for name, child in inside:
        yield from _stretches(child, f"{prefix}{name}.", isinstance(module, lists) and not isinstance(child, lists))
