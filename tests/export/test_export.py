"""The exported file says what torch says, on any number of rows, and is refused when it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from dlopt.artifact import Artifact, Stage, once
from dlopt.data.prepared import Split
from dlopt.export import Onnx
from dlopt.export.graph import LARGEST, onnx_file, refuse_too_large
from dlopt.export.proof import TIE, count_other_labels, fed
from dlopt.export.stage import EXPORT
from dlopt.models import Cnn, Mlp, Network, TextBag, TextCnn, Units
from dlopt.models.custom import custom
from dlopt.part import DloptError, Signature, Target
from dlopt.train.job import Fit, Train
from dlopt.train.measure.evaluate import predict
from dlopt.train.measure.metrics import activated
from dlopt.train.start import trained_network
from tests import sets
from tests.graphs import compared
from tests.models.test_custom import Tower
from tests.models.test_models import image, numbers
from tests.sets import CATEGORIES, DATES, EVERYTHING, HASHED, LABELS, NUMBER, ONE, PAIR, TEXT, THREE, TWO, inputs_of, trained

IMAGES = Signature(inputs=(image(12, 10, 3),), target=THREE)
FEW = Signature(inputs=(numbers("a", "b", "c"),), target=Target(name="late", labels=(0, 1)))
BOTH = Signature(inputs=(numbers("a.b", name="items"), image(8, 8, name="the picture")), target=THREE)
STRINGS = Signature(inputs=(CATEGORIES, ONE, numbers("a")), target=TWO)


def prepared(home: Path, found: Signature, **rows: int) -> Artifact:
    return sets.prepared(home, found, **{"train": 40, "validation": 20, "test": 3000} | rows)


def exported(home: Path, model: Artifact, data: Artifact, **section: Any) -> Artifact:
    return once(EXPORT, Onnx(**section), home, model, data)


def run(export: Artifact, rows: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(export.path / Onnx.file)
    (output,) = session.get_outputs()
    (found,) = session.run([output.name], rows)
    return np.asarray(found)


def torchs(network: Network, rows: dict[str, np.ndarray], target: Target) -> np.ndarray:
    with torch.no_grad():
        return activated(target, network({name: torch.from_numpy(values) for name, values in rows.items()}).double()).numpy()


CASES = [
    pytest.param(IMAGES, Mlp(hidden=(32,), init="kaiming_normal"), "float32", id="mlp"),
    pytest.param(IMAGES, Cnn(channels=(4, 8), hidden=16), "float32", id="cnn"),
    pytest.param(FEW, Mlp(hidden=(16, 16), activation="gelu"), "float32", id="numbers"),
    pytest.param(BOTH, Mlp(hidden=(16,), activation="silu"), "float32", id="both"),
    pytest.param(IMAGES, Cnn(channels=(4,), hidden=16, activation="leaky_relu"), "float64", id="float64"),
    pytest.param(FEW, Mlp(hidden=()), "float64", id="linear"),
    pytest.param(STRINGS, Mlp(hidden=(16,)), "float32", id="strings"),
    pytest.param(Signature(inputs=(HASHED, DATES), target=LABELS), Mlp(hidden=(16,)), "float32", id="hashed and dates to labels"),
    pytest.param(Signature(inputs=(TEXT,), target=PAIR), TextCnn(channels=8, embedding=6), "float32", id="text to numbers"),
    pytest.param(Signature(inputs=EVERYTHING, target=NUMBER), Mlp(hidden=(16,)), "float32", id="everything to a number"),
    pytest.param(Signature(inputs=EVERYTHING, target=LABELS), Mlp(hidden=(16,)), "float64", id="everything to labels"),
]


@pytest.mark.parametrize(("signature", "model", "precision"), CASES)
def test_the_file_says_what_torch_says_on_any_number_of_rows(tmp_path: Path, signature: Signature, model: Any, precision: str) -> None:
    data = prepared(tmp_path, signature)
    weights = trained(tmp_path, data, model, precision)
    export = exported(tmp_path, weights, data)
    network, target = trained_network(weights, data), signature.target
    scale = network.output.std.double().numpy() if isinstance(network.output, Units) else 1.0
    for rows in (0, 1, 2, 7, 1000):
        some = inputs_of(signature, rows, seed=rows + 10)
        found, expected = run(export, strings(signature, some)), torchs(network, some, target)
        assert (found.dtype, found.shape) == (np.float32, (rows, signature.num_outputs))
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5, rtol=0)
        if target.kind == "category":
            np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))
    assert (expected / scale).std() > 0.01  # there was something to tell apart


@pytest.mark.parametrize(("signature", "model", "precision"), CASES)
def test_the_manifest_has_the_largest_difference_over_the_whole_test_split(
    tmp_path: Path, signature: Signature, model: Any, precision: str
) -> None:
    data = prepared(tmp_path, signature)
    weights = trained(tmp_path, data, model, precision)
    export = exported(tmp_path, weights, data)
    test = Split.open(data, "test")
    expected = predict(trained_network(weights, data), test, torch.device("cpu"))[0].numpy()
    found = np.concatenate([run(export, fed(signature, test.read([chunk]))) for chunk in test.chunks])
    assert export.info["rows"] == len(test) == 3000
    assert export.info["split"] == "test"
    if signature.target.kind != "number":
        assert export.info["largest_difference"] == np.abs(found - expected).max()
        assert 0 < export.info["largest_difference"] < 1e-5
    assert export.info["largest_difference"] < 1e-5


def strings(signature: Signature, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Codes of categories as strings, by the vocabulary alone: of an unknown value, one that is nowhere."""
    found = dict(rows)
    for feature in signature.inputs:
        if feature.dtype == "string":
            tables = [["no such value", *known] for known in feature.vocabularies]
            values = [[tables[column][code] for column, code in enumerate(row)] for row in rows[feature.name]]
            found[feature.name] = np.array(values, dtype=object).reshape(-1, len(tables))
    return found


