"""Progress where a notebook can show it, a terminal can, or nobody looks."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dlopt.progress import BLOCK, WARNING, Progress, silent

EVERY = 0.2
"""Seconds between two drawings of a stage."""


@contextmanager
def shown(name: str, progress: Progress | bool | None) -> Iterator[Progress]:
    """What to tell the pipeline. progress: a function of one's own, False for none, else a display for wherever this runs."""
    if callable(progress):
        yield progress
    elif progress is False or (progress is None and not _in_notebook() and not sys.stderr.isatty()):
        yield silent
    elif _in_notebook():
        yield Bars(name)
    else:
        from dlopt.terminal import Terminal

        with Terminal(name) as terminal:
            yield terminal.progress


class Bars:
    """A line a stage with a bar, drawn anew in one output of the cell; needs no ipywidgets."""

    def __init__(self, name: str) -> None:
        from IPython.display import display

        self.name, self.drawn = name, 0.0
        self.stages: dict[str, tuple[float | None, str]] = {}
        self.remarks: list[str] = []
        self.output: Any = display(self, display_id=True)

    def __call__(self, stage: str, share: float | None, text: str) -> None:
        """As dlopt.progress.Progress."""
        remark = text.startswith((WARNING, BLOCK))
        if remark:
            self.remarks.append(text.removeprefix(BLOCK))
        new = stage not in self.stages
        if not remark:
            self.stages |= {known: (1.0, said) for known, (_, said) in self.stages.items()} if new else {}
            self.stages[stage] = (share, text)
        if new or remark or share == 1.0 or time.monotonic() - self.drawn > EVERY:
            self.drawn = time.monotonic()
            self.output.update(self)

    def __repr__(self) -> str:
        return "\n".join(f"{self.name}: {stage}  {text}" for stage, (_, text) in self.stages.items())

    def _repr_html_(self) -> str:
        lines = []
        for stage, (share, text) in self.stages.items():
            value = "" if share is None else f' value="{share:.3f}"'
            lines.append(f"<tr><td>{html.escape(stage)}</td><td><progress{value}></progress></td><td>{html.escape(text)}</td></tr>")
        remarks = "".join(f"<div>{html.escape(remark)}</div>" for remark in self.remarks)
        return f"<b>{html.escape(self.name)}</b><table>{''.join(lines)}</table>{remarks}"


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")
