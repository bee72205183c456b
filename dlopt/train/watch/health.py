"""The health of training: what a few steps show of each layer, what is wrong with it in words, and when to go back and slow down.

`Watch` reads gradients, weights and activations at a few steps and changes no bit of training. `Diverging` decides from numbers that
are the same on all workers, so that all decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dlopt.models.spread import weighted
from dlopt.train.watch.findings import Reported, symptoms
from dlopt.train.watch.layers import Finding, Health, Layer, Look
from dlopt.train.watch.spikes import Spikes

EARLY = (1, 2, 5, 10, 20, 50)
"""The steps that are watched at the beginning, where most that goes wrong can be seen."""
MOST_ROWS, IDLE_ROWS = 128, 320
"""A unit counts as dead after IDLE_ROWS rows without any output, of which a batch counts for at most MOST_ROWS: three looks or more."""
SATURATED = 0.01
"""How near to its bounds a sigmoid or tanh is saturated, as a share of the way between them."""


class Watch:
    """Looks at a network's layers at a few steps. `ready` comes before every step, `measure` after one that was watched, and `look` once
    its numbers are known."""

    def __init__(
        self,
        network: nn.Module,
        health: Health,
        share: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
        norms: Callable[[Tensor], Tensor] = lambda held: held,
    ) -> None:
        """Where weights are shared out over workers, share: gives this worker's share of a parameter; norms: makes norms of whole tensors
        of those of shares, on all workers at once."""
        self.network, self.health, self.norms = network, health, norms
        learned = {name: [weight for weight in layer.parameters() if weight.requires_grad] for name, layer in weighted(network)}
        whole = {name: some for name, weights in learned.items() if (some := [weight for weight in weights if weight.dim() > 1])}
        self.layers = {name: [share(weight) for weight in weights] for name, weights in whole.items()}
        self.sizes = {name: sum(weight.numel() for weight in weights) for name, weights in whole.items()}
        self.called: list[str] = []
        self.units = Units()
        self.hooks: list[RemovableHandle] = []
        self.modules = dict(network.named_modules())
        self.before: list[Tensor] = []
        self.there: list[bool] = []
        """Of the step that was measured: which weights had a gradient; and layers that have a share of dead units."""
        self.dead: list[str] = []
        self.reported = Reported()
        self.spikes = Spikes()

    def watched(self, step: int) -> bool:
        """Whether step `step`, from 1, is looked at."""
        every = self.health.every
        return bool(every) and (step in EARLY or step % every == 0)

    def ready(self, step: int) -> None:
        """Get ready for step `step`: if it is watched, keep the weights and listen to the activations of the forward pass to come."""
        if not self.watched(step) or not self.layers:
            return
        self._deaf()
        with torch.no_grad():
            self.before = [weight.detach().clone() for weights in self.layers.values() for weight in weights]
        self.units.begin()
        self.hooks = [
            self.network.register_forward_pre_hook(lambda network, args: self.units.listen(True)),
            self.network.register_forward_hook(lambda network, args, outputs: self.units.listen(False)),
            *(self.modules[name].register_forward_pre_hook(self._calls(name)) for name in self.layers),
        ]
        for layer in self.modules.values():
            if still := STILL.get(type(layer)):
                self.hooks.append(layer.register_forward_hook(self.units.hook(*still)))

    def measure(self) -> Tensor | None:
        """After a step that was got ready for: what `look` must know of it, float (numbers,), not yet waited for. All workers call it."""
        if not self.before:
            return None
        self._deaf()
        now = [weight.detach() for weights in self.layers.values() for weight in weights]
        with torch.no_grad():
            before = torch._foreach_norm(self.before)
            torch._foreach_sub_(self.before, now)
            self.there = [weight.grad is not None for weights in self.layers.values() for weight in weights]
            gradients = [weight.grad for weights in self.layers.values() for weight in weights if weight.grad is not None]
            dead = self.units.dead()
            lengths = self.norms(
                torch.stack([*before, *torch._foreach_norm(self.before), *(torch._foreach_norm(gradients) if gradients else ())])
            )
            numbers = torch.cat([lengths, *(one[None].to(lengths) for one in dead.values())])
        self.before, self.dead = [], list(dead)
        return numbers

    def look(
        self, step: int, loss: float, gradient_norm: float, clipped: float = 1.0, measured: Sequence[float] | None = None
    ) -> Look | None:
        """What step `step` shows, or None where nothing was got ready for. clipped: what its gradients were multiplied with to clip them.
        measured: what `measure` gave; without it that is asked now. Losses and norms need not be finite."""
        spike = self.hear(step, loss)
        if measured is None:
            now = self.measure()
            if now is None:
                return None
            measured = now.tolist()
        layers = self._layers(clipped, measured)
        findings = self.reported.new(step, symptoms(layers, gradient_norm, self.health))
        return Look(step, loss, gradient_norm, layers, (*findings, *([spike] if spike else [])))

    def pass_over(self) -> None:
        """Look away from a step that was got ready for."""
        self._deaf()
        self.before = []

    def hear(self, step: int, loss: float) -> Finding | None:
        """Take note of the loss after step `step`, which need not be watched; a finding if it is a spike. Each step is heard once."""
        return self.spikes.new(step, loss) if self.health.every else None

    def state_dict(self) -> dict[str, Any]:
        """All that later findings depend on."""
        heard, units = {"reported": self.reported.state_dict(), "spikes": self.spikes.state_dict()}, self.units
        return {"called": self.called, "saturating": sorted(units.saturating), "idle": dict(units.idle)} | heard

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another one was that said this; {} is the start."""
        self.called, self.units = list(state.get("called", ())), Units()
        device = next((parameter.device for parameter in self.network.parameters()), None)
        self.units.idle = {name: idle.to(device) for name, idle in state.get("idle", {}).items()}
        self.units.saturating = set(state.get("saturating", ()))
        self.reported.load_state_dict(state.get("reported", {}))
        self.spikes.load_state_dict(state.get("spikes", {}))

    def _deaf(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def _calls(self, name: str) -> Callable[[nn.Module, Any], None]:
        def note(layer: nn.Module, args: Any) -> None:
            self.units.last = name
            if name not in self.called and self.units.listening:
                self.called.append(name)

        return note

    def _layers(self, clipped: float, measured: Sequence[float]) -> tuple[Layer, ...]:
        """measured: norms of weights before the step, of what it has changed, and of gradients there are; shares of dead units."""
        count = len(self.there)
        share = dict(zip(self.dead, measured[len(measured) - len(self.dead) :], strict=True))
        weights, updates, gradients, there = iter(measured), iter(measured[count:]), iter(measured[2 * count :]), iter(self.there)
        layers = {}
        for name, parameters in self.layers.items():
            with_gradient = [next(gradients) / clipped for _ in parameters if next(there)]
            layers[name] = Layer(
                name,
                self.sizes[name],
                math.hypot(*with_gradient) if with_gradient else None,
                math.hypot(*(next(weights) for _ in parameters)),
                math.hypot(*(next(updates) for _ in parameters)),
                share.get(name),
                name in self.units.saturating,
            )
        return tuple(layers[name] for name in (*self.called, *(name for name in layers if name not in self.called)))


class Units:
    """For how many rows each unit has given nothing, by the layer with weights that came last before the activation."""

    def __init__(self) -> None:
        self.idle: dict[str, Tensor] = {}
        self.saturating: set[str] = set()
        self.last = ""
        self.listening = False
        """Whether the network is in its forward pass: layers that are called on the way back compute again what has been heard."""

    def begin(self) -> None:
        self.last = ""

    def listen(self, listening: bool) -> None:
        self.listening = listening

    def hook(self, still: Callable[[Tensor, tuple[int, ...]], Tensor], saturates: bool) -> Callable[[nn.Module, Any, Tensor], None]:
        """A hook for an activation. still: outputs and all dimensions but that of the units to whether each unit gives nothing."""

        def note(layer: nn.Module, args: Any, outputs: Tensor) -> None:
            if self.last and len(outputs) and self.listening:
                units = outputs.dim() - 1 if outputs.dim() == 3 else 1
                with torch.no_grad():
                    idle = still(outputs.detach(), tuple(place for place in range(outputs.dim()) if place != units))
                before = self.idle.get(self.last)
                rows = min(len(outputs), MOST_ROWS)
                self.idle[self.last] = idle * (rows if before is None or before.shape != idle.shape else before + rows)
                if saturates:
                    self.saturating.add(self.last)

        return note

    def dead(self) -> dict[str, Tensor]:
        """The share of dead units by layer, each a tensor of one number."""
        return {name: (idle >= IDLE_ROWS).float().mean() for name, idle in self.idle.items()}


def _silent(outputs: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Of what is never below 0: whether it is 0 everywhere."""
    return outputs.amax(dims) == 0


def _stuck(low: float, high: float) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    middle, far = (low + high) / 2, (high - low) * (0.5 - SATURATED)

    def stuck(outputs: Tensor, dims: tuple[int, ...]) -> Tensor:
        return (outputs - middle).abs_().amin(dims) >= far

    return stuck


STILL: dict[type[nn.Module], tuple[Callable[[Tensor, tuple[int, ...]], Tensor], bool]] = {
    nn.ReLU: (_silent, False),
    nn.ReLU6: (_silent, False),
    nn.Sigmoid: (_stuck(0, 1), True),
    nn.Hardsigmoid: (_stuck(0, 1), True),
    nn.Tanh: (_stuck(-1, 1), True),
    nn.Hardtanh: (_stuck(-1, 1), True),
}
"""Activations whose units can give nothing for all rows, how that is told, and whether it is called saturated."""
