"""Runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dlopt.api.home import home_of
from dlopt.api.page import Page
from dlopt.api.running import Run
from dlopt.part import DloptError
from dlopt.runs import find


def compare(runs: Sequence[Run | str | Path], output: str | Path = "compare.html", *, home: str | Path | None = None) -> Page:
    """A page with 2 to 6 runs side by side, written to `output` and shown in notebooks.

    runs: what `dlopt.run` gave, folders of runs, or names of jobs for their newest run in `home`. Raises DloptError.
    """
    from dlopt.report import compare as side_by_side

    if isinstance(runs, (str, Path, Mapping)) or not isinstance(runs, Sequence):
        raise DloptError(f"compare: runs: give a list of 2 to 6 runs, not {str(runs)[:60]!r}")
    folders = [one.folder if isinstance(one, Run) else find(str(one), home_of(home)) for one in runs]
    side_by_side.write(Path(output), folders)
    return Page(Path(output))
