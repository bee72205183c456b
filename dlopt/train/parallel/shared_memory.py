"""Two workers of one machine swap gradients through memory that both see, and tell each other so by a byte through a socket.

On a CPU a worker waits longer for a message to be noticed than for its bytes, and Gloo has threads of its own that must notice it first:
two workers of a thread each reach 0.93 of what one of two threads does, and 0.81 by Gloo (`tests.bench.scale --part split`). Here the
thread that trains is the one that waits. Neither the memory nor the socket has a name that could outlive both processes, and the end of
either one, however sudden, ends the other one's wait; of one that hangs, the watchdog does.
"""

from __future__ import annotations

import mmap
import os
import socket
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import Tensor

PIECE = 8 << 20
"""Bytes that are swapped at once, at most."""


class Neighbour:
    """The other one of two workers on this machine.

    Memory has two places for each of them, which take turns: whoever writes into one of its own knows, since the other has been heard
    from in between, that what was there before has been read.
    """

    def __init__(self, rank: int, channel: socket.socket, memory: mmap.mmap) -> None:
        """channel: to the other one. memory: of both."""
        self.rank, self.channel = rank, channel
        self.places = torch.frombuffer(memory, dtype=torch.uint8).view(2, 2, -1)
        """By the turn and the rank."""
        self.turn = 0

    def add(self, numbers: Tensor) -> None:
        """Make it the sum of what both have, the same bits on both; they call it at once. Raises ConnectionError when the other one has
        ended."""
        with torch.profiler.record_function("dlopt:swap"):
            for piece in numbers.split(self.places.shape[2] // numbers.element_size()):
                self.turn ^= 1
                first, second = (place[: piece.nbytes].view(piece.dtype) for place in self.places[self.turn])
                (second if self.rank else first).copy_(piece)
                self._meet()
                torch.add(first, second, out=piece)

    def _meet(self) -> None:
        """Until the other one is as far; what it has written until then can be read."""
        self.channel.sendall(b".")
        if not self.channel.recv(1):
            raise ConnectionResetError("the other worker has ended")


def meet(rank: int, size: int) -> Neighbour | None:
    """The other one of two workers, or None where it is on another machine, or where the system has no such memory. Both call it at once.

    size: bytes of all that is added up at once.
    """
    size = 8 * -(-min(size, PIECE) // 8)
    with ExitStack() as stack:
        offer = _offer(stack, 4 * size) if rank == 0 else None
        told = [offer and offer[0].getsockname()]
        dist.broadcast_object_list(told, src=0)
        channel = _connected(told[0]) if rank == 1 and told[0] else None
        there = [channel is not None]
        dist.broadcast_object_list(there, src=1)
        if not there[0]:
            return None
        if offer:
            listener, memory = offer
            channel, _ = listener.accept()
            socket.send_fds(channel, [b"."], [memory])
        else:
            assert channel
            _, (memory,), _, _ = socket.recv_fds(channel, 1, 1)
            stack.callback(os.close, memory)
        return Neighbour(rank, channel, mmap.mmap(memory, 4 * size))


def _offer(stack: ExitStack, size: int) -> tuple[socket.socket, int] | None:
    """A socket in a folder that other users cannot look into, and memory; both are gone once the stack is, but for who has them by then."""
    try:
        memory = os.memfd_create("dlopt")
        stack.callback(os.close, memory)
        os.ftruncate(memory, size)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(Path(stack.enter_context(TemporaryDirectory(prefix="dlopt-"))) / "socket"))
        listener.listen(1)
    except (OSError, AttributeError):  # Linux alone has such memory
        return None
    return listener, memory


def _connected(address: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        return None
    return connection
