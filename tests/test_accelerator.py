"""No tensor of the CPU meets one of an accelerator, in training from the start and from a checkpoint: the programs of ../shared tell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.accelerated import JOBS
from tests.conftest import SHARED, missing

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    """By job and device."""
    tools, home = SHARED / "tools", tmp_path_factory.mktemp("accelerated")
    if not (tools / "pretend_accelerator.py").is_file():
        missing("../shared/tools/pretend_accelerator.py is not there")
    command = [sys.executable, "-m", "tests.accelerated", str(tools), str(home)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, list[float]]] = json.loads((home / "losses.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_job_with_masks_norms_and_averages_goes_on_there_as_on_the_cpu(name: str, losses: dict[str, dict[str, list[float]]]) -> None:
    found = losses[name]
    assert len(found["cpu"]) == 8
    assert found["accelerator"] == pytest.approx(found["cpu"], rel=1e-9)
