"""Activations against their formulas and in ONNX, initial weights against the moments their papers ask for, kinds of dropout."""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import get_args

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from dlopt.models import Model, build_network
from dlopt.models.cnn import Cnn
from dlopt.models.layers import (
    ACTIVATIONS,
    DROPOUTS,
    INITS,
    Activation,
    Dropout,
    Init,
    activation,
    dropout,
    initialize,
    widening,
)
from dlopt.models.mlp import Mlp
from dlopt.models.text import TextCnn
from dlopt.part import Feature, Signature, Target


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def elu(x: float, alpha: float = 1.0) -> float:
    return x if x > 0 else alpha * (math.exp(x) - 1)


OF_ONE: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "sigmoid": sigmoid,
    "tanh": lambda x: (math.exp(x) - math.exp(-x)) / (math.exp(x) + math.exp(-x)),
    "relu": lambda x: max(x, 0.0),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "prelu": lambda x: x if x > 0 else 0.25 * x,
    "rrelu": lambda x: x if x > 0 else x * (1 / 8 + 1 / 3) / 2,
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "relu_squared": lambda x: max(x, 0.0) ** 2,
    "elu": elu,
    "selu": lambda x: 1.0507009873554805 * elu(x, 1.6732632423543772),
    "celu": lambda x: max(x, 0.0) + min(math.exp(x) - 1, 0.0),
    "gelu": gelu,
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * sigmoid(x),
    "mish": lambda x: x * math.tanh(math.log(1 + math.exp(x))),
    "softplus": lambda x: math.log(1 + math.exp(x)),
    "softsign": lambda x: x / (1 + abs(x)),
    "softshrink": lambda x: x - 0.5 if x > 0.5 else x + 0.5 if x < -0.5 else 0.0,
    "hardshrink": lambda x: x if abs(x) > 0.5 else 0.0,
    "tanhshrink": lambda x: x - math.tanh(x),
    "hardsigmoid": lambda x: min(max(x / 6 + 0.5, 0.0), 1.0),
    "hardswish": lambda x: x * min(max(x / 6 + 0.5, 0.0), 1.0),
    "hardtanh": lambda x: min(max(x, -1.0), 1.0),
    "logsigmoid": lambda x: math.log(sigmoid(x)),
    "threshold": lambda x: x if x > 1 else 0.0,
}
GATES: dict[str, Callable[[float], float]] = {
    "glu": sigmoid,
    "geglu": gelu,
    "swiglu": lambda x: x * sigmoid(x),
    "reglu": lambda x: max(x, 0.0),
}
OF_ALL: dict[str, Callable[[list[float]], list[float]]] = {
    "softmax": lambda row: [math.exp(x) / sum(map(math.exp, row)) for x in row],
    "log_softmax": lambda row: [math.log(math.exp(x) / sum(map(math.exp, row))) for x in row],
    "softmin": lambda row: [math.exp(-x) / sum(math.exp(-y) for y in row) for x in row],
}
POINTS = torch.linspace(-6, 6, 1001, dtype=torch.float64)
ROWS = torch.stack((POINTS, POINTS.flip(0), POINTS.roll(300), POINTS.roll(600)), dim=1)
"""(1001, 4): every unit comes through all points, each time beside others."""
FORMS: dict[str, tuple[int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "rows": (1, lambda rows: rows, lambda units: units),
    "images": (1, lambda rows: rows.view(7, 11, 13, -1).permute(0, 3, 1, 2), lambda units: units.permute(0, 2, 3, 1).reshape(1001, -1)),
    "sequences": (-1, lambda rows: rows.view(7, 143, -1), lambda units: units.reshape(1001, -1)),
}
"""Where the units are; 1,001 rows of units as such tensors, and back."""


def formula(name: str, row: list[float]) -> list[float]:
    """What the activation makes of the units of one row."""
    if name in GATES:
        half = len(row) // 2
        return [a * GATES[name](b) for a, b in zip(row[:half], row[half:], strict=True)]
    return OF_ALL[name](row) if name in OF_ALL else [OF_ONE[name](x) for x in row]


def in_onnx(layer: nn.Module, values: Tensor) -> Tensor:
    """The layer as the export stage traces it, with any number of rows, run by onnxruntime."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing being deprecated
        torch.onnx.export(
            layer,
            (values[:2],),
            file,  # type: ignore[arg-type]
            input_names=["given"],
            output_names=["out"],
            dynamic_axes={"given": {0: "rows"}, "out": {0: "rows"}},
            opset_version=18,
            dynamo=False,
        )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(None, {"given": values.contiguous().numpy()})[0]))


def test_what_a_job_can_name_is_what_there_is() -> None:
    assert set(get_args(Activation)) == set(ACTIVATIONS) == {*OF_ONE, *GATES, *OF_ALL}
    assert set(get_args(Init)) == set(INITS) == {*VARIANCES, "sparse", "zeros"}
    assert set(get_args(Dropout)) == set(DROPOUTS)
    assert len(ACTIVATIONS) == 33


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", get_args(Activation))
def test_an_activation_is_its_formula(name: Activation, form: str) -> None:
    dim, shaped, flat = FORMS[form]
    expected = torch.tensor([formula(name, row) for row in ROWS.tolist()], dtype=torch.float64)
    found = flat(activation(name, dim).double().eval()(shaped(ROWS)))
    assert found.shape == (1001, 4 // widening(name))
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", get_args(Activation))
def test_an_activation_is_the_same_in_onnx(name: Activation, form: str) -> None:
    dim, shaped, _ = FORMS[form]
    values, layer = shaped(ROWS).float(), activation(name, dim).eval()
    expected = layer(values).detach()
    assert ((in_onnx(layer, values) - expected).abs() <= 1e-6 * expected.abs().clamp(min=1)).all()


@pytest.mark.parametrize("name", get_args(Activation))
def test_the_gradient_of_an_activation_is_the_slope_of_its_formula(name: Activation) -> None:
    rows = (ROWS[::25] * 0.99 + 0.0123).requires_grad_()  # no point at a kink of any of them
    layer, pull = activation(name).double().eval(), torch.linspace(0.5, 1.5, 4 // widening(name), dtype=torch.float64)
    (layer(rows) * pull).sum().backward()
    step = 1e-6
    for unit in range(4):
        ends = []
        for sign in (1, -1):
            moved = rows.detach().clone()
            moved[:, unit] += sign * step
            ends.append([sum(p * y for p, y in zip(pull.tolist(), formula(name, row), strict=True)) for row in moved.tolist()])
        slopes = (torch.tensor(ends[0], dtype=torch.float64) - torch.tensor(ends[1], dtype=torch.float64)) / (2 * step)
        assert rows.grad is not None
        assert (rows.grad[:, unit] - slopes).abs().max() < 1e-7


def test_prelu_learns_its_slope_and_rrelu_draws_it_in_training() -> None:
    learned = activation("prelu")
    learned(torch.tensor([[-2.0, 3.0]])).sum().backward()
    assert [parameter.grad.item() for parameter in learned.parameters()] == [-2.0]
    torch.manual_seed(0)
    slopes = activation("rrelu").train()(torch.full((1000,), -1.0)).neg()
    assert 1 / 8 <= slopes.min() < 0.13 and 0.32 < slopes.max() <= 1 / 3


@pytest.mark.parametrize("name", get_args(Activation))
def test_an_activation_can_be_sent_to_a_worker(name: Activation) -> None:
    layer = activation(name, -1).eval()
    assert torch.equal(pickle.loads(pickle.dumps(layer))(ROWS.float()), layer(ROWS.float()))


SIZE = 512
TRUNCATED = 1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
"""Variance of a standard normal number that is within 2 of 0."""
VARIANCES: dict[str, Callable[[float, float], float]] = {
    "xavier_uniform": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "xavier_normal": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "kaiming_uniform": lambda fan_in, fan_out: 2 / fan_in,
    "kaiming_normal": lambda fan_in, fan_out: 2 / fan_in,
    "lecun_uniform": lambda fan_in, fan_out: 1 / fan_in,
    "lecun_normal": lambda fan_in, fan_out: 1 / fan_in,
    "normal": lambda fan_in, fan_out: 1.0,
    "small_normal": lambda fan_in, fan_out: 1e-4,
    "truncated_normal": lambda fan_in, fan_out: TRUNCATED * 4e-4,
    "uniform": lambda fan_in, fan_out: 1 / (3 * fan_in),
    "orthogonal": lambda fan_in, fan_out: 1 / fan_in,  # where no more units come out than come in
    "lsuv": lambda fan_in, fan_out: 1 / fan_in,
}
KURTOSES = {"uniform": 1.8, "truncated_normal": 2.366}
"""The fourth moment over the square of the variance: 9/5, 3 of normal numbers, and of those that are cut off at 2 deviations."""
LAYERS: dict[str, Callable[[], nn.Linear | nn.Conv2d]] = {
    "linear": lambda: nn.Linear(SIZE, SIZE),
    "convolution": lambda: nn.Conv2d(64, 256, 3),
}
FANS = {"linear": (SIZE, SIZE), "convolution": (64 * 9, 256 * 9)}


def initialized(kind: str, init: Init, seed: int = 0) -> nn.Linear | nn.Conv2d:
    torch.manual_seed(seed)
    layer = LAYERS[kind]()
    initialize(layer, init)
    return layer


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("init", VARIANCES)
def test_initial_weights_have_the_moments_of_their_rule_and_biases_are_zero(kind: str, init: Init) -> None:
    layer = initialized(kind, init)
    weight, deviation = layer.weight.detach().double(), math.sqrt(VARIANCES[init](*FANS[kind]))
    assert abs(weight.mean()) < 5 * deviation / math.sqrt(weight.numel())
    assert weight.std().item() == pytest.approx(deviation, rel=0.01)
    shape = "uniform" if init.endswith("uniform") else init
    assert ((weight / weight.std()) ** 4).mean().item() == pytest.approx(KURTOSES.get(shape, 3.0), rel=0.03)
    if shape == "uniform":
        assert 0.99 * math.sqrt(3) * deviation < weight.abs().max() <= math.sqrt(3) * deviation * (1 + 1e-6)
    if init == "truncated_normal":
        assert 0.039 < weight.abs().max() <= 0.04
    assert layer.bias is not None and not layer.bias.any()


@pytest.mark.parametrize("init", ["orthogonal", "lsuv"])
@pytest.mark.parametrize(("units", "given"), [(SIZE, SIZE), (200, 300), (300, 200)])
def test_orthogonal_weights_keep_lengths_on_their_shorter_side(init: Init, units: int, given: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(given, units)
    initialize(layer, init)
    weight = layer.weight.detach().double()
    products = weight @ weight.T if units <= given else weight.T @ weight
    assert (products - torch.eye(min(units, given), dtype=torch.float64)).abs().max() < 1e-5


def test_filters_of_a_convolution_are_orthogonal() -> None:
    filters = initialized("convolution", "orthogonal").weight.detach().double().flatten(1)
    assert (filters @ filters.T - torch.eye(256, dtype=torch.float64)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", LAYERS)
def test_each_sparse_unit_has_fifteen_standard_normal_weights(kind: str) -> None:
    weight = initialized(kind, "sparse").weight.detach().double().flatten(1)
    there = weight[weight != 0]
    assert ((weight != 0).sum(dim=1) == 15).all()
    assert abs(there.mean()) < 5 / math.sqrt(len(there)) and there.std().item() == pytest.approx(1, rel=0.04)
    chosen = (weight != 0).sum(dim=0)
    assert chosen.max() < 5 * chosen.double().mean()  # spread over all that comes in


def test_a_sparse_unit_with_few_inputs_has_all_of_them() -> None:
    layer = nn.Linear(4, 8)
    initialize(layer, "sparse")
    assert layer.weight.all()


@pytest.mark.parametrize("kind", LAYERS)
def test_zeros_are_zeros(kind: str) -> None:
    assert not initialized(kind, "zeros").weight.any()


@pytest.mark.parametrize("init", [init for init in get_args(Init) if init != "zeros"])
def test_initial_weights_are_those_of_the_seed(init: Init) -> None:
    weights = []
    for seed in (3, 3, 4):
        module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Linear(40, 30))
        torch.manual_seed(seed)
        initialize(module, init)
        weights.append([module[0].weight, module[1].weight])
    for first, again, other in zip(*weights, strict=True):
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_xavier_looks_at_both_sides_of_a_layer_and_kaiming_at_what_comes_in() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(900, 300)
    initialize(layer, "xavier_normal")
    assert layer.weight.var().item() == pytest.approx(2 / 1200, rel=0.02)
    initialize(layer, "kaiming_normal")
    assert layer.weight.var().item() == pytest.approx(2 / 900, rel=0.02)


def test_each_projection_of_attention_is_a_layer_of_its_own() -> None:
    torch.manual_seed(0)
    attention, mixed = nn.MultiheadAttention(SIZE, 8), nn.MultiheadAttention(SIZE, 8, kdim=128)
    initialize(attention, "xavier_uniform")
    initialize(mixed, "orthogonal")
    for projection in (*attention.in_proj_weight.chunk(3), attention.out_proj.weight):
        assert projection.var().item() == pytest.approx(1 / SIZE, rel=0.02)
    assert not attention.in_proj_bias.any() and not attention.out_proj.bias.any()
    keys = mixed.k_proj_weight.detach()
    assert (keys.T @ keys - torch.eye(128)).abs().max() < 1e-4


class Tokens(nn.Module):
    """What a transformer has besides layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Parameter(torch.full((1, 1, 4), 0.3)), nn.Parameter(torch.full((4,), 0.1))
        self.words = nn.Embedding(1000, 64, padding_idx=0)
        self.bag = nn.EmbeddingBag(1000, 64)
        self.slope = nn.PReLU()
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)])


