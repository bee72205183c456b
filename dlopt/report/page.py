"""The report's page: what the manifests and files of a run's artifacts say, in one self-contained HTML file.

It has no script and asks for nothing outside of it; the same artifacts give the same bytes. The part on the test split is a template
for each kind of target, named after it.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from dlopt.artifact import Artifact, write_atomically
from dlopt.data.kinds import kinds
from dlopt.part import Signature, Target
from dlopt.report import Figure, Importance, Samples, health, plots, profile, words
from dlopt.report.results import Results, read_results
from dlopt.report.rows import MOST_COLUMNS, cells, columns, examples, pictures, read_rows
from dlopt.train.measure.metric import METRICS
from dlopt.train.watch import metrics_log

WORST = 24
"""Mistakes that are shown."""
MOST_REASONS = 20
"""Reasons for bad rows that are shown."""
MOST_CURVES = 3
MOST_BARS = 20
"""Columns whose importance is shown."""
Z95 = 1.959964
SPLITS = ("train", "validation", "test")
FIRST = {"category": "accuracy", "multi_label": "micro_f1", "number": "r2"}
"""The metric that the page begins with, by the kind of the target."""
MORE = {
    "category": ("roc_auc", "f1", "macro_f1", "macro_roc_auc"),
    "multi_label": ("macro_f1", "subset_accuracy", "macro_roc_auc"),
    "number": ("mae", "rmse"),
}
"""Those that follow, as far as there are any: two classes have their own, and at most two are shown."""
LOSSES = {
    "cross_entropy": "cross-entropy, nats a row",
    "binary": "binary cross-entropy, nats a label",
    "focal": "focal loss, gamma {gamma:g}, nats",
    "squared": "mean squared error, in squares of the training rows' standard deviation",
    "absolute": "mean absolute error, in standard deviations of the training rows",
    "huber": "Huber loss, delta {delta:g}, in standard deviations of the training rows",
    "quantile": "pinball loss of the quantile {quantile:g}, in standard deviations of the training rows",
}
DEFAULT_LOSS = {"category": "cross_entropy", "multi_label": "binary", "number": "squared"}


class Card(NamedTuple):
    """One of the figures that the page begins with."""

    title: str
    value: str
    note: str


class Mistake(NamedTuple):
    """A test row that the model was wrong on."""

    row: int
    label: str
    predicted: str
    facts: dict[str, str]
    pictures: list[str]
    cells: list[str]


def write(
    path: Path,
    *,
    name: str,
    job_yaml: str,
    data: Artifact,
    model: Artifact,
    exports: Mapping[str, Artifact],
    compress: Artifact | None = None,
    card: str = "",
    samples: Samples | None,
    folds: Sequence[Mapping[str, float | None]] | None = None,
    importance: Importance | None = None,
) -> None:
    """Write the report of a run. Raises DloptError when a file of an artifact is damaged.

    exports: an artifact a format. compress: what was made small. card: Markdown. folds: of a cross-validation, each fold's metrics on the
    rows that it was not trained on. importance: of the columns, on the test split.
    """
    signature = Signature.model_validate_json(model.read("signature.json"))
    lines = list(metrics_log.read(model.check(metrics_log.NAME)))
    section, results = model.manifest.section, read_results(model, signature.target)
    context = {
        "name": name,
        "signature": signature,
        "target": signature.target,
        "section": section,
        "headline": _headline(signature.target, data, model, [data, model, *exports.values()], loss_name(signature.target, section)),
        "curves": _curves([line for line in lines if "train" in line], model.info["best_epoch"], _watched(signature.target, section)),
        "steps": _steps([line for line in lines if "loss" in line], _norm_limit(section["train"]["clip"])),
        "health": health.read(model),
        "metrics": list(dict.fromkeys(key for found in model.info["metrics"].values() for key in found)),
        "folds": _folds(folds) if folds else None,
        "test": results,
        "mistakes": _mistakes(results, data, signature) if results else None,
        "columns": columns(signature)[:MOST_COLUMNS],
        "all_columns": len(columns(signature)),
        "importance": _importance(importance) if results and importance else None,
        "samples": _sample_rows(samples),
        "examples": examples(data, signature),
        "bad_reasons": sorted(data.info["bad_reasons"].items(), key=lambda found: (-found[1], found[0]))[:MOST_REASONS],
        "cleaning": [_cleaned(found) for found in data.info["cleaning"]],
        "warnings": data.info["warnings"],
        "profile": _profile(data),
        "splits": SPLITS,
        "data": data,
        "model": model,
        "exports": exports,
        "compress": compress.info["table"] if compress else None,
        "sizes": _sizes(compress.info) if compress else None,
        "card": card,
        "job": job_yaml,
    }
    write_atomically(path, template("page.html").render(context))


def _sizes(info: Mapping[str, Any]) -> Figure | None:
    """The metric by the packed size: of the model before and after, and of all that a budget tried, on the validation split."""
    before, after = info["table"]
    metric, split = before["metric"], next((name for name in ("validation", "test") if name in before["metrics"]), None)
    if split is None:
        return None
    tried = [(one["bytes"], one["value"], one["chain"]) for one in info.get("tried", ())]
    points = [(before["zlib"], before["metrics"][split][metric], "float32"), *tried]
    points.append((after["zlib"], after["metrics"][split][metric], "compressed"))
    sizes, values = (np.array(found, dtype=np.float64) for found in list(zip(*points, strict=True))[:2])
    names, title = [name for *_, name in points], f"{split} {metric}"
    said = "; ".join(f"{name}: {size:,} bytes, {value:.4f}" for size, value, name in points)
    return Figure(f"{title[:1].upper()}{title[1:]} by size", plots.sizes("Sizes", sizes, values, names, title), f"{title}, packed: {said}.")


def wilson(right: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `right` of `rows` were seen (E. B. Wilson, JASA 22, 1927)."""
    share, z2 = right / rows, Z95**2 / rows
    middle, half = share + z2 / 2, Z95 * math.sqrt(share * (1 - share) / rows + z2 / 4 / rows)
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def _headline(target: Target, data: Artifact, model: Artifact, artifacts: Sequence[Artifact], loss: str) -> dict[str, Any]:
    """The figures to see first: of the test split, or of the next best split that there is."""
    split = next(name for name in reversed(SPLITS) if name in model.info["metrics"])
    metrics, rows = model.info["metrics"][split], data.info["counts"][split]
    more = [key for key in MORE[target.kind] if key in metrics][:2]
    first, *others = (_card(f"{split} ", key, metrics[key], target, rows) for key in (FIRST[target.kind], *more))
    others.append(Card(f"{split} loss", words.metric("loss", metrics["loss"]), loss))
    return {"split": split, "first": first, "others": others, "seconds": sum(artifact.manifest.seconds for artifact in artifacts)}


