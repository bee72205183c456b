"""`dlopt compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dlopt.cli.options import add_home, command

EXAMPLES = """
  dlopt compare mnist mnist_cnn
  dlopt compare runs/mnist-77b72eee runs/mnist-0c1d2e3f -o mnist.html
"""


def add(commands: Any) -> None:
    """The command."""
    parser = command(commands, "compare", _compare, "write a page with 2 to 6 runs side by side", EXAMPLES)
    parser.add_argument("run", metavar="RUN", nargs="+", help="a run's folder, or a job's name for its newest run")
    parser.add_argument("-o", "--output", type=Path, default=Path("compare.html"), metavar="FILE", help="default: compare.html")
    parser.set_defaults(rest="run")
    add_home(parser)


def _compare(options: argparse.Namespace) -> None:
    from dlopt.api.comparing import compare

    print(compare(options.run, options.output, home=options.home).path)
