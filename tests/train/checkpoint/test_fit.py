"""What a job's resources mean on a cluster, what is refused before anything waits, and what becomes of workers that end too early."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlopt.artifact import Artifact, once, place
from dlopt.part import DloptError, Target
from dlopt.progress import WARNING
from dlopt.train import training, worker
from dlopt.train.cluster import room
from dlopt.train.cluster.room import Need, refuse_never
from dlopt.train.cluster.stopping import GaveUp
from dlopt.train.job import Resources, Train, refuse_monitor
from dlopt.train.loop.losses import Focal, Huber
from dlopt.train.measure.thresholds import Tuned
from dlopt.train.parallel.agreement import Agreement
from dlopt.train.stage import FIT, OVERSUBSCRIBED, _refuse_other_target, local_cpus, need_of, needs_ray
from dlopt.train.watch import metrics_log
from tests.served import descendants
from tests.sets import LABELS, NUMBER, THREE, TWO
from tests.trained import prepare_digits, quick


def test_auto_is_every_gpu_or_the_process_of_the_run() -> None:
    assert need_of(Resources(), [{"CPU": 8.0, "GPU": 2.0}], "resident") == Need(2, 2, {"CPU": 1.0, "GPU": 1.0})
    assert need_of(Resources(), [{"CPU": 8.0}], "resident").most == 0


def test_workers_have_a_gpu_each_only_where_there_are_enough() -> None:
    nodes = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 2.0}]
    assert need_of(Resources(workers=3), nodes, "stream") == Need(3, 3, {"CPU": 1.0, "GPU": 1.0}, stream=True)
    assert need_of(Resources(workers=(1, 4)), nodes, "resident") == Need(1, 4, {"CPU": 1.0, "GPU": 1.0})
    assert need_of(Resources(workers=(4, 8)), [{"CPU": 8.0}], "resident") == Need(4, 8, {"CPU": 1.0})


@pytest.mark.parametrize(
    ("workers", "gpus", "batch", "said"),
    [
        (3, 2.0, 64, "3 workers and the cluster has 2 GPUs, of which each worker takes one: lower workers to 2, or hide the GPUs"),
        ((2, 8), 1.0, 64, "2 workers and the cluster has 1 GPU, of which each worker takes one: lower workers to 1, or hide the GPUs"),
        (4, 0.0, 3, "4 workers cannot share out a batch of 3 rows: lower workers or raise train.batch_size"),
    ],
)
def test_no_gpu_and_no_worker_is_idle_in_silence(workers: Any, gpus: float, batch: int, said: str) -> None:
    with pytest.raises(DloptError, match=re.escape(f"resources.workers: {said}")):
        need_of(Resources(workers=workers), [{"CPU": 8.0, "GPU": gpus}], "resident", batch)


@pytest.mark.parametrize(("gpus", "batch", "most"), [(128.0, 256, 64), (8.0, 5, 5), (8.0, 64, 8)])
def test_auto_takes_no_more_gpus_than_a_batch_can_be_shared_out_to(gpus: float, batch: int, most: int) -> None:
    assert need_of(Resources(workers=(2, 64)), [{"CPU": 8.0}], "resident", 5).most == 5
    assert need_of(Resources(), [{"CPU": 256.0, "GPU": gpus}], "resident", batch) == Need(most, most, {"CPU": 1.0, "GPU": 1.0})


@pytest.mark.parametrize(
    ("need", "nodes", "said"),
    [
        (Need(5, 5, {"CPU": 1.0}), [4.0], "workers: 5 workers need 5 CPUs and the cluster has 4: lower workers or cpus_per_worker"),
        (Need(3, 9, {"CPU": 2.0}), [3.0, 1.0], "workers: 3 workers need 6 CPUs and the cluster has 4: lower workers or cpus_per_worker"),
        (
            Need(2, 2, {"CPU": 4.0}),
            [2.0, 2.0, 4.0],
            "workers: 2 workers of 4 CPUs each cannot be placed on the nodes (2 with 2 CPUs, 1 with 4 CPUs): lower workers or "
            "cpus_per_worker",
        ),
        (
            Need(3, 3, {"CPU": 2.0}, stream=True),
            [4.0, 2.5],
            "feed: a stream needs a CPU beside those of 3 workers, and the cluster has 6.5: lower workers or cpus_per_worker, "
            "or use feed: resident",
        ),
        (
            Need(1, 1, {"CPU": 4.0}),
            [2.0, 2.0],
            "workers: 1 worker of 4 CPUs cannot be placed on the nodes (2 with 2 CPUs): lower workers or cpus_per_worker",
        ),
        (Need(2, 2, {"CPU": 1.0, "GPU": 1.0}), [8.0], "workers: 2 workers need 2 GPUs and the cluster has 0: lower workers"),
    ],
)
def test_what_a_cluster_can_never_place_is_refused(need: Need, nodes: list[float], said: str) -> None:
    with pytest.raises(DloptError) as caught:
        refuse_never(need, [{"CPU": cpus} for cpus in nodes])
    assert str(caught.value) == f"resources.{said}"


def test_what_a_cluster_can_place_is_let_through() -> None:
    refuse_never(Need(1, 9, {"CPU": 2.0}, stream=True), [{"CPU": 2.0}, {"CPU": 1.0}])
    refuse_never(Need(10, 10, {"CPU": 0.1}), [{"CPU": 1.0}])
    refuse_never(Need(2, 2, {"CPU": 1.0, "GPU": 1.0}), [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}])
    assert Need(1, 8, {"CPU": 1.0}, stream=True).fitting([{"CPU": 8.0}]) == 7
    assert Need(1, 8, {"CPU": 3.0}, stream=True).fitting([{"CPU": 3.5}, {"CPU": 4.0}, {"CPU": 3.0}]) == 3
    assert Need(1, 8, {"CPU": 0.5}, stream=True).fitting([{"CPU": 0.5}, {"CPU": 0.5}]) == 0


def test_a_cluster_of_our_own_has_room_for_the_stream_beside_the_workers() -> None:
    cores = os.cpu_count() or 1
    assert local_cpus(Resources()) == cores
    assert local_cpus(Resources(workers=cores)) == 2 * cores
    with pytest.raises(DloptError, match=r"^resources\.workers: .* or give --address$"):
        local_cpus(Resources(workers=OVERSUBSCRIBED * cores + 1))


@pytest.mark.parametrize(
    ("target", "train", "said"),
    [
        (
            THREE,
            {"monitor": "roc_auc"},
            "train.monitor: there is no roc_auc for a target of kind category, which has 3 classes: use one of loss, accuracy, macro_f1, "
            "macro_precision, macro_recall, calibration_error, macro_roc_auc, macro_average_precision",
        ),
        (
            NUMBER,
            {"monitor": "accuracy"},
            "train.monitor: there is no accuracy for a target of kind number: use one of loss, r2, mae, rmse",
        ),
        (
            LABELS,
            {"monitor": "f1"},
            "train.monitor: there is no f1 for a target of kind multi_label: "
            "use one of loss, accuracy, subset_accuracy, micro_f1, macro_f1, macro_precision, macro_recall, macro_roc_auc, "
            "macro_average_precision",
        ),
        (
            THREE,
            {"monitor": "top5_accuracy"},
            "train.monitor: there is no top5_accuracy for a target of kind category, which has 3 classes: use one of loss, accuracy, "
            "macro_f1, macro_precision, macro_recall, calibration_error, macro_roc_auc, macro_average_precision",
        ),
        (
            NUMBER,
            {"loss": {"kind": "focal"}},
            "train.loss: focal is for a target of kind category or multi_label, and it is of kind number: use one of squared, absolute, "
            "huber, quantile, or take it out",
        ),
        (
            THREE,
            {"threshold": {"kind": "tuned"}},
            "train.threshold: it is for two classes and for labels, and the target is of 3 classes: take it out",
        ),
        (
            NUMBER,
            {"threshold": 0.5},
            "train.threshold: it is for two classes and for labels, and the target is of kind number: take it out",
        ),
        (NUMBER, {"class_weights": "balanced"}, "train.class_weights: a target of kind number has no classes: take it out"),
        (
            LABELS,
            {"sampling": "balanced"},
            "train.sampling: balanced is for a target of kind category, and it is of kind multi_label: use shuffle",
        ),
        (THREE, {"class_weights": {"cat": 2, "cow": 3}}, "train.class_weights: 'cow' is no label of 'label': there are cat, dog, owl"),
    ],
)
def test_what_the_target_has_not_is_refused_before_anything_runs(target: Target, train: dict[str, object], said: str) -> None:
    with pytest.raises(DloptError) as caught:
        _refuse_other_target(Train.model_validate(train), target)
    assert str(caught.value) == said


def test_what_the_target_has_is_let_through() -> None:
    _refuse_other_target(Train(monitor="roc_auc", class_weights={"no": 2.0, "yes": 1}), TWO)
    _refuse_other_target(Train(monitor="macro_f1", sampling="balanced"), THREE)
    _refuse_other_target(Train(monitor="macro_roc_auc", class_weights="balanced"), LABELS)
    _refuse_other_target(Train(monitor="rmse", loss=Huber()), NUMBER)
    _refuse_other_target(Train(loss=Focal(), threshold=0.3), TWO)
    _refuse_other_target(Train(loss=Focal(), threshold=Tuned()), LABELS)
    refuse_monitor(Train(monitor="roc_auc"), "category")  # as long as nobody knows how many classes there are


def test_classes_are_not_balanced_twice() -> None:
    with pytest.raises(DloptError, match="class_weights and sampling are both balanced"):
        Train(class_weights="balanced", sampling="balanced")


def test_weights_of_classes_that_are_numbers_survive_json() -> None:
    train = Train.model_validate({"class_weights": {0: 1, 1: 2.5}})
    assert train.class_weights == {"0": 1.0, "1": 2.5}
    assert Train.model_validate_json(train.model_dump_json()) == train


@pytest.mark.parametrize("given", [{"a": 0}, {"a": "x"}, "balance", 3])
def test_weights_of_classes_that_make_no_sense_are_one_line(given: object) -> None:
    with pytest.raises(DloptError) as caught:
        Train.validated({"class_weights": given})
    assert str(caught.value) == f"class_weights: must be balanced, or a number greater than 0 for each label, not {given!r}"


# On Ray


class Struck(training.Training):
    """Something happens to a worker at step 5, which a file in the model's folder names; it does so once if the file can be removed."""

    def _between_steps(self) -> None:
        what = self.out / "what"
        if self.state.record.step == 5 and self.rank == 1 and what.exists():
            told = what.read_text()
            if "always" not in told:
                what.unlink()
            if told == "hang":
                time.sleep(600)
            if told == "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            if "mistake" in told:
                raise DloptError("train: this is a mistake")
            if "fail" in told:
                raise OSError("the disk is gone")
        super()._between_steps()


