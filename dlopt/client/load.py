"""Load on a server, and what came of it: requests a second, how long they took, and what went wrong."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from dlopt.part import DloptError

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
PERCENTILES = (50, 95, 99)
Seen = Callable[[int, bytes, bytes], None]
"""Is told of each reply its status, its head and its body."""


@dataclass
class Report:
    """What a stretch of load measured."""

    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    """Of each answer with status 200, in seconds."""
    errors: Counter[str] = field(default_factory=Counter)
    """How often each thing went wrong: a status, or why there was none."""

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.times) / self.seconds if self.seconds else 0.0

    def percentile(self, percent: float) -> float:
        """Milliseconds within which so many of a hundred were answered."""
        times = sorted(self.times)
        return 1e3 * times[min(len(times) - 1, int(len(times) * percent / 100))] if times else float("nan")

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {"requests": len(self.times), "seconds": round(self.seconds, 3), "per_s": round(self.rate, 1)}
        found |= {f"p{percent}_ms": round(self.percentile(percent), 3) if self.times else None for percent in PERCENTILES}
        return found | {"errors": dict(self.errors)}


@dataclass(frozen=True)
class Ask:
    """What is asked, over and over."""

    url: str
    body: bytes
    headers: Mapping[str, str]

    def bytes(self) -> bytes:
        """As it stands on the wire."""
        parts = urlsplit(self.url)
        lines = [f"POST {parts.path or '/'}{f'?{parts.query}' if parts.query else ''} HTTP/1.1", f"Host: {parts.netloc}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()] + [f"Content-Length: {len(self.body)}"]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + self.body


async def load(
    ask: Ask,
    *,
    connections: int,
    seconds: float,
    rate: float = 0.0,
    timeout: float = 30.0,
    seen: Seen | None = None,
    ended: Callable[[], bool] = lambda: False,
) -> Report:
    """Ask on so many connections that are kept.

    rate: requests a second of all of them together, sent when they are due whether others were answered or not, as long as a connection
    is free; 0 sends each as soon as the one before is answered. timeout: seconds until a request without an answer is one that failed.
    seen: is told of each answer. ended: says when it is enough before the time is over.
    """
    report, start = Report(), time.perf_counter()
    end, due = start + seconds, iter(range(10**12))

    async def one() -> None:
        wire = Wire(ask.url, timeout)
        request = ask.bytes()
        try:
            while True:
                if rate:
                    moment = start + next(due) / rate
                    await asyncio.sleep(max(0.0, moment - time.perf_counter()))
                sent = time.perf_counter()
                if sent >= end or ended():
                    return
                try:
                    status, head, body = await wire.exchange(request)
                except (TimeoutError, OSError, EOFError) as error:
                    report.errors[type(error).__name__] += 1
                    await asyncio.sleep(0.01)
                    continue
                if seen:
                    seen(status, head, body)
                if status == 200:
                    report.times.append(time.perf_counter() - sent)
                else:
                    report.errors[str(status)] += 1
        finally:
            wire.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    report.seconds = time.perf_counter() - start
    return report


class Wire:
    """A connection that is kept, and made anew when it has ended."""

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DloptError(f"{url}: is no address of a server: give http://HOST:PORT")
        self.host, self.port, self.timeout = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80), timeout
        self.context = ssl.create_default_context() if parts.scheme == "https" else None
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def exchange(self, request: bytes) -> tuple[int, bytes, bytes]:
        """Status, head and body of the answer. Raises OSError, EOFError or TimeoutError."""
        try:
            async with asyncio.timeout(self.timeout):
                return await self._exchange(request)
        except BaseException:
            self.close()
            raise

    async def _exchange(self, request: bytes) -> tuple[int, bytes, bytes]:
        if self.streams is None:
            self.streams = await asyncio.open_connection(self.host, self.port, ssl=self.context)
        reader, writer = self.streams
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = LENGTH.search(head)
        body = await reader.readexactly(int(length[1])) if length else b""
        if not length or CLOSES.search(head):
            self.close()
        return int(head[9:12]), head, body

    def close(self) -> None:
        """End it."""
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


def example(url: str, key: str | None, model: str | None) -> Ask:
    """A request that the server itself gives as an example. Raises DloptError."""
    from dlopt.client import Client

    client = Client(url, key, model=model, retries=0, timeout=10)
    path = f"/v1/models/{client.model}:predict"
    document = json.loads(client.send("GET", "/openapi.json").body)
    try:
        row = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
    except KeyError:
        raise DloptError(f"{url}: gives no example of a request to {client.model}: give one with --body FILE") from None
    headers = {"Content-Type": "application/json"} | dict(client.headers)
    return Ask(f"{url.rstrip('/')}{path}", json.dumps(row).encode(), headers)
