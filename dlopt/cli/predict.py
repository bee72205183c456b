"""`dlopt predict`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from dlopt.cli.options import add_address, add_home, command, set_ray_environment

EXAMPLES = """
  dlopt predict flights new.parquet -o predictions.parquet
  dlopt predict flights 's3://bucket/*.csv' -o said.csv --columns id,day
  dlopt predict runs/mnist-77b72eee 'photos/*.png' -o said.jsonl
"""


def add(commands: Any) -> None:
    """The command."""
    parser = command(
        commands,
        "predict",
        _predict,
        "predict every row of files with a run's model; run again, it does what is left",
        EXAMPLES,
        stopped="stopped; the same command goes on from here",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a job's name for its newest run")
    parser.add_argument("input", metavar="INPUT", help="files with the columns that the model takes: a path, a glob, a folder, an address")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="a .parquet, .csv or .jsonl file, or a folder for parquet parts"
    )
    parser.add_argument("--columns", metavar="A,B", help="columns of the input to write as well (default: all but images and lists)")
    add_home(parser)
    add_address(parser, "a running Ray cluster to work on; without it threads of this process do")
    parser.add_argument("--json", action="store_true", help="print one JSON object {path, rows, failed, compared, metrics, seconds, kept}")


def _predict(options: argparse.Namespace) -> None:
    set_ray_environment(options)
    from dlopt.api.scoring import score
    from dlopt.terminal import Terminal

    columns = None if options.columns is None else [name for name in options.columns.split(",") if name]
    address = options.address or os.environ.get("RAY_ADDRESS")
    with Terminal(options.run) as terminal:
        found = score(
            options.run, options.input, options.output, home=options.home, columns=columns, address=address, progress=terminal.progress
        )
    if options.json:
        print(json.dumps(found._asdict() | {"path": str(found.path)}))
        return
    kept = f", {found.kept:,} of them from before" if found.kept else ""
    failed = f"; {found.failed:,} could not be read (column `error`)" if found.failed else ""
    print(f"{found.path}: {found.rows:,} rows in {found.seconds:.1f} s{kept}{failed}")
    if found.compared:
        figures = "   ".join(f"{name} {value:.4f}" for name, value in found.metrics.items())
        print(f"compared with the target of {found.compared:,} rows: {figures}")
