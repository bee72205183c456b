"""The Open Inference Protocol over gRPC. Bytes are made and read by hand here, by the field numbers of the protocol's specification, so
that the server's own table of them is not tested against itself."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import onnxruntime
import pytest

from dlopt.part import DloptError, Signature
from dlopt.serve import Serve
from dlopt.serve.front.application import Application, application_of
from dlopt.serve.front.auth import Guard, Key, digest
from dlopt.serve.protocols.inference.rpc import server_of
from tests.served import IMAGE, NUMBERS, free_port, make_export, messages

KEY = "a-key-of-the-tests"
IMAGES = np.random.default_rng(11).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
SERVICE = "/inference.GRPCInferenceService/"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def application(home: Path, signature: Signature = IMAGE, **section: Any) -> Application:
    keys = (Key.of(KEY), Key(digest("only-predicts"), "predict"))
    return application_of(make_export(home, signature), "m", Serve(**section), Guard(keys))


def varint(number: int) -> bytes:
    found = b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def field(number: int, value: bytes | str | int) -> bytes:
    """A field of a message: a number, or what has a length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def fields(message: bytes) -> dict[int, list[Any]]:
    """What a message holds, by number."""
    found: dict[int, list[Any]] = {}
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        tag = number()
        value: Any = number()
        if tag & 7 == 2:
            value, at = message[at : at + value], at + value
        found.setdefault(tag >> 3, []).append(value)
    return found


def tensor(name: str, datatype: str, shape: tuple[int, ...], contents: bytes = b"") -> bytes:
    sizes = b"".join(map(varint, shape))
    return field(5, field(1, name) + field(2, datatype) + field(3, sizes) + (field(5, contents) if contents else b""))


def image_request(version: str = "") -> bytes:
    head = field(1, "m") + (field(2, version) if version else b"") + field(3, "seven")
    return head + tensor("image", "UINT8", IMAGES.shape) + field(7, IMAGES.tobytes())


Call = Callable[..., bytes]


@contextmanager
def served(app: Application) -> Iterator[Callable[[list[tuple[str, bytes, Mapping[str, str]]]], list[Any]]]:
    """What calls methods with bytes and says what came back: bytes, or the error's code and words."""

    def ask(calls: list[tuple[str, bytes, Mapping[str, str]]]) -> list[Any]:
        return asyncio.run(_asked(app, calls))

    yield ask


async def _asked(app: Application, calls: list[tuple[str, bytes, Mapping[str, str]]]) -> list[Any]:
    port = free_port()
    server = server_of(app, "127.0.0.1", port)
    await server.start()
    found: list[Any] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        for name, request, metadata in calls:
            try:
                found.append(await channel.unary_unary(SERVICE + name)(request, metadata=tuple(metadata.items()), timeout=20))
            except grpc.aio.AioRpcError as error:
                found.append((error.code().name, error.details()))
    await server.stop(None)
    return found


LET_IN = {"authorization": f"Bearer {KEY}"}


def test_images_as_raw_bytes_are_predicted_as_onnxruntime_does(home: Path) -> None:
    (wanted,) = onnxruntime.InferenceSession(make_export(home).path / "model.onnx").run(None, {"image": IMAGES})
    app = application(home)
    only = field(6, field(1, "probabilities"))
    with served(app) as ask:
        whole, versioned, part = ask(
            [("ModelInfer", request, LET_IN) for request in (image_request(), image_request("1"), image_request() + only)]
        )
    assert whole == versioned
    reply = fields(whole)
    assert (reply[1], reply[2], reply[3]) == ([b"m"], [b"1"], [b"seven"])
    label, chances = map(fields, reply[5])
    assert (label[1], label[2], label[3]) == ([b"label"], [b"INT64"], [b"\x03"])
    assert (chances[1], chances[2], chances[3]) == ([b"probabilities"], [b"FP32"], [b"\x03\x0a"])
    assert np.frombuffer(reply[6][0], np.int64).tolist() == wanted.argmax(axis=1).tolist()
    np.testing.assert_allclose(np.frombuffer(reply[6][1], np.float32).reshape(3, 10), wanted, atol=1e-6)
    assert fields(part)[6] == [reply[6][1]]
    text = app.counts.exposition().decode()
    assert 'dlopt_requests_total{code="200",model="m",protocol="grpc",version="1"} 3.0' in text


def test_typed_contents_are_as_good(home: Path) -> None:
    numbers = [field(6, struct.pack("<2f", *pair)) for pair in ((1, 3), (2, 4), (5, 6))]
    names = ("month", "day", "distance")
    request = field(1, "m") + b"".join(tensor(name, "FP32", (2,), one) for name, one in zip(names, numbers, strict=True))
    session = onnxruntime.InferenceSession(make_export(home, NUMBERS).path / "model.onnx")
    (wanted,) = session.run(None, {"numbers": np.float32([[1, 2, 5], [3, 4, 6]])})
    with served(application(home, NUMBERS)) as ask:
        (reply,) = ask([("ModelInfer", request, LET_IN)])
    np.testing.assert_allclose(np.frombuffer(fields(reply)[6][1], np.float32).reshape(2, 2), wanted, atol=1e-6)
    texts = field(1, "m") + tensor("message", "BYTES", (2,), field(8, "please call") + field(8, "thank you"))
    packed = b"".join(struct.pack("<I", len(text)) + text for text in (b"please call", b"thank you"))
    raw = field(1, "m") + tensor("message", "BYTES", (2,)) + field(7, packed)
    with served(application(home, messages())) as ask:
        first, second = ask([("ModelInfer", one, LET_IN) for one in (texts, raw)])
    assert first == second and len(fields(first)[6]) == 2


