"""Optimizers. To add one: a class, and its name in the union at the end. Those of libraries are in `optimizers_library.py`.

Gradient descent on the full batch is `sgd` with `train.batch_size: full`. Fields have torch's names, and defaults are torch's or the
paper's. `lr` is the peak rate, which the schedule multiplies; a weight decay that a parameter group has of its own goes first.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from dlopt.optim.optimizers_fields import Above0, Below1, From0, Groups, Rate, Unit, as_groups, divided, one_rate
from dlopt.optim.optimizers_library import Library, Lion
from dlopt.optim.optimizers_muon import FullLbfgs, HiddenMuon, Together
from dlopt.part import Part


class Sgd(Part):
    """Stochastic gradient descent, with momentum if asked for (Sutskever et al. 2013)."""

    kind: Literal["sgd"] = "sgd"
    unit: ClassVar[Unit] = "number"
    lr: Rate = 0.1
    """Peak learning rate."""
    momentum: Below1 = 0.0
    """Share of the last step that goes on in this one; 0 is plain descent."""
    nesterov: bool = False
    """Look ahead along the momentum."""
    weight_decay: From0 = 0.0
    """Added to the gradient, times the weight."""

    @model_validator(mode="after")
    def nesterov_has_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0: set momentum, 0.9 say")
        return self

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, fused=True, **self.model_dump(exclude={"kind"}))


class Adagrad(Part):
    """Adagrad (Duchi, Hazan, Singer 2011)."""

    kind: Literal["adagrad"] = "adagrad"
    unit: ClassVar[Unit] = "number"
    lr: Rate = 1e-2
    """Peak learning rate."""
    lr_decay: From0 = 0.0
    """The rate is divided by 1 + lr_decay * steps."""
    weight_decay: From0 = 0.0
    """Added to the gradient, times the weight."""
    initial_accumulator_value: From0 = 0.0
    """What the sum of squared gradients starts at."""
    eps: Above0 = 1e-10
    """Added to the root of that sum, so that nothing is divided by 0."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        given = as_groups(groups)
        host = all(parameter.device.type == "cpu" for group in given for parameter in group["params"])
        quick = {"fused": True} if host else {"foreach": True}
        return torch.optim.Adagrad(given, **quick, **self.model_dump(exclude={"kind"}))


class Adadelta(Part):
    """Adadelta (Zeiler 2012)."""

    kind: Literal["adadelta"] = "adadelta"
    unit: ClassVar[Unit] = "number"
    lr: Rate = 1.0
    """Peak learning rate; the paper has none, which is 1."""
    rho: Below1 = 0.9
    """Decay of the averages of squared gradients and of squared steps."""
    eps: Above0 = 1e-6
    """Added under both roots; its root is about the size of the first steps."""
    weight_decay: From0 = 0.0
    """Added to the gradient, times the weight."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.Adadelta(groups, foreach=True, **self.model_dump(exclude={"kind"}))


class RmsProp(Part):
    """RMSprop (Tieleman, Hinton 2012), and centered (Graves 2013)."""

    kind: Literal["rmsprop"] = "rmsprop"
    unit: ClassVar[Unit] = "number"
    lr: Rate = 1e-2
    """Peak learning rate."""
    alpha: Below1 = 0.99
    """Decay of the average of the squared gradient."""
    eps: Above0 = 1e-8
    """Added to the root of that average, so that nothing is divided by 0."""
    weight_decay: From0 = 0.0
    """Added to the gradient, times the weight."""
    momentum: Below1 = 0.0
    """Share of the last step that goes on in this one."""
    centered: bool = False
    """Divide by the standard deviation of the gradient instead of its root mean square."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(groups, foreach=True, **self.model_dump(exclude={"kind"}))


class Rprop(Part):
    """Resilient back-propagation (Riedmiller, Braun 1993), which looks at the gradient's sign alone: for the full batch.

    Each weight has a step of its own; `lr` is where they start, and a schedule does not change them afterwards.
    """

    kind: Literal["rprop"] = "rprop"
    unit: ClassVar[Unit] = "number"
    lr: Rate = 1e-2
    """Length of the first step of every weight."""
    etas: tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(gt=1)]] = (0.5, 1.2)
    """Factors on a weight's step when the gradient's sign has changed, and when it has not."""
    step_sizes: tuple[Above0, Above0] = (1e-6, 50.0)
    """The shortest and the longest step."""

    @field_validator("step_sizes")
    @classmethod
    def sizes_rise(cls, sizes: tuple[float, float]) -> tuple[float, float]:
        if sizes[0] > sizes[1]:
            raise ValueError(f"the shortest step {sizes[0]:g} is longer than the longest {sizes[1]:g}: swap them")
        return sizes

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.Rprop(groups, foreach=True, **self.model_dump(exclude={"kind"}))


