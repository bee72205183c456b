"""The client: what it says is what onnxruntime says, whatever goes in and whatever goes wrong on the way."""

from __future__ import annotations

import asyncio
import json
import pickle
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import uvicorn
from PIL import Image

from dlopt.cli import main
from dlopt.client import Client, ServerError
from dlopt.client.load import Ask, load
from dlopt.data.kinds import encode_rows
from dlopt.part import DloptError, Signature
from dlopt.serve import Serve
from dlopt.serve.front.application import Application, application_of
from dlopt.serve.front.auth import Guard, Key
from tests.served import FLIGHTS, IMAGE, SAID, make_export, messages

KEY = "a-key-of-the-tests"
IMAGES = np.random.default_rng(3).integers(0, 256, (10, 28, 28), dtype=np.uint8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Its address, while it is served from another thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def application(home: Path, signature: Signature = IMAGE, **section: Any) -> Application:
    return application_of(make_export(home, signature), "m", Serve(**section), Guard((Key.of(KEY),)))


def expected(home: Path, signature: Signature, rows: Any) -> np.ndarray:
    session = onnxruntime.InferenceSession(make_export(home, signature).path / "model.onnx")
    tensors = {"image": rows.reshape(-1, 28, 28, 1)} if isinstance(rows, np.ndarray) else encode_rows(signature, rows)
    return np.asarray(session.run([signature.target.output], tensors)[0])


def test_images_of_every_form_make_a_frame_of_labels_and_probabilities(home: Path, tmp_path: Path) -> None:
    wanted = expected(home, IMAGE, IMAGES)
    pictures = [Image.fromarray(image) for image in IMAGES]
    paths = [tmp_path / f"{place}.png" for place in range(len(IMAGES))]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    with listening(application(home, max_rows=4)) as url, Client(url, KEY) as client:
        assert client.ready() and client.models() == ["m"]
        for given in (
            IMAGES,
            IMAGES[..., None],
            IMAGES.astype(float),
            list(IMAGES),
            pictures,
            paths,
            [path.read_bytes() for path in paths],
        ):
            found = client.predict(given)
            assert found["label"].tolist() == wanted.argmax(axis=1).tolist()
            np.testing.assert_allclose(found[[f"probability.{label}" for label in range(10)]], wanted, atol=1e-6)
            np.testing.assert_allclose(found["probability"], wanted.max(axis=1), atol=1e-6)
        assert client.predict(pictures[3])["label"].tolist() == [wanted[3].argmax()]
        with pytest.raises(DloptError, match="the model takes uint8 values"):
            client.predict(IMAGES + 0.5)
        with pytest.raises(DloptError, match="give a DataFrame, an array, or a list of rows"):
            client.predict("image.png")
        with pytest.raises(DloptError, match="there is no row"):
            client.predict([])


def test_a_frame_keeps_its_index_and_what_is_missing(home: Path) -> None:
    frame = pd.DataFrame(
        {
            "delay": [1.5, np.nan, 2.0],
            "distance": pd.array([1, None, 3], dtype="Int64"),
            "carrier": ["AA", None, "UA"],
            "airport": pd.Categorical(["A001", "A002", "A001"]),
            "day": pd.to_datetime(["2013-05-31", None, "2014-01-01"]),
        },
        index=[7, 3, 5],
    )
    rows = [
        {"delay": 1.5, "distance": 1, "carrier": "AA", "airport": "A001", "day": "2013-05-31"},
        {"delay": None, "distance": None, "carrier": None, "airport": "A002", "day": None},
        {"delay": 2, "distance": 3, "carrier": "UA", "airport": "A001", "day": "2014-01-01"},
    ]
    with listening(application(home, FLIGHTS)) as url:
        client = Client(url, KEY)
        found = client.predict(frame)
        assert found.index.tolist() == [7, 3, 5] and list(found) == ["minutes"]
        np.testing.assert_allclose(found["minutes"], expected(home, FLIGHTS, rows)[:, 0], rtol=1e-6)
        assert client.columns(rows) == {"minutes": found["minutes"].tolist()}
        with pytest.raises(ServerError, match="row 0: has no column 'carrier'") as error:
            client.predict(frame[["delay", "distance"]])
        assert error.value.status == 400
        assert pickle.loads(pickle.dumps(error.value)).args == error.value.args


def test_several_labels_are_lists(home: Path) -> None:
    wanted = expected(home, messages(), [{"message": text} for text in SAID])
    with listening(application(home, messages())) as url:
        found = Client(url, KEY).predict([{"message": text} for text in SAID])
    np.testing.assert_allclose(found[[f"probability.{label}" for label in messages().target.labels]], wanted, atol=1e-6)
    names = np.array(messages().target.labels)
    assert found["labels"].tolist() == [names[row > 0.5].tolist() for row in wanted]


def test_a_large_request_is_cut_until_it_fits(home: Path) -> None:
    app = application(home, max_bytes=6_000)
    with listening(app) as url:
        found = Client(url, KEY).predict(IMAGES)
    np.testing.assert_allclose(found["probability"], expected(home, IMAGE, IMAGES).max(axis=1), atol=1e-6)
    codes = [line for line in app.counts.exposition().decode().splitlines() if line.startswith("dlopt_requests_total")]
    assert len(codes) == 2  # 413 and 200


class Moody:
    """In front of an app: does something else with the first requests."""

    def __init__(self, app: Application, *moods: Any) -> None:
        self.app, self.moods, self.asked = app, list(moods), 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        mood = self.moods.pop(0) if self.moods else None
        if mood is None:
            await self.app(scope, receive, send)
        elif mood == "gone":
            raise SystemError("ends the connection")
        elif mood == "slow":
            await asyncio.sleep(0.5)
        else:
            await send({"type": "http.response.start", "status": mood, "headers": [(b"retry-after", b"0.05"), (b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})


def test_a_busy_or_lost_server_is_asked_again(home: Path) -> None:
    moody = Moody(application(home), 503, 429, "slow", 502)
    with listening(moody) as url:
        assert Client(url, KEY, timeout=0.2).models() == ["m"]
        assert moody.asked == 5
        moody.moods = [503] * 3
        with pytest.raises(ServerError, match="status 503") as error:
            Client(url, KEY, retries=2).models()
        assert error.value.status == 503
        asked = moody.asked
        with pytest.raises(ServerError, match="missing or wrong key"):
            Client(url, "wrong-key").models()
        assert moody.asked == asked + 1  # a wrong key stays wrong
    with pytest.raises(ServerError, match=r"no answer from 127\.0\.0\.1"):
        Client(url, KEY, retries=1).models()
    assert not Client(url).ready()
    for wrong in ("127.0.0.1:80", "ftp://x"):
        with pytest.raises(DloptError, match="is no address of a server"):
            Client(wrong)


def test_bench_serve_counts_what_the_server_counts(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = application(home)
    with listening(app) as url:
        assert main(["bench-serve", url, "--key", KEY, "--seconds", "0.5", "--connections", "3", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        counted = next(line for line in app.counts.exposition().decode().splitlines() if line.startswith('dlopt_requests_total{code="200"'))
        assert float(counted.split()[-1]) == found["requests"] > 20
        assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"] and found["errors"] == {}
        assert main(["bench-serve", url, "--key", "wrong-key"]) == 2
        assert "missing or wrong key" in capsys.readouterr().err
        ask = Ask(f"{url}/v1/models/m:predict", b"{}", {"X-API-Key": KEY})
        report = asyncio.run(load(ask, connections=4, seconds=0.5, rate=40))
        assert report.times == [] and 15 <= report.errors["400"] <= 20
    report = asyncio.run(load(ask, connections=1, seconds=0.05))
    assert set(report.errors) == {"ConnectionRefusedError"}
