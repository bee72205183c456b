"""`dlopt cluster`: a Ray cluster of several nodes on this machine."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from dlopt.cli.options import Mistake, command, positive

EXAMPLES = """
  eval "$(dlopt cluster up --nodes 3)"      for `dlopt submit` and `dlopt jobs`
  dlopt cluster status
  dlopt cluster down
"""
DOES = ("up", "status", "down")


def add(commands: Any) -> None:
    """The command."""
    parser = command(
        commands,
        "cluster",
        _cluster,
        "a Ray cluster of several nodes on this machine, to try jobs on: up, status, down",
        EXAMPLES,
        stopped="stopped; `dlopt cluster down` ends what has been started",
    )
    parser.add_argument("does", metavar="up | status | down", choices=DOES, help="start it, say what runs of it, or end it")
    parser.add_argument("--nodes", type=positive, default=3, help="of up: so many nodes, the head among them (3)")
    parser.add_argument("--cpus", type=positive, help="of up: logical CPUs of each node (this machine's shared out, at least 1)")
    parser.add_argument("--json", action="store_true", help="of status: print JSON")


def _cluster(options: argparse.Namespace) -> int:
    from dlopt.cluster.nodes import down, known, status, up

    if options.does == "up":
        cluster = up(options.nodes, options.cpus or max(1, (os.cpu_count() or 1) // options.nodes))
        print(f"{options.nodes} nodes run; dashboard {cluster.url}, `dlopt run --address {cluster.address}`", file=sys.stderr)
        print(cluster.exports())
        return 0
    there = known()
    if there is None:
        raise Mistake("cluster: none was started here: `dlopt cluster up` starts one")
    if options.does == "down":
        print(f"ended {down(there)} processes")
        return 0
    found = status(there)
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"dashboard {found['dashboard']}, address {found['address']}, logs in {found['folder']}")
    for node in found["nodes"]:
        runs = f"runs (pid {node['pid']})" if node["up"] else "is gone"
        print(f"node {node['node']}{' (head)' if node['head'] else ''}: {runs}, {node['cpus']} CPU{'s' * (node['cpus'] != 1)}")
    return 0 if all(node["up"] for node in found["nodes"]) else 1
