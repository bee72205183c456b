"""What a program hands over, as a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlopt.api.home import home_of
from dlopt.data.sources import Source, from_data
from dlopt.data.stats.guess import source_of
from dlopt.disk import HELD
from dlopt.part import Part


def source_from(data: Any, home: str | Path | None) -> Source:
    """A source of a path or an address in words, of what is one already, or of a table in memory, which is written into the home.
    Raises DloptError."""
    if isinstance(data, (str, Path)):
        return source_of(str(data))
    if isinstance(data, Part) and hasattr(data, "peek"):
        return data  # type: ignore[return-value]
    return from_data(data, home_of(home) / HELD)
