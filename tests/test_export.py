"""The exported file says what torch says, on any number of rows, and is refused when it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save
from torch import nn

from dlopt.artifact import Artifact, Stage, digest_of, once
from dlopt.data.prepared import Split, as_table, write_part
from dlopt.export import Onnx
from dlopt.export.onnx import EXPORT, LARGEST, MODEL, TIE, _graph, _other_labels, _refuse_too_large, compare, trained_network
from dlopt.models import Cnn, Mlp, Network, build_network
from dlopt.part import OUTPUT, DloptError, Feature, Part, Signature, Statistics, Target
from dlopt.train.evaluate import evaluate, probabilities
from dlopt.train.section import Fit, Train
from tests.test_models import image, numbers, statistics

IMAGES = Signature(inputs=(image(12, 10, 3),), target=Target(name="label", labels=("cat", "dog", "owl")))
NUMBERS = Signature(inputs=(numbers("a", "b", "c"),), target=Target(name="late", labels=(0, 1)))
BOTH = Signature(inputs=(numbers("a.b", name="items"), image(8, 8, name="the picture")), target=IMAGES.target)
ROWS = {"train": 40, "validation": 20, "test": 3000}


def rows_of(signature: Signature, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random rows; a fifth of all numbers is missing."""
    generator = np.random.default_rng(seed)
    return {feature.name: _values(feature, rows, generator) for feature in signature.inputs}


def _values(feature: Feature, rows: int, generator: np.random.Generator) -> np.ndarray:
    if feature.kind == "image":
        return generator.integers(0, 256, (rows, *feature.shape), dtype=np.uint8)
    values = generator.normal(50, 20, (rows, *feature.shape)).astype(np.float32)
    values[generator.random(values.shape) < 0.2] = np.nan
    return values


def fitted(feature: Feature) -> Statistics:
    columns = feature.shape[-1]
    if feature.kind == "image":
        return statistics([128.0] * columns, [128.0] * columns, [1 / 74.0] * columns)
    return statistics([51.0 + column for column in range(columns)], [50.0] * columns, [0.05] * columns)


class Made(Part):
    signature: Signature
    rows: dict[str, int] = ROWS


def _write_data(section: Made, out: Path) -> dict[str, Any]:
    signature = section.signature
    (out / "signature.json").write_text(signature.model_dump_json())
    (out / "statistics.json").write_text(json.dumps({feature.name: fitted(feature).model_dump() for feature in signature.inputs}))
    for seed, (name, rows) in enumerate(section.rows.items()):
        target = np.arange(rows, dtype=np.int64) % signature.num_outputs
        table = as_table(signature, rows_of(signature, rows, seed) | {signature.target.name: target})
        for part, start in enumerate(range(0, rows, 1024)):
            write_part(table.slice(start, 1024), signature, out / name / f"{part:05d}.parquet")
    return {"counts": section.rows}


def _write_model(section: Fit, out: Path, data: Artifact) -> dict[str, Any]:
    signature = Signature.model_validate_json(data.read("signature.json"))
    found = {feature.name: fitted(feature) for feature in signature.inputs}
    dtype = torch.float64 if section.train.precision == "float64" else torch.float32
    network = build_network(section.model, signature, found, section.seed, dtype)
    (out / "weights.safetensors").write_bytes(save(network.state_dict()))
    for name in ("signature.json", "statistics.json"):
        (out / name).write_bytes(data.read(name))
    return {"metrics": {}}


def prepared(home: Path, signature: Signature, **rows: int) -> Artifact:
    return once(Stage("data", _write_data), Made(signature=signature, rows=ROWS | rows), home)


def trained(home: Path, data: Artifact, model: Mlp | Cnn, precision: Any = "float32") -> Artifact:
    return once(Stage("model", _write_model), Fit(seed=3, model=model, augment=(), train=Train(precision=precision)), home, data)


def exported(home: Path, model: Artifact, data: Artifact, **section: Any) -> Artifact:
    return once(EXPORT, Onnx(**section), home, model, data)


