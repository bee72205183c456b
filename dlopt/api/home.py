"""Where runs and what belongs to them are kept."""

from __future__ import annotations

import os
from pathlib import Path

from dlopt.part import DloptError
from dlopt.remote import home_path


def home_of(home: str | Path | None) -> Path:
    """The folder of runs: what is given, else $DLOPT_HOME, else `runs`. Raises DloptError for what is no path."""
    if home is not None and not isinstance(home, (str, os.PathLike)):
        raise DloptError(f"home: must be a path, not {type(home).__name__}")
    return home_path(home or os.environ.get("DLOPT_HOME") or "runs")
