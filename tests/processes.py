"""Processes of tests: forked in milliseconds from one server that has imported what they need, and ended with the run whatever ends it.

torch takes seconds to import, so that processes which start from nothing are most of what a test with two of them costs. One forkserver
for all of a run (one for each process of pytest-xdist) pays for it once.
"""

from __future__ import annotations

import datetime
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import active_children, connection, forkserver, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.budgets import METER

SECONDS = 180
"""How long processes of one call may take, and wait for each other, if nothing else is said."""
context = get_context("forkserver")
context.set_forkserver_preload(
    ["pytest", "torch._dynamo", "torch.distributed", "torch.nn.parallel", "pandas", "pyarrow.compute", "tests.faults", "tests.driven"]
)


def fork(function: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """A process that has begun `function(*arguments)`, which must be a module's own, in this process's environment."""
    if forkserver._forkserver._forkserver_pid is None:  # type: ignore[attr-defined]
        with METER.excuse():
            _started(_called, {}, time.sleep, (0.0,)).join()  # the server answers when it has imported everything
    return _started(_called, dict(os.environ), function, arguments)


def _started(function: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    process = context.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def _called(environment: Mapping[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)  # the server has that of its own start
    tempfile.tempdir = None
    torch.set_num_threads(1)
    function(*arguments)


def close() -> None:
    """End all processes, and their server, which each of them would keep alive."""
    for process in active_children():
        process.kill()
        process.join()
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def run(function: Callable[..., None], *arguments: Any, seconds: float = 60) -> int:
    """The exit code of `function(*arguments)` in a process, or less than 0 the signal that ended it."""
    process = fork(function, *arguments)
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{function.__name__} has not ended after {seconds} seconds")
    return process.exitcode


def together(world: int, work: Callable[..., None], folder: Path, *given: Any, seconds: float = SECONDS) -> None:
    """`work(rank, world, folder, *given)` in as many processes, which can talk to each other by Gloo.

    Raises RuntimeError with the traceback of the first that failed, and TimeoutError; all are ended then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in (folder / "meeting", *folder.glob("failed-*")):
        left.unlink(missing_ok=True)
    processes = [fork(joined, rank, world, work, folder, *given) for rank in range(world)]
    try:
        _wait(processes, folder, time.monotonic() + seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _wait(processes: list[ForkServerProcess], folder: Path, deadline: float) -> None:
    running = {process.sentinel: process for process in processes}
    while running:
        ended = connection.wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            raise TimeoutError(f"{len(running)} of {len(processes)} processes have not ended in time")
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                said = "\n".join(path.read_text() for path in sorted(folder.glob("failed-*"), key=lambda path: path.stat().st_mtime)[:1])
                raise RuntimeError(f"process {processes.index(process)} ended with {process.exitcode}:\n{said}")


def joined(rank: int, world: int, work: Callable[..., None], folder: Path, *given: Any) -> None:
    """In one of the processes: meet the others, work, and leave with them."""
    import torch.distributed as dist

    limit = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=limit)
    try:
        work(rank, world, folder, *given)
        dist.barrier()  # a process that ends while the other still talks to it may abort on its way out
    except BaseException:
        (folder / f"failed-{rank}").write_text(traceback.format_exc())
        raise
    dist.destroy_process_group()
