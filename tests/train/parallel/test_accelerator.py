"""No tensor of the CPU meets one of an accelerator, in training from the start and from a checkpoint: the programs of ../shared tell."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.accelerated import GROUPS, group, poisoned, tried, waited
from tests.conftest import SHARED, missing
from tests.processes import run

CASES = [pytest.param(name, case, id=f"{name}-{case}") for name, cases in GROUPS.items() for case in cases]
LEFT_OUT = ("mixed", "mlp")
"""What the default run looks at by itself."""


@pytest.fixture(scope="module")
def tools() -> str:
    if not (SHARED / "tools" / "pretend_accelerator.py").is_file():
        missing("../shared/tools/pretend_accelerator.py is not there")
    return str(SHARED / "tools")


@pytest.fixture(scope="module")
def tries(tools: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By group, each in a process, two of which run at a time: the losses of each case by device, and how often a device was waited for."""

    def done(name: str, work: Callable[..., None], file: str) -> Any:
        home = tmp_path_factory.mktemp(f"{name}-{work.__name__}")
        assert run(work, tools, home, name, seconds=500) == 0
        return json.loads((home / file).read_text())

    assert run(time.sleep, 0.0) == 0  # what forks the others is there
    with ThreadPoolExecutor(2) as pool:
        losses = {name: pool.submit(done, name, group, "losses.json") for name in GROUPS}
        waits = {name: pool.submit(done, name, waited, "waits.json") for name in GROUPS}
    return {name: {"losses": losses[name].result(), "waits": waits[name].result()} for name in GROUPS}


def same(found: dict[str, list[float] | str]) -> None:
    assert not isinstance(found["cpu"], str), found["cpu"]
    assert not isinstance(found["accelerator"], str), found["accelerator"]
    assert len(found["cpu"]) == 8
    assert found["accelerator"] == pytest.approx(found["cpu"], rel=1e-9)


def test_a_job_with_masks_norms_and_averages_goes_on_there_as_on_the_cpu(tools: str, tmp_path: Path) -> None:
    assert run(group, tools, tmp_path, *LEFT_OUT) == 0
    same(json.loads((tmp_path / "losses.json").read_text())["mlp"])


def test_it_is_waited_for_once_in_ten_steps(tools: str, tmp_path: Path) -> None:
    assert run(waited, tools, tmp_path, *LEFT_OUT) == 0
    assert json.loads((tmp_path / "waits.json").read_text()) == {"mlp": 1}  # of eighteen, step 30 is logged


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPS)
def test_whatever_is_trained_it_is_waited_for_once_in_ten_steps(name: str, tries: dict[str, dict[str, Any]]) -> None:
    waits = tries[name]["waits"]
    assert waits and {case: count for case, count in waits.items() if count != 1} == {}


def test_steps_that_were_taken_with_a_gradient_that_is_not_finite_are_taken_back(tools: str, tmp_path: Path) -> None:
    assert run(poisoned, tools, tmp_path, seconds=120) == 0
    found = json.loads((tmp_path / "poisoned.json").read_text())
    assert len(found["cpu"]) == 6
    assert found["accelerator"] == pytest.approx(found["cpu"], rel=1e-9)
    assert found["accelerator careful"] and not found["cpu careful"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), CASES)
def test_every_job_model_and_optimizer_goes_on_there_as_on_the_cpu(name: str, case: str, tries: dict[str, dict[str, Any]]) -> None:
    same(tries[name]["losses"][case])


@pytest.mark.slow
def test_what_tries_steps_out_finds_the_same_there(tools: str, tmp_path: Path) -> None:
    assert run(tried, tools, tmp_path, seconds=300) == 0
    found = json.loads((tmp_path / "tried.json").read_text())
    assert found["accelerator"][0] == pytest.approx(found["cpu"][0], rel=1e-9)
    assert found["accelerator"][1] == found["cpu"][1] == 80
