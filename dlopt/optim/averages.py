"""Averages of the weights over the steps of training, which are measured and kept in the weights' place. To add one: a class with
`build`, and its name in the union at the end.

Not torch.optim.swa_utils: its AveragedModel is a second network, which cannot be of shares of weights, and its update_bn takes the mean of
batches' variances for the variance, where `reestimate` has that of all rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dlopt.optim.schedules import Course, Span
from dlopt.part import Part

UPDATES = "updates"
"""The name among an average's tensors of how many updates it has had."""
NEARLY = 1e-6
"""Steps by which a moment may come early, so that three quarters of 100 steps is the 75th, whatever the product's last digit."""


class Ema(Part):
    """Exponential moving average of the weights over all steps (Polyak, Juditsky 1992; with such decays, Tarvainen, Valpola 2017)."""

    kind: Literal["ema"] = "ema"
    decay: float = Field(0.999, gt=0, lt=1)
    """Share of the average that stays at a step: 0.999 averages over about the last 1,000."""
    warmup: bool = True
    """Whether early averages forget faster, so that the random start does not stay in them: after t updates the decay is at most
    (1 + t) / (10 + t)."""

    def build(self, network: nn.Module, course: Course) -> Average:
        """An average that starts as the network is now."""
        return EmaAverage(network, self)

    def decay_after(self, updates: int) -> float:
        """The decay of the update that follows so many."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay


class Swa(Part):
    """Stochastic weight averaging: the plain mean of the weights at regular moments towards the end (Izmailov et al. 2018). It wants
    a schedule whose rate does not fall to 0 before."""

    kind: Literal["swa"] = "swa"
    start: Span = Span(share=0.75)
    """After how much of the run the first weights are taken."""
    every: Span = Span(epochs=1)
    """How long it is from one moment to the next; shorter than a step, or 0, is every step."""

    def build(self, network: nn.Module, course: Course) -> Average:
        """An average that has not started. course: that of the whole run."""
        return SwaAverage(network, self.start.steps_of(course), self.every.steps_of(course))


class Average:
    """An average of all numbers of a network's state, buffers as well as weights; of those that are no fractions, such as counts, the
    newest.

    It must be made when the network is on its device. All workers make the same updates, and so hold the same bits.
    """

    def __init__(self, network: nn.Module) -> None:
        state = network.state_dict()  # of the same memory as the network
        self.now = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self.mean = {name: value.clone() for name, value in self.now.items()}
        self.updates = 0
        fractions = [name for name, value in self.now.items() if value.is_floating_point()]
        self.pairs = [self.mean[name] for name in fractions], [self.now[name] for name in fractions]
        self.counts = [name for name in self.now if name not in fractions]

    @property
    def started(self) -> bool:
        """Whether it has had an update."""
        return self.updates > 0

    def update(self, step: int) -> None:
        """Take the network's state after step `step` of the run, from 1, in, if this is a moment to do so."""
        if self._is_moment(step):
            means, values = self.pairs
            with torch.no_grad():
                torch._foreach_lerp_(means, values, self._share())  # mean + share * (value - mean): what stays the same, stays exactly
            for name in self.counts:
                self.mean[name].copy_(self.now[name])
            self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint needs, by name; `load_state_dict` takes it back, to the bit."""
        return self.mean | {UPDATES: self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the average that said this."""
        self.updates = state[UPDATES]
        for name, mean in self.mean.items():
            mean.copy_(state[name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within this, the network holds the averages; afterwards what it held before, to the bit. An average that has not started
        leaves the network alone."""
        before = {name: value.clone() for name, value in self.now.items()} if self.started else {}
        self._into_network(self.mean if self.started else {})
        try:
            yield
        finally:
            self._into_network(before)

    def _into_network(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in tensors.items():
                self.now[name].copy_(value)

    def _is_moment(self, step: int) -> bool:
        raise NotImplementedError

    def _share(self) -> float:
        """What share of the new average the newest state is."""
        raise NotImplementedError


class EmaAverage(Average):
    """average <- decay * average + (1 - decay) * weights, after every step."""

    def __init__(self, network: nn.Module, ema: Ema) -> None:
        super().__init__(network)
        self.ema = ema

    def _is_moment(self, step: int) -> bool:
        return True

    def _share(self) -> float:
        return 1 - self.ema.decay_after(self.updates)


class SwaAverage(Average):
    """The mean of the weights after `start`, `start + every`, `start + 2 every`, ... steps."""

    def __init__(self, network: nn.Module, start: float, every: float) -> None:
        super().__init__(network)
        self.start, self.every = start, max(every, 1.0)

    def _is_moment(self, step: int) -> bool:
        return self._moments(step) > self._moments(step - 1)

    def _moments(self, step: int) -> int:
        """How many moments there are up to a step, which is none before the first one."""
        first = max(self.start, 1.0)
        return max(math.floor((step - first + NEARLY) / self.every) + 1, 0)

    def _share(self) -> float:
        return 1 / (self.updates + 1)


def reestimate(network: nn.Module, batches: Iterable[Any]) -> None:
    """Make the running statistics of batch norm layers anew: mean and unbiased variance of all that comes into each layer in a pass
    over `batches`, each what the network takes, as if they were one batch. For averaged weights, of which the statistics gathered in
    training do not tell.

    In the pass these layers normalise by their batch, as in training, and everything else is as after training: there is no dropout.
    A network without such layers is left alone, and `batches` not asked for.
    """
    layers = [layer for layer in network.modules() if _keeps_statistics(layer)]
    if not layers:
        return
    sums: dict[nn.Module, _Pooled] = {layer: _Pooled() for layer in layers}
    with torch.no_grad(), _by_batch(network, layers):
        hooks = [layer.register_forward_pre_hook(lambda layer, args: sums[layer].add(args[0])) for layer in layers]
        try:
            for batch in batches:
                network(batch)
        finally:
            for hook in hooks:
                hook.remove()
        for layer in layers:
            sums[layer].into(layer)


class _Pooled:
    """Count, mean and sum of squared deviations of each channel, float64, over batches (Chan, Golub, LeVeque 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, values: Tensor) -> None:
        """values: (rows, channels, ...)."""
        rows = values.movedim(1, -1).flatten(0, -2).double()
        if not len(rows):
            return
        total, mean = self.count + len(rows), rows.mean(dim=0)
        squares, apart = (rows - mean).square().sum(dim=0), mean - self.mean.to(rows)
        self.squares = self.squares.to(rows) + squares + apart.square() * (self.count * len(rows) / total)
        self.mean, self.count = self.mean.to(rows) + apart * (len(rows) / total), total

    def into(self, layer: Any) -> None:
        if self.count > 1:
            layer.running_mean.copy_(self.mean)
            layer.running_var.copy_(self.squares / (self.count - 1))


def _keeps_statistics(layer: Any) -> bool:
    """Whether it is a batch norm layer, of torch or our own: both have these buffers."""
    return getattr(layer, "running_mean", None) is not None and getattr(layer, "running_var", None) is not None


@contextmanager
def _by_batch(network: nn.Module, layers: list[nn.Module]) -> Iterator[None]:
    """Within this, these layers alone are in training, and their running statistics stand still."""
    kept = [(layer, layer.training) for layer in network.modules()], [(layer, layer.momentum) for layer in layers]
    network.eval()
    for layer in layers:
        layer.training = True
        layer.momentum = 0.0  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, mode in kept[0]:
            layer.training = mode
        for layer, momentum in kept[1]:
            layer.momentum = momentum


Averaging = Annotated[Ema | Swa, Field(discriminator="kind")]