class Asgd(Part):
    """Averaged stochastic gradient descent (Polyak, Juditsky 1992), the falling rate by Bottou.

    torch keeps the average beside the weights and never uses it: for averaged weights in the model, set `train.averaging`.
    """

    kind: Literal["asgd"] = "asgd"
    unit: ClassVar[Unit] = "number"
    lr: Rate = 1e-2
    """Peak learning rate."""
    lambd: From0 = 1e-4
    """Decay of the weights, and of the rate with it."""
    alpha: From0 = 0.75
    """Power of the rate's fall: after t steps it is lr / (1 + lambd * lr * t) ** alpha."""
    t0: From0 = 1e6
    """The step at which averaging begins."""
    weight_decay: From0 = 0.0
    """Added to the gradient, times the weight."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.ASGD(groups, **self.model_dump(exclude={"kind"}))


class Adam(Part):
    """Adam (Kingma, Ba 2015), and AMSGrad (Reddi, Kale, Kumar 2018)."""

    kind: Literal["adam"] = "adam"
    unit: ClassVar[Unit] = "number"
    lr: Rate = 1e-3
    """Peak learning rate."""
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    eps: Above0 = 1e-8
    """Added to the root of the averaged square, so that nothing is divided by 0."""
    weight_decay: From0 = 0.0
    """Added to the gradient, times the weight, before the averages."""
    amsgrad: bool = False
    """Divide by the greatest averaged square so far."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, fused=True, **self.model_dump(exclude={"kind"}))


class AdamW(Part):
    """Adam with decoupled weight decay (Loshchilov, Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"
    unit: ClassVar[Unit] = "number"
    lr: Rate = 1e-3
    """Peak learning rate."""
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    eps: Above0 = 1e-8
    """Added to the root of the averaged square, so that nothing is divided by 0."""
    weight_decay: From0 = 0.01
    """Share of each weight, times the rate, that a step takes away."""
    amsgrad: bool = False
    """Divide by the greatest averaged square so far."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, fused=True, **self.model_dump(exclude={"kind"}))


class Adamax(Part):
    """Adam with the largest gradient instead of the root mean square (Kingma, Ba 2015, section 7.1)."""

    kind: Literal["adamax"] = "adamax"
    unit: ClassVar[Unit] = "number"
    lr: Rate = 2e-3
    """Peak learning rate."""
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    """Decay of the average of the gradient and of its largest size."""
    eps: Above0 = 1e-8
    """Added to the size of a gradient, so that nothing is divided by 0."""
    weight_decay: From0 = 0.0
    """Added to the gradient, times the weight."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.Adamax(groups, foreach=True, **self.model_dump(exclude={"kind"}))


class NAdam(Part):
    """Adam with Nesterov's momentum (Dozat 2016)."""

    kind: Literal["nadam"] = "nadam"
    unit: ClassVar[Unit] = "number"
    lr: Rate = 2e-3
    """Peak learning rate."""
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    eps: Above0 = 1e-8
    """Added to the root of the averaged square, so that nothing is divided by 0."""
    weight_decay: From0 = 0.0
    """Added to the gradient, times the weight."""
    momentum_decay: From0 = 4e-3
    """How fast the momentum rises to the first of `betas`."""
    decoupled_weight_decay: bool = False
    """Decay the weights as AdamW does, instead of through the gradient."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.NAdam(groups, foreach=True, **self.model_dump(exclude={"kind"}))


class RAdam(Part):
    """Rectified Adam (Liu et al. 2020), which takes steps of momentum alone until the averaged square can be relied on."""

    kind: Literal["radam"] = "radam"
    unit: ClassVar[Unit] = "number"
    lr: Rate = 1e-3
    """Peak learning rate."""
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    eps: Above0 = 1e-8
    """Added to the root of the averaged square, so that nothing is divided by 0."""
    weight_decay: From0 = 0.0
    """Added to the gradient, times the weight."""
    decoupled_weight_decay: bool = False
    """Decay the weights as AdamW does, instead of through the gradient."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.RAdam(groups, foreach=True, **self.model_dump(exclude={"kind"}))


