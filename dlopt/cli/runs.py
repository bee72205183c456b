"""`dlopt runs`, `dlopt runs rm` and `dlopt gc`: what is in a home, and freeing its disk."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.cli.options import Mistake, add_home, command

if TYPE_CHECKING:
    from dlopt.disk import Item

RUNS = """
  dlopt runs
  dlopt runs --json | jq -r '.[0].run'
  dlopt runs rm mnist-77b72eee              says what would go, and asks
  dlopt runs rm mnist-77b72eee --yes
"""
GC = """
  dlopt gc                                  says what would go, and asks
  dlopt gc --yes --home /shared/runs
"""
STOPPED = "stopped; what was said to be removed is gone, the rest is there"


def add(commands: Any) -> None:
    """The commands."""
    parser = command(commands, "runs", _runs, "list the runs, newest first; `runs rm RUN ...` removes some", RUNS, stopped=STOPPED)
    parser.add_argument("words", metavar="rm RUN", nargs="*", help="runs to remove, by folder or by the folder's name within the home")
    parser.set_defaults(rest="words")
    add_home(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--yes", action="store_true", help="remove without being asked")
    parser = command(commands, "gc", _gc, "remove artifacts that no run of the home needs any more", GC, stopped=STOPPED)
    add_home(parser)
    parser.add_argument("--yes", action="store_true", help="remove without being asked")


def _runs(options: argparse.Namespace) -> int:
    from dlopt import remote, runs
    from dlopt.terminal import print_runs

    if options.words:
        if options.words[0] != "rm" or len(options.words) == 1:
            raise Mistake(f"runs: {' '.join(options.words)!r}: to remove some write `dlopt runs rm RUN ...`")
        from dlopt.disk import of_runs

        return _remove(of_runs(options.home, options.words[1:]), options)
    records = [record | {"run": remote.said(Path(record["run"]))} for record in runs.listing(options.home)]
    if options.json:
        print(json.dumps(records))
    elif records:
        print_runs(records)
    else:
        print(f"no runs in {options.home}")
    return 0


def _gc(options: argparse.Namespace) -> int:
    from dlopt.disk import unneeded

    return _remove(unneeded(options.home), options)


def _remove(items: Sequence[Item], options: argparse.Namespace) -> int:
    """Say what would go, ask, and let it go."""
    from dlopt.disk import size, written

    if not items:
        print(f"{options.home}: nothing to remove")
        return 0
    sizes = [size(item.path) for item in items]
    for item, taken in zip(items, sizes, strict=True):
        print(f"{written(taken):>10}  {_within(item.path, options.home)}  {item.why}")
    print(f"{written(sum(sizes)):>10}  in all", flush=True)
    if not options.yes:
        if not sys.stdin.isatty():
            print("dlopt: nothing is removed without --yes", file=sys.stderr)
            return 2
        print("remove all of this? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing removed")
            return 0
    from dlopt.disk import remove

    for item in items:
        remove(item)
        print(f"removed {_within(item.path, options.home)}", flush=True)
    return 0


def _within(path: Path, home: Path) -> Path:
    return path.relative_to(home.resolve()) if path.is_relative_to(home.resolve()) else path
