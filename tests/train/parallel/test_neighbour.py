"""Two workers that swap gradients: the bits of Gloo's ring by whichever way, whatever the size, and no wait for one that has ended."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlopt.train.parallel import ddp, shared_memory
from dlopt.train.parallel.ddp import DDP
from dlopt.train.parallel.reducer import Bucket, Finish
from tests.processes import fork, joined, together

WAYS: dict[str, int | None] = {"ring": None, "message": None, "memory": 1 << 20, "pieces": 1000}
"""How gradients are exchanged: by torch itself, in one message of Gloo, through memory, and through memory smaller than they are."""


def _ring(bucket: Bucket) -> Finish:
    work = dist.all_reduce(bucket.flat, async_op=True)
    assert work is not None
    return work.wait


def _exchanged(rank: int, world: int, folder: Path) -> None:
    found: dict[str, list[Tensor]] = {}
    for way, size in WAYS.items():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 3))
        held = DDP(network, rank, world)
        other = shared_memory.meet(rank, size) if size else None
        with mock.patch.object(ddp, "meet", lambda rank, size, other=other: other):
            module, gradients = held.module(), list[Tensor]()
        if way == "ring":
            held.reducer.exchange = _ring
        for step in range(4):
            generator = torch.Generator().manual_seed(10 * step + rank)
            network.zero_grad()
            module(torch.randn(rank + 3, 40, generator=generator)).square().sum().backward()
            held.reducer.finish()
            gradients += [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
        found[way] = gradients
    torch.save(found, folder / f"gradients-{rank}.pt")


def test_two_workers_have_the_bits_of_a_ring_by_whichever_way_they_swap_gradients(tmp_path: Path) -> None:
    together(2, _exchanged, tmp_path)
    mine, others = (torch.load(tmp_path / f"gradients-{rank}.pt") for rank in range(2))
    ring = mine["ring"]
    assert len(ring) == 4 * 4 and all(one.abs().sum() > 0 for one in ring)
    for way in WAYS:
        assert all(map(torch.equal, ring, mine[way])) and all(map(torch.equal, ring, others[way])), way


def _added(rank: int, world: int, folder: Path) -> None:
    other = shared_memory.meet(rank, 80)
    assert other
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        numbers = torch.arange(33, dtype=dtype) * (1 + 2 * rank)
        other.add(numbers)
        assert torch.equal(numbers, torch.arange(33, dtype=dtype) * 4)
    assert other.places.shape == (2, 2, 80)
    assert not list(Path(gettempdir()).glob("dlopt-*"))  # nothing to clean up, however they end


def test_numbers_of_any_kind_are_added_and_nothing_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Path("/dev/shm")
    with TemporaryDirectory(prefix="n-") as mine:  # of a short name, as a socket must have
        monkeypatch.setenv("TMPDIR", mine)
        together(2, _added, tmp_path)
    assert not list(shared.glob("*dlopt*"))


def _elsewhere(rank: int, world: int, folder: Path) -> None:
    unreachable = mock.patch.object(socket.socket, "connect", side_effect=ConnectionRefusedError)
    with unreachable if rank == 1 else nullcontext():
        assert shared_memory.meet(rank, 80) is None
    for why in (OSError, AttributeError):
        with mock.patch.object(os, "memfd_create", side_effect=why):
            assert shared_memory.meet(rank, 80) is None
    assert shared_memory.meet(rank, 80)


def test_workers_of_two_machines_or_without_such_memory_are_no_neighbours(tmp_path: Path) -> None:
    together(2, _elsewhere, tmp_path)


def _killed(rank: int, world: int, folder: Path) -> None:
    other = shared_memory.meet(rank, 80)
    assert other
    numbers = torch.ones(5)
    other.add(numbers)
    if rank == 1:
        time.sleep(0.5)  # the other one waits by then
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            other.add(numbers)
    os._exit(17)  # without waiting for the other one, as the end of a process group does


def test_a_worker_does_not_wait_for_one_that_was_killed(tmp_path: Path) -> None:
    processes = [fork(joined, rank, 2, _killed, tmp_path) for rank in range(2)]
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [17, -signal.SIGKILL]
