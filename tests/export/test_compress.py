"""Compression: what each part does to weights, how they are kept in files, training that holds them to a form, and the table of it all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from dlopt.artifact import Artifact, once
from dlopt.compress import Budget, Compressor, Distil, Float16, LowRank, Prune, Quantize, Share, measure
from dlopt.compress.share import clustered
from dlopt.compress.stage import COMPRESS, Compress
from dlopt.data.prepared import Split
from dlopt.export import Onnx, Pickle, Safetensors, TorchExport
from dlopt.export.coding import FILE, Codebook, Whole, packed, read
from dlopt.export.stage import EXPORT
from dlopt.models import Cnn, Mlp, Resnet, TextBag
from dlopt.models.shape import in_two, shaped_like
from dlopt.optim.optimizers import Adam
from dlopt.part import DloptError, Signature
from dlopt.spec import validated
from dlopt.train.checkpoint.stores import Checkpointing, Every
from dlopt.train.job import Fit, Resources, Train
from dlopt.train.measure.evaluate import predict
from dlopt.train.start import trained_network
from dlopt.train.tuning import DISTANCES, Rounded, Sparse, Tied, Zeros, weights_of
from tests import sets
from tests.models.test_models import image
from tests.sets import CATEGORIES, NUMBER, NUMBERS, TEXT, THREE, TWO

IMAGES = Signature(inputs=(image(12, 10, 3),), target=THREE)
TABLE = Signature(inputs=(CATEGORIES, NUMBERS), target=TWO)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are taken, but not for long."""
    monkeypatch.setattr(measure, "SECONDS", 0.01)


def model_of(home: Path, found: Signature, model: Any) -> tuple[Artifact, Artifact]:
    data = sets.prepared(home, found, train=200, validation=60, test=200)
    return sets.trained(home, data, model), data


def small(home: Path, model: Artifact, data: Artifact, *parts: Compressor) -> Artifact:
    found = model
    fit = Fit.model_validate(model.manifest.section)
    for part in parts:
        found = once(COMPRESS, Compress(fit=fit, part=part), home, found, data, original=model, resources=Resources())
    return found


def weights(model: Artifact, data: Artifact) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in weights_of(trained_network(model, data)).items()}


def graph(export: Artifact) -> onnx.ModelProto:
    found = onnx.load_from_string(export.read(Onnx.file))
    onnx.checker.check_model(found)
    return found


@pytest.mark.parametrize("scope", ["global", "layer", "lamp"])
def test_pruning_makes_the_share_zero_that_was_asked_for_and_keeps_the_others(tmp_path: Path, scope: Any) -> None:
    model, data = model_of(tmp_path, IMAGES, Mlp(hidden=(16,)))
    before, after = weights(model, data), weights(small(tmp_path, model, data, Prune(sparsity=0.75, scope=scope)), data)
    sizes = {name: value.size for name, value in after.items()}
    zeros = {name: int((value == 0).sum()) for name, value in after.items()}
    assert sum(zeros.values()) == round(0.75 * sum(sizes.values()))
    for name, value in after.items():
        np.testing.assert_array_equal(value[value != 0], before[name][value != 0])
        assert scope != "layer" or zeros[name] == round(0.75 * sizes[name])
        if scope != "lamp":
            assert np.abs(before[name][value == 0]).max() <= np.abs(value[value != 0]).min()
    if scope == "global":
        together = np.sort(np.abs(np.concatenate([value.ravel() for value in before.values()])))
        least = together[round(0.75 * len(together))]
        assert min(np.abs(value[value != 0]).min() for value in after.values()) == pytest.approx(least)


def test_zeros_become_more_by_the_cubic_schedule_and_stay(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 5))
    held = Sparse(sparsity=0.8, over=0.5).begin(network)
    shares, gone = [], torch.zeros(30, 40, dtype=torch.bool)
    for step in range(1, 21):
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(torch.randn_like(weight))  # as a step does, of weights that are 0 as well
        held.after(step / 20)
        assert not (gone & (network[0].weight != 0)).any()
        gone = network[0].weight == 0
        shares.append(sum(int((layer.weight == 0).sum()) for layer in network) / 1350)
    wanted = [0.8 * (1 - (1 - min(1.0, step / 10)) ** 3) for step in range(1, 21)]
    np.testing.assert_allclose(shares, wanted, atol=1e-3)
    assert [held.settled(done) for done in (0.4, 0.5, 1.0)] == [False, True, True]


