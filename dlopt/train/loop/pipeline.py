"""What a step of a job does, in the order in which it is done. Training, the rate's range test and find-batch all take these steps.

| what        | is                                                            | where                     |
|-------------|---------------------------------------------------------------|---------------------------|
| forward     | the objective, in the job's precision                         | objectives, precision     |
| scaled      | its loss, for the gradients that float16 has no room for      | precision                 |
| accumulated | gradients of micro batches                                    | gradients                 |
| reduced     | over workers                                                  | parallel                  |
| unscaled    | gradients as they are                                         | gradients                 |
| sharp       | again at the worst place near by                              | gradients                 |
| curved      | with an estimate of the curvature, for optimizers that ask    | gradients                 |
| clipped     | left out where not finite, centralized, clipped               | steps                     |
| stepped     | by the optimizer, then held to the largest norm               | steps                     |
| held        | to a form: zeros stay zeros                                   | tuning                    |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from dlopt.data.feed.batches import Batch
from dlopt.models.norms import BatchNorm
from dlopt.train.job import Train
from dlopt.train.loop.gradients import accumulated, curved, plain, sharpness_aware, unscaled
from dlopt.train.loop.objectives import Objective
from dlopt.train.loop.precision import LossScale, mixed, scale_of
from dlopt.train.loop.steps import Step, steps
from dlopt.train.parallel.base import Parallel
from dlopt.train.watch.profile import Unprofiled


@dataclass
class Pipeline:
    """The steps of a job on a network."""

    train: Train
    objective: Objective
    """Of this worker's part of a batch; the pipeline computes it in the job's precision."""
    optimizer: torch.optim.Optimizer
    parallel: Parallel
    """Which has the network."""
    seed: int = 0
    profile: Unprofiled = field(default_factory=Unprofiled)
    timed: Callable[[Objective], Objective] = lambda objective: objective
    """Puts a clock on the objective."""
    held: Callable[[], None] | None = None
    """What is done to the weights after each step, last of all."""

    def __post_init__(self) -> None:
        train, parallel, together = self.train, self.parallel, self.parallel.together
        micro, network = train.micro_batch_size, parallel.network
        device = next(network.parameters()).device
        self.scale: LossScale | None = scale_of(train.precision)
        self.model = parallel.module()
        self.forward = self.profile.timed("forward", self.timed(mixed(self.objective, train.precision, device, self.scale)))
        over_workers = any(isinstance(layer, BatchNorm) for layer in network.modules())
        gradient = plain if micro is None else accumulated(-(-micro // (together if over_workers else 1)), parallel.partly)
        gradient = unscaled(self.profile.reduced(parallel.gradient(gradient)), self.scale)
        if train.sharpness:
            gradient = sharpness_aware(gradient, train.sharpness.rho, train.sharpness.adaptive, parallel.norm)
        self.gradient = self.profile.timed("backward", curved(gradient, self.optimizer, together, self.scale))

    def steps(self, batches: Iterable[Batch], factor: Callable[[int], float], before: int = 0, sure: bool = True) -> Iterator[Step]:
        """A step for each batch. factor(i): of the schedule for the i-th of them, from 0. before: how many steps there were. sure: as in
        `dlopt.train.loop.steps`."""
        train, parallel = self.train, self.parallel
        given = parallel.batches(iter(batches)), self.forward, self.gradient, factor, train.clip, train.centralize_gradients, self.scale
        for step in steps(self.model, self.optimizer, *given, parallel.norm, self.seed, before, sure):
            if step.taken and train.max_norm:
                train.max_norm.apply(parallel.local)
            if step.taken and self.held:
                self.held()
            yield step
