"""The prepare stage: raw rows to clean, split, encoded rows and statistics of the training split, on Ray Data.

The first pass reads the source, a block at a time: rules, decoding, and pieces of rows in the order of their keys (spill.py), which are
put together by ranges of keys (ranges.py). What is then decided about rows is a plan (plan.py). The later passes go over the ranges
(passes.py): look for duplicates where they need all rows, for where to cut, for outliers; observe the training rows, all columns in one
pass; and write. Keys alone decide where a row goes, so the artifact does not depend on files, blocks or workers; and a process holds a
block or a range at a time, but for tasks that compare rows: of all sketches of near-duplicates, or of BUCKET_ROWS rows by chosen columns.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dlopt import remote
from dlopt.artifact import Stage, write_atomically
from dlopt.data.clean import DropColumns, ExactDuplicates, NearDuplicates, Outliers
from dlopt.data.count import most_rows
from dlopt.data.kinds.base import Bound
from dlopt.data.kinds.number import QUARTILES, in_units
from dlopt.data.kinds.targets import MOST_LABELS
from dlopt.data.section import Data
from dlopt.data.sources import Source
from dlopt.data.stats import guard
from dlopt.data.stats.describe import describe
from dlopt.data.stats.pairwise import merged
from dlopt.data.table import passes
from dlopt.data.table.account import account, bad_rows, refuse_bad, refuse_dropped, refuse_unlearnable, too_bad
from dlopt.data.table.passes import Observed
from dlopt.data.table.plan import Origin, Plan
from dlopt.data.table.ranges import Run, in_ranges
from dlopt.data.table.spill import TARGET, Read, Spill, from_json, is_local, open_rows
from dlopt.data.table.split import GivenSplit, StratifiedSplit, TimeSplit, cut
from dlopt.data.types.canonical import MISSING
from dlopt.data.types.columns import Columns
from dlopt.data.types.exact import offsets_of, raw_values
from dlopt.part import DloptError, Feature, Signature, Statistics
from dlopt.progress import BLOCK, Progress, silent
from dlopt.session import data_context

PART_BYTES = 64 * 2**20
"""About how many bytes of encoded rows and of their texts one range has; their number follows from the rows, not from the cluster."""
BUCKET_ROWS = 2**22
"""About how many rows are compared by one task when duplicates are looked for among all of them."""
PEEK_ROWS = 64
SPILL = "spill"
SAY_SECONDS = 2.0
"""How often the first pass, which does not know how many rows there are, says how many it has read."""
PATH = "path"
"""The column of a source of single files, which is kept so that rows that are set aside can be found again."""


def peek(section: Data) -> Signature:
    """The model's inputs and outputs as far as the first rows tell, without Ray: vocabularies are empty, and classes stand-ins.
    Raises DloptError on missing files and columns."""
    features, _ = _look(section, list(meanings(section)))
    return Signature(inputs=features, target=section.target.stand_in())


def prepare(section: Data, out: Path, *, progress: Progress = silent) -> dict[str, Any]:
    """Fill `out` with train/, validation/, test/ and quarantine/ parquet, signature.json, statistics.json and, if it is
    asked for, profile.json; returns the counts."""
    data_context(preserve_order=True, reserve=False)
    clock, spill = _Clock(), out / SPILL
    said = list(meanings(section))
    features, whole = _look(section, said, progress)
    spills = {name: Spill(section, features, whole, str(spill), meaning) for name, meaning in zip(sources(section), said, strict=True)}
    progress("prepare", None, "reading")
    try:
        read = _read(section, spills, out / "quarantine", progress)
        clock.lap("read")
        info = arrange(section, features, read, out, run=on_cluster, progress=progress)
    finally:
        shutil.rmtree(spill, ignore_errors=True)
        remote.drop_spread(spill)
    return info | {"seconds": clock.seconds | info["seconds"]}


def arrange(
    section: Data, features: tuple[Feature, ...], read: dict[str, Read], out: Path, *, run: Run, progress: Progress = silent
) -> dict[str, Any]:
    """All that follows when the rows lie in pieces, in `out`/spill. run: works on tasks, wherever that may be."""
    clock, spill = _Clock(), out / SPILL
    kept = _keep_quarantine(read, out / "quarantine")
    refuse_bad(section, read, kept)
    plan = _plan(section, features, read)
    over = _Ranges(plan.power, run, progress)
    plan = _in_ranges(plan, read, spill, over)
    clock.lap("sort")
    plan = _without_duplicates(plan, spill, over)
    plan = replace(plan, edges=_edges(plan, over))
    plan = _without_columns(plan, over)
    plan = replace(plan, bounds=_bounds(plan, over))
    clock.lap("plan")
    seen = over.merged(partial(passes.observe, plan), "summing up")
    refuse_dropped(plan, read, seen)
    refuse_unlearnable(plan, seen)
    plan, signature, statistics = _fitted(plan, seen, over)
    clock.lap("statistics")
    written = 0
    for rows, files in over.each(partial(passes.write, plan, signature=signature, out=out), "writing"):
        written += rows
        remote.take(*files)
    if written != sum(seen.counts.values()):
        raise RuntimeError(f"prepare: {written:,} rows were written where {sum(seen.counts.values()):,} had been counted")
    clock.lap("write")
    write_atomically(out / "signature.json", signature.model_dump_json(indent=1))
    write_atomically(out / "statistics.json", json.dumps({name: found.model_dump() for name, found in statistics.items()}, indent=1))
    across = {name: (seen.across[name], chance) for name, chance in seen.by_chance([name for name in read if name != "source"]).items()}
    if section.profile:
        described = describe(seen.profile, plan.target.names, across, section.split_by)
        warnings = described["warnings"] = [*described["warnings"], *_unheld(read), *plan.warnings]
        write_atomically(out / "profile.json", json.dumps(described))
    else:
        leaks = [guard.duplicates(split, *counts, None) for split, counts in across.items()]
        warnings = [*(leak.text for leak in leaks if leak), *_unheld(read), *plan.warnings]
    return account(plan, read, seen, warnings, clock.seconds)


PREPARE = Stage("data", prepare, version=3)


def sources(section: Data) -> dict[str, Source]:
    """Where rows come from: the main source, and those that are for one split alone."""
    given = {"source": section.source, "validation": section.validation, "test": section.test}
    return {name: source for name, source in given.items() if source is not None}


def _look(section: Data, said: Sequence[Columns], progress: Progress = silent) -> tuple[tuple[Feature, ...], bool]:
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


def _read(section: Data, spills: dict[str, Spill], quarantine: Path, progress: Progress) -> dict[str, Read]:
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


def _plan(section: Data, features: tuple[Feature, ...], read: dict[str, Read]) -> Plan:
    target = section.target.target(read["source"].labels)
    for name, said in read.items():
        strangers = set(said.labels) - set(target.labels)
        if strangers:
            raise DloptError(
                f"data.{name}: label {min(strangers)!r} is not in data.source, so it cannot be learned: drop it or add rows of it"
            )
    forced = {"source": None, "validation": "validation", "test": "test"}
    origins = tuple(Origin(f"data.{name}", forced[name]) for name in read)
    row_bytes = sum(feature.size * np.dtype(feature.stored).itemsize for feature in features) + 8
    size = sum(said.rows * row_bytes + said.text_bytes for said in read.values())
    return Plan(section, section.inputs, features, target, origins, (size // PART_BYTES).bit_length())


def _in_ranges(plan: Plan, read: dict[str, Read], spill: Path, over: _Ranges) -> Plan:
    """With a file of each range, in place of the pieces."""
    pieces = [(path, place) for place, said in enumerate(read.values()) for path in said.pieces]
    over.progress("prepare", None, "sorting")
    plan = replace(plan, ranges=tuple(in_ranges(pieces, plan.power, spill, over.run)))
    for path, _ in pieces:
        Path(path).unlink(missing_ok=True)  # where another machine has written it
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


def _unheld(read: dict[str, Read]) -> list[str]:
    """A line for each column of numbers with more digits than float64 holds."""
    counts = sum((said.digits for said in read.values()), Counter[str]())
    return [
        f"{column}: {count:,} of its numbers have more digits than float64 holds, so the model sees others in their place: "
        "take it out if it names rows, else subtract in the source what all have in common"
        for column, count in counts.items()
        if count
    ]


class _Ranges:
    """Runs a pass over all ranges: in this process, if there is one, else wherever `run` does; results come in the order of the ranges."""

    def __init__(self, power: int, run: Run, progress: Progress) -> None:
        self.count, self.progress = 2**power, progress
        self.run: Run = run if power else _one_by_one

    def each(self, task: Callable[..., Any], doing: str) -> Iterator[Any]:
        """What a task, a function of a range's number, finds in each range."""
        for done, found in enumerate(self.run(task, range(self.count)), start=1):
            if self.count > 1:
                self.progress("prepare", done / self.count, f"{doing}: {done} of {self.count} parts")
            yield found

    def merged(self, task: Callable[..., Any], doing: str) -> Any:
        """All that is found, merged in the order of the ranges; None when nothing is."""
        return merged(found for found in self.each(task, doing) if found is not None)