def struck(config: dict[str, Any], *words: Any) -> dict[str, Any] | None:
    """`train_worker`, in a process of Ray Train; workers ask each other after every step, since there are few."""
    worker.Training, Agreement.SECONDS = Struck, 0.0  # type: ignore[misc]
    return original(config, *words)


original = worker.train_worker


@pytest.fixture(scope="module")
def data(ray_cluster: None, mnist: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return prepare_digits(tmp_path_factory.mktemp("digits"), 500)


def test_training_in_the_process_of_the_run_needs_no_cluster_without_a_stream(data: Artifact) -> None:
    assert not needs_ray(Resources(workers=0), data)
    assert needs_ray(Resources(workers=0, feed="stream"), data)
    assert needs_ray(Resources(workers=0, resident_bytes=1), data)
    assert needs_ray(Resources(workers=(1, 2)), data)


class Training:
    """The fit of a job of 24 steps, and what is said of it."""

    def __init__(self, home: Path, data: Artifact, what: str = "", **resources: Any) -> None:
        self.home, self.data, self.said = home, data, list[str]()
        self.section = quick(micro_batch_size=None)
        self.out = place(FIT, self.section, home, (data,))
        self.out.mkdir(parents=True)
        if what:
            (self.out / "what").write_text(what)
        self.resources = Resources.model_validate({"workers": 2, "checkpoint": {"every": {"steps": 3}}} | resources)

    def run(self) -> str:
        """The weights, in hexadecimal digits."""
        made = once(FIT, self.section, self.home, self.data, resources=self.resources, progress=lambda *words: self.said.append(words[2]))
        return made.read("weights.safetensors").hex()

    @property
    def starts(self) -> list[int]:
        """The step that each group of workers has set out from."""
        return [line["step"] for line in metrics_log.read(self.out / metrics_log.STARTS)]

    def warned(self) -> list[str]:
        return [text.removeprefix(WARNING) for text in self.said if text.startswith(WARNING)]


@pytest.fixture(scope="module")
def undisturbed(data: Artifact, tmp_path_factory: pytest.TempPathFactory) -> str:
    return Training(tmp_path_factory.mktemp("undisturbed"), data).run()


@pytest.fixture(autouse=True)
def striking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "train_worker", struck)


