"""dlopt: raw data to a trained, served and watched deep-learning model with one job.

    run = dlopt.run("job.yaml")                      # or run(data=frame, target="late")
    run.metrics["test"], run.report, run.predict(frame)

Nothing heavy is imported before a name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlopt.api import Begun, DloptError, Job, Page, Profile, Run, begin, compare, load, profile, run

__all__ = ["Begun", "DloptError", "Job", "Page", "Profile", "Run", "begin", "compare", "load", "profile", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dlopt' has no attribute {name!r}")
    from dlopt import api

    globals()[name] = getattr(api, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*__all__, "__doc__", "__name__", "__path__"])
