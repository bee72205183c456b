"""The command line: a module for each command, light until its command is run, so that `--help` and completion answer at once.

Exit codes: 0 done, 1 a failure of the system (with its cause), 2 a mistake that the user can mend (a line each), 130 ended by Ctrl-C,
141 nobody reads on, 143 ended by SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from dlopt.cli import (
    batch,
    bench_serve,
    check,
    cluster,
    compare,
    completion,
    compress,
    deploy,
    docs,
    doctor,
    explain,
    export,
    init,
    predict,
    profile,
    run,
    runs,
    schedule,
    serve,
    submit,
    ui,
    verify,
)
from dlopt.cli.options import Mistake, Parser, close_to

SMALL, SERVING = (compress, export, verify), (predict, serve, bench_serve, deploy)
CLUSTER = (submit, cluster, doctor)
COMMANDS = (init, run, check, explain, profile, schedule, batch, *SMALL, *SERVING, *CLUSTER, compare, runs, ui, docs, completion)
EPILOG = """the first steps:
  dlopt init data.csv --target late -o job.yaml   write a job
  dlopt run job.yaml                              train, export, report
  dlopt serve data                                try it in a browser

dlopt COMMAND --help has examples of each; dlopt docs opens the pages."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    stopped = "stopped"
    try:
        options = _options(words)
        stopped = options.stopped
        from dlopt.part import DloptError
        from dlopt.train.cluster.stopping import GaveUp, Stopped

        try:
            code = int(options.command(options) or 0)
            sys.stdout.flush()
            return code
        except (DloptError, GaveUp, Stopped) as error:
            if os.environ.get("DLOPT_TRACEBACK"):
                traceback.print_exc()
            for line in str(error).splitlines():
                print(f"dlopt: {line}", file=sys.stderr)
            return {GaveUp: 1, Stopped: 143}.get(type(error), 2)
    except Mistake as error:
        print(f"dlopt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"dlopt: {stopped}", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141
        if os.environ.get("DLOPT_TRACEBACK"):
            raise
        lines = str(error).strip().splitlines()
        print(f"dlopt: {type(error).__name__}: {lines[-1] if lines else 'no message'} (DLOPT_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1


def _options(words: list[str]) -> argparse.Namespace:
    """What the words ask for. What stands after options, such as overrides, argparse hands back. Raises Mistake."""
    parser = make_parser()
    known = parser.commands
    first = next((word for word in words if not word.startswith("-")), None)
    if first is not None and words[0] == first and first not in known:
        raise Mistake(f"there is no command {first!r}{close_to(first, list(known))}")
    options, left = parser.parse_known_args(words)
    odd = [word for word in left if word.startswith("-") and len(word) > 1]
    if odd or (left and not options.rest):
        word = (odd or left)[0]
        names = [name for action in known[str(first)]._actions for name in action.option_strings]
        raise Mistake(f"{first}: there is no option {word}{close_to(word, names)}" if odd else f"{first}: {word!r} is one word too many")
    if left:
        getattr(options, options.rest).extend(left)
    return options


def make_parser() -> Parser:
    """The parser of all commands; its `commands` are theirs by name."""
    parser = Parser(prog="dlopt", description="Raw data to a trained, served and watched model with one job file.", epilog=EPILOG)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions of dlopt and of what it stands on")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)
    for module in COMMANDS:
        module.add(commands)
    parser.commands = dict(commands.choices)
    return parser


class _Version(argparse.Action):
    """Prints a line and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from dlopt.artifact import versions

        found = versions()
        others = ", ".join(f"{name} {said}" for name, said in found.items() if name != "dlopt")
        print(f"dlopt {found.get('dlopt', 'not installed')} (Python {sys.version.split()[0]}, {others})")
        parser.exit()


def _nobody_reads() -> bool:
    """Whether who read stdout or stderr has gone, as `head` does; then Python is kept from saying so once more as it ends."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        try:
            poll = select.poll()
            poll.register(stream.fileno(), select.POLLOUT)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
                gone = True
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError):  # a stream of a program that has none
            continue
    return gone


if __name__ == "__main__":
    sys.exit(main())
