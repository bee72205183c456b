"""What layers draw in training: the same bits for a row wherever it is computed, and numbers as random as they should be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.data import counter
from dlopt.data.feed.batches import Batch, shortened
from dlopt.models import noise
from dlopt.models.layers import Dropout, activation, dropout
from dlopt.models.recompute import recompute
from dlopt.train.loop.gradients import Gradient, accumulated, plain, sharpness_aware
from dlopt.train.loop.losses import loss_of
from dlopt.train.loop.objectives import supervised
from dlopt.train.loop.steps import peaked, steps
from tests import sets
from tests.models.test_recompute import FAMILIES, inputs_of, network_of

KINDS = get_args(Dropout)
CPU = torch.device("cpu")


def drawn(layer: nn.Module, values: Tensor, first: int = 0, step: int = 0) -> Tensor:
    """What a layer makes of these rows, from place `first` of a batch on, in a step."""
    with noise.step(7, step):
        noise.part(first, len(values), CPU)
        found: Tensor = layer.train()(values)
    return found


def named(layer: nn.Module) -> nn.Module:
    noise.key(layer)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{kind: lambda kind=kind: dropout(kind, 0.3) for kind in KINDS},  # type: ignore[misc]
    "rrelu": lambda: activation("rrelu"),
    "torch": lambda: nn.Dropout(0.3),
    "torch by channel": lambda: nn.Dropout2d(0.3),
    "torch alpha": lambda: nn.FeatureAlphaDropout(0.3),
    "torch rrelu": lambda: nn.RReLU(),
}


@pytest.mark.parametrize("shape", [(11, 6), (11, 3, 5), (11, 4, 3, 7), (11, 2, 2, 3, 2)])
@pytest.mark.parametrize("name", LAYERS)
def test_rows_have_the_same_numbers_in_parts_as_in_the_whole_batch(name: str, shape: tuple[int, ...]) -> None:
    layer, values = named(LAYERS[name]()), torch.randn(shape)
    whole = drawn(layer, values)
    assert not torch.equal(whole, values)
    for borders in ([0, 4, 11], [0, 1, 1, 8, 11]):
        parts = [drawn(layer, values[low:high], low) for low, high in itertools.pairwise(borders)]
        assert torch.equal(torch.cat(parts), whole)


def test_numbers_are_those_of_splitmix64_for_the_key_of_the_row() -> None:
    layer = noise.Dropout(0.5)
    layer.stream = 99
    with noise.step(7, 700):
        noise.part(2, 3, CPU)
        found = layer.lanes((3, 4, 6), CPU).reshape(12, 6).numpy()
    gamma, signed = np.uint64(counter.GAMMA), np.int16
    with np.errstate(over="ignore"):
        step = counter.mix(np.uint64([700]) * gamma + counter.stream(7, noise.PURPOSE))
        keys = counter.mix(np.arange(3, 6).astype(np.uint64) * gamma + step) + np.uint64(99)  # the first key is of all rows together
        places = (np.arange(4).astype(np.uint64)[:, None] << np.uint64(21)) + np.arange(2).astype(np.uint64)
        words = counter.mix(keys[:, None, None] + places * gamma)
    assert np.array_equal(words.astype("<u8").view("<u2").astype(signed).reshape(12, 8)[:, :6], found)


def test_places_in_a_row_do_not_depend_on_how_long_the_longest_text_is() -> None:
    layer = named(dropout("standard", 0.5))
    with noise.step(7, 0):
        noise.part(0, 3, CPU)
        short, long = (layer.lanes((3, length, 6), CPU) for length in (5, 9))  # type: ignore[operator]
        few, many = (layer.lanes((3, 2, length, length), CPU) for length in (5, 9))  # type: ignore[operator]
    assert torch.equal(long[:, :5], short)
    assert torch.equal(many[:, :, :5, :5], few)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_of_any_family_gives_rows_the_same_outputs_in_parts(family: str) -> None:
    network, inputs = network_of(family).double(), inputs_of(family, 12)
    for layer in network.modules():
        layer.training = getattr(layer, "running_mean", None) is None

    def outputs(low: int, high: int) -> Tensor:
        with torch.no_grad(), noise.step(7, 3):
            noise.part(low, high - low, CPU)
            found: Tensor = network(shortened({name: values[low:high] for name, values in inputs.items()}, FAMILIES[family][0].inputs))
        return found

    whole = outputs(0, 12)
    torch.testing.assert_close(torch.cat([outputs(0, 5), outputs(5, 7), outputs(7, 12)]), whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(whole, network.eval()(inputs), rtol=1e-3)


def test_layers_steps_rows_and_places_are_independent() -> None:
    """Of 4,096 numbers each, of which any two agree in about half: 6 standard deviations are 192."""
    layers = nn.Sequential(*(noise.Dropout(0.5) for _ in range(3)))
    noise.key(layers)
    masks = {(number, step): drawn(layer, torch.ones(64, 64), step=step) == 0 for step in range(4) for number, layer in enumerate(layers)}
    for one, other in itertools.combinations(masks.values(), 2):
        assert abs(int((one == other).sum()) - 2048) < 192
    mask = masks[0, 0]
    for by in range(1, 64):
        assert abs(int((mask == mask.roll(by, 0)).sum()) - 2048) < 6 * math.sqrt(4096 / 2)  # each pair counts twice where by is 32
        assert abs(int((mask == mask.roll(by, 1)).sum()) - 2048) < 6 * math.sqrt(4096 / 2)


def test_numbers_are_uniform_and_what_four_of_one_word_say_together_too() -> None:
    """Chi-square of 256 and of 4,096 cells, whose deviation is sqrt(2 * cells)."""
    layer = named(dropout("standard", 0.5))
    with noise.step(1, 0):
        noise.part(0, 4096, CPU)
        found = (layer.lanes((4096, 64), CPU).long() + 32768).reshape(-1, 4)  # type: ignore[operator]
    for cells in (found >> 8, (found & 255), ((found >> 13) * torch.tensor([512, 64, 8, 1])).sum(1)):
        count = 4096 if cells.dim() == 1 else 256
        expected = cells.numel() / count
        chi = float(((torch.bincount(cells.flatten(), minlength=count) - expected) ** 2).sum() / expected)
        assert abs(chi - count) < 5 * math.sqrt(2 * count)


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
def test_each_row_and_each_unit_loses_its_share(p: float) -> None:
    lost = drawn(named(noise.Dropout(p)), torch.ones(512, 512)) == 0
    limit = 5 * math.sqrt(p * (1 - p) / 512)
    assert (lost.double().mean(0) - p).abs().max() < limit and (lost.double().mean(1) - p).abs().max() < limit
    assert lost.double().mean().item() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p)) / 512)


def test_values_are_those_of_torchs_layers_for_the_same_masks() -> None:
    values = torch.randn(40, 30)
    for kind, function in (("standard", F.dropout), ("alpha", F.alpha_dropout)):
        found = drawn(named(dropout(kind, 0.3)), values)  # type: ignore[arg-type]
        torchs = torch.stack([function(values, 0.3, training=True) for _ in range(60)])  # each number kept and dropped
        assert ((torchs - found).abs().amin(0) < 1e-6).all()


def test_a_layer_that_a_user_calls_twice_draws_twice_and_again_on_the_way_back() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.linear = nn.Dropout(0.5), nn.Linear(6, 6)

        def forward(self, values: Tensor) -> Tensor:
            return self.drop(self.linear(self.drop(values)))

    torch.manual_seed(0)
    net = nn.Sequential(Twice(), Twice())
    noise.key(net)
    values, found = torch.ones(8, 6), []
    for again in (False, True):
        assert recompute(net) == 2 if again else True
        with noise.step(1, 0):
            noise.part(0, 8, CPU)
            assert not torch.equal(net[0].drop(values), net[0].drop(values))
            net.zero_grad()
            net(values).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None])
    assert len(found[0]) == 4 and all(map(torch.equal, *found))


def test_without_a_step_a_layer_draws_from_torchs_generator() -> None:
    layer, values = noise.Dropout(0.5).train(), torch.ones(20, 20)
    torch.manual_seed(1)
    first, second = layer(values), layer(values)
    torch.manual_seed(1)
    assert torch.equal(layer(values), first) and not torch.equal(first, second)


class Watched(nn.Module):
    """A linear layer behind dropout, which notes what is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.linear, self.seen = noise.Dropout(0.5), nn.Linear(8, 3), list[Tensor]()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        self.seen.append(self.drop(torch.ones_like(inputs["x"])) == 0)
        found: Tensor = self.linear(self.drop(inputs["x"]))
        return found


def seen(gradient: Gradient, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, parts: int = 1) -> list[Tensor]:
    """What was dropped in each forward pass of two steps; parts of a pass as one."""
    torch.manual_seed(0)
    net = Watched()
    noise.key(net)
    batch = Batch({"x": torch.randn(12, 8)}, torch.arange(12) % 3, 12)
    objective = supervised(loss_of(None, sets.THREE, nn.Identity()), 0.0, 0.0, 1)
    for _ in steps(net, peaked(optimizer(net.parameters(), lr=0.1)), [batch, batch], objective, gradient, lambda _: 1.0, seed=3):
        pass
    return [torch.cat(net.seen[start : start + parts]) for start in range(0, len(net.seen), parts)]


def test_all_forward_passes_of_a_step_have_the_same_masks_and_those_of_another_step_others() -> None:
    one, two = seen(plain)
    assert not torch.equal(one, two)
    for found in (seen(sharpness_aware(plain, 0.05)), seen(accumulated(5), parts=3), seen(plain, torch.optim.LBFGS)):
        half = len(found) // 2
        assert all(torch.equal(mask, one if place < half else two) for place, mask in enumerate(found))
    assert len(found) > 4  # closures of L-BFGS
