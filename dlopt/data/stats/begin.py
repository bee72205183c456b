"""A whole job that a source's rows could be trained with as it is: for `dlopt init`, `dlopt profile` and programs that have no job."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import yaml

from dlopt.data.kinds import kinds
from dlopt.data.kinds.pixels import image_shape
from dlopt.data.sources import Source
from dlopt.data.stats import guard
from dlopt.data.stats.column import Column
from dlopt.data.stats.guess import FOLDERS, kinds_of, name_of
from dlopt.data.stats.summary import Summary, summarise
from dlopt.data.types.dates import are_times
from dlopt.part import DloptError

ROWS = 20_000
"""First rows that are looked at."""
NO_INPUT = {
    "identifier": "it identifies rows, differing in every one",
    "constant": "it is the same in every row",
    "leak": "it says the target all by itself",
}
"""What the guard finds of columns that are no inputs, in words."""
NESTED = "lists and objects are no input: make columns of what is in them"
MISSING = 0.9
"""A column with more missing values than this is left out."""
LONGEST = 96
"""Images of different sizes become at most so high and wide."""
FEWEST = 10
"""Rows without which there are no three splits."""
STEPS = 2000
"""About how many steps a first training has at most; early stopping ends it sooner."""
PATH = "path"
"""The column of folders CLASS/FILE that says where a row is."""
SCHEMA = "dlopt.schema.json"


@dataclass(frozen=True)
class Beginning:
    """A job, and why it is as it is."""

    job: dict[str, Any]
    remarks: tuple[str, ...] = ()
    """On the inputs."""
    head: str = ""
    problems: tuple[str, ...] = ()
    """Why a job on these rows could not run."""

    @property
    def text(self) -> str:
        """As YAML for people: parts in one line each, remarks where they belong."""
        data = self.job["data"]
        lines = [self.head, f"name: {_flow_value(self.job['name'])}", "seed: 0", "data:", f"  source: {_flow(data['source'])}"]
        lines += ["  clean:", *(f"    - {_flow(part)}" for part in data["clean"])] if data["clean"] else []
        lines += ["  inputs:" if data["inputs"] else "  inputs: []", *(f"    - {_flow(part)}" for part in data["inputs"])]
        lines += [f"    # {note}" for note in self.remarks]
        target = _flow(data["target"]) if data["target"] else "{kind: category, column: ...}  # the column to predict"
        lines += [f"  target: {target}", f"  split: {_flow(data['split'])}"]
        lines += [f"model: {_flow(self.job['model'])}  # an encoder for each kind of input; `dlopt explain model` lists others", "train:"]
        lines += [f"  {name}: {_flow(part) if isinstance(part, dict) else part}" for name, part in self.job["train"].items()]
        return "\n".join(line for line in lines if line) + "\n"


def begin(source: Source, targets: Sequence[str], name: str | None = None, rows: int = ROWS) -> Beginning:
    """From the first rows of a source, without Ray. Raises DloptError when there is nothing to learn in them."""
    hidden = (PATH,) if isinstance(source, FOLDERS) else ()
    looks = {column: kind for column, kind in kinds_of(source, targets, rows).items() if column not in hidden}
    table = source.peek(rows)
    table = source.meaning().canonical(table, [column for column, kind in looks.items() if kind in ("category", "text", "multi_label")])
    there = dict(zip(table.column_names, table.columns, strict=True))
    summary = summarise({column: there.get(column, pa.nulls(len(table))) for column in looks}, looks, targets)
    looked = f"its first {len(table):,} rows" if len(table) == rows else f"its {len(table):,} rows"
    found = job_of(source, summary, targets, guard.findings({guard.WHOLE: summary}, targets), name)
    for problem in found.problems:
        raise DloptError(problem)
    head = (
        f"# yaml-language-server: $schema={SCHEMA}\n# From {looked}. `dlopt explain FIELD` says what a field means and what else it takes."
    )
    return Beginning(found.job, found.remarks, head)


def job_of(
    source: Source, summary: Summary, targets: Sequence[str], findings: Sequence[guard.Finding], name: str | None = None
) -> Beginning:
    """From what is known of its columns. Columns that a model is better off without are named in remarks."""
    left_out = _left_out(source, summary, targets, findings)
    used = {column: found for column, found in summary.columns.items() if column not in targets and column not in left_out}
    labels = [summary.columns[target] for target in targets]
    missing = max((label.missing for label in labels), default=0)
    counts = _by_folder(source) or (labels[0].counts if labels and labels[0].kind != "number" else {})
    there = (sum(counts.values()) if isinstance(source, FOLDERS) else summary.rows) - missing
    clean = [{"kind": "drop_missing", "columns": list(targets)}] if missing else []
    shares = {"train": 0.8, "validation": 0.1, "test": 0.1} if there >= 500 else {"train": 0.6, "validation": 0.2, "test": 0.2}
    split = {"kind": "random" if not labels or labels[0].kind == "number" else "stratified", **shares}
    batch = next(size for size in (16, 32, 64, 128, 256) if size == 256 or there < 64 * size)
    epochs = min(60, max(5, STEPS * batch // max(there, 1)))
    data = {"source": _written(source), "clean": clean, "inputs": _inputs(source, used), "target": _target(labels, targets), "split": split}
    training: dict[str, Any] = {"epochs": epochs, "batch_size": batch, "optimizer": {"kind": "adam", "lr": 1e-3}}
    training["early_stopping"] = {"patience": 5}
    job = {"name": name or plain_name(name_of(source)), "data": data, "model": {"kind": "joint"}, "train": training}
    remarks = tuple(f"{column} is left out: {what}" for column, what in left_out.items())
    return Beginning(job, remarks, problems=tuple(_problems(targets, there, counts, used, left_out)) if targets else ())


def _problems(
    targets: Sequence[str], rows: int, counts: Mapping[str, int], used: Mapping[str, Column], left_out: Mapping[str, str]
) -> Iterator[str]:
    if rows < FEWEST:
        yield f"--target: {targets[0]!r} has {rows} rows with a value: there is nothing to learn from so few"
    if not used:
        why = "; ".join(f"{column}: {what}" for column, what in left_out.items()) or "there is no other column"
        yield f"--target: nothing is left to predict {targets[0]!r} from: {why}"
    rare = sorted(name for name, count in counts.items() if name and count < 3)
    if rare:
        few = f"{', '.join(rare[:5])}{', ...' if len(rare) > 5 else ''}"
        yield f"--target: classes of {targets[0]!r} have fewer than 3 rows ({few}), too few for three splits: drop or join them"


def plain_name(text: str) -> str:
    """A name for a job, from a path, an address or a data set's name."""
    stem = re.split(r"[/\\]", text.rstrip("/\\"))[-1].partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-._") or "job"