def run(export: Artifact, rows: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(export.path / MODEL)
    (found,) = session.run([OUTPUT], rows)
    return np.asarray(found)


def torchs(network: Network, rows: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return network({name: torch.from_numpy(values) for name, values in rows.items()}).double().softmax(dim=1).numpy()


CASES = [
    pytest.param(IMAGES, Mlp(hidden=(32,), init="normal"), "float32", id="mlp"),
    pytest.param(IMAGES, Cnn(channels=(4, 8), hidden=16), "float32", id="cnn"),
    pytest.param(NUMBERS, Mlp(hidden=(16, 16), activation="gelu"), "float32", id="numbers"),
    pytest.param(BOTH, Mlp(hidden=(16,), activation="silu"), "float32", id="both"),
    pytest.param(IMAGES, Cnn(channels=(4,), hidden=16, activation="leaky_relu"), "float64", id="float64"),
    pytest.param(NUMBERS, Mlp(hidden=()), "float64", id="linear"),
]


@pytest.mark.parametrize("training", [True, False])
def test_metrics_of_a_split_are_means_over_its_rows_without_dropout_and_the_mode_stays(tmp_path: Path, training: bool) -> None:
    data = prepared(tmp_path, IMAGES)
    network = trained_network(trained(tmp_path, data, Mlp(dropout=0.5)), data).train(training)
    test = Split.open(data, "test")
    found = evaluate(network, test, torch.device("cpu"))
    outputs, target = probabilities(network, test, torch.device("cpu"))
    assert network.training is training
    rows = test.read()
    expected = torchs(network.eval(), {"image": rows["image"]})
    np.testing.assert_allclose(outputs.numpy(), expected, atol=1e-6)
    np.testing.assert_array_equal(target.numpy(), rows["label"])
    assert found.loss == pytest.approx(-np.log(expected[np.arange(3000), rows["label"]]).mean(), rel=1e-6)
    assert found.accuracy == (expected.argmax(axis=1) == rows["label"]).mean()


@pytest.mark.parametrize(("signature", "model", "precision"), CASES)
def test_the_file_says_what_torch_says_on_any_number_of_rows(
    tmp_path: Path, signature: Signature, model: Mlp | Cnn, precision: str
) -> None:
    data = prepared(tmp_path, signature)
    weights = trained(tmp_path, data, model, precision)
    export = exported(tmp_path, weights, data)
    network = trained_network(weights, data)
    for rows in (0, 1, 2, 7, 1000):
        some = rows_of(signature, rows, seed=rows + 10)
        found, expected = run(export, some), torchs(network, some)
        assert (found.dtype, found.shape) == (np.float32, (rows, signature.num_outputs))
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))
    assert expected.std() > 0.01  # there was something to tell apart


@pytest.mark.parametrize(("signature", "model", "precision"), CASES)
def test_the_manifest_has_the_largest_difference_over_the_whole_test_split(
    tmp_path: Path, signature: Signature, model: Mlp | Cnn, precision: str
) -> None:
    data = prepared(tmp_path, signature)
    weights = trained(tmp_path, data, model, precision)
    export = exported(tmp_path, weights, data)
    test = Split.open(data, "test")
    expected, _ = probabilities(trained_network(weights, data), test, torch.device("cpu"))
    found = np.concatenate(
        [
            run(export, {name: values for name, values in test.read([chunk]).items() if name != signature.target.name})
            for chunk in test.chunks
        ]
    )
    assert len(test.chunks) > 1
    assert export.info["rows"] == len(test) == 3000
    assert export.info["split"] == "test"
    assert export.info["largest_difference"] == np.abs(found - expected.numpy()).max()
    assert 0 < export.info["largest_difference"] < 1e-5


def test_one_file_holds_everything_and_tells_where_it_is_from(tmp_path: Path) -> None:
    data = prepared(tmp_path, BOTH)
    weights = trained(tmp_path, data, Mlp())
    export = exported(tmp_path, weights, data)
    assert sorted(export.manifest.files) == ["model.onnx", "signature.json"]
    assert export.manifest.parents == {"model": weights.path.name, "data": data.path.name}
    content = export.read(MODEL)
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert not any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer)
    assert export.info["bytes"] == len(content) > 4 * 65 * 128
    assert export.info["opset"] == model.opset_import[0].version
    described = [
        (value.name, value.type.tensor_type.elem_type, [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim])
        for value in (*model.graph.input, *model.graph.output)
    ]
    assert described == [
        ("items", onnx.TensorProto.FLOAT, ["rows", 1]),
        ("the picture", onnx.TensorProto.UINT8, ["rows", 8, 8, 1]),
        ("probabilities", onnx.TensorProto.FLOAT, ["rows", 3]),
    ]
    meta = {entry.key: entry.value for entry in model.metadata_props}
    assert Signature.model_validate_json(meta["signature"]) == Signature.model_validate_json(export.read("signature.json")) == BOTH
    assert meta["model_digest"] == weights.path.name
    assert {node.op_type for node in model.graph.node}.isdisjoint({"Dropout"})


def test_without_a_test_split_the_validation_split_decides_and_the_manifest_says_so(tmp_path: Path) -> None:
    data = prepared(tmp_path, NUMBERS, test=0)
    export = exported(tmp_path, trained(tmp_path, data, Mlp()), data)
    assert (export.info["split"], export.info["rows"]) == ("validation", 20)


