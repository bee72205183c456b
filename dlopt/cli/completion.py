"""`dlopt completion`: a script for the shell, which asks this command for the words that could follow."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from dlopt.cli.options import command, default_home, home_path

EXAMPLES = """
  eval "$(dlopt completion bash)"            in ~/.bashrc
  eval "$(dlopt completion zsh)"             in ~/.zshrc, after compinit
  dlopt completion fish > ~/.config/fish/completions/dlopt.fish
"""
BASH = """_dlopt() {
  local IFS=$'\\n'
  COMPREPLY=($(dlopt completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _dlopt dlopt
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n" + BASH
FISH = """complete -c dlopt -a '(dlopt completion words -- (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def add(commands: Any) -> None:
    """The command."""
    parser = command(commands, "completion", _completion, "print a script that completes words in bash, zsh or fish", EXAMPLES)
    parser.add_argument(
        "shell", choices=(*SCRIPTS, "words"), metavar="SHELL", help="bash, zsh or fish (or words, which the scripts ask with)"
    )
    parser.add_argument("given", nargs="*", metavar="WORD", help="of words: what stands after dlopt, the last one unfinished")
    parser.set_defaults(rest="given")


def _completion(options: argparse.Namespace) -> None:
    if options.shell in SCRIPTS:
        print(SCRIPTS[options.shell], end="")
        return
    for word in candidates(options.given):
        print(word)


def candidates(given: Sequence[str]) -> Iterator[str]:
    """Words that could stand for the last of those given: commands, options, and runs; files the shell knows itself."""
    from dlopt.cli import make_parser

    *before, last = given or [""]
    known = make_parser().commands
    if not before:
        found = [*known, "--help", "--version"]
    elif before[0] not in known:
        found = []
    elif last.startswith("-"):
        found = [name for action in known[before[0]]._actions for name in action.option_strings if name.startswith("--")]
    else:
        found = list(_words(before, [action.metavar for action in known[before[0]]._actions]))
    yield from sorted(word for word in found if word.startswith(last))


def _words(before: Sequence[str], takes: Sequence[Any]) -> Iterator[str]:
    """Of a command that takes runs: their names; shells and the only subcommand."""
    if "RUN" in takes or before[:2] == ["runs", "rm"]:
        from dlopt.runs import listing

        records = listing(home_path(default_home()))
        yield from (str(record["run"]).rpartition("/")[2] for record in records)
        yield from {str(record["name"]) for record in records} if "RUN" in takes else ()
    elif before == ["runs"]:
        yield "rm"
    elif before == ["completion"]:
        yield from SCRIPTS