def _by_folder(source: Source) -> Counter[str]:
    """Of folders CLASS/FILE, of which a look sees few: files by class."""
    if not isinstance(source, FOLDERS):
        return Counter()
    return Counter(inside.partition("/")[0] for inside in source.listed().files["inside"].to_pylist())


def _left_out(source: Source, summary: Summary, targets: Sequence[str], findings: Sequence[guard.Finding]) -> dict[str, str]:
    """Columns that are no inputs, and why."""
    found = {one.column: NO_INPUT[one.what] for one in findings if one.what in NO_INPUT and one.column not in targets}
    for field in source.peek(1).schema:
        column = summary.columns.get(field.name)
        if column and not kinds[column.kind].nested and pa.types.is_nested(field.type) and field.name not in targets:
            found[field.name] = NESTED
    for name, known in summary.columns.items():
        if name not in targets and name not in found and known.rows and known.missing > MISSING * known.rows:
            found[name] = f"{known.missing / known.rows:.0%} of its values are missing"
    return found


def _inputs(source: Source, used: Mapping[str, Column]) -> list[dict[str, Any]]:
    meant = {name: "category" if column.kind == "number" and column.distinct <= 2 else column.kind for name, column in used.items()}
    begun = [line for kind, part in kinds.items() for line in part.begun(kind, [name for name, its in meant.items() if its == kind])]
    begun = [one for line in begun for one in (_times_alone(source, line) if line["kind"] == "date" else [line])]
    return [line | (_size(source, line["column"]) if kinds[line["kind"]].holds == "pixels" else {}) for line in begun]


def _times_alone(source: Source, line: dict[str, Any]) -> list[dict[str, Any]]:
    """An input of dates, and one of the times of day among its columns."""
    table = source.peek(500)
    times = [column for column in line["columns"] if are_times(table[column])]
    dates = [column for column in line["columns"] if column not in times]
    alone = {"kind": "date", "columns": times} | ({"name": "times"} if dates else {})
    return [*([line | {"columns": dates}] if dates else []), *([alone] if times else [])]


def _size(source: Source, column: str) -> dict[str, Any]:
    """Of images whose sizes differ: the middle one, made smaller where it is large."""
    shapes: Counter[tuple[int, int]] = Counter()
    for value in source.peek(500)[column].to_pylist():
        value = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(value, bytes):
            try:
                shapes[image_shape(value)[:2]] += 1
            except DloptError:
                continue
    if len(shapes) < 2:
        return {}
    heights, widths = zip(*shapes.elements(), strict=True)
    middle = [sorted(sides)[len(sides) // 2] for sides in (heights, widths)]
    scale = min(1.0, LONGEST / max(middle))
    return {"size": [max(8, round(side * scale)) for side in middle]}


def _target(labels: Sequence[Column], targets: Sequence[str]) -> dict[str, Any]:
    if not targets:
        return {}
    return {"kind": "number", "columns": list(targets)} if labels[0].kind == "number" else {"kind": "category", "column": targets[0]}


def _written(source: Source) -> dict[str, Any]:
    given = source.model_dump(mode="json", exclude_unset=True)
    return {"kind": source.kind} | given


def _flow(value: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(value), default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)).strip()


def _flow_value(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)).removesuffix("...\n").strip()
