"""What a client of the server hears, without Ray: the ASGI app is called directly."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from dlopt.artifact import Artifact, once
from dlopt.data.counter import string_words
from dlopt.export import Onnx
from dlopt.export.stage import EXPORT
from dlopt.models import Mlp
from dlopt.part import DloptError, Feature, Signature, Target
from dlopt.serve import Replicas, Serve
from dlopt.serve.exchange import THRESHOLD, Answer, Refusal, decisions
from dlopt.serve.front.application import Application, application_of
from dlopt.serve.front.auth import Guard, Key, digest, make_key, read_keys
from dlopt.serve.models import model as serving
from dlopt.serve.models.batcher import Batcher
from dlopt.serve.models.model import FLUSH_SECONDS, FRESH_SECONDS, Model, Predictor
from dlopt.serve.protocols.tensorflow import parse, predictions
from dlopt.serve.watch.metrics import DIRECTORY
from dlopt.train.start import trained_network
from tests import sets
from tests.served import FLIGHTS, IMAGE, NUMBERS, PHOTOS, SAID, make_export, messages

KEY = "a-key-of-the-tests"
PREDICT = "/v1/models/m:predict"
BLACK = [[0] * 28] * 28


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def application(home: Path, signature: Signature = IMAGE, keys: tuple[str, ...] = (), **section: Any) -> Application:
    return application_of(make_export(home, signature), "m", Serve(**section), Guard(tuple(Key.of(key) for key in keys)))


def ask(app: Application, method: str, path: str, **options: Any) -> httpx.Response:
    async def one() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(one())


def model_of(app: Application) -> Model:
    assert app.models.only
    return app.models.only


def error_of(reply: httpx.Response) -> str:
    assert reply.headers["content-type"] == "application/json"
    assert set(reply.json()) == {"error"}
    return str(reply.json()["error"])


# Predictions


def test_instances_answer_in_the_order_of_rows_as_onnxruntime_does(home: Path) -> None:
    app = application(home)
    images = np.random.default_rng(1).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    session = onnxruntime.InferenceSession(make_export(home).path / "model.onnx")
    (expected,) = session.run(None, {"image": images[..., None]})
    reply = ask(app, "POST", PREDICT, json={"signature_name": "serving_default", "instances": images.tolist()})
    assert reply.status_code == 200
    assert set(reply.json()) == {"predictions"}
    found = reply.json()["predictions"]
    assert [row["label"] for row in found] == expected.argmax(axis=1).tolist()
    np.testing.assert_allclose([row["probabilities"] for row in found], expected, atol=1e-6)
    assert reply.headers["x-model-digest"] == make_export(home).manifest.digest


def test_every_way_to_write_an_image_says_the_same(home: Path) -> None:
    app = application(home)
    image = np.random.default_rng(2).integers(0, 256, (28, 28), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    b64 = {"b64": base64.b64encode(file.getvalue()).decode()}
    plain, floats, deep = image.tolist(), image.astype(float).tolist(), image[..., None].tolist()
    rows = [plain, floats, deep, b64, {"image": plain}, {"image": b64}]
    replies = [ask(app, "POST", PREDICT, json={"instances": [row]}).json() for row in rows]
    replies.append(ask(app, "POST", PREDICT, json={"instances": rows}).json())
    assert all(reply["predictions"][0] == replies[0]["predictions"][0] for reply in replies)
    np.testing.assert_allclose(
        [row["probabilities"] for row in replies[-1]["predictions"]], [replies[0]["predictions"][0]["probabilities"]] * len(rows), atol=1e-6
    )


def test_inputs_answer_by_column(home: Path) -> None:
    app = application(home, NUMBERS)
    rows = [{"month": 1, "day": 2.5, "distance": None}, {"month": 3, "day": 4, "distance": 5, "unused": "x"}]
    by_row = ask(app, "POST", PREDICT, json={"instances": rows}).json()["predictions"]
    columns = {"month": [1, 3], "day": [2.5, 4], "distance": [None, 5]}
    for inputs in (columns, [[1, 2.5, None], [3, 4, 5]], {"numbers": [[1, 2.5, None], [3, 4, 5]]}):
        reply = ask(app, "POST", PREDICT, json={"inputs": inputs}).json()
        assert reply == {"outputs": {key: [row[key] for row in by_row] for key in ("label", "probabilities")}}
    assert {row["label"] for row in by_row} <= {"no", "yes"}


def test_nan_is_a_missing_number(home: Path) -> None:
    app = application(home, NUMBERS)
    null = ask(app, "POST", PREDICT, content='{"instances": [[1, 2, null]]}')
    assert null.status_code == 200
    assert ask(app, "POST", PREDICT, content='{"instances": [[1, 2, NaN]]}').json() == null.json()


ONE = Target(name="price", kind="number", columns=("price",))
TWO = Target(name="size", kind="number", columns=("height", "width"))
LABELS = Target(name="tags", kind="multi_label", labels=("a", "b", "c"))


def reply_of(target: Target, outputs: np.ndarray, by_column: bool = False) -> Any:
    body = predictions(Answer(target, outputs, decisions(target, outputs)), by_column)
    return json.loads(body)["outputs" if by_column else "predictions"]


def test_a_single_number_is_predicted_bare_as_tensorflow_serving_does() -> None:
    outputs = np.float32([[3.2], [-1e-9], [16777216]])
    assert reply_of(ONE, outputs) == reply_of(ONE, outputs, by_column=True) == [3.2, -1e-9, 16777216.0]


def test_several_numbers_are_an_object_of_the_target_columns() -> None:
    outputs = np.float32([[1.5, 2], [0.1, -4]])
    assert reply_of(TWO, outputs) == [{"height": 1.5, "width": 2}, {"height": 0.1, "width": -4}]
    assert reply_of(TWO, outputs, by_column=True) == {"height": [1.5, 0.1], "width": [2, -4]}


def test_a_row_gets_every_label_above_the_threshold() -> None:
    outputs = np.float32([[np.nextafter(np.float32(THRESHOLD), np.float32(1)), 0.75, 0.25], [0.125, 0.25, THRESHOLD]])
    rows = reply_of(LABELS, outputs)
    assert [row["labels"] for row in rows] == [["a", "b"], []]
    assert [row["probabilities"] for row in rows] == outputs.tolist()
    assert reply_of(LABELS, outputs, by_column=True) == {"labels": [["a", "b"], []], "probabilities": outputs.tolist()}


def test_with_thresholds_a_row_gets_what_reaches_them() -> None:
    least = np.float32(0.7)
    below = np.nextafter(least, np.float32(0))
    labels = LABELS.model_copy(update={"thresholds": (0.7, 0.1, 0.9)})
    assert [row["labels"] for row in reply_of(labels, np.float32([[least, 0.1, 0.8], [below, 0.05, 0.95]]))] == [["a", "b"], ["c"]]
    for positive, name in ((None, "yes"), ("yes", "yes"), ("no", "no")):
        target = Target(name="late", labels=("no", "yes"), positive=positive, thresholds=(0.7,))
        outputs = np.float32([[1 - least, least], [1 - below, below], [0.1, 0.9]])
        rows = reply_of(target, outputs if name == "yes" else outputs[:, ::-1])
        other = "no" if name == "yes" else "yes"
        assert [row["label"] for row in rows] == [name, other, name]


@pytest.mark.parametrize("target", [ONE, LABELS, Target(name="t", labels=(0, 1, 2))])
@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_what_is_not_finite_is_no_answer(target: Target, lost: float) -> None:
    outputs = np.full((2, target.size), 0.25, np.float32)
    assert len(reply_of(target, outputs)) == 2
    outputs[1, -1] = lost
    with pytest.raises(Refusal, match="not finite"):
        reply_of(target, outputs)


def test_a_table_of_every_kind_of_column_is_predicted_as_onnxruntime_does(home: Path) -> None:
    app = application(home, FLIGHTS)
    rows = [
        {"delay": 2.5, "distance": 100, "carrier": "UA", "airport": "A007", "day": "2013-05-31"},
        {"delay": None, "distance": 1, "carrier": None, "airport": "unheard of", "day": None},
    ]
    tensors = model_of(app)._decode(json.dumps({"instances": rows}).encode(), parse)[0]
    assert tensors["categories"].tolist() == [["UA", "A007"], ["", "unheard of"]]
    session = onnxruntime.InferenceSession(make_export(home, FLIGHTS).path / "model.onnx")
    (expected,) = session.run(["values"], tensors)
    found = ask(app, "POST", PREDICT, json={"instances": rows}).json()["predictions"]
    np.testing.assert_allclose(found, expected[:, 0], rtol=1e-6)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert ask(app, "POST", PREDICT, json={"inputs": columns}).json() == {"outputs": found}
    assert found[0] != ask(app, "POST", PREDICT, json={"instances": [rows[0] | {"carrier": "AA"}]}).json()["predictions"][0]


def test_a_text_may_be_a_bare_string_a_row_or_a_column(home: Path) -> None:
    app = application(home, messages())
    found = [ask(app, "POST", PREDICT, json={"instances": [text]}).json()["predictions"][0] for text in SAID]
    assert len({str(row["probabilities"]) for row in found}) == len(SAID)
    rows = ask(app, "POST", PREDICT, json={"instances": [{"message": text} for text in SAID]}).json()["predictions"]
    columns = ask(app, "POST", PREDICT, json={"inputs": {"message": SAID}}).json()["outputs"]
    for name in ("labels", "probabilities"):
        assert [row[name] for row in rows] == [row[name] for row in found] == columns[name]


def test_the_server_says_of_raw_rows_what_torch_says_of_prepared_ones(tmp_path: Path) -> None:
    """A real export: strings that are known, unknown and missing, a hashed value, a date, and numbers of which one is missing."""
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS, sets.CATEGORIES, sets.HASHED, sets.DATES, target=sets.LABELS))
    model = sets.trained(tmp_path, data, Mlp(hidden=(16,)))
    raw = [
        {"a": 1.5, "b": None, "c": -3, "carrier": "Ü", "origin": "LGA", "flight": 12, "day": "2013-05-31"},
        {"a": 1.5, "b": 2, "c": 1e6, "carrier": None, "origin": None, "flight": None, "day": None},
        {"a": 0, "b": 0, "c": 0, "carrier": "ZZ", "origin": "?", "flight": "x", "day": "1999-01-04T23:59:59Z"},
    ]
    codes = [int(string_words([text])[0] % np.uint64(7)) for text in ("12", "", "x")]
    tensors = {
        "numbers": [[1.5, math.nan, -3], [1.5, 2, 1e6], [0, 0, 0]],
        "carrier, origin": np.int32([[3, 4], [2, 1], [0, 5]]),
        "flight": np.int32(codes)[:, None],
        "day": [[5, 4], [math.nan, math.nan], [1, 0]],
    }
    network = trained_network(model, data)
    with torch.no_grad():
        expected = network({name: torch.tensor(values) for name, values in tensors.items()}).sigmoid().numpy()
    app = application_of(once(EXPORT, Onnx(), tmp_path, model, data), "m", Serve())
    reply = ask(app, "POST", PREDICT, json={"instances": raw})
    assert reply.status_code == 200, reply.text
    np.testing.assert_allclose([row["probabilities"] for row in reply.json()["predictions"]], expected, atol=1e-6)


def test_an_image_beside_other_columns(home: Path) -> None:
    photo = np.random.default_rng(5).integers(0, 256, (4, 6, 3)).tolist()
    row = {"photo": photo, "camera": "X100", "taken": "2013-05-31T10:30:00Z", "printed": "31.12.2013"}
    reply = ask(application(home, PHOTOS), "POST", PREDICT, json={"instances": [row]})
    assert [set(row) for row in reply.json()["predictions"]] == [{"height", "width"}]
    wrong = ask(application(home, PHOTOS), "POST", PREDICT, json={"instances": [row, row | {"printed": "2013-12-31"}]})
    assert (wrong.status_code, error_of(wrong)) == (400, "row 1: printed: '2013-12-31' is not a date such as %d.%m.%Y")


# Bad requests


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("", "JSON Parse error"),
        ("{", "JSON Parse error"),
        ("\udcff", "JSON Parse error"),
        ('{"instances": ' + "[" * 100_000, "JSON Parse error"),
        ('{"instances": ' + "9" * 10_000 + "}", "JSON Parse error"),
        ("[]", "must be an object"),
        ("null", "must be an object"),
        ("{}", "exactly one"),
        ('{"instances": [], "inputs": []}', "exactly one"),
        ('{"instances": []}', "at least one row"),
        ('{"instances": {}}', "must be a list"),
        ('{"instances": 3}', "must be a list"),
        ('{"instances": [3]}', "row 0: image"),
        ('{"instances": ["x"]}', "row 0: image"),
        ('{"instances": [null]}', "row 0: image"),
        ('{"instances": [[[1, 2], [3, 4]]]}', "shape [28, 28, 1]"),
        ('{"instances": [[[1, 2], [3]]]}', "shape [28, 28, 1]"),
        ('{"instances": [{"picture": 1}]}', "no column 'image'"),
        ('{"instances": [{"b64": "!"}]}', "not base64"),
        ('{"instances": [{"b64": "é"}]}', "not base64"),
        ('{"instances": [{"b64": "aGFsbG8="}]}', "not an image"),
        ('{"instances": [{"b64": 5}]}', "b64"),
        ('{"signature_name": "other", "instances": [1]}', "signature name"),
        ('{"signature_name": 1, "instances": [1]}', "'signature_name' key must be a string value."),
        ('{"inputs": {"image": 5}}', "must be a list"),
        ('{"inputs": {"a": [1], "b": [1, 2]}}', "same length"),
        ('{"inputs": {}}', "same length"),
    ],
)
def test_a_bad_body_gets_a_400_that_says_why(home: Path, body: str, says: str) -> None:
    app = application(home)
    reply = ask(app, "POST", PREDICT, content=body.encode("utf-8", "surrogateescape"))
    assert reply.status_code == 400
    assert says in error_of(reply)
    assert ask(app, "POST", PREDICT, json={"instances": [BLACK]}).status_code == 200


@pytest.mark.parametrize("pixel", ["-1", "256", "0.5", "NaN", "Infinity", "1e999", "true", "null", '"7"', "99999999999999999999", "[1]"])
def test_a_pixel_is_a_whole_number_from_0_to_255(home: Path, pixel: str) -> None:
    body = json.dumps({"instances": [BLACK, BLACK]})[:-6] + pixel + "]]]}"
    assert json.loads(body)["instances"][1][27][:27] == [0] * 27
    reply = ask(application(home), "POST", PREDICT, content=body)
    assert reply.status_code == 400, reply.text
    assert "row 1: image" in error_of(reply)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        *((value, "a number is too large") for value in ("1e39", "1e999", "-Infinity", "9" * 400)),
        *((value, f"{said} is not a number") for value, said in (('"1_0"', "'1_0'"), ('"one"', "'one'"), ("[1, 2]", "[1, 2]"))),
    ],
)
def test_a_number_is_a_finite_number_or_missing(home: Path, value: str, says: str) -> None:
    good = '{"month": 1, "day": null, "distance": 3e38}'
    body = f'{{"instances": [{good}, {{"month": 1, "day": 2, "distance": {value}}}]}}'
    reply = ask(application(home, NUMBERS), "POST", PREDICT, content=body)
    assert reply.status_code == 400, reply.text
    assert error_of(reply) == f"row 1: distance: {says}"


def test_numbers_are_read_as_training_reads_them_from_a_file(home: Path) -> None:
    app = application(home, NUMBERS)
    plain = ask(app, "POST", PREDICT, json={"instances": [[1, 2.5, None], [1, 0, 1e3]]}).json()
    other = [{"month": "1", "day": " 2.5", "distance": ""}, {"month": True, "day": "False", "distance": "1E3"}]
    assert ask(app, "POST", PREDICT, json={"instances": other}).json() == plain


def test_a_long_string_among_pixels_does_not_fill_the_memory(home: Path) -> None:
    body = json.dumps({"instances": [[["x" * 2_000_000, *([0] * 27)], *BLACK[1:]]]})
    start = time.monotonic()
    assert ask(application(home), "POST", PREDICT, content=body).status_code == 400
    assert time.monotonic() - start < 2


def test_a_large_image_is_refused_before_it_is_decoded(home: Path) -> None:
    file = io.BytesIO()
    Image.new("L", (7000, 7000)).save(file, "PNG")
    body = {"instances": [{"b64": base64.b64encode(file.getvalue()).decode()}]}
    assert "height 7000" in error_of(ask(application(home), "POST", PREDICT, json=body))


def test_too_many_rows_are_refused(home: Path) -> None:
    reply = ask(application(home, max_rows=2), "POST", PREDICT, json={"instances": [BLACK] * 3})
    assert (reply.status_code, error_of(reply)) == (400, "3 rows in one request, at most 2 are taken (serve.max_rows)")


def test_a_large_body_is_refused_whether_or_not_it_says_its_length(home: Path) -> None:
    app = application(home, max_bytes=2000)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b" " * 1000

    for content in (b" " * 2001, chunks()):
        reply = ask(app, "POST", PREDICT, content=content)
        assert (reply.status_code, error_of(reply)) == (413, "the body has more than 2,000 bytes (serve.max_bytes)")


def test_a_body_that_does_not_come_gets_a_408(home: Path) -> None:
    app = application(home, body_seconds=0.1)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app({"type": "http", "method": "POST", "path": PREDICT, "headers": [], "query_string": b""}, receive, send))
    assert sent[0]["status"] == 408
    assert model_of(app).in_flight == 0


def test_a_failure_of_the_system_is_json_as_well(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = application(home)
    monkeypatch.setattr(model_of(app), "_decode", lambda body, parse: 1 / 0)
    reply = ask(app, "POST", PREDICT, json={"instances": [BLACK]})
    assert (reply.status_code, error_of(reply)) == (500, "internal error; the server's log has the cause")


def test_more_requests_than_may_wait_get_a_429(home: Path) -> None:
    app = application(home, max_waiting=1)
    model_of(app).in_flight = 1
    reply = ask(app, "POST", PREDICT, json={"instances": [BLACK]})
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")


# Paths


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", PREDICT, 400, "Malformed request: GET /v1/models/m:predict"),
        ("PUT", PREDICT, 400, "Malformed request"),
        ("POST", "/v1/models/m", 400, "Malformed request"),
        ("POST", "/v1/models/m/metadata", 400, "Malformed request"),
        ("POST", "/v1/models/m:score", 400, "Malformed request"),
        ("POST", "/v1/models/", 400, "Malformed request"),
        ("POST", "/v1/models/other:predict", 404, "Servable not found for request: Latest(other)"),
        ("POST", "/v1/models/m/versions/2:predict", 404, "Servable not found for request: Specific(m, 2)"),
        ("GET", "/v1/models/other", 404, "Servable not found"),
        ("GET", "/nowhere", 404, "Not found: /nowhere"),
        ("POST", "/healthz", 405, "Method not allowed"),
        ("POST", "/metrics", 405, "Method not allowed"),
        ("DELETE", "/", 405, "Method not allowed"),
    ],
)
def test_a_wrong_verb_or_path(home: Path, method: str, path: str, status: int, says: str) -> None:
    reply = ask(application(home), method, path)
    assert reply.status_code == status
    assert says in error_of(reply)


def test_status_and_metadata_say_what_the_model_is(home: Path) -> None:
    app = application(home)
    sealed = make_export(home).manifest.digest
    for path in ("/v1/models/m", "/v1/models/m/versions/1"):
        found = ask(app, "GET", path).json()
        assert (found["name"], found["ready"], found["digest"]) == ("m", True, sealed)
        assert found["model_version_status"] == [
            {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
        ]
    found = ask(app, "GET", "/v1/models/m/metadata").json()
    assert found["model_spec"] == {"name": "m", "signature_name": "", "version": "1"}
    tensor = found["metadata"]["signature_def"]["signature_def"]["serving_default"]["inputs"]["image"]
    assert (tensor["dtype"], [dim["size"] for dim in tensor["tensor_shape"]["dim"]]) == ("DT_UINT8", ["-1", "28", "28", "1"])
    assert Signature.model_validate(found["signature"]) == IMAGE
    assert ask(app, "POST", "/v1/models/m/versions/1:predict", json={"instances": [BLACK]}).status_code == 200
    assert ask(app, "GET", "/v1/models").json() == {"models": ["m"]}


def test_metadata_has_the_types_of_every_kind_of_tensor(home: Path) -> None:
    def tensors(signature: Signature) -> dict[str, dict[str, tuple[str, list[str]]]]:
        found = ask(application(home, signature), "GET", "/v1/models/m/metadata").json()
        given = found["metadata"]["signature_def"]["signature_def"]["serving_default"]
        return {
            side: {name: (one["dtype"], [dim["size"] for dim in one["tensor_shape"]["dim"]]) for name, one in given[side].items()}
            for side in ("inputs", "outputs")
        }

    assert tensors(FLIGHTS) == {
        "inputs": {
            "delay": ("DT_FLOAT", ["-1"]),
            "distance": ("DT_FLOAT", ["-1"]),
            "carrier": ("DT_STRING", ["-1"]),
            "airport": ("DT_STRING", ["-1"]),
            "day": ("DT_STRING", ["-1"]),
        },
        "outputs": {"minutes": ("DT_FLOAT", ["-1"])},
    }
    assert tensors(messages()) == {
        "inputs": {"message": ("DT_STRING", ["-1"])},
        "outputs": {"labels": ("DT_STRING", ["-1", "-1"]), "probabilities": ("DT_FLOAT", ["-1", "3"])},
    }
    assert tensors(PHOTOS)["inputs"]["photo"] == ("DT_UINT8", ["-1", "4", "6", "3"])


def test_metadata_leaves_the_tokenizer_out(home: Path) -> None:
    reply = ask(application(home, messages()), "GET", "/v1/models/m/metadata")
    (text,) = messages().inputs
    found = Signature.model_validate(reply.json()["signature"])
    assert found.inputs == (text.model_copy(update={"tokenizer": ""}),)
    assert "parcel" in text.tokenizer and "parcel" not in reply.text
    assert reply.json()["thresholds"] == [THRESHOLD] * 3


@pytest.mark.parametrize("signature", [IMAGE, NUMBERS, FLIGHTS, PHOTOS])
def test_every_model_is_asked_whether_it_is_ready(home: Path, signature: Signature) -> None:
    app = application(home, signature)
    model_of(app).answered -= FRESH_SECONDS
    assert ask(app, "GET", "/readyz").json() == {"ready": True}


def test_ready_means_that_the_model_answers_now(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "ANSWER_SECONDS", 0.3)
    app = application(home)
    model_of(app).answered -= FRESH_SECONDS
    assert ask(app, "GET", "/readyz").json() == {"ready": True}
    model_of(app).predictor.blank = {}
    assert ask(app, "GET", "/readyz").status_code == 200  # asked a moment ago
    model_of(app).answered -= FRESH_SECONDS
    reply = ask(app, "GET", "/readyz")
    assert reply.status_code == 503
    assert error_of(reply).startswith("the model does not answer")
    assert ask(app, "GET", "/healthz").status_code == 200


def test_health_and_page(home: Path) -> None:
    app = application(home)
    assert ask(app, "GET", "/healthz").json() == {"status": "alive"}
    assert ask(app, "GET", "/readyz").json() == {"ready": True}
    page = ask(app, "GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "<h1>m</h1>" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


# Keys


def test_nothing_but_health_is_open_without_a_key(home: Path) -> None:
    app = application(home, keys=("another-key", KEY))
    for path in ("/", "/metrics", "/v1/models", "/v1/models/m", "/v1/models/m/metadata", PREDICT, "/nowhere"):
        for headers in ({}, {"authorization": f"Bearer {KEY}x"}, {"authorization": KEY}, {"x-api-key": ""}, {"cookie": "a=b; c"}):
            assert ask(app, "GET", path, headers=headers).status_code == 401
    assert ask(app, "GET", "/healthz").status_code == ask(app, "GET", "/readyz").status_code == 200


def test_a_key_is_taken_from_four_places(home: Path) -> None:
    app = application(home, keys=("another-key", KEY))
    for headers in ({"authorization": f"bearer {KEY}"}, {"x-api-key": KEY}, {"authorization": "Bearer another-key"}):
        assert ask(app, "GET", "/v1/models/m", headers=headers).status_code == 200
    assert ask(app, "GET", f"/v1/models/m?token={KEY}").status_code == 200
    reply = ask(app, "GET", f"/?token={KEY}")
    assert (reply.status_code, reply.headers["location"]) == (303, "./")
    assert "HttpOnly" in reply.headers["set-cookie"] and "SameSite=Strict" in reply.headers["set-cookie"]
    cookie = reply.headers["set-cookie"].split(";")[0]
    assert ask(app, "GET", "/", headers={"cookie": f"other=1; {cookie}"}).status_code == 200
    assert ask(app, "GET", "/", headers={"cookie": cookie + "x"}).status_code == 401


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n  {KEY}  \n{make_key()}\n")
    assert read_keys(file)[0] == Key(digest(KEY))
    assert len(read_keys(file)) == 2


@pytest.mark.parametrize("content", [b"", b"# none\n", b"short\n", b"has a blank in it\n", b"\xff\xfe\n", None])
def test_a_bad_file_of_keys_is_refused_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DloptError, match=r"^--keys: .*keys: .+$"):
        read_keys(file)


# Metrics


def test_metrics_count_what_was_done(home: Path) -> None:
    app = application(home)

    async def requests() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            await client.post(PREDICT, json={"instances": [BLACK] * 3})
            await client.post(PREDICT, content=b"{")
            await asyncio.sleep(2 * FLUSH_SECONDS)
            return (await client.get("/metrics")).text

    lines = asyncio.run(requests()).splitlines()
    label = ask(app, "POST", PREDICT, json={"instances": [BLACK]}).json()["predictions"][0]["label"]
    sealed = make_export(home).manifest.digest
    for line in (
        'dlopt_requests_total{code="200",model="m",protocol="tensorflow",version="1"} 1.0',
        'dlopt_requests_total{code="400",model="m",protocol="tensorflow",version="1"} 1.0',
        'dlopt_rows_total{model="m",version="1"} 3.0',
        f'dlopt_predictions_total{{label="{label}",model="m",version="1"}} 3.0',
        'dlopt_request_seconds_count{model="m",protocol="tensorflow",version="1"} 2.0',
        'dlopt_inference_seconds_count{model="m",version="1"} 1.0',
        'dlopt_queue_seconds_count{model="m",version="1"} 1.0',
        'dlopt_batch_rows_bucket{le="2.0",model="m",version="1"} 0.0',
        'dlopt_batch_rows_bucket{le="4.0",model="m",version="1"} 1.0',
        'dlopt_rejected_total{reason="request"} 1.0',
        f'dlopt_model_info{{digest="{sealed}",model="m",version="1"}} 1.0',
        'dlopt_in_flight{model="m",version="1"} 0.0',
    ):
        assert line in lines


def test_labels_are_counted_one_by_one_and_numbers_summed_up(home: Path) -> None:
    app = application(home, messages())
    found = ask(app, "POST", PREDICT, json={"instances": list(SAID)}).json()["predictions"]
    lines = ask(app, "GET", "/metrics").text.splitlines()
    counts = {label: sum(label in row["labels"] for row in found) for label in messages().target.labels}
    assert sum(counts.values()) != len(SAID)
    for label, count in counts.items():
        assert f'dlopt_predictions_total{{label="{label}",model="m",version="1"}} {count}.0' in lines

    app = application(home, PHOTOS)
    row = {"photo": np.zeros((4, 6, 3), int).tolist(), "camera": None, "taken": None, "printed": None}
    found = ask(app, "POST", PREDICT, json={"instances": [row] * 3}).json()["predictions"]
    lines = ask(app, "GET", "/metrics").text.splitlines()
    for column in ("height", "width"):
        mine = [line for line in lines if line.startswith(f'dlopt_predicted_numbers_total{{column="{column}"')]
        sums = {sign: sum(float(line.split()[-1]) for line in mine if sign in line) for sign in ("positive", "negative")}
        assert min(sums.values()) == 0  # counters never fall
        assert sums["positive"] - sums["negative"] == pytest.approx(3 * found[0][column])
    assert not any(line.startswith("dlopt_predictions") for line in lines)


COUNT = """
import sys
from dlopt.serve.watch.metrics import Metrics, Registry
from dlopt.part import Target
registry = Registry()
metrics = Metrics(registry, "m", "1", "d", Target(name="t", labels=("a", "b")))
for _ in range(int(sys.argv[1])):
    metrics.rows.inc()
    metrics.queue_seconds.observe(0.002)