def test_shared_weights_are_few_and_zeros_stay_zeros(tmp_path: Path) -> None:
    model, data = model_of(tmp_path, IMAGES, Mlp(hidden=(16,)))
    found = small(tmp_path, model, data, Prune(sparsity=0.5), Share(bits=3))
    zeros = 0
    for name, value in weights(found, data).items():
        assert len(np.unique(value)) <= 8
        zeros += int((value == 0).sum())
        code = read(found.read(FILE))[name]
        assert isinstance(code, Codebook) and code.places.dtype == np.uint8
        np.testing.assert_array_equal(code.values(), value)
    assert zeros == round(0.5 * (360 * 16 + 16 * 3))


@pytest.mark.slow
def test_clusters_are_those_of_k_means() -> None:
    from sklearn.cluster import KMeans

    values = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    start = np.linspace(values.min(), values.max(), 8)[:, None]
    wanted = KMeans(8, init=start, n_init=1, max_iter=50, tol=0).fit(values.reshape(-1, 1))
    found = clustered(values, 8)
    assert np.square(found - values).sum() == pytest.approx(wanted.inertia_, rel=1e-3)
    few = np.array([[0.0, 1.0, 1.0], [2.0, 0.0, 0.0]], np.float32)
    np.testing.assert_array_equal(clustered(few, 4), few)


def test_tied_weights_move_together() -> None:
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 2.0, 2.0]]))
    held = Tied().begin(layer)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[5.0, 1.0, 4.0]]))
    held.after(1.0)
    assert layer.weight.tolist() == [[0.0, 2.5, 2.5]]


@pytest.mark.parametrize("bits", [8, 4])
def test_whole_numbers_are_the_nearest_ones_of_each_unit(bits: int) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32) * np.arange(6)[:, None].astype(np.float32)
    code = Whole.of(weight, bits)
    most = 2 ** (bits - 1) - 1
    assert np.abs(code.codes).max() <= most and code.values()[0].any() == False  # noqa: E712
    if bits == 8:
        np.testing.assert_allclose(code.scale[1:], np.abs(weight[1:]).max(axis=1) / most, rtol=1e-6)
        assert (np.abs(code.values() - weight) <= code.scale[:, None] / 2 + 1e-6).all()
    plain = np.abs(weight).max(axis=1, keepdims=True) / most
    plain[0] = 1
    rounded = np.round(weight / plain) * plain
    assert np.square(code.values() - weight).sum() <= np.square(rounded - weight).sum() * (1 + 1e-6)


def test_four_bits_lie_as_onnx_has_them() -> None:
    codes = np.array([[-8, 7, 1], [0, -1, 3]], np.int8)
    tensor = onnx.helper.make_tensor("x", onnx.TensorProto.INT4, codes.shape, packed(codes, 4), raw=True)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), codes)
    assert len(packed(codes[:, :1].repeat(1, 1), 4)) == 1


KEPT = [
    pytest.param(IMAGES, Mlp(hidden=(32,)), Quantize(), id="mlp int8"),
    pytest.param(IMAGES, Mlp(hidden=(32,)), Quantize(bits=4), id="mlp int4"),
    pytest.param(IMAGES, Cnn(channels=(4, 8), hidden=16), Quantize(), id="cnn int8"),
    pytest.param(IMAGES, Resnet(blocks=(1, 1), widths=(8, 16)), Share(bits=4), id="resnet shared"),
    pytest.param(TABLE, Mlp(hidden=(16,)), Share(bits=4), id="table shared"),
    pytest.param(Signature(inputs=(TEXT,), target=TWO), TextBag(embedding=8), Float16(), id="text float16"),
    pytest.param(Signature(inputs=(NUMBERS,), target=NUMBER), Mlp(hidden=(16,)), Quantize(), id="numbers int8"),
]


@pytest.mark.parametrize(("found", "model", "part"), KEPT)
def test_what_is_kept_in_few_bytes_is_the_same_network_in_onnx(tmp_path: Path, found: Signature, model: Any, part: Compressor) -> None:
    big, data = model_of(tmp_path, found, model)
    little = small(tmp_path, big, data, part)
    plain, kept = (once(EXPORT, Onnx(drop=0.05), tmp_path, one, data) for one in (big, little))
    assert kept.info.get("exact_difference", kept.info["largest_difference"]) <= 1e-5
    before, after = (sum(len(tensor.raw_data) for tensor in graph(one).graph.initializer) for one in (plain, kept))
    assert after < before
    first, second = little.info["table"]
    assert (first["bytes"], second["bytes"]) == (plain.info["bytes"], kept.info["bytes"])
    assert first["agreement"] == 1 or found.target.kind == "number"
    assert {"seconds_1", "seconds_32", "zlib", "value"} <= set(second)


