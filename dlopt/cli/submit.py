"""`dlopt submit` and `dlopt jobs`: jobs on a cluster."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.cli.options import Mistake, add_job, command

if TYPE_CHECKING:
    from dlopt.cluster.head import Head

SUBMIT = """
  dlopt submit job.yaml --address http://head:8265
  dlopt submit job.yaml --home /shared/runs resources.workers=4
  dlopt submit job.yaml --no-wait           prints the job's name there
"""
JOBS = """
  dlopt jobs --address http://head:8265
  dlopt jobs status mnist-20261130-120000-3fa2 --json | jq .share
  dlopt jobs logs mnist-20261130-120000-3fa2 --follow
  dlopt jobs stop mnist-20261130-120000-3fa2
"""
DOES = {"list": 0, "status": 1, "logs": 1, "stop": 1}
"""What `dlopt jobs` can do, and how many words follow."""


def add(commands: Any) -> None:
    """Both commands."""
    parser = command(
        commands,
        "submit",
        _submit,
        "send a job to a Ray cluster, with the files that it names, and follow it to its end",
        SUBMIT,
        stopped="stopped before the cluster had said that it has the job: `dlopt jobs` shows whether it does",
    )
    add_job(parser)
    _add_head(parser)
    parser.add_argument("--home", help="folder for runs, as the cluster's nodes see it (default: dlopt-runs in the head's home folder)")
    parser.add_argument("--working-dir", default=".", help="folder from which relative paths count, there as here (default: this one)")
    parser.add_argument("--no-wait", action="store_true", help="print the job's name there, and do not follow it")
    parser.add_argument(
        "--retries", type=int, default=3, metavar="N", help="send a job that is lost with its node or head again, so often (3)"
    )
    parser.add_argument("--json", action="store_true", help="print what `dlopt jobs status --json` says at its end, not the run's place")
    parser = command(
        commands, "jobs", _jobs, "what becomes of jobs on a cluster: list, status, logs, stop", JOBS, stopped="stopped; the jobs go on"
    )
    parser.add_argument("words", metavar="list | status JOB | logs JOB | stop JOB", nargs="*", help="what to do (list)")
    parser.set_defaults(rest="words")
    _add_head(parser)
    parser.add_argument("--follow", action="store_true", help="of logs: go on until the job ends")
    parser.add_argument("--json", action="store_true", help="print JSON: of status an object, else a list")


def _add_head(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="the cluster's dashboard, http://head:8265 (default: $RAY_API_SERVER_ADDRESS, else $RAY_ADDRESS)")


def _address(options: argparse.Namespace) -> str:
    """Of the cluster; what must stand before Ray is imported is set."""
    address: str = options.address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
    if not address:
        raise Mistake("--address: which cluster? Give its dashboard, such as --address http://head:8265, or set RAY_API_SERVER_ADDRESS")
    from dlopt.session import set_environment

    set_environment(address)
    return address


def _head(address: str) -> Head:
    """One that answers."""
    from dlopt.cluster.head import Head

    return Head(address)


def _submit(options: argparse.Namespace) -> int:
    from dlopt import spec

    address = _address(options)
    job = spec.load(options.job, options.overrides)
    from dlopt.cluster.submit import follow, sending
    from dlopt.terminal import Terminal

    to_send = sending(job, options.job, options.overrides, Path(options.working_dir), options.home)
    head = _head(address)
    running = to_send.running(head)
    name = running or to_send.send(head)
    print(f"{name}: {'is there already, and is followed' if running else f'submitted to {head.get_address()}'}", file=sys.stderr)
    if options.no_wait:
        print(name)
        return 0
    with Terminal(job.name) as terminal:
        try:
            ended = follow(head, name, terminal.progress, terminal.line, to_send, options.retries)
        except KeyboardInterrupt:
            terminal.bars.stop()
            at = f"{name} --address {head.get_address()}"
            print(f"\n{name}: no longer followed, and the job goes on there: `dlopt jobs logs {at} --follow`", file=sys.stderr)
            print(f"{' ' * len(name)}  follows it again, `dlopt jobs stop {at}` stops it", file=sys.stderr)
            return 130
        found = ended.state
        if found["run"]:
            terminal.metrics(found["name"], found["seconds"], bool(found["made"]), found["metrics"])
        terminal.line(f"{found['job']}: {found['status']}{'' if ended.exit_code == 0 else '  ' + found['message']}")
    print(json.dumps(found) if options.json else found["run"] or "", end="\n" if options.json or found["run"] else "")
    return ended.exit_code


def _jobs(options: argparse.Namespace) -> int:
    does, *names = options.words or ["list"]
    if does not in DOES or len(names) != DOES[does]:
        raise Mistake(f"jobs: {' '.join(options.words)!r}: write list, status JOB, logs JOB or stop JOB; `dlopt jobs --help` has examples")
    head = _head(_address(options))
    from dlopt.cluster.submit import stop

    if does == "list":
        return _list(head, options.json)
    if does == "status":
        return _status(head, names[0], options.json)
    if does == "logs":
        return _logs(head, names[0], options.follow)
    print(f"{names[0]}: {stop(head, names[0])}")
    return 0


def _list(head: Head, as_json: bool) -> int:
    """All jobs; of those that run, how far they are."""
    from dlopt.cluster.submit import Log, state
    from dlopt.terminal import print_jobs

    states = [state(one, Log() if one.status.is_terminal() else Log.of(head.get_job_logs(one.submission_id))) for one in head.jobs()]
    if as_json:
        print(json.dumps(states))
    elif states:
        print_jobs(states)
    else:
        print(f"no jobs at {head.get_address()}")
    return 0


def _status(head: Head, name: str, as_json: bool) -> int:
    from dlopt.cluster.submit import Log, state
    from dlopt.terminal import print_jobs

    found = state(head.job(name), Log.of(head.get_job_logs(name)))
    if as_json:
        print(json.dumps(found))
    else:
        print_jobs([found])
    return 0


def _logs(head: Head, name: str, following: bool) -> int:
    """Lines for people; of those for programs, the last."""
    from dlopt.cluster.submit import Log, follow

    if not following:
        head.job(name)
        log = Log()
        for line in [*log.add(head.get_job_logs(name)), *filter(None, [log.rest])]:
            print(line)
        if log.said and not log.result:
            print(f"{log.said['stage']}  {log.said['text']}")
        return 0
    from dlopt.terminal import Terminal

    with Terminal(name) as terminal:
        return follow(head, name, terminal.progress, terminal.line).exit_code
