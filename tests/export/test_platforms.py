"""Formats of servers: what is written is what the server reads, and says what torch says. Servers themselves run in a side environment."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from dlopt.artifact import Artifact, once
from dlopt.export import Onnx, OpenVino, TensorRt, TorchServe, Triton
from dlopt.export.platforms.tensorrt import as_float
from dlopt.export.stage import EXPORT
from dlopt.models import Mlp, TextBag
from dlopt.part import DloptError, Signature
from dlopt.train.start import trained_network
from tests import sets
from tests.export.test_export import strings, torchs
from tests.models.test_models import image
from tests.sets import CATEGORIES, EVERYTHING, NUMBER, NUMBERS, ONE, PAIR, TEXT, THREE, TWO, inputs_of

IMAGES = Signature(inputs=(image(12, 10, 3),), target=THREE)
TABLE = Signature(inputs=(NUMBERS, CATEGORIES, ONE), target=TWO)
ROWS = [
    {"a": 1.5, "b": None, "c": "7", "carrier": "UA", "origin": None, "tail": "x", "flight": "AA1"},
    {"a": 40, "b": 2, "c": 3, "carrier": "??", "origin": "JFK", "tail": None, "flight": None},
]


def exported(home: Path, found: Signature, model: Any, part: Any) -> tuple[Artifact, Artifact, Artifact]:
    data = sets.prepared(home, found)
    weights = sets.trained(home, data, model)
    return once(EXPORT, part, home, weights, data), weights, data


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_a_model_repository_has_what_triton_asks_for(tmp_path: Path, backend: Any) -> None:
    export, *_ = exported(tmp_path, TABLE, Mlp(hidden=(8,)), Triton(backend=backend, batch=16, delay=100))
    assert export.info["largest_difference"] <= 1e-5
    config = export.read("model/config.pbtxt").decode()
    session = onnxruntime.InferenceSession(export.read("model/1/model.onnx"))
    kinds = {"tensor(float)": "TYPE_FP32", "tensor(string)": "TYPE_STRING", "tensor(int32)": "TYPE_INT32"}
    for what, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        found = re.findall(rf'^{what} {{ name: "(.*?)" data_type: (\w+) dims: \[(.*?)\]', config, re.MULTILINE)
        assert found == [(value.name, kinds[value.type], ", ".join(map(str, value.shape[1:]))) for value in values]
    assert f'backend: "{backend}"\nmax_batch_size: 16\n' in config and "max_queue_delay_microseconds: 100" in config
    assert export.read("model/labels.txt") == b"no\nyes\n"
    assert ("model/1/model.py" in export.manifest.files) == (backend == "python")


def test_tokens_have_any_length_in_a_repository_and_numbers_no_labels(tmp_path: Path) -> None:
    export, *_ = exported(tmp_path, Signature(inputs=(TEXT,), target=NUMBER), TextBag(embedding=8), Triton())
    config = export.read("model/config.pbtxt").decode()
    assert re.search(r"^input .* data_type: TYPE_INT32 dims: \[-1\] }$", config, re.MULTILINE)
    assert "label_filename" not in config and "model/labels.txt" not in export.manifest.files


def test_the_model_of_tritons_python_answers_requests_of_many_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the server's own calls, with the classes that it gives to models."""
    export, weights, data = exported(tmp_path, TABLE, Mlp(hidden=(8,)), Triton(backend="python"))

    class Tensor:
        def __init__(self, name: str, values: np.ndarray) -> None:
            self.name, self.values = name, values

        def as_numpy(self) -> np.ndarray:
            return self.values

    given = SimpleNamespace(
        Tensor=Tensor,
        TritonError=str,
        InferenceResponse=lambda output_tensors=(), error=None: SimpleNamespace(tensors=output_tensors, error=error),
        get_input_tensor_by_name=lambda request, name: Tensor(name, request[name]),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", given)
    space: dict[str, Any] = {"__name__": "model"}
    exec(export.read("model/1/model.py"), space)
    model = space["TritonPythonModel"]()
    model.initialize({"model_repository": str(export.path / "model"), "model_version": "1"})
    rows = inputs_of(TABLE, 9, seed=5)
    texts = strings(TABLE, rows)
    sent = {
        name: np.array([one.encode() for one in values.flat], object).reshape(values.shape) if values.dtype == object else values
        for name, values in texts.items()
    }
    asked = [{name: values[start:stop] for name, values in sent.items()} for start, stop in ((0, 1), (1, 4), (4, 9))]
    answers = model.execute([*asked, {name: values[:, :1] for name, values in asked[0].items()}])
    expected = torchs(trained_network(weights, data), rows, TABLE.target)
    np.testing.assert_allclose(np.concatenate([answer.tensors[0].values for answer in answers[:3]]), expected, atol=1e-5)
    assert "invalid" in answers[3].error.lower()


class Context:
    """What TorchServe tells a handler."""

    def __init__(self, folder: Path) -> None:
        self.system_properties, self.status = {"model_dir": str(folder)}, dict[int, int]()

    def set_response_status(self, code: int, idx: int) -> None:
        self.status[idx] = code


def unpacked(export: Artifact, folder: Path) -> dict[str, Any]:
    with zipfile.ZipFile(export.path / "model.mar") as archive:
        archive.extractall(folder)
    manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())["model"]
    file, _, name = manifest["handler"].partition(":")
    assert (folder / manifest["serializedFile"]).is_file() and manifest["modelName"] == "model"
    space: dict[str, Any] = {"__name__": "handler"}
    exec(compile((folder / file).read_text(), file, "exec"), space)
    assert "dlopt" not in re.findall(r"^(?:from|import) (\w+)", (folder / file).read_text(), re.MULTILINE)
    return space | {"handle": space[name]}