def test_a_matrix_of_whole_numbers_is_a_quarter_and_is_multiplied_as_such(tmp_path: Path) -> None:
    model, data = model_of(tmp_path, IMAGES, Mlp(hidden=(256, 256)))
    found = graph(once(EXPORT, Onnx(drop=0.05), tmp_path, small(tmp_path, model, data, Quantize()), data))
    kinds = {tensor.name: tensor.data_type for tensor in found.graph.initializer}
    assert sum(kind == onnx.TensorProto.INT8 for kind in kinds.values()) == 3
    whole = {node.output[0] for node in found.graph.node if node.op_type == "DequantizeLinear"}
    assert {node.input[1] for node in found.graph.node if node.op_type == "MatMul"} == whole and len(whole) == 3
    numbers = sum(np.prod(tensor.dims, dtype=int) for tensor in found.graph.initializer)
    assert sum(len(tensor.raw_data) for tensor in found.graph.initializer) < 1.05 * numbers + 4 * 1200


def test_a_layer_of_low_rank_is_two_and_has_the_best_matrix_of_that_rank(tmp_path: Path) -> None:
    model, data = model_of(tmp_path, IMAGES, Mlp(hidden=(64, 64)))
    found = small(tmp_path, model, data, LowRank(rank=5))
    network = trained_network(found, data)
    two = network.body.encoder.hidden2.linear
    assert [tuple(layer.weight.shape) for layer in two] == [(5, 64), (64, 5)]
    weight = weights(model, data)["body.encoder.hidden2.linear.weight"]
    left, values, right = np.linalg.svd(weight.astype(np.float64))
    np.testing.assert_allclose((two[1].weight @ two[0].weight).detach().numpy(), (left[:, :5] * values[:5]) @ right[:5], atol=1e-5)
    assert found.info["table"][1]["parameters"] < found.info["table"][0]["parameters"]
    assert found.info["table"][1]["multiply_adds"] == 360 * 5 + 5 * 64 + 2 * 64 * 5 + 64 * 3
    for part in (Onnx(), Safetensors(), Pickle()):
        assert once(EXPORT, part, tmp_path, found, data).info["largest_difference"] <= 1e-5
    with pytest.raises(DloptError, match=r"^compress: low_rank: with rank 64 no layer has fewer numbers than before: lower it$"):
        small(tmp_path, model, data, LowRank(rank=64))


def test_energy_decides_how_many_singular_values_stay(tmp_path: Path) -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    assert [LowRank(energy=energy)._kept(values) for energy in (9 / 14, 0.7, 13 / 14, 0.99, 1.0)] == [1, 2, 2, 3, 3]


def test_convolutions_in_two_and_layers_of_other_sizes_are_built_of_their_weights() -> None:
    layer = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    two = in_two(layer, 4)
    assert two(torch.zeros(1, 3, 9, 9)).shape == layer(torch.zeros(1, 3, 9, 9)).shape
    network = nn.Sequential(layer, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(200, 2))
    other = nn.Sequential(two, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(200, 2))
    built = shaped_like(network, other.state_dict())
    built.load_state_dict(other.state_dict())
    values = torch.randn(5, 3, 9, 9)
    torch.testing.assert_close(built.eval()(values), other.eval()(values))


@pytest.mark.parametrize("method", ["min_max", *(pytest.param(name, marks=pytest.mark.slow) for name in ("entropy", "percentile"))])
def test_static_whole_numbers_cost_little_of_the_metric(tmp_path: Path, method: Any) -> None:
    model, data = model_of(tmp_path, IMAGES, Cnn(channels=(8, 16), hidden=128))
    found = small(tmp_path, model, data, Quantize(mode="static", method=method, rows=64))
    before, after = found.info["table"]
    assert after["agreement"] > 0.8 and after["bytes"] < before["bytes"]
    export = once(EXPORT, Onnx(), tmp_path, found, data)
    kinds = [node.op_type for node in graph(export).graph.node]
    assert kinds.count("QuantizeLinear") >= 4 and export.info["largest_difference"] <= 1e-5
    with pytest.raises(DloptError, match=r"^export: torch_export: the model is quantized in ONNX alone: export it as onnx, pick"):
        once(EXPORT, TorchExport(), tmp_path, found, data)
    with pytest.raises(DloptError, match=r"^compress: quantize: 8 training rows tell no ranges: at least 16 are needed$"):
        small(tmp_path, model, data, Quantize(mode="static", rows=8))


