"""`dlopt check`."""

from __future__ import annotations

import argparse
from typing import Any

from dlopt.cli.options import add_job, command

EXAMPLES = """
  dlopt check job.yaml
  dlopt check job.yaml train.epochs=3 > resolved.yaml
"""


def add(commands: Any) -> None:
    """The command."""
    add_job(command(commands, "check", _check, "validate a job and print it with all its defaults; starts no Ray", EXAMPLES))


def _check(options: argparse.Namespace) -> None:
    from dlopt import pipeline, spec

    job = spec.load(options.job, options.overrides)
    pipeline.check(job)
    print(pipeline.as_yaml(job), end="")
