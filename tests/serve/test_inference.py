"""The Open Inference Protocol v2 as its clients speak it, without Ray: the ASGI app is called directly."""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest
from PIL import Image

from dlopt.part import Feature, Signature
from tests.serve.test_protocols import KEY, application, ask, error_of, model_of
from tests.served import FLIGHTS, IMAGE, NUMBERS, PHOTOS, SAID, make_export, messages

INFER = "/v2/models/m/infer"
HEADER = "Inference-Header-Content-Length"
TENSOR = {"name": "image", "shape": [1, 28, 28], "datatype": "UINT8", "parameters": {"binary_data_size": 784}}
"""A tensor that comes in binary."""
IMAGES = np.random.default_rng(8).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def expected(home: Path, signature: Signature, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """What onnxruntime itself says."""
    (outputs,) = onnxruntime.InferenceSession(make_export(home, signature).path / "model.onnx").run(None, tensors)
    return np.asarray(outputs)


def given(name: str, values: Any, kind: str, shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "shape": shape or list(np.shape(values)), "datatype": kind, "data": values}


def outputs_of(reply: httpx.Response) -> dict[str, dict[str, Any]]:
    assert reply.status_code == 200, reply.text
    return {one["name"]: one for one in reply.json()["outputs"]}


def binary(head: dict[str, Any], *tensors: bytes) -> tuple[bytes, dict[str, str]]:
    """A body of JSON and tensors after it, and its header."""
    text = json.dumps(head).encode()
    return text + b"".join(tensors), {HEADER: str(len(text)), "content-type": "application/octet-stream"}


def read_binary(reply: httpx.Response) -> dict[str, np.ndarray]:
    """Outputs of a reply in binary."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/octet-stream"
    at = int(reply.headers[HEADER])
    found = {}
    for one in json.loads(reply.content[:at])["outputs"]:
        size = one["parameters"]["binary_data_size"]
        kind = {"FP32": "<f4", "INT64": "<i8", "BOOL": "?"}[one["datatype"]]
        found[one["name"]] = np.frombuffer(reply.content[at : at + size], kind).reshape(one["shape"])
        at += size
    assert at == len(reply.content)
    return found


def test_json_flat_or_nested_says_what_onnxruntime_says(home: Path) -> None:
    app = application(home)
    wanted = expected(home, IMAGE, {"image": IMAGES})
    for data in (IMAGES.tolist(), IMAGES.reshape(-1).tolist()):
        reply = ask(app, "POST", INFER, json={"id": "7", "inputs": [given("image", data, "UINT8", [3, 28, 28, 1])]})
        assert (reply.json()["model_name"], reply.json()["model_version"], reply.json()["id"]) == ("m", "1", "7")
        found = outputs_of(reply)
        assert (found["probabilities"]["shape"], found["probabilities"]["datatype"]) == ([3, 10], "FP32")
        np.testing.assert_allclose(np.reshape(found["probabilities"]["data"], (3, 10)), wanted, atol=1e-6)
        assert (found["label"]["datatype"], found["label"]["data"]) == ("INT64", wanted.argmax(axis=1).tolist())
        assert reply.headers["content-type"] == "application/json" and HEADER not in reply.headers
    only = ask(app, "POST", INFER, json={"inputs": [given("image", IMAGES[..., 0].tolist(), "INT64")], "outputs": [{"name": "label"}]})
    assert list(outputs_of(only)) == ["label"] and "id" not in only.json()


def test_tensors_in_binary_go_in_and_out(home: Path) -> None:
    app = application(home)
    wanted = expected(home, IMAGE, {"image": IMAGES})
    for kind, dtype in (("UINT8", "u1"), ("FP32", "<f4"), ("INT16", "<i2"), ("FP16", "<f2")):
        content = IMAGES.astype(dtype).tobytes()
        tensor = {"name": "image", "shape": [3, 28, 28, 1], "datatype": kind, "parameters": {"binary_data_size": len(content)}}
        body, headers = binary({"inputs": [tensor], "parameters": {"binary_data_output": True}}, content)
        found = read_binary(ask(app, "POST", INFER, content=body, headers=headers))
        np.testing.assert_allclose(found["probabilities"], wanted, atol=1e-6)
        assert found["label"].tolist() == wanted.argmax(axis=1).tolist()
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}, {"name": "label", "parameters": {"binary_data": False}}]
    body, headers = binary({"inputs": [tensor], "outputs": outputs}, content)
    mixed = ask(app, "POST", INFER, content=body, headers=headers)
    head = json.loads(mixed.content[: int(mixed.headers[HEADER])])
    assert [("data" in one, one.get("parameters")) for one in head["outputs"]] == [(False, {"binary_data_size": 120}), (True, None)]


def test_a_raw_body_is_one_row(home: Path) -> None:
    app = application(home)
    reply = ask(app, "POST", INFER, content=IMAGES[0].tobytes(), headers={HEADER: "0"})
    np.testing.assert_allclose(read_binary(reply)["probabilities"], expected(home, IMAGE, {"image": IMAGES[:1]}), atol=1e-6)
    assert "expecting 784 bytes" in error_of(ask(app, "POST", INFER, content=b"x", headers={HEADER: "0"}))


def test_image_files_travel_as_bytes(home: Path) -> None:
    app = application(home)
    files = []
    for pixels in IMAGES:
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0]).save(file, "PNG")
        files.append(file.getvalue())
    wanted = expected(home, IMAGE, {"image": IMAGES})
    content = b"".join(struct.pack("<I", len(file)) + file for file in files)
    tensor = {"name": "image", "shape": [3, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(content)}}
    body, headers = binary({"inputs": [tensor]}, content)
    replies = [ask(app, "POST", INFER, content=body, headers=headers)]
    replies.append(ask(app, "POST", INFER, json={"inputs": [given("image", [base64.b64encode(file).decode() for file in files], "BYTES")]}))
    for reply in replies:
        np.testing.assert_allclose(np.reshape(outputs_of(reply)["probabilities"]["data"], (3, 10)), wanted, atol=1e-6)


def test_a_table_goes_by_column_and_numbers_side_by_side(home: Path) -> None:
    app = application(home, FLIGHTS)
    rows = [
        {"delay": 2.5, "distance": 100, "carrier": "UA", "airport": "A007", "day": "2013-05-31"},
        {"delay": None, "distance": 1, "carrier": "", "airport": "unheard of", "day": ""},
    ]
    wanted = ask(app, "POST", "/v1/models/m:predict", json={"instances": rows}).json()["predictions"]
    texts = [given(name, [row[name] for row in rows], "BYTES") for name in ("carrier", "airport", "day")]
    numbers = [given("delay", [[2.5], [None]], "FP32"), given("distance", [100, 1], "INT64")]
    found = outputs_of(ask(app, "POST", INFER, json={"inputs": [*numbers, *texts]}))
    assert np.float32(found["minutes"]["data"]).tolist() == np.float32(wanted).tolist()
    side_by_side = [given("numbers", [[2.5, 100], [None, 1]], "FP64"), *texts]
    assert outputs_of(ask(app, "POST", INFER, json={"inputs": side_by_side})) == found


def test_labels_are_true_or_false_each(home: Path) -> None:
    app = application(home, messages())
    wanted = ask(app, "POST", "/v1/models/m:predict", json={"instances": list(SAID)}).json()["predictions"]
    found = outputs_of(ask(app, "POST", INFER, json={"inputs": [given("message", list(SAID), "BYTES")]}))
    labels = messages().target.labels
    assert (found["labels"]["datatype"], found["labels"]["shape"]) == ("BOOL", [3, 3])
    assert [[label in row["labels"] for label in labels] for row in wanted] == np.reshape(found["labels"]["data"], (3, 3)).tolist()


def test_what_clients_ask_before_they_infer(home: Path) -> None:
    app = application(home, PHOTOS)
    server = ask(app, "GET", "/v2").json()
    assert server["name"] == "dlopt" and "binary_tensor_data" in server["extensions"]
    assert ask(app, "GET", "/v2/health/live").json() == {"live": True}
    assert ask(app, "GET", "/v2/health/ready").json() == {"live": True, "ready": True}
    assert ask(app, "GET", "/v2/models/m/versions/1/ready").json() == {"name": "m", "ready": True}
    assert ask(app, "GET", "/v2/models").json() == {"models": ["m"]}
    found = ask(app, "GET", "/v2/models/m").json()
    assert (found["name"], found["versions"], found["platform"]) == ("m", ["1"], "onnx_onnxv1")
    assert found["inputs"] == [
        {"name": "photo", "datatype": "UINT8", "shape": [-1, 4, 6, 3]},
        {"name": "camera", "datatype": "BYTES", "shape": [-1]},
        {"name": "taken", "datatype": "BYTES", "shape": [-1]},
        {"name": "printed", "datatype": "BYTES", "shape": [-1]},
    ]
    assert found["outputs"] == [{"name": name, "datatype": "FP32", "shape": [-1]} for name in ("height", "width")]
    config = ask(app, "GET", "/v2/models/m/config").json()
    assert config["input"][0] == {"name": "photo", "data_type": "TYPE_UINT8", "dims": [4, 6, 3]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inputs": []}, "at least one tensor"),
        ({"inputs": [given("picture", [1], "UINT8")]}, "unexpected inference input 'picture'"),
        ({"inputs": [given("image", [[1, 2], [3]], "UINT8", [2, 2])]}, "must have 4 elements"),
        ({"inputs": [given("image", [0] * 784, "UINT8", [1, 28, 28])] * 2}, "given twice"),
        ({"inputs": [given("image", [0] * 784, "UINT8", [1, -28, 28])]}, "shape must be a list"),
        ({"inputs": [given("image", [0] * 784, "UINT8", [1, 2**31, 2**31])]}, "more than 2,147,483,648 elements"),
        ({"inputs": [given("image", [0] * 784, "UINT8", [10**9, 784])]}, "a shape of more than"),
        ({"inputs": [given("image", [], "UINT8", [0, 28, 28])]}, "at least one row"),
        ({"inputs": [given("image", [0] * 784, "UINT4", [1, 28, 28])]}, "datatype 'UINT4' is none of"),
        ({"inputs": [given("image", [0] * 784, "FP16", [1, 28, 28])]}, "FP16 does not travel as JSON"),
        ({"inputs": [given("image", [256] * 784, "UINT8", [1, 28, 28])]}, "does not fit UINT8"),
        ({"inputs": [given("image", [256] * 784, "INT32", [1, 28, 28])]}, "whole numbers from 0 to 255"),
        ({"inputs": [given("image", [0.5] * 784, "FP32", [1, 28, 28])]}, "whole numbers from 0 to 255"),
        ({"inputs": [given("image", [True] * 784, "UINT8", [1, 28, 28])]}, "must all be of type UINT8"),
        ({"inputs": [given("image", ["x"] * 784, "UINT8", [1, 28, 28])]}, "must all be of type UINT8"),
        ({"inputs": [given("image", [0] * 784, "UINT8", [1, 784])]}, "shape [1, 784] where [1, 28, 28, 1] is needed"),
        ({"inputs": [given("image", [0] * 784, "UINT8", [1, 28, 28]) | {"parameters": {"binary_data_size": 784}}]}, "give one"),
        (
            {"inputs": [{"name": "image", "shape": [1, 28, 28], "datatype": "UINT8", "parameters": {"binary_data_size": 784}}]},
            "unexpected size",
        ),
        ({"outputs": [{"name": "x"}]}, "unexpected inference output 'x'"),
        ({"outputs": [{"name": "label", "parameters": {"classification": 3}}]}, "classification is not offered"),
        ({"id": 7}, "id: must be a string"),
        ([], "must be a JSON object"),
    ],
)
def test_a_bad_request_gets_a_400_that_says_why(home: Path, change: Any, says: str) -> None:
    good = {"inputs": [given("image", [0] * 784, "UINT8", [1, 28, 28])]}
    reply = ask(application(home), "POST", INFER, json=good | change if isinstance(change, dict) else change)
    assert reply.status_code == 400, reply.text
    assert says in error_of(reply)


def test_binary_that_does_not_fit_its_json_is_refused(home: Path) -> None:
    app = application(home)
    tensor = TENSOR
    for content, says in ((b"x" * 783, "unexpected size"), (b"x" * 785, "unexpected additional input data: 1 bytes")):
        body, headers = binary({"inputs": [tensor]}, content)
        assert says in error_of(ask(app, "POST", INFER, content=body, headers=headers))
    body, headers = binary({"inputs": [tensor]}, b"x" * 784)
    for length in ("9999", "-1", "1e3"):
        assert "unexpected size for request JSON" in error_of(ask(app, "POST", INFER, content=body, headers=headers | {HEADER: length}))
    for size in (-1, 2**70, "784", True, 1.5):
        body, headers = binary({"inputs": [tensor | {"parameters": {"binary_data_size": size}}]}, b"x" * 784)
        assert "unexpected size for input 'image'" in error_of(ask(app, "POST", INFER, content=body, headers=headers))
    packed = struct.pack("<I", 2**32 - 1) + b"x"
    words = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(packed)}}
    body, headers = binary({"inputs": [words]}, packed)
    assert "expecting 1 elements" in error_of(ask(app, "POST", INFER, content=body, headers=headers))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", INFER, 405),
        ("POST", "/v2/models/m", 405),
        ("GET", "/v2/models/other", 404),
        ("POST", "/v2/models/m/versions/2/infer", 404),
        ("GET", "/v2/nowhere", 404),
        ("GET", "/v2x", 404),
    ],
)
def test_a_wrong_verb_or_path(home: Path, method: str, path: str, status: int) -> None:
    reply = ask(application(home), method, path)
    assert reply.status_code == status
    assert error_of(reply)


def test_a_compressed_request_and_reply(home: Path) -> None:
    """As tritonclient sends it: the length of the JSON is that before compression."""
    app = application(home)
    many = np.repeat(IMAGES, 100, axis=0)
    tensor = {"name": "image", "shape": list(many.shape), "datatype": "UINT8", "parameters": {"binary_data_size": many.size}}
    body, headers = binary({"inputs": [tensor]}, many.tobytes())
    plain = ask(app, "POST", INFER, content=body, headers=headers | {"accept-encoding": "identity"})
    packed = ask(app, "POST", INFER, content=gzip.compress(body), headers=headers | {"content-encoding": "gzip", "accept-encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip" and "content-encoding" not in plain.headers
    assert packed.json() == plain.json()


def test_a_model_is_unloaded_and_loaded_again(home: Path) -> None:
    app = application(home)
    assert ask(app, "POST", "/v2/repository/index", json={}).json() == [{"name": "m", "version": "1", "state": "READY", "reason": ""}]
    assert ask(app, "POST", "/v2/repository/models/m/unload").status_code == 200
    assert ask(app, "POST", INFER, json={}).status_code == 404
    assert ask(app, "POST", "/v2/repository/index").json() == [{"name": "m", "state": "UNAVAILABLE", "reason": "unloaded"}]
    assert (
        'dlopt_model_info{digest="' + make_export(home).manifest.digest + '",model="m",version="1"} 0.0' in ask(app, "GET", "/metrics").text
    )
    assert ask(app, "POST", "/v2/repository/models/m/load").status_code == 200
    before = model_of(app)
    assert ask(app, "POST", "/v2/repository/models/m/load").status_code == 200
    assert model_of(app) is not before  # loaded anew, and switched to
    image = {"inputs": [given("image", [0] * 784, "UINT8", [1, 28, 28])]}
    assert ask(app, "POST", INFER, json=image).status_code == 200
    assert ask(app, "POST", "/v2/repository/models/x/load").status_code == 404


def test_health_is_open_and_the_rest_wants_a_key(home: Path) -> None:
    app = application(home, keys=(KEY,))
    for path in ("/v2", "/v2/models/m", "/v2/models/m/ready", "/openapi.json", "/docs"):
        assert ask(app, "GET", path).status_code == 401
        assert ask(app, "GET", path, headers={"x-api-key": KEY}).status_code == 200
    assert ask(app, "GET", "/v2/health/ready").status_code == 200


def test_one_input_of_two_kinds_of_use_is_one_column(home: Path) -> None:
    """A column that two inputs are made of is asked for once."""
    twice = Signature(
        inputs=(
            *NUMBERS.inputs,
            Feature(name="months", kind="category", dtype="int32", shape=(1,), columns=("month",), buckets=5),
        ),
        target=NUMBERS.target,
    )
    app = application(home, twice)
    assert [one["name"] for one in ask(app, "GET", "/v2/models/m").json()["inputs"]] == ["month", "day", "distance"]
    inputs = [given(name, [1.0, 2.0], "FP32") for name in ("month", "day", "distance")]
    assert len(outputs_of(ask(app, "POST", INFER, json={"inputs": inputs}))["label"]["data"]) == 2
