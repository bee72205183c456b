"""`dlopt find-batch`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dlopt.cli.options import add_address, add_home, add_job, command, positive, set_ray_environment

EXAMPLES = """
  dlopt find-batch job.yaml
  dlopt find-batch job.yaml --memory 4000 train.precision=bfloat16
"""


def add(commands: Any) -> None:
    """The command."""
    parser = command(
        commands,
        "find-batch",
        _find_batch,
        "find the largest batch of a job that fits into memory, by trying",
        EXAMPLES,
        stopped="stopped; prepared data stay where they were finished, and nothing else was written",
    )
    add_job(parser)
    add_home(parser)
    parser.add_argument("--memory", type=positive, metavar="MIB", help="what a step may take (default: four fifths of what is free)")
    add_address(parser, "a running Ray cluster, as for run, if the data are yet to be prepared")
    parser.add_argument("--json", action="store_true", help="print one JSON object {batch_size, rows, mebibytes, limit, lr}")


def _find_batch(options: argparse.Namespace) -> None:
    set_ray_environment(options)
    import torch

    from dlopt import pipeline, spec
    from dlopt.terminal import Terminal
    from dlopt.train.loop.largest_batch import MIB, largest_batch, rates_for

    job = spec.load(options.job, options.overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Terminal(job.name) as terminal:
        data = pipeline.prepare(job, options.home, options.address, terminal.progress)
        limit, again = options.memory and options.memory * MIB, job.resources.checkpoint_activations
        found = largest_batch(job.fit, data, device, limit, terminal.progress, again)
    rates = rates_for(job.fit, found.rows, found.most)
    if options.json:
        taken = {"batch_size": found.rows, "rows": found.most, "mebibytes": found.bytes / MIB, "limit": found.limit / MIB}
        print(json.dumps(taken | {"lr": rates}))
        return
    used = f"{found.bytes / MIB:,.0f} of {found.limit / MIB:,.0f} MiB"
    print(f"train.batch_size={found.rows}   takes {used}; there are {found.most:,} training rows")
    for rule, rate in rates.items():
        line = (
            f"scale_lr ({rule}) makes its rate {rate:.3g}" if job.train.scale_lr else f"train.optimizer.lr={rate:.3g}   by the {rule} rule"
        )
        print(line)