@pytest.mark.slow
def test_a_worker_that_stands_still_is_replaced_and_it_is_said_where(data: Artifact, undisturbed: str, tmp_path: Path) -> None:
    training = Training(tmp_path, data, "hang", hang_seconds=6)
    assert training.run() == undisturbed
    assert training.starts == [0, 3]
    (hung,) = [text for text in training.warned() if text.startswith("no step for ")]
    assert f"worker 1 on {os.uname().nodename} at {__file__}:" in hung
    assert hung.endswith(" (loss 1 of 3)")


@pytest.mark.slow
def test_a_worker_that_gets_sigterm_saves_with_the_others_and_is_no_loss(data: Artifact, undisturbed: str, tmp_path: Path) -> None:
    training = Training(tmp_path, data, "sigterm", max_failures=0, checkpoint={"every": {"epochs": 1}})
    assert training.run() == undisturbed
    first, second = training.starts
    assert (first, second >= 5) == (0, True)


@pytest.mark.slow
def test_a_run_that_loses_too_many_workers_says_why_and_where_it_goes_on(data: Artifact, undisturbed: str, tmp_path: Path) -> None:
    training = Training(tmp_path, data, "fail always", max_failures=1)
    with pytest.raises(GaveUp) as caught:
        training.run()
    assert str(caught.value) == (
        f"worker 1 on {os.uname().nodename} has failed: OSError: the disk is gone; it is loss 2, and resources.max_failures is 1: the same "
        "command goes on from step 3"
    )
    (training.out / "what").unlink()
    assert training.run() == undisturbed
    assert training.starts == [0, 3, 3]


