"""What keeps a server up among strangers: limits, compression, keys, draining, and requests that nobody would write. Without Ray: the
ASGI app is called directly."""

from __future__ import annotations

import asyncio
import base64
import csv
import gzip
import io
import json
import os
import random
import time
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dlopt.part import DloptError
from dlopt.serve import Serve
from dlopt.serve.exchange import Refusal
from dlopt.serve.front import auth
from dlopt.serve.front.application import DRAINING, Application, application_of
from dlopt.serve.front.auth import Guard, Key, digest, read_keys
from dlopt.serve.models import batcher
from dlopt.serve.models.batcher import Batcher
from dlopt.serve.protocols.example import example_row
from tests.serve.test_protocols import BLACK, KEY, PREDICT, application, ask, error_of, model_of
from tests.served import FLIGHTS, IMAGE, NUMBERS, PHOTOS, make_export, messages

TURNS = 125
"""Requests for each kind of model that nobody would write."""
IMAGE_BODY = json.dumps({"instances": [BLACK]}).encode()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


# Bodies


def zipped(body: bytes) -> bytes:
    """The same bytes at any time: processes side by side must collect the same tests."""
    return gzip.compress(body, mtime=0)


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", zipped(IMAGE_BODY)),
        ("x-gzip", zipped(IMAGE_BODY[:1000]) + zipped(IMAGE_BODY[1000:])),
        ("deflate", zlib.compress(IMAGE_BODY)),
        ("Deflate", zlib.compress(IMAGE_BODY, wbits=-15)),
        ("Identity", IMAGE_BODY),
    ],
    ids=["gzip", "two gzips", "zlib", "deflate", "identity"],
)
def test_a_compressed_body_is_as_good(home: Path, encoding: str, packed: bytes) -> None:
    app = application(home)
    plain = ask(app, "POST", PREDICT, content=IMAGE_BODY).json()
    assert ask(app, "POST", PREDICT, content=packed, headers={"content-encoding": encoding}).json() == plain


@pytest.mark.parametrize(
    ("packed", "status"),
    [
        (zipped(b"[" * 10**7), 413),
        (zipped(zipped(b"0" * 10**6)), 400),
        (zipped(IMAGE_BODY)[:-20], 400),
        (b"no gzip at all", 400),
        (b"", 400),
    ],
    ids=["bomb", "twice", "cut", "plain", "empty"],
)
def test_a_bomb_or_a_damaged_body_is_refused_early(home: Path, packed: bytes, status: int) -> None:
    app = application(home, max_bytes=100_000)
    start = time.monotonic()
    reply = ask(app, "POST", PREDICT, content=packed, headers={"content-encoding": "gzip"})
    assert (reply.status_code, bool(error_of(reply))) == (status, True)
    assert time.monotonic() - start < 1


def test_a_large_reply_is_compressed_for_who_takes_it(home: Path) -> None:
    app = application(home)
    body = json.dumps({"instances": [BLACK] * 64})
    plain = ask(app, "POST", PREDICT, content=body, headers={"accept-encoding": "gzip;q=0"})
    assert "content-encoding" not in plain.headers
    for accepts, encoding in (("br, gzip;q=0.5", "gzip"), ("deflate", "deflate")):
        reply = ask(app, "POST", PREDICT, content=body, headers={"accept-encoding": accepts})
        assert (reply.headers["content-encoding"], reply.headers["vary"]) == (encoding, "accept-encoding")
        assert reply.json() == plain.json()
        assert int(reply.headers["content-length"]) < len(plain.content) / 3


