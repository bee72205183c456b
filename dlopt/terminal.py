"""What a person sees: progress and a summary on stderr, drawn with rich; plain lines where stderr is not a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Self

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from dlopt.artifact import Artifact
from dlopt.progress import BLOCK, ENCODED, WARNING, encoded, seconds_left
from dlopt.remote import said
from dlopt.runs import REPORT, Outcome

SPLITS = ("validation", "test")
UNFOLDED = 10_000
"""Columns of an output that is not a terminal: a path stays in one piece for whoever reads it."""
EVERY, SHARE, LONGEST = 5.0, 0.02, 60.0
"""Seconds between two plain lines of the same stage: this many, later this share of the time that it has taken, and at most so many."""
EVERY_ENCODED, LONGEST_ENCODED = 1.0, 10.0
"""The same for lines that another program reads."""


class Terminal:
    """A bar a stage; `progress` is what the pipeline calls."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.console = Console(file=sys.stderr)
        self.bars = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.fields[stage]:<8}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            _Remaining(),
            TextColumn("{task.description}", table_column=Column()),  # which wraps where the window is narrow
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}
        self.encoded = os.environ.get(ENCODED) == "json"
        """Whether another program reads along, as `dlopt submit` does."""
        self.said: tuple[str, str, float, float] = ("", "", 0.0, 0.0)
        """Of the last plain line: its stage, its text, when it was said, and when the stage began."""

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def progress(self, stage: str, share: float | None, text: str) -> None:
        """As dlopt.progress.Progress."""
        if text.startswith(WARNING):
            self.console.print(f"[yellow]![/] {self.name}: {stage}  {escape(text)}", highlight=False, soft_wrap=True)
            return
        if text.startswith(BLOCK):
            self.console.print(f"{self.name}: {stage}  {escape(text.removeprefix(BLOCK))}", highlight=False, soft_wrap=True)
            return
        if self.encoded or not self.console.is_terminal:
            self._line(stage, share, text)
            return
        if stage not in self.tasks:
            self._finish()
            self.tasks[stage] = self.bars.add_task(text, total=None, stage=stage)
        self.bars.update(self.tasks[stage], description=text, total=None if share is None else 1.0, completed=share or 0.0)

    def _finish(self) -> None:
        for task in self.tasks.values():
            self.bars.update(task, total=1.0, completed=1.0)

    def _line(self, stage: str, share: float | None, text: str) -> None:
        now = time.monotonic()
        before, said, when, began = self.said
        quiet = pause(now - began, EVERY_ENCODED, LONGEST_ENCODED) if self.encoded else pause(now - began, EVERY, LONGEST)
        if before == stage and (said == text or (now - when < quiet and share not in (None, 1.0))):
            return
        self.said = (stage, text, now, began if before == stage else now)
        percent = "" if share is None else f" {min(share, 1):4.0%}"
        line = f"{self.name}: {stage}{percent}  {text}"
        if self.encoded:
            line = encoded(stage=stage, share=None if share is None else round(share, 4), text=text, seconds_left=seconds_left(text))
        print(line, file=sys.stderr, flush=True)

    def summary(self, run: Outcome) -> None:
        """What came out, in two lines."""
        if self.encoded:
            told = {"run": said(run.folder), "name": run.name, "metrics": run.metrics, "seconds": run.seconds, "made": list(run.made)}
            print(encoded(**told), file=sys.stderr, flush=True)
            return
        self.metrics(run.name, run.seconds, bool(run.made), run.metrics)
        for split, found in run.spread.items():
            figures = [f"{name} {figure['mean']:.4f} ± {figure['std']:.4f}" for name, figure in found.items()]
            self._print(f"over the folds, {split}: {figures[0]}", *figures[1:])
        if run.compressed:
            self._print("compressed:", *compared(run.compressed))
        self._print(f"report: {run.folder / REPORT}", f"try it: dlopt serve {said(run.folder)}")

    def metrics(self, name: str, seconds: float, made: bool, metrics: Mapping[str, Mapping[str, float | None]]) -> None:
        """The first of them."""
        self._finish()
        self.bars.stop()
        done = f"done in {seconds:.1f} s" if made else "all is done already"
        self._print(f"{name}: {done}", *(f"{split} {_headline(found)}" for split, found in metrics.items()))

    def line(self, text: str) -> None:
        """A line that stays, above the bars."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _print(self, *pieces: str) -> None:
        """Pieces side by side as far as the window is wide; none is cut, and what follows in another line stands in a little."""
        width = self.console.width if self.console.is_terminal else UNFOLDED
        line = ""
        for piece in pieces:
            if line and cell_len(line) + 3 + cell_len(piece) > width:
                self.console.print(line, highlight=False, soft_wrap=True, markup=False)
                line = f"  {piece}"
            else:
                line = f"{line}   {piece}" if line else piece
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def prepared(self, name: str, data: Artifact) -> None:
        """What the first stage found, in a few lines."""
        self._finish()
        self.bars.stop()
        (first, rows), *others = data.info["counts"].items()
        self._print(f"{name}: {first} {rows:,}", *(f"{split} {rows:,}" for split, rows in others))
        for found in data.info["cleaning"]:
            self.console.print(f"  {found['title']}: {found['dropped']:,} rows", highlight=False, soft_wrap=True, markup=False)
        for line in data.info["warnings"]:
            self.console.print(f"[yellow]![/] {escape(line)}", highlight=False, soft_wrap=True)


def compared(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """What became smaller and faster, in a few words."""
    before, after = table
    found = [f"{before[key] / after[key]:.1f} times smaller{said}" for key, said in (("bytes", ""), ("zlib", " packed"))]
    found += [f"{before[f'seconds_{batch}'] / after[f'seconds_{batch}']:.1f} times as fast at {batch}" for batch in (1, 32)]
    if after["value"] is not None:
        found.append(f"{after['split']} {after['metric']} {before['value']:.4f} -> {after['value']:.4f}")
    return found


def pause(seconds: float, least: float = EVERY, most: float = LONGEST) -> float:
    """Seconds without a plain line, of a stage that has taken so many: a log of hours is not one of thousands of lines."""
    return min(most, max(least, SHARE * seconds))


class _Remaining(TimeRemainingColumn):
    """Time left by the share that is done, where the stage's own text does not say it better."""

    def render(self, task: Task) -> Text:
        return Text() if task.description.endswith(" left") else super().render(task)


