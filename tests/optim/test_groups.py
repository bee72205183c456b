"""Parameter groups: by name, by layer, and without decay where it does harm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dlopt.models import Mlp
from dlopt.optim.groups import Group, Parameters, layers
from dlopt.optim.optimizers import Adam, AdamW, Muon, Rprop, Sgd
from dlopt.part import DloptError
from tests.models.test_models import image, network


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class Transformer(nn.Module):
    """Of what is in a network, one of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.words = nn.Embedding(7, 4)
        self.stem = nn.Conv2d(3, 4, 2)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


def by_name(groups: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return {name: group.get(key) for group in groups for name in group["names"]}


def of(parameters: Parameters, module: nn.Module, optimizer: Any = None) -> list[dict[str, Any]]:
    return parameters.of(module, optimizer or AdamW(lr=0.1, weight_decay=0.3))


def test_each_parameter_is_in_one_group_in_the_order_of_the_network() -> None:
    module = Transformer()
    groups = of(Parameters(), module)
    named = dict(module.named_parameters())
    assert sorted(name for group in groups for name in group["names"]) == sorted(named)
    for group in groups:
        assert group["names"] == [name for name in named if name in group["names"]]
        assert all(parameter is named[name] for name, parameter in zip(group["names"], group["params"], strict=True))
    firsts = [list(named).index(group["names"][0]) for group in groups]
    assert firsts == sorted(firsts)


def test_biases_and_norm_layers_do_not_decay_unless_asked() -> None:
    module = Transformer()
    found = by_name(of(Parameters(), module), "weight_decay")
    spared = {name for name, decay in found.items() if decay == 0}
    assert spared == {name for name in found if name.endswith("bias") or "norm" in name}
    assert {found[name] for name in found.keys() - spared} == {None}
    assert set(by_name(of(Parameters(decay_bias_and_norm=True), module), "weight_decay").values()) == {None}
    matrix = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((2, 2)))
    assert by_name(of(Parameters(), matrix), "weight_decay")["1.weight"] == 0


@pytest.mark.parametrize(
    "part", [AdamW(lr=0.1, weight_decay=0.3), Adam(weight_decay=0.3), Sgd(weight_decay=0.3)], ids=lambda part: part.kind
)
def test_what_does_not_decay_stays_where_there_is_no_gradient(part: Any) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    optimizer = part.build(Parameters().of(module, part))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"0.weight"}


def test_hidden_are_matrices_that_are_neither_embeddings_nor_tokens_nor_the_last() -> None:
    found = by_name(of(Parameters(), Transformer(), Muon(lr=0.1)), "hidden")
    assert {name for name, hidden in found.items() if hidden} == {
        "stem.weight",
        *(f"blocks.{index}.{name}" for index in (0, 1) for name in ("attention.in_proj_weight", "attention.out_proj.weight")),
        *(f"blocks.{index}.mlp.{place}.weight" for index in (0, 1) for place in (0, 2)),
    }


def test_layers_are_counted_from_the_first_blocks_as_one_and_norm_layers_with_the_one_before() -> None:
    found = layers(Transformer())
    expected = {"token": 0, "words.weight": 0, "stem.weight": 1, "blocks.0.norm.weight": 2, "blocks.0.mlp.2.weight": 2}
    expected |= {"blocks.1.attention.in_proj_weight": 3, "norm.weight": 3, "head.bias": 4}
    assert {name: found[name] for name in expected} == expected
    assert found.keys() == dict(Transformer().named_parameters()).keys()


def test_stages_are_lists_of_layers_and_a_network_of_one_layer_has_one() -> None:
    stages = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU()), nn.Sequential(Block(), Block()))
    assert sorted({(name.split(".attention")[0].split(".mlp")[0].split(".norm")[0], depth) for name, depth in layers(stages).items()}) == [
        ("0.0.bias", 0),
        ("0.0.weight", 0),
        ("0.1.bias", 0),
        ("0.1.weight", 0),
        ("1.0", 1),
        ("1.1", 2),
    ]
    assert layers(nn.Linear(2, 2)) == {"weight": 0, "bias": 0}
    assert layers(nn.LayerNorm(2)) == {"weight": 0, "bias": 0}


