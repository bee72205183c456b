"""The health of training: what a few steps show of each layer, what is wrong with it in words, and when to go back and slow down.

`Watch` reads gradients, weights and activations at a few steps and changes no bit of training. `Diverging` decides from numbers that
are the same on all workers, so that all decide alike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dlopt.part import Part

EARLY = (1, 2, 5, 10, 20, 50)
"""The steps that are watched at the beginning, where most that goes wrong can be seen."""
SETTLED, LOOKS = 20, 2
"""From which step on, and after how many looks in a row that show it, a gradient is said to vanish: behind layers that start at 0
gradients have yet to come."""
RUN = 4
"""So many layers in a row make a vanishing gradient anywhere; at the beginning of the network one is enough."""
JUMP = 10.0
"""So many times the size of the weights, an update is no step any more."""
MOST_ROWS, IDLE_ROWS = 128, 320
"""A unit counts as dead after IDLE_ROWS rows without any output, of which a batch counts for at most MOST_ROWS: three looks or more."""
SATURATED = 0.01
"""How near to its bounds a sigmoid or tanh is saturated, as a share of the way between them."""
LEAST_SCALE = 0.03
"""The root mean square that weights count for at least when gradients and updates are compared with them: zeros have no size."""
WINDOW, CALM = 50, 10
"""Losses that a spike is told from, and how few of them are too few."""
SPIKE, DEVIATIONS = 3.0, 8.0
"""A spike is more than SPIKE times the median of the losses before it, and more than so many deviations above it."""
NAMED = 3
"""Layers that are named one by one in a line."""

Kind = Literal["vanishing", "exploding", "dead", "saturated", "update", "not_finite", "spike"]


class Health(Part):
    """How closely the layers are watched in training, and what counts as ill."""

    every: int = Field(100, ge=0)
    """Steps between two looks at all layers, after those at steps 1, 2, 5, 10, 20 and 50; 0 never looks, at losses neither."""
    vanishing: float = Field(1e-4, gt=0, lt=1)
    """A layer's gradient has vanished when its norm is less than this share of that of a later layer."""
    exploding: float = Field(100.0, gt=1)
    """A layer's gradient explodes when its norm is more than so many times that of the weights."""
    dead: float = Field(0.5, gt=0, le=1)
    """The share of a layer's units from which on it is said that they give 0 for every row, or are stuck at the bounds of a sigmoid
    or tanh."""


class Finding(NamedTuple):
    """Something that is wrong, in one line that names layers and says what to try."""

    step: int
    kind: Kind
    layers: tuple[str, ...]
    says: str

    def as_json(self) -> dict[str, Any]:
        return self._asdict() | {"layers": list(self.layers)}


class Layer(NamedTuple):
    """A layer at one step. Norms are 2-norms over its weights, biases not among them."""

    name: str
    size: int
    """How many weights it has."""
    gradient: float | None
    """None of a layer that has had no part in the step."""
    weights: float
    """Before the step."""
    update: float
    """Of what the step has changed."""
    dead: float | None
    """The share of units that have given nothing for many rows; None where no activation that can be dead follows."""
    saturates: bool
    """Whether dead means stuck at the bounds, as of a sigmoid, not 0."""

    @property
    def ratio(self) -> float:
        """Update to weights; about 1e-3 is usual."""
        return self.update / max(self.weights, self.floor)

    @property
    def pull(self) -> float:
        """Gradient to weights."""
        return (self.gradient or 0.0) / max(self.weights, self.floor)

    @property
    def floor(self) -> float:
        return LEAST_SCALE * math.sqrt(self.size)


