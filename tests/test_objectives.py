"""The loss against its formula, and the parts of several workers against the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dlopt.data.feed import Batch
from dlopt.models import Cnn, Mlp, Network
from dlopt.train.objectives import Losses, penalty, plain, supervised
from tests.test_models import image, network

ROWS = 30


def batch(rows: int = ROWS) -> Batch:
    generator = torch.manual_seed(0)
    images = torch.randint(0, 256, (rows, 8, 8, 1), dtype=torch.uint8, generator=generator)
    return Batch({"image": images}, torch.randint(0, 10, (rows,), generator=generator), rows)


def part(whole: Batch, rows: slice) -> Batch:
    return Batch({name: values[rows] for name, values in whole.inputs.items()}, whole.target[rows], whole.total)


def model(kind: type[Mlp] | type[Cnn] = Mlp) -> Network:
    return network(kind(hidden=(12,)) if kind is Mlp else kind(channels=(3,), hidden=5), image(8, 8), dtype=torch.float64)  # type: ignore[arg-type]


def of(built: nn.Module, some: Batch, l1: float, l2: float, world: int) -> tuple[Losses, list[Tensor]]:
    """What one worker's objective gives, and the gradient of it."""
    built.zero_grad(set_to_none=True)
    losses = supervised(l1, l2, world)(built, some)
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
    assert losses.correct.item() == (logits.argmax(dim=1) == some.target).sum().item()
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
    assert sum(losses.correct.item() for losses, _ in parts) == whole.correct.item()
    for index, expected in enumerate(gradient):
        torch.testing.assert_close(sum(found[index] for _, found in parts), expected, rtol=1e-10, atol=1e-12)


def test_a_gradient_that_is_averaged_over_workers_afterwards_is_the_whole_batchs() -> None:
    built, some, objective = model(), batch(), supervised(0.01, 0.02, 2)
    _, expected = of(built, some, 0.01, 0.02, 1)
    total = [torch.zeros_like(parameter) for parameter in built.parameters()]
    for rows in (slice(0, 10), slice(10, 30)):
        built.zero_grad(set_to_none=True)
        losses = plain(2)(objective, built, part(some, rows))
        assert losses.loss.item() == objective(built, part(some, rows)).loss.item()  # what is reported is not scaled
        for found, parameter in zip(total, built.parameters(), strict=True):
            found += parameter.grad / 2  # as DistributedDataParallel does
    for one, other in zip(total, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_penalty_of_one_weight() -> None:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, -4.0]]))
        layer.bias.fill_(100.0)
    assert penalty(layer, 0.1, 0.01).item() == pytest.approx(0.1 * 7 + 0.01 * 25)
