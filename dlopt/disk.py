"""What takes room in a home and is needed no more. Runs name artifacts, artifacts name their parents; what neither reaches can go.
Imports neither torch nor Ray."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dlopt.artifact import MANIFEST, discard, is_locked
from dlopt.part import DloptError
from dlopt.remote import remote_of
from dlopt.runs import RUN, STAGES, find, listing, read

HELD = "sources"
"""The folder of tables that Python programs have handed over."""


class Item(NamedTuple):
    """Something that can go."""

    path: Path
    why: str


def of_runs(home: Path, names: Sequence[str]) -> list[Item]:
    """These runs' folders, and the artifacts that no other run needs. Raises DloptError for a name that is no run."""
    home = _quiet(home)
    going = [(home / name if (home / name / RUN).is_file() else find(name, home)).resolve() for name in names]
    kept = _needed(home, [Path(record["run"]).resolve() for record in listing(home)], without=going)
    alone = [path for path in sorted(_needed(home, going)) if path not in kept and path.exists()]
    return [
        *(Item(path, "the run") for path in dict.fromkeys(going)),
        *(Item(path, _why(path, "that no other run needs")) for path in alone),
    ]


def unneeded(home: Path) -> list[Item]:
    """Artifacts, finished or not, and handed-over tables that no run of the home needs."""
    home = _quiet(home)
    kept = _needed(home, [Path(record["run"]).resolve() for record in listing(home)])
    found = [path for stage in STAGES for path in sorted((home / stage).glob("*")) if path.is_dir() and path not in kept]
    tables = [path for path in sorted((home / HELD).glob("*.parquet")) if path not in kept]
    return [Item(path, _why(path, "that no run needs")) for path in [*found, *tables]]


def _quiet(home: Path) -> Path:
    """A home that is there, and in which nothing is made now: what is made names its parents only when it is finished."""
    home = home.resolve()
    if found := remote_of(home):
        raise DloptError(f"--home: {found.address}: nothing is removed in an object store: let its own rules do that")
    if not home.is_dir():
        raise DloptError(f"--home: there is no folder {home}")
    for stage in STAGES:
        for lock in (home / stage).glob(".*.lock"):
            if is_locked(lock):
                raise DloptError(f"{home}: a dlopt process makes {stage}/{lock.name[1:-5]} now: wait for it, or stop it")
    return home


def _why(path: Path, which: str) -> str:
    if path.is_file():
        return f"a table from Python {which}"
    unfinished = "" if (path / MANIFEST).is_file() else "an unfinished "
    return f"{unfinished or 'the '}{path.parent.name} {which}"


def _needed(home: Path, folders: Iterable[Path], without: Sequence[Path] = ()) -> set[Path]:
    """What runs name, with the parents of it, and the tables that data were made of."""
    todo: list[Path] = []
    for folder in folders:
        if folder not in without:
            record = read(folder)
            places = [*record["artifacts"].values(), *(fold["model"] for fold in record.get("folds", ()))]
            todo += [(folder / place).resolve() for place in places]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        manifest = _manifest(path)
        todo += [home / stage / digest for stage, digest in manifest.get("parents", {}).items()]
        for name in ("source", "validation", "test"):
            given = (manifest.get("section", {}).get(name) or {}).get("path") if path.parent.name == "data" else None
            found |= {Path(file) for file in ([given] if isinstance(given, str) else given or ()) if Path(file).parent == home / HELD}
    return found


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remove(item: Item) -> None:
    """Raises DloptError when another process makes it now."""
    if item.path.is_file():
        item.path.unlink()
    elif item.path.parent.name in STAGES:
        discard(item.path)
    else:
        shutil.rmtree(item.path)


def size(path: Path) -> int:
    """Bytes of a file or of all files of a folder; links count nothing."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    return sum(file.stat().st_size for file in files)


def written(taken: int) -> str:
    """1.5 MB of so many bytes."""
    if taken < 1000:
        return f"{taken} B"
    power = min(4, (len(str(taken)) - 1) // 3)
    return f"{taken / 1000**power:.1f} {'kMGT'[power - 1]}B"
