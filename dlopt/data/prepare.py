"""The prepare stage: raw rows to clean, split, encoded rows and statistics of the training split, on Ray Data.

The sources are read into ranges of sorted rows (rows.py). What is then decided about rows is a plan (plan.py). The later
passes go over the ranges (passes.py): look for duplicates where they need all rows, for where to cut, for outliers; observe the training
rows, all columns in one pass; and write. Keys alone decide where a row goes, so the artifact does not depend on files, blocks or workers;
and a process holds a block or a range at a time, but for tasks that compare rows: of all sketches of near-duplicates, or of BUCKET_ROWS
rows by chosen columns.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dlopt import remote
from dlopt.artifact import Artifact, Stage, write_atomically
from dlopt.data.clean import DropColumns, ExactDuplicates, NearDuplicates, Outliers
from dlopt.data.kinds.base import Bound
from dlopt.data.kinds.number import QUARTILES, in_units
from dlopt.data.rows import SPILL, VERSION, plan_of_rows, sorted_rows
from dlopt.data.section import Data
from dlopt.data.stats import guard
from dlopt.data.stats.describe import describe
from dlopt.data.table import passes
from dlopt.data.table.account import account, refuse_dropped, refuse_unlearnable
from dlopt.data.table.over import Clock, Ranges, on_cluster
from dlopt.data.table.passes import Observed
from dlopt.data.table.plan import Plan
from dlopt.data.table.ranges import Run
from dlopt.data.table.spill import Read, is_local, open_rows
from dlopt.data.table.split import GivenSplit, StratifiedSplit, TimeSplit, cut
from dlopt.part import DloptError, Feature, Signature, Statistics
from dlopt.progress import Progress, silent

BUCKET_ROWS = 2**22
"""About how many rows are compared by one task when duplicates are looked for among all of them."""


def prepare(section: Data, out: Path, *, rows: Artifact | None = None, progress: Progress = silent) -> dict[str, Any]:
    """Fill `out` with train/, validation/, test/ and quarantine/ parquet, signature.json, statistics.json and, if it is
    asked for, profile.json; returns the counts. rows: the same section's rows as ROWS leaves them, whatever its fold, else they are read.
    """
    clock = Clock()
    try:
        plan, read = plan_of_rows(section, out, clock, progress) if rows is None else sorted_rows(section, rows, out)
        info = arrange(plan, read, out, run=on_cluster, clock=clock, progress=progress)
    finally:
        shutil.rmtree(out / SPILL, ignore_errors=True)
        remote.drop_spread(out / SPILL)
    return info


def arrange(
    plan: Plan, read: dict[str, Read], out: Path, *, run: Run, clock: Clock | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """All that follows when the rows lie in sorted ranges. run: works on tasks, wherever that may be."""
    clock, section = clock or Clock(), plan.section
    over = Ranges(plan.power, run, progress)
    plan = _without_duplicates(plan, out / SPILL, over)
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


PREPARE = Stage("data", prepare, version=VERSION)


def _unheld(read: dict[str, Read]) -> list[str]:
    """A line for each column of numbers with more digits than float64 holds."""
    counts = sum((said.digits for said in read.values()), Counter[str]())
    return [
        f"{column}: {count:,} of its numbers have more digits than float64 holds, so the model sees others in their place: "
        "take it out if it names rows, else subtract in the source what all have in common"
        for column, count in counts.items()
        if count
    ]


def _without_duplicates(plan: Plan, spill: Path, over: Ranges) -> Plan:
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


def _edges(plan: Plan, over: Ranges) -> np.ndarray:
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


def _stratified(plan: Plan, split: StratifiedSplit, over: Ranges) -> np.ndarray:
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


def _without_columns(plan: Plan, over: Ranges) -> Plan:
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


def _bounds(plan: Plan, over: Ranges) -> dict[str, tuple[int, Bound]]:
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


def _fitted(plan: Plan, seen: Observed, over: Ranges) -> tuple[Plan, Signature, dict[str, Statistics]]:
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
