"""`dlopt serve`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from dlopt.cli.options import add_address, add_home, command, port

EXAMPLES = """
  dlopt serve mnist
  dlopt serve runs/mnist-77b72eee --host 127.0.0.1 --port 9000
  dlopt serve mnist --keys keys.txt
"""


def add(commands: Any) -> None:
    """The command."""
    parser = command(commands, "serve", _serve, "serve a run's model over HTTP until Ctrl-C", EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a job's name for its newest run")
    add_home(parser)
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1, this machine alone; beyond it a key is asked for)")
    parser.add_argument("--port", type=port, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument(
        "--keys", type=Path, metavar="FILE", help="API keys that are let in, one a line; without it one is made up and printed"
    )
    add_address(parser, "a running Ray cluster to serve on")
    parser.add_argument("--ray", action="store_true", help="use Ray Serve, as more than one replica does, where one process would do")


def _serve(options: argparse.Namespace) -> None:
    import yaml

    from dlopt import runs
    from dlopt.serve import Serve
    from dlopt.serve.start import serve

    folder = runs.find(options.run, options.home)
    name, export = runs.exported(folder)
    section = Serve.model_validate(yaml.safe_load((folder / runs.JOB).read_text())["serve"])
    serve(
        export,
        name,
        section,
        host=options.host,
        port=options.port,
        keys=options.keys,
        address=options.address or os.environ.get("RAY_ADDRESS"),
        say=lambda line: print(line, flush=True),
        ray=options.ray,
    )