def test_a_file_that_differs_by_more_than_the_tolerance_is_refused_and_nothing_is_sealed(tmp_path: Path) -> None:
    data = prepared(tmp_path, IMAGES)
    weights = trained(tmp_path, data, Mlp())
    with pytest.raises(
        RuntimeError, match=r"export refused: on the test split .* differs from torch by up to .* \(export.tolerance is 1e-300\)"
    ):
        exported(tmp_path, weights, data, tolerance=1e-300)
    assert not list(tmp_path.glob("export/*/model.onnx"))
    assert not list(tmp_path.glob("export/*/manifest.json"))
    exported(tmp_path, weights, data)


def test_weights_that_are_not_what_was_sealed_are_one_line(tmp_path: Path) -> None:
    data = prepared(tmp_path, IMAGES)
    weights = trained(tmp_path, data, Mlp())
    file = weights.path / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DloptError, match=r"weights.safetensors: content differs from its seal: delete the folder"):
        exported(tmp_path, weights, data)


def _write_nan(section: Fit, out: Path, data: Artifact) -> dict[str, Any]:
    info = _write_model(section, out, data)
    signature = Signature.model_validate_json(data.read("signature.json"))
    network = build_network(section.model, signature, {feature.name: fitted(feature) for feature in signature.inputs}, 0)
    with torch.no_grad():
        network.body[-1].weight.fill_(torch.nan)
    (out / "weights.safetensors").write_bytes(save(network.state_dict()))
    return info


def test_a_model_whose_outputs_are_not_finite_is_refused(tmp_path: Path) -> None:
    data = prepared(tmp_path, IMAGES)
    weights = once(Stage("model", _write_nan), Fit(seed=3, model=Mlp(), augment=(), train=Train()), tmp_path, data)
    with pytest.raises(RuntimeError, match="differs from torch by up to nan"):
        exported(tmp_path, weights, data)


def changed(content: bytes, name: str, by: float, at: int = 0) -> bytes:
    """The file with a number added to one element of a weight."""
    model = onnx.load_from_string(content)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith(name)]
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[at] += by
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return bytes(model.SerializeToString())


def test_comparing_sees_a_small_difference_another_label_and_a_nan_whatever_comes_after(tmp_path: Path) -> None:
    data = prepared(tmp_path, IMAGES)
    weights = trained(tmp_path, data, Mlp(hidden=()))
    network, test = trained_network(weights, data), Split.open(data, "test")
    expected = probabilities(network, test, torch.device("cpu"))[0].numpy()
    content = _graph(network, IMAGES, "x")
    largest, other = compare(content, IMAGES, test, expected)
    assert largest < 1e-6 and other == 0
    largest, other = compare(changed(content, "body.1.bias", 1e-3), IMAGES, test, expected)
    assert 1e-4 < largest < 1e-3
    largest, other = compare(changed(content, "body.1.bias", 100.0), IMAGES, test, expected)
    assert other == (expected.argmax(axis=1) != 0).sum() > 100
    largest, _ = compare(changed(content, "body.1.bias", np.nan), IMAGES, test, expected)
    assert np.isnan(largest)
    expected[3] = np.nan  # in the first chunk
    assert np.isnan(compare(content, IMAGES, test, expected)[0])


def test_another_label_counts_unless_torch_has_the_two_as_close_as_float32_rounds() -> None:
    expected = np.array([[0.5 + TIE / 4, 0.5 - TIE / 4, 0.0], [0.5 + TIE, 0.5 - TIE, 0.0], [0.4, 0.4, 0.2], [0.4, 0.4, 0.2]])
    found = np.array([[0.4, 0.6, 0.0], [0.4, 0.6, 0.0], [0.4, 0.6, 0.0], [0.2, 0.2, 0.6]], dtype=np.float32)
    assert [_other_labels(found[[row]], expected[[row]]) for row in range(4)] == [0, 1, 0, 1]
    assert _other_labels(found, expected) == 2
    assert Onnx().tolerance > TIE


def test_a_model_that_no_file_can_hold_is_one_line() -> None:
    with torch.device("meta"):
        _refuse_too_large(nn.Linear(1, LARGEST // 8 - 1))
        with pytest.raises(DloptError, match=r"^export: the model has 2.0 GiB, and one ONNX file holds less than 2: make it smaller$"):
            _refuse_too_large(nn.Linear(1, LARGEST // 8 + 1))


def test_the_export_of_another_model_or_tolerance_is_another_artifact(tmp_path: Path) -> None:
    data = prepared(tmp_path, NUMBERS)
    one, other = trained(tmp_path, data, Mlp()), trained(tmp_path, data, Mlp(hidden=(4,)))
    digests = {exported(tmp_path, model, data, tolerance=tolerance).path.name for model in (one, other) for tolerance in (1e-5, 1e-4)}
    assert len(digests) == 4
    assert digest_of(Onnx().model_dump(mode="json")) == digest_of({"kind": "onnx", "tolerance": 1e-5})