def test_embeddings_are_small_and_norms_slopes_and_tokens_stay_as_they_were_made() -> None:
    torch.manual_seed(0)
    module = Tokens()
    before = {name: value.clone() for name, value in module.state_dict().items() if name.split(".")[0] not in ("words", "bag")}
    initialize(module, "normal")
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert after["slope.weight"].item() == 0.25
    assert after["words.weight"][1:].std().item() == pytest.approx(0.05, rel=0.02) and not after["words.weight"][0].any()
    assert after["bag.weight"].std().item() == pytest.approx(0.05, rel=0.02)


def test_the_ends_of_residual_branches_are_zero_when_asked_and_change_no_other_layer() -> None:
    plain, asked = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2)) for _ in "ab")
    for module in (plain, asked):
        module[1].residual_end = module[3].residual_end = True  # type: ignore[assignment]
        torch.manual_seed(5)
        initialize(module, "kaiming_normal", zero_residual_ends=module is asked)
    assert not asked[1].weight.any() and not asked[3].weight.any() and not asked[3].bias.any()
    assert plain[1].weight.all() and plain[3].weight.all()
    assert torch.equal(asked[0].weight, plain[0].weight) and torch.equal(asked[4].weight, plain[4].weight)


GOLDEN: dict[tuple[str, Init], list[float]] = {
    ("mlp", "xavier_uniform"): [-0.002501917, -3.506238],
    ("mlp", "xavier_normal"): [10.25186, -5.182048],
    ("mlp", "kaiming_uniform"): [-0.002698346, -3.640625],
    ("mlp", "kaiming_normal"): [11.05712, -5.380665],
    ("mlp", "normal"): [218.9198, -43.04532],
    ("mlp", "small_normal"): [2.189198, -0.4304532],
    ("cnn", "xavier_uniform"): [-0.4495425, -1.826423, -18.62393, -1.393429],
    ("cnn", "xavier_normal"): [0.9963692, -7.023525, 17.36379, -1.428532],
    ("cnn", "kaiming_uniform"): [-1.853511, -3.163458, -19.36918, -1.446837],
    ("cnn", "kaiming_normal"): [4.108135, -12.1651, 18.05861, -1.483285],
    ("cnn", "normal"): [8.714671, -103.2243, 505.6411, -11.86628],
    ("cnn", "small_normal"): [0.08714671, -1.032243, 5.056411, -0.1186628],
    ("text_cnn", "xavier_uniform"): [4.408077, 8.547939, 1.024401, 2.035806, -0.1782107, -0.1864449, -1.771375],
}
"""Of each weight of a model with seed 7, the sum of weight i times cos(i), i from 1: as models began before there were other rules."""
TARGET = Target(name="label", labels=tuple(range(10)))
IMAGE = Feature(name="image", kind="image", dtype="uint8", shape=(28, 28, 1), columns=("image",))
TEXT = Feature(name="text", kind="text", dtype="int32", shape=(20,), columns=("text",), tokens=100)
CATEGORIES = Feature(
    name="categories", kind="category", dtype="string", shape=(2,), columns=("a", "b"), vocabularies=(("x", "y", "z"), ("u", "v"))
)
MODELS: dict[str, tuple[Callable[..., Model], tuple[Feature, ...]]] = {
    "mlp": (Mlp, (IMAGE,)),
    "cnn": (Cnn, (IMAGE,)),
    "text_cnn": (TextCnn, (TEXT, CATEGORIES)),
}


