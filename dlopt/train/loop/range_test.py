"""The learning-rate range test (Smith 2017): a short training at rates that rise from step to step, and the rate that it suggests.

The loss falls where rates begin to matter and rises where they are too large. Suggested is the geometric mean of the rate at which half
of the fall is done and of the one with the lowest loss. For a network on digits with SGD, momentum, Adam, RMSprop and Adagrad, and batches
of 32, 128 and 1,024, that was within ten times of the best fixed rate for two epochs; of LAMB, Muon and SOAP, up to ten times too high,
so a third and a ninth of it are tried as well.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from dlopt.data.feed.batches import Batch
from dlopt.part import DloptError
from dlopt.train.loop.pipeline import Pipeline
from dlopt.train.loop.steps import PEAK

LOW, HIGH, STEPS = 1e-7, 100.0, 100
"""The first rate, the last one, and how many there are, each as many times as large as the one before."""
WIDTH = 2
"""Standard deviation, in steps, of the bell with which losses are smoothed for the suggestion."""
MOST = 8.0
"""Without noise the loss can go on falling past the largest stable rate, since what grows there starts from next to nothing."""
TRIED = (1.0, 1 / 3, 1 / 9)
"""What is tried of the rate that the losses suggest."""
TRAILING = 0.9
"""Decay of the mean by which a divergence is seen."""
DIVERGED = 4.0
"""How many times the lowest loss so far ends the test, if it is more than the first one too."""

Build = Callable[[nn.Module, float], Pipeline]
"""The steps of a job on a network, at a peak rate; groups of the optimizer remember theirs under PEAK."""


class Sweep(NamedTuple):
    """What a range test has seen."""

    rates: list[float]
    losses: list[float]
    """Of the batch at each rate, before the step; all of them finite."""
    suggested: float


def range_test(loss_at: Callable[[float], float], low: float = LOW, high: float = HIGH, count: int = STEPS) -> Sweep:
    """Ask for the losses at rates from low to high until they diverge. loss_at: takes one step at a rate and gives the loss before it.

    Raises DloptError when the loss falls at none of them.
    """
    rates: list[float] = []
    losses: list[float] = []
    mean, best = 0.0, math.inf
    for rate in np.geomspace(low, high, count).tolist():
        loss = loss_at(rate)
        if not math.isfinite(loss):
            break
        rates.append(rate)
        losses.append(loss)
        mean = TRAILING * mean + (1 - TRAILING) * loss
        trailing = mean / (1 - TRAILING ** len(losses))
        best = min(best, trailing)
        if trailing > max(DIVERGED * best, losses[0]):
            break
    return Sweep(rates, losses, suggested(rates, losses))


def suggested(rates: list[float], losses: list[float]) -> float:
    """The geometric mean of the rate where half of the fall is done and of the one with the lowest loss, losses smoothed; at most MOST
    times the former.

    Raises DloptError when there is no fall.
    """
    if len(losses) > 4 * WIDTH:
        start = float(np.median(losses[: max(len(losses) // 10, 3)]))
        smooth = _smoothed(np.minimum(losses, start + abs(start)))  # what comes after divergence is not to blur what was before
        lowest = int(smooth.argmin())
        above = np.flatnonzero(smooth[:lowest] > (start + smooth[lowest]) / 2)
        if smooth[lowest] < start and len(above):
            half = rates[above[-1] + 1]
            return min(math.sqrt(half * rates[lowest]), MOST * half)
    raise DloptError("train.optimizer.lr: auto has found no rate at which the loss falls: give a number")


def sweep(network: nn.Module, build: Build, batches: Sequence[Batch], seed: int = 0) -> Sweep:
    """The range test of a network, one step a batch, on copies: the network and random numbers are afterwards as they were.

    What it suggests is then tried, for half as many steps, against lower rates: optimizers whose steps are as long whatever the gradient
    is want one. seed: of the random numbers that a user's own network draws from torch's generator.
    """
    devices = {parameter.device.index for parameter in network.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        result = range_test(_stepper(network, build, batches), count=len(batches))
        tried: dict[float, float] = {}
        for rate in (result.suggested * share for share in TRIED):
            torch.manual_seed(seed)
            tried[rate] = _end(network, build, batches[: -(-len(batches) // 2)], rate)
    return result._replace(suggested=min(tried, key=lambda rate: tried[rate]))


def _stepper(network: nn.Module, build: Build, batches: Sequence[Batch]) -> Callable[[float], float]:
    """Takes a copy one step on at a rate, and gives the loss before it. A group whose peak does not follow the optimizer's keeps it."""
    groups = build(copy.deepcopy(network), 2.0).optimizer.param_groups
    pipeline = build(copy.deepcopy(network), 1.0)
    fixed = [(mine, mine[PEAK]) for mine, its in zip(pipeline.optimizer.param_groups, groups, strict=True) if mine[PEAK] == its[PEAK]]
    now = [0.0]
    taken = _losses(pipeline, batches, lambda _: now[0])

    def loss_at(rate: float) -> float:
        now[0] = rate
        for group, peak in fixed:
            group[PEAK] = peak / rate
        return next(taken)

    return loss_at


def _end(network: nn.Module, build: Build, batches: Sequence[Batch], rate: float) -> float:
    """The mean loss of the last quarter of the batches at a fixed rate; infinite where it is no number."""
    losses = list(_losses(build(copy.deepcopy(network), rate), batches, lambda _: 1.0))
    mean = float(np.mean(losses[-(len(losses) // 4 or 1) :]))
    return mean if math.isfinite(mean) else math.inf


def _losses(pipeline: Pipeline, batches: Sequence[Batch], factor: Callable[[int], float]) -> Iterator[float]:
    """The losses of the steps, as training takes them; NaN for one that is left out for no good reason."""
    if hasattr(pipeline.optimizer, "train"):  # of schedule-free ones
        pipeline.optimizer.train()
    for step in pipeline.steps(batches, factor):
        yield step.loss.item() if step.taken or step.overflowed else math.nan


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Each value the mean of those around it, in weights of a bell; the ends go on beyond the ends."""
    bell = np.exp(-0.5 * (np.arange(-3 * WIDTH, 3 * WIDTH + 1) / WIDTH) ** 2)
    return np.convolve(np.pad(values, 3 * WIDTH, mode="edge"), bell / bell.sum(), mode="valid")