metrics.in_flight.set(7)
if sys.argv[2] == "show":
    print(registry.exposition().decode())
"""


def test_metrics_add_up_over_processes_and_forget_the_gauges_of_the_dead(tmp_path: Path) -> None:
    environment = {DIRECTORY: str(tmp_path), "PATH": ""}
    for count, what in ((3, "quiet"), (4, "show")):
        ended = subprocess.run([sys.executable, "-c", COUNT, str(count), what], env=environment, capture_output=True, text=True, check=True)
    lines = ended.stdout.splitlines()
    assert 'dlopt_rows_total{model="m",version="1"} 7.0' in lines
    assert 'dlopt_queue_seconds_bucket{le="0.0025",model="m",version="1"} 7.0' in lines
    assert 'dlopt_in_flight{model="m",version="1"} 7.0' in lines
    assert 'dlopt_model_info{digest="d",model="m",version="1"} 1.0' in lines


# Batches


def test_batches_of_many_requests_do_not_mix_up_answers() -> None:
    """A slow model, 200 requests at once of 1 to 5 rows: each gets what belongs to its own rows, in far fewer runs."""
    sizes: list[int] = []
    lock = threading.Lock()

    def slow(tensors: dict[str, np.ndarray]) -> np.ndarray:
        assert lock.acquire(blocking=False)
        time.sleep(0.005)
        sizes.append(len(tensors["x"]))
        lock.release()
        return tensors["x"] * 2

    async def main() -> None:
        batcher = Batcher(slow, max_batch=16, observe=lambda rows, seconds, waits: None, latency_target=1000)
        batcher.seconds_per_row = 1.0
        wanted = [np.random.default_rng(row).normal(size=(row % 5 + 1, 3)) for row in range(200)]
        tasks = [asyncio.create_task(batcher({"x": rows})) for rows in wanted]
        await asyncio.sleep(0.01)
        tasks[50].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for index, (rows, answer) in enumerate(zip(wanted, found, strict=True)):
            if index == 50:
                assert isinstance(answer, asyncio.CancelledError)
            else:
                np.testing.assert_array_equal(answer, rows * 2)
        assert batcher.worker is None

    asyncio.run(main())
    assert max(sizes) <= 16
    assert len(sizes) < 60


def test_texts_of_several_lengths_make_one_batch() -> None:
    sizes: list[tuple[int, ...]] = []

    def slow(tensors: dict[str, np.ndarray]) -> np.ndarray:
        sizes.append(tensors["text"].shape)
        time.sleep(0.01)
        return tensors["text"].sum(axis=1, keepdims=True) + 1000 * (tensors["name"] == "b")

    async def main() -> None:
        batcher = Batcher(slow, max_batch=64, observe=lambda rows, seconds, waits: None, latency_target=1000)
        batcher.seconds_per_row = 1.0
        texts = [np.arange(1, 2 * length + 1, dtype=np.int32).reshape(2, length) for length in (3, 7, 1, 12, 5)]
        names = [np.array([["a"], ["b"]], dtype=object)] * len(texts)
        found = await asyncio.gather(*(batcher({"text": text, "name": name}) for text, name in zip(texts, names, strict=True)))
        for text, answer in zip(texts, found, strict=True):
            np.testing.assert_array_equal(answer, text.sum(axis=1, keepdims=True) + np.array([[0], [1000]]))

    asyncio.run(main())
    assert sizes == [(10, 12)]


def test_one_failing_request_does_not_fail_its_neighbours() -> None:
    def picky(tensors: dict[str, np.ndarray]) -> np.ndarray:
        if (tensors["x"] == 13).any():
            raise RuntimeError("unlucky")
        return tensors["x"]

    async def main() -> list[Any]:
        batcher = Batcher(picky, max_batch=64, observe=lambda rows, seconds, waits: None, latency_target=1000)
        batcher.seconds_per_row = 1.0
        return await asyncio.gather(*(batcher({"x": np.full((1, 1), value)}) for value in range(20)), return_exceptions=True)

    found = asyncio.run(main())
    assert [isinstance(answer, RuntimeError) for answer in found] == [value == 13 for value in range(20)]


def test_a_large_request_runs_in_pieces_with_the_same_result(home: Path) -> None:
    export = make_export(home)
    images = {"image": np.random.default_rng(3).integers(0, 256, (100, 28, 28, 1), dtype=np.uint8)}
    whole, pieces = (Predictor.load(export, Serve(max_batch=size)) for size in (128, 7))
    np.testing.assert_allclose(whole(images), pieces(images), atol=1e-6)


# What is served


def test_a_damaged_export_is_refused(tmp_path: Path) -> None:
    export = make_export(tmp_path)
    content = bytearray((export.path / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (export.path / "model.onnx").write_bytes(content)
    with pytest.raises(DloptError, match="content differs from its seal"):
        application_of(Artifact.open(export.path), "m", Serve())


def test_a_replica_imports_neither_torch_nor_ray(home: Path) -> None:
    script = """