def _card(split: str, key: str, value: float | None, target: Target, rows: int) -> Card:
    title = split + words.metric_name(key)
    if key == "accuracy" and value is not None:
        right = round(value * rows)
        low, high = (words.percent(end) for end in wilson(right, rows))
        return Card(title, words.percent(value, 2), f"95 % interval {low} to {high} · {right:,} of {rows:,} rows right")
    what = {"what": "classes" if target.kind == "category" else "labels", "positive": _positive(target)}
    return Card(title, words.metric(key, value), METRICS[key].says.format(**what))


def loss_name(target: Target, section: dict[str, Any]) -> str:
    """What the loss is, in words."""
    given = section["train"].get("loss") or {"kind": DEFAULT_LOSS[target.kind]}
    return LOSSES[given["kind"]].format(**given)


def _positive(target: Target) -> Any:
    """The class that metrics of two classes are of."""
    return target.positive if target.positive is not None or not target.labels else target.labels[-1]


def _watched(target: Target, section: dict[str, Any]) -> list[str]:
    """The metrics whose curves are drawn: the loss, the one that decides, and those that the page begins with."""
    wanted = ("loss", section["train"]["monitor"], FIRST[target.kind], *MORE[target.kind])
    return list(dict.fromkeys(wanted))


def _curves(lines: list[dict[str, Any]], best: int, watched: Sequence[str]) -> list[Figure]:
    """Metrics over the epochs, of training, which knows few of them, and of the validation split, where there is one."""
    epochs = [line["epoch"] for line in lines]
    figures: list[Figure] = []
    for key in watched:
        series = {name: floats((line[name] or {}).get(key) for line in lines) for name in ("train", "validation") if _has(lines, name, key)}
        if not series or len(figures) == MOST_CURVES:
            continue
        percent, title = words.is_share(key), words.metric_name(key)
        title = title[:1].upper() + title[1:]
        form = "{:.1%}" if percent else "{:.3g}"
        said = "; ".join(f"{name} from {form.format(values[0])} to {form.format(values[-1])}" for name, values in series.items())
        svg = plots.by_epoch(title, epochs, series, best, percent=percent, logarithmic=key in ("loss", "mae", "rmse"))
        figures.append(Figure(title, svg, f"{title} by epoch, {epochs[0]} to {epochs[-1]}: {said}. Best epoch: {best}."))
    return figures


