"""`dlopt bench-serve`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from dlopt.cli.options import command, positive

EXAMPLES = """
  dlopt bench-serve http://127.0.0.1:8000
  dlopt bench-serve http://127.0.0.1:8000 --connections 1 --seconds 5 --json
  dlopt bench-serve https://models.example.org --rate 200 --model digits
  dlopt bench-serve http://127.0.0.1:8000 --body image.png --type image/png
"""


def add(commands: Any) -> None:
    """The command."""
    parser = command(
        commands, "bench-serve", _bench, "ask a running server as fast as it answers, and say how fast that is and what fails", EXAMPLES
    )
    parser.add_argument("url", metavar="URL", help="of the server, as dlopt serve prints it")
    parser.add_argument("--model", help="which one, where the server has several")
    parser.add_argument("--key", default=os.environ.get("DLOPT_KEY"), help="API key (default: $DLOPT_KEY)")
    parser.add_argument("--connections", type=positive, default=16, metavar="N", help="kept open and asked side by side (default: 16)")
    parser.add_argument("--seconds", type=_seconds, default=10.0, metavar="S", help="how long (default: 10)")
    parser.add_argument("--rate", type=_seconds, default=0.0, metavar="R", help="requests a second (default: as many as are answered)")
    parser.add_argument("--body", type=Path, metavar="FILE", help="what is sent (default: the example that the server gives)")
    parser.add_argument("--type", default="application/json", metavar="TYPE", help="Content-Type of --body (default: application/json)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: requests, per_s, p50_ms, p95_ms, p99_ms, errors")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number greater than 0")
    return value


def _bench(options: argparse.Namespace) -> int:
    import asyncio

    from dlopt.client.load import Ask, example, load
    from dlopt.part import DloptError

    ask = example(options.url, options.key, options.model)
    if options.body:
        try:
            ask = Ask(ask.url, options.body.read_bytes(), dict(ask.headers) | {"Content-Type": options.type})
        except OSError as error:
            raise DloptError(f"--body: {options.body}: {error.strerror}") from None
    report = asyncio.run(load(ask, connections=options.connections, seconds=options.seconds, rate=options.rate))
    found = report.facts()
    if options.json:
        print(json.dumps(found))
    else:
        times = "   ".join(f"p{name} {found[f'p{name}_ms']} ms" for name in (50, 95, 99))
        errors = ", ".join(f"{count:,} x {what}" for what, count in report.errors.most_common()) or "none"
        print(f"{found['per_s']:,} requests/s over {options.connections} connections   {times}   errors: {errors}")
    return 0 if report.times and not report.errors else 1
