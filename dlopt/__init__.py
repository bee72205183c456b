"""dlopt: raw data to a trained, served and watched deep-learning model with one job.

    run = dlopt.run("job.yaml")                      # or run(data=frame, target="late")
    run.metrics["test"], run.report, run.predict(frame)

Nothing heavy is imported before a name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlopt.api.begun import Begun, begin
    from dlopt.api.comparing import compare
    from dlopt.api.page import Page
    from dlopt.api.profiles import Profile, profile
    from dlopt.api.running import Run, load, run
    from dlopt.export.pickled import load_estimator
    from dlopt.part import DloptError
    from dlopt.spec import Job

WHERE = {
    "api.begun": ("Begun", "begin"),
    "api.comparing": ("compare",),
    "api.page": ("Page",),
    "api.profiles": ("Profile", "profile"),
    "api.running": ("Run", "load", "run"),
    "export.pickled": ("load_estimator",),
    "part": ("DloptError",),
    "spec": ("Job",),
}
"""Module to what it has of these names: loading a run and asking it takes no torch."""
__all__ = ["Begun", "DloptError", "Job", "Page", "Profile", "Run", "begin", "compare", "load", "load_estimator", "profile", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dlopt' has no attribute {name!r}")
    from importlib import import_module

    module = next(module for module, names in WHERE.items() if name in names)
    globals()[name] = getattr(import_module(f"dlopt.{module}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*__all__, "__doc__", "__name__", "__path__"])
