"""`dlopt compress`."""

from __future__ import annotations

import argparse
from typing import Any

from dlopt.cli.options import add_home, command

EXAMPLES = """
  dlopt compress mnist quantize
  dlopt compress mnist '{kind: prune, sparsity: 0.9, epochs: 5}' share
  dlopt compress mnist --budget drop=0.005 size=0.1
  dlopt compress runs/mnist-77b72eee '{kind: quantize, mode: static}' --json
"""


def add(commands: Any) -> None:
    """The command."""
    parser = command(
        commands,
        "compress",
        _compress,
        "make a run's model small, as a run of its own, measured beside what it was",
        EXAMPLES,
        stopped="stopped; the same command goes on from here",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a job's name for its newest run")
    parser.add_argument("parts", metavar="PART", nargs="*", help="what to do, in this order: a kind, or a mapping as in a job's compress")
    parser.set_defaults(rest="parts")
    parser.add_argument(
        "--budget", nargs="+", metavar="a=b", help="what it may cost and must bring: drop, size, speed; what to do is found"
    )
    add_home(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object {run, compressed} instead of the new run's folder")


def _compress(options: argparse.Namespace) -> None:
    import json

    from dlopt.api.compressing import compress, parts_of
    from dlopt.runs import find
    from dlopt.spec import parsed
    from dlopt.terminal import Terminal

    budget = [{"kind": "budget", **dict(map(parsed, options.budget))}] if options.budget else []
    folder, parts = find(options.run, options.home), parts_of([*options.parts, *budget])
    with Terminal(folder.name) as terminal:
        done = compress(folder, parts, terminal.progress)
        terminal.summary(done)
    print(json.dumps({"run": str(done.folder), "compressed": done.compressed}) if options.json else done.folder)
