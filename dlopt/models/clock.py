"""How long things take on a device. An accelerator is told to note it, and asked only when somebody wants to know: else what is timed
would be how long it takes to begin them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class Clock:
    """Adds up the time that passes within it."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._noted: list[tuple[torch.Event, torch.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        if device.type == "cpu":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        began, ended = (torch.Event(device, enable_timing=True) for _ in range(2))
        began.record()
        yield
        ended.record()
        self._noted.append((began, ended))

    @property
    def seconds(self) -> float:
        """So far. Waits for the device."""
        for began, ended in self._noted:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1e3
        self._noted = []
        return self._seconds


waits: list[Clock] = []
"""The last one is to run while a forward pass waits for other workers."""


def waiting(device: torch.device) -> AbstractContextManager[None]:
    """Within it, other workers are waited for. Nothing is measured where nobody asks, or where the compiler looks on."""
    return nullcontext() if torch.compiler.is_compiling() or not waits else waits[-1].running(device)
