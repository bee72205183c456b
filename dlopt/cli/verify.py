"""`dlopt verify`."""

from __future__ import annotations

import argparse
from typing import Any

from dlopt.cli.options import add_home, command

EXAMPLES = """
  dlopt verify mnist
  dlopt verify runs/mnist-77b72eee
"""


def add(commands: Any) -> None:
    """The command."""
    help = "compute a run's digests, metrics and formats anew, and say what differs"
    parser = command(commands, "verify", _verify, help, EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a job's name for its newest run")
    add_home(parser)


def _verify(options: argparse.Namespace) -> int:
    from dlopt.api.verifying import verify
    from dlopt.runs import find
    from dlopt.terminal import Terminal

    folder = find(options.run, options.home)
    with Terminal(folder.name) as terminal:
        wrong = verify(folder, terminal.progress)
    for line in wrong or [f"{folder}: all is as it was sealed"]:
        print(line)
    return int(bool(wrong))
