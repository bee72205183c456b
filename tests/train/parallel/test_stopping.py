"""How training is asked to end, and a process that ends itself since it hangs: signals and exits are of processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dlopt.train.cluster import stopping
from dlopt.train.cluster.stopping import RESIZE, STOP, reason
from dlopt.train.watch.watchdog import EXIT_CODE, HUNG, Watchdog, whereabouts
from tests.commands import ROOT

LISTENING = """
import sys, time
from pathlib import Path
from dlopt.train.cluster import stopping
out = Path(sys.argv[1])
stopping.listen()
print("listening", flush=True)
sys.stdin.readline()
with stopping.training():
    print(stopping.reason(out), flush=True)
    sys.stdin.readline()
    print(stopping.reason(out), flush=True)
    sys.stdin.readline()
"""
"""A process that trains from its first line of input on, and says at each line whether it is asked to end."""


class Listener:
    def __init__(self, out: Path) -> None:
        words = [sys.executable, "-c", LISTENING, str(out)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.heard() == "listening"

    def heard(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def go_on(self) -> str:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.heard()


@pytest.fixture
def listener(tmp_path: Path) -> Listener:
    return Listener(tmp_path)


def test_files_ask_all_workers_and_stop_is_the_stronger(tmp_path: Path) -> None:
    assert reason(tmp_path) is None
    stopping.ask(tmp_path, RESIZE)
    assert reason(tmp_path) == "preempted"
    stopping.ask(tmp_path)
    assert reason(tmp_path) == "stop"
    stopping.take_back(tmp_path, STOP)
    stopping.take_back(tmp_path, RESIZE)
    assert reason(tmp_path) is None


def test_asking_takes_microseconds(tmp_path: Path) -> None:
    began = time.process_time()
    for _ in range(1000):
        reason(tmp_path)
    assert time.process_time() - began < 0.05


def test_the_first_sigterm_of_a_process_that_trains_is_a_notice_and_the_second_ends_it(listener: Listener) -> None:
    assert listener.go_on() == "None"
    listener.process.send_signal(signal.SIGTERM)
    assert listener.go_on() == "preempted"
    listener.process.send_signal(signal.SIGTERM)
    assert listener.process.wait(30) == 128 + signal.SIGTERM


def test_a_process_that_does_not_train_ends_by_sigterm(listener: Listener) -> None:
    listener.process.send_signal(signal.SIGTERM)
    assert listener.process.wait(30) == 128 + signal.SIGTERM


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / HUNG).read_text().splitlines()] if (out / HUNG).exists() else []


def until(true: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()


def test_training_that_stands_still_is_said_once_and_again_after_it_has_moved(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 3, 0.2, fatal=False)
    until(lambda: lines(tmp_path))
    time.sleep(0.5)
    (line,) = lines(tmp_path)
    assert (line["rank"], line["pid"]) == (3, os.getpid())
    assert line["seconds"] >= 0.2  # type: ignore[operator]
    assert str(line["where"]).startswith(f"{__file__}:")
    watchdog.beat()
    until(lambda: len(lines(tmp_path)) == 2)
    watchdog.close()


def test_training_that_moves_or_may_take_its_time_is_let_be(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 0, 1.0, fatal=False)
    for _ in range(30):
        watchdog.beat()
        time.sleep(0.05)
    with watchdog.paused():
        time.sleep(1.5)
    watchdog.close()
    assert lines(tmp_path) == []


def test_a_worker_that_hangs_ends_itself(tmp_path: Path) -> None:
    hanging = f"""
import time
from pathlib import Path
from dlopt.train.watch.watchdog import Watchdog
Watchdog(Path({str(tmp_path)!r}), 1, 0.2, fatal=True)
time.sleep(60)
"""
    assert subprocess.run([sys.executable, "-c", hanging], cwd=ROOT, timeout=50).returncode == EXIT_CODE
    (line,) = lines(tmp_path)
    assert line["rank"] == 1


def test_where_it_hangs_is_the_innermost_line_of_ours_or_the_users() -> None:
    found: list[str] = []

    class Late:
        def __lt__(self, other: object) -> bool:
            found.append(whereabouts(sys._getframe()))
            return True

    min([Late(), Late()])
    assert found[0].startswith(f"{__file__}:") and found[0].endswith(" in __lt__")
    assert json.dumps(found[0])
    assert whereabouts(None) == "nowhere: its thread has ended"
