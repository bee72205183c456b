"""Whether training is asked to end."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Reason = Literal["stop", "preempted"]


class Stopped(Exception):
    """Training has saved where it stands and ends."""


class Preempted(Exception):
    """Training has saved where it stands, since this machine goes away."""


def reason(out: Path) -> Reason | None:
    """Why training is to end, if it is."""
    return "stop" if (out / "stop").exists() else None
