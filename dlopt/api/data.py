"""What a program hands over, as a source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dlopt.data.sources import Source, from_data
from dlopt.data.stats.guess import source_of
from dlopt.disk import HELD
from dlopt.part import DloptError, Part


def home_of(home: str | Path | None) -> Path:
    """The folder of runs: what is given, else $DLOPT_HOME, else `runs`. Raises DloptError for what is no path."""
    if home is not None and not isinstance(home, (str, os.PathLike)):
        raise DloptError(f"home: must be a path, not {type(home).__name__}")
    return Path(home or os.environ.get("DLOPT_HOME") or "runs").expanduser()


def source_from(data: Any, home: str | Path | None) -> Source:
    """A source of a path or an address in words, of what is one already, or of a table in memory, which is written into the home.
    Raises DloptError."""
    if isinstance(data, (str, Path)):
        return source_of(str(data))
    if isinstance(data, Part) and hasattr(data, "peek"):
        return data  # type: ignore[return-value]
    return from_data(data, home_of(home) / HELD)
