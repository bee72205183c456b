"""metrics.jsonl: what training says of itself, an object a line. Worker 0 writes it, everyone else reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlopt.artifact import write_atomically

NAME = "metrics.jsonl"


class MetricsLog:
    """Appends to a run's metrics.jsonl; lines of epochs after `epoch`, which a crash has undone, are taken out first."""

    def __init__(self, folder: Path, epoch: int) -> None:
        path = folder / NAME
        kept = [line for line in read(path) if line["epoch"] <= epoch]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(path, "a")  # noqa: SIM115 - open for as long as training runs

    def write(self, **line: Any) -> None:
        """Add a line; a number that is not finite, which JSON does not have, becomes null."""
        self.file.write(json.dumps(_finite(line), allow_nan=False) + "\n")

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, be it still written to; none when there is no such file."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return  # half a line, at the end of a file whose writer was killed or is at work
