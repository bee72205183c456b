"""Norms against their formulas and torch's, and batch normalisation over two workers against that of one."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from dlopt.models import Network, Resnet
from dlopt.models.norms import EPS, NORMS, BatchNorm, Norm, groups, norm
from dlopt.train.parallel.ddp import DDP
from tests.models.test_models import image, network
from tests.processes import together

SHAPES = {2: (7, 12), 3: (7, 5, 12), 4: (7, 12, 4, 3)}
"""By the number of dimensions: 12 channels."""
NAMES: list[Norm] = ["batch", "layer", "group", "rms"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.manual_seed(seed)) * 3 + 2


def learned(layer: nn.Module) -> nn.Module:
    """The layer in float64, with weights and biases that are not those it starts with."""
    layer = layer.double()
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=index + 1))
    return layer


def channels_last(values: Tensor) -> Tensor:
    return values.movedim(1, -1) if values.dim() == 4 else values


def by_hand(name: Norm, values: Tensor) -> Tensor:
    """Without weights and biases; the channels last."""
    values = channels_last(values)
    if name == "rms":
        return values / (values.square().mean(-1, keepdim=True) + EPS).sqrt()
    if name == "batch":
        over: tuple[int, ...] = tuple(range(values.dim() - 1))
    if name == "layer":
        over = (-1,)
    if name == "group":  # 3 groups of 4 channels
        grouped = values.unflatten(-1, (3, 4))
        over = (1, 2, 4) if values.dim() == 4 else (-1,)
        return ((grouped - grouped.mean(over, True)) / (grouped.var(over, correction=0, keepdim=True) + EPS).sqrt()).flatten(-2)
    return (values - values.mean(over, True)) / (values.var(over, correction=0, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_norm_is_its_formula(name: Norm, dims: int) -> None:
    values, layer = drawn(*SHAPES[dims]), learned(norm(name, 12, dims))
    weight, *bias = layer.parameters()
    assert weight.shape == (12,) and len(bias) == (0 if name == "rms" else 1)
    found = layer(values)
    assert found.shape == values.shape
    expected = by_hand(name, values) * weight + (bias[0] if bias else 0)
    torch.testing.assert_close(channels_last(found), expected, rtol=0, atol=1e-12)


def test_no_norm_changes_nothing_and_has_no_weights() -> None:
    layer = norm("none", 12, 4)
    assert layer(values := drawn(2, 12, 3, 3)) is values
    assert not list(layer.parameters())


def test_groups_are_at_most_32_and_have_at_least_4_channels_where_they_come_out_even() -> None:
    assert [groups(channels) for channels in (1, 3, 7, 8, 12, 16, 17, 34, 64, 100, 512, 1024)] == [1, 1, 1, 2, 3, 4, 1, 2, 16, 25, 32, 32]


@pytest.mark.parametrize("name", ["layer", "group", "rms"])
def test_what_normalises_a_sequence_place_by_place_does_not_see_other_places(name: Norm) -> None:
    layer, values = norm(name, 12, 3).double(), drawn(2, 5, 12)
    torch.testing.assert_close(layer(values)[:, :3], layer(values[:, :3]), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("dims", "reference"), [(2, nn.BatchNorm1d), (4, nn.BatchNorm2d)])
def test_batch_norm_alone_is_torchs_in_training_and_after_it(dims: int, reference: type[nn.Module]) -> None:
    ours, theirs = learned(BatchNorm(12)), learned(reference(12))
    for step in range(3):
        values, other = (drawn(*SHAPES[dims], seed=step).requires_grad_() for _ in range(2))
        (found, expected) = (ours(values), theirs(other))
        weights = drawn(*SHAPES[dims], seed=9)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        pairs = [(found, expected), (values.grad, other.grad), (ours.weight.grad, theirs.weight.grad), (ours.bias.grad, theirs.bias.grad)]
        for mine, its in [*pairs, (ours.running_mean, theirs.running_mean), (ours.running_var, theirs.running_var)]:
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.eval()(values), theirs.eval()(values), rtol=0, atol=1e-12)
    assert (ours.running_mean - 2).abs().max() < 2 and (ours.running_mean.abs() > 0.1).all()


def test_a_single_value_a_channel_is_normalised_by_the_running_statistics_and_leaves_them_alone() -> None:
    layer = learned(BatchNorm(12))
    layer(drawn(7, 12))
    mean, variance = layer.running_mean.clone(), layer.running_var.clone()
    found = layer(values := drawn(1, 12, seed=5))
    expected = (values - mean) / (variance + EPS).sqrt() * layer.weight + layer.bias
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert torch.equal(layer.running_mean, mean) and torch.equal(layer.running_var, variance)


def test_the_state_of_batch_norm_is_four_tensors_of_numbers() -> None:
    state = BatchNorm(3).double().state_dict()
    assert {name: value.dtype for name, value in state.items()} == dict.fromkeys(
        ("weight", "bias", "running_mean", "running_var"), torch.float64
    )


SHARES = [(5, 2), (0, 7), (7, 0), (1, 0), (1, 1), (4, 3)]
"""Rows of each of two workers, batch after batch; one value a channel in all, where there is one row of a vector."""


def batch(dims: int, step: int) -> tuple[Tensor, Tensor]:
    """All the rows of a batch, and what the loss weighs the outputs with."""
    shape = (sum(SHARES[step]), *SHAPES[dims][1:])
    return drawn(*shape, seed=step), drawn(*shape, seed=100 + step)


def trained(layer: nn.Module, dims: int, parts: list[slice]) -> dict[str, Tensor]:
    """All that comes out of a worker's rows of every batch: outputs, gradients, running statistics."""
    found: dict[str, Tensor] = {}
    for step, part in enumerate(parts):
        values, weights = (tensor[part] for tensor in batch(dims, step))
        values.requires_grad_()
        for parameter in layer.parameters():
            parameter.grad = None
        outputs = layer(values)
        (outputs.square() * weights).sum().backward()
        assert values.grad is not None
        found |= {f"{step} outputs": outputs.detach(), f"{step} inputs' gradients": values.grad}
        found |= {f"{step} sum of {name}": parameter.grad.clone() for name, parameter in layer.named_parameters()}
        found |= {f"{step} same {name}": value.clone() for name, value in layer.named_buffers()}
    return found