def test_what_stands_around_a_model_is_told(home: Path) -> None:
    app = application(home)
    named = field(1, "m")
    with served(app) as ask:
        live, ready, model, none, server, told, index, unloaded, gone, loaded, again = ask(
            [
                ("ServerLive", b"", {}),
                ("ServerReady", b"", {}),
                ("ModelReady", named, LET_IN),
                ("ModelReady", field(1, "x"), LET_IN),
                ("ServerMetadata", b"", LET_IN),
                ("ModelMetadata", named, LET_IN),
                ("RepositoryIndex", b"", LET_IN),
                ("RepositoryModelUnload", field(2, "m"), LET_IN),
                ("ModelReady", named, LET_IN),
                ("RepositoryModelLoad", field(2, "m"), LET_IN),
                ("ModelReady", named, LET_IN),
            ]
        )
    assert [live, ready, model, none, gone, again] == [b"\x08\x01"] * 3 + [b""] * 2 + [b"\x08\x01"]
    assert (unloaded, loaded) == (b"", b"")
    assert fields(server)[1] == [b"dlopt"] and b"model_repository" in fields(server)[3]
    metadata = fields(told)
    assert (metadata[1], metadata[2], metadata[3]) == ([b"m"], [b"1"], [b"onnx_onnxv1"])
    minus_one = b"\xff" * 9 + b"\x01"
    assert fields(metadata[4][0]) == {1: [b"image"], 2: [b"UINT8"], 3: [minus_one + b"\x1c\x1c\x01"]}
    assert [fields(one)[1] for one in metadata[5]] == [[b"label"], [b"probabilities"]]
    assert fields(fields(index)[1][0]) == {1: [b"m"], 2: [b"1"], 3: [b"READY"]}


def test_errors_are_codes_with_the_words_of_http(home: Path) -> None:
    app = application(home, max_rows=2, max_bytes=100_000)
    other = field(1, "m") + tensor("picture", "UINT8", (1,)) + field(7, b"x")
    short = field(1, "m") + tensor("image", "UINT8", (1, 28, 28, 1)) + field(7, b"x")
    both = field(1, "m") + tensor("image", "UINT8", (1,), field(4, b"\x01")) + field(7, b"x")
    calls = [
        ("ModelInfer", image_request(), LET_IN),
        ("ModelInfer", image_request("9"), LET_IN),
        ("ModelInfer", other, LET_IN),
        ("ModelInfer", short, LET_IN),
        ("ModelInfer", both, LET_IN),
        ("ModelInfer", field(1, "m"), LET_IN),
        ("ModelInfer", b"\xff", LET_IN),
        ("ModelInfer", b"\0" * 200_000, LET_IN),
        ("ModelInfer", image_request(), {}),
        ("ModelInfer", image_request(), {"x-api-key": "wrong-key"}),
        ("RepositoryModelUnload", field(2, "m"), {"x-api-key": "only-predicts"}),
        ("ModelStreamInfer", b"", LET_IN),
    ]
    with served(app) as ask:
        found = ask(calls)
    assert [code for code, _ in found] == [
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        *["INVALID_ARGUMENT"] * 5,
        "RESOURCE_EXHAUSTED",
        *["UNAUTHENTICATED"] * 2,
        "PERMISSION_DENIED",
        "UNIMPLEMENTED",
    ]
    said = [words for _, words in found]
    assert said[0] == "3 rows in one request, at most 2 are taken (serve.max_rows)"
    assert said[2].startswith("unexpected inference input 'picture'") and said[3].startswith("unexpected size for input 'image'")
    assert said[4] == "input 'image': has contents and raw_input_contents: give one"
    assert said[8].startswith("missing or wrong key") and said[10] == "this key may only predict"
    text = app.counts.exposition().decode()
    assert 'dlopt_requests_total{code="400",model="m",protocol="grpc",version="1"} 6.0' in text
    assert 'code="404",model="m",protocol="grpc"' in text and 'code="401"' in text


def test_a_port_in_use_is_one_line(home: Path) -> None:
    async def twice() -> None:
        port = free_port()
        first = server_of(application(home), "127.0.0.1", port)
        await first.start()
        try:
            with pytest.raises(DloptError, match=f"--grpc-port: {port} is in use"):
                server_of(application(home), "127.0.0.1", port)
        finally:
            await first.stop(None)

    asyncio.run(twice())
