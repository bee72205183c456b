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
  dlopt serve serve.yaml --ray
"""


def add(commands: Any) -> None:
    """The command."""
    parser = command(commands, "serve", _serve, "serve a run's model over HTTP until Ctrl-C", EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="a run's folder, a job's name for its newest run, or a serve.yaml of several models")
    add_home(parser)
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1, this machine alone; beyond it a key is asked for)")
    parser.add_argument("--port", type=port, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--grpc-port", type=port, metavar="PORT", help="speak the Open Inference Protocol v2 over gRPC on this port, too")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="serve over TLS: the certificate (chain), PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="the key of the certificate, PEM (default: in the same file)")
    parser.add_argument("--access-log", type=Path, metavar="FILE", help="a line of JSON for each request; - is stdout")
    parser.add_argument("--state", type=Path, metavar="DIR", help="keep what is deployed meanwhile, and its log, for the next start")
    parser.add_argument(
        "--keys", type=Path, metavar="FILE", help="API keys that are let in, one a line; without it one is made up and printed"
    )
    add_address(parser, "a running Ray cluster to serve on")
    parser.add_argument("--ray", action="store_true", help="use Ray Serve, as more than one replica does, where one process would do")


def _serve(options: argparse.Namespace) -> None:
    from dlopt.serve.models.plan import entries_of
    from dlopt.serve.servers.start import serve

    entries, section = entries_of(options.run, options.home)
    serve(
        entries,
        section,
        host=options.host,
        port=options.port,
        keys=options.keys,
        address=options.address or os.environ.get("RAY_ADDRESS"),
        say=lambda line: print(line, flush=True),
        ray=options.ray,
        grpc_port=options.grpc_port,
        state=options.state,
        tls=(options.tls_cert, options.tls_key or options.tls_cert) if options.tls_cert else None,
        log=options.access_log,
    )
