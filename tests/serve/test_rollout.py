"""Deploying, a bad canary and rolling back under 200 requests a second: no request fails, and each answer is of one version."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dlopt.client import Client
from dlopt.client.load import Ask, Report, load
from tests.serve.test_protocols import BLACK
from tests.serve.test_serve_models import run
from tests.served import NUMBERS, Server, make_export

RATE = 200
DIGEST = re.compile(rb"x-model-digest: (\w+)")


class Watched:
    """Which digest each answer came with, and what it said."""

    def __init__(self) -> None:
        self.said: Counter[tuple[str, str]] = Counter()
        self.last = ""

    def __call__(self, status: int, head: bytes, body: bytes) -> None:
        if status == 200:
            self.last = DIGEST.search(head)[1].decode()  # type: ignore[index]
            self.said[self.last, str([round(chance, 4) for chance in json.loads(body)["predictions"][0]["probabilities"]])] += 1


def until(watched: Watched, digest: str, seconds: float = 20) -> None:
    """All of the answers of half a second come from it."""
    deadline, before = time.monotonic() + seconds, Counter(watched.said)
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if {one for one, _ in watched.said - before} == {digest}:
            return
        before = Counter(watched.said)
    raise AssertionError(f"it still is {watched.last}")


def rolled_out(server: Server, home: Path) -> tuple[Report, Watched, float]:
    """What came of the load, and how long a bad canary lived."""
    client, watched = Client(server.url, timeout=60), Watched()

    def asked(method: str, path: str, given: Any = None) -> Any:
        return json.loads(
            client.send(method, path, json.dumps(given).encode() if given else b"", {"Content-Type": "application/json"}).body
        )

    def change() -> float:
        small, large = (make_export(home, hidden=hidden).manifest.digest for hidden in (128, 200))
        until(watched, small)
        asked("POST", "/admin/deploy", {"run": str(home / "larger"), "name": "digits"})
        until(watched, large)
        asked("POST", "/admin/deploy", {"run": str(home / "late"), "name": "digits", "canary": 10, "limits": {"requests": 10}})
        start = time.monotonic()
        while asked("GET", "/admin/models")["models"]["digits"]["canary"] is not None:
            assert time.monotonic() - start < 30
            time.sleep(0.1)
        lived = time.monotonic() - start
        asked("POST", "/admin/rollback", {"name": "digits"})
        until(watched, small)
        return lived

    async def both() -> tuple[Report, float]:
        ask = Ask(f"{server.url}/v1/models/digits:predict", json.dumps({"instances": [BLACK]}).encode(), {})
        done: list[float] = []
        loading = asyncio.create_task(load(ask, connections=16, seconds=120, rate=RATE, seen=watched, ended=lambda: bool(done)))
        try:
            done.append(await asyncio.to_thread(change))
        finally:
            done.append(0.0)
            report = await loading
        return report, done[0]

    report, lived = asyncio.run(both())
    return report, watched, lived


@pytest.mark.slow
@pytest.mark.parametrize(
    "section", ['{"drain_seconds": 0}', '{"drain_seconds": 0, "replicas": 2}'], ids=["embedded", "two replicas of Ray Serve"]
)
def test_no_request_fails_while_versions_come_and_go(tmp_path: Path, section: str) -> None:
    exports = {"digits": make_export(tmp_path), "larger": make_export(tmp_path, hidden=200), "late": make_export(tmp_path, NUMBERS)}
    for name, export in exports.items():
        run(tmp_path, name, export)
    server = Server(exports["digits"], section, host="", ray="replicas" in section)
    try:
        report, watched, lived = rolled_out(server.wait(), tmp_path)
    finally:
        server.stop(signal.SIGTERM)
    assert report.errors == {} and len(report.times) >= 0.5 * RATE * report.seconds  # a busy machine takes no more
    answers = {digest: {body for one, body in watched.said if one == digest} for digest, _ in watched.said}
    assert set(answers) == {exports[name].manifest.digest for name in ("digits", "larger")}
    assert all(len(bodies) == 1 for bodies in answers.values()) and lived < 30
    print(f"{len(report.times)} requests, {report.rate:.0f} a second, p99 {report.percentile(99):.1f} ms, a bad canary lived {lived:.1f} s")
