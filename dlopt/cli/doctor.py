"""`dlopt doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from dlopt.cli.options import add_address, add_home, command

EXAMPLES = """
  dlopt doctor                                  this machine
  dlopt doctor --address http://head:8265       all nodes of a cluster
  dlopt doctor --json | jq '.[] | select(.state != "ok")'
"""


def add(commands: Any) -> None:
    """The command."""
    parser = command(
        commands, "doctor", _doctor, "look at a machine or a cluster before a run: what is wrong, and how to mend it", EXAMPLES
    )
    add_address(parser, "a cluster to look at: its dashboard, http://head:8265, or on one of its nodes host:6379; else $RAY_ADDRESS")
    add_home(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON list of {what, state, says, mend}")


def _doctor(options: argparse.Namespace) -> int:
    """Exit code 1 where something is wrong."""
    from dlopt.session import address_of, connected, set_environment

    address = address_of(options.address)
    set_environment(address)
    from dlopt.cluster import doctor

    if address and address.startswith(("http://", "https://")):
        found = _from_the_head(address, str(options.home))
    elif address:
        with connected(address):
            found = [one._asdict() for one in doctor.cluster(options.home.absolute())]
    else:
        found = [one._asdict() for one in doctor.machine(options.home.absolute())]
    if options.json:
        print(json.dumps(found))
    else:
        _print(found)
    return 1 if any(one["state"] == "wrong" for one in found) else 0


def _from_the_head(address: str, home: str) -> list[dict[str, Any]]:
    """As the cluster's head sees it, by a job that is sent there."""
    from dlopt.cluster.head import Head
    from dlopt.cluster.submit import ran

    given = [] if home == "runs" else ["--home", home]
    return ran(Head(address), "doctor", ["dlopt", "doctor", "--json", *given])


def _print(found: list[dict[str, Any]]) -> None:
    marks = {"ok": "ok", "warning": "warning", "wrong": "WRONG"}
    for one in found:
        print(f"{marks[one['state']]:<8} {one['what']}: {one['says']}")
        if one["mend"]:
            print(f"         mend: {one['mend']}")
    wrong = sum(one["state"] == "wrong" for one in found)
    warned = sum(one["state"] == "warning" for one in found)
    print(f"{wrong} wrong, {warned} warning{'s' * (warned != 1)}, of {len(found)} findings", file=sys.stderr)
