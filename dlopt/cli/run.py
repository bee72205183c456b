"""`dlopt run` and `dlopt prepare`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.cli.options import add_address, add_home, add_job, command, port, set_ray_environment

if TYPE_CHECKING:
    from dlopt.spec import Job

RUN = """
  dlopt run job.yaml
  dlopt run job.yaml train.epochs=3 train.optimizer.lr=3e-4
  dlopt run job.yaml --json resources.workers=2 | jq .metrics.test
  dlopt run job.yaml --address ray://head:10001 --home /shared/runs
"""
PREPARE = """
  dlopt prepare job.yaml
  dlopt prepare job.yaml --json data.most_bad=0.05
"""


def add(commands: Any) -> None:
    """Both commands."""
    parser = command(
        commands,
        "run",
        _run,
        "do all that a job asks for: prepare, fit, export, report",
        RUN,
        stopped="stopped; finished stages stay, and the same command goes on from here",
    )
    add_job(parser)
    add_home(parser)
    add_address(parser, "a running Ray cluster; without it, $RAY_ADDRESS, else one is started here and stopped again")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object {run, name, metrics, seconds} instead of the run's folder"
    )
    parser.add_argument("--profile", action="store_true", help="measure what the time of training goes into: resources.profile=true")
    parser.add_argument("--fresh", action="store_true", help="train from the start, whatever there is of the model or of checkpoints")
    parser.add_argument(
        "--metrics-port", type=port, metavar="PORT", help="show training to Prometheus on 127.0.0.1:PORT, as resources.track does"
    )

    parser = command(
        commands,
        "prepare",
        _prepare,
        "do the first stage only: clean, split and encode the rows",
        PREPARE,
        stopped="stopped; nothing of an unfinished preparation stays, and the same command begins it anew",
    )
    add_job(parser)
    add_home(parser)
    add_address(parser, "a running Ray cluster, as for run")
    parser.add_argument("--json", action="store_true", help="print what was found as one JSON object instead of the folder of the data")


def _run(options: argparse.Namespace) -> None:
    set_ray_environment(options)
    from dlopt import remote, spec
    from dlopt.api.running import run
    from dlopt.cluster.package import arrived
    from dlopt.terminal import Terminal

    arrived(Path.cwd())
    job = spec.load(options.job, [*options.overrides, *(["resources.profile=true"] if options.profile else [])])
    if options.metrics_port:
        job = shown_to_prometheus(job, options.metrics_port)
    with Terminal(job.name) as terminal:
        done = run(job, home=options.home, address=options.address, fresh=options.fresh, progress=terminal.progress)
        terminal.summary(done)
    told = {"run": remote.said(done.folder), "name": done.name, "metrics": done.metrics, "seconds": done.seconds}
    print(json.dumps(told | ({"spread": done.spread} if done.spread else {})) if options.json else remote.said(done.folder))


def shown_to_prometheus(job: Job, port: int) -> Job:
    """The job with one more tracker."""
    from dlopt.train.progress.track import Prometheus

    track = (*job.resources.track, Prometheus(port=port))
    return job.model_copy(update={"resources": job.resources.model_copy(update={"track": track})})


def _prepare(options: argparse.Namespace) -> None:
    set_ray_environment(options)
    from dlopt import pipeline, spec
    from dlopt.terminal import Terminal

    job = spec.load(options.job, options.overrides)
    with Terminal(job.name) as terminal:
        data = pipeline.prepare(job, options.home, options.address, terminal.progress)
        terminal.prepared(job.name, data)
    print(json.dumps({"data": str(data.path), "seconds_in_all": data.manifest.seconds, **data.info}) if options.json else data.path)
