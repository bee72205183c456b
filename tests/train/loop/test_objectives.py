"""The loss against its formula, and the parts of several workers against the whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dlopt.data.feed.batches import Batch, Mixed
from dlopt.models import Cnn, Mlp, Network, Units
from dlopt.part import Target
from dlopt.train.loop.losses import loss_of
from dlopt.train.loop.objectives import Losses, class_weights, penalty, supervised
from tests.models.test_models import TARGET, image, network
from tests.sets import LABELS, PAIR, THREE, TWO, spread

ROWS = 30
CROSS_ENTROPY = loss_of(None, TARGET, nn.Identity())
UNITS = Units(spread(np.array([[1000.0, -3.0], [1060.0, 5.0]])))  # means 1030 and 1, deviations 30 and 4
OUTPUT = {TWO: nn.Identity(), THREE: nn.Identity(), LABELS: nn.Identity(), PAIR: UNITS}


def batch(rows: int = ROWS) -> Batch:
    generator = torch.manual_seed(0)
    images = torch.randint(0, 256, (rows, 8, 8, 1), dtype=torch.uint8, generator=generator)
    return Batch({"image": images}, torch.randint(0, 10, (rows,), generator=generator), rows)


def part(whole: Batch, rows: slice) -> Batch:
    return Batch({name: values[rows] for name, values in whole.inputs.items()}, whole.target[rows], whole.total)


def model(kind: type[Mlp] | type[Cnn] = Mlp) -> Network:
    return network(kind(hidden=(12,)) if kind is Mlp else kind(channels=(3,), hidden=5), image(8, 8), dtype=torch.float64)  # type: ignore[arg-type]


def number(value: Tensor | None) -> float:
    assert value is not None
    return value.item()


def of(built: nn.Module, some: Batch, l1: float, l2: float, world: int) -> tuple[Losses, list[Tensor]]:
    """What one worker's objective gives, and the gradient of it."""
    built.zero_grad(set_to_none=True)
    losses = supervised(CROSS_ENTROPY, l1, l2, world)(built, some)
    losses.loss.backward()
    return losses, [parameter.grad.clone() for parameter in built.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.01, 0.0), (0.0, 0.02), (0.01, 0.02)])
def test_the_loss_is_cross_entropy_and_penalties_of_the_weights_but_not_of_biases(l1: float, l2: float) -> None:
    built, some = model(), batch()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1)  # biases that are not 0
    logits = built(some.inputs)
    expected = -logits.log_softmax(dim=1)[torch.arange(ROWS), some.target].mean()
    for name, parameter in built.named_parameters():
        if name.endswith("weight"):
            expected = expected + l1 * parameter.abs().sum() + l2 * (parameter**2).sum()
    gradient = torch.autograd.grad(expected, list(built.parameters()))
    losses, found = of(built, some, l1, l2, 1)
    assert losses.loss.item() == pytest.approx(expected.item(), rel=1e-13)
    assert number(losses.correct) == (logits.argmax(dim=1) == some.target).sum().item()
    for one, other in zip(found, gradient, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [Mlp, Cnn])
@pytest.mark.parametrize("cuts", [[0, 15, 30], [0, 3, 30], [0, 0, 17, 30]])
@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.01, 0.02)])
def test_the_parts_of_all_workers_add_up_to_the_whole_even_of_one_without_rows(
    kind: type[Mlp] | type[Cnn], cuts: list[int], l1: float, l2: float
) -> None:
    built, some = model(kind), batch()
    whole, gradient = of(built, some, l1, l2, 1)
    world = len(cuts) - 1
    parts = [of(built, part(some, slice(cuts[rank], cuts[rank + 1])), l1, l2, world) for rank in range(world)]
    assert sum(losses.loss.item() for losses, _ in parts) == pytest.approx(whole.loss.item(), rel=1e-12)
    assert sum(number(losses.correct) for losses, _ in parts) == number(whole.correct)
    for index, expected in enumerate(gradient):
        torch.testing.assert_close(sum(found[index] for _, found in parts), expected, rtol=1e-10, atol=1e-12)