def test_strings_are_looked_up_in_the_graph_missing_and_unknown_ones_too(tmp_path: Path) -> None:
    """ "" has the code of missing values, be it that of the value that fills them, one of its own, or that of the unknown."""
    data = prepared(tmp_path, STRINGS)
    weights = trained(tmp_path, data, Mlp(hidden=(16,)))
    export, network = exported(tmp_path, weights, data), trained_network(weights, data)
    given = {
        ("AA", "EWR", "x"): (1, 2, 1),
        ("UA", "JFK", "y"): (2, 3, 2),
        ("Ü", "LGA", "z"): (3, 4, 0),
        ("", "", ""): (2, 1, 0),
        ("aa", "?", " x"): (0, 5, 0),
        ("??", "never seen", "Ü"): (0, 0, 0),
    }
    words, codes = np.array(list(given), dtype=object), np.array(list(given.values()), dtype=np.int32)
    number = {"numbers": np.full((len(given), 1), 60, dtype=np.float32)}
    found = run(export, {CATEGORIES.name: words[:, :2], ONE.name: words[:, 2:]} | number)
    expected = torchs(network, {CATEGORIES.name: codes[:, :2], ONE.name: codes[:, 2:]} | number, TWO)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len({tuple(row) for row in expected.round(5)}) == len(given)


def test_the_rows_that_are_compared_have_unknown_missing_and_known_strings() -> None:
    rows = inputs_of(STRINGS, 200)
    carrier, origin = fed(STRINGS, rows)[CATEGORIES.name].T
    codes = rows[CATEGORIES.name]
    assert set(carrier) == {"?", "AA", "UA", "Ü", ""}
    assert set(carrier[codes[:, 0] == 2]) == {"UA", ""}
    assert set(origin) == {"??", "", "EWR", "JFK", "LGA", "?"}  # "?" is a value, so another one stands for the unknown
    assert set(origin[codes[:, 1] == 1]) == {""}
    tail = fed(STRINGS, rows)[ONE.name][:, 0]
    assert set(tail[rows[ONE.name][:, 0] == 0]) == {"?", ""}


@pytest.mark.parametrize("length", [1, 4, 9, 30])
def test_a_text_may_be_of_any_length_and_padding_changes_nothing(tmp_path: Path, length: int) -> None:
    found = Signature(inputs=(TEXT,), target=TWO)
    data = prepared(tmp_path, found)
    weights = trained(tmp_path, data, TextBag(ngrams=2, buckets=50, embedding=8))
    export, network = exported(tmp_path, weights, data), trained_network(weights, data)
    ids = np.zeros((5, 30), dtype=np.int32)
    ids[:, :length] = np.random.default_rng(0).integers(1, 20, (5, length))
    expected = torchs(network, {"title": ids}, TWO)
    np.testing.assert_allclose(run(export, {"title": ids[:, :length]}), expected, atol=1e-6)
    np.testing.assert_allclose(run(export, {"title": ids}), expected, atol=1e-6)


