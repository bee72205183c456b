"""Networks: sizes from the signature, the same weights for the same seed, and preprocessing as their first layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dlopt.models import Cnn, Mlp, Model, Network, build_network
from dlopt.part import DloptError, Feature, Signature, Statistics, Target

TARGET = Target(name="label", labels=tuple(range(10)))


def image(height: int = 28, width: int = 28, channels: int = 1, name: str = "image") -> Feature:
    return Feature(name=name, kind="image", dtype="uint8", shape=(height, width, channels), columns=(name,))


def numbers(*columns: str, name: str = "numbers") -> Feature:
    return Feature(name=name, kind="number", dtype="float32", shape=(len(columns),), columns=columns)


def statistics(fill: list[float], shift: list[float], scale: list[float]) -> Statistics:
    zeros = (0.0,) * len(fill)
    return Statistics(
        count=1,
        missing=(0,) * len(fill),
        min=zeros,
        max=zeros,
        mean=zeros,
        std=zeros,
        fill=tuple(fill),
        shift=tuple(shift),
        scale=tuple(scale),
    )


def signature(*features: Feature) -> Signature:
    return Signature(inputs=features, target=TARGET)


def plain(found: Signature) -> dict[str, Statistics]:
    sizes = {feature.name: feature.shape[-1] for feature in found.inputs}
    return {name: statistics([0.0] * size, [0.0] * size, [1 / 255] * size) for name, size in sizes.items()}


def network(model: Model, *features: Feature, seed: int = 1, dtype: torch.dtype = torch.float32) -> Network:
    found = signature(*features)
    return build_network(model, found, plain(found), seed, dtype).eval()


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_default_mlp_on_mnist_is_the_tutorials_network() -> None:
    built = network(Mlp(), image())
    assert parameters(built) == 101_770
    assert [type(layer).__name__ for layer in built.body][1:] == ["Linear", "ReLU", "Dropout", "Linear"]
    assert built.body[3].p == 0.2
    assert built({"image": torch.zeros(5, 28, 28, 1, dtype=torch.uint8)}).shape == (5, 10)


def test_an_mlp_takes_all_inputs_side_by_side_in_the_order_of_the_signature() -> None:
    built = network(Mlp(hidden=()), image(2, 3, 3), numbers("a", "b"))
    assert parameters(built) == (2 * 3 * 3 + 2) * 10 + 10
    values = {"numbers": torch.tensor([[255.0, 510.0]]), "image": torch.arange(18, dtype=torch.uint8).reshape(1, 2, 3, 3)}
    flat = torch.cat([values["image"].permute(0, 3, 1, 2).flatten(1).float(), values["numbers"]], dim=1) / 255
    expected = flat @ built.body[-1].weight.T
    torch.testing.assert_close(built(values), expected)


def test_hidden_layers_are_as_many_and_as_wide_as_the_job_says() -> None:
    built = network(Mlp(hidden=(7, 5), activation="tanh", dropout=0.5), image(4, 4))
    sizes = [(layer.in_features, layer.out_features) for layer in built.body if isinstance(layer, torch.nn.Linear)]
    assert sizes == [(16, 7), (7, 5), (5, 10)]
    assert [layer.p for layer in built.body if isinstance(layer, torch.nn.Dropout)] == [0.5, 0.5]


@pytest.mark.parametrize("model", [Mlp(), Cnn()])
def test_a_seed_gives_the_same_weights_whatever_was_drawn_before_and_leaves_the_generator_alone(model: Mlp | Cnn) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = network(model, image())
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1000)
    second, other = network(model, image()), network(model, image(), seed=2)
    weights = [dict(built.named_parameters()) for built in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in weights[0] if name.endswith("weight"))


def test_float64_has_the_weights_of_float32_and_computes_in_its_own_precision() -> None:
    single, double = network(Mlp(), image()), network(Mlp(), image(), dtype=torch.float64)
    assert {value.dtype for value in double.state_dict().values()} == {torch.float64}
    for name, parameter in single.named_parameters():
        assert torch.equal(parameter.double(), double.get_parameter(name))
    inputs = {"image": torch.randint(0, 256, (8, 28, 28, 1), dtype=torch.uint8, generator=torch.manual_seed(0))}
    found = double(inputs)
    assert found.dtype == torch.float64
    assert 0 < (found - single(inputs)).abs().max() < 1e-4


def test_a_missing_number_is_filled_and_then_scaled_as_every_other() -> None:
    found = signature(numbers("a", "b"))
    fitted = {"numbers": statistics([3.0, -1.0], [2.0, 0.0], [10.0, 0.5])}
    scaled = build_network(Mlp(hidden=()), found, fitted, 0).preprocess({"numbers": torch.tensor([[np.nan, 4.0], [5.0, np.nan]])})
    torch.testing.assert_close(scaled["numbers"], torch.tensor([[(3 - 2) * 10.0, 4 * 0.5], [(5 - 2) * 10.0, -0.5]]))


def test_images_are_scaled_by_channel_and_become_channels_first() -> None:
    found = signature(image(2, 2, 3))
    fitted = {"image": statistics([0, 0, 0], [1.0, 2.0, 3.0], [1.0, 10.0, 100.0])}
    pixels = torch.randint(0, 256, (4, 2, 2, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    scaled = build_network(Mlp(), found, fitted, 0, torch.float64).preprocess({"image": pixels})["image"]
    assert scaled.shape == (4, 3, 2, 2)
    expected = (pixels.double() - torch.tensor([1.0, 2.0, 3.0])) * torch.tensor([1.0, 10.0, 100.0])
    torch.testing.assert_close(scaled, expected.permute(0, 3, 1, 2), check_dtype=False)


@pytest.mark.parametrize("name", ["petal.length", "items", "type", "a b", "ä", "training"])
def test_an_input_may_have_any_name(name: str) -> None:
    built = network(Mlp(), image(4, 4, name=name))
    assert built({name: torch.zeros(2, 4, 4, 1, dtype=torch.uint8)}).shape == (2, 10)


def test_the_state_has_preprocessing_too() -> None:
    names = set(network(Mlp(hidden=()), image(2, 2)).state_dict())
    assert names == {"preprocess.scale.0.fill", "preprocess.scale.0.shift", "preprocess.scale.0.factor", "body.1.weight", "body.1.bias"}


def test_a_cnn_halves_the_image_with_every_block() -> None:
    built = network(Cnn(channels=(4, 8), hidden=16), image(9, 13, 3))
    # the convolutions, then 2x3 pixels of 8 channels
    assert parameters(built) == (3 * 9 * 4 + 4) + (4 * 9 * 8 + 8) + (8 * 2 * 3 * 16 + 16) + (16 * 10 + 10)
    assert built({"image": torch.zeros(5, 9, 13, 3, dtype=torch.uint8)}).shape == (5, 10)
    assert built({"image": torch.zeros(0, 9, 13, 3, dtype=torch.uint8)}).shape == (0, 10)


def test_a_cnn_says_what_it_cannot_take() -> None:
    with pytest.raises(DloptError, match=r"^model: cnn takes exactly one input, an image: use kind: mlp for other inputs$"):
        Cnn().build(signature(numbers("a")))
    with pytest.raises(DloptError, match="exactly one input"):
        Cnn().build(signature(image(), numbers("a")))
    with pytest.raises(DloptError, match=r"^model.channels: 3 blocks halve 7x28 to nothing: at most 2$"):
        Cnn(channels=(1, 1, 1)).build(signature(image(7, 28)))
    Cnn(channels=(1, 1)).build(signature(image(7, 28)))


@pytest.mark.parametrize("given", [{"hidden": [0]}, {"dropout": 1.0}, {"activation": "swish"}, {"init": "zeros"}, {"hidden": "12"}])
def test_an_mlp_of_nonsense_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Mlp.model_validate(given)


@pytest.mark.parametrize("given", [{"channels": []}, {"channels": [16, 0]}, {"hidden": 0}])
def test_a_cnn_of_nonsense_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Cnn.model_validate(given)