def test_a_penalty_of_one_weight_is_the_elastic_net_and_so_is_its_gradient() -> None:
    layer = nn.Sequential(nn.Linear(2, 1), nn.LayerNorm(1))
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[3.0, -4.0]]))
        layer[0].bias.fill_(100.0)
        layer[1].weight.fill_(50.0)
    found = penalty(layer, 0.1, 0.01)
    assert found.item() == pytest.approx(0.1 * 7 + 0.01 * 25)
    found.backward()
    assert layer[0].weight.grad[0].tolist() == pytest.approx([0.1 + 2 * 0.01 * 3, -0.1 - 2 * 0.01 * 4])
    assert layer[0].bias.grad is None and layer[1].weight.grad is None and layer[1].bias.grad is None


@pytest.mark.parametrize("world", [1, 3])
def test_the_parts_of_a_batch_that_is_accumulated_add_up_to_the_whole_with_its_penalty(world: int) -> None:
    built, some = model(), batch()
    whole, gradient = of(built, some, 0.01, 0.02, world)
    cut = ((slice(0, 6), 0.2), (slice(6, 30), 0.8))
    parts = [of(built, part(some, rows)._replace(part=share), 0.01, 0.02, world) for rows, share in cut]
    assert sum(losses.loss.item() for losses, _ in parts) == pytest.approx(whole.loss.item(), rel=1e-12)
    for index, expected in enumerate(gradient):
        torch.testing.assert_close(sum(found[index] for _, found in parts), expected, rtol=1e-10, atol=1e-12)


class Given(nn.Module):
    """A model whose outputs are its one input."""

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["x"]