def test_files_are_rows_by_their_content_type(home: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (28, 28), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    app = application(home)
    plain = ask(app, "POST", PREDICT, json={"instances": [pixels.tolist()]}).json()
    assert ask(app, "POST", PREDICT, content=file.getvalue(), headers={"content-type": "image/png"}).json() == plain
    jpeg = error_of(ask(app, "POST", PREDICT, content=b"\xff\xd8\xff", headers={"content-type": "image/jpeg"}))
    assert jpeg.startswith("row 0: image: not an image")
    for written in (base64.encodebytes(file.getvalue()).decode(), "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()):
        assert ask(app, "POST", PREDICT, json={"instances": [{"b64": written}]}).json() == plain


def test_a_table_may_come_as_csv_or_as_an_arrow_stream(home: Path) -> None:
    app = application(home, FLIGHTS)
    rows = [
        {"delay": 2.5, "distance": 100.0, "carrier": "UA", "airport": "A,7", "day": "2013-05-31"},
        {"delay": None, "distance": 1.0, "carrier": None, "airport": "x", "day": None},
    ]
    plain = ask(app, "POST", PREDICT, json={"instances": rows}).json()
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0], "unused"])
    writer.writeheader()
    writer.writerows(rows)
    table = pa.Table.from_pylist(rows)
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as out:
        out.write_table(table)
    arrow = "application/vnd.apache.arrow.stream"
    for content, kind in ((text.getvalue().encode("utf-8-sig"), "text/csv; charset=utf-8"), (stream.getvalue(), arrow)):
        assert ask(app, "POST", PREDICT, content=content, headers={"content-type": kind}).json() == plain
    for content, kind, says in (
        (b"delay,distance\n1,2\n", "text/csv", "there is no column 'carrier'"),
        (b"a,b\n1\n", "text/csv", "row 0: 1 fields where the header has 2"),
        (b"", "text/csv", "header line"),
        (b"\xff,a\n1,2\n", "text/csv", "CSV: "),
        (b"delay,distance,carrier,airport,day\n1,x,a,b,\n", "text/csv", "row 0: distance: 'x' is not a number"),
        (stream.getvalue()[:200], arrow, "Arrow: "),
        (b"", arrow, "Arrow: "),
    ):
        reply = ask(app, "POST", PREDICT, content=content, headers={"content-type": kind})
        assert (reply.status_code, says in error_of(reply)) == (400, True), reply.text


def test_examples_are_taken_by_classify_and_regress(home: Path) -> None:
    app = application(home, NUMBERS)
    rows = [{"month": 1, "day": 2, "distance": 3}, {"month": 1, "day": 2, "distance": 4}]
    wanted = [row["probabilities"] for row in ask(app, "POST", PREDICT, json={"instances": rows}).json()["predictions"]]
    body = {"context": {"month": 1, "day": [2]}, "examples": [{"distance": 3}, {"distance": [4.0]}]}
    found = ask(app, "POST", "/v1/models/m:classify", json=body).json()["result"]
    assert [[score for _, score in row] for row in found] == wanted and [label for label, _ in found[0]] == ["no", "yes"]
    assert ask(app, "POST", "/v1/models/m:regress", json=body).status_code == 400
    app = application(home, FLIGHTS)
    row = example_row(FLIGHTS)
    wanted = ask(app, "POST", PREDICT, json={"instances": [row]}).json()["predictions"]
    assert ask(app, "POST", "/v1/models/m:regress", json={"examples": [row]}).json()["result"] == wanted


@pytest.mark.parametrize("signature", [IMAGE, NUMBERS, FLIGHTS, PHOTOS])
def test_the_example_that_is_shown_is_one_that_works(home: Path, signature: Any) -> None:
    app = application(home, signature)
    document = ask(app, "GET", "/openapi.json").json()
    content = document["paths"][PREDICT]["post"]["requestBody"]["content"]
    assert ask(app, "POST", PREDICT, json=content["application/json"]["example"]).status_code == 200
    assert document["openapi"] == "3.1.0" and "/v2/models/m/infer" in document["paths"]
    page = ask(app, "GET", "/docs")
    assert "http" not in page.text.replace("http-equiv", "") and "default-src 'none'" in page.headers["content-security-policy"]


# Keys


