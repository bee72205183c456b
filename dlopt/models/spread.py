"""How wide the numbers in a network lie, layer by layer: with the weights it starts with, this tells whether signals die out or explode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dlopt.models.layers import ACTIVATIONS, buffers_kept

SATURATED: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Sigmoid: lambda values: (values - 0.5).abs() > 0.49,
    nn.Tanh: lambda values: values.abs() > 0.98,
    nn.Softsign: lambda values: values.abs() > 0.8,
    nn.Hardsigmoid: lambda values: (values - 0.5).abs() > 0.49,
    nn.Hardtanh: lambda values: values.abs() > 0.98,
    nn.ReLU6: lambda values: values >= 6,
}
"""Where the slope of a bounded activation is less than 4 % of its steepest."""


class Seen(NamedTuple):
    """A layer that the forward pass came through, what it gave, and what the activation after it made of that, if there is one."""

    name: str
    layer: nn.Module
    outputs: Tensor
    activation: nn.Module | None = None
    activations: Tensor | None = None


def spread(network: nn.Module, inputs: Any) -> list[dict[str, Any]]:
    """For every layer with weights, in the order of the forward pass: how its weights and its outputs lie, ready for JSON.

    Each is {"layer": dotted name, "kind": "Linear 784->128", "weights": {mean, std, min, max}, "outputs": {mean, std} of what the
    layer gives, "activations": {mean, std, zero, saturated} after the activation that follows it, or of the outputs where none does;
    zero and saturated are shares of the numbers}. A number that is not finite is None. Of a layer that is used several times the
    first time counts; one whose weights are used without calling it is not seen. `inputs` is what the network takes, on its device.

    Dropout is off, batch norm layers take the mean and variance of these rows as in training; the network, its mode, its buffers and
    the random numbers to come are left as they were.
    """
    seen: dict[str, Seen] = {}
    with undisturbed(network), torch.no_grad(), _hooked(network, seen):
        network(inputs)
        return [_described(one) for one in seen.values()]


def weighted(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers that have weights, in the order in which they were made: those without layers inside that have a parameter of
    two or more dimensions, and attention as a whole. A class token that a larger module owns is no layer.
    """
    inside: set[nn.Module] = set()
    for name, layer in network.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            inside.update(layer.children())
            yield name, layer
        elif layer not in inside and not any(True for _ in layer.children()) and _weights(layer):
            yield name, layer


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Within this, a forward pass is that of training without its noise: dropout is off, and batch norm layers take the statistics of
    their own rows, of this process alone. Afterwards modes, buffers and the state of the random numbers are what they were.
    """
    modes = [(layer, layer.training) for layer in network.modules()]
    hooks = [layer.register_forward_pre_hook(_by_these_rows) for layer in network.modules() if _runs(layer)]
    gpus = {parameter.get_device() for parameter in network.parameters() if parameter.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(gpus)), buffers_kept(network):
            network.eval()
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, mode in modes:
            layer.training = mode


def _runs(layer: nn.Module) -> bool:
    """Whether the layer keeps running statistics of its channels: batch norm of torch or ours."""
    return getattr(layer, "running_mean", None) is not None and getattr(layer, "running_var", None) is not None


def _by_these_rows(layer: Any, args: tuple[Tensor, ...]) -> None:
    """Make the mean and (population) variance of what comes in the ones that a batch norm layer out of training uses; of a single
    value there is no variance."""
    values = args[0].movedim(1, -1).flatten(0, -2)
    if len(values) > 1:
        layer.running_mean.copy_(values.mean(dim=0))
        layer.running_var.copy_(values.var(dim=0, correction=0))


@contextmanager
def _hooked(network: nn.Module, seen: dict[str, Seen]) -> Iterator[None]:
    """Within this, `seen` gathers what a forward pass comes through, by name."""
    hooks = [layer.register_forward_hook(_layer_hook(name, seen)) for name, layer in weighted(network)]
    kinds = tuple({type(make()) for make in ACTIVATIONS.values()} - {nn.Identity})
    hooks += [layer.register_forward_hook(_activation_hook(seen)) for layer in network.modules() if isinstance(layer, kinds)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _layer_hook(name: str, seen: dict[str, Seen]) -> Callable[[nn.Module, Any, Any], None]:
    def look(layer: nn.Module, args: Any, outputs: Any) -> None:
        seen.setdefault(name, Seen(name, layer, outputs[0] if isinstance(outputs, tuple) else outputs))

    return look


def _activation_hook(seen: dict[str, Seen]) -> Callable[[nn.Module, Any, Any], None]:
    def look(layer: nn.Module, args: Any, outputs: Tensor) -> None:
        if seen and seen[last := next(reversed(seen))].activation is None:
            seen[last] = seen[last]._replace(activation=layer, activations=outputs)

    return look


def _described(seen: Seen) -> dict[str, Any]:
    weights = torch.cat([weight.detach().flatten() for weight in _weights(seen.layer)]).double()
    outputs = seen.outputs.double()
    after = outputs if seen.activations is None else seen.activations.double()
    saturated = SATURATED.get(type(seen.activation))  # type: ignore[arg-type]  # of no activation: no such key
    return {
        "layer": seen.name,
        "kind": _kind(seen.layer),
        "weights": _moments(weights) | {"min": _number(weights.min()), "max": _number(weights.max())},
        "outputs": _moments(outputs),
        "activations": _moments(after)
        | {"zero": _share(after == 0), "saturated": _share(saturated(after)) if saturated is not None else 0.0},
    }


def _weights(layer: nn.Module) -> list[Tensor]:
    """What counts as weights: not biases. Of attention, those of the layer that joins the heads too."""
    if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding | nn.EmbeddingBag):
        return [layer.weight]
    return [parameter for parameter in layer.parameters() if parameter.dim() > 1 and parameter.numel()]


def _kind(layer: nn.Module) -> str:
    """The class and the sizes of a layer: Linear 784->128, Conv2d 1->16 3x3, Embedding 100x64, MultiheadAttention 64, 4 heads."""
    kind = type(layer).__name__.lstrip("_")
    if isinstance(layer, nn.Linear):
        return f"{kind} {layer.in_features}->{layer.out_features}"
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return f"{kind} {layer.in_channels}->{layer.out_channels} {'x'.join(map(str, layer.kernel_size))}"
    if isinstance(layer, nn.MultiheadAttention):
        return f"{kind} {layer.embed_dim}, {layer.num_heads} heads"
    return f"{kind} {', '.join('x'.join(map(str, weight.shape)) for weight in _weights(layer))}"


def _moments(values: Tensor) -> dict[str, float | None]:
    return {"mean": _number(values.mean()), "std": _number(values.std(correction=0))}


def _share(chosen: Tensor) -> float | None:
    return _number(chosen.double().mean())


def _number(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
