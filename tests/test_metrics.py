"""Metrics against scikit-learn and torchmetrics on the same rows, in batches of any size, and what a split cannot tell."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import sklearn.metrics as reference
import torch
import torchmetrics.functional as other_reference
from torch import Tensor, nn

from dlopt.models import Units
from dlopt.part import Target
from dlopt.train.metrics import METRICS, TWO_CLASSES, Metrics, activated, average_precision, names, roc_auc, tally
from dlopt.train.section import Monitor
from tests.sets import LABELS, NUMBER, PAIR, THREE, TWO, spread

CPU = torch.device("cpu")
ROWS = 500


def outputs_of(target: Target, seed: int = 0) -> Tensor:
    """Some of them the same, as trees and small networks give."""
    found = torch.randn(ROWS, target.size, dtype=torch.float64, generator=torch.manual_seed(seed))
    return (4 * found).round() / 4 + 1 / 16


def wanted_of(target: Target, outputs: Tensor, noise: float = 1.0) -> Tensor:
    """Targets that the outputs have to do with."""
    score = outputs + noise * torch.randn(outputs.shape, dtype=torch.float64, generator=torch.manual_seed(1))
    if target.kind == "category":
        return score.argmax(dim=1)
    return (score > 1).to(torch.uint8) if target.kind == "multi_label" else (1000 + 30 * score).float()


def measured(target: Target, outputs: Tensor, wanted: Tensor, size: int = ROWS, output: nn.Module | None = None) -> Metrics:
    """In batches of a size."""
    found = tally(target, output or nn.Identity(), CPU)
    for start in range(0, len(wanted), size):
        part = slice(start, start + size)
        found.add(outputs[part], wanted[part], torch.full((len(wanted[part]),), 0.5, dtype=torch.float64))
    return found.metrics(len(wanted))


@pytest.mark.parametrize("size", [1, 7, 499, 500])
@pytest.mark.parametrize("target", [TWO, TWO.model_copy(update={"positive": "no"}), TWO.model_copy(update={"positive": None})])
def test_metrics_of_two_classes_are_those_of_scikit_learn_for_the_positive_one(target: Target, size: int) -> None:
    outputs = outputs_of(target)
    wanted = wanted_of(target, outputs)
    positive = 0 if target.positive == "no" else 1
    given, score = outputs.argmax(dim=1), outputs.softmax(dim=1)[:, positive].float()
    precision, recall, f1, _ = reference.precision_recall_fscore_support(wanted, given, average="binary", pos_label=positive)
    expected = {
        "loss": 0.5,
        "accuracy": reference.accuracy_score(wanted, given),
        "macro_f1": reference.f1_score(wanted, given, average="macro"),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "roc_auc": reference.roc_auc_score(wanted == positive, score),
        "average_precision": reference.average_precision_score(wanted == positive, score),
    }
    assert measured(target, outputs, wanted, size) == pytest.approx(expected, rel=1e-12)
    assert 0.6 < expected["roc_auc"] < 0.95


def test_metrics_of_three_classes_are_those_of_scikit_learn_and_a_class_that_never_comes_up_counts_for_nothing() -> None:
    outputs = outputs_of(THREE)
    wanted = wanted_of(THREE, outputs)
    for _ in range(2):
        given = outputs.argmax(dim=1)
        expected = {"loss": 0.5, "accuracy": (given == wanted).double().mean().item()}
        expected["macro_f1"] = reference.f1_score(wanted, given, average="macro")
        assert measured(THREE, outputs, wanted, 64) == pytest.approx(expected, rel=1e-12)
        outputs, wanted = outputs - torch.tensor([0.0, 0.0, 100.0]), wanted.clamp(max=1)
    assert set(given.tolist()) == {0, 1}


@pytest.mark.parametrize("size", [3, 500])
def test_metrics_of_labels_are_those_of_scikit_learn(size: int) -> None:
    outputs = outputs_of(LABELS)
    wanted = wanted_of(LABELS, outputs)
    given, scores = (outputs > 0).long(), outputs.sigmoid().float()
    expected = {
        "loss": 0.5,
        "accuracy": 1 - reference.hamming_loss(wanted, given),
        "subset_accuracy": reference.accuracy_score(wanted, given),
        "micro_f1": reference.f1_score(wanted, given, average="micro"),
        "macro_f1": reference.f1_score(wanted, given, average="macro"),
        "macro_roc_auc": reference.roc_auc_score(wanted, scores, average="macro"),
    }
    assert measured(LABELS, outputs, wanted, size) == pytest.approx(expected, rel=1e-12)


def test_a_label_of_which_the_split_has_no_row_is_left_out_of_the_means() -> None:
    outputs = outputs_of(LABELS)
    wanted = wanted_of(LABELS, outputs)
    wanted[:, 2], outputs[:, 2] = 0, -9.0
    kept = [0, 1, 3]
    found = measured(LABELS, outputs, wanted)
    assert found["macro_f1"] == pytest.approx(reference.f1_score(wanted[:, kept], outputs[:, kept] > 0, average="macro"), rel=1e-12)
    assert found["macro_roc_auc"] == pytest.approx(reference.roc_auc_score(wanted[:, kept], outputs[:, kept].sigmoid()), rel=1e-12)


@pytest.mark.parametrize("target", [NUMBER, PAIR])
@pytest.mark.parametrize("size", [11, 500])
def test_metrics_of_numbers_are_means_over_the_columns_in_the_datas_units(target: Target, size: int) -> None:
    outputs = 1000 + 30 * outputs_of(target)
    wanted = wanted_of(target, (outputs - 1000) / 30)
    wanted[:, -1] *= 7
    units = Units(spread(wanted.numpy() * 0.5 + 3))  # of other rows than these
    found = measured(target, outputs, wanted, size, units)
    assert found == pytest.approx(
        {
            "loss": 0.5,
            "r2": reference.r2_score(wanted.double(), outputs),
            "mae": reference.mean_absolute_error(wanted.double(), outputs),
            "rmse": reference.root_mean_squared_error(wanted.double(), outputs),
        },
        rel=1e-9,
    )


def test_a_number_that_never_changes_has_no_r2_and_the_others_keep_theirs() -> None:
    outputs = 1000 + 30 * outputs_of(PAIR)
    wanted = wanted_of(PAIR, (outputs - 1000) / 30)
    units = Units(spread(wanted.numpy()))
    wanted[:, 1] = 1234.567
    found = measured(PAIR, outputs, wanted, output=units)
    assert found["r2"] == pytest.approx(reference.r2_score(wanted[:, 0].double(), outputs[:, 0]), rel=1e-9)
    wanted[:, 0] = 1.0
    alone = measured(PAIR, outputs, wanted, output=units)
    assert alone["r2"] is None
    assert alone["mae"] is not None


def test_areas_are_those_of_torchmetrics_with_many_ties_and_with_none() -> None:
    generator = torch.manual_seed(3)
    for levels in (2, 5, 10**9):
        scores = torch.randint(0, levels, (1000,), generator=generator) / levels
        truths = torch.rand(1000, generator=generator) < 0.2 + 0.5 * scores
        assert roc_auc(scores, truths) == pytest.approx(other_reference.auroc(scores, truths.long(), "binary").item(), abs=1e-6)
        found = other_reference.average_precision(scores, truths.long(), "binary").item()
        assert average_precision(scores, truths) == pytest.approx(found, abs=1e-6)


def test_the_area_of_scores_that_say_nothing_is_a_half_and_of_the_right_order_one() -> None:
    truths = torch.tensor([False, False, True, True])
    assert roc_auc(torch.tensor([0.1, 0.2, 0.3, 0.4]), truths) == 1.0
    assert roc_auc(torch.tensor([0.4, 0.3, 0.2, 0.1]), truths) == 0.0
    assert roc_auc(torch.full((4,), 0.7), truths) == 0.5


@pytest.mark.parametrize("only", [0, 1])
def test_what_a_split_of_one_class_cannot_tell_is_none(only: int) -> None:
    outputs = outputs_of(TWO)
    found = measured(TWO, outputs, torch.full((ROWS,), only))
    unknown = {name for name, value in found.items() if value is None}
    assert unknown == ({"roc_auc"} if only == 1 else {"precision", "recall", "f1", "roc_auc", "average_precision"})
    assert list(found) == list(names("category", 2))


def test_a_class_that_is_never_given_has_a_precision_of_0() -> None:
    found = measured(TWO, torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64), torch.tensor([0, 1, 0, 1]))
    assert (found["precision"], found["recall"], found["f1"], found["roc_auc"]) == (0.0, 0.0, 0.0, 0.5)


@pytest.mark.parametrize("target", [TWO, THREE, LABELS, NUMBER])
def test_outputs_that_are_not_finite_leave_no_number_that_json_has_not(target: Target) -> None:
    outputs = outputs_of(target)
    wanted = wanted_of(target, outputs)
    found = tally(target, Units(spread(wanted.numpy())) if target == NUMBER else nn.Identity(), CPU)
    found.add(outputs * torch.nan, wanted, torch.full((ROWS,), torch.nan))
    told = found.metrics(ROWS)
    assert told["loss"] is None
    assert all(value is None or np.isfinite(value) for value in told.values())


@pytest.mark.parametrize("target", [TWO, THREE, LABELS, NUMBER, PAIR])
def test_all_metrics_have_the_names_that_a_job_can_monitor(target: Target) -> None:
    outputs = outputs_of(target)
    wanted = wanted_of(target, outputs)
    found = measured(target, outputs, wanted, output=Units(spread(wanted.numpy())) if target.kind == "number" else None)
    assert set(found) == set(names(target.kind, target.size))
    assert set(get_args(Monitor)) == {name for kind in METRICS.values() for name in kind} | set(TWO_CLASSES)


def test_the_graph_gives_probabilities_of_classes_probabilities_of_labels_and_numbers_as_they_are() -> None:
    outputs = outputs_of(THREE)
    torch.testing.assert_close(activated(THREE, outputs).sum(dim=1), torch.ones(ROWS, dtype=torch.float64))
    torch.testing.assert_close(activated(LABELS, outputs), 1 / (1 + (-outputs).exp()))
    assert activated(NUMBER, outputs) is outputs
