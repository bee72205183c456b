"""Training that goes on from a network that is trained already: held to a form while its weights change, taught by another, or both.

It is the loop of any training: what is held is done after each step, as the largest norm is, and what teaches is a part of the objective.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from dlopt.artifact import Artifact
from dlopt.data.feed.batches import Batch
from dlopt.models import Network
from dlopt.optim.constraints import weights as units_of
from dlopt.part import DloptError, Part, Signature, Target
from dlopt.train.loop.objectives import Losses, Objective
from dlopt.train.start import trained_network

TIMES = 100
"""How often, at most, weights are chosen anew while their zeros become more."""


def weights_of(network: nn.Module, leave: tuple[str, ...] = ()) -> dict[str, nn.Parameter]:
    """Weights with units of the layers of a network, by name; leave: patterns of those that are left alone, as *.head.weight."""
    of_units = {id(weight) for weight in units_of(network)}
    named = {name: weight for name, weight in network.named_parameters() if id(weight) in of_units}
    return {name: weight for name, weight in named.items() if not any(fnmatch(name, pattern) for pattern in leave)}


class Hold(Part, ABC):
    """What weights are held to. What it remembers can be told from the weights themselves, so that training goes on from a checkpoint."""

    leave: tuple[str, ...] = ()
    """Patterns of weights that are not held."""

    @abstractmethod
    def begin(self, network: nn.Module) -> Held:
        """Of a network before its next step."""


class Held(ABC):
    """Weights that are held."""

    @abstractmethod
    def after(self, done: float) -> None:
        """A step; done: the share of all steps that are taken."""

    def settled(self, done: float) -> bool:
        """Whether the weights have the form that they are to have in the end."""
        return True

    def release(self) -> None:  # noqa: B027  # most have nothing to let go of
        """Nothing of a network is held any more."""


class Sparse(Hold):
    """More and more weights are 0: by the cubic schedule of Zhu and Gupta (2017), those that count least first."""

    kind: Literal["sparse"] = "sparse"
    sparsity: float = Field(gt=0, lt=1)
    """Share of the weights that are 0 in the end."""
    scope: Literal["global", "layer", "lamp", "movement"] = "global"
    over: float = Field(0.6, ge=0, le=1)
    """Share of the steps over which they become 0; 0 for all at once, at the start."""
    start: Path | None = None
    """Of movement: the file of the weights that training began with."""

    def begin(self, network: nn.Module) -> Zeros:
        weights, before = weights_of(network, self.leave), load_file(self.start) if self.start else {}
        return Zeros(self, list(weights.values()), [before[name].to(weight) for name, weight in weights.items() if name in before])


class Zeros(Held):
    """The weights of a network, and which of them are not 0."""

    def __init__(self, section: Sparse, weights: list[nn.Parameter], before: list[Tensor]) -> None:
        self.section, self.weights, self.before = section, weights, before
        self.kept = [weight.detach() != 0 for weight in weights]
        self.chosen = 0
        if not section.over:
            self.choose(section.sparsity)

    @torch.no_grad()
    def after(self, done: float) -> None:
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.mul_(kept)
        place = math.ceil(TIMES * min(1.0, done / self.section.over)) if self.section.over else TIMES
        if place > self.chosen:
            self.chosen = place
            self.choose(self.section.sparsity * (1 - (1 - place / TIMES) ** 3))

    def settled(self, done: float) -> bool:
        return done >= self.section.over

    @torch.no_grad()
    def choose(self, sparsity: float) -> None:
        """Make so large a share of all weights 0."""
        scores = [score.masked_fill(~kept, -math.inf) for score, kept in zip(self.scores(), self.kept, strict=True)]
        groups = [[place] for place in range(len(scores))] if self.section.scope == "layer" else [list(range(len(scores)))]
        for group in groups:
            together = torch.cat([scores[place].flatten() for place in group])
            gone = round(sparsity * len(together))
            least = together.kthvalue(gone).values if gone else together.new_tensor(-math.inf)
            for place in group:
                self.kept[place] = (scores[place] > least) & self.kept[place]
                self.weights[place].mul_(self.kept[place])

    def scores(self) -> list[Tensor]:
        """How much each weight counts: its size, or, by movement, how much its square has grown since training began. That is twice the sum
        over the steps of weight times step, which Sanh et al. (2020) take it by, and can be told from the weights alone."""
        if self.section.scope == "movement":
            return [weight.detach().square() - before.square() for weight, before in zip(self.weights, self.before, strict=True)]
        return [SCORES[self.section.scope](weight.detach()) for weight in self.weights]


def _lamp(weight: Tensor) -> Tensor:
    """The square of each weight, as a share of all that are no smaller in its layer (Lee et al. 2021)."""
    squares, order = weight.flatten().square().sort()
    rest = squares.flip(0).cumsum(0).flip(0)
    shares = torch.empty_like(squares)
    shares[order] = squares / rest.clamp_min(torch.finfo(squares.dtype).tiny)
    return shares.view_as(weight)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"global": torch.abs, "layer": torch.abs, "lamp": _lamp}
"""How much a weight counts, by what it is compared with: all weights, those of its layer, or those of all layers as shares of theirs."""


class Masked(Hold):
    """Weights that are 0 in a file are 0 from some step on, and others are free: a network that was found by training is trained again."""

    kind: Literal["masked"] = "masked"
    file: Path
    """Weights, of which those count that are 0."""
    since: float = Field(0.0, ge=0, lt=1)
    """Share of the steps before which all weights are free."""

    def begin(self, network: nn.Module) -> Mask:
        weights, found = weights_of(network, self.leave), load_file(self.file)
        return Mask(self.since, [(weight, (found[name] != 0).to(weight.device)) for name, weight in weights.items()])


class Mask(Held):
    """The weights of a network, and which of them are not 0."""

    def __init__(self, since: float, weights: list[tuple[nn.Parameter, Tensor]]) -> None:
        self.since, self.weights = since, weights
        if not since:
            self.after(0.0)

    @torch.no_grad()
    def after(self, done: float) -> None:
        if self.settled(done):
            for weight, kept in self.weights:
                weight.mul_(kept)

    def settled(self, done: float) -> bool:
        return done >= self.since


class Tied(Hold):
    """Weights that are equal stay equal, each group at the mean of what a step makes of it; those that are 0 stay 0."""

    kind: Literal["tied"] = "tied"

    def begin(self, network: nn.Module) -> Groups:
        return Groups(list(weights_of(network, self.leave).values()))


class Groups(Held):
    """Of each weight, to which group every number belongs."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights, self.members = weights, []
        for weight in weights:
            values, members = weight.detach().flatten().unique(return_inverse=True)
            self.members.append((members, torch.bincount(members).to(weight.dtype), values == 0))

    @torch.no_grad()
    def after(self, done: float) -> None:
        for weight, (members, counts, zero) in zip(self.weights, self.members, strict=True):
            sums = torch.zeros_like(counts).scatter_add_(0, members, weight.flatten())
            weight.copy_(torch.where(zero, 0.0, sums / counts)[members].view_as(weight))