def job_with(*parts: dict[str, Any]) -> dict[str, Any]:
    data = {"source": {"kind": "sample", "name": "mnist"}, "inputs": [{"kind": "image"}], "target": {"kind": "category", "column": "label"}}
    return {"name": "x", "data": data, "model": {"kind": "mlp"}, "compress": list(parts)}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([{"kind": "quantize"}, {"kind": "prune"}], "compress.1: prune after quantize, which decides how weights are kept: put it before"),
        ([{"kind": "share"}, {"kind": "share"}], "compress.1: share after share, which decides how weights are kept: put it before"),
        ([{"kind": "quantize", "mode": "static"}, {"kind": "float16"}], "compress.1: float16 after quantize, which decides"),
        ([{"kind": "quantize", "bits": 4, "mode": "static"}], "bits: 4 is for mode: weights, and it is static: use 8"),
        ([{"kind": "low_rank"}], "give one of energy and rank"),
        ([{"kind": "prun"}], "no kind 'prun'; did you mean 'prune'?"),
    ],
)
def test_what_cannot_follow_is_one_line(parts: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(DloptError) as error:
        validated(job_with(*parts))
    assert said in str(error.value) and "\n" not in str(error.value)
    validated(job_with({"kind": "prune"}, {"kind": "share"}, {"kind": "float16"}))


def fitted(home: Path, found: Signature, model: Any, epochs: int = 3) -> tuple[Artifact, Artifact]:
    """Trained by the loop, without Ray."""
    from dlopt.artifact import Stage
    from dlopt.train.checkpoint.stores import CHECKPOINTS
    from dlopt.train.worker import Assignment, Worker

    data = sets.prepared(home, found, train=600, validation=200, test=300)
    section = Fit(seed=3, model=model, augment=(), train=Train(epochs=epochs, batch_size=32, optimizer=Adam(lr=1e-2), monitor="accuracy"))

    def make(section: Fit, out: Path, data: Artifact) -> dict[str, Any]:
        done = Worker(Assignment(fit=section, data=data.path, out=out, feed="resident"), 0, 1, torch.device("cpu")).run()
        assert done
        return done

    return once(Stage("model", make, scratch=CHECKPOINTS), section, home, data), data


def test_training_on_keeps_zeros_and_brings_the_metric_back(tmp_path: Path) -> None:
    model, data = fitted(tmp_path, Signature(inputs=(NUMBERS,), target=TWO), Mlp(hidden=(64,), dropout=0.0))
    cut = small(tmp_path, model, data, Prune(sparsity=0.95, over=0))
    tuned = small(tmp_path, model, data, Prune(sparsity=0.95, epochs=5, rate=1.0), Share(bits=4, epochs=1))
    for name, value in weights(tuned, data).items():
        assert len(np.unique(value)) <= 16, name
    values = np.concatenate([value.ravel() for value in weights(tuned, data).values()])
    assert (values == 0).mean() >= 0.949
    accuracy = {name: one.info["table"][-1]["value"] for name, one in (("cut", cut), ("tuned", tuned))}
    assert accuracy["tuned"] > accuracy["cut"] + 0.02
    assert tuned.info["table"][0]["value"] == pytest.approx(model.info["metrics"]["test"]["accuracy"])
    assert not list(tuned.path.glob(".begin*")) and not (tuned.path / "predictions.parquet").exists()
    assert once(EXPORT, Onnx(), tmp_path, tuned, data).info["largest_difference"] <= 1e-5


def test_a_student_of_another_signature_is_refused_by_name(tmp_path: Path) -> None:
    from dlopt.train.tuning import refuse_other

    refuse_other(IMAGES, IMAGES)
    with pytest.raises(DloptError, match=r"^compress: teacher: its input 'image' has another shape, columns or vocabulary"):
        refuse_other(Signature(inputs=(image(12, 10, 1),), target=THREE), IMAGES)
    with pytest.raises(DloptError, match=r"^compress: teacher: its target has other name: late"):
        refuse_other(Signature(inputs=IMAGES.inputs, target=TWO), IMAGES)
    with pytest.raises(DloptError, match=r"^nowhere"):
        Distil(teacher="nowhere").found()


def test_training_on_that_is_struck_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = fitted(tmp_path, Signature(inputs=(NUMBERS,), target=TWO), Mlp(hidden=(16,)), epochs=1)
    section = Compress(fit=Fit.model_validate(model.manifest.section), part=Prune(sparsity=0.8, epochs=3))
    given = {"original": model, "resources": Resources(checkpoint=Checkpointing(every=Every(steps=5)))}
    whole = once(COMPRESS, section, tmp_path / "whole", model, data, **given)
    real, steps = Zeros.after, iter(range(100))

    def after(self: Zeros, done: float) -> None:
        real(self, done)
        if next(steps) == 32:
            raise RuntimeError("struck")

    with monkeypatch.context() as patched:
        patched.setattr(Zeros, "after", after)
        with pytest.raises(DloptError, match=r"RuntimeError: struck$"):
            once(COMPRESS, section, tmp_path / "struck", model, data, **given)
    again = once(COMPRESS, section, tmp_path / "struck", model, data, **given)
    assert again.read("weights.safetensors") == whole.read("weights.safetensors")
    lines = [json.loads(line) for line in (again.path / "starts.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and 0 < lines[1]["step"] <= 30


def test_layers_compute_with_what_is_rounded_and_gradients_go_through() -> None:
    layer = nn.Linear(8, 3)
    weight, values = layer.weight, torch.randn(5, 8)
    held = Rounded(bits=4, inputs=True).begin(nn.Sequential(layer))
    outputs = layer(values)
    assert layer.weight is weight
    most = weight.detach().abs().amax(dim=1, keepdim=True) / 7
    rounded = (weight.detach() / most).round() * most
    step = (values.amax().clamp_min(0) - values.amin().clamp_max(0)) / 255
    torch.testing.assert_close(outputs, (values / step).round() * step @ rounded.T + layer.bias)
    outputs.sum().backward()
    assert weight.grad is not None and weight.grad.abs().min() > 0
    held.release()
    torch.testing.assert_close(layer(values), values @ weight.T + layer.bias)


@pytest.mark.slow
def test_a_budget_takes_the_cheapest_chain_that_stays_within_it_and_names_the_nearest_where_none_does(tmp_path: Path) -> None:
    model, data = fitted(tmp_path, Signature(inputs=(NUMBERS,), target=TWO), Mlp(hidden=(128, 128), dropout=0.0))
    found = small(tmp_path, model, data, Budget(drop=0.02, size=0.4))
    kinds = {type(code) for code in read(found.read(FILE)).values()}
    assert kinds == {Whole}
    before, after = found.info["table"]
    assert after["zlib"] <= 0.4 * before["zlib"] and before["value"] - after["value"] < 0.05
    with pytest.raises(DloptError, match=r"^compress: budget: .* within size 0.001 and drop 0; the nearest is .kind: ") as error:
        small(tmp_path, model, data, Budget(drop=0, size=0.001, epochs=0))
    assert re.search(r": 0\.\d+ of the bytes, -?\d\.\d+ lost$", str(error.value))
    assert validated(job_with() | {"compress": {"budget": {"drop": 0.01, "size": 0.1}}}).compress == (Budget(drop=0.01, size=0.1),)


def test_a_student_learns_what_its_teacher_says(tmp_path: Path) -> None:
    teacher, data = fitted(tmp_path, Signature(inputs=(NUMBERS,), target=TWO), Mlp(hidden=(64,), dropout=0.0), epochs=4)
    student = sets.trained(tmp_path, data, Mlp(hidden=(16,), dropout=0.0))
    (tmp_path / "run").mkdir()
    named = {"model": str(teacher.path), "data": str(data.path)}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"name": "teacher", "artifacts": named}))
    part = Distil(teacher=str(tmp_path / "run"), epochs=60, alpha=1.0)
    assert part.found() == teacher.path.name
    found = small(tmp_path, student, data, part)

    def said(model: Artifact) -> torch.Tensor:
        return predict(trained_network(model, data), Split.open(data, "test"), torch.device("cpu"))[0].argmax(dim=1)

    alike = {name: float((said(model) == said(teacher)).double().mean()) for name, model in (("before", student), ("after", found))}
    assert alike["after"] > 0.85 and alike["after"] > alike["before"]


def test_what_a_teacher_costs_is_the_divergence_of_softened_outputs() -> None:
    outputs, wanted = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    soft, mine = (wanted / 3).softmax(dim=1), (outputs / 3).softmax(dim=1)
    torch.testing.assert_close(DISTANCES["category"](outputs, wanted, 3.0), (soft * (soft / mine).log()).sum() * 9)
    for kind, distance in DISTANCES.items():
        assert distance(wanted, wanted, 2.0) <= distance(outputs, wanted, 2.0), kind
    assert DISTANCES["number"](wanted, wanted, 1.0) == 0