class Look(NamedTuple):
    """What one step shows."""

    step: int
    loss: float
    gradient_norm: float
    layers: tuple[Layer, ...]
    """In the order of the forward pass."""
    findings: tuple[Finding, ...]
    """What is said for the first time."""

    def as_json(self) -> dict[str, Any]:
        """A line of health.jsonl: a list of numbers for each norm, in the order of `layers`; null is what is not finite or not there."""
        columns = ("gradient", "weights", "update", "ratio", "dead")
        numbers = {name: [rounded(getattr(layer, name)) for layer in self.layers] for name in columns}
        return {
            "step": self.step,
            "loss": rounded(self.loss),
            "gradient_norm": rounded(self.gradient_norm),
            "layers": [layer.name for layer in self.layers],
            **numbers,
            "findings": [finding.as_json() for finding in self.findings],
        }

    @property
    def worst(self) -> str | None:
        """The layer whose gradient is not finite, or else largest against its weights; None where there is none."""
        there = [layer for layer in self.layers if layer.gradient is not None]
        lost = [layer for layer in there if not math.isfinite(layer.gradient or 0.0)]
        return (lost[0] if lost else max(there, key=lambda layer: layer.pull)).name if there else None


class Watch:
    """Looks at a network's layers at a few steps. `ready` comes before every step, `look` after one that was watched."""

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
        whole = {name: _weights(layer) for name, layer in _weighted(network)}
        self.layers = {name: [share(weight) for weight in weights] for name, weights in whole.items()}
        self.sizes = {name: sum(weight.numel() for weight in weights) for name, weights in whole.items()}
        self.called: list[str] = []
        self.units = _Units()
        self.hooks: list[RemovableHandle] = []
        self.modules = dict(network.named_modules())
        self.before: list[Tensor] = []
        self.said = _Said()
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

    def look(self, step: int, loss: float, gradient_norm: float, clipped: float = 1.0) -> Look | None:
        """What step `step` shows, or None where nothing was got ready for.

        Gradients are those that lie in `.grad`, over `clipped`, which they were multiplied with to clip them. Losses and norms need not
        be finite.
        """
        spike = self.hear(step, loss)
        if not self.before:
            return None
        self._deaf()
        layers = self._measured(clipped)
        self.before = []
        found = self.said.new(step, _told(layers, gradient_norm, self.health))
        return Look(step, loss, gradient_norm, layers, (*found, *([spike] if spike else [])))

    def pass_over(self) -> None:
        """Look away from a step that was got ready for."""
        self._deaf()
        self.before = []

    def hear(self, step: int, loss: float) -> Finding | None:
        """Take note of the loss after step `step`, which need not be watched; a finding if it is a spike. Each step is heard once."""
        return self.spikes.new(step, loss) if self.health.every else None

    @property
    def memory(self) -> dict[str, Any]:
        """What it has said and heard, as JSON has it; with `tensors`, all that later findings depend on."""
        return {"called": self.called, "saturating": sorted(self.units.saturating), "said": self.said.memory, "spikes": self.spikes.memory}

    def tensors(self) -> dict[str, Tensor]:
        """For how many rows each unit has given nothing, by layer."""
        return dict(self.units.idle)

    def recall(self, memory: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from where another one was that had this memory; an empty one is that of the start."""
        self.called, self.units, self.said, self.spikes = list(memory.get("called", ())), _Units(), _Said(), Spikes()
        device = next((parameter.device for parameter in self.network.parameters()), None)
        self.units.idle = {name: idle.to(device) for name, idle in tensors.items()}
        self.units.saturating = set(memory.get("saturating", ()))
        if memory:
            self.said.recall(memory["said"])
            self.spikes.recall(memory["spikes"])

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

    def _measured(self, clipped: float) -> tuple[Layer, ...]:
        now = [weight.detach() for weights in self.layers.values() for weight in weights]
        with torch.no_grad():
            before = torch._foreach_norm(self.before)
            torch._foreach_sub_(self.before, now)
            there = [weight.grad for weights in self.layers.values() for weight in weights if weight.grad is not None]
            dead = self.units.dead()
            lengths = self.norms(torch.stack([*before, *torch._foreach_norm(self.before), *_norms(there)]))
            norms = torch.cat([lengths, *(found[None].to(lengths) for found in dead.values())]).tolist()
        share = dict(zip(dead, norms[len(norms) - len(dead) :], strict=True))
        weights, updates, gradients = iter(norms), iter(norms[len(now) :]), iter(norms[2 * len(now) :])
        found = {}
        for name, parameters in self.layers.items():
            with_gradient = [next(gradients) / clipped for weight in parameters if weight.grad is not None]
            found[name] = Layer(
                name,
                self.sizes[name],
                math.hypot(*with_gradient) if with_gradient else None,
                math.hypot(*(next(weights) for _ in parameters)),
                math.hypot(*(next(updates) for _ in parameters)),
                share.get(name),
                name in self.units.saturating,
            )
        return tuple(found[name] for name in (*self.called, *(name for name in found if name not in self.called)))


class _Units:
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
                    found = still(outputs.detach(), tuple(place for place in range(outputs.dim()) if place != units))
                before = self.idle.get(self.last)
                rows = min(len(outputs), MOST_ROWS)
                self.idle[self.last] = found * (rows if before is None or before.shape != found.shape else before + rows)
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


class _Said:
    """What has been said already: each kind of finding once a layer, until a look shows none of its kind."""

    def __init__(self) -> None:
        self.layers: dict[Kind, set[str]] = {}
        self.times: dict[Kind, int] = {}

    @property
    def memory(self) -> dict[str, Any]:
        return {kind: [times, sorted(self.layers[kind])] for kind, times in self.times.items()}

    def recall(self, memory: Mapping[Kind, Any]) -> None:
        self.times = {kind: times for kind, (times, _) in memory.items()}
        self.layers = {kind: set(layers) for kind, (_, layers) in memory.items()}

    def new(self, step: int, told: Sequence[_Told]) -> list[Finding]:
        """What of it has not been said."""
        found = []
        for kind in {*self.times} - {one.kind for one in told}:
            del self.times[kind], self.layers[kind]
        for one in told:
            self.times[one.kind] = self.times.get(one.kind, 0) + 1
            said = self.layers.setdefault(one.kind, set())
            layers = [layer for layer in one.layers if layer.name not in said]
            if layers and step >= one.since and self.times[one.kind] >= one.looks:
                said.update(layer.name for layer in layers)
                found.append(Finding(step, one.kind, tuple(layer.name for layer in layers), one.says(layers)))
        return found


class _Told(NamedTuple):
    """What a look shows, be it new or not."""

    kind: Kind
    layers: list[Layer]
    says: Callable[[list[Layer]], str]
    """The line for some of these layers."""
    since: int = 0
    """From which step on it may be said."""
    looks: int = 1
    """In how many looks in a row it must be seen before."""


def _told(layers: Sequence[Layer], gradient_norm: float, health: Health) -> list[_Told]:
    if not math.isfinite(gradient_norm):
        lost = [layer for layer in layers if layer.gradient is not None and not math.isfinite(layer.gradient)]
        return [_Told("not_finite", lost or list(layers), _says_not_finite)]
    dead = _dead(layers, health.dead)
    gone = [] if any(layer.dead == 1 for layer in dead) else vanishing(layers, health.vanishing)  # which is why nothing comes through
    found = [
        _Told("vanishing", gone, lambda some: _says_vanishing(some, layers), SETTLED, LOOKS),
        _Told("exploding", [layer for layer in layers if layer.pull > health.exploding], _says_exploding),
        _Told("dead", [layer for layer in dead if not layer.saturates], _says_dead),
        _Told("saturated", [layer for layer in dead if layer.saturates], _says_saturated),
        _Told("update", [layer for layer in layers if layer.ratio > JUMP], _says_update),
    ]
    return [one for one in found if one.layers]


def _dead(layers: Sequence[Layer], share: float) -> list[Layer]:
    """The layers of which so large a share of units is dead; of several in a row that are wholly so the first, whose doing it is."""
    found, before = [], 0.0
    for layer in layers:
        if layer.dead is not None:
            if layer.dead >= share and not layer.dead == before == 1:
                found.append(layer)
            before = layer.dead
    return found


def vanishing(layers: Sequence[Layer], share: float) -> list[Layer]:
    """The layers whose gradient's norm is less than so large a share of that of a layer behind them; all, where none has any.

    Only runs of layers count that begin with the network's first one or are RUN long: gradients vanish with depth. Some layers have
    small ones by their nature, as queries and keys of attention that is still even.
    """
    there = [(layer, layer.gradient) for layer in layers if layer.gradient is not None]
    behind = [max((gradient for _, gradient in there[place + 1 :]), default=0.0) for place in range(len(there))]
    small = [gradient < share * most for (_, gradient), most in zip(there, behind, strict=True)]
    if not any(gradient for _, gradient in there):
        small = [True] * len(there)
    found: list[Layer] = []
    for is_small, run in groupby(range(len(there)), key=small.__getitem__):
        places = list(run)
        if is_small and (places[0] == 0 or len(places) >= RUN):
            found += [there[place][0] for place in places]
    return found


def names(layers: Sequence[Layer]) -> str:
    """a, b and c; of many, the first and the last."""
    shown = [layer.name for layer in layers]
    if len(shown) > NAMED:
        return f"{shown[0]}, {shown[1]}, ... {shown[-1]} ({len(shown)} layers)"
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def _says_vanishing(some: list[Layer], layers: Sequence[Layer]) -> str:
    least, most = min(layer.gradient or 0.0 for layer in some), max(layer.gradient or 0.0 for layer in layers)
    against = f"its norm is down to {least:.2g}, of other layers up to {most:.2g}" if most else "it is 0 everywhere"
    cure = "use activation relu with init kaiming_normal, norm layers or residual connections, or fewer layers"
    return f"vanishing gradient: hardly any of it reaches {names(some)}: {against}; {cure}"


def _says_exploding(some: list[Layer]) -> str:
    worst = max(some, key=lambda layer: layer.pull)
    cure = "use a smaller init (xavier or kaiming) or norm layers, set train.clip, or lower train.optimizer.lr"
    return f"exploding gradient: {worst.pull:.2g} times the weights in {worst.name}, large in {names(some)}; {cure}"


def _says_not_finite(some: list[Layer]) -> str:
    return f"gradient not finite: in {names(some)}; lower train.optimizer.lr, set train.clip, or use a smaller init"


def _says_dead(some: list[Layer]) -> str:
    shares = f"{_percent(some)} of the units of {names(some)} give 0 for every row"
    return f"dead units: {shares}; lower train.optimizer.lr, use init kaiming_normal, norm layers, or activation leaky_relu or gelu"


def _says_saturated(some: list[Layer]) -> str:
    shares = f"{_percent(some)} of the units of {names(some)} are at their bounds for every row"
    return f"saturated units: {shares}; use a smaller init (xavier), norm layers or scaled inputs, or activation relu"


def _says_update(some: list[Layer]) -> str:
    worst = max(some, key=lambda layer: layer.ratio)
    size = f"an update of {worst.ratio:.2g} times the weights in {worst.name}, large in {names(some)}"
    return f"too large steps: {size}; lower train.optimizer.lr"


def _percent(some: list[Layer]) -> str:
    shares = sorted(round(100 * (layer.dead or 0.0)) for layer in some)
    return f"{shares[0]} %" if shares[0] == shares[-1] else f"{shares[0]} to {shares[-1]} %"


class Spikes:
    """Tells spikes from the losses of some steps, one after the other. What it costs a step is a comparison."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.start: list[float] = []
        self.bar = math.inf
        self.heard, self.spoke, self.step = 0, -WINDOW, 0

    @property
    def memory(self) -> dict[str, Any]:
        kept = {"start": self.start, "bar": self.bar, "heard": self.heard, "spoke": self.spoke, "step": self.step}
        return {"losses": list(self.losses), **kept}

    def recall(self, memory: Mapping[str, Any]) -> None:
        self.losses.extend(memory["losses"])
        self.start, self.bar = list(memory["start"]), memory["bar"]
        self.heard, self.spoke, self.step = memory["heard"], memory["spoke"], memory["step"]

    def new(self, step: int, loss: float) -> Finding | None:
        """A finding if this loss is a spike, and none has been said within the last WINDOW losses."""
        if step <= self.step or not math.isfinite(loss):
            return None
        self.step, spike = step, loss > self.bar and self.heard - self.spoke >= WINDOW
        says = self._says(loss) if spike else ""
        self.spoke = self.heard if loss > self.bar else self.spoke
        self.heard += 1
        self.losses.append(loss)
        if len(self.start) < CALM:
            self.start.append(loss)
        if self.heard % CALM == 0 or spike:
            self.bar = bar(self.losses, statistics.median(self.start))
        return Finding(step, "spike", (), says) if spike else None

    def _says(self, loss: float) -> str:
        usual = statistics.median(self.losses)
        cure = "look for outliers in the data, set train.clip, or lower train.optimizer.lr"
        return f"loss spike: {loss:.3g}, {loss / max(usual, 1e-12):.2g} times the {usual:.3g} of the steps before; {cure}"


def bar(losses: Sequence[float] | deque[float], start: float) -> float:
    """The loss above which the next one is a spike: far above the median of these and their spread, and above where training began,
    since a batch on which the model is worse than an untrained one is no ordinary batch. Infinite while there are few."""
    if len(losses) < CALM:
        return math.inf
    middle = statistics.median(losses)
    deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in losses)  # of a normal distribution, from its middle half
    return max(SPIKE * middle, middle + DEVIATIONS * deviation, start)