def test_the_handler_of_torchserve_takes_raw_rows(tmp_path: Path) -> None:
    from dlopt.api.predict import Model

    export, weights, data = exported(tmp_path, TABLE, Mlp(hidden=(8,)), TorchServe())
    space, context = unpacked(export, tmp_path / "mar"), Context(tmp_path / "mar")
    handle = space["handle"]
    assert handle(None, context) is None
    expected = Model(once(EXPORT, Onnx(), tmp_path, weights, data).read(Onnx.file), TABLE).outputs(ROWS)
    body = json.dumps({"instances": ROWS}).encode()
    answers = handle([{"body": bytearray(body)}, {"data": ROWS[1]}, {"body": b"[1]"}, {"body": b"{"}, {"body": [{"a": 1}]}], context)
    found = answers[0]["predictions"]
    np.testing.assert_allclose([list(row["probabilities"].values()) for row in found], expected, atol=1e-6)
    assert [row["label"] for row in found] == [["no", "yes"][place] for place in expected.argmax(axis=1)]
    (alone,) = answers[1]["predictions"]
    assert alone["label"] == found[1]["label"] and alone["probabilities"] == pytest.approx(found[1]["probabilities"], abs=1e-6)
    assert context.status == {2: 400, 3: 400, 4: 400}
    assert answers[2]["error"].startswith("send {") and "has no column 'b'" in answers[4]["error"]


def test_an_archive_of_the_same_model_has_the_same_bytes_and_numbers_come_plain(tmp_path: Path) -> None:
    one, _, _ = exported(tmp_path / "one", Signature(inputs=(NUMBERS,), target=NUMBER), Mlp(hidden=(8,)), TorchServe())
    two, _, _ = exported(tmp_path / "two", Signature(inputs=(NUMBERS,), target=NUMBER), Mlp(hidden=(8,)), TorchServe())
    names = zipfile.ZipFile(one.path / "model.mar").namelist()
    for name in set(names) - {"model.torchscript.pt"}:
        assert zipfile.ZipFile(one.path / "model.mar").read(name) == zipfile.ZipFile(two.path / "model.mar").read(name)
    space, context = unpacked(one, tmp_path / "mar"), Context(tmp_path / "mar")
    (answer,) = space["handle"]([{"body": [{"a": 1, "b": 2, "c": 3}]}], context)
    assert isinstance(answer["predictions"][0], float)


@pytest.mark.slow
@pytest.mark.parametrize("part", [Triton(), Triton(backend="python"), TorchServe()], ids=lambda part: f"{part.kind} {part.name}")
def test_every_kind_of_input_goes_through_a_servers_format(tmp_path: Path, part: Any) -> None:
    export, *_ = exported(tmp_path, Signature(inputs=EVERYTHING, target=PAIR), Mlp(hidden=(8,)), part)
    assert export.info["largest_difference"] <= 1e-5


def test_openvino_says_what_torch_says_of_codes(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    export, *_ = exported(tmp_path, TABLE, Mlp(hidden=(8,)), OpenVino())
    assert export.info["largest_difference"] <= 1e-5
    assert {"model.xml", "model.bin"} <= set(export.manifest.files)


def test_bytes_become_float_at_once_for_tensorrt(tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, IMAGES)
    weights = sets.trained(tmp_path, data, Mlp(hidden=(8,)))
    plain = once(EXPORT, Onnx(), tmp_path, weights, data).read(Onnx.file)
    model = onnx.load_from_string(as_float(plain))
    onnx.checker.check_model(model)
    first = model.graph.node[0]
    assert first.op_type == "Cast" and first.input[0] == model.graph.input[0].name
    assert [node for node in model.graph.node if first.input[0] in node.input] == [first]
    rows = inputs_of(IMAGES, 5)
    outputs = [onnxruntime.InferenceSession(one).run(None, rows)[0] for one in (plain, model.SerializeToString())]
    np.testing.assert_array_equal(*outputs)


def test_an_engine_is_built_without_a_gpu_and_said_not_to_have_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    export, *_ = exported(tmp_path, IMAGES, Mlp(hidden=(8,)), TensorRt())
    assert export.info["not_run"] and export.manifest.files["model.engine"].size > 1000


@pytest.mark.parametrize(("part", "extra"), [(OpenVino(), "openvino"), (TensorRt(), "tensorrt")], ids=["openvino", "tensorrt"])
def test_a_missing_package_of_a_platform_is_named_with_its_extra(part: Any, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, part.package, None)
    with pytest.raises(DloptError, match=rf"^export: {part.kind}: needs the package {part.package}: pip install 'dlopt\[{extra}\]'$"):
        part.check()