def test_rates_fall_by_layer_from_the_last_to_the_first() -> None:
    groups = of(Parameters(layer_decay=0.5), network(Mlp(hidden=(5, 6)), image(4, 4)))
    found = by_name(groups, "lr")
    assert list(found.values()) == pytest.approx([0.025, 0.025, 0.05, 0.05, 0.1, 0.1])
    assert [name.rsplit(".", 1)[1] for name in found] == ["weight", "bias"] * 3


def test_a_parameter_takes_what_the_first_matching_group_says() -> None:
    parameters = Parameters(
        groups=(
            Group(names="blocks.0.*", lr_scale=0.1, weight_decay=0.7),
            Group(names="*.bias", lr_scale=2, weight_decay=0.2),
            Group(names="head.*", freeze=True),
        )
    )
    module = Transformer()
    groups = of(parameters, module)
    rates, decays = by_name(groups, "lr"), by_name(groups, "weight_decay")
    assert (rates["blocks.0.mlp.0.bias"], decays["blocks.0.mlp.0.bias"]) == (pytest.approx(0.01), 0.7)
    assert (rates["blocks.1.mlp.0.bias"], decays["blocks.1.mlp.0.bias"]) == (pytest.approx(0.2), 0.2)
    assert (rates["head.bias"], rates["stem.weight"]) == (pytest.approx(0.2), pytest.approx(0.1))
    assert "head.weight" not in rates and not module.head.weight.requires_grad
    assert module.head.bias.requires_grad


def test_frozen_parameters_stay_to_the_bit() -> None:
    module, part = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), AdamW()
    optimizer = part.build(Parameters(groups=(Group(names="0.*", freeze=True),)).of(module, part))
    before = [value.detach().clone() for value in module.parameters()]
    module(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    assert [torch.equal(one, other) for one, other in zip(module.parameters(), before, strict=True)] == [True, True, False, False]


MISTAKES = [
    (
        (Group(names="nowhere.*"),),
        "train.parameters.groups.0.names: 'nowhere.*' matches no parameter: there are 0.weight, 0.bias, 1.weight",
    ),
    ((Group(names="0.*"), Group(names="0.weight")), "train.parameters.groups.1.names: '0.weight' matches no parameter: there are 1.weight"),
    ((Group(names="*", freeze=True),), "train.parameters.groups: all parameters are frozen: leave some to train"),
]


@pytest.mark.parametrize(("groups", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_pattern_that_matches_nothing_and_a_network_without_training_are_mistakes(groups: tuple[Group, ...], message: str) -> None:
    with pytest.raises(DloptError) as caught:
        of(Parameters(groups=groups), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2, bias=False)))
    assert str(caught.value) == message


def test_a_weight_decay_for_an_optimizer_without_one_is_a_mistake() -> None:
    module, part = nn.Linear(2, 2), Rprop()
    assert all("weight_decay" not in group for group in Parameters().of(module, part))
    with pytest.raises(DloptError, match=r"^train.parameters.groups: rprop has no weight_decay: take it out of 'weight'$"):
        Parameters(groups=(Group(names="weight", weight_decay=0.1),)).of(module, part)


@pytest.mark.parametrize("given", [{"names": ""}, {}, {"names": "*", "lr_scale": 0}, {"names": "*", "weight_decay": -1}], ids=str)
def test_settings_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(DloptError):
        Group.model_validate(given)
    with pytest.raises(DloptError):
        Parameters(layer_decay=1.1)


def test_there_are_no_more_groups_than_differ_in_something() -> None:
    """Each costs a fused step of its own."""
    net = network(Mlp(hidden=(8, 8)), image(4, 4))
    assert len(of(Parameters(), net, Adam())) == 1  # without any decay there is nothing to except biases from
    assert len(of(Parameters(), net, AdamW(weight_decay=0.1))) == 2
    assert len(of(Parameters(), net, Muon(lr=0.1))) == 3