def spiking(losses: Sequence[float]) -> bool:
    """Whether the last of the losses of a run is a spike against up to WINDOW before it."""
    *before, last = losses
    return bool(before) and last > bar(before[-WINDOW:], statistics.median(before[:CALM]))


class Divergence(Part):
    """When training counts as diverged, and what is done: back to the newest checkpoint of an epoch's end, and on at a lower rate."""

    patience: int = Field(5, ge=1)
    """Steps in a row with a gradient that is not finite, each of which is left out, before training goes back."""
    factor: float = Field(0.1, gt=0, lt=1)
    """What the learning rate is multiplied with each time."""
    most: int = Field(3, ge=0)
    """How often training goes back before it gives up; 0 gives up at once."""
    loss_factor: float = Field(3.0, gt=1)
    """Training has diverged when five known losses in a row are more than so many times the loss at its start; or when it has blown
    up at its beginning, to the square of that, and after an epoch is hardly better than at the start. A start of less than 1 counts
    as 1."""


class Diverging:
    """Whether training has diverged, from the losses of some steps, means of epochs, and whether gradients are finite.

    It is worse than an untrained network for long; or was so at once and has not recovered: at a rate that is a thousand times too
    high, a network soon gives the same for every row, and then its loss is no more than that at the start. What begins badly and
    recovers, single batches of large loss, and what does not learn, have not diverged. All numbers must be the same on all workers.
    """

    LOSSES, BEGINNING = 5, 50
    """Losses that decide, and steps that are the beginning of training, after which an epoch decides too."""
    BESIDE, RECOVERED = 1.5, 0.8
    """A loss that blew up must have one beside it that is so many times that at the start: a single batch may be odd. Training has
    recovered when its loss is less than this share of that at the start."""

    def __init__(self, divergence: Divergence, start_loss: float | None = None) -> None:
        """start_loss: that of the first step of training, where it is known from before."""
        self.divergence, self.start_loss = divergence, start_loss
        self.losses: deque[float] = deque(maxlen=self.LOSSES)
        self.steps = self.lost = self.finite = 0
        self.blown = 0.0
        self.layer: str | None = None

    @property
    def memory(self) -> dict[str, Any]:
        """All that later decisions depend on, as JSON has it, but for the loss at the start."""
        kept = {"steps": self.steps, "lost": self.lost, "finite": self.finite, "blown": self.blown}
        return {"losses": list(self.losses), **kept}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Go on from where another one was that had this memory."""
        self.losses.extend(memory["losses"])
        self.steps, self.lost, self.finite, self.blown = (memory[name] for name in ("steps", "lost", "finite", "blown"))

    def step(self, finite: bool, loss: float | None = None, look: Look | None = None) -> str | None:
        """Take note of a step: whether its gradient was finite, its loss over all workers where that is known (at the first step it
        must be; the more of the early ones the better), and the look at it. Returns why training has diverged, or None."""
        self.steps += 1
        self.lost = 0 if finite else self.lost + 1
        self.finite += finite
        if look:
            self.layer = look.worst
        if loss is not None:
            self._hear(_finite(loss))
        if self.lost >= self.divergence.patience:
            return self._because(f"the gradient was not finite for {self.lost} steps in a row")
        return self._high()

    def epoch(self, mean: float) -> str | None:
        """Take note of the mean loss of an epoch that has ended; it counts as one more loss. Returns why, as `step`."""
        none_finite, self.finite = self.lost > 0 and self.finite == 0, 0
        if none_finite:
            return self._because("no step of the epoch had a gradient that was finite")
        self.losses.append(_finite(mean))
        recent = statistics.median(self.losses)
        if recent < self.RECOVERED * (self.start_loss or 0.0):
            self.blown = 0.0
        elif self.blown and self.steps >= self.BEGINNING:
            return self._because(f"the loss blew up to {self._said(self.blown)}, and is {recent:.3g} now")
        return self._high()

    def _hear(self, loss: float) -> None:
        if self.start_loss is None and loss < math.inf:
            self.start_loss = loss
        less, more = sorted((self.losses[-1] if self.losses else 0.0, loss))
        if self.steps <= self.BEGINNING and more > self.divergence.loss_factor**2 * self._start and less > self.BESIDE * self._start:
            self.blown = max(self.blown, more)
        self.losses.append(loss)

    def _high(self) -> str | None:
        if len(self.losses) < self.LOSSES or min(self.losses) <= self._limit:
            return None
        return self._because(f"the last {self.LOSSES} losses that were looked at were {self._said(min(self.losses))} or more")

    @property
    def _start(self) -> float:
        return max(self.start_loss or 0.0, 1.0)

    @property
    def _limit(self) -> float:
        return self.divergence.loss_factor * self._start

    def _said(self, loss: float) -> str:
        began = "" if self.start_loss is None else f" (training began with {self.start_loss:.3g})"
        return f"{loss:.3g}{began}" if loss < math.inf else f"infinity{began}"

    def _because(self, why: str) -> str:
        return f"{why}; the gradient was largest against the weights in {self.layer}" if self.layer else why


def _finite(loss: float) -> float:
    """Not a number is as bad as infinity."""
    return math.inf if math.isnan(loss) else loss


def rounded(value: float | None) -> float | None:
    """Four significant digits, for JSON; None for what is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _weighted(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers that have weights to learn: those without layers inside, and attention as a whole."""
    inside: set[nn.Module] = set()
    for name, layer in network.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            inside.update(layer.children())
        elif layer in inside or any(True for _ in layer.children()):
            continue
        if _weights(layer):
            yield name, layer


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.dim() > 1 and parameter.requires_grad]


def _norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    return torch._foreach_norm(tensors) if tensors else []