def key_file(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    os.utime(path, ns=(0, time.time_ns()))
    return path


def asked(app: Application, key: str, method: str = "GET", path: str = "/v1/models") -> int:
    return ask(app, method, path, headers={"x-api-key": key}).status_code


def test_keys_have_roles_and_an_end_and_may_be_hashes(home: Path, tmp_path: Path) -> None:
    path = key_file(
        tmp_path / "keys",
        f"sha256:{digest('hashed-key')} name=ann",
        "only-predicts role=predict",
        "long-gone-key expires=2020-01-01",
        "good-for-years expires=2999-01-01T00:00:00Z",
    )
    app = application_of(make_export(home), "m", Serve(), Guard(read_keys(path), path))
    assert [asked(app, key) for key in ("hashed-key", "only-predicts", "good-for-years")] == [200] * 3
    assert asked(app, "long-gone-key") == asked(app, digest("hashed-key")) == asked(app, "unknown-key") == 401
    unload = "/v2/repository/models/m/unload"
    assert asked(app, "only-predicts", "POST", unload) == 403
    assert ask(app, "POST", PREDICT, json={"instances": [BLACK]}, headers={"x-api-key": "only-predicts"}).status_code == 200
    assert asked(app, "hashed-key", "POST", unload) == 200
    reasons = ask(app, "GET", "/metrics", headers={"x-api-key": "hashed-key"}).text
    assert 'dlopt_rejected_total{reason="key"} 3.0' in reasons and 'dlopt_rejected_total{reason="role"} 1.0' in reasons


def test_a_key_is_revoked_while_the_server_runs(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "LOOK_SECONDS", 0)
    path = key_file(tmp_path / "keys", "first-key", "second-key")
    app = application_of(make_export(home), "m", Serve(), Guard(read_keys(path), path))
    assert asked(app, "first-key") == asked(app, "second-key") == 200
    key_file(path, "second-key", "third-key")
    assert [asked(app, key) for key in ("first-key", "second-key", "third-key")] == [401, 200, 200]
    key_file(path, "not a key file")
    assert [asked(app, key) for key in ("first-key", "second-key")] == [401, 200]
    path.unlink()
    assert [asked(app, key) for key in ("first-key", "second-key")] == [401, 200]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("good-key-12 role=king", "line 1: role=king: there are predict and admin"),
        ("good-key-12 expires=soon", "line 1: expires=soon: give a day or a moment"),
        ("good-key-12 rate=-1", "line 1: rate=-1: give requests a second"),
        ("good-key-12 colour=red", "line 1: after a key there may be role=, expires=, rate= and name="),
        ("sha256:123", "line 1: a key has 8 to 256 characters"),
    ],
)
def test_a_bad_line_of_keys_is_one_line(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(DloptError) as error:
        read_keys(key_file(tmp_path / "keys", line))
    assert says in str(error.value) and "good-key" not in str(error.value)


def test_a_key_that_asks_too_often_gets_a_429_and_the_other_one_an_answer(home: Path) -> None:
    keys = (Key.of("often-used"), Key(digest("own-rate"), rate=1000.0))
    app = application_of(make_export(home), "m", Serve(), Guard(keys, rate=3))
    assert [asked(app, "often-used") for _ in range(5)] == [200] * 3 + [429] * 2
    assert ask(app, "GET", "/v1/models", headers={"x-api-key": "often-used"}).headers["retry-after"] == "1"
    assert [asked(app, "own-rate") for _ in range(5)] == [200] * 5


# Ends, and waits


def test_a_server_that_ends_says_so_and_goes_on_answering(home: Path, tmp_path: Path) -> None:
    app = application_of(make_export(home), "m", Serve(), drains=tmp_path / DRAINING)
    assert ask(app, "GET", "/readyz").status_code == 200
    (tmp_path / DRAINING).touch()
    for path in ("/readyz", "/v2/health/ready"):
        reply = ask(app, "GET", path)
        assert (reply.status_code, error_of(reply), reply.headers["retry-after"]) == (503, "the server is about to end", "1")
    reply = ask(app, "POST", PREDICT, json={"instances": [BLACK]})
    assert (reply.status_code, reply.headers["connection"]) == (200, "close")
    assert ask(app, "GET", "/healthz").status_code == 200


def test_who_waits_too_long_for_a_stuck_model_gets_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher, "SWEEP_SECONDS", 0.02)

    def stuck(tensors: dict[str, np.ndarray]) -> np.ndarray:
        time.sleep(0.5)
        return tensors["x"]

    async def main() -> tuple[float, list[Any]]:
        waiting = Batcher(stuck, max_batch=1, observe=lambda *_: None, request_seconds=0.1)
        waiting.seconds_per_row = 1.0
        start = time.monotonic()
        found = await asyncio.gather(*(waiting({"x": np.zeros((1, 1))}) for _ in range(3)), return_exceptions=True)
        return time.monotonic() - start, found

    seconds, found = asyncio.run(main())
    assert seconds < 0.4
    assert [isinstance(one, Refusal) and one.status for one in found] == [503] * 3


