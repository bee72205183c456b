"""Optimizers of the libraries pytorch-optimizer and schedulefree, which are imported when one is built. To add one: a class, and its
name in the union at the end."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from dlopt.optim.optimizers_fields import (
    Above0,
    Below1,
    From0,
    Groups,
    Rate,
    Unit,
    as_groups,
    by_dimensions,
    keeping_gradients,
    library,
    one_rate,
)
from dlopt.part import DloptError, Part

Within = Annotated[float, Field(gt=0, lt=1)]
MOST_SHAMPOO = 4096
"""The largest dimension of a parameter that Shampoo is let at: it decomposes a square matrix of this size."""


class Lars(Part):
    """LARS (You, Gitman, Ginsburg 2017): momentum, with a rate for each matrix in proportion to its norm over its gradient's.

    A step changes a matrix by about the share lr * trust_coefficient. Vectors (biases, norm layers) take plain steps of momentum
    with `lr`, and do not decay.
    """

    kind: Literal["lars"] = "lars"
    unit: ClassVar[Unit] = "parameter"
    lr: Rate = 1.0
    """Peak learning rate."""
    momentum: Below1 = 0.9
    """Share of the last step that goes on in this one."""
    nesterov: bool = False
    """Look ahead along the momentum."""
    trust_coefficient: Above0 = 1e-3
    """Share of a matrix's norm that a step of rate 1 has."""
    weight_decay: From0 = 0.0
    """Added to the gradient, times the weight, before the ratio."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        made = library("pytorch_optimizer", self.kind).LARS(as_groups(groups), **self.model_dump(exclude={"kind"}))
        return keeping_gradients(made)


class Lamb(Part):
    """LAMB (You et al. 2020, version 3 of the paper, without correction of the averages' start).

    Adam's step and the decay, with a rate for each matrix in proportion to its norm, of at most 10, over theirs. Vectors (biases, norm
    layers) have no such ratio.
    """

    kind: Literal["lamb"] = "lamb"
    unit: ClassVar[Unit] = "parameter"
    lr: Rate = 1e-3
    """Peak learning rate: about the share of a matrix that a step changes."""
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    eps: Above0 = 1e-6
    """Added to the root of the averaged square, so that nothing is divided by 0."""
    weight_decay: From0 = 0.01
    """Added to Adam's step, times the weight, before the ratio."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        halves = [half | {"adam": vectors} for group in as_groups(groups) for vectors, half in enumerate(by_dimensions(group))]
        kept = [half | {"adam": bool(half["adam"])} for half in halves if half["params"]]
        settings = {"weight_decouple": False, "adam_debias": True, **self.model_dump(exclude={"kind"})}
        made: torch.optim.Optimizer = library("pytorch_optimizer", self.kind).Lamb(kept, **settings)
        return made