class Adafactor(Part):
    """Adafactor (Shazeer, Stern 2018): the averaged squares of a matrix as a row and a column.

    Its idea of a rate is its own: a step is the root mean square of the weights (at least the second of `eps`) times the smaller of
    `lr` and 1 / sqrt(steps), so `lr` is a relative step; the paper's is 0.01.
    """

    kind: Literal["adafactor"] = "adafactor"
    unit: ClassVar[Unit] = "parameter"
    lr: Rate = 1e-2
    """Largest relative step, at its peak."""
    beta2_decay: Annotated[float, Field(le=0)] = -0.8
    """Power of the number of steps with which the averages of squares forget."""
    eps: tuple[Above0 | None, From0] = (None, 1e-3)
    """Least root of an averaged square (null: the precision of the numbers), and least size of weights that steps are relative to."""
    d: Annotated[float, Field(ge=1)] = 1.0
    """Largest root mean square of an update before the rate; a larger one is scaled down to it."""
    weight_decay: From0 = 0.0
    """Share of each weight, times the rate, that a step takes away."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(groups, **self.model_dump(exclude={"kind"}))


class Lbfgs(Part):
    """L-BFGS (Liu, Nocedal 1989), which evaluates a batch several times for a step: for the full batch, or large ones."""

    kind: Literal["lbfgs"] = "lbfgs"
    unit: ClassVar[Unit] = "all"
    lr: Rate = 1.0
    """Length of a step along the direction found; with a line search, of the first one that is tried."""
    max_iter: Annotated[int, Field(ge=1)] = 20
    """Iterations on a batch."""
    max_eval: Annotated[int, Field(ge=1)] | None = None
    """Evaluations of a batch; null is 5 for every 4 iterations."""
    tolerance_grad: From0 = 1e-7
    """The largest part of the gradient below which a batch is done."""
    tolerance_change: From0 = 1e-9
    """The change of loss or weights below which it is."""
    history_size: Annotated[int, Field(ge=1)] = 100
    """Steps that the curvature is made of."""
    line_search_fn: Literal["strong_wolfe"] | None = "strong_wolfe"
    """How far to go along a direction: until the strong Wolfe conditions hold, or null: the rate says it."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        given = one_rate(groups, self.kind)
        names = {"names": [name for group in given for name in group["names"]]} if "names" in given[0] else {}
        together = {"params": [parameter for group in given for parameter in group["params"]], **names}
        rate = {"lr": given[0]["lr"]} if "lr" in given[0] else {}
        return FullLbfgs([together | rate], **self.model_dump(exclude={"kind"}))


Simple = Sgd | Adagrad | Adadelta | RmsProp | Rprop | Asgd | Adam | AdamW | Adamax | NAdam | RAdam
"""Those of torch that treat every weight by itself."""


class Muon(Part):
    """Muon (Jordan et al. 2024): momentum, of which each matrix is made orthogonal before the step.

    Takes the weights of hidden layers, filters of convolutions as matrices of (channels out, the rest). All else, that is vectors,
    embeddings and the last layer, goes to the companion. A group's lr_scale and a schedule work on both alike.
    """

    kind: Literal["muon"] = "muon"
    unit: ClassVar[Unit] = "parameter"
    lr: Rate = 0.02
    """Peak learning rate of the matrices."""
    momentum: Below1 = 0.95
    """Decay of the average of the gradient."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    """Iterations of Newton and Schulz towards an orthogonal matrix."""
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    """Coefficients of their quintic polynomial."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"
    """The factor on a matrix's rate: sqrt(max(1, rows / columns)), or 0.2 * sqrt(max(rows, columns)), which makes steps as large as
    AdamW's, so that its rates serve (Liu et al. 2025)."""
    weight_decay: From0 = 0.0
    """Share of each weight, times the rate, that a step takes away."""
    companion: Annotated[Simple | Lion, Field(discriminator="kind")] = AdamW()
    """The optimizer of all that is no hidden matrix, with a peak rate of its own."""

    @model_validator(mode="after")
    def companion_has_a_rate(self) -> Self:
        if self.companion.lr == "auto":
            raise ValueError("companion.lr cannot be auto, since only one rate is found: give it a number")
        return self

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        hidden, rest = divided(groups, "hidden")
        parts: list[torch.optim.Optimizer] = []
        if hidden:
            parts.append(HiddenMuon(hidden, **self.model_dump(exclude={"kind", "companion"})))
        if rest:
            parts.append(self.companion.build([self._accompanying(group) for group in rest]))
        return Together(parts)

    def _accompanying(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group with the companion's rate, scaled as its own is."""
        if "lr" not in group:
            return group
        assert not isinstance(self.lr, str) and not isinstance(self.companion.lr, str)
        return group | {"lr": self.companion.lr * group["lr"] / self.lr}


Optimizer = Annotated[Simple | Adafactor | Lbfgs | Muon | Library, Field(discriminator="kind")]