@pytest.mark.parametrize(("kind", "init"), GOLDEN)
def test_a_seed_gives_the_weights_that_it_always_gave(kind: str, init: Init) -> None:
    model, inputs = MODELS[kind]
    network = build_network(model(init=init), Signature(inputs=inputs, target=TARGET), {}, 7)
    found = []
    for weight in (parameter.detach().double().flatten() for parameter in network.parameters() if parameter.dim() > 1):
        found.append((weight * torch.arange(1, len(weight) + 1, dtype=torch.float64).cos()).sum().item())
    assert found == pytest.approx(GOLDEN[kind, init], rel=1e-5, abs=1e-6)


KINDS = get_args(Dropout)


def trained(kind: Dropout, p: float, values: Tensor, dim: int = 1) -> Tensor:
    torch.manual_seed(1)
    return dropout(kind, p, dim).train()(values)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("kind", ["standard", "channel"])
def test_dropout_drops_its_share_and_keeps_the_mean(kind: Dropout, p: float) -> None:
    after = trained(kind, p, torch.ones(1000, 200))
    assert (after == 0).double().mean().item() == pytest.approx(p, abs=0.005)
    assert after.mean().item() == pytest.approx(1, abs=0.01)
    assert torch.allclose(after[after != 0], torch.tensor(1 / (1 - p)))


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("kind", ["alpha", "feature_alpha"])
def test_alpha_dropout_keeps_mean_and_deviation_of_what_selu_gives(kind: Dropout, p: float) -> None:
    torch.manual_seed(0)
    after = trained(kind, p, torch.randn(1000, 500))
    assert after.mean().item() == pytest.approx(0, abs=0.01)
    assert after.std().item() == pytest.approx(1, rel=0.01)
    _, counts = after.unique(return_counts=True)
    assert counts.max().item() / after.numel() == pytest.approx(p, abs=0.005)  # all that is dropped has one value


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_gaussian_dropout_multiplies_by_numbers_with_the_moments_of_dropout(p: float) -> None:
    after = trained("gaussian", p, torch.full((1000, 500), 2.0)) / 2
    assert after.mean().item() == pytest.approx(1, abs=0.01)
    assert after.var().item() == pytest.approx(p / (1 - p), rel=0.01)
    centred = (after - after.mean()) / after.std()
    assert (centred**4).mean().item() == pytest.approx(3, rel=0.03)


