"""What the fields of all optimizers share: their ranges, the groups that they are built of, and libraries that may be missing."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from dlopt.part import DloptError

Above0 = Annotated[float, Field(gt=0)]
From0 = Annotated[float, Field(ge=0)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
"""How much of an average goes on in the next one."""
Rate = Above0 | Literal["auto"]
"""A peak learning rate, or `auto`: then a range test proposes it before training, and a part with that number is built."""
Unit = Literal["number", "parameter", "all"]
"""What a number's step depends on: the number alone, the whole of its parameter, or all parameters. Workers can share out nothing less."""
Groups = Iterable[Parameter] | Iterable[dict[str, Any]]
"""Parameters, or torch's groups of them as `dlopt.optim.groups` makes them: params, lr, names, hidden, perhaps weight_decay."""


def as_groups(groups: Groups) -> list[dict[str, Any]]:
    """Groups as they are (a dictionary of its own each), or the parameters as one group."""
    given = list(groups)
    copies = [dict(group) for group in given if isinstance(group, dict)]
    return copies or [{"params": given}]


def divided(groups: Groups, wanted: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups that have `wanted` set, and the others; bare parameters are divided into those with two dimensions or more, and the others."""
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for group in as_groups(groups):
        if wanted in group:
            parts[0 if group[wanted] else 1].append(group)
            continue
        for index, few in enumerate(by_dimensions(group)):
            if few["params"]:
                parts[index].append(few)
    return parts


def by_dimensions(group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A group's parameters of two dimensions or more, and its vectors and single numbers."""
    names = group.get("names", [""] * len(group["params"]))
    pairs = list(zip(names, group["params"], strict=True))
    several, one = [pair for pair in pairs if pair[1].dim() > 1], [pair for pair in pairs if pair[1].dim() < 2]
    return _group_of(group, several), _group_of(group, one)


def _group_of(group: dict[str, Any], pairs: list[tuple[str, Parameter]]) -> dict[str, Any]:
    names = {"names": [name for name, _ in pairs]} if "names" in group else {}
    return group | {"params": [parameter for _, parameter in pairs]} | names


def one_rate(groups: Groups, kind: str) -> list[dict[str, Any]]:
    """The groups. Raises DloptError where they have different rates and the optimizer has one for all."""
    copies = as_groups(groups)
    if len({group.get("lr") for group in copies}) > 1:
        raise DloptError(f"train.parameters: {kind} has one rate for all parameters: take out lr_scale and layer_decay")
    return copies


def library(module: str, kind: str) -> Any:
    """A library of optimizers. Raises DloptError where it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        package = module.replace("_", "-")
        raise DloptError(f"train.optimizer: {kind} needs {package}: pip install 'dlopt[optimizers]'") from None


def keeping_gradients(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer, working on copies of the gradients, since it overwrites them: who looks at `.grad` after a step sees them whole."""
    kept: list[tuple[Parameter, Tensor]] = []

    def lend(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        kept[:] = [(p, p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for parameter, gradient in kept:
            parameter.grad = gradient.clone()

    def give_back(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, gradient in kept:
            parameter.grad = gradient
        kept.clear()

    optimizer.register_step_pre_hook(lend)
    optimizer.register_step_post_hook(give_back)
    return optimizer
