"""Values of Python, numpy, pandas and Pillow as a request has them in JSON."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np


def plain_row(row: Any) -> Any:
    """A row of columns, or the bare value of one."""
    return (
        {str(name): plain_value(value) for name, value in row.items()}
        if isinstance(row, Mapping) and set(row) != {"b64"}
        else plain_value(row)
    )


def plain_value(value: Any) -> Any:
    """A value of Python, numpy, pandas or Pillow as JSON has it; files of images by their path or their bytes."""
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        value = value.read_bytes()
    if hasattr(value, "save") and hasattr(value, "getbands"):
        content = io.BytesIO()
        value.save(content, format="png")
        value = content.getvalue()
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return {"b64": base64.b64encode(value["bytes"]).decode()}
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return None if isinstance(value, float) and value != value else value