@pytest.mark.parametrize("kind", ["channel", "feature_alpha"])
@pytest.mark.parametrize(("shape", "dim", "places"), [((64, 50, 4, 5), 1, (2, 3)), ((64, 20, 50), -1, (1,)), ((64, 50, 20), 1, (2,))])
def test_dropout_by_channel_drops_whole_channels(kind: Dropout, shape: tuple[int, ...], dim: int, places: tuple[int, ...]) -> None:
    after = trained(kind, 0.3, torch.ones(shape), dim)
    dropped = after == after.min()
    assert torch.equal(dropped.all(dim=places), dropped.any(dim=places))
    assert dropped.all(dim=places).shape == (64, 50)
    assert dropped.all(dim=places).double().mean().item() == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_does_nothing_outside_of_training_or_when_nothing_is_dropped(kind: Dropout) -> None:
    values = torch.randn(6, 5)
    assert torch.equal(dropout(kind, 0.5).eval()(values), values)
    assert torch.equal(trained(kind, 0.0, values), values)
    assert torch.equal(in_onnx(dropout(kind, 0.5).eval(), values), values)


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_without_rows_drops_none(kind: Dropout) -> None:
    assert trained(kind, 0.5, torch.ones(0, 4, 2, 2)).shape == (0, 4, 2, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_that_of_the_seed(kind: Dropout) -> None:
    values = torch.randn(6, 5)
    assert torch.equal(trained(kind, 0.5, values), trained(kind, 0.5, values))
    assert not torch.equal(trained(kind, 0.5, values), values)
