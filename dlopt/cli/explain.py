"""`dlopt explain` and `dlopt schema`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dlopt.cli.options import command

EXPLAIN = """
  dlopt explain
  dlopt explain train.schedule
  dlopt explain train.optimizer.adamw.lr
  dlopt explain data.inputs.number
"""
SCHEMA = """
  dlopt schema -o dlopt.schema.json
  dlopt schema | jq '.properties | keys'
with a first line `# yaml-language-server: $schema=dlopt.schema.json` in a job,
editors complete its fields and mark mistakes.
"""


def add(commands: Any) -> None:
    """Both commands."""
    parser = command(commands, "explain", _explain, "say what a field of a job means, what it takes and what is below it", EXPLAIN)
    parser.add_argument("field", metavar="FIELD", nargs="?", default="", help="dotted, with kinds among the names; without it, a whole job")
    parser = command(commands, "schema", _schema, "print the JSON Schema of a job, for editors", SCHEMA)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it into a file")


def _explain(options: argparse.Namespace) -> None:
    from dlopt.fields import explain

    print(explain(options.field))


def _schema(options: argparse.Namespace) -> None:
    from dlopt.artifact import write_atomically
    from dlopt.docstrings import json_schema
    from dlopt.spec import Job

    text = json.dumps(json_schema(Job), indent=1)
    if options.output:
        write_atomically(options.output, text)
    print(options.output or text)
