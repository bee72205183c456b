"""`dlopt deploy`, `dlopt rollback` and `dlopt models`: what a running server serves, and changing it."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from dlopt.cli.options import add_home, command, positive

DEPLOY = """
  dlopt deploy runs/digits-1a2b3c http://127.0.0.1:8000
  dlopt deploy digits http://127.0.0.1:8000 --canary 10 --most-disagreement 0.2
  dlopt deploy digits http://127.0.0.1:8000 --shadow --label challenger
"""
ROLLBACK = """
  dlopt rollback http://127.0.0.1:8000
  dlopt rollback http://127.0.0.1:8000 --model digits
"""
MODELS = """
  dlopt models http://127.0.0.1:8000
  dlopt models http://127.0.0.1:8000 --log
"""


def add(commands: Any) -> None:
    """The commands."""
    deploy = command(commands, "deploy", _deploy, "serve a run on a running server: at once, as a canary, or as a shadow", DEPLOY)
    deploy.add_argument("run", metavar="RUN", help="a run's folder, or a job's name for its newest run")
    _add_server(deploy)
    add_home(deploy)
    deploy.add_argument("--name", help="what clients call the model (default: the job's name)")
    deploy.add_argument("--version", type=positive, metavar="N", help="its number (default: the next one)")
    deploy.add_argument("--label", action="append", default=[], metavar="LABEL", help="a name of this version, such as champion")
    deploy.add_argument("--canary", type=float, metavar="PERCENT", help="give it that share of the requests; without this it answers all")
    deploy.add_argument("--shadow", action="store_true", help="ask it as well, and only compare what it says")
    deploy.add_argument("--after", type=positive, metavar="N", help="judge a canary from so many of its requests on (default: 50)")
    deploy.add_argument("--most-errors", type=float, metavar="SHARE", help="take it back when so many more fail (default: 0.02)")
    deploy.add_argument("--most-latency", type=float, metavar="TIMES", help="... when it takes so many times as long (default: 2)")
    deploy.add_argument("--most-disagreement", type=float, metavar="SHARE", help="... when more of its answers differ (default: 1, any)")
    rollback = command(commands, "rollback", _rollback, "end the canary of a running server, or go back to the version before", ROLLBACK)
    _add_server(rollback)
    rollback.add_argument("--model", help="which one, where the server has several")
    models = command(commands, "models", _models, "what a running server serves, and who changed what", MODELS)
    _add_server(models)
    models.add_argument("--log", action="store_true", help="print the log instead")
    models.add_argument("--json", action="store_true", help="print one JSON object")


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="of the server, as dlopt serve prints it")
    parser.add_argument("--key", default=os.environ.get("DLOPT_KEY"), help="an admin's API key (default: $DLOPT_KEY)")


def _asked(options: argparse.Namespace, method: str, path: str, given: dict[str, Any] | None = None) -> dict[str, Any]:
    from dlopt.client import Client

    client = Client(options.url, options.key, retries=0, timeout=300)
    body = json.dumps(given).encode() if given is not None else b""
    return dict(json.loads(client.send(method, path, body, {"Content-Type": "application/json"}).body))


def _deploy(options: argparse.Namespace) -> None:
    from dlopt import runs

    run = options.run
    if (Path(run) / runs.RUN).is_file() or options.home.is_dir():
        run = str(runs.find(run, options.home).resolve())
    limits = {
        "requests": options.after,
        "errors": options.most_errors,
        "latency": options.most_latency,
        "disagreement": options.most_disagreement,
    }
    given = {
        "run": run,
        "name": options.name,
        "version": options.version,
        "labels": options.label,
        "canary": options.canary,
        "shadow": options.shadow,
        "limits": {name: value for name, value in limits.items() if value is not None},
    }
    said = _asked(options, "POST", "/admin/deploy", {name: value for name, value in given.items() if value is not None})
    how = f"gets {said['canary']:g} % of the requests" if said.get("canary") else "is a shadow" if said.get("shadow") else "answers now"
    print(f"{said['model']}: version {said['version']} ({said['digest']}) {how}")


def _rollback(options: argparse.Namespace) -> None:
    said = _asked(options, "POST", "/admin/rollback", {"name": options.model})
    print(f"{said['model']}: version {said['default']} answers")


def _models(options: argparse.Namespace) -> None:
    said = _asked(options, "GET", "/admin/log" if options.log else "/admin/models")
    if options.json:
        print(json.dumps(said))
    elif options.log:
        for line in said["log"]:
            about = "  ".join(f"{name} {value}" for name, value in line.items() if name not in ("when", "who", "what"))
            print(f"{line['when']}  {line['who'] or '-'}  {line['what']}  {about}")
    else:
        for name, lineup in said["models"].items():
            for version, one in lineup["versions"].items():
                print(f"{name} {version}  {one['digest']}  {', '.join(_roles(lineup, version)) or '-'}")
            if trial := lineup.get("trial"):
                pairs = ((which, trial[which]) for which in ("canary", "others"))
                figures = [
                    f"{which} {some['requests']:,} requests, {some['errors']:.1%} failed, p90 {some['p90_ms']} ms" for which, some in pairs
                ]
                print(f"{name}: {'; '.join(figures)}; {trial['disagreed']:,} of {trial['compared']:,} compared differ")


def _roles(lineup: dict[str, Any], version: str) -> list[str]:
    """What a version is there for."""
    found = ["unloaded"] if not lineup["loaded"] else []
    found += ["answers"] if lineup["default"] == version else []
    if (canary := lineup["canary"]) and canary["version"] == version:
        found.append(f"canary, {canary['share']:g} %")
    found += ["shadow"] if lineup["shadow"] == version else []
    return found + [label for label, its in lineup["labels"].items() if its == version]
