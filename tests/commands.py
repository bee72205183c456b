"""For the tests of the command line: `dlopt` in a process of its own, with an environment that holds nothing of Ray's, or in this one."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from dlopt.cli import main

ROOT = Path(__file__).resolve().parents[1]


def environment(**more: str) -> dict[str, str]:
    """This process's, without what its own Ray and the tests have put there; and one thread, as other tests run beside."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DLOPT_"))}
    return kept | {"OMP_NUM_THREADS": "1"} | more


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


def here(capsys: pytest.CaptureFixture[str], *words: object) -> subprocess.CompletedProcess[str]:
    """`dlopt WORDS` in this process and on its Ray, which saves seconds: for all but what is a matter of processes."""
    capsys.readouterr()
    code = main([*map(str, words)])
    return subprocess.CompletedProcess(words, code, *capsys.readouterr())


def printed(*words: object) -> dict[str, Any]:
    """What `dlopt WORDS --json` prints in this process and on its Ray, if it goes well; what it says meanwhile is under `said`."""
    out, said = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(said):
        code = main([*map(str, words), "--json"])
    assert code == 0, said.getvalue()
    (line,) = out.getvalue().splitlines()
    return dict(json.loads(line)) | {"said": said.getvalue()}


def refused(*words: object, **options: Any) -> str:
    """The one line that `dlopt WORDS` says to a user's mistake."""
    return line_of(dlopt(*words, **options))


def refused_here(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The same in this process."""
    return line_of(here(capsys, *words))


def line_of(ended: subprocess.CompletedProcess[str]) -> str:
    """The one line that was said to a user's mistake, last of all."""
    lines = [line for line in ended.stderr.splitlines() if line.startswith("dlopt: ")]
    assert ended.returncode == 2, ended.stderr
    assert len(lines) == 1 and lines[0] == ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not ended.stdout
    return lines[0].removeprefix("dlopt: ")