def test_the_graph_of_everything_takes_raw_tensors_in_the_order_of_the_signature(tmp_path: Path) -> None:
    data = prepared(tmp_path, Signature(inputs=EVERYTHING, target=NUMBER))
    model = onnx.load_from_string(exported(tmp_path, trained(tmp_path, data, Mlp()), data).read(Onnx.file))
    onnx.checker.check_model(model, full_check=True)
    assert described(model) == [
        ("numbers", onnx.TensorProto.FLOAT, ["rows", 3]),
        ("carrier, origin", onnx.TensorProto.STRING, ["rows", 2]),
        ("tail", onnx.TensorProto.STRING, ["rows", 1]),
        ("flight", onnx.TensorProto.INT32, ["rows", 1]),
        ("day", onnx.TensorProto.FLOAT, ["rows", 2]),
        ("title", onnx.TensorProto.INT32, ["rows", "title length"]),
        ("image", onnx.TensorProto.UINT8, ["rows", 4, 5, 3]),
        ("values", onnx.TensorProto.FLOAT, ["rows", 1]),
    ]


def described(model: onnx.ModelProto) -> list[tuple[str, int, list[int | str]]]:
    """Name, type and shape of inputs and outputs."""
    return [
        (value.name, value.type.tensor_type.elem_type, [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim])
        for value in (*model.graph.input, *model.graph.output)
    ]


def test_one_file_holds_everything_and_tells_where_it_is_from(tmp_path: Path) -> None:
    data = prepared(tmp_path, BOTH)
    weights = trained(tmp_path, data, Mlp())
    export = exported(tmp_path, weights, data)
    assert sorted(export.manifest.files) == ["model.onnx", "signature.json"]
    assert export.manifest.parents == {"model": weights.path.name, "data": data.path.name}
    content = export.read(Onnx.file)
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert not any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer)
    assert export.info["bytes"] == len(content) > 4 * 65 * 128
    assert export.info["opset"] == model.opset_import[0].version
    assert described(model) == [
        ("items", onnx.TensorProto.FLOAT, ["rows", 1]),
        ("the picture", onnx.TensorProto.UINT8, ["rows", 8, 8, 1]),
        ("probabilities", onnx.TensorProto.FLOAT, ["rows", 3]),
    ]
    meta = {entry.key: entry.value for entry in model.metadata_props}
    assert Signature.model_validate_json(meta["signature"]) == Signature.model_validate_json(export.read("signature.json")) == BOTH
    assert meta["model_digest"] == weights.path.name
    assert {node.op_type for node in model.graph.node}.isdisjoint({"Dropout"})


def test_without_a_test_split_the_validation_split_decides_and_the_manifest_says_so(tmp_path: Path) -> None:
    data = prepared(tmp_path, FEW, test=0)
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
    info = sets._write_model(section, out, data)
    weights = load((out / "weights.safetensors").read_bytes())
    (out / "weights.safetensors").write_bytes(save(weights | {"body.head.bias": weights["body.head.bias"] * torch.nan}))
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
    expected = predict(network, test, torch.device("cpu"))[0].numpy()
    content = onnx_file(network, IMAGES, "x")
    largest, other = compared(content, IMAGES, test, expected)
    assert largest < 1e-6 and other == 0
    largest, other = compared(changed(content, "body.head.bias", 1e-3), IMAGES, test, expected)
    assert 1e-4 < largest < 1e-3
    largest, other = compared(changed(content, "body.head.bias", 100.0), IMAGES, test, expected)
    assert other == (expected.argmax(axis=1) != 0).sum() > 100
    largest, _ = compared(changed(content, "body.head.bias", np.nan), IMAGES, test, expected)
    assert np.isnan(largest)
    expected[3] = np.nan  # in the first chunk
    assert np.isnan(compared(content, IMAGES, test, expected)[0])


def test_a_lookup_that_was_tampered_with_is_seen(tmp_path: Path) -> None:
    data = prepared(tmp_path, STRINGS)
    network, test = trained_network(trained(tmp_path, data, Mlp(hidden=())), data), Split.open(data, "test")
    expected = predict(network, test, torch.device("cpu"))[0].numpy()
    content = onnx_file(network, STRINGS, "x")
    assert compared(content, STRINGS, test, expected)[0] < 1e-6
    for column in range(2):
        for change in ({"default_int64": 1}, {"values_int64s": "swapped"}, {"keys_strings": "other"}):
            model = onnx.load_from_string(content)
            node = [node for node in model.graph.node if node.op_type == "LabelEncoder"][column]
            (attribute,) = [attribute for attribute in node.attribute if attribute.name in change]
            if attribute.name == "default_int64":
                attribute.i = 1
            elif attribute.name == "values_int64s":
                attribute.ints[0], attribute.ints[2] = attribute.ints[2], attribute.ints[0]
            else:
                attribute.strings[1] = b"no such value"
            assert compared(bytes(model.SerializeToString()), STRINGS, test, expected)[0] > 1e-3