import sys
from pathlib import Path
from dlopt.serve import Serve
from dlopt.serve.front.application import Replica
from dlopt.serve.models.lineup import Entry
Replica((Entry(Path(sys.argv[1]), "m", Serve()),), Serve(), ())
print([name for name in ("torch", "ray", "pandas") if name in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", script, str(make_export(home).path)], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def test_the_section_is_light_and_strict() -> None:
    heavy = (
        "import sys, dlopt.serve; print([m for m in ('ray', 'onnxruntime', 'starlette', 'numpy', 'prometheus_client') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert Serve.model_validate({"replicas": {"min": 1, "max": 4}}).replicas == Replicas(min=1, max=4)
    assert Serve(replicas=3).most_replicas == 3
    for wrong in ({"replicas": 0}, {"replicas": {"min": 3, "max": 2}}, {"port": 1}):
        with pytest.raises(DloptError):
            Serve.model_validate(wrong)


def test_a_colour_image_is_served(tmp_path: Path) -> None:
    colour = Signature(
        inputs=(Feature(name="photo", kind="image", dtype="uint8", shape=(4, 6, 3), columns=("photo",)),),
        target=Target(name="animal", labels=("cat", "dog")),
    )
    photo = np.random.default_rng(4).integers(0, 256, (2, 4, 6, 3)).tolist()
    reply = ask(application(tmp_path, colour), "POST", PREDICT, json={"inputs": {"photo": photo}})
    assert [math.isclose(sum(row), 1, abs_tol=1e-5) for row in reply.json()["outputs"]["probabilities"]] == [True, True]
    assert set(reply.json()["outputs"]["label"]) <= {"cat", "dog"}
