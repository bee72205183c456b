"""What commands have in common: how they are made, the arguments that several of them take, and mistakes in either."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


class Mistake(Exception):
    """A word on the command line that is wrong, said in one line; heavier commands raise DloptError."""


class Parser(argparse.ArgumentParser):
    """One that raises a Mistake of one line, takes no abbreviations, and leaves the examples below as they are."""

    commands: dict[str, argparse.ArgumentParser]

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        said = re.sub(r"^argument ", "", message)
        said = said.replace("the following arguments are required:", "missing:").replace("expected one argument", "needs a value")
        where = self.prog.removeprefix("dlopt").strip()
        raise Mistake(f"{where}: {said}; `{self.prog} --help` has examples" if where else f"{said}; `dlopt --help` lists them")


def command(
    commands: Any, name: str, does: Callable[[argparse.Namespace], int | None], help: str, examples: str, *, stopped: str = "stopped"
) -> argparse.ArgumentParser:
    """Add a command. examples: lines below its help. stopped: what is true of it after Ctrl-C."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=f"examples:\n{examples.strip(chr(10))}"
    )
    parser.set_defaults(command=does, stopped=stopped, rest="")
    return parser


def close_to(word: str, known: Sequence[str]) -> str:
    """The nearest of some names, or all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


def add_job(parser: argparse.ArgumentParser) -> None:
    """JOB and overrides, which may stand before and after options."""
    parser.add_argument("job", metavar="JOB", type=Path, help="the job file, YAML")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="values to set in the job, such as train.optimizer.lr=3e-4")
    parser.set_defaults(rest="overrides")


def add_home(parser: argparse.ArgumentParser) -> None:
    """--home."""
    said = "folder of runs and artifacts, or s3://BUCKET/runs (default: $DLOPT_HOME, else runs)"
    parser.add_argument("--home", type=home_path, default=default_home(), help=said)


def default_home() -> str:
    """Inside `ray job submit` the working folder is a copy that Ray deletes, so results go to the user's own."""
    if "DLOPT_HOME" in os.environ:
        return os.environ["DLOPT_HOME"]
    return "~/dlopt-runs" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else "runs"


def home_path(text: str) -> Path:
    """--home: a folder, or what stands for an object store on this machine."""
    from dlopt.remote import home_path

    return home_path(text)


def add_address(parser: argparse.ArgumentParser, help: str) -> None:
    """--address of a cluster."""
    parser.add_argument("--address", help=help)


def set_ray_environment(options: argparse.Namespace) -> None:
    """What must stand before Ray is imported."""
    from dlopt.session import set_environment

    set_environment(options.address or os.environ.get("RAY_ADDRESS"))


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def port(text: str) -> int:
    """Where a server can listen."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 1 to 65535")
    return int(text)
