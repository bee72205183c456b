"""The data profile as figures and tables, for a run's report and for the page that `dlopt profile` writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jinja2
import numpy as np

from dlopt.data.kinds import column_kinds
from dlopt.data.stats.column import moment
from dlopt.report import Figure, overlaid

MOST_FIGURES = 40
"""Columns that are drawn, those that drift most first; all of them are in the table."""
MOST_BARS = 30
"""Columns with missing values that are drawn, those with most first."""
NOTHING = "\N{EN DASH}"
FILE = "profile.json"


class Row(NamedTuple):
    """What is said of a column: figures of the first split (train), as they are shown."""

    name: str
    kind: str
    missing: str
    distinct: str
    typical: str
    """Mean and deviation of numbers, the most frequent category, the shape of images."""
    range: str
    """Least and greatest number; shortest and longest text."""
    alone: str
    """How well this column alone predicts the target."""
    drift: str
    """The largest population stability index of the other splits."""


def rows(profile: Mapping[str, Any]) -> list[Row]:
    """A row a column, in the order of the source."""
    return [_row(name, column, name in profile["targets"]) for name, column in profile["columns"].items()]


def figures(profile: Mapping[str, Any]) -> list[Figure]:
    """Missing values, balance of the target, then histograms and most frequent categories of all splits over each other."""
    return [*_missing(profile), *(figure for name in _drawn_columns(profile) for figure in _of_column(name, profile))]


def page(profile: Mapping[str, Any], title: str = "data", job: str = "") -> str:
    """A self-contained HTML page. job: a suggestion for the `data` section of a job."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dlopt.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("profile.html").render(title=title, job=job, profile=context(profile))


def context(profile: Mapping[str, Any]) -> dict[str, Any]:
    """What profile_part.html shows as `profile`."""
    return {
        "rows": {split: f"{count:,}" for split, count in profile["rows"].items()},
        "targets": profile["targets"],
        "warnings": profile["warnings"],
        "columns": rows(profile),
        "figures": figures(profile),
        "has_alone": any(column["alone"] for column in profile["columns"].values()),
        "has_drift": any(column["drift"] for column in profile["columns"].values()),
    }


def number(value: float | None, kind: str = "number") -> str:
    """A number as it is shown; of a date, its day."""
    if value is None:
        return NOTHING
    if column_kinds[kind].moment:
        return moment(value)
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def _row(name: str, column: Mapping[str, Any], is_target: bool) -> Row:
    kind = column["kind"]
    if not column["splits"]:
        return Row(name, kind, *[NOTHING] * 6)
    found = next(iter(column["splits"].values()))
    return Row(
        name,
        f"{kind}, target" if is_target else kind,
        f"{found['missing'] / found['rows']:.1%}" if found["missing"] else NOTHING,
        NOTHING if not column_kinds[kind].countable else f"{'' if found['exact'] else '≈ '}{found['distinct']:,}",
        column_kinds[kind].typical(found) or NOTHING,
        f"{_end(found['min'], kind)} … {_end(found['max'], kind)}" if found["min"] is not None else NOTHING,
        _alone(column["alone"]),
        f"{max(column['drift'].values()):.2f}" if column["drift"] else NOTHING,
    )


def _end(value: float, kind: str) -> str:
    return number(value, kind).partition("T")[0]


def _alone(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return NOTHING
    return f"R² {score['score']:.2f}" if score["measure"] == "r2" else f"{score['score']:.1%} (most frequent {score['base']:.1%})"


def _missing(profile: Mapping[str, Any]) -> Iterator[Figure]:
    """The share of missing values, of the columns that have any."""
    shares = {name: {s: c["missing"] / c["rows"] for s, c in column["splits"].items()} for name, column in profile["columns"].items()}
    some = sorted((name for name, found in shares.items() if any(found.values())), key=lambda name: -max(shares[name].values()))
    if not some:
        return
    shown = some[:MOST_BARS]
    series = {split: [shares[name].get(split, 0.0) for name in shown] for split in profile["rows"] if profile["rows"][split]}
    said = ", ".join(f"{name} {max(shares[name].values()):.1%}" for name in shown[:5])
    yield Figure("Missing values", overlaid.bars("missing", shown, series), f"Share of missing values, of {len(some)} columns: {said}.")


def _drawn_columns(profile: Mapping[str, Any]) -> list[str]:
    """Targets first; of more columns than are drawn, those that drift most."""
    drift = {name: max(column["drift"].values(), default=0.0) for name, column in profile["columns"].items()}
    chosen = sorted(drift, key=lambda name: (name not in profile["targets"], -drift[name]))[:MOST_FIGURES]
    return [*profile["targets"], *(name for name in profile["columns"] if name in chosen and name not in profile["targets"])]


def _of_column(name: str, profile: Mapping[str, Any]) -> Iterator[Figure]:
    column = profile["columns"][name]
    title = f"{name} (target)" if name in profile["targets"] else name
    if column["frequent"]:
        values, shares = column["frequent"]["values"], column["frequent"]["shares"]
        said = "; ".join(f"{split}: {values[0]} {found[0]:.1%}" for split, found in shares.items())
        yield Figure(title, overlaid.bars(name, values, shares), f"Shares of the most frequent values of {name}: {said}.")
    elif column["histogram"]:
        edges = np.array(column["histogram"]["edges"])
        shares = {split: np.array(found) for split, found in column["histogram"]["shares"].items()}
        kind = column_kinds[column["kind"]]
        unit = "" if kind.moment or column["unit"] in ("", "value") else f", {column['unit']}"
        said = "; ".join(f"{split}: median {number(column['splits'][split]['quantiles']['0.5'], column['kind'])}" for split in shares)
        svg = overlaid.histogram(name, edges, shares, date=kind.moment)
        yield Figure(title + unit, svg, f"Histogram of {name}{unit}: {said}.")
