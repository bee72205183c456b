"""Metrics against scikit-learn and torchmetrics on the same rows, in batches and shares of any size, and what a split cannot tell."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import sklearn.metrics as reference
import torch
import torchmetrics.functional as other_reference
from torch import Tensor, nn

from dlopt.models import Units
from dlopt.part import Target
from dlopt.train.job import Monitor
from dlopt.train.measure.curves import COUNTS, EXACT, FINE, average_precision, curve_of, roc_auc
from dlopt.train.measure.metric import METRICS, MOST_SCORED, MacroAveragePrecision, MacroRocAuc, Metric, listed, names
from dlopt.train.measure.metrics import Metrics, Tally, activated, approximated, decided, tally
from tests.sets import LABELS, NUMBER, PAIR, THREE, TWO, spread

CPU = torch.device("cpu")
ROWS = 500
SEVEN = Target(name="digit", labels=tuple(range(7)))


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
    return tallied(target, outputs, wanted, size, output).metrics(len(wanted))


def tallied(target: Target, outputs: Tensor, wanted: Tensor, size: int = ROWS, output: nn.Module | None = None, rows: int = ROWS) -> Tally:
    """rows: of the split."""
    found = tally(target, output or nn.Identity(), rows, CPU)
    for start in range(0, len(wanted), size):
        part = slice(start, start + size)
        found.add(outputs[part], wanted[part], torch.full((len(wanted[part]),), 0.5, dtype=torch.float64))
    return found


def macros(wanted: Any, given: Any) -> dict[str, float]:
    """The macro metrics of scikit-learn."""
    found = reference.precision_recall_fscore_support(wanted, given, average="macro", zero_division=0)
    return dict(zip(("macro_precision", "macro_recall", "macro_f1"), found, strict=False))


def calibration(probabilities: np.ndarray, wanted: np.ndarray) -> float:
    """The expected calibration error by hand: the rows of each of 15 bins one after the other."""
    found = 0.0
    for low, high in pairwise(np.linspace(0, 1, 16)):
        rows = [row for row, values in enumerate(probabilities) if low < values.max() <= high]
        if rows:
            sure = sum(probabilities[row].max() for row in rows) / len(rows)
            right = sum(probabilities[row].argmax() == wanted[row] for row in rows) / len(rows)
            found += len(rows) / len(wanted) * abs(sure - right)
    return found


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
        **macros(wanted, given),
        "calibration_error": calibration(outputs.softmax(dim=1).numpy(), wanted.numpy()),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "roc_auc": reference.roc_auc_score(wanted == positive, score),
        "average_precision": reference.average_precision_score(wanted == positive, score),
    }
    assert measured(target, outputs, wanted, size) == pytest.approx(expected, rel=1e-12)
    assert 0.6 < expected["roc_auc"] < 0.95


def test_metrics_of_three_classes_are_those_of_scikit_learn_and_a_class_that_never_comes_up_counts_for_nothing() -> None:
    drawn = outputs_of(THREE)
    labels = wanted_of(THREE, drawn)
    never, few = torch.tensor([0.0, 0.0, 100.0]), labels.clamp(max=1)  # the last class is given, but no row has it; then neither
    for outputs, wanted, classes in ((drawn, labels, {0, 1, 2}), (drawn, few, {0, 1, 2}), (drawn - never, few, {0, 1})):
        given = outputs.argmax(dim=1)
        assert set(given.tolist()) == classes
        probabilities, there = outputs.softmax(dim=1), wanted.unique().tolist()
        expected = {"loss": 0.5, "accuracy": (given == wanted).double().mean().item()} | macros(wanted, given)
        expected["calibration_error"] = calibration(probabilities.numpy(), wanted.numpy())
        one, scores = [wanted == index for index in there], probabilities.float().T[there]
        expected["macro_roc_auc"] = np.mean([reference.roc_auc_score(*pair) for pair in zip(one, scores, strict=True)])
        expected["macro_average_precision"] = np.mean([reference.average_precision_score(*pair) for pair in zip(one, scores, strict=True)])
        assert measured(THREE, outputs, wanted, 64) == pytest.approx(expected, rel=1e-12)


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
        **macros(wanted, given),
        "macro_roc_auc": reference.roc_auc_score(wanted, scores, average="macro"),
        "macro_average_precision": reference.average_precision_score(wanted, scores, average="macro"),
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
        curve = curve_of(scores, truths)
        assert curve is not None
        assert roc_auc(curve) == pytest.approx(other_reference.auroc(scores, truths.long(), "binary").item(), abs=1e-6)
        found = other_reference.average_precision(scores, truths.long(), "binary").item()
        assert average_precision(curve) == pytest.approx(found, abs=1e-6)


def test_the_area_of_scores_that_say_nothing_is_a_half_and_of_the_right_order_one() -> None:
    truths = torch.tensor([False, False, True, True])
    for scores, area in (([0.1, 0.2, 0.3, 0.4], 1.0), ([0.4, 0.3, 0.2, 0.1], 0.0), ([0.7] * 4, 0.5)):
        curve = curve_of(torch.tensor(scores), truths)
        assert curve is not None and roc_auc(curve) == area


def test_metrics_of_many_classes_are_those_of_scikit_learn_and_torchmetrics() -> None:
    outputs = outputs_of(SEVEN) + 1e-4 * torch.randn(ROWS, 7, dtype=torch.float64, generator=torch.manual_seed(9))  # no ties
    wanted = wanted_of(SEVEN, outputs)
    found, probabilities = measured(SEVEN, outputs, wanted, 33), outputs.softmax(dim=1)
    flat = probabilities.float().double()
    expected = macros(wanted, outputs.argmax(dim=1)) | {
        "top5_accuracy": reference.top_k_accuracy_score(wanted, outputs, k=5),
        "macro_roc_auc": reference.roc_auc_score(wanted, flat / flat.sum(dim=1, keepdim=True), multi_class="ovr"),
        "macro_average_precision": reference.average_precision_score(wanted, flat),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)  # scikit-learn wants sums of 1
    theirs = other_reference.classification
    for name, function, options in (
        ("accuracy", theirs.multiclass_accuracy, {"average": "micro"}),
        ("top5_accuracy", theirs.multiclass_accuracy, {"average": "micro", "top_k": 5}),
        ("macro_f1", theirs.multiclass_f1_score, {}),
        ("macro_precision", theirs.multiclass_precision, {}),
        ("macro_recall", theirs.multiclass_recall, {}),
        ("macro_roc_auc", theirs.multiclass_auroc, {}),
        ("macro_average_precision", theirs.multiclass_average_precision, {}),
        ("calibration_error", theirs.multiclass_calibration_error, {"n_bins": 15}),
    ):
        assert found[name] == pytest.approx(function(probabilities, wanted, num_classes=7, **options).item(), rel=2e-6), name


def test_of_classes_that_are_as_likely_the_first_ones_are_among_the_five() -> None:
    outputs = torch.zeros(7, 7, dtype=torch.float64)
    assert measured(SEVEN, outputs, torch.arange(7))["top5_accuracy"] == 5 / 7
    outputs[:, 6] = 1
    assert measured(SEVEN, outputs, torch.arange(7))["top5_accuracy"] == 5 / 7
    assert measured(SEVEN, outputs, torch.tensor([3] * 7))["top5_accuracy"] == 1
    assert measured(SEVEN, outputs, torch.tensor([4] * 7))["top5_accuracy"] == 0


def test_a_model_is_calibrated_when_it_is_as_often_right_as_it_is_sure() -> None:
    logits = torch.tensor([[0.0, np.log(4)]] * 10, dtype=torch.float64)
    wanted = torch.tensor([1] * 8 + [0] * 2)
    assert measured(TWO, logits, wanted)["calibration_error"] == pytest.approx(0, abs=1e-15)
    assert measured(TWO, logits, torch.ones(10, dtype=torch.long))["calibration_error"] == pytest.approx(0.2)
    assert measured(TWO, 1000 * logits, wanted)["calibration_error"] == pytest.approx(0.2)  # surely, in the last bin


@pytest.mark.parametrize("target", [TWO, THREE, SEVEN, LABELS, PAIR])
@pytest.mark.parametrize("cuts", [[0, 500], [0, 3, 500], [0, 0, 170, 500]])
def test_metrics_of_shares_are_those_of_the_whole(target: Target, cuts: list[int]) -> None:
    """As workers do: sums added up, scores one after the other."""
    outputs = outputs_of(target)
    wanted = wanted_of(target, outputs)
    output = Units(spread(wanted.numpy())) if target.kind == "number" else None
    whole = measured(target, outputs, wanted, 64, output)
    first, *others = (tallied(target, outputs[low:high], wanted[low:high], 64, output) for low, high in reversed(list(pairwise(cuts))))
    for other in others:
        first.sums += other.sums
        first.scores += other.scores
    assert first.metrics(ROWS) == pytest.approx(whole, rel=1e-13, abs=1e-15)
    assert None not in whole.values()


@pytest.mark.parametrize("target", [TWO, THREE, LABELS])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_of_more_rows_than_can_be_kept_areas_are_counted_in_bins_and_hardly_differ(target: Target, scale: float) -> None:
    """Whatever the spread of probabilities; all other metrics are exact, and what is held does not grow with rows."""
    outputs = scale * outputs_of(target)
    wanted = wanted_of(target, outputs / scale)
    exact, near = tallied(target, outputs, wanted, 64), tallied(target, outputs, wanted, 64, rows=EXACT + 1)
    assert near.bins and len(near.scores) == 1 and not exact.bins
    assert near.bins.counts.numel() <= 2 * near.bins.counts.shape[1] * (FINE + 1)
    found, whole = near.metrics(ROWS), exact.metrics(ROWS)
    for name, value in whole.items():
        area = name.endswith(("roc_auc", "average_precision"))
        assert found[name] == (pytest.approx(value, abs=2e-2 if scale < 1 else 5e-3) if area else value), name
    assert near.curves()[0] is not None


def test_bins_of_many_labels_are_bounded_and_workers_add_them_up() -> None:
    many = Target(name="topics", kind="multi_label", labels=tuple(range(1000)))
    outputs = torch.randn(300, 1000, dtype=torch.float64, generator=torch.manual_seed(1))
    wanted = (outputs + torch.randn(300, 1000, dtype=torch.float64) > 1).to(torch.uint8)
    first, other, whole = (
        tallied(many, outputs[some], wanted[some], rows=10**6) for some in (slice(0, 100), slice(100, 300), slice(0, 300))
    )
    assert first.bins and other.bins and whole.bins
    assert whole.bins.counts.nbytes <= 8 * (COUNTS + 2 * 1000)
    first.sums += other.sums
    first.bins.counts += other.bins.counts
    assert first.metrics(300) == pytest.approx(whole.metrics(300), rel=1e-12)
    assert approximated(many, {"train": 10**6, "test": 300}) == (
        "macro_roc_auc and macro_average_precision of train: counted in 4,096 bins of probabilities, since there are too many to keep"
    )
    assert approximated(many, {"train": 300}) is None
    outputs[0, 7] = torch.nan
    assert [place for place, curve in enumerate(tallied(many, outputs, wanted, rows=10**6).curves()) if curve is None] == [7]


@pytest.mark.parametrize("target", [TWO, TWO.model_copy(update={"positive": "no"}), LABELS])
def test_with_thresholds_a_row_is_given_what_reaches_them_and_all_metrics_of_decisions_follow(target: Target) -> None:
    outputs = outputs_of(target)
    wanted, probabilities = wanted_of(target, outputs), activated(target, outputs).float()
    at = target.positive_index if target.kind == "category" else 0
    row = int((probabilities[:, at] - 0.3).abs().argmin())
    own = float(probabilities[row, at])
    thresholds = (own,) if target.kind == "category" else (own, 0.5, 0.8, 0.9)
    before, after = (measured(found, outputs, wanted) for found in (target, target.model_copy(update={"thresholds": thresholds})))
    if target.kind == "category":
        positive = target.positive_index
        reached = probabilities[:, positive] >= thresholds[0]
        given = torch.where(reached, positive, 1 - positive)
        assert given[row] == positive
        assert after["f1"] == pytest.approx(reference.f1_score(wanted, given, pos_label=positive), rel=1e-12)
    else:
        given = (probabilities >= torch.tensor(thresholds)).long()
        assert given[row, 0] == 1
        assert after["micro_f1"] == pytest.approx(reference.f1_score(wanted, given, average="micro"), rel=1e-12)
    assert after["macro_recall"] == pytest.approx(macros(wanted, given)["macro_recall"], rel=1e-12)
    same = {name for name in before if before[name] == after[name]}
    assert same >= {"loss"} | {name for name in before if "roc" in name or "average" in name or "calibration" in name}
    assert not {"accuracy", "macro_f1"} & same
    torch.testing.assert_close(decided(target.model_copy(update={"thresholds": thresholds}), activated(target, outputs)).long(), given)


def test_areas_of_more_classes_than_can_be_kept_are_left_out() -> None:
    many = Target(name="word", labels=tuple(range(MOST_SCORED + 1)))
    outputs = outputs_of(many)
    found = tallied(many, outputs, wanted_of(many, outputs))
    assert found.scores[-1].numel() == 0
    areas = {MacroRocAuc.name, MacroAveragePrecision.name}
    assert not set(found.metrics(ROWS)) & areas
    assert set(names("category", MOST_SCORED)) - set(names("category", MOST_SCORED + 1)) == areas


@pytest.mark.slow
def test_nothing_of_training_loads_torchmetrics() -> None:
    """It takes more than a second."""
    code = "import sys, dlopt.spec, dlopt.train.measure.evaluate; print('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


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


@pytest.mark.parametrize("target", [TWO, THREE, SEVEN, LABELS, NUMBER])
def test_outputs_that_are_not_finite_leave_no_number_that_json_has_not(target: Target) -> None:
    outputs = outputs_of(target)
    wanted = wanted_of(target, outputs)
    found = tally(target, Units(spread(wanted.numpy())) if target == NUMBER else nn.Identity(), ROWS, CPU)
    found.add(outputs * torch.nan, wanted, torch.full((ROWS,), torch.nan))
    told = found.metrics(ROWS)
    assert told["loss"] is None
    assert all(value is None or np.isfinite(value) for value in told.values())


@pytest.mark.parametrize("target", [TWO, THREE, SEVEN, LABELS, NUMBER, PAIR])
def test_all_metrics_have_the_names_that_a_job_can_monitor(target: Target) -> None:
    outputs = outputs_of(target)
    wanted = wanted_of(target, outputs)
    found = measured(target, outputs, wanted, output=Units(spread(wanted.numpy())) if target.kind == "number" else None)
    assert set(found) == set(names(target.kind, target.size))
    assert get_args(Monitor) == tuple(METRICS)
    assert [name for name in METRICS if not re.search(rf"\b{name}\b", listed())] == []
    assert names(target.kind)[1] in ("accuracy", "r2")


def test_every_metric_says_all_that_is_asked_of_it() -> None:
    asked = ("name", "targets", "written", "smaller_is_better", "is_share", "of")
    assert {(metric.name, what) for metric in METRICS.values() for what in asked if what not in vars(metric)} == set()
    assert set(Metric.__subclasses__()) == set(METRICS.values())
    assert names("category", 2)[-5:] == ("precision", "recall", "f1", "roc_auc", "average_precision")
    assert names("category", 6)[-1] == "top5_accuracy" != names("category", 5)[-1]


def test_the_graph_gives_probabilities_of_classes_probabilities_of_labels_and_numbers_as_they_are() -> None:
    outputs = outputs_of(THREE)
    torch.testing.assert_close(activated(THREE, outputs).sum(dim=1), torch.ones(ROWS, dtype=torch.float64))
    torch.testing.assert_close(activated(LABELS, outputs), 1 / (1 + (-outputs).exp()))
    assert activated(NUMBER, outputs) is outputs
