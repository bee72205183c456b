"""The report's page: what the manifests and files of a run's artifacts say, in one self-contained HTML file.

It has no script and asks for nothing outside of it; the same artifacts give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from dlopt.artifact import Artifact, write_atomically
from dlopt.data.prepared import Rows, Split
from dlopt.part import Signature
from dlopt.report import Samples, plots
from dlopt.train import metrics_log

PREDICTIONS = "predictions.parquet"
WORST = 24
"""Mistakes that are shown."""
MOST_CELLS = 30
"""A confusion matrix of more classes is no longer legible: its largest cells are listed instead, so many of them."""
MOST_COLUMNS = 40
"""Columns of numbers that are shown of a mistake."""
MOST_REASONS = 20
"""Reasons for bad rows that are shown."""
Z95 = 1.959964


class Figure(NamedTuple):
    """A plot, its title and what it shows in words."""

    title: str
    svg: Markup
    alt: str


class Cell(NamedTuple):
    """Test rows of class `label` that were called `predicted`, and their share of the class."""

    label: Any
    predicted: Any
    rows: int
    share: float


class Class(NamedTuple):
    """A class in the test split: its rows, the share of them that was found, and the share of what was given it that is of it."""

    label: Any
    rows: int
    recall: float | None
    precision: float | None


class Mistake(NamedTuple):
    """A test row that was given the wrong class."""

    row: int
    label: Any
    predicted: Any
    probability: float
    loss: float
    pictures: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Predictions:
    """What the model says of each test row: class indices, and the most probable class's probability; (rows,) each."""

    label: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    loss: np.ndarray

    @classmethod
    def read(cls, model: Artifact) -> Predictions | None:
        """None without a test split. Raises DloptError when the file is damaged."""
        if PREDICTIONS not in model.manifest.files:
            return None
        table = pq.read_table(pa.BufferReader(model.read(PREDICTIONS)))
        return cls(*(table[name].to_numpy() for name in ("label", "predicted", "probability", "loss")))

    @property
    def wrong(self) -> np.ndarray:
        """Rows that were given the wrong class, highest loss first; a loss that is not a number is the highest."""
        rows = np.flatnonzero(self.label != self.predicted)
        return rows[np.argsort(-np.nan_to_num(self.loss[rows], nan=np.inf), kind="stable")]

    def cells(self, labels: Sequence[Any], rows: np.ndarray | None = None) -> list[Cell]:
        """The cells of the confusion matrix that have any (of these) rows, fullest first."""
        chosen = np.arange(len(self.label)) if rows is None else rows
        pairs, counts = np.unique(np.stack([self.label[chosen], self.predicted[chosen]], axis=1), axis=0, return_counts=True)
        of_class = np.bincount(self.label, minlength=len(labels))
        return [
            Cell(labels[label], labels[predicted], count, count / of_class[label])
            for (label, predicted), count in sorted(zip(pairs.tolist(), counts.tolist(), strict=True), key=lambda found: -found[1])
        ]

    def classes(self, labels: Sequence[Any]) -> list[Class]:
        """How well each class is told from the others; None where there is nothing to take a share of."""
        of_class, given = (np.bincount(values, minlength=len(labels)) for values in (self.label, self.predicted))
        right = np.bincount(self.label[self.label == self.predicted], minlength=len(labels))
        return [
            Class(label, int(there), _share(found, there), _share(found, called))
            for label, there, called, found in zip(labels, of_class, given, right, strict=True)
        ]


def write(
    path: Path, *, name: str, job_yaml: str, data: Artifact, model: Artifact, exports: Mapping[str, Artifact], samples: Samples | None
) -> None:
    """Write the report of a run. `exports` has an artifact a format. Raises DloptError when a file of an artifact is damaged."""
    signature = Signature.model_validate_json(model.read("signature.json"))
    lines = list(metrics_log.read(model.check(metrics_log.NAME)))
    predictions = Predictions.read(model)
    context = {
        "name": name,
        "signature": signature,
        "section": model.manifest.section,
        "headline": _headline(data, model, [data, model, *exports.values()]),
        "curves": _curves([line for line in lines if "train" in line], model.info["best_epoch"]),
        "steps": _steps([line for line in lines if "loss" in line], model.manifest.section["train"]["clip_norm"]),
        "test": _test(predictions, data, signature) if predictions else None,
        "samples": _sample_rows(samples),
        "bad_reasons": sorted(data.info["bad_reasons"].items(), key=lambda found: (-found[1], found[0]))[:MOST_REASONS],
        "data": data,
        "model": model,
        "exports": exports,
        "job": job_yaml,
    }
    write_atomically(path, _template().render(context))


