"""Bodies of requests within limits of size and time, and compression both ways."""

from __future__ import annotations

import asyncio
import gzip
import types
import zlib
from collections.abc import Awaitable, Callable, Generator, Mapping, MutableMapping
from typing import Any

from dlopt.serve.exchange import Refusal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
ENCODINGS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
"""What a body may be compressed with, and zlib's word for it."""
WORTH_IT, LEVEL = 4096, 1
"""Replies of fewer bytes are not compressed, and larger ones quickly."""


class ClientGone(Exception):
    """The client hung up before its request was whole."""


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, max_bytes: int, seconds: float) -> bytes:
    """A request's body, decompressed, of at most so many bytes either way. Raises Refusal or ClientGone."""
    limit_of(headers, max_bytes)
    message = await _first(receive, seconds)
    if message.get("more_body", False):
        body = await _rest(message, receive, max_bytes, seconds)
    else:
        body = message.get("body", b"")
    if len(body) > max_bytes:
        raise too_large(max_bytes)
    return await unpacked(headers, body, max_bytes)


def limit_of(headers: Mapping[bytes, bytes], max_bytes: int) -> None:
    """What a request's head says of its body. Raises Refusal when that is not taken."""
    encoding = _encoding(headers)
    if encoding not in (b"identity", b"") and encoding not in ENCODINGS:
        raise Refusal(415, f"Content-Encoding: {encoding.decode('latin-1')[:50]}: send gzip, deflate or identity")
    if (length := headers.get(b"content-length")) and int(length) > max_bytes:  # the server has refused what is no number
        raise too_large(max_bytes)


async def unpacked(headers: Mapping[bytes, bytes], body: bytes, max_bytes: int) -> bytes:
    """A body, decompressed. Raises Refusal."""
    encoding = _encoding(headers)
    return body if encoding not in ENCODINGS else await asyncio.to_thread(_decompressed, body, ENCODINGS[encoding], max_bytes)


def _encoding(headers: Mapping[bytes, bytes]) -> bytes:
    return headers.get(b"content-encoding", b"identity").strip().lower()


async def _first(receive: Receive, seconds: float) -> Message:
    """The first part of a body, in most requests all of it, and there already: then no clock is needed."""
    receiving = receive()
    try:
        waits_for = receiving.send(None)  # type: ignore[attr-defined]
    except StopIteration as there:
        message = there.value
    else:
        try:
            async with asyncio.timeout(seconds):
                message = await _going_on(receiving, waits_for)
        except TimeoutError:
            raise late(seconds) from None
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message


@types.coroutine
def _going_on(begun: Any, waits_for: Any) -> Generator[Any, Any, Message]:
    """Await a coroutine that has been begun, and waits for something."""
    try:
        while True:
            try:
                given = yield waits_for
            except BaseException as error:
                waits_for = begun.throw(error)
            else:
                waits_for = begun.send(given)
    except StopIteration as done:
        return done.value


async def _rest(message: Message, receive: Receive, max_bytes: int, seconds: float) -> bytes:
    chunks, size = [message.get("body", b"")], len(message.get("body", b""))
    try:
        async with asyncio.timeout(seconds):
            while message.get("more_body", False):
                if size > max_bytes:
                    raise too_large(max_bytes)
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
    except TimeoutError:
        raise late(seconds) from None
    return b"".join(chunks)


def _decompressed(body: bytes, window: int, max_bytes: int) -> bytes:
    """Raises Refusal, before more than the limit is there."""
    try:
        found = _inflated(body, window, max_bytes)
    except zlib.error as error:
        if window != ENCODINGS[b"deflate"]:
            raise Refusal(400, f"Content-Encoding: the body is not compressed as it says: {error}") from None
        return _decompressed(body, -15, max_bytes)  # some call deflate what has no header
    if len(found) > max_bytes:
        raise too_large(max_bytes)
    return found


def _inflated(body: bytes, window: int, max_bytes: int) -> bytes:
    """All members of a compressed body, of which gzip may have several; at most one byte too many. Raises zlib.error."""
    parts: list[bytes] = []
    left = max_bytes + 1
    while body and left > 0:
        member = zlib.decompressobj(window)
        parts.append(member.decompress(body, left))
        left -= len(parts[-1])
        if left > 0 and not member.eof:
            raise zlib.error("it ends in the middle")
        body = member.unused_data if window == ENCODINGS[b"gzip"] else b""
    return b"".join(parts)


def compressed(body: bytes, accepts: bytes) -> tuple[bytes, bytes]:
    """A reply's body as the client takes it, and its Content-Encoding, b"" for none."""
    if len(body) < WORTH_IT or not accepts:
        return body, b""
    for name in accepts.lower().split(b","):
        word, _, quality = name.partition(b";")
        if quality.strip().replace(b" ", b"") in (b"q=0", b"q=0.0", b"q=0.00", b"q=0.000"):
            continue
        if word.strip() == b"gzip":
            return gzip.compress(body, LEVEL, mtime=0), b"gzip"
        if word.strip() == b"deflate":
            return zlib.compress(body, LEVEL), b"deflate"
    return body, b""


def too_large(max_bytes: int) -> Refusal:
    """What a client hears whose body is too large, compressed or not."""
    return Refusal(413, f"the body has more than {max_bytes:,} bytes (serve.max_bytes)", "size")


def late(seconds: float) -> Refusal:
    """What a client hears that takes too long."""
    return Refusal(408, f"the body did not arrive within {seconds:g} seconds", "slow")
