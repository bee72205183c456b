"""`dlopt plot-schedule`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.cli.options import add_home, add_job, command, positive

if TYPE_CHECKING:
    from dlopt.artifact import Artifact
    from dlopt.spec import Job

EXAMPLES = """
  dlopt plot-schedule job.yaml
  dlopt plot-schedule job.yaml train.schedule.warmup=1 -o rate.svg
  dlopt plot-schedule job.yaml --rows 50000
"""


def add(commands: Any) -> None:
    """The command."""
    parser = command(
        commands, "plot-schedule", _plot, "draw the learning rate of a job over its run; reads no rows that it need not", EXAMPLES
    )
    add_job(parser)
    add_home(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="draw a figure into an .svg, .png or .html file, not in letters")
    parser.add_argument(
        "--rows", type=positive, metavar="N", help="so many training rows, instead of asking the prepared data or the source"
    )


def _plot(options: argparse.Namespace) -> None:
    from dlopt import pipeline, spec
    from dlopt.report import schedule

    job = spec.load(options.job, options.overrides)
    rows, source = (options.rows, "--rows") if options.rows else _training_rows(job, pipeline.prepared(job, options.home))
    curve = schedule.curve_of(job.fit, rows)
    if options.output:
        schedule.write(options.output, curve, f"{job.name}: {job.train.schedule.kind}")
        print(options.output)
        return
    print(schedule.text(curve))
    print(f"{rows:,} training rows ({source}), {curve.course.steps:,} steps; -o FILE.svg draws a figure. {curve.says}".strip())


def _training_rows(job: Job, data: Artifact | None) -> tuple[int, str]:
    """How many there are, and who says so. Raises DloptError when nobody can."""
    from dlopt.data.count import training_rows
    from dlopt.part import DloptError

    if data:
        return data.info["counts"]["train"], "as prepared"
    if rows := training_rows(job.data):
        return rows, "about, before cleaning"
    raise DloptError("--rows: the data are not prepared, and their rows cannot be counted without reading them all: say how many there are")
