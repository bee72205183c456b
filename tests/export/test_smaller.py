"""Networks with fewer channels, and weights that become 0 by how they move, or are trained again without them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dlopt.artifact import once
from dlopt.compress import Budget, Prune, Quantize, Structured, measure
from dlopt.compress.quantize import activation_first
from dlopt.compress.stage import said
from dlopt.data.feed.batches import Batch
from dlopt.data.prepared import Split
from dlopt.export import Onnx, Pickle, Safetensors
from dlopt.export.stage import EXPORT
from dlopt.models import Cnn, Mlp, Resnet
from dlopt.part import DloptError, Signature
from dlopt.train.job import Fit
from dlopt.train.loop.losses import loss_of
from dlopt.train.loop.objectives import supervised
from dlopt.train.start import load_network, trained_network
from dlopt.train.tuning import Masked, Sparse, Teacher, unlike, weights_of
from tests.export.test_compress import IMAGES, TABLE, graph, model_of, small, weights
from tests.packages import package
from tests.sets import inputs_of


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.01)


CUT = [
    pytest.param(IMAGES, Cnn(channels=(16, 32), hidden=64, norm="batch"), Structured(), id="cnn"),
    pytest.param(IMAGES, Resnet(blocks=(1, 1), widths=(16, 32)), Structured(multiple=2), id="resnet"),
    pytest.param(TABLE, Mlp(hidden=(64, 64)), Structured(work=0.3, scope="global"), id="table", marks=pytest.mark.slow),
    pytest.param(
        IMAGES, Resnet(block="bottleneck", blocks=(1, 1), widths=(32, 64)), Structured(multiple=4), id="bottleneck", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("found", "model", "part"), CUT)
def test_channels_are_really_taken_out_of_the_network_and_of_the_graph(tmp_path: Path, found: Signature, model: Any, part: Any) -> None:
    package("torch_pruning", "structured")
    big, data = model_of(tmp_path, found, model)
    little = small(tmp_path, big, data, part)
    before, after = little.info["table"]
    assert after["multiply_adds"] <= part.work * before["multiply_adds"] < before["multiply_adds"]
    assert after["parameters"] < before["parameters"] and after["bytes"] < before["bytes"]
    exports = [once(EXPORT, Onnx(), tmp_path, one, data) for one in (big, little)]
    shapes = [{tensor.name: tuple(tensor.dims) for tensor in graph(one).graph.initializer} for one in exports]
    narrower = [name for name in shapes[0] if name in shapes[1] and np.prod(shapes[1][name]) < np.prod(shapes[0][name])]
    assert len(narrower) >= 2 and exports[1].info["largest_difference"] <= 1e-5
    for other in (Safetensors(), Pickle()):
        assert once(EXPORT, other, tmp_path, little, data).info["largest_difference"] <= 1e-5
    for name, weight in weights(little, data).items():
        assert weight.shape[0] % part.multiple == 0 or "head" in name or "tables" in name


def test_the_units_that_go_are_those_of_least_weight(tmp_path: Path) -> None:
    package("torch_pruning", "structured")
    big, data = model_of(tmp_path, IMAGES, Mlp(hidden=(64,)))
    first, head = weights(big, data).values()
    kept, _ = weights(small(tmp_path, big, data, Structured(multiple=1)), data).values()
    importance = np.square(first).sum(axis=1) + np.square(head).sum(axis=0)
    wanted = np.sort(np.argsort(importance)[-len(kept) :])
    np.testing.assert_array_equal(kept, first[wanted])


def test_work_that_cannot_be_so_little_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package("torch_pruning", "structured")
    big, data = model_of(tmp_path, IMAGES, Mlp(hidden=(64,)))
    with pytest.raises(DloptError, match=r"^compress: structured: 0\.\d+ of the work is left at least: raise work, or lower multiple$"):
        small(tmp_path, big, data, Structured(work=0.01, multiple=32))
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(DloptError, match=r"^compress: structured: needs the package torch_pruning: pip install 'dlopt\[structured\]'$"):
        small(tmp_path, big, data, Structured())


def test_by_movement_those_go_that_come_nearer_to_0(tmp_path: Path) -> None:
    layer = nn.Linear(4, 1, bias=False)
    network = nn.Sequential(layer)
    save_file({"0.weight": torch.tensor([[3.0, 0.5, -2.0, 1.0]])}, tmp_path / "start.safetensors")
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.5, 0.6, -2.2, 0.9]]))
    held = Sparse(sparsity=0.5, scope="movement", over=1.0, start=tmp_path / "start.safetensors").begin(network)
    held.after(1.0)
    assert layer.weight.tolist() == [[0.0, pytest.approx(0.6), pytest.approx(-2.2), 0.0]]


def test_movement_is_the_sum_of_weight_times_step(tmp_path: Path) -> None:
    """Of Sanh et al. (2020): what a weight's square has grown by is twice the sum of weight times step, up to the steps' squares."""
    generator = torch.Generator().manual_seed(0)
    weight, total = torch.randn(50, generator=generator), torch.zeros(50)
    start = weight.clone()
    for _ in range(2000):
        step = 1e-3 * torch.randn(50, generator=generator)
        total += (weight + step / 2) * step
        weight = weight + step
    torch.testing.assert_close(weight.square() - start.square(), 2 * total, atol=1e-4, rtol=1e-3)


def test_a_mask_holds_from_its_step_on(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(2, 1, bias=False))
    save_file({"0.weight": torch.tensor([[0.0, 7.0]])}, tmp_path / "found.safetensors")
    seen = []
    for since in (0.0, 0.5):
        with torch.no_grad():
            network[0].weight.fill_(1.0)
        held = Masked(file=tmp_path / "found.safetensors", since=since).begin(network)
        for done in (0.0, 0.4, 0.5):
            seen.append((network[0].weight.tolist()[0], held.settled(done)))
            held.after(done)
        assert network[0].weight.tolist() == [[0.0, 1.0]]
    assert seen[0] == ([0.0, 1.0], True) and seen[3] == ([1.0, 1.0], False)


def test_a_lottery_ticket_is_trained_from_the_first_weights(tmp_path: Path) -> None:
    big, data = model_of(tmp_path, IMAGES, Mlp(hidden=(16,)))
    fit = Fit.model_validate(big.manifest.section)
    once_pruned = weights(small(tmp_path, big, data, Prune(sparsity=0.6)), data)
    little = small(tmp_path, big, data, Prune(sparsity=0.6, rewind=0.0))
    for name, weight in weights(little, data).items():
        np.testing.assert_array_equal(weight == 0, once_pruned[name] == 0)
    assert little.info["table"][1]["metrics"]
    first = dict(weights_of(load_network(fit, data)))
    trained = weights(little, data)
    assert any((trained[name] != first[name].detach().numpy())[trained[name] != 0].any() for name in trained)


@pytest.mark.slow
def test_rounds_of_a_lottery_have_more_and_more_zeros(tmp_path: Path) -> None:
    big, data = model_of(tmp_path, IMAGES, Mlp(hidden=(16,)))
    found = weights(small(tmp_path, big, data, Prune(sparsity=0.75, rewind=0.5, rounds=2)), data)
    assert sum(int((value == 0).sum()) for value in found.values()) == round(0.75 * sum(value.size for value in found.values()))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"scope": "movement"}, "scope: movement is seen while weights are trained: give epochs, and over above 0"),
        ({"rounds": 3}, "rounds: 3 of them need rewind, the share of the epochs that each goes back to, such as 0"),
    ],
)
def test_pruning_that_lacks_a_field_says_which(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DloptError, match=said):
        Prune(**fields)


@pytest.mark.parametrize(
    ("speeds", "met"),
    [pytest.param([1.9] * 4 + [2.1], True, id="met"), pytest.param([1.5] * 99, False, id="never", marks=pytest.mark.slow)],
)
def test_a_budget_with_a_speed_takes_the_first_chain_that_is_as_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speeds: list[float], met: bool
) -> None:
    said, real = iter(speeds), measure.in_turn

    def timed(computes: Any, rows: Any) -> dict[str, float]:
        taken = real(computes, rows)
        return taken | {"compressed": taken["float32"] / next(said)} if any(len(one) == 3 for one in rows.values()) else taken

    monkeypatch.setattr(measure, "in_turn", timed)
    big, data = model_of(tmp_path, IMAGES, Mlp(hidden=(16,)))
    part = Budget(drop=1, size=1, speed=2, batch=3, epochs=0)
    if met:  # by whole numbers between the layers: the fifth chain, after weights of 8 and 4 bits
        assert "model.onnx" in small(tmp_path, big, data, part).manifest.files
        return
    nearest = r"stays within size 1 and drop 1 at 2 times the speed; the nearest is .*, 1\.50 times as fast$"
    with pytest.raises(DloptError, match=nearest):
        small(tmp_path, big, data, part)


def test_what_is_alike_does_not_depend_on_width_or_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    mine = torch.randn(6, 4, generator=generator)
    turned, _ = torch.linalg.qr(torch.randn(9, 4, generator=generator))
    assert float(unlike(mine, 3 * mine @ turned.T)) < 1e-10
    other = torch.randn(6, 9, generator=generator)
    wanted = 0.0
    products = [(values @ values.T).numpy() for values in (mine, other)]
    for row in range(6):
        one, two = (found[row] / np.linalg.norm(found[row]) for found in products)
        wanted += float(np.square(one - two).sum())
    assert float(unlike(mine, other)) == pytest.approx(wanted, rel=1e-5)


def test_features_of_a_teacher_are_a_part_of_the_loss(tmp_path: Path) -> None:
    big, data = model_of(tmp_path, IMAGES, Mlp(hidden=(32,)))
    fit = Fit.model_validate(big.manifest.section).model_copy(update={"model": Mlp(hidden=(8,))})
    student, split = load_network(fit, data).eval(), Split.open(data, "train")
    rows = {name: torch.from_numpy(values[:20].copy()) for name, values in split.read(split.chunks[:1]).items()}
    target = rows.pop(IMAGES.target.name)
    batch, plain = Batch(rows, target, total=20), supervised(loss_of(None, IMAGES.target, student.output), 0.0, 0.0, 1)
    losses = []
    for features in (0.0, 2.0):
        taught = Teacher(model=big.path, data=data.path, alpha=0.5, features=features).teach(plain, IMAGES.target, torch.device("cpu"))
        losses.append(taught(student, batch).loss.item())
    with torch.no_grad():
        seen = [network.body.encoder(network.preprocess(rows)) for network in (student, trained_network(big, data))]
    assert [one.shape[1] for one in seen] == [8, 32]
    assert losses[1] - losses[0] == pytest.approx(2 * float(unlike(*seen)) / 20, rel=1e-4)
    assert not student._forward_hooks


@pytest.mark.parametrize(("fast", "end"), [(2.0, "2.00 times as fast at 32 rows"), (0.5, "on this processor float32 is faster")])
def test_a_file_that_is_slower_here_is_said_to_be(fast: float, end: str) -> None:
    before = {"bytes": 100, "zlib": 80, "seconds_1": 1e-3, "seconds_32": 1e-2}
    after = {"bytes": 25, "zlib": 20, "seconds_1": 1e-3 / fast, "seconds_32": 1e-2 / fast}
    line = said(before, after)
    assert line.startswith(f"0.25 of the bytes, 0.25 packed, {fast:.2f} times as fast at 1 row, ") and line.endswith(end)


def test_pooling_of_a_quantized_network_is_of_whole_numbers_and_says_the_same(tmp_path: Path) -> None:
    big, data = model_of(tmp_path, IMAGES, Cnn(channels=(4, 8), hidden=16))
    plain = once(EXPORT, Onnx(), tmp_path, big, data).read(Onnx.file)
    turned = activation_first(onnx.load_from_string(plain))
    onnx.checker.check_model(turned)
    kinds = [node.op_type for node in turned.graph.node if node.op_type in ("Conv", "Relu", "MaxPool")]
    assert kinds == ["Conv", "Relu", "MaxPool", "Conv", "Relu", "MaxPool", "Relu"]
    rows = inputs_of(IMAGES, 9)
    outputs = [onnxruntime.InferenceSession(one).run(None, rows)[0] for one in (plain, turned.SerializeToString())]
    np.testing.assert_allclose(*outputs, atol=1e-6)
    found = small(tmp_path, big, data, Quantize(mode="static"))
    nodes = {name: node for node in onnx.load_from_string(found.read("model.onnx")).graph.node for name in node.output}
    pools = [node for node in nodes.values() if node.op_type == "MaxPool"]
    assert len(pools) == 2 and all(nodes[pool.input[0]].op_type == "DequantizeLinear" for pool in pools)
    assert found.info["table"][1]["agreement"] > 0.9
