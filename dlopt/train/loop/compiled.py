"""torch.compile for the network in training, or a line on why not. It is not to the bit what it was: compiled layers add up in another
order. The masks of dropout are the same."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlopt.data.feed.batches import Batch
from dlopt.models import Network, noise
from dlopt.models.layers import buffers_kept
from dlopt.part import Feature
from dlopt.train.loop.objectives import Objective

NOISY = ("torch._dynamo", "torch._inductor", "torch._functorch")


class Compiled:
    """The forward pass of a network, compiled where it is trained; for any number of rows and any length of texts at once."""

    def __init__(self, network: nn.Module, features: tuple[Feature, ...], plainly: Callable[[], bool]) -> None:
        """plainly: whether layers are listened to now, for which they must be called one by one."""
        self.network, self.features, self.plainly = network, features, plainly
        self.plain: Callable[[dict[str, Tensor]], Tensor] = network.forward
        self.fast: Callable[[dict[str, Tensor]], Tensor] = torch.compile(network.forward)

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        rows = len(inputs[self.features[0].name])
        if rows < 2 or not self.network.training or not torch.is_grad_enabled() or self.plainly():  # of 0 or 1 row it would be another
            return self.plain(inputs)
        for feature in self.features:
            torch._dynamo.maybe_mark_dynamic(inputs[feature.name], [0, 1] if feature.holds == "tokens" else [0])
        if noise.now.rows is not None:
            torch._dynamo.maybe_mark_dynamic(noise.now.rows, 0)
        return self.fast(inputs)


def compile_network(
    network: Network,
    features: tuple[Feature, ...],
    objective: Objective,
    batch: Batch,
    plainly: Callable[[], bool] = lambda: False,
) -> str | None:
    """Let the network be compiled from now on; or why it stays as it is, in one line, when a step on a batch shows that it cannot be.

    Weights, buffers and random numbers are afterwards as they were. All workers come to the same end.
    """
    why = _known(network, batch.target.device)
    why = why or _agreed(_failure(lambda: _try_compiler(batch.target.device)))  # alone: nobody is to wait for who has no compiler
    if why is None:
        network.forward = Compiled(network, features, plainly)  # type: ignore[method-assign]
        why = _agreed(_failure(lambda: _try(network, objective, batch)))
        if why:
            del network.forward
    if why is None:
        torch._dynamo.config.suppress_errors = True  # what other batches may bring
        return None
    return f"resources.compile: the network is trained as it is, not compiled: {why}"


def _known(network: nn.Module, device: torch.device) -> str | None:
    """What is not even to be tried: in torch 2.13 it ends the process (pytorch #181618)."""
    if device.type == "cpu" and any(isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) for layer in network.modules()):
        return "torch's compiler spoils the memory of convolutions on a CPU (pytorch issue 181618)"
    return None


def _failure(work: Callable[[], None]) -> str | None:
    """The first line of what goes wrong in it, if anything does."""
    try:
        with _quiet():
            work()
    except Exception as error:  # a compiler fails in ways without number
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return None


def _try_compiler(device: torch.device) -> None:
    values = torch.ones(8, device=device, requires_grad=True)
    torch.compile(lambda values: (values * values).sum())(values).backward()


def _try(network: nn.Module, objective: Objective, batch: Batch) -> None:
    """A step's work, without a trace."""
    training, devices = network.training, [batch.target.device] if batch.target.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), noise.step(0, 0), buffers_kept(network):
            objective(network.train(), batch).loss.backward()
    finally:
        network.train(training)
        for parameter in network.parameters():
            parameter.grad = None


def _agreed(why: str | None) -> str | None:
    """The first worker's reason that has one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return why
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, why)
    return next((one for one in everyones if one), None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says while it compiles."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
