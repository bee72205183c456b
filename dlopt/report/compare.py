"""Runs side by side in one self-contained page: what differs in their jobs, metrics, learning curves, gradients by layer, findings.

All of it comes from the runs' folders and the sealed artifacts that they name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from dlopt import runs
from dlopt.artifact import Artifact, write_atomically
from dlopt.part import DloptError, Signature, Target
from dlopt.report import Figure, health, page, plots, words
from dlopt.train.watch import metrics_log

FEWEST, MOST = 2, len(plots.OF_RUN)
LONGEST = 18
"""Letters of a run's name in a figure; of a longer one, the beginning and the end."""
NOTHING = "\N{EN DASH}"


class Side(NamedTuple):
    """A run among others."""

    name: str
    folder: Path
    created: str
    colour: str
    """One of plots.OF_RUN."""
    job: dict[str, Any]
    model: Artifact
    target: Target
    epochs: list[dict[str, Any]]
    """The lines of metrics.jsonl that tell of epochs."""
    steps: list[dict[str, Any]]
    """Those that tell of steps."""
    health: list[dict[str, Any]]
    """The lines of health.jsonl; none of a run that was not watched."""

    @property
    def variable(self) -> str:
        """What the page calls the run's colour."""
        return plots.COLOURS[self.colour]

    @property
    def loss(self) -> str:
        """What its loss is, in words: only equal ones can be compared."""
        return page.loss_name(self.target, self.model.manifest.section)

    @property
    def looks(self) -> list[dict[str, Any]]:
        return [line for line in self.health if line.get("layers")]


class Cell(NamedTuple):
    """A value as it is shown."""

    text: str
    best: bool = False


class Row(NamedTuple):
    """A line of a table, a cell a run."""

    title: str
    cells: list[Cell]
    note: str = ""


class Layers(NamedTuple):
    """A run's gradients, where it has any, and what was wrong with its training."""

    side: Side
    figure: Figure | None
    findings: list[health.Finding]


def write(path: Path, folders: Sequence[Path]) -> None:
    """Write the page on the runs in these folders, 2 to 6. Raises DloptError when there are more or fewer, or one is damaged."""
    sides = read(folders)
    context = {
        "sides": sides,
        "differences": differences([side.job for side in sides]),
        "results": {split: rows for split in reversed(page.SPLITS) if (rows := _metrics(sides, split))} | {"time": _training(sides)},
        "same_data": len({side.model.manifest.parents.get("data") for side in sides}) == 1,
        "curves": [*_by_epoch(sides), *_by_step(sides)],
        "layers": _layers(sides),
    }
    content = page.template("compare.html").render(context)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise DloptError(f"--output: cannot write to {path}: {error.strerror}") from None


