"""The model card (Mitchell et al. 2019): what a model is, what it was made of, how good it is, and how to run it, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dlopt.artifact import Artifact
from dlopt.data.kinds import kinds
from dlopt.part import Signature, Target
from dlopt.report import profile
from dlopt.report.results import Categories, Labels, read_results

CARD = "model_card.md"
MOST_LABELS, MOST_COLUMNS = 20, 40


def card(
    name: str,
    license: str,
    data: Artifact,
    model: Artifact,
    exports: Mapping[str, Artifact],
    compress: Artifact | None,
) -> str:
    """Of a run's artifacts alone."""
    signature = Signature.model_validate_json(model.read("signature.json"))
    section = model.manifest.section
    parts = [
        f"# {name}",
        f"A network of kind `{section['model']['kind']}` that predicts {predicts(signature.target)}.",
        "## What it takes",
        "\n".join(table(("input", "what it is", "columns"), inputs(signature))),
        "## What it was trained on",
        "\n".join(table(("split", "rows"), [(split, f"{rows:,}") for split, rows in data.info["counts"].items()])),
        f"Source: `{data.manifest.section['source']['kind']}`. Best epoch: {model.info['best_epoch']} of {model.info['epochs']}.",
        *columns(data),
        "## How good it is",
        "\n".join(metrics(model)),
        *by_class(model, signature.target),
    ]
    if compress:
        parts += ["## Made small", *budget(compress), "\n".join(small(compress.info["table"]))]
    unrun = {kind: f" (not run: {found.info['not_run']})" for kind, found in exports.items() if "not_run" in found.info}
    used = [f"`{kind}`{unrun.get(kind, '')}\n\n```python\n{found.info.get('use', '')}\n```" for kind, found in exports.items()]
    named = {"data": data, "model": model, **({"compress": compress} if compress else {})}
    named |= {f"export.{kind}": found for kind, found in exports.items()}
    digests = [(what, f"`{found.manifest.digest}`") for what, found in named.items()]
    versions = ", ".join(f"{package} {version}" for package, version in model.manifest.versions.items())
    parts += ["## How to run it", *used, "## Where it is from", "\n".join(table(("artifact", "digest"), digests)), f"{versions}."]
    return "\n\n".join([*parts, f"Licence: {license or 'not stated'}."]) + "\n"


def predicts(target: Target) -> str:
    """In words."""
    if target.kind == "number":
        return f"numbers: {', '.join(f'`{column}`' for column in target.columns)}"
    more = ", ..." if len(target.labels) > MOST_LABELS else ""
    what = "one of" if target.kind == "category" else "any of"
    return f"`{target.name}`: {what} {', '.join(f'`{label}`' for label in target.labels[:MOST_LABELS])}{more}"


def inputs(signature: Signature) -> Iterator[Sequence[str]]:
    for feature in signature.inputs:
        yield f"`{feature.name}`", kinds[feature.kind].describe(feature), ", ".join(f"`{column}`" for column in feature.columns)


def columns(data: Artifact) -> Iterator[str]:
    """The profile of the data, a line a column."""
    if profile.FILE in data.manifest.files:
        head = ("column", "kind", "missing", "distinct", "typical", "range")
        found = profile.rows(json.loads(data.read(profile.FILE)))
        yield "\n".join(table(head, [(f"`{row.name}`", *row[1:6]) for row in found[:MOST_COLUMNS]]))
        if len(found) > MOST_COLUMNS:
            yield f"{len(found) - MOST_COLUMNS} more columns are in the report."


def by_class(model: Artifact, target: Target) -> Iterator[str]:
    """How well the test rows of each class, or label, are told."""
    read = read_results(model, target)
    if isinstance(read, Categories | Labels):
        head = ("class", "test rows", "precision", "recall", "F1")
        found = read.scores[:MOST_LABELS]
        yield "\n".join(table(head, [(f"`{one.label}`", one.rows, *map(_said, (one.precision, one.recall, one.f1))) for one in found]))


def budget(compress: Artifact) -> Iterator[str]:
    """What was asked for, where it was a budget."""
    part = compress.manifest.section["part"]
    if part["kind"] == "budget":
        speed = f", at least {part['speed']:g} times as fast at batch {part['batch']}" if part.get("speed") else ""
        yield f"Asked for: at most {part['size']:g} of the packed bytes, and at most {part['drop']:g} lost on the validation split{speed}."


def metrics(model: Artifact) -> Iterator[str]:
    found = model.info["metrics"]
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    yield from table(("metric", *found), [(name, *(_said(values.get(name)) for values in found.values())) for name in names])


def small(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    head = ("", "bytes", "packed", "numbers", "1 row", "32 rows", f"{rows[0]['split']} {rows[0]['metric']}", "agreement")
    times = [[f"{row[f'seconds_{batch}'] * 1e6:.0f} us" for batch in (1, 32)] for row in rows]
    cells = [(f"{row['bytes']:,}", f"{row['zlib']:,}", f"{row['nonzero']:,}", *took) for row, took in zip(rows, times, strict=True)]
    ends = [(_said(row["value"]), _said(row["agreement"])) for row in rows]
    yield from table(head, [(row["what"], *some, *rest) for row, some, rest in zip(rows, cells, ends, strict=True)])


def table(head: Sequence[str], rows: Any) -> Iterator[str]:
    """Lines of a table in Markdown."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows)


def _said(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