def test_the_digest_of_the_model_is_on_every_reply(home: Path) -> None:
    app = application(home, keys=(KEY,))
    sealed = make_export(home).manifest.digest
    for path in ("/healthz", "/metrics", "/nowhere", "/", "/v2", PREDICT):
        assert ask(app, "GET", path).headers["x-model-digest"] == sealed


# What nobody would write


def mutated(body: bytes, generator: random.Random) -> bytes:
    """A body with a few changes that keep most of it: bytes, pieces, numbers, words."""
    content = bytearray(body)
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(len(content) + 1)
        match generator.randrange(6):
            case 0:
                content[at : at + 1] = bytes([generator.randrange(256)])
            case 1:
                del content[at : at + generator.randint(1, 20)]
            case 2:
                content[at:at] = content[at : at + generator.randint(1, 20)]
            case 3:
                words = (b"NaN", b"1e999", b"null", b"true", b"-1", b'""', b"[]", b"{}", b"\\u0000", b"\xff", b"99999999999999999999")
                content[at:at] = generator.choice(words)
            case 4:
                content[at:at] = generator.choice((b"[", b"]", b"{", b"}", b",", b":", b'"')) * generator.randint(1, 300)
            case 5:
                numbers = [place for place, byte in enumerate(content) if 48 <= byte <= 57]
                if numbers:
                    content[generator.choice(numbers)] = generator.randrange(48, 58)
    return bytes(content)


def bases(signature: Any, rows: list[Any]) -> list[tuple[str, bytes, dict[str, str]]]:
    """Good requests of both protocols, to change."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    found = [("/v1/models/m:predict", json.dumps(body).encode(), {}) for body in ({"instances": rows}, {"inputs": columns})]
    tensors = []
    for name, values in columns.items():
        if isinstance(values[0], dict):
            tensors.append({"name": name, "shape": [len(rows)], "datatype": "BYTES", "data": [value["b64"] for value in values]})
        else:
            kind = "BYTES" if isinstance(values[0], str) else "FP64"
            tensors.append({"name": name, "shape": [len(rows)], "datatype": kind, "data": values})
    found.append(("/v2/models/m/infer", json.dumps({"inputs": tensors}).encode(), {}))
    head = json.dumps({"inputs": [tensors[0] | {"parameters": {"binary_data_size": 16}}], "outputs": []}).replace('"data"', '"_"').encode()
    found.append(("/v2/models/m/infer", head + bytes(16), {"inference-header-content-length": str(len(head))}))
    return found


@pytest.mark.parametrize("signature", [IMAGE, FLIGHTS, PHOTOS, "messages"], ids=["image", "table", "mixed", "text"])
def test_what_nobody_would_write_is_never_a_5xx(home: Path, signature: Any) -> None:
    """500 requests in all: every reply that is no 200 is a 4xx of JSON with an error in it, and the server goes on."""
    signature = messages() if signature == "messages" else signature
    app = application(home, signature)
    rows = [example_row(signature)] * 2
    good = bases(signature, rows)
    generator = random.Random(TURNS)
    statuses: list[int] = []

    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for turn in range(TURNS):
                path, body, headers = good[turn % len(good)]
                if turn % 10 == 9:
                    headers = headers | {"inference-header-content-length": str(generator.randrange(len(body) + 9))}
                reply = await client.post(path, content=mutated(body, generator), headers=headers)
                statuses.append(reply.status_code)
                found = json.loads(reply.content, parse_constant=lambda word: pytest.fail(f"{word} in a reply"))
                assert reply.status_code == 200 or (400 <= reply.status_code < 500 and set(found) == {"error"}), (reply.text, body)

    asyncio.run(main())
    assert 400 in statuses
    assert ask(app, "POST", PREDICT, json={"instances": rows}).status_code == 200
    assert model_of(app).in_flight == 0
