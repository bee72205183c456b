"""How long work says where it is: one function type, so that no stage knows what draws it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

Progress = Callable[[str, float | None, str], None]
"""progress(stage, share, text): the share of the stage that is done (0 to 1, None when unknown) and one line on it."""


def silent(stage: str, share: float | None, text: str) -> None:
    """Progress that nobody looks at."""


WARNING = "warning: "
"""What a text begins with that must stay to be read."""

BLOCK = "\n"
"""What a text of several lines begins with, which stays to be read too."""

ENCODED = "DLOPT_PROGRESS"
"""The environment variable that asks for lines of JSON instead of lines for people, by the value "json": `dlopt submit` sets it."""
MARK = "@dlopt "
"""What such a line begins with."""


def encoded(**said: Any) -> str:
    """A line for another program: of work, {stage, share, text, seconds_left}; of its end, {run, name, metrics, seconds, made}."""
    return MARK + json.dumps(said)


def decoded(line: str) -> dict[str, Any] | None:
    """What `encoded` was given; None for any other line."""
    if not line.startswith(MARK):
        return None
    try:
        said = json.loads(line.removeprefix(MARK))
    except ValueError:  # of two processes that wrote at once
        return None
    return said if isinstance(said, dict) else None


def seconds_left(text: str) -> float | None:
    """Of a text that ends as `4:05 left`, `1:02:33 left` or `2 d 3:04:05 left`, else None."""
    found = LEFT.search(text)
    if not found:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


LEFT = re.compile(r"(?:(\d+) d )?(?:(\d+):)?(\d+):(\d\d) left$")