def convolutional() -> Network:
    """Two convolutions and a residual block with batch norms, and a fully connected layer: more than one bucket of gradients."""
    model = Resnet(blocks=(1, 1), widths=(8, 160), zero_residual_ends=False)
    return network(model, image(6, 6, 3), dtype=torch.float64).train()


def stepped(model: nn.Module, parts: list[slice], finish: Callable[[], None]) -> dict[str, Tensor]:
    """The state of a network after a step on a worker's rows of every batch. finish: adds gradients up over workers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step, part in enumerate(parts):
        draw = torch.manual_seed(step)
        values = torch.randint(0, 256, (7, 6, 6, 3), dtype=torch.uint8, generator=draw)[part]
        wanted = torch.randint(0, 10, (7,), generator=draw)[part]
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model({"image": values}), wanted, reduction="sum") / 7).backward()
        finish()
        optimizer.step()
    return dict(model.state_dict())


def _normalised(rank: int, world: int, home: Path) -> None:
    parts = [slice(0, first) if rank == 0 else slice(first, None) for first, _ in SHARES]
    for dims in SHAPES:
        torch.save(trained(learned(norm("batch", 12, dims)), dims, parts), Path(home) / f"{dims}-{rank}")
    held = DDP(convolutional(), rank, world)
    some = [part for part, rows in zip(parts, SHARES, strict=True) if sum(rows) == 7]
    torch.save(stepped(held.module(), some, held.reducer.finish), Path(home) / f"model-{rank}")
    layer = learned(norm("batch", 12, 2)).eval()
    if rank == 0:
        layer(drawn(3, 12))  # the other one is not asked


@pytest.mark.slow
def test_batch_norm_over_two_workers_is_that_of_one_gradients_and_running_statistics_included(tmp_path: Path) -> None:
    together(2, _normalised, tmp_path)
    for dims in SHAPES:
        alone = trained(learned(norm("batch", 12, dims)), dims, [slice(None)] * len(SHARES))
        first, second = (torch.load(tmp_path / f"{dims}-{rank}") for rank in range(2))
        assert alone.keys() == first.keys() == second.keys()
        for name, expected in alone.items():
            if " same " in name:
                assert torch.equal(first[name], second[name]), name
                found = first[name]
            else:
                found = first[name] + second[name] if " sum of " in name else torch.cat((first[name], second[name]))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=f"{dims} {name}")

    whole = [slice(0, 7) for rows in SHARES if sum(rows) == 7]
    alone = stepped(convolutional(), whole, lambda: None)
    for rank in range(2):
        found = torch.load(tmp_path / f"model-{rank}")
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-11, msg=f"{rank} {name}")
    before = convolutional().state_dict()
    assert all((alone[name] - before[name]).abs().max() > 1e-4 for name in before if not name.startswith("preprocess"))


@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_norm_in_onnx_gives_what_torch_gives_on_any_number_of_rows(name: Norm, dims: int) -> None:
    layer = learned(norm(name, 12, dims))
    for step in range(3):
        layer(drawn(*SHAPES[dims], seed=step))
    layer, file = layer.float().eval(), io.BytesIO()
    torch.onnx.export(
        layer,
        (torch.zeros(2, *SHAPES[dims][1:]),),
        file,
        input_names=["values"],
        output_names=["normed"],
        dynamic_axes={"values": {0: "rows"}, "normed": {0: "rows"}},
        opset_version=18,
        dynamo=False,
    )
    operators = {node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node}
    if name in ("batch", "layer"):
        assert {"batch": "BatchNormalization", "layer": "LayerNormalization"}[name] in operators
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for rows in (0, 1, 33):
        values = drawn(rows, *SHAPES[dims][1:], seed=rows).float()
        (found,) = session.run(None, {"values": values.numpy()})
        np.testing.assert_allclose(found, layer(values).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_every_norm_of_the_table_is_tested_here() -> None:
    assert set(NORMS) == {"none", *NAMES}