def read(folders: Sequence[Path]) -> list[Side]:
    """The runs in these folders, each under a name and in a colour of its own."""
    if not FEWEST <= len(folders) <= MOST:
        raise DloptError(f"RUN: {len(folders)} given, and {FEWEST} to {MOST} can be compared")
    places = [folder.resolve() for folder in folders]
    if twice := [folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise DloptError(f"RUN: {twice[0]} is given twice; name the folder of an older run to compare runs of one job")
    records = [runs.read(folder) for folder in folders]
    names = _told_apart([str(record["name"]) for record in records], places)
    return [_side(*found) for found in zip(names, folders, records, plots.OF_RUN, strict=False)]


def differences(jobs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The dotted keys, but for the job's name, whose values are not the same in all jobs; a dash where a job has no such key."""
    flattened = [flat({key: value for key, value in job.items() if key != "name"}) for job in jobs]
    keys = dict.fromkeys(key for job in flattened for key in job)
    written = {key: [_written(job[key]) if key in job else NOTHING for job in flattened] for key in keys}
    return [Row(key, [Cell(text) for text in texts]) for key, texts in written.items() if len(set(texts)) > 1]


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """{"train.optimizer.lr": 0.001} of {"train": {"optimizer": {"lr": 0.001}}}. A list of plain values is one value."""
    nested = isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value)
    items = enumerate(value) if nested else value.items() if isinstance(value, dict) else ()
    found = {name: inner for step, item in items for name, inner in flat(item, f"{key}.{step}" if key else str(step)).items()}
    return found or {key: value}


def best(key: str, values: Sequence[float | None]) -> list[bool]:
    """Which of these values of a metric are best; none where there is nothing to choose from. None: there is no such value."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(set(finite)) < 2:
        return [False] * len(values)
    wanted = min(finite) if words.smaller_is_better(key) else max(finite)
    return [value == wanted for value in values]


def _side(name: str, folder: Path, record: Mapping[str, Any], colour: str) -> Side:
    model = runs.artifact(folder, record, "model")
    lines = list(metrics_log.read(model.check(metrics_log.NAME)))
    watched = metrics_log.HEALTH in model.manifest.files
    return Side(
        name,
        folder,
        str(record.get("created", "")),
        colour,
        _job(folder / runs.JOB),
        model,
        Signature.model_validate_json(model.read("signature.json")).target,
        [line for line in lines if "train" in line],
        [line for line in lines if "loss" in line],
        list(metrics_log.read(model.check(metrics_log.HEALTH))) if watched else [],
    )


def _job(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        raise DloptError(f"{path}: missing or damaged: run the job again")
    return found


def _told_apart(names: Sequence[str], places: Sequence[Path]) -> list[str]:
    """Names of jobs; of several runs of one job, the names of their folders, or if these are the same as well, whole paths."""
    return [
        name if names.count(name) == 1 else place.name if [other.name for other in places].count(place.name) == 1 else str(place)
        for name, place in zip(names, places, strict=True)
    ]


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _metrics(sides: Sequence[Side], split: str) -> list[Row]:
    """The metrics that the report of each run begins with. Those of another kind of target or loss are no match, and have their own row."""
    rows: dict[tuple[str, str], list[float | None]] = {}
    for place, side in enumerate(sides):
        found = side.model.info["metrics"].get(split, {})
        for key in _headline(side, found):
            rows.setdefault((key, _measure(side, key)), [math.inf] * len(sides))[place] = found[key]
    return [_metric_row(key, measure, values) for (key, measure), values in rows.items()]


def _headline(side: Side, found: Mapping[str, Any]) -> list[str]:
    more = [key for key in page.MORE[side.target.kind] if key in found][:2]
    return [key for key in (page.FIRST[side.target.kind], *more, "loss") if key in found]


def _measure(side: Side, key: str) -> str:
    """What a metric is of: the same of runs that can be compared by it."""
    return side.loss if key == "loss" else side.target.kind


def _metric_row(key: str, measure: str, values: Sequence[float | None]) -> Row:
    """values: infinite of a run that has none."""
    texts = [NOTHING if value == math.inf else words.metric(key, value) for value in values]
    cells = [Cell(*found) for found in zip(texts, best(key, values), strict=True)]
    return Row(words.metric_name(key), cells, measure if key == "loss" else "")


def _training(sides: Sequence[Side]) -> list[Row]:
    """How long each run took, and for what."""
    infos = [side.model.info for side in sides]
    return [
        Row("training", [Cell(words.seconds(info["seconds"]["train"])) for info in infos], "steps alone"),
        Row("whole fit", [Cell(words.seconds(side.model.manifest.seconds)) for side in sides], "with start and evaluation"),
        Row("steps", [Cell(words.whole(info["steps"])) for info in infos]),
        Row("rows a second", [Cell(words.whole(info["rows_per_second"])) for info in infos]),
        Row("epoch that is kept", [Cell(f"{info['best_epoch']} of {info['epochs']}") for info in infos]),
    ]


def _by_epoch(sides: Sequence[Side]) -> Iterator[Figure]:
    """The loss and the first metric of the validation split, or of training where there is no such split."""
    for key in dict.fromkeys(("loss", *(page.FIRST[side.target.kind] for side in sides))):
        for group in _comparable([side for side in sides if key == page.FIRST[side.target.kind] or key == "loss"], key):
            curves = [curve for side in group if (curve := _epochs_of(side, key))]
            yield from _figure(f"{words.metric_name(key)} by epoch", key, "epoch", curves, _measure(group[0], key))


def _epochs_of(side: Side, key: str) -> plots.Curve | None:
    split = next((name for name in ("validation", "train") if any(key in (line[name] or {}) for line in side.epochs)), None)
    if split is None:
        return None
    values = page.floats((line[split] or {}).get(key) for line in side.epochs)
    name = _short(side.name) if split == "validation" else f"{_short(side.name)} (train)"
    return plots.Curve(name, side.colour, np.array([line["epoch"] for line in side.epochs]), values, dashed=split == "train")


def _by_step(sides: Sequence[Side]) -> Iterator[Figure]:
    """The loss of the batches that were logged."""
    for group in _comparable(sides, "loss"):
        curves = [
            plots.Curve(
                _short(side.name),
                side.colour,
                np.array([line["step"] for line in side.steps]),
                page.floats(line["loss"] for line in side.steps),
            )
            for side in group
            if side.steps
        ]
        yield from _figure("loss of the batch by step", "loss", "step", curves, _measure(group[0], "loss"))


def _comparable(sides: Sequence[Side], key: str) -> list[list[Side]]:
    """Groups of runs that can be compared by a metric."""
    groups: dict[str, list[Side]] = {}
    for side in sides:
        groups.setdefault(_measure(side, key), []).append(side)
    return list(groups.values())


def _figure(title: str, key: str, along: str, curves: Sequence[plots.Curve], measure: str) -> Iterator[Figure]:
    """The figure, unless there is nothing to draw."""
    if not curves:
        return
    title = title[:1].upper() + title[1:]
    svg = plots.by_run(f"{title} {measure}", curves, along, words.is_share(key), words.smaller_is_better(key))
    ends = [[None if math.isnan(value) else float(value) for value in (curve.y[0], curve.y[-1])] for curve in curves]
    said = "; ".join(
        f"{curve.name} from {words.metric(key, first)} to {words.metric(key, last)}"
        for curve, (first, last) in zip(curves, ends, strict=True)
    )
    yield Figure(f"{title}, {measure}" if key == "loss" else title, svg, f"{title}: {said}.")


def _short(name: str) -> str:
    if len(name) <= LONGEST:
        return name
    half = LONGEST // 2
    return f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[1 - half :]}"


def _layers(sides: Sequence[Side]) -> list[Layers]:
    """Gradients of all runs in the same colours, so that it can be seen where they are small."""
    watched = [side for side in sides if side.looks]
    between = health.extent("gradient", [side.looks for side in watched])
    drawn = {side.name: health.figure("gradient", side.looks, f" of {side.name}", between) for side in watched}
    return [Layers(side, drawn.get(side.name), health.findings(side.health)) for side in sides]
