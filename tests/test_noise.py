"""What layers draw in training: the same bits for a row wherever it is computed, and numbers as random as they should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.data import counter
from dlopt.data.feed import Batch
from dlopt.models import Cnn, FtTransformer, Joint, Mlp, Model, Network, Resnet, TableResnet, TextBag, TextCnn, TextTransformer, Vit, noise
from dlopt.models.layers import Dropout, activation, dropout
from dlopt.models.recompute import recompute
from dlopt.part import Signature
from dlopt.train.gradients import accumulated, plain, sharpness_aware
from dlopt.train.loop import peaked, steps
from dlopt.train.losses import loss_of
from dlopt.train.objectives import supervised
from tests import sets
from tests.test_models import image
from tests.test_recompute import network_of as built

KINDS = get_args(Dropout)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_step() -> Iterator[None]:
    yield
    noise.end()


def drawn(layer: nn.Module, values: Tensor, first: int = 0, step: int = 0) -> Tensor:
    """What a layer makes of these rows, from place `first` of a batch on, in a step."""
    noise.begin(7, step)
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
        parts = [drawn(layer, values[low:high], low) for low, high in zip(borders, borders[1:], strict=False)]
        assert torch.equal(torch.cat(parts), whole)


FAMILIES: dict[str, tuple[Signature, Model]] = {
    **{f"mlp {kind}": (sets.signature(image(16, 16, 3), target=sets.THREE), Mlp(hidden=(9, 7), dropout_kind=kind)) for kind in KINDS},
}


def test_places_in_a_row_do_not_depend_on_how_long_the_longest_text_is() -> None:
    for length, shape in ((5, (3, 5, 6)), (9, (3, 9, 6))):
        noise.begin(7, 0)
        noise.part(0, 3, CPU)
        found = noise.Dropout(0.5).train().lanes(shape, CPU)[:, :5]
        attention = noise.Dropout(0.5).lanes((3, 2, length, length), CPU)[:, :, :5, :5]
        if length == 5:
            first, asked = found, attention
    assert torch.equal(found, first) and torch.equal(attention, asked)


@pytest.mark.parametrize("family", ["mlp", "cnn", "resnet", "vit", "text_transformer", "text_cnn", "text_bag", "table_resnet", "ft_transformer", "joint"])
def test_a_network_of_any_family_gives_rows_the_same_outputs_in_parts(family: str) -> None:
    from tests.test_recompute import inputs_of

    network, inputs = built(family).double(), inputs_of(family, 12)
    for layer in network.modules():
        if getattr(layer, "running_mean", None) is not None:
            layer.eval()

    def outputs(low: int, high: int) -> Tensor:
        noise.begin(7, 3)
        noise.part(low, high - low, CPU)
        some = {name: values[low:high] for name, values in inputs.items()}
        if "text" in some:
            longest = int((some["text"] != 0).any(dim=0).sum())
            some["text"] = some["text"][:, : max(1, longest)]
        with torch.no_grad():
            found: Tensor = network(some)
        return found

    whole = outputs(0, 12)
    assert torch.allclose(torch.cat([outputs(0, 5), outputs(5, 7), outputs(7, 12)]), whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(whole, network.eval()(inputs), rtol=1e-3)
