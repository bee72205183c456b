"""Spread of weights and activations, layer by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.models import build_network
from dlopt.models.cnn import Cnn
from dlopt.models.layers import Activation, Init, activation, initialize
from dlopt.models.lsuv import lsuv
from dlopt.models.mlp import Mlp
from dlopt.models.resnet import Resnet
from dlopt.models.spread import spread
from dlopt.models.table import FtTransformer, TableResnet
from dlopt.models.text import TextCnn
from dlopt.models.transformer import TextTransformer
from dlopt.models.vit import Vit
from dlopt.part import Feature, Signature
from tests.models.test_layers import CATEGORIES, IMAGE, TARGET, TEXT
from tests.models.test_lsuv import PIXELS


def deep(name: Activation, init: Init, layers: int = 30, width: int = 256) -> list[dict[str, Any]]:
    """The spread of a deep network on normal numbers."""
    torch.manual_seed(0)
    network = nn.Sequential(*[part for _ in range(layers) for part in (nn.Linear(width, width), activation(name))])
    initialize(network, init)
    return spread(network, torch.randn(256, width))


def a_layer(deviations: list[float]) -> float:
    """By how much each layer multiplies them, on average."""
    return float((deviations[-1] / deviations[0]) ** (1 / (len(deviations) - 1)))


def numbers(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), values.std(correction=0).item()


def test_kaiming_keeps_the_deviation_of_a_deep_relu_network_and_xavier_halves_its_variance() -> None:
    outputs = [layer["outputs"]["std"] for layer in deep("relu", "kaiming_normal")]
    assert outputs[0] == pytest.approx(math.sqrt(2), rel=0.02)
    assert a_layer(outputs) == pytest.approx(1, rel=0.02)
    falling = [layer["outputs"]["std"] for layer in deep("relu", "xavier_normal")]
    assert falling[0] == pytest.approx(1, rel=0.02)
    assert a_layer(falling) == pytest.approx(math.sqrt(1 / 2), rel=0.02)


def test_xavier_keeps_the_deviation_of_a_deep_linear_network() -> None:
    outputs = [layer["outputs"]["std"] for layer in deep("linear", "xavier_uniform")]
    assert outputs == pytest.approx([1] * 30, rel=0.06)


def test_standard_normal_weights_explode_in_relu_and_saturate_tanh_and_small_ones_vanish() -> None:
    rising = [layer["activations"]["std"] for layer in deep("relu", "normal")]
    for before, after in pairwise(rising):
        assert after / before == pytest.approx(math.sqrt(128), rel=0.15)  # half of 256 units give something
    assert a_layer(rising) == pytest.approx(math.sqrt(128), rel=0.02)
    saturated = [layer["activations"]["saturated"] for layer in deep("tanh", "normal")]
    flat = 1 - math.erf(math.atanh(0.98) / 16 / math.sqrt(2))  # normal numbers with the deviation of a sum of 256
    assert saturated == pytest.approx([flat] * 30, abs=0.02)
    falling = [layer["activations"]["std"] for layer in deep("tanh", "small_normal")]
    assert falling[0] < 0.2 and falling[-1] < 1e-20


def test_what_is_not_finite_is_none_so_that_it_is_json() -> None:
    layers = deep("relu", "normal", layers=60)
    assert json.loads(json.dumps(layers, allow_nan=False)) == layers
    assert layers[-1]["outputs"] == {"mean": None, "std": None} and layers[-1]["weights"]["std"] == pytest.approx(1, rel=0.01)


def test_a_network_is_told_layer_by_layer_behind_its_preprocessing() -> None:
    torch.manual_seed(0)
    images = {"image": torch.randint(0, 256, (8, 28, 28, 1), dtype=torch.uint8)}
    network = build_network(Cnn(), Signature(inputs=(IMAGE,), target=TARGET), {"image": PIXELS}, 7)
    found = spread(network, images)
    assert [layer["kind"] for layer in found] == ["Conv2d 1->16 3x3", "Conv2d 16->32 3x3", "Linear 1568->128", "Linear 128->10"]
    first = network.get_submodule(found[0]["layer"])
    assert isinstance(first, nn.Conv2d)
    outputs = first(images["image"].float().permute(0, 3, 1, 2) / 255).detach()
    after = torch.relu(nn.functional.max_pool2d(outputs, 2))
    weights = found[0]["weights"]
    assert (weights["mean"], weights["std"]) == pytest.approx(numbers(first.weight), rel=1e-5)
    assert (weights["min"], weights["max"]) == (first.weight.min(), first.weight.max())
    assert (found[0]["outputs"]["mean"], found[0]["outputs"]["std"]) == pytest.approx(numbers(outputs), rel=1e-5)
    activations = found[0]["activations"]
    assert (activations["mean"], activations["std"]) == pytest.approx(numbers(after), rel=1e-5)
    assert activations["zero"] == pytest.approx((after == 0).float().mean().item()) and activations["saturated"] == 0
    assert found[-1]["activations"] == found[-1]["outputs"] | {"zero": 0, "saturated": 0}  # nothing follows the last layer


@pytest.mark.parametrize(
    ("name", "values", "share"),
    [
        ("sigmoid", [-5.0, -4.5, 0.0, 5.0], 2 / 4),
        ("tanh", [-2.5, 2.0, 0.0, 2.5], 2 / 4),
        ("hardtanh", [-2.0, 0.0, 0.9, 1.1], 2 / 4),
        ("relu6", [-1.0, 3.0, 6.5, 7.0], 2 / 4),
        ("relu", [-1.0, 3.0, 6.5, 70.0], 0),
    ],
)
def test_units_whose_slope_is_all_but_flat_are_saturated(name: Activation, values: list[float], share: float) -> None:
    network = nn.Sequential(nn.Linear(4, 4), activation(name))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(4))
        network[0].bias.zero_()
    assert spread(network, torch.tensor([values]))[0]["activations"]["saturated"] == share


def test_attention_is_one_layer_and_embeddings_are_layers() -> None:
    class Texts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.zeros(1, 1, 32))
            self.words = nn.Embedding(100, 32)
            layer = nn.TransformerEncoderLayer(32, 4, 64, activation=nn.GELU(), batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.head = nn.Linear(32, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.encoder(torch.cat((self.first.expand(len(ids), -1, -1), self.words(ids)), dim=1))[:, 0])

    network = Texts()
    found = spread(network, torch.randint(0, 100, (4, 7)))
    block = ["MultiheadAttention 32, 4 heads", "Linear 32->64", "Linear 64->32"]
    assert [layer["kind"] for layer in found] == ["Embedding 100x32", *block, *block, "Linear 32->3"]
    assert [layer["layer"] for layer in found][:3] == ["words", "encoder.layers.0.self_attn", "encoder.layers.0.linear1"]
    attention = network.encoder.layers[0].self_attn
    weights = torch.cat((attention.in_proj_weight.flatten(), attention.out_proj.weight.flatten()))
    assert (found[1]["weights"]["mean"], found[1]["weights"]["std"]) == pytest.approx(numbers(weights), rel=1e-5)
    assert found[2]["activations"]["std"] < found[2]["outputs"]["std"]  # behind GELU


def test_categories_and_their_embeddings_are_told() -> None:
    network = build_network(Mlp(), Signature(inputs=(CATEGORIES,), target=TARGET), {}, 7)
    found = spread(network, {"categories": torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)})
    assert [layer["kind"].split()[0] for layer in found] == ["Embedding", "Embedding", "Linear", "Linear"]


def test_batch_norm_counts_as_in_training() -> None:
    torch.manual_seed(0)
    network, rows = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4), nn.ReLU()), torch.randn(100, 8) * 50 + 9
    told = spread(network, rows)[0]["outputs"]
    assert (told["mean"], told["std"]) == pytest.approx(numbers(network[:2].train()(rows)), rel=1e-5)


class Restless(nn.Module):
    """Draws numbers, counts and changes its mode in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.layer = nn.Linear(8, 8)

    def forward(self, values: Tensor) -> Tensor:
        self.count += 1
        self.layer.train(not self.layer.training)
        return self.layer(values + torch.rand(8))