class Lion(Part):
    """Lion (Chen et al. 2023): the sign of an average of gradients. Its rate is 3 to 10 times smaller than Adam's."""

    kind: Literal["lion"] = "lion"
    unit: ClassVar[Unit] = "number"
    lr: Rate = 1e-4
    """Peak learning rate: the size of every weight's step."""
    betas: tuple[Below1, Below1] = (0.9, 0.99)
    """Share of the average in the step's sign, and decay of the average."""
    weight_decay: From0 = 0.0
    """Share of each weight, times the rate, that a step takes away."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = library("pytorch_optimizer", self.kind).Lion(as_groups(groups), **self.model_dump(exclude={"kind"}))
        return made


class Soap(Part):
    """SOAP (Vyas et al. 2025): Adam in the eigenbasis of Shampoo. The first step only measures, and moves nothing."""

    kind: Literal["soap"] = "soap"
    unit: ClassVar[Unit] = "parameter"
    lr: Rate = 3e-3
    """Peak learning rate."""
    betas: tuple[Below1, Below1] = (0.95, 0.95)
    """Decay of the averages of the gradient and of its square."""
    shampoo_beta: Below1 | None = None
    """Decay of the average of gradients' products; null is the second of `betas`."""
    eps: Above0 = 1e-8
    """Added to the root of the averaged square, so that nothing is divided by 0."""
    weight_decay: From0 = 0.01
    """Share of each weight, times the rate, that a step takes away."""
    precondition_frequency: Annotated[int, Field(ge=1)] = 10
    """Steps between two looks for the eigenbasis."""
    max_precondition_dim: Annotated[int, Field(ge=1)] = 2048
    """A larger dimension of a matrix keeps its basis, as Adam's; a look costs its third power."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = library("pytorch_optimizer", self.kind).SOAP(as_groups(groups), **self.model_dump(exclude={"kind"}))
        return made


class Shampoo(Part):
    """Shampoo (Gupta, Koren, Singer 2018): each dimension of a gradient by an inverse root of the sum of its products.

    The sums only grow, so that steps fall as Adagrad's do. No dimension may be larger than 4,096.
    """

    kind: Literal["shampoo"] = "shampoo"
    unit: ClassVar[Unit] = "parameter"
    lr: Rate = 0.03
    """Peak learning rate."""
    momentum: Below1 = 0.0
    """Share of the last step that goes into the gradient of this one."""
    weight_decay: From0 = 0.0
    """Added to the gradient, times the weight."""
    matrix_eps: Above0 = 1e-4
    """What the sums start at, times the identity."""
    preconditioning_compute_steps: Annotated[int, Field(ge=1)] = 10
    """Steps between two computations of the roots, each of which costs the third power of a dimension."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        given = as_groups(groups)
        self._refuse_large(given)
        settings = self.model_dump(exclude={"kind", "preconditioning_compute_steps"})
        made: torch.optim.Optimizer = library("pytorch_optimizer", self.kind).Shampoo(given, **settings)

        def roots_at_the_start_too(optimizer: Any, *_: Any) -> None:
            """The library would wait, and stand still, until the first multiple of the steps."""
            done = optimizer.param_groups[0].get("step", 0)
            optimizer.preconditioning_compute_steps = 1 if done % self.preconditioning_compute_steps == 0 else done + 2

        made.register_step_pre_hook(roots_at_the_start_too)
        return keeping_gradients(made)

    def _refuse_large(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            for index, parameter in enumerate(group["params"]):
                if max(parameter.shape, default=0) > MOST_SHAMPOO:
                    name = group["names"][index] if "names" in group else f"a parameter of shape {tuple(parameter.shape)}"
                    raise DloptError(f"train.optimizer: shampoo takes no dimension above {MOST_SHAMPOO}, and {name} has one: use soap")


class Sophia(Part):
    """Sophia-H (Liu et al. 2024): momentum over an estimate of the curvature (Hutchinson's, by a second back-propagation), clipped.

    The paper's rate is lr * rho here, and its gamma is rho: a step has at most the size lr * rho.
    """

    kind: Literal["sophia"] = "sophia"
    unit: ClassVar[Unit] = "parameter"
    lr: Rate = 0.06
    """Peak learning rate."""
    betas: tuple[Below1, Below1] = (0.96, 0.99)
    """Decay of the averages of the gradient and of the curvature."""
    rho: Above0 = 0.01
    """Largest part of a step, before the rate."""
    eps: Above0 = 1e-12
    """Least curvature that is divided by."""
    weight_decay: From0 = 0.0
    """Share of each weight, times the rate, that a step takes away."""
    update_period: Annotated[int, Field(ge=1)] = 10
    """Steps between two estimates of the curvature, each of which costs about two steps more."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        library("pytorch_optimizer", self.kind)
        from dlopt.optim.optimizers_sophia import EstimatedSophia

        settings = self.model_dump(exclude={"kind", "rho", "update_period"})
        return EstimatedSophia(as_groups(groups), period=self.update_period, p=self.rho, **settings)


class Prodigy(Part):
    """Prodigy (Mishchenko, Defazio 2024): Adam, which finds its rate from how far the weights have gone.

    `lr` is a factor on the rate it finds: leave it at 1, with a schedule if you like. All parameters share one rate.
    """

    kind: Literal["prodigy"] = "prodigy"
    unit: ClassVar[Unit] = "all"
    lr: Rate = 1.0
    """Factor on the rate that is found."""
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    beta3: Below1 | None = None
    """Decay of the averages that the rate is found from; null is the root of the second of `betas`."""
    eps: Above0 = 1e-8
    """Added to the root of the averaged square, so that nothing is divided by 0."""
    weight_decay: From0 = 0.0
    """Share of each weight, times the rate found, that a step takes away."""
    d0: Above0 = 1e-6
    """Where the rate starts."""
    d_coef: Above0 = 1.0
    """Factor on the estimate of the distance: below 1 for smaller rates, above for larger ones."""
    growth_rate: Annotated[float, Field(gt=1)] | None = None
    """Largest factor on the rate from step to step; null is without limit."""
    bias_correction: bool = False
    """Correct the averages' start, as Adam does."""
    safeguard_warmup: bool = False
    """Leave a warm-up's small rates out of the estimate's denominator."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        given = one_rate(groups, self.kind)
        settings = self.model_dump(exclude={"kind", "growth_rate"})
        growth = float("inf") if self.growth_rate is None else self.growth_rate
        made: torch.optim.Optimizer = library("pytorch_optimizer", self.kind).Prodigy(given, growth_rate=growth, **settings)
        return made


class AdEmaMix(Part):
    """AdEMAMix (Pagliardini, Ablin, Grangier 2025): AdamW with a second, slow average of gradients beside the fast one."""

    kind: Literal["ademamix"] = "ademamix"
    unit: ClassVar[Unit] = "number"
    lr: Rate = 1e-3
    """Peak learning rate."""
    betas: tuple[Below1, Below1, Below1] = (0.9, 0.999, 0.9999)
    """Decay of the fast average of the gradient, of its square, and of the slow average."""
    alpha: From0 = 5.0
    """Weight of the slow average in a step."""
    t_alpha_beta3: Annotated[int, Field(ge=1)] | None = None
    """Steps in which alpha and the slow decay rise to what they are; the paper takes the whole run, null is at once."""
    eps: Above0 = 1e-8
    """Added to the root of the averaged square, so that nothing is divided by 0."""
    weight_decay: From0 = 0.0
    """Share of each weight, times the rate, that a step takes away."""

    @model_validator(mode="after")
    def a_rise_has_both_ends(self) -> Self:
        if self.t_alpha_beta3 and (self.betas[0] == 0 or self.betas[2] == 0):
            raise ValueError("t_alpha_beta3 needs the first and the third of betas above 0: raise them or take it out")
        return self

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        settings = {"weight_decouple": True, **self.model_dump(exclude={"kind"})}
        made: torch.optim.Optimizer = library("pytorch_optimizer", self.kind).AdEMAMix(as_groups(groups), **settings)
        return made


class ScheduleFreeSgd(Part):
    """Schedule-free gradient descent (Defazio et al. 2024): an average of the weights in place of a falling rate.

    The model is the average; gradients are taken between it and the newest weights. Use a constant schedule, with a warm-up.
    """

    kind: Literal["schedule_free_sgd"] = "schedule_free_sgd"
    unit: ClassVar[Unit] = "number"
    lr: Rate = 1.0
    """Learning rate."""
    momentum: Within = 0.9
    """How near to the average gradients are taken."""
    weight_decay: From0 = 0.0
    """Added to the gradient, times the weight that it is taken at."""
    r: From0 = 0.0
    """Power of the step with which it counts in the average."""
    weight_lr_power: From0 = 2.0
    """Power of the largest rate so far with which a step counts in the average, so that a warm-up counts less."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        made = library("schedulefree", self.kind).SGDScheduleFree(as_groups(groups), **self.model_dump(exclude={"kind"}))
        made.train()
        return keeping_gradients(made)


class ScheduleFreeAdamW(Part):
    """Schedule-free AdamW (Defazio et al. 2024): an average of the weights in place of a falling rate.

    The model is the average; gradients are taken between it and the newest weights. Use a constant schedule, with a warm-up.
    """

    kind: Literal["schedule_free_adamw"] = "schedule_free_adamw"
    unit: ClassVar[Unit] = "number"
    lr: Rate = 2.5e-3
    """Learning rate."""
    betas: tuple[Within, Below1] = (0.9, 0.999)
    """How near to the average gradients are taken, and decay of the average of their squares."""
    eps: Above0 = 1e-8
    """Added to the root of the averaged square, so that nothing is divided by 0."""
    weight_decay: From0 = 0.0
    """Share, times the rate, of the weights that the gradient is taken at, that a step takes away."""
    r: From0 = 0.0
    """Power of the step with which it counts in the average."""
    weight_lr_power: From0 = 2.0
    """Power of the largest rate so far with which a step counts in the average, so that a warm-up counts less."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        made = library("schedulefree", self.kind).AdamWScheduleFree(as_groups(groups), **self.model_dump(exclude={"kind"}))
        made.train()
        return keeping_gradients(made)


Library = Lars | Lamb | Lion | Soap | Shampoo | Sophia | Prodigy | AdEmaMix | ScheduleFreeSgd | ScheduleFreeAdamW
