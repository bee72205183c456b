"""Numbers as the report writes them."""

from __future__ import annotations

import math

from dlopt.train.measure.metric import METRICS


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


def metric_name(key: str) -> str:
    """macro_f1 as macro F1."""
    return METRICS[key].written if key in METRICS else key.replace("_", " ")


def is_share(key: str) -> bool:
    """Whether it is a share of rows, and written in per cent."""
    return key in METRICS and METRICS[key].is_share


def smaller_is_better(key: str) -> bool:
    """Of losses and errors."""
    return key in METRICS and METRICS[key].smaller_is_better


def metric(key: str, value: float | None, digits: int = 2) -> str:
    """A metric's value; a loss or an error that is not there was not finite, and another could not be told."""
    if value is None:
        return "not finite" if smaller_is_better(key) else "-"
    return percent(value, digits) if is_share(key) else figure(value)