def wilson(right: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `right` of `rows` were seen (E. B. Wilson, JASA 22, 1927)."""
    share, z2 = right / rows, Z95**2 / rows
    middle, half = share + z2 / 2, Z95 * math.sqrt(share * (1 - share) / rows + z2 / 4 / rows)
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def _headline(data: Artifact, model: Artifact, artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """The figures to see first: of the test split, or of the next best split that there is."""
    split = next(name for name in ("test", "validation", "train") if name in model.info["metrics"])
    metrics, rows = model.info["metrics"][split], data.info["counts"][split]
    right = round(metrics["accuracy"] * rows)
    seconds = sum(artifact.manifest.seconds for artifact in artifacts)
    return {"split": split, "right": right, "rows": rows, "interval": wilson(right, rows), "seconds": seconds, **metrics}


def _curves(lines: list[dict[str, Any]], best: int) -> list[Figure]:
    """Loss and accuracy over the epochs, of training and, where there is one, of the validation split."""
    epochs = [line["epoch"] for line in lines]
    splits = [name for name in ("train", "validation") if any(line[name] for line in lines)]
    figures = []
    for title, key, form in (("Loss", "loss", "{:.3g}"), ("Accuracy", "accuracy", "{:.1%}")):
        series = {name: _floats((line[name] or {}).get(key) for line in lines) for name in splits}
        said = "; ".join(f"{name} from {form.format(values[0])} to {form.format(values[-1])}" for name, values in series.items())
        svg = plots.by_epoch(title, epochs, series, best, percent=key == "accuracy")
        figures.append(Figure(title, svg, f"{title} by epoch, {epochs[0]} to {epochs[-1]}: {said}. Best epoch: {best}."))
    return figures


def _steps(lines: list[dict[str, Any]], clip_norm: float | None) -> list[Figure]:
    """Loss, learning rate and gradient norm over the logged steps; none when no step was logged."""
    if not lines:
        return []
    steps = np.array([line["step"] for line in lines])
    figures = []
    for title, key in (("Loss of the batch", "loss"), ("Learning rate", "rate"), ("Gradient norm", "gradient_norm")):
        values = _floats(line[key] for line in lines)
        svg = plots.by_step(title, steps, values, smooth=key == "rate", limit=clip_norm if key == "gradient_norm" else None)
        lost = int(np.isnan(values).sum())
        said = f"from {values[0]:.3g} to {values[-1]:.3g}" + (f"; {lost} of {len(lines)} logged values not finite" if lost else "")
        figures.append(Figure(title, svg, f"{title} by step, {steps[0]} to {steps[-1]}: {said}."))
    return figures


def _test(predictions: Predictions, data: Artifact, signature: Signature) -> dict[str, Any]:
    """The confusion matrix (or its largest cells off the diagonal), how each class fares, and the worst mistakes."""
    labels, wrong = signature.target.labels, predictions.wrong
    confused = predictions.cells(labels, wrong)
    matrix = {(cell.label, cell.predicted): cell for cell in predictions.cells(labels)} if len(labels) <= MOST_CELLS else None
    mistakes = _mistakes(predictions, wrong[:WORST], data, signature)
    columns = [column for feature in signature.inputs if feature.kind == "number" for column in feature.columns]
    return {
        "rows": len(predictions.label),
        "wrong": len(wrong),
        "matrix": matrix,
        "pairs": len(confused),
        "confused": confused[:MOST_CELLS],
        "classes": predictions.classes(labels),
        "mistakes": mistakes,
        "columns": columns[:MOST_COLUMNS],
        "more_columns": len(columns[MOST_COLUMNS:]),
    }


def _mistakes(predictions: Predictions, rows: np.ndarray, data: Artifact, signature: Signature) -> list[Mistake]:
    labels = signature.target.labels
    found = _test_rows(data, rows)
    images = [found[feature.name] for feature in signature.inputs if feature.kind == "image"]
    numbers = [found[feature.name] for feature in signature.inputs if feature.kind == "number"]
    return [
        Mistake(
            int(row),
            labels[predictions.label[row]],
            labels[predictions.predicted[row]],
            float(predictions.probability[row]),
            float(predictions.loss[row]),
            tuple(plots.picture(values[index]) for values in images),
            tuple(float(value) for values in numbers for value in values[index])[:MOST_COLUMNS],
        )
        for index, row in enumerate(rows)
    ]


def _test_rows(data: Artifact, rows: np.ndarray) -> Rows:
    """These rows of the test split, in this order; only the chunks that have them are read, from files checked against their seal."""
    split = Split.open(data, "test")
    chunk_of_row = np.searchsorted([chunk.start for chunk in split.chunks], rows, side="right") - 1
    used = [split.chunks[index] for index in np.unique(chunk_of_row)]
    for file in {chunk.file for chunk in used}:
        data.check(str(Path(file).relative_to(data.path.resolve())))
    numbers = np.concatenate([np.arange(chunk.start, chunk.start + chunk.rows) for chunk in used] or [rows])
    return {name: values[np.searchsorted(numbers, rows)] for name, values in split.read(used).items()}


def _share(part: np.integer, whole: np.integer) -> float | None:
    return float(part / whole) if whole else None


def _sample_rows(samples: Samples | None) -> list[tuple[str, list[str]]]:
    """A line of the grid: its name, and data URIs of the images."""
    if samples is None:
        return []
    named = [("original", samples.original), *((f"epoch {epoch}", images) for epoch, images in enumerate(samples.augmented, start=1))]
    return [(name, [plots.picture(image) for image in images]) for name, images in named]


def _floats(values: Any) -> np.ndarray:
    """Values of JSON, of which some are null, with NaN for what is not finite."""
    found = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    return np.where(np.isfinite(found), found, np.nan)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dlopt.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"whole": _whole, "percent": _percent, "figure": _figure, "seconds": _seconds}
    return environment.get_template("page.html")


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _figure(value: float | None, digits: int = 4) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def _seconds(value: float) -> str:
    return f"{value:,.1f} s"
