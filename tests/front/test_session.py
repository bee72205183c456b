"""Ray's settings before it is imported: RAY_AUTH_MODE is always explicit, and what the user has set wins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from dlopt.session import PRIVATE, QUIET, address_of, set_environment
from tests.commands import ROOT, environment
from tests.faults import assert_nothing_runs


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without anything of Ray's, in which what is set is taken back; and where the token file would be."""
    for name in [*QUIET, *PRIVATE, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"]:
        monkeypatch.setenv(name, "")  # remembers what was there
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path / "token"


def test_a_cluster_of_our_own_gets_a_fresh_token_and_stays_on_loopback(clean: Path) -> None:
    set_environment(None)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert PRIVATE.items() <= os.environ.items()


def test_another_cluster_is_met_with_the_users_token_file_if_there_is_one(clean: Path) -> None:
    set_environment("head:6379")
    assert (os.environ["RAY_AUTH_MODE"], "RAY_AUTH_TOKEN" in os.environ) == ("disabled", False)
    del os.environ["RAY_AUTH_MODE"]
    clean.write_text("secret")
    set_environment("head:6379")
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert not PRIVATE.items() <= os.environ.items()


def test_what_the_user_has_set_stays(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_DEDUP_LOGS", "1")
    set_environment(None)
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_DEDUP_LOGS"]) == ("disabled", "1")


@pytest.mark.slow
def test_a_driver_ends_by_sigterm_with_the_exit_code_of_shells_and_leaves_nothing(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    connecting = "import time\nfrom dlopt.session import connected\nwith connected(): print('here', flush=True); time.sleep(300)"
    words: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment(DLOPT_CHAOS=mark)}
    process = subprocess.Popen([sys.executable, "-c", connecting], **words)
    assert process.stdout and process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert_nothing_runs(mark)


def test_the_address_is_what_was_asked_for_or_what_a_job_was_given(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert address_of(None) is None
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert (address_of(None), address_of("other:6379")) == ("head:6379", "other:6379")
