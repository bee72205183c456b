"""Activations against their formulas, and initial weights against the moments that their papers ask for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import nn

from dlopt.models.layers import ACTIVATIONS, INITS, Activation, Init, initialize

FORMULAS: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0.0),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}
SIZE = 512
VARIANCES = {
    "xavier_uniform": 2 / (SIZE + SIZE),
    "xavier_normal": 2 / (SIZE + SIZE),
    "kaiming_uniform": 2 / SIZE,
    "kaiming_normal": 2 / SIZE,
    "normal": 1.0,
    "small_normal": 1e-4,
}


def test_what_a_job_can_name_is_what_there_is() -> None:
    assert set(get_args(Activation)) == set(ACTIVATIONS) == set(FORMULAS)
    assert set(get_args(Init)) == set(INITS) == set(VARIANCES)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_its_formula(name: str) -> None:
    values = torch.linspace(-5, 5, 101, dtype=torch.float64)
    expected = torch.tensor([FORMULAS[name](value) for value in values.tolist()], dtype=torch.float64)
    assert (ACTIVATIONS[name]()(values) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", get_args(Init))
def test_initial_weights_have_the_moments_of_their_rule_and_biases_are_zero(name: Init) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(SIZE, SIZE)
    initialize(layer, name)
    weight, deviation = layer.weight.detach().double(), math.sqrt(VARIANCES[name])
    assert abs(weight.mean()) < 5 * deviation / SIZE
    assert weight.std().item() == pytest.approx(deviation, rel=0.01)
    kurtosis = ((weight / weight.std()) ** 4).mean().item()
    assert kurtosis == pytest.approx(1.8 if name.endswith("uniform") else 3.0, rel=0.03)
    if name.endswith("uniform"):
        assert weight.abs().max() <= math.sqrt(3) * deviation
    assert torch.equal(layer.bias, torch.zeros(SIZE))


def test_xavier_looks_at_both_sides_of_a_layer_and_kaiming_at_what_comes_in() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(900, 300)
    initialize(layer, "xavier_normal")
    assert layer.weight.var().item() == pytest.approx(2 / 1200, rel=0.02)
    initialize(layer, "kaiming_normal")
    assert layer.weight.var().item() == pytest.approx(2 / 900, rel=0.02)
    convolution = nn.Conv2d(64, 128, 3)
    initialize(convolution, "kaiming_uniform")
    assert convolution.weight.var().item() == pytest.approx(2 / (64 * 9), rel=0.02)
    assert torch.equal(convolution.bias, torch.zeros(128))
