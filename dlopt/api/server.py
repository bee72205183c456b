"""A model served beside a program: `dlopt serve` in a process of its own, so that it answers while the program computes."""

from __future__ import annotations

import atexit
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from dlopt.part import DloptError

SECONDS = 120.0
"""Until it must answer."""


class Server:
    """A model that answers at `url`; `with run.serve() as server:` stops it at the end."""

    def __init__(self, process: subprocess.Popen[str], url: str, page: str) -> None:
        self.process, self.url, self.page = process, url, page
        atexit.register(self.stop)

    def stop(self) -> None:
        """End it; does nothing when it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        atexit.unregister(self.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"Server({self.page!r})"

    def _repr_html_(self) -> str:
        return f'served at <a href="{self.page}" target="_blank">{self.page}</a>; <code>stop()</code> ends it'


def start(folder: Path, host: str, port: int) -> Server:
    """Serve a run's model on this machine; port 0 takes a free one. Returns when it answers. Raises DloptError when it does not start."""
    if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port < 65536:
        raise DloptError(f"serve: port: {port!r} is no port: give a number from 1 to 65535, or 0 for a free one")
    port = port or _free(host)
    words = [sys.executable, "-m", "dlopt", "serve", str(folder), "--host", host, "--port", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    url = f"http://{f'[{host}]' if ':' in host else '127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    server = Server(process, url, f"{url}/")
    deadline = time.monotonic() + SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with opener.open(f"{url}/readyz", timeout=5):
                return server
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    server.stop()
    said = (process.stdout.read() if process.stdout else "").strip().splitlines()
    raise DloptError(f"serve: {said[-1].removeprefix('dlopt: ') if said else f'no answer at {url} within {SECONDS:.0f} s'}")


def _free(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])
