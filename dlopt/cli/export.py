"""`dlopt export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dlopt.cli.options import add_home, command

EXAMPLES = """
  dlopt export mnist --format torch_export
  dlopt export mnist --format onnx -o digits.onnx precision=float16
  dlopt export runs/mnist-77b72eee --format safetensors -o hub/
"""


def add(commands: Any) -> None:
    """The command."""
    parser = command(commands, "export", _export, "write a run's model in a format, proven equal on the whole test split", EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a job's name for its newest run")
    parser.add_argument("fields", metavar="a=b", nargs="*", help="fields of the format, such as precision=float16")
    parser.set_defaults(rest="fields")
    parser.add_argument("--format", required=True, metavar="FORMAT", help="onnx, torch_export, ...: `dlopt explain export` has them all")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="PLACE", help="a file, or a folder that is there (default: beside the run's other results)"
    )
    add_home(parser)


def _export(options: argparse.Namespace) -> None:
    from dlopt.api.exporting import export
    from dlopt.runs import find
    from dlopt.spec import parsed
    from dlopt.terminal import Terminal

    folder = find(options.run, options.home)
    with Terminal(folder.name) as terminal:
        place = export(folder, options.format, dict(map(parsed, options.fields)), options.output, terminal.progress)
    print(place)
