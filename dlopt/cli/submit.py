"""`dlopt submit`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dlopt.cli.options import add_job, command

EXAMPLES = """
  dlopt submit job.yaml --address http://head:8265
  dlopt submit job.yaml --address http://head:8265 resources.workers=4
"""


def add(commands: Any) -> None:
    """The command."""
    parser = command(
        commands,
        "submit",
        _submit,
        "send a job to a Ray cluster, with this folder, and follow its logs",
        EXAMPLES,
        stopped="stopped before the cluster had said that it has the job: `ray job list` shows whether it does",
    )
    add_job(parser)
    parser.add_argument("--address", required=True, help="the cluster's dashboard, http://head:8265")
    parser.add_argument("--home", help="folder for runs, as the cluster's nodes see it (default: dlopt-runs in the head's home folder)")
    parser.add_argument("--working-dir", default=".", help="folder that is sent along (default: this one)")


def _submit(options: argparse.Namespace) -> int:
    from dlopt import spec
    from dlopt.submit import submit

    spec.load(options.job, options.overrides)
    return submit(options.job, options.overrides, options.address, Path(options.working_dir), options.home)
