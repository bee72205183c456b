"""A line of JSON for each request, for whoever wants a log of them: `dlopt serve --access-log FILE`."""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from dlopt.part import DloptError
from dlopt.serve.exchange import Call

GIVEN = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
"""An identifier of a client's that is taken over; it goes into headers and into the log."""
_start, _numbers = secrets.token_hex(6), itertools.count(1)


def request_id(given: bytes | None) -> bytes:
    """What a request is called in replies and logs: as its client calls it, or else by a number of this process."""
    if given is not None and GIVEN.fullmatch(given):
        return given
    return b"%s-%x" % (_start.encode(), next(_numbers))


class Note(Protocol):
    """What is told of each request when it is answered."""

    def note(self, call: Call, protocol: str, status: int, seconds: float, size: int) -> None:
        """protocol: "" where none was found. size: of the answer, in bytes."""


class AccessLog:
    """Appends whole lines to a file, as several processes may at a time; "-" is stdout."""

    def __init__(self, path: Path) -> None:
        """Raises DloptError."""
        try:
            self.file = sys.stdout.fileno() if str(path) == "-" else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        except OSError as error:
            raise DloptError(f"--access-log: {path}: {error.strerror}") from None

    def note(self, call: Call, protocol: str, status: int, seconds: float, size: int) -> None:
        """One request. Keys are named, not shown."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": call.id.decode(),
            "method": call.method,
            "path": call.path[:500],
            "protocol": protocol,
            "status": status,
            "seconds": round(seconds, 6),
            "bytes": size,
            "key": call.who,
            "model": call.model.name if call.model else "",
            "version": call.model.version if call.model else "",
        }
        os.write(self.file, json.dumps(line).encode() + b"\n")