def drawn(target: Target, rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Outputs float64 and targets of a kind."""
    generator = torch.manual_seed(seed)
    outputs = torch.randn(rows, target.size, dtype=torch.float64, generator=generator)
    if target.kind == "category":
        return outputs, torch.randint(0, target.size, (rows,), generator=generator)
    other = torch.randn(rows, target.size, dtype=torch.float64, generator=generator)
    return (outputs, (other > 0).to(torch.uint8)) if target.kind == "multi_label" else (1030 + 30 * outputs, (1000 + 30 * other).float())


def by_hand(target: Target, outputs: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Tensor:
    """Losses of the rows, from their formulas in numpy."""
    values, wanted = outputs.numpy(), wanted.numpy()
    if target.kind == "number":
        return torch.tensor((((values - wanted) / np.array([30.0, 4.0])) ** 2).mean(axis=1))
    if target.kind == "category":
        probability = np.exp(values)[np.arange(len(wanted)), wanted] / np.exp(values).sum(axis=1)
        return torch.tensor(-np.log(probability) * (1 if weights is None else weights.numpy()[wanted]))
    probability = 1 / (1 + np.exp(-values))
    absent, present = (1, 1) if weights is None else weights.numpy()
    return torch.tensor(-(present * wanted * np.log(probability) + absent * (1 - wanted) * np.log(1 - probability)).mean(axis=1))


@pytest.mark.parametrize("target", [TWO, THREE, LABELS, PAIR], ids=lambda target: target.name)
def test_the_loss_of_each_kind_of_target_is_its_formula_in_rows_and_in_sum(target: Target) -> None:
    outputs, wanted = drawn(target)
    loss = loss_of(None, target, OUTPUT[target])
    expected = by_hand(target, outputs, wanted)
    torch.testing.assert_close(loss(outputs, wanted, "none"), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss(outputs, wanted, "sum"), expected.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("target", [TWO, THREE, LABELS, PAIR], ids=lambda target: target.name)
@pytest.mark.parametrize("cuts", [[0, 30], [0, 3, 30], [0, 0, 17, 30]])
@pytest.mark.parametrize("mixes", [False, True])
def test_a_batch_of_any_kind_adds_up_over_workers_mixed_or_not(target: Target, cuts: list[int], mixes: bool) -> None:
    (outputs, wanted), (_, second) = drawn(target), drawn(target, seed=1)
    share = torch.rand(ROWS, generator=torch.manual_seed(2))
    expected = by_hand(target, outputs, wanted)
    if mixes:
        expected = share * expected + (1 - share) * by_hand(target, outputs, second)
    objective, gradient, total, correct = supervised(loss_of(None, target, OUTPUT[target]), 0, 0, 1), torch.zeros(0), 0.0, 0.0
    for low, high in pairwise(cuts):
        part = slice(low, high)
        leaf = outputs[part].clone().requires_grad_()
        mixed = Mixed(second[part], share[part]) if mixes else None
        losses = objective(Given(), Batch({"x": leaf}, wanted[part], ROWS, mixed))
        losses.loss.backward()
        assert leaf.grad is not None
        gradient, total = torch.cat([gradient, leaf.grad]), total + losses.loss.item()
        correct += number(losses.correct) if target.kind == "category" else 0
        assert (losses.correct is None) == (target.kind != "category")
    assert total == pytest.approx(expected.mean().item(), rel=1e-12)
    whole = outputs.clone().requires_grad_()
    loss = loss_of(None, target, OUTPUT[target])
    rows = share * loss(whole, wanted, "none") + (1 - share) * loss(whole, second, "none") if mixes else loss(whole, wanted, "none")
    rows.mean().backward()
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-10, atol=1e-15)
    if target.kind == "category":
        right = (outputs.argmax(dim=1) == wanted).float()
        if mixes:
            right = share * right + (1 - share) * (outputs.argmax(dim=1) == second)
        assert correct == pytest.approx(right.sum().item(), rel=1e-6)


COUNTS = {"cat": 100, "dog": 60, "owl": 40}


def test_balanced_weights_make_the_rows_of_each_class_weigh_the_same_and_the_mean_row_1() -> None:
    weights = class_weights("balanced", THREE, COUNTS, 200)
    assert weights.tolist() == pytest.approx([200 / (3 * 100), 200 / (3 * 60), 200 / (3 * 40)])  # as scikit-learn
    assert sum(weights[index] * rows for index, rows in enumerate(COUNTS.values())).item() == pytest.approx(200)


def test_given_weights_keep_their_ratios_those_left_out_are_1_and_the_mean_row_weighs_1() -> None:
    weights = class_weights({"owl": 5.0}, THREE, COUNTS, 200)
    mean = (100 + 60 + 5 * 40) / 200
    assert weights.tolist() == pytest.approx([1 / mean, 1 / mean, 5 / mean])
    drawn_equally = class_weights({"owl": 5.0}, THREE, COUNTS, 200, balanced_rows=True)
    assert drawn_equally.tolist() == pytest.approx([3 / 7, 3 / 7, 15 / 7])


def test_a_class_that_has_no_training_row_spoils_no_weight() -> None:
    for given in ("balanced", {"cat": 3.0}):
        for equally in (False, True):
            weights = class_weights(given, THREE, COUNTS | {"dog": 0}, 140, equally)
            assert weights.isfinite().all()
            shares = [0.5, 0.5] if equally else [100 / 140, 40 / 140]
            assert shares[0] * weights[0] + shares[1] * weights[2] == pytest.approx(1)


def test_balanced_weights_of_labels_make_those_with_and_those_without_weigh_the_same() -> None:
    rows = {"art": 10, "law": 100, "sea": 0, "war": 200}
    weights = class_weights("balanced", LABELS, rows, 200)
    assert weights[:, 0].tolist() == pytest.approx([200 / (2 * 190), 200 / (2 * 10)])
    assert weights[:, 1].tolist() == pytest.approx([1, 1])
    assert weights.isfinite().all() and (weights > 0).all()
    given = class_weights({"art": 19.0}, LABELS, rows, 200)
    torch.testing.assert_close(given[:, 0], weights[:, 0])
    assert given[1, 1].item() == 1


@pytest.mark.parametrize(("target", "rows"), [(THREE, COUNTS), (LABELS, {"art": 30, "law": 100, "sea": 7, "war": 150})])
def test_weighted_losses_are_their_formula(target: Target, rows: dict[str, int]) -> None:
    weights = class_weights("balanced", target, rows, 200)
    outputs, wanted = drawn(target)
    found = loss_of(None, target, nn.Identity(), weights)
    expected = by_hand(target, outputs, wanted, weights)
    torch.testing.assert_close(found(outputs, wanted, "none"), expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found(outputs, wanted, "sum"), expected.sum(), rtol=1e-12, atol=1e-15)
    assert (expected - by_hand(target, outputs, wanted)).abs().max() > 0.1
