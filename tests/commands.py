"""For the tests of the command line: `dlopt` in a process of its own, with an environment that holds nothing of Ray's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def environment(**more: str) -> dict[str, str]:
    """This process's, without what its own Ray has put there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DLOPT_"))}
    return kept | more


def start(*words: object, **options: Any) -> subprocess.Popen[str]:
    """`dlopt WORDS` in a session of its own, as from a shell."""
    settings: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "cwd": ROOT,
        "env": environment(),
        "start_new_session": True,
    }
    return subprocess.Popen([sys.executable, "-m", "dlopt", *map(str, words)], **settings | options)


def dlopt(*words: object, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """`dlopt WORDS`, ended."""
    process = start(*words, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def refused(*words: object, **options: Any) -> str:
    """The one line that `dlopt WORDS` says to a user's mistake."""
    ended = dlopt(*words, **options)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("dlopt: ")]
    assert ended.returncode == 2, ended.stderr
    assert len(lines) == 1 and lines[0] == ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not ended.stdout
    return lines[0].removeprefix("dlopt: ")
