"""`dlopt ui`."""

from __future__ import annotations

import argparse
import webbrowser
from typing import Any

from dlopt.cli.options import add_home, command, port

EXAMPLES = """
  dlopt ui
  dlopt ui --home /shared/runs --port 9001
  dlopt ui --home s3://bucket/runs
"""


def add(commands: Any) -> None:
    """The command."""
    parser = command(commands, "ui", _ui, "open a page of the home's runs: curves, reports, comparisons", EXAMPLES)
    add_home(parser)
    parser.add_argument("--port", type=port, help="port of 127.0.0.1 to listen on (default: a free one)")
    parser.add_argument("--no-open", action="store_true", help="print the address, and open no browser")


def _ui(options: argparse.Namespace) -> None:
    from dlopt.report.board import server

    with server(options.home, options.port or 0) as running:
        address = f"http://127.0.0.1:{running.server_port}/"
        print(f"{address}   Ctrl-C ends it", flush=True)
        if not options.no_open:
            webbrowser.open(address)
        running.serve_forever()
