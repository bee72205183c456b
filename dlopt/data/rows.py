"""The rows of a job's sources, read, judged, decoded and sorted by their keys: the first half of prepare, which all folds of a
cross-validation share.

Reads a block at a time: rules, decoding, and pieces of rows in the order of their keys (table/spill.py), which are put together by ranges
of keys (table/ranges.py).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dlopt import remote
from dlopt.artifact import Artifact, Stage, write_atomically
from dlopt.data.clean import ExactDuplicates, Outliers
from dlopt.data.count import most_rows
from dlopt.data.kinds.targets import MOST_LABELS
from dlopt.data.section import Data
from dlopt.data.sources import Source
from dlopt.data.table import passes
from dlopt.data.table.account import bad_rows, refuse_bad, too_bad
from dlopt.data.table.over import Clock, Ranges, on_cluster
from dlopt.data.table.plan import Origin, Plan
from dlopt.data.table.ranges import Run, in_ranges
from dlopt.data.table.spill import TARGET, Read, Spill, from_json
from dlopt.data.types.canonical import MISSING
from dlopt.data.types.columns import Columns
from dlopt.data.types.exact import offsets_of, raw_values
from dlopt.part import DloptError, Feature, Signature, Target
from dlopt.progress import BLOCK, Progress, silent
from dlopt.session import data_context

PART_BYTES = 64 * 2**20
"""About how many bytes of encoded rows and of their texts one range has; their number follows from the rows, not from the cluster."""
PEEK_ROWS = 64
SPILL, QUARANTINE, PLAN = "spill", "quarantine", "plan.json"
SAY_SECONDS = 2.0
"""How often the first pass, which does not know how many rows there are, says how many it has read."""
PATH = "path"
"""The column of a source of single files, which is kept so that rows that are set aside can be found again."""
VERSION = 3
"""Of what is read of rows: raised when the same section would now give others."""


def rows(section: Data, out: Path, *, progress: Progress = silent) -> dict[str, Any]:
    """Fill `out` with spill/, a file of sorted rows a range of keys, quarantine/ and plan.json, which `sorted_rows` reads; returns the
    seconds of reading and sorting."""
    clock = Clock()
    plan, read = plan_of_rows(section, out, clock, progress)
    ranges = [Path(path) for path in plan.ranges]
    remote.take(*ranges)
    for file in (out / SPILL).iterdir():
        if file not in ranges:
            file.unlink()
    known = {
        "features": [feature.model_dump(mode="json") for feature in plan.features],
        "target": plan.target.model_dump(mode="json"),
        "power": plan.power,
        "ranges": [path.name for path in ranges],
        "warnings": plan.warnings,
        "read": {name: said.as_json() for name, said in read.items()},
    }
    write_atomically(out / PLAN, json.dumps(known))
    return {"seconds": clock.seconds}


ROWS = Stage("rows", rows, version=VERSION)


def sorted_rows(section: Data, artifact: Artifact, out: Path) -> tuple[Plan, dict[str, Read]]:
    """What `rows` has left, for a section that differs in its fold alone; rows that were set aside are in `out`, too.
    Raises DloptError when a file is not as it was sealed."""
    known = json.loads(artifact.read(PLAN))
    read = {name: Read.from_json(said) for name, said in known["read"].items()}
    for name in artifact.manifest.files:
        if Path(name).parts[0] == QUARANTINE:
            (out / QUARANTINE).mkdir(parents=True, exist_ok=True)
            _linked(artifact.check(name), out / name)
    features = tuple(Feature.model_validate(feature) for feature in known["features"])
    ranges = tuple(str(artifact.check(f"{SPILL}/{name}")) for name in known["ranges"])
    target, warnings = Target.model_validate(known["target"]), tuple(known["warnings"])
    return Plan(section, section.inputs, features, target, _origins(read), known["power"], ranges, warnings=warnings), read


def _linked(file: Path, to: Path) -> None:
    """The same file under another name, or a copy on a disk that knows no links."""
    with suppress(FileExistsError):
        try:
            os.link(file, to)
        except OSError:
            shutil.copyfile(file, to)


def plan_of_rows(section: Data, out: Path, clock: Clock, progress: Progress = silent) -> tuple[Plan, dict[str, Read]]:
    """Read and sort the rows of all sources on Ray into `out`/spill, and set those aside that cannot be read; a plan that knows the ranges'
    files, and what there is to say of the rows of each source. Raises DloptError where more are bad than the section allows."""
    data_context(preserve_order=True, reserve=False)
    said = list(meanings(section))
    features, whole = look(section, said, progress)
    folder = str(out / SPILL)
    spills = {name: Spill(section, features, whole, folder, meaning) for name, meaning in zip(sources(section), said, strict=True)}
    progress("prepare", None, "reading")
    read = read_sources(section, spills, out / QUARANTINE, progress)
    clock.lap("read")
    plan = sort_pieces(section, features, read, out, on_cluster, progress)
    clock.lap("sort")
    return plan, read


def sort_pieces(
    section: Data, features: tuple[Feature, ...], read: dict[str, Read], out: Path, run: Run, progress: Progress = silent
) -> Plan:
    """Put pieces in `out`/spill together by ranges. run: works on tasks, wherever that may be."""
    refuse_bad(section, read, _keep_quarantine(read, out / QUARANTINE))
    plan = first_plan(section, features, read)
    return in_files(plan, read, out / SPILL, Ranges(plan.power, run, progress))


def peek(section: Data) -> Signature:
    """The model's inputs and outputs as far as the first rows tell, without Ray: vocabularies are empty, and classes stand-ins.
    Raises DloptError on missing files and columns."""
    features, _ = look(section, list(meanings(section)))
    return Signature(inputs=features, target=section.target.stand_in())


def sources(section: Data) -> dict[str, Source]:
    """Where rows come from: the main source, and those that are for one split alone."""
    given = {"source": section.source, "validation": section.validation, "test": section.test}
    return {name: source for name, source in given.items() if source is not None}


def look(section: Data, said: Sequence[Columns], progress: Progress = silent) -> tuple[tuple[Feature, ...], bool]:
    """The model's inputs, and whether the classes are whole numbers. What the first rows decide is said. said: what the columns of each
    source mean."""
    looks = [_first_rows(section, name, source, meaning) for (name, source), meaning in zip(sources(section).items(), said, strict=True)]
    first = looks[0]
    for clean in section.clean:
        if isinstance(clean, ExactDuplicates):
            clean.refuse_unsortable(first)
    _refuse_foreign_outliers(section)
    features = tuple(part.meant(part.feature(first), said[0]) for part in section.inputs)
    for name, source in sources(section).items() if progress is not silent else ():
        if left_out := source.left_out():
            progress("prepare", None, f"{BLOCK}data.{name}: {left_out}")
    for part in section.inputs:
        if decided := part.decided(first):
            progress("prepare", None, BLOCK + decided)
    return features, section.target.whole(first)


def meanings(section: Data) -> Iterator[Columns]:
    """What the columns of each source mean: the types are those of `data.source`, whatever the files of another look like, and so are
    the texts of missing values unless it names its own. Raises DloptError where one states another type."""
    with _naming("source"):
        main = section.source.meaning()
    types = main.types
    for name, source in sources(section).items():
        stated, missing = source.stated()
        with _naming(name):
            if stated and source is not section.source:
                source.meaning()  # which says whether it has these columns
        for column, kind in stated.items():
            if types.get(column, kind) != kind:
                raise DloptError(f"data.{name}.types: {column!r} is {kind}, and {types[column]} in data.source: state one type in both")
        yield Columns(types, main.missing if missing == MISSING else missing)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """What is wrong with a source begins with its name."""
    try:
        yield
    except DloptError as error:
        raise DloptError(f"data.{name}: {error}") from None


def _first_rows(section: Data, name: str, source: Source, meaning: Columns) -> pa.Table:
    with _naming(name):
        table = source.peek(PEEK_ROWS, meaning)
    there = set(table.column_names)
    for column in section.columns:
        if column not in there:
            raise DloptError(f"data.{name}: has no column {column!r}; its columns are {', '.join(table.column_names)}")
    if len(table) == 0:
        raise DloptError(f"data.{name}: is empty")
    return table


def read_sources(section: Data, spills: dict[str, Spill], quarantine: Path, progress: Progress) -> dict[str, Read]:
    """The first pass over all sources; only what is said of their pieces comes back. Ends as soon as it is certain that more rows are bad
    than the job allows."""
    read: dict[str, Read] = {}
    given = sources(section)
    known = [most_rows(source) for source in given.values()]
    most = np.inf if None in known else sum(filter(None, known))
    said = time.monotonic()
    for name, source in given.items():
        read[name] = Read()
        hopeless = False
        with _saying(f"data.{name}"):
            for row in source.read([*section.columns, PATH]).map_batches(spills[name], batch_format="pyarrow", batch_size=None).iter_rows():
                read[name].add(from_json(row["piece"]))
                rows = sum(some.read for some in read.values())
                bad = bad_rows(read)
                if hopeless := (bad > section.most_bad * most and rows < most) or len(read[name].labels) > MOST_LABELS:
                    break
                if time.monotonic() - said > SAY_SECONDS:
                    said = time.monotonic()
                    progress("prepare", None, f"data.{name}: {read[name].read:,} rows read")
        if hopeless:
            if len(read[name].labels) > MOST_LABELS:
                section.target.target(read[name].labels)  # which says so
            _keep_quarantine(read, quarantine)
            raise too_bad(section, read, quarantine, f"{bad:,} of the first {rows:,} rows, of at most {most:,}, cannot be read (")
        if not read[name].read:
            raise DloptError(f"data.{name}: is empty")
    return read


def _keep_quarantine(read: dict[str, Read], folder: Path) -> Path:
    """Move what the first pass has set aside to where it stays."""
    for name, said in read.items():
        for number, path in enumerate(said.quarantine):
            folder.mkdir(parents=True, exist_ok=True)
            remote.take(Path(path))
            Path(path).rename(folder / f"{name}-{number:05d}.parquet")
    return folder


def first_plan(section: Data, features: tuple[Feature, ...], read: dict[str, Read]) -> Plan:
    target = section.target.target(read["source"].labels)
    for name, said in read.items():
        strangers = set(said.labels) - set(target.labels)
        if strangers:
            raise DloptError(
                f"data.{name}: label {min(strangers)!r} is not in data.source, so it cannot be learned: drop it or add rows of it"
            )
    row_bytes = sum(feature.size * np.dtype(feature.stored).itemsize for feature in features) + 8
    size = sum(said.rows * row_bytes + said.text_bytes for said in read.values())
    return Plan(section, section.inputs, features, target, _origins(read), (size // PART_BYTES).bit_length())


def _origins(read: dict[str, Read]) -> tuple[Origin, ...]:
    forced = {"source": None, "validation": "validation", "test": "test"}
    return tuple(Origin(f"data.{name}", forced[name]) for name in read)


def in_files(plan: Plan, read: dict[str, Read], spill: Path, over: Ranges) -> Plan:
    """With a file of each range, in place of the pieces."""
    pieces = [(path, place) for place, said in enumerate(read.values()) for path in said.pieces]
    over.progress("prepare", None, "sorting")
    plan = replace(plan, ranges=tuple(in_ranges(pieces, plan.power, spill, over.run)))
    for path, _ in pieces:
        remote.unlink(Path(path))
    return _with_offsets(plan, read["source"].rows)


def _with_offsets(plan: Plan, rows: int) -> Plan:
    """Inputs and target with what is to be subtracted from their numbers, by a sample of the rows of data.source, of which there are so
    many, those whose keys are the least; and a line for each column of which nothing can be, though float32 does not tell its values
    apart."""
    section, target = plan.section, plan.target
    sizes = {feature.name: feature.size for feature in plan.features if feature.holds == "numbers"}
    sizes |= {TARGET: target.size} if target.columns else {}
    sample = passes.least_keys(plan, sizes, rows)
    if sample is None:
        return plan
    offsets = {name: offsets_of(raw_values(sample[name], size)) for name, size in sizes.items()}
    changed, lines = list(plan.features), list[str]()
    for place, (part, feature) in enumerate(zip(section.inputs, plan.features, strict=True)):
        found = offsets.get(feature.name, ())
        if found and part.shifts:
            changed[place] = feature.model_copy(update={"offsets": found, "dtype": "float64"})
        elif found:
            lines += [
                f"{name}: lies about {offset:.6g}, where float32 cannot tell apart what is close together, and `normalize: "
                f"{getattr(part, 'normalize', 'none')}` keeps it there: use standard"
                for name, offset in zip(part.names(feature), found, strict=True)
                if offset
            ]
    target = target.model_copy(update={"offsets": offsets.get(TARGET, ())})
    return replace(plan, features=tuple(changed), target=target, warnings=tuple(lines))


def _refuse_foreign_outliers(section: Data) -> None:
    numbers = {column for part in section.inputs for column in part.bounded}
    for place, clean in enumerate(section.clean):
        for column in clean.columns if isinstance(clean, Outliers) else ():
            if column not in numbers:
                raise DloptError(f"data.clean.{place}: outliers are looked for in number inputs, and {column!r} is in none")


@contextmanager
def _saying(where: str) -> Iterator[None]:
    """A file that Ray cannot read is the user's to mend, so it is said in one line."""
    try:
        yield
    except (DloptError, OSError, ValueError) as error:  # Ray's errors are of their cause's class as well
        lines = str(getattr(error, "cause", error)).splitlines()
        place = [line.split(" after ")[0] for line in lines[1:2] if line.startswith("Failed to read")]
        raise DloptError(f"{where}: {'; '.join([*lines[:1], *place])}") from None
