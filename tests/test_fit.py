"""What a job's resources mean on a cluster, and what is refused before anything waits for it."""

from __future__ import annotations

import os

import pytest

from dlopt.part import DloptError
from dlopt.train.fit import OVERSUBSCRIBED, _leaving_room, _Seen, _workers, local_cpus
from dlopt.train.section import Resources


def test_auto_is_every_gpu_or_the_process_of_the_run() -> None:
    assert _workers(Resources(), {"CPU": 8.0, "GPU": 2.0}) == 2
    assert _workers(Resources(), {"CPU": 8.0}) == 0


@pytest.mark.parametrize(("workers", "cpus_per_worker", "needed"), [(5, 1.0, "5"), ((3, 9), 2.0, "6")])
def test_more_workers_than_the_cluster_has_cpus_are_refused(workers: object, cpus_per_worker: float, needed: str) -> None:
    resources = Resources.model_validate({"workers": workers, "cpus_per_worker": cpus_per_worker})
    with pytest.raises(
        DloptError, match=rf"^resources\.workers: \d workers need {needed} CPUs and the cluster has 4: lower workers or cpus_per_worker$"
    ):
        _workers(resources, {"CPU": 4.0})


def test_a_cluster_of_our_own_has_room_for_the_stream_beside_the_workers() -> None:
    cores = os.cpu_count() or 1
    assert local_cpus(Resources()) == cores
    assert local_cpus(Resources(workers=cores)) == 2 * cores
    with pytest.raises(DloptError, match=r"^resources\.workers: .* or give --address$"):
        local_cpus(
            Resources(
                workers=OVERSUBSCRIBED * cores + 1,
            )
        )


def test_elastic_workers_leave_a_cpu_each_for_their_stream() -> None:
    resources = Resources(workers=(1, 8))
    assert _leaving_room((1, 8), resources, {"CPU": 8.0}) == (1, 4)
    assert _leaving_room((1, 2), resources, {"CPU": 8.0}) == (1, 2)
    assert _leaving_room(3, resources, {"CPU": 8.0}) == 3


def test_progress_in_words() -> None:
    seen = _Seen(3)
    seen.add([{"step": 1, "epoch": 1, "loss": 0.5}])
    assert str(seen) == "epoch 1/3  loss 0.5000"
    seen.add([{"step": 2, "epoch": 1, "train": {}, "validation": {"accuracy": 0.75}}, {"step": 3, "epoch": 2, "loss": None}])
    assert (seen.step, str(seen)) == (3, "epoch 2/3  validation 0.7500")
    seen.add([{"step": 6, "epoch": 3, "train": {}, "validation": None}])
    assert str(seen) == "epoch 3/3"