def _one_by_one(task: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Run a task on each item in this process."""
    return map(task, items)


def on_cluster(task: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Run a task on each item on Ray's workers; results in the order of the items, and never many more at a time than are worked on."""
    import ray

    shared, work = ray.put(task), ray.remote(_work)
    ahead = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    waiting = deque(work.remote(shared, item) for item in items[:ahead])
    try:
        for later in range(ahead, len(items) + ahead):
            if not waiting:
                return
            yield ray.get(waiting.popleft())
            waiting.extend(work.remote(shared, item) for item in items[later : later + 1])
    except DloptError as error:  # with Ray's account of where it was
        raise DloptError(str(getattr(error, "cause", error)).splitlines()[0]) from None


def _work(task: Callable[[Any], Any], item: Any) -> Any:
    return task(item)


def _without_duplicates(plan: Plan, spill: Path, over: _Ranges) -> Plan:
    """Where a part of `clean` compares rows of different ranges, all that compare rows take part, one after the other."""
    comparing = [place for place, clean in enumerate(plan.section.clean) if isinstance(clean, (ExactDuplicates, NearDuplicates))]
    if all(is_local(plan.section.clean[place]) for place in comparing):
        return plan
    rows = sum(len(open_rows(path)) for path in plan.ranges)
    for place in comparing:
        buckets = -(-rows // BUCKET_ROWS) if isinstance(plan.section.clean[place], ExactDuplicates) else 1
        over.progress("prepare", None, f"looking for {plan.section.clean[place].title}")
        files = list(over.each(partial(passes.compared, plan, place=place, buckets=buckets, folder=spill), "comparing"))
        losers = over.run(partial(passes.duplicates, plan, place, files, folder=spill), range(buckets))
        plan = replace(plan, losers=(*plan.losers, *losers))
    return plan


def _edges(plan: Plan, over: _Ranges) -> np.ndarray:
    """Where the split cuts."""
    split, fold = plan.section.split, plan.section.fold
    if isinstance(split, GivenSplit):
        return np.zeros(0)
    if isinstance(split, StratifiedSplit):
        return _stratified(plan, split, over)
    if isinstance(split, TimeSplit):
        seen = over.merged(partial(passes.times, plan), "looking at times")
        return np.array([np.inf if share >= 1 else seen.at(share)[0] for share in cut(split.parts(fold)[0])])
    return split.edges(fold)


def _stratified(plan: Plan, split: StratifiedSplit, over: _Ranges) -> np.ndarray:
    """(classes, parts - 1): exactly where the wanted rank of each class is, found in two steps, so that no process sees all rows."""
    fold, bins = plan.section.fold, max(16, passes.BINS // plan.target.size)
    counts = sum(over.each(partial(passes.binned, plan, bins=bins), "counting"))
    ranks = [split.wanted(label, int(rows), fold) for label, rows in zip(plan.target.labels, counts.sum(axis=1), strict=True)]
    below = np.cumsum(counts, axis=1)
    bin_of = {
        (code, rank): int(np.searchsorted(below[code], rank, side="right"))
        for code, some in enumerate(ranks)
        for rank in some
        if rank < below[code, -1]
    }
    wanted = sorted({(code, place) for (code, _), place in bin_of.items()})
    found: dict[tuple[int, int], list[np.ndarray]] = {}
    for part in over.each(partial(passes.within_bins, plan, bins=bins, wanted=wanted), "cutting"):
        for key, values in part.items():
            found.setdefault(key, []).append(values)

    def edge(code: int, rank: int) -> float:
        if (code, rank) not in bin_of:
            return 1.0
        place = bin_of[code, rank]
        before = int(below[code, place - 1]) if place else 0
        return float(np.sort(np.concatenate(found[code, place]))[rank - before])

    return np.array([[edge(code, rank) for rank in some] for code, some in enumerate(ranks)])


def _without_columns(plan: Plan, over: _Ranges) -> Plan:
    """Leave out columns that are missing in too many training rows."""
    parts = [part for part in plan.section.clean if isinstance(part, DropColumns)]
    if not parts:
        return plan
    absent = over.merged(partial(passes.absent, plan), "looking for missing values")
    columns = [column for part in plan.parts if part.removable for column in part.columns]
    left_out = [column for column in columns if absent.share(column) > min(part.share for part in parts)]
    if len(left_out) > min(part.most for part in parts) * len(columns):
        some = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        raise DloptError(f"data.clean: drop_columns would leave out {len(left_out)} of {len(columns)} columns ({some})")
    smaller = plan.without(left_out)
    if not smaller.parts:
        raise DloptError("data.clean: drop_columns would leave out every column: raise its share")
    for part in smaller.parts:
        if part.fill_by in left_out:
            raise DloptError(
                f"data.clean: drop_columns would leave out {part.fill_by!r}, which a fill of data.inputs goes by: "
                "raise its share or fill by another"
            )
    return smaller


def _bounds(plan: Plan, over: _Ranges) -> dict[str, tuple[int, Bound]]:
    """Where outliers begin, by what the training rows say before any outlier is dropped."""
    columns = passes.columns_of_outliers(plan)
    if not columns:
        return {}
    seen = over.merged(partial(passes.spread, plan), "looking for outliers")
    if seen is None:
        return {}
    bounds: dict[str, tuple[int, Bound]] = {}
    for place, clean in enumerate(plan.section.clean):
        if isinstance(clean, Outliers):
            quantiles = (seen.quantiles.at(p) for p in (*QUARTILES, clean.low, clean.high))
            lower, upper = clean.bounds(seen.moments.mean, seen.moments.std, *quantiles)
            for column in clean.columns:
                at = columns.index(column) if column in columns else -1
                if at >= 0 and np.isfinite(lower[at]) and np.isfinite(upper[at]):
                    bounds[column] = place, Bound(lower=float(lower[at]), upper=float(upper[at]), action=clean.action)
    return bounds


def _fitted(plan: Plan, seen: Observed, over: _Ranges) -> tuple[Plan, Signature, dict[str, Statistics]]:
    """The signature and the statistics that the training rows make: last of inputs whose fills go by others."""
    assert seen.inputs is not None
    features: dict[str, Feature] = {}
    statistics: dict[str, Statistics] = {}
    order = sorted(range(len(plan.parts)), key=lambda index: plan.parts[index].fill_by is not None)
    for index in order:
        part, feature = plan.parts[index], plan.features[index]
        if part.learns:  # in one task that all training rows stream through
            (feature,) = over.run(partial(passes.learn, plan, part, feature), [range(over.count)])
        fitted, found = part.fit(seen.inputs[index], feature, features, plan.caps)
        features[feature.name] = fitted
        if found:
            statistics[feature.name] = found
    if seen.target:
        statistics[plan.target.name] = in_units(seen.target.statistics("standard"), plan.target).model_copy(update={"fill": ()})
    signature = Signature(inputs=tuple(features[feature.name] for feature in plan.features), target=plan.target)
    return replace(plan, features=signature.inputs), signature, statistics


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


class _Clock:
    def __init__(self) -> None:
        self.start, self.seconds = time.monotonic(), dict[str, float]()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.start = round(now - self.start, 3), now
