"""Numbers as the report writes them."""

from __future__ import annotations

import math


def whole(value: float) -> str:
    """1234567 as 1,234,567."""
    return f"{value:,.0f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share of one; a dash where there is nothing to take a share of."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def figure(value: float | None, digits: int = 4) -> str:
    """So many significant digits."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def seconds(value: float) -> str:
    """A duration."""
    return f"{value:,.1f} s"


NAMES = {"r2": "R²", "mae": "MAE", "rmse": "RMSE", "f1": "F1", "roc_auc": "ROC AUC", "top5_accuracy": "top-5 accuracy"}
"""Metrics that are not written as they are spelt."""
SHARES = ("accuracy", "top5_accuracy", "subset_accuracy", "precision", "recall", "macro_precision", "macro_recall")
"""Metrics that are shares of rows, and written in per cent."""


SMALLER_IS_BETTER = ("loss", "mae", "rmse", "calibration_error")
"""Losses and errors."""


def metric_name(key: str) -> str:
    """macro_f1 as macro F1."""
    for name, written in NAMES.items():
        if key == name or key.endswith(f"_{name}"):
            return f"{key[: -len(name)].replace('_', ' ')}{written}"
    return key.replace("_", " ")


def metric(key: str, value: float | None, digits: int = 2) -> str:
    """A metric's value; a loss or an error that is not there was not finite, and another could not be told."""
    if value is None:
        return "not finite" if key in SMALLER_IS_BETTER else "-"
    return percent(value, digits) if key in SHARES else figure(value)
