"""What a job's resources mean on a cluster, and what is refused before anything waits for it."""

from __future__ import annotations

import os

import pytest
from pydantic import ValidationError

from dlopt.part import DloptError, Target
from dlopt.spec import explain
from dlopt.train.fit import OVERSUBSCRIBED, _leaving_room, _refuse_other_target, _workers, local_cpus
from dlopt.train.losses import Focal, Huber
from dlopt.train.section import Resources, Train, refuse_monitor
from dlopt.train.thresholds import Tuned
from tests.sets import LABELS, NUMBER, THREE, TWO


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
    with pytest.raises(ValidationError, match="class_weights and sampling are both balanced"):
        Train(class_weights="balanced", sampling="balanced")


def test_weights_of_classes_that_are_numbers_survive_json() -> None:
    train = Train.model_validate({"class_weights": {0: 1, 1: 2.5}})
    assert train.class_weights == {"0": 1.0, "1": 2.5}
    assert Train.model_validate_json(train.model_dump_json()) == train


@pytest.mark.parametrize("given", [{"a": 0}, {"a": "x"}, "balance", 3])
def test_weights_of_classes_that_make_no_sense_are_one_line(given: object) -> None:
    with pytest.raises(ValidationError) as caught:
        Train.model_validate({"class_weights": given})
    assert explain(caught.value, Train) == f"class_weights: must be balanced, or a number greater than 0 for each label, not {given!r}"