def _has(lines: list[dict[str, Any]], split: str, key: str) -> bool:
    return any(key in (line[split] or {}) for line in lines)


def _norm_limit(clip: Mapping[str, Any] | None) -> float | None:
    """The largest norm of a gradient, where gradients are clipped by it."""
    return clip["limit"] if clip and clip["kind"] == "norm" else None


def _steps(lines: list[dict[str, Any]], clip_norm: float | None) -> list[Figure]:
    """Loss, learning rate and gradient norm over the logged steps; none when no step was logged."""
    if not lines:
        return []
    steps = np.array([line["step"] for line in lines])
    figures = []
    for title, key in (("Loss of the batch", "loss"), ("Learning rate", "rate"), ("Gradient norm", "gradient_norm")):
        values = floats(line[key] for line in lines)
        svg = plots.by_step(title, steps, values, smooth=key == "rate", limit=clip_norm if key == "gradient_norm" else None)
        there = values[np.isfinite(values)]
        said = f"from {there[0]:.3g} to {there[-1]:.3g}" if len(there) else "nothing"
        if lost := len(values) - len(there):
            said += f"; {lost} of {len(lines)} logged values not finite"
        figures.append(Figure(title, svg, f"{title} by step, {steps[0]} to {steps[-1]}: {said}."))
    return figures


def _folds(folds: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """A line a fold, and the mean and standard deviation (of the sample) of each metric over the folds that have it."""
    names = list(folds[0])
    values = {name: [found for fold in folds if (found := fold[name]) is not None] for name in names}
    means = {name: statistics.fmean(found) if found else None for name, found in values.items()}
    spreads = {name: statistics.stdev(found) if len(found) > 1 else None for name, found in values.items()}
    return {"names": names, "lines": folds, "means": means, "spreads": spreads}


def _mistakes(results: Results, data: Artifact, signature: Signature) -> list[Mistake]:
    rows = results.wrong[:WORST]
    found = read_rows(data, "test", rows)
    shown = zip(rows.tolist(), pictures(signature, found), cells(signature, found), strict=True)
    return [Mistake(row, *results.said(row), results.facts(row), images, there[:MOST_COLUMNS]) for row, images, there in shown]


def _importance(found: Importance) -> dict[str, Any]:
    """The columns that matter most, with a figure."""
    order = np.argsort(-found.rises, kind="stable")[:MOST_BARS]
    names, rises = [found.columns[place] for place in order], found.rises[order]
    title = f"rise of the {found.measure}"
    said = "; ".join(f"{name} {rise:.3g}" for name, rise in zip(names, rises, strict=True))
    figure = Figure("What the model looks at", plots.bars("Importance", names, rises, title), f"{title} by column: {said}.")
    return {"figure": figure, "shown": len(names), "all": len(found.columns)} | found._asdict()


def _cleaned(found: Mapping[str, Any]) -> tuple[str, int, str]:
    """What a rule of cleaning is called, how many rows it dropped, and what else it says."""
    rest = {name: value for name, value in found.items() if name not in ("kind", "title", "dropped")}
    return found["title"], found["dropped"], ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in rest.items())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(inner) for inner in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _profile(data: Artifact) -> Any:
    """What `prepare` has found in the columns, if it has looked."""
    return profile.context(json.loads(data.read(profile.FILE))) if profile.FILE in data.manifest.files else None


def _sample_rows(samples: Samples | None) -> list[tuple[str, list[str]]]:
    """A line of the grid: its name, and data URIs of the images."""
    if samples is None:
        return []
    named = [("original", samples.original), *((f"epoch {epoch}", images) for epoch, images in enumerate(samples.augmented, start=1))]
    return [(name, [plots.picture(image) for image in images]) for name, images in named]


def floats(values: Any) -> np.ndarray:
    """Values of JSON, of which some are null, with NaN for what is not finite."""
    found = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    return np.where(np.isfinite(found), found, np.nan)


def template(name: str) -> jinja2.Template:
    """One of this package's, with what it writes numbers with."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dlopt.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("whole", "percent", "figure", "seconds")
    environment.filters |= {name: getattr(words, name) for name in names}
    environment.globals |= {"metric": words.metric, "metric_name": words.metric_name, "kinds": kinds}
    return environment.get_template(name)
