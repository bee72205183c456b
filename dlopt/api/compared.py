"""Predictions compared with what is true of the rows: sums that parts of a file add up to, and the metrics that follow from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlopt.data.kinds import AnyTarget
from dlopt.data.types.exact import raw_values
from dlopt.part import Target

Sums = dict[str, Any]
"""Of rows: JSON, so that each part of the output can keep its own."""


def compare(part: AnyTarget, target: Target, table: pa.Table, outputs: np.ndarray, decided: list[list[int]], good: np.ndarray) -> Sums:
    """What rows that were predicted have to say of the predictions; {} where none says what is true.

    table: raw rows, canonical. outputs: (rows, target.size). decided: the labels that each row got. good: (rows,), which were
    predicted.
    """
    true, wrong = part.read(table, bool(target.labels) and isinstance(target.labels[0], int))
    there = good.copy()
    there[list(wrong)] = False
    if not there.any():
        return {}
    if target.kind == "number":
        return _numbers(raw_values(true, target.size)[there], outputs[there])
    if target.kind == "category":
        known = pc.index_in(true, pa.array(target.labels, true.type)).fill_null(-1).to_numpy(zero_copy_only=False)[there]
        best = np.array([row[0] for row in decided])[there]
        return _labels(np.eye(target.size + 1, dtype=bool)[known][:, :-1], np.eye(target.size, dtype=bool)[best])
    rows = np.flatnonzero(there)
    sets = [set(labels) for labels in true.take(pa.array(rows)).to_pylist()]
    said = np.zeros((len(rows), target.size + 1), bool)  # the last one is for labels that the model does not know, which it never gives
    for place, row in enumerate(rows.tolist()):
        said[place, decided[row]] = True
    names = [str(label) for label in target.labels]
    found = _labels(np.array([[*(name in one for name in names), not one <= set(names)] for one in sets]), said)
    return found | {name: found[name][:-1] for name in ("true", "said", "both")}


def _labels(true: np.ndarray, said: np.ndarray) -> Sums:
    """Of bool (rows, labels)."""
    return {
        "rows": len(true),
        "right": int((true == said).all(axis=1).sum()),
        "true": true.sum(axis=0).tolist(),
        "said": said.sum(axis=0).tolist(),
        "both": (true & said).sum(axis=0).tolist(),
    }


def _numbers(true: np.ndarray, said: np.ndarray) -> Sums:
    true, said = true.astype(np.float64), said.astype(np.float64)
    off = said - true
    first = true[0]  # sums of squares lose digits far from 0
    return {
        "rows": len(true),
        "first": first.tolist(),
        "off": np.abs(off).sum(axis=0).tolist(),
        "squares": np.square(off).sum(axis=0).tolist(),
        "sum": (true - first).sum(axis=0).tolist(),
        "spread": np.square(true - first).sum(axis=0).tolist(),
    }


def merged(parts: list[Sums]) -> Sums:
    """All parts together."""
    parts = [part for part in parts if part]
    if not parts:
        return {}
    if "first" in parts[0]:
        parts = [_moved(part, np.array(parts[0]["first"])) for part in parts]
    found = {name: np.sum([part[name] for part in parts], axis=0).tolist() for name in parts[0] if name != "first"}
    return found | ({"first": parts[0]["first"]} if "first" in parts[0] else {})


def _moved(part: Sums, first: np.ndarray) -> Sums:
    """Sums of numbers around another one."""
    by = np.array(part["first"]) - first
    total = np.array(part["sum"]) + part["rows"] * by
    spread = np.array(part["spread"]) + 2 * by * np.array(part["sum"]) + part["rows"] * by**2
    return part | {"sum": total, "spread": spread}


def metrics(sums: Sums, target: Target) -> dict[str, float]:
    """What the sums come to, by the names that training uses; {} of no rows."""
    if not sums:
        return {}
    rows = sums["rows"]
    if target.kind == "number":
        off, squares, total, spread = (np.array(sums[name]) for name in ("off", "squares", "sum", "spread"))
        variance = spread - total**2 / rows
        explained = 1 - np.where(variance > 0, squares / np.where(variance > 0, variance, 1), np.nan)
        return {"mae": float(off.mean() / rows), "rmse": float(np.sqrt(squares / rows).mean()), "r2": float(explained.mean())}
    true, said, both = (np.array(sums[name], np.float64) for name in ("true", "said", "both"))
    scores = np.divide(2 * both, true + said, out=np.zeros_like(both), where=true + said > 0)
    micro = float(2 * both.sum() / max(true.sum() + said.sum(), 1))
    name = "accuracy" if target.kind == "category" else "subset_accuracy"
    found = {name: sums["right"] / rows, "macro_f1": float(scores.mean())}
    return found if target.kind == "category" else found | {"micro_f1": micro}
