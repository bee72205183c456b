"""A whole job from data and the name of what to predict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlopt.api.data import source_from
from dlopt.artifact import write_atomically
from dlopt.data.stats import begin as beginning
from dlopt.docstrings import json_schema
from dlopt.part import DloptError
from dlopt.spec import Job, validated


@dataclass(frozen=True)
class Begun:
    """A job that runs as it is: `job` is what `dlopt.run` takes, `text` the same as YAML with remarks."""

    job: Job
    text: str

    def write(self, path: str | Path, force: bool = False) -> None:
        """Write the text, and the schema that its first line names beside it. Raises DloptError when a file is there."""
        path = Path(path)
        if path.exists() and not force:
            raise DloptError(f"{path}: is there already: give another name, or --force writes over it")
        try:
            write_atomically(path.parent / beginning.SCHEMA, json.dumps(json_schema(Job), indent=1))
            write_atomically(path, self.text)
        except OSError as error:
            raise DloptError(f"{path}: cannot be written: {error.strerror or error}") from None


def begin(
    data: Any, target: str | Sequence[str] = (), *, name: str | None = None, rows: int | None = None, home: str | Path | None = None
) -> Begun:
    """A job for some data, from their first rows and without Ray: what columns are, which are left out, a model that takes them all.

    data: as `dlopt.profile` takes it. target: the column to predict, or several columns of numbers; of folders CLASS/FILE it may be
    left out. rows: so many are looked at (20,000). Raises DloptError when there is nothing to learn in them.
    """
    source = source_from(data, home)
    targets = [target] if isinstance(target, str) else list(target)
    if not targets:
        if not isinstance(source, beginning.FOLDERS):
            raise DloptError(f"--target: name the column to predict; the columns are {', '.join(source.peek(1).column_names)}")
        targets = ["label"]
    begun = beginning.begin(source, targets, name, rows or beginning.ROWS)
    return Begun(validated(begun.job), begun.text)
