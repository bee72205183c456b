"""`dlopt docs`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dlopt.cli.options import command

EXAMPLES = """
  dlopt docs                 opens the pages in a browser, until Ctrl-C
  dlopt docs tables          shows a page here
  dlopt docs -o site         builds the pages into a folder
"""


def add(commands: Any) -> None:
    """The command."""
    parser = command(commands, "docs", _docs, "open the documentation, or show a page of it", EXAMPLES)
    parser.add_argument("page", metavar="PAGE", nargs="?", help="a page to show in the terminal, such as start or tables")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="build the pages there, and open nothing")


def _docs(options: argparse.Namespace) -> None:
    from dlopt.cli import make_parser
    from dlopt.docs import build, folder_of_pages, serve, show

    commands = {name: parser.format_help() for name, parser in make_parser().commands.items()}

    if options.page:
        show(options.page)
    elif options.output:
        print(build(options.output, commands))
    else:
        serve(build(folder_of_pages(), commands))