@pytest.mark.slow
def test_a_mistake_of_the_user_is_not_tried_again(data: Artifact, tmp_path: Path) -> None:
    training = Training(tmp_path, data, "mistake always")
    with pytest.raises(DloptError, match=r"^train: this is a mistake$"):
        training.run()
    assert training.starts == [0]


@pytest.mark.slow
def test_a_killed_controller_leaves_nothing_that_others_would_wait_for(data: Artifact, undisturbed: str, tmp_path: Path) -> None:
    before, training = room.places(), Training(tmp_path, data, "hang")

    def strike() -> None:
        until(lambda: training.starts and not (training.out / "what").exists())
        found = [pid for pid, line in descendants(os.getpid()).items() if line.startswith("ray::TrainController")]
        os.kill(max(found, key=began), signal.SIGKILL)  # that of a test before may be on its way out

    thread = threading.Thread(target=strike)
    thread.start()
    assert training.run() == undisturbed
    thread.join()
    assert training.starts == [0, 3]
    assert "the controller of Ray Train was lost (loss 1 of 3)" in training.warned()
    assert room.places() == before


def began(pid: int) -> int:
    """When a process was started, in ticks of the machine's clock."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def until(true: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert true()


def taken(cpus: int) -> Any:
    """So many CPUs of the shared cluster, by somebody else."""
    from ray.util.placement_group import placement_group

    found = placement_group([{"CPU": 1.0}] * cpus)
    assert found.wait(30)
    return found


@pytest.mark.slow
def test_a_run_waits_for_cpus_that_others_have_and_goes_on_when_they_are_free(data: Artifact, tmp_path: Path) -> None:
    from ray.util.placement_group import remove_placement_group

    others, training = taken(7), Training(tmp_path, data)

    def free() -> None:
        until(lambda: "waiting for 2 CPUs: 1 of 8 is free" in training.said)
        remove_placement_group(others)

    thread = threading.Thread(target=free)
    thread.start()
    training.run()
    thread.join()
    assert training.starts == [0]


def test_a_run_does_not_wait_for_ever(data: Artifact, tmp_path: Path) -> None:
    import ray
    from ray.util.placement_group import remove_placement_group

    cpus = int(ray.cluster_resources()["CPU"])
    others, before = taken(cpus), room.places()
    with pytest.raises(GaveUp) as caught:
        Training(tmp_path, data, wait_seconds=1.5).run()
    assert str(caught.value) == (
        f"waiting for 2 CPUs: 0 of {cpus} are free, for 2 s (resources.wait_seconds): the same command goes on from the start"
    )
    assert room.places() == before
    remove_placement_group(others)
