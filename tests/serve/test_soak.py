"""A server at half of what it can do, for long: `pytest -m slow tests/serve/test_soak.py --minutes 30`; in the daily run some seconds."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import numpy as np
import pytest

from dlopt.client.load import Ask, load
from tests.serve.test_protocols import BLACK
from tests.served import Server, make_export

MOST_SLOPE = 1.0
"""MiB of memory a minute."""
SETTLING = 4.0
"""MiB that memory may grow by in all before a slope says anything."""
TURNS = 10


@pytest.mark.slow
def test_memory_files_and_threads_stay_as_they_are(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    minutes = request.config.getoption("--minutes")
    server = Server(make_export(tmp_path), '{"drain_seconds": 0}', host="", ray=False).wait()
    asked = {
        "json": Ask(f"{server.url}/v1/models/digits:predict", json.dumps({"instances": [BLACK] * 4}).encode(), {}),
        "wrong": Ask(f"{server.url}/v1/models/digits:predict", b"{", {}),
        "other": Ask(f"{server.url}/metrics", b"", {}),
    }
    try:
        most = asyncio.run(load(asked["json"], connections=16, seconds=2)).rate
        found, times, errors, count = [], [], 0, 0
        for _ in range(TURNS):
            report = asyncio.run(load(asked["json"], connections=16, seconds=60 * minutes / TURNS, rate=most / 2))
            for name, status in (("wrong", "400"), ("other", "405")):
                said = asyncio.run(load(asked[name], connections=4, seconds=0.1, rate=100))
                assert set(said.errors) == {status}
            errors, count = errors + sum(report.errors.values()), count + len(report.times)
            found.append(of_process(server.process.pid))
            times.append((times[-1] if times else 0) + report.seconds / 60)
    finally:
        server.stop(signal.SIGTERM)
    memory, files, threads = np.array(found[1:]).T
    slope, _ = np.polyfit(times[1:], memory, 1)
    print(f"{count} requests in {times[-1]:.2f} minutes, {errors} failed")
    print(f"memory {memory[0]:.1f} to {memory[-1]:.1f} MiB, {slope:.2f} a minute")
    assert errors <= 0.001 * count and count > 0.25 * most * 60 * minutes
    assert slope < MOST_SLOPE or memory[-1] - memory[0] < SETTLING
    assert np.ptp(files) <= 0.05 * files[0] + 2 and np.ptp(threads) <= 0.05 * threads[0] + 1


def of_process(pid: int) -> tuple[float, int, int]:
    """MiB of memory, open files, threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir())), int(status["Threads"])