def test_numbers_are_compared_in_standard_deviations_and_not_finer_than_float32_rounds(tmp_path: Path) -> None:
    found = Signature(inputs=(numbers("a", "b"),), target=PAIR)
    data = prepared(tmp_path, found)
    network, test = trained_network(trained(tmp_path, data, Mlp(hidden=())), data), Split.open(data, "test")
    with torch.no_grad():
        network.output.mean += 1e6  # the last place of these numbers is 0.06
    expected = predict(network, test, torch.device("cpu"))[0].numpy()
    content, unit = onnx_file(network, found, "x"), network.output.std.double().numpy()
    assert compared(content, found, test, expected, unit) == (0.0, 0)
    for by in (0.5, 3.0):
        largest, other = compared(content, found, test, expected + np.array([0.0, by]), unit)
        assert largest == pytest.approx((by - 2 / 16) / unit[1])  # but for two last places, each 1/16
        assert other == 0


def test_another_label_counts_unless_torch_has_the_two_as_close_as_float32_rounds() -> None:
    expected = np.array([[0.5 + TIE / 4, 0.5 - TIE / 4, 0.0], [0.5 + TIE, 0.5 - TIE, 0.0], [0.4, 0.4, 0.2], [0.4, 0.4, 0.2]])
    found = np.array([[0.4, 0.6, 0.0], [0.4, 0.6, 0.0], [0.4, 0.6, 0.0], [0.2, 0.2, 0.6]], dtype=np.float32)
    assert [count_other_labels(found[[row]], expected[[row]], THREE) for row in range(4)] == [0, 1, 0, 1]
    assert count_other_labels(found, expected, THREE) == 2
    assert Onnx().tolerance > TIE


@pytest.mark.parametrize(
    ("target", "least"),
    [
        (LABELS, (0.5,) * 4),
        (LABELS.model_copy(update={"thresholds": (0.2, 0.3, 0.5, 0.9)}), (0.2, 0.3, 0.5, 0.9)),
        (TWO.model_copy(update={"thresholds": (0.3,)}), (0.7, 0.3)),
    ],
)
def test_another_label_counts_unless_torch_is_as_close_to_the_threshold_as_float32_rounds(target: Target, least: tuple[float, ...]) -> None:
    away = np.array([TIE / 2, 1.5 * TIE, -TIE / 2, -1.5 * TIE])[:, None]
    expected, found = np.array(least) + away, np.array(least) - away
    assert [count_other_labels(found[[row]], expected[[row]], target) for row in range(4)] == [0, 1, 0, 1]
    assert count_other_labels(expected, expected, target) == 0


def test_a_model_that_no_file_can_hold_is_one_line() -> None:
    with torch.device("meta"):
        refuse_too_large(nn.Linear(1, LARGEST // 8 - 1))
        with pytest.raises(DloptError, match=r"^export: the model has 2.0 GiB, and one ONNX file holds less than 2: make it smaller$"):
            refuse_too_large(nn.Linear(1, LARGEST // 8 + 1))


def test_the_export_of_another_model_or_tolerance_is_another_artifact(tmp_path: Path) -> None:
    data = prepared(tmp_path, FEW)
    one, other = trained(tmp_path, data, Mlp()), trained(tmp_path, data, Mlp(hidden=(4,)))
    digests = {exported(tmp_path, model, data, tolerance=tolerance).path.name for model in (one, other) for tolerance in (1e-5, 1e-4)}
    assert len(digests) == 4


class Mixing(Tower):
    """A network whose answer to a row depends on the other rows: by their mean, or by where the row stands."""

    def __init__(self, signature: Signature, by: str) -> None:
        super().__init__(signature, 4)
        self.by = by

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        numbers = inputs["numbers"]
        other = numbers.mean(dim=0) if self.by == "mean" else numbers.roll(1, 0)
        return super().forward(inputs | {"numbers": numbers - other})


class Unwritable(Tower):
    """A network that ONNX has no words for."""

    def __init__(self, signature: Signature) -> None:
        super().__init__(signature, 4)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().forward(inputs) + torch.special.i1e(inputs["numbers"]).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("by", ["mean", "place"])
def test_a_model_that_mixes_rows_is_refused(tmp_path: Path, by: str) -> None:
    """Both sides of the comparison with torch see the same neighbours, so that alone would not tell."""
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS))
    with pytest.raises(DloptError, match=r"^export: the model mixes rows: alone, a row gets another answer \(by .*\) than among 64"):
        exported(tmp_path, trained(tmp_path, data, custom(Mixing, by=by)), data)


def test_a_model_that_onnx_cannot_say_is_one_line(tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS))
    with pytest.raises(DloptError, match=r"^export: the model cannot be written as ONNX: \w+: .*i1e") as error:
        exported(tmp_path, trained(tmp_path, data, custom(Unwritable)), data)
    assert "\n" not in str(error.value)