HEADLINES = ("roc_auc", "accuracy", "subset_accuracy", "micro_f1", "r2", "mae")
"""Metrics that tell most in few words, two of which are said of a split."""


def _headline(metrics: Mapping[str, float | None]) -> str:
    chosen = sorted((name for name in HEADLINES if metrics.get(name) is not None), key=("accuracy", *HEADLINES).index)[:2]
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in chosen)


def print_runs(records: list[dict[str, Any]]) -> None:
    """A table on stdout."""
    rows = [
        (str(one.get("name")), str(one.get("created")), *(_headline(one.get("metrics", {}).get(split, {})) for split in SPLITS), one["run"])
        for one in records
    ]
    _print_table(_stdout(), ("name", "created", *SPLITS, "run"), rows)


def _stdout() -> Console:
    """As wide as the window; what is piped is not folded."""
    return Console(width=None if sys.stdout.isatty() else UNFOLDED, highlight=False)


def _print_table(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> None:
    """With a line for each row; where the window is too narrow for that, with a line for each cell. No cell is cut or folded by us."""
    table = Table(box=None, pad_edge=False)
    for index, title in enumerate(titles):
        table.add_column(title, no_wrap=True, justify="right" if index in right else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    if Measurement.get(console, console.options.update(max_width=UNFOLDED), table).maximum <= console.width:
        console.print(table)
        return
    width = max(map(len, titles[1:]))
    for first, *cells in rows:
        console.print(escape(first), soft_wrap=True)
        for title, cell in zip(titles[1:], cells, strict=True):
            console.print(f"  [bold]{title:{width}}[/]  {escape(cell)}", soft_wrap=True)


def print_profile(profile: dict[str, Any], job: str, console: Console | None = None) -> None:
    """A table of the columns, what is suspicious about them, and how a job could begin, on stdout or another console."""
    from dlopt.report.profile import NOTHING, rows

    console, found = console or _stdout(), rows(profile)
    titles = ("column", "kind", "missing", "different", "typical", "range", "alone predicts")
    shown = [index for index in range(len(titles)) if index < 2 or any(row[index] != NOTHING for row in found)]
    console.print(f"{sum(profile['rows'].values()):,} rows, {len(found)} columns")
    cells = [[row[index] for index in shown] for row in found]
    _print_table(console, [titles[index] for index in shown], cells, right=[place for place, index in enumerate(shown) if index >= 2])
    for line in profile["warnings"]:
        console.print(f"[yellow]![/] {escape(line)}", soft_wrap=True)
    console.print(f"\nA job could begin like this:\n{escape(job)}", end="", soft_wrap=True)


def print_jobs(states: list[dict[str, Any]]) -> None:
    """Jobs on a cluster, as dlopt.cluster.submit.state has them, on stdout."""
    rows = []
    for found in states:
        started = datetime.fromtimestamp(found["started"]).isoformat(" ", "seconds") if found["started"] else ""
        share = "" if found["share"] is None else f"{found['share']:.0%} "
        tested = _headline((found["metrics"] or {}).get("test", {}))
        done = f"{found['run']}  {tested}" if found["run"] else found["message"]
        rows.append([str(found["job"]), found["status"], started, f"{found['stage']} {share} {found['text']}" if found["stage"] else done])
    _print_table(_stdout(), ["job", "status", "started", "so far"], rows)
