"""Deviations of layers after layer-sequential unit variance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.models import build_network
from dlopt.models.cnn import Cnn
from dlopt.models.layers import Activation, activation, initialize
from dlopt.models.lsuv import lsuv
from dlopt.models.mlp import Mlp
from dlopt.models.spread import spread
from dlopt.part import Signature, Statistics
from tests.models.test_layers import CATEGORIES, IMAGE, TARGET

PIXELS = Statistics(count=1, missing=(0,), min=(0,), max=(255,), mean=(0,), std=(1,), shift=(0,), scale=(1 / 255,))
"""Of images from 0 to 255, which become numbers from 0 to 1."""


def deep(name: Activation, layers: int = 30, width: int = 48) -> nn.Sequential:
    parts = [part for _ in range(layers) for part in (nn.Linear(width, width), activation(name), nn.Dropout(0.5))]
    network = nn.Sequential(*parts, nn.Linear(width, 10))
    initialize(network, "lsuv")
    return network


def deviations(network: nn.Module, inputs: Any) -> list[float]:
    return [layer["outputs"]["std"] for layer in spread(network, inputs)]


def biases(network: nn.Module) -> list[Tensor]:
    return [parameter for parameter in network.parameters() if parameter.dim() == 1]


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_every_layer_of_a_deep_network_gives_numbers_of_deviation_1_the_last_one_too(name: Activation) -> None:
    torch.manual_seed(0)
    network, inputs = deep(name), torch.randn(200, 48) * 5 + 1
    before = deviations(network, inputs)
    lsuv(network, inputs)
    after = deviations(network, inputs)
    assert len(after) == 31 and after == pytest.approx([1] * 31, abs=0.01)
    assert before[0] > 4 and before[-1] < 0.2
    assert not any(bias.any() for bias in biases(network))


def test_it_only_scales_so_orthogonal_weights_stay_so() -> None:
    torch.manual_seed(0)
    network, inputs = deep("tanh", layers=3), torch.randn(200, 48) * 5
    before = [layer.weight.detach().clone() for layer in network if isinstance(layer, nn.Linear)]
    lsuv(network, inputs)
    for layer, weight in zip((layer for layer in network if isinstance(layer, nn.Linear)), before, strict=True):
        ratios = layer.weight / weight
        assert ratios.mean().item() == pytest.approx(ratios[0, 0].item(), rel=1e-5) and ratios.std() < 1e-4


def test_a_network_with_named_inputs_is_scaled_behind_its_preprocessing() -> None:
    torch.manual_seed(0)
    images = {"image": torch.randint(0, 256, (64, 28, 28, 1), dtype=torch.uint8)}
    network = build_network(Cnn(init="lsuv"), Signature(inputs=(IMAGE,), target=TARGET), {"image": PIXELS}, 7)
    lsuv(network, images)
    assert deviations(network, images) == pytest.approx([1] * 4, abs=0.01)
    assert not any(bias.any() for bias in biases(network))


def test_embeddings_are_left_as_they_are() -> None:
    network = build_network(Mlp(init="lsuv"), Signature(inputs=(CATEGORIES,), target=TARGET), {}, 7)
    codes = {"categories": torch.tensor([[0, 1], [1, 2], [2, 0], [3, 1]], dtype=torch.int32)}
    embeddings = [layer.weight.clone() for layer in network.modules() if isinstance(layer, nn.Embedding)]
    lsuv(network, codes)
    for layer, before in zip((layer for layer in network.modules() if isinstance(layer, nn.Embedding)), embeddings, strict=True):
        assert torch.equal(layer.weight, before)
    assert deviations(network, codes)[-2:] == pytest.approx([1, 1], abs=0.01)


def test_a_layer_whose_outputs_are_all_the_same_is_left_alone() -> None:
    torch.manual_seed(0)
    network, inputs = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(50, 64)
    initialize(network, "lsuv")
    with torch.no_grad():
        network[1].weight.zero_()
        network[1].bias.fill_(0.1)
        for unit in network[2].weight:  # the same sum in another order: one number, but for rounding
            unit.copy_(network[2].weight[0, torch.randperm(64)])
    last = network[2].weight.detach().clone()
    lsuv(network, inputs)
    assert not network[1].weight.any() and torch.equal(network[2].weight, last)
    assert 0 < deviations(network, inputs)[2] < 1e-6


def test_a_number_that_is_not_finite_leaves_the_weights_alone() -> None:
    network = nn.Linear(3, 2)
    before = network.weight.detach().clone()
    lsuv(network, torch.tensor([[1.0, torch.inf, 2.0]]))
    assert torch.equal(network.weight, before)


def test_a_layer_with_a_bias_comes_within_the_tolerance_by_several_steps() -> None:
    torch.manual_seed(0)
    network, inputs = nn.Linear(20, 20), torch.randn(100, 20) * 3
    with torch.no_grad():
        network.bias.copy_(torch.randn(20) * 0.5)
    bias = network.bias.detach().clone()
    lsuv(network, inputs, tolerance=0.001)
    assert deviations(network, inputs) == pytest.approx([1], abs=0.001)
    assert torch.equal(network.bias, bias)


def test_a_layer_that_is_used_twice_is_scaled_for_the_first_time() -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(16, 16), torch.randn(100, 16) * 3
    lsuv(nn.Sequential(layer, layer), inputs)
    assert layer(inputs).std(correction=0).item() == pytest.approx(1, abs=0.01)


def test_attention_is_scaled_by_its_projections() -> None:
    torch.manual_seed(0)
    network = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    initialize(network, "lsuv")
    inputs, seen = torch.randn(8, 10, 32) * 4, {}
    lsuv(network, inputs)
    network.layers[0].self_attn.register_forward_pre_hook(lambda layer, args: seen.update(given=args[0]))
    assert deviations(network, inputs) == pytest.approx([1] * 6, abs=0.01)
    for weight in network.layers[0].self_attn.in_proj_weight.chunk(3):
        assert (seen["given"] @ weight.T).std(correction=0).item() == pytest.approx(1, abs=0.01)


def test_the_same_rows_give_the_same_weights_and_nothing_else_changes() -> None:
    inputs, weights = torch.randn(16, 3, 8, 8), []
    for _ in range(2):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 4))
        network[3].eval()
        before, drawn = {name: value.clone() for name, value in network.state_dict().items()}, torch.get_rng_state()
        lsuv(network, inputs)
        after = network.state_dict()
        assert [name for name in before if not torch.equal(before[name], after[name])] == ["0.weight", "5.weight"]
        assert torch.equal(torch.get_rng_state(), drawn)
        assert [layer.training for layer in network] == [True, True, True, False, True, True]
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.modules())
        weights.append(network[0].weight.detach().clone())
    assert torch.equal(*weights)
