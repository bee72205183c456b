"""What a worker says of an exception that another start would meet as well: in a line, with the place in the user's own code."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

import dlopt
from dlopt.part import DloptError
from dlopt.train.cluster.stopping import GaveUp, Preempted, Stopped

OTHERS = (*(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")), str(Path(dlopt.__file__).parent))
"""Folders of code that is not the user's."""
EXCHANGE = re.compile(r"gloo|nccl|connection|peer|timed out|timeout|process group|broken pipe|rendezvous|socket", re.IGNORECASE)
"""What is said when another worker is gone."""


def mistake_of(error: Exception) -> DloptError | None:
    """What to tell the user of an exception of training, if it is one that would come again; None for what is no mistake of the job, such
    as a lost connection or a full disk. Its traceback tells the innermost line of the user's own code, else that of ours."""
    if isinstance(error, (DloptError, Stopped, Preempted, GaveUp)):
        return None
    if is_lack_of_memory(error):
        return DloptError(
            f"train.batch_size: there is not enough memory for a step ({_first_line(error)}): lower it (dlopt find-batch tells the largest "
            "that fits), or set train.micro_batch_size or resources.checkpoint_activations: true"
        )
    if _of_the_machine(error):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*OTHERS, "<frozen"))]
    ours = [frame for frame in frames if frame.filename.startswith(OTHERS[-1])]
    found = (own or ours or frames)[-1]
    return DloptError(f"{found.filename} line {found.lineno}, in {found.name}: {type(error).__name__}: {_first_line(error)}")


def is_lack_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _of_the_machine(error: Exception) -> bool:
    """Whether disks, other workers or the cluster have failed, so that the next start may meet nothing of it."""
    if isinstance(error, (OSError, dist.DistError)) or type(error).__module__.partition(".")[0] == "ray":
        return True
    return isinstance(error, RuntimeError) and bool(EXCHANGE.search(str(error)))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no more is said")