def test_the_network_its_mode_its_buffers_and_the_random_numbers_stay_as_they_were() -> None:
    network = nn.Sequential(Restless(), nn.BatchNorm1d(8), nn.PReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
    network(torch.randn(10, 8)).sum().backward()
    network[3].eval()
    inner = network[0].layer.training
    before = {name: value.clone() for name, value in network.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    drawn = torch.get_rng_state()
    assert spread(network, torch.randn(10, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(network.parameters(), gradients, strict=True))
    assert [layer.training for layer in network] == [True, True, True, False, True]
    assert network[0].layer.training is inner
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.modules())


def test_a_forward_pass_that_fails_leaves_no_trace_either() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(3, 4))
    with pytest.raises(RuntimeError):
        spread(network, torch.randn(2, 8))
    assert all(layer.training for layer in network)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.modules())


NUMBERS = Feature(name="numbers", kind="number", dtype="float32", shape=(3,), columns=("c", "d", "e"))
MADE: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[Feature, ...]]] = {
    "resnet": (Resnet, {"widths": (8, 16), "blocks": (1, 1), "stem": "small"}, (IMAGE,)),
    "vit": (Vit, {"patch": 7, "width": 16, "depth": 2, "heads": 2}, (IMAGE,)),
    "text_transformer": (TextTransformer, {"width": 16, "depth": 2, "heads": 2}, (TEXT,)),
    "text_cnn": (TextCnn, {}, (TEXT, CATEGORIES)),
    "table_resnet": (TableResnet, {"width": 16}, (NUMBERS, CATEGORIES)),
    "ft_transformer": (FtTransformer, {"width": 16, "heads": 2}, (NUMBERS, CATEGORIES)),
}


def built(kind: str, init: Init) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of that kind, and 32 raw rows for it."""
    part, settings, inputs = MADE[kind]
    draw = torch.Generator().manual_seed(3)
    values = {
        "image": torch.randint(0, 256, (32, 28, 28, 1), dtype=torch.uint8, generator=draw),
        "text": torch.randint(1, 100, (32, 12), dtype=torch.int32, generator=draw),
        "categories": torch.randint(0, 3, (32, 2), dtype=torch.int32, generator=draw),
        "numbers": torch.randn(32, 3, generator=draw),
    }
    network = build_network(part(init=init, **settings), Signature(inputs=inputs, target=TARGET), {"image": PIXELS}, 7)
    return network, {feature.name: values[feature.name] for feature in inputs}


@pytest.mark.parametrize("kind", MADE)
def test_every_layer_of_every_model_is_told_and_can_be_scaled_by_data(kind: str) -> None:
    network, inputs = built(kind, "lsuv")
    lsuv(network, inputs)
    told = {layer["layer"]: layer for layer in spread(network, inputs)}
    scaled = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)}
    assert len(scaled) > 3 and set(scaled) <= set(told)
    for name, layer in scaled.items():
        assert told[name]["outputs"]["std"] == pytest.approx(0 if not layer.weight.any() else 1, abs=0.01)
    assert torch.isfinite(network.eval()(inputs)).all()