class Rounded(Hold):
    """Layers compute with weights, and with what they are given, as whole numbers will have them, and gradients go through as if nothing
    were rounded (Jacob et al. 2018; Bengio et al. 2013): weights learn to bear it."""

    kind: Literal["rounded"] = "rounded"
    bits: int = Field(8, ge=2, le=8)
    """Of weights, with a scale for each unit."""
    inputs: bool = False
    """Whether what layers are given is rounded to 8 bits as well, between the least and the greatest of a batch."""

    def begin(self, network: nn.Module) -> Roundings:
        return Roundings(self, network)


class Roundings(Held):
    """Hooks of the layers: a weight is another one while its layer computes."""

    def __init__(self, section: Rounded, network: nn.Module) -> None:
        self.section, self.hooks = section, list[RemovableHandle]()
        for name in weights_of(network, section.leave):
            layer = network.get_submodule(name.rpartition(".")[0])
            if name.endswith(".weight") and isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                weight = layer.weight
                self.hooks += [
                    layer.register_forward_pre_hook(self.enter),
                    layer.register_forward_hook(lambda layer, _inputs, _outputs, weight=weight: layer._parameters.update(weight=weight)),
                ]

    def enter(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        layer._parameters["weight"] = passed(layer.weight, nearest(layer.weight.detach(), self.section.bits))  # type: ignore[assignment, arg-type, operator]
        return tuple(passed(values, between(values.detach())) for values in inputs) if self.section.inputs else inputs

    def after(self, done: float) -> None:
        pass

    def release(self) -> None:
        for hook in self.hooks:
            hook.remove()


def passed(values: Tensor, rounded: Tensor) -> Tensor:
    """The rounded ones, whose gradient is that of the values."""
    return values + (rounded - values).detach()


def nearest(weight: Tensor, bits: int) -> Tensor:
    """Each unit as whole numbers times a scale."""
    most = 2 ** (bits - 1) - 1
    largest = weight.flatten(1).abs().amax(dim=1).view(-1, *[1] * (weight.dim() - 1))
    scale = torch.where(largest > 0, largest, 1.0) / most
    return (weight / scale).round() * scale


def between(values: Tensor) -> Tensor:
    """Numbers as one of 256 from the least to the greatest, of which 0 is one."""
    low, high = values.amin().clamp_max(0), values.amax().clamp_min(0)
    scale = ((high - low) / 255).clamp_min(torch.finfo(values.dtype).tiny)
    return ((values / scale).round().clamp((low / scale).round(), (high / scale).round())) * scale


class Teacher(Part):
    """Another trained network, whose outputs are learned (Hinton et al. 2015)."""

    model: Path
    """Its artifact, and that of the data that it was trained on."""
    data: Path
    alpha: float = Field(0.9, ge=0, le=1)
    """Share of the loss that is the teacher's; the rest is the job's."""
    temperature: float = Field(4.0, gt=0)
    """What logits are divided by before they are compared."""
    features: float = Field(0.0, ge=0)
    """What is added of how differently both see which rows are alike."""

    def network(self) -> Network:
        return trained_network(Artifact.open(self.model), Artifact.open(self.data)).float()

    def teach(self, objective: Objective, target: Target, device: torch.device) -> Objective:
        """The job's objective, of which a share is how far outputs are from the teacher's."""
        teacher, temperature = self.network().to(device), self.temperature
        theirs = last_layer(teacher)
        teacher.requires_grad_(False)

        def taught(model: nn.Module, batch: Batch) -> Losses:
            said: list[Tensor] = []
            seen: list[Tensor] = []

            def see(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                seen.append(inputs[0].float())

            listening = [model.register_forward_hook(lambda _module, _inputs, outputs: said.append(outputs))]
            if self.features:
                listening += [layer.register_forward_pre_hook(see) for layer in (last_layer(model), theirs)]
            losses = objective(model, batch)
            with torch.no_grad():
                wanted = teacher(batch.inputs)
            for one in listening:
                one.remove()
            apart = DISTANCES[target.kind](said[0].float(), wanted.float(), temperature) / batch.total
            loss = (1 - self.alpha) * losses.loss + self.alpha * apart
            return losses._replace(loss=loss + self.features * unlike(*seen) / batch.total if self.features else loss)

        return taught


def last_layer(network: nn.Module) -> nn.Module:
    """The layer whose outputs are the answer."""
    return network.get_submodule(list(weights_of(network))[-1].rpartition(".")[0])


def unlike(mine: Tensor, theirs: Tensor) -> Tensor:
    """How differently two networks see which rows are alike (Tung and Mori 2019): of (rows, features) and (rows, other features), the
    squared difference of all pairs' products, each row's brought to length 1; summed over the rows."""
    alike = [F.normalize(values.flatten(1) @ values.flatten(1).T, dim=1) for values in (mine, theirs)]
    return (alike[0] - alike[1]).square().sum()


def _of_classes(outputs: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened classes, times the temperature squared, so that gradients keep their size."""
    soft = (wanted / temperature).log_softmax(dim=1)
    return F.kl_div((outputs / temperature).log_softmax(dim=1), soft, reduction="sum", log_target=True) * temperature**2


def _of_labels(outputs: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    soft = (wanted / temperature).sigmoid()
    return F.binary_cross_entropy_with_logits(outputs / temperature, soft, reduction="sum") * temperature**2 / outputs.shape[1]


def _of_numbers(outputs: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """In units of the teacher's spread over the batch."""
    return ((outputs - wanted) / wanted.std(dim=0).clamp_min(1e-12)).square().mean(dim=1).sum()


DISTANCES = {"category": _of_classes, "multi_label": _of_labels, "number": _of_numbers}


def refuse_other(teacher: Signature, student: Signature) -> None:
    """Raises DloptError where a teacher does not take what the student takes, or says something else."""
    other = next((theirs.name for mine, theirs in zip(student.inputs, teacher.inputs, strict=False) if mine != theirs), None)
    if other is not None:
        raise DloptError(f"compress: teacher: its input {other!r} has another shape, columns or vocabulary: train it on the same data")
    if len(teacher.inputs) != len(student.inputs):
        raise DloptError(f"compress: teacher: has {len(teacher.inputs)} inputs, the model {len(student.inputs)}: use the same data")
    said = ("name", "kind", "labels", "columns", "offsets")
    different = next((name for name in said if getattr(teacher.target, name) != getattr(student.target, name)), None)
    if different:
        raise DloptError(f"compress: teacher: its target has other {different}: {str(getattr(teacher.target, different))[:60]}")


class Tuning(Part):
    """Where training begins, and what is special about it."""

    model: Path | None = None
    """The file of the weights that it begins with; without it, it begins as the job does."""
    hold: Annotated[Sparse | Masked | Tied | Rounded, Field(discriminator="kind")] | None = None
    teacher: Teacher | None = None
