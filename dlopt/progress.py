"""How long work says where it is: one function type, so that no stage knows what draws it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float | None, str], None]
"""progress(stage, share, text): the share of the stage that is done (0 to 1, None when unknown) and one line on it."""


def silent(stage: str, share: float | None, text: str) -> None:
    """Progress that nobody looks at."""


WARNING = "warning: "
"""What a text begins with that must stay to be read."""

BLOCK = "\n"
"""What a text of several lines begins with, which stays to be read too."""
