"""A bug in the user's network ends the run at once, with the file and the line; what the machine does wrong is tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlopt.models import noise
from dlopt.models.custom import custom
from dlopt.part import DloptError, Signature
from dlopt.train.cluster import group
from dlopt.train.cluster.stopping import Preempted
from dlopt.train.job import Fit, Train
from dlopt.train.watch import metrics_log
from dlopt.train.watch.mistakes import mistake_of
from tests import sets
from tests.trained import fit


class Broken(nn.Module):
    """In training it multiplies matrices that do not fit."""

    def __init__(self, signature: Signature) -> None:
        super().__init__()
        self.out = nn.Linear(signature.inputs[0].size, signature.num_outputs)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        values = next(iter(inputs.values()))
        return self.out(values[:, :1] if torch.is_grad_enabled() else values)


LINE = next(number for number, line in enumerate(Path(__file__).read_text().splitlines(), start=1) if "is_grad_enabled() else" in line)


def test_a_bug_of_the_users_network_is_one_start_and_one_line_with_its_place(tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS, target=sets.THREE), train=40, validation=20, test=10)
    section = Fit(seed=1, model=custom(Broken), augment=(), train=Train(epochs=1, batch_size=8))
    with pytest.raises(DloptError) as caught:
        fit(section, tmp_path, data, workers=0)
    said = str(caught.value)
    assert said.startswith(f"{__file__} line {LINE}, in forward: RuntimeError: mat1 and mat2 shapes cannot be multiplied (8x1 and 3x3)")
    assert "\n" not in said
    assert len(list(metrics_log.read(next(tmp_path.rglob(metrics_log.STARTS))))) == 1


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


OF_THE_MACHINE: list[Exception] = [
    OSError("the disk is gone"),
    ConnectionResetError("the other worker has ended"),
    dist.DistBackendError("NCCL error"),
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.1.1]:5"),
    Preempted("it goes away"),
    DloptError("train.clip: it is known already"),
]


@pytest.mark.parametrize("error", OF_THE_MACHINE, ids=lambda error: type(error).__name__)
def test_what_may_not_come_again_is_left_as_it_is(error: Exception) -> None:
    assert mistake_of(raised(error)) is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("[enforce] can't allocate memory: 9 bytes")])
def test_a_lack_of_memory_says_what_to_try(error: Exception) -> None:
    said = str(mistake_of(raised(error)))
    assert said.startswith("train.batch_size: there is not enough memory for a step (") and "train.micro_batch_size" in said


def test_without_a_line_of_the_users_the_place_is_that_of_dlopt() -> None:
    with pytest.raises(TypeError) as caught:
        noise.stream("seed")  # type: ignore[arg-type]
    caught.value.__traceback__ = caught.value.__traceback__ and caught.value.__traceback__.tb_next
    assert "dlopt/models/noise.py line " in str(mistake_of(caught.value))


def test_a_worker_that_fails_beside_one_that_is_gone_is_no_mistake() -> None:
    class Group(Exception):
        worker_failures: dict[int, Any]

    found, gone = Group(), group.WorkerHealthCheckTimeoutError("no answer")
    found.worker_failures = {0: DloptError("x.py line 3, in forward: ValueError: odd")}
    assert not group.lost(found)
    found.worker_failures[1] = gone
    assert group.lost(found)
