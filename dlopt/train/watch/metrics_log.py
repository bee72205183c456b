"""metrics.jsonl and health.jsonl, which follow from the job alone, and speed.jsonl, which does not: what training says of itself, an
object a line. Worker 0 writes them, everyone else reads them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dlopt.artifact import write_atomically, writing

NAME, HEALTH, SPEED, STARTS = "metrics.jsonl", "health.jsonl", "speed.jsonl", "starts.jsonl"
LAYERS, RANGE = "layers.json", "range.json"
"""Beside them: the spread of weights and activations before the first step, and what a range test has seen, each one object."""
WRITTEN = (NAME, HEALTH, SPEED, STARTS, LAYERS, RANGE, "hung.jsonl")
"""All that workers write while they train."""


class MetricsWriter:
    """Appends to a run's metrics.jsonl, or another file of its kind. Lines of steps after `step`, and of ends of epochs after `epoch`,
    which a crash has undone, are taken out first."""

    def __init__(self, folder: Path, epoch: int, step: int, name: str = NAME) -> None:
        self.path = folder / name
        self._open(epoch, step)

    def _open(self, epoch: int, step: int) -> None:
        kept = [line for line in read(self.path) if line["step"] <= step and ("train" not in line or line["epoch"] <= epoch)]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(self.path, "a")  # noqa: SIM115 - open for as long as training runs

    def undo(self, epoch: int, step: int) -> None:
        """Take out the lines of steps after `step`, and of ends of epochs after `epoch`."""
        self.file.close()
        self._open(epoch, step)

    def write(self, **line: Any) -> None:
        """Add a line; a number that is not finite, which JSON does not have, becomes null."""
        with writing(self.path):
            self.file.write(json.dumps(_finite(line), allow_nan=False) + "\n")

    def flush(self) -> None:
        with writing(self.path):
            self.file.flush()

    def close(self) -> None:
        with writing(self.path):
            self.file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, be it still written to; none when there is no such file."""
    yield from MetricsReader(path).new()


class MetricsReader:
    """Follows a metrics.jsonl that another process writes, reading each line once."""

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.offset = path, 0, 0

    def new(self) -> list[dict[str, Any]]:
        """The whole lines since the last call; from the first one on again when a restart has replaced the file."""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self.file or status.st_size < self.offset:
                    self.file, self.offset = status.st_ino, 0
                file.seek(self.offset)
                return list(self._lines(file))
        except FileNotFoundError:
            return []

    def _lines(self, file: BinaryIO) -> Iterator[dict[str, Any]]:
        for line in file:
            try:
                values = json.loads(line)
            except ValueError:
                return  # half a line, at the end of a file whose writer was killed or is at work
            self.offset += len(line)
            yield values
