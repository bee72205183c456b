"""Thresholds against all that there could be, and from a rare class in the data to the label that the server gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as reference
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from dlopt.artifact import Artifact, Stage, once
from dlopt.data.prepared import Split
from dlopt.export import Onnx
from dlopt.export.stage import EXPORT
from dlopt.models import Mlp
from dlopt.optim.optimizers import Adam
from dlopt.part import DloptError, Signature, Target
from dlopt.serve import Serve
from dlopt.serve.front.application import application_of
from dlopt.train.job import Fit, Train
from dlopt.train.loop.losses import Binary, CrossEntropy, Focal, loss_of
from dlopt.train.measure.curves import EXACT, Curve, curve_of
from dlopt.train.measure.evaluate import predict
from dlopt.train.measure.metrics import tally
from dlopt.train.measure.thresholds import Threshold, Tuned, best, fixed, signed, tuned
from dlopt.train.start import trained_network
from dlopt.train.worker import Assignment, Worker
from tests.cases import crossed
from tests.graphs import compared
from tests.serve.test_protocols import PREDICT, ask
from tests.sets import LABELS, NUMBERS, TWO, prepared, signature

CPU = torch.device("cpu")
FIRST = TWO.model_copy(update={"positive": "no"})


def value_of(metric: str, truths: np.ndarray, given: np.ndarray) -> float:
    if metric == "f1":
        return reference.f1_score(truths, given, zero_division=0)
    recalls = [(given[truths == one] == one).mean() for one in (False, True)]
    return sum(recalls) / 2 if metric == "balanced_accuracy" else sum(recalls) - 1


@pytest.mark.parametrize(("metric", "levels", "share"), crossed(["f1", "balanced_accuracy", "youden"], [3, 20, 10**9], [0.04, 0.5, 0.9]))
def test_no_other_threshold_is_better_than_the_best_one(metric: str, levels: int, share: float) -> None:
    generator = torch.manual_seed(levels + int(100 * share))
    truths = torch.rand(300, generator=generator) < share
    scores = (torch.rand(300, generator=generator) * 0.7 + 0.3 * truths).mul(levels).floor().div(levels).clamp(0, 1)
    found = best(metric, curve_of(scores, truths))
    values = [value_of(metric, truths.numpy(), (scores >= cut).numpy()) for cut in [*scores.unique(), torch.tensor(2.0)]]
    assert value_of(metric, truths.numpy(), (scores >= found).numpy()) == pytest.approx(max(values), abs=1e-12)
    assert max(values) > min(values)
    assert 0 <= found <= 1 and found == np.float32(found)


def test_the_line_is_midway_between_the_probabilities_that_it_separates() -> None:
    truths = torch.tensor([False, False, True, True])
    assert best("f1", curve_of(torch.tensor([0.1, 0.2, 0.3, 0.4]), truths)) == pytest.approx(0.25)
    neighbours = torch.tensor([0.2, 0.3, np.nextafter(np.float32(0.3), np.float32(1)), 0.4])
    assert best("f1", curve_of(neighbours, truths)) == neighbours[2].item()  # there is no number between


def test_of_thresholds_that_are_as_good_the_one_nearest_to_a_half_is_taken() -> None:
    truths = torch.tensor([True, False, True, False] * 2)
    for scores in (torch.full((8,), 0.25), torch.tensor([0.1, 0.1, 0.9, 0.9] * 2)):
        found = best("youden", curve_of(scores, truths))
        cuts = [scores.min().item() / 2, (scores.min().item() + scores.max().item()) / 2]
        assert found == pytest.approx(min(cuts[: len(scores.unique())], key=lambda cut: abs(cut - 0.5)))


@pytest.mark.parametrize("only", [True, False])
def test_rows_of_one_sort_tell_no_threshold_nor_do_probabilities_that_are_not_finite(only: bool) -> None:
    scores = torch.tensor([0.1, 0.2, 0.3])
    assert best("f1", curve_of(scores, torch.full((3,), only))) == 0.5
    assert best("f1", curve_of(scores * torch.nan, torch.tensor([True, False, only]))) == 0.5


def curves(target: Target, probabilities: Tensor, wanted: Tensor, rows: int = 0) -> list[Curve | None]:
    """Of outputs that have these probabilities. rows: of the split, if not as many as are here."""
    outputs = probabilities.logit() if target.kind == "multi_label" else probabilities.log()
    found = tally(target, nn.Identity(), rows or len(wanted), CPU)
    found.add(outputs, wanted, outputs.new_zeros(len(wanted)))
    return found.curves()


@pytest.mark.parametrize("metric", ["f1", "balanced_accuracy", "youden"])
def test_of_more_rows_than_can_be_kept_the_threshold_is_nearly_as_good(metric: Any) -> None:
    generator = torch.manual_seed(5)
    wanted = (torch.rand(4000, 4, generator=generator) < torch.tensor([0.01, 0.1, 0.5, 0.9])).to(torch.uint8)
    probabilities = (2 * torch.randn(4000, 4, generator=generator, dtype=torch.float64) + 3 * wanted - 3).sigmoid()
    near, exact = (tuned(Tuned(metric=metric), curves(LABELS, probabilities, wanted, rows)) for rows in (EXACT, 0))
    for label in range(4):
        truths = wanted[:, label].numpy() > 0
        values = [value_of(metric, truths, (probabilities[:, label].float() >= cut).numpy()) for cut in (near[label], exact[label])]
        assert values[1] - 5e-3 < values[0] <= values[1]


def test_each_label_has_a_threshold_of_its_own_and_two_classes_have_one() -> None:
    probabilities = torch.tensor([[0.1, 0.9, 0.5, 0.5], [0.2, 0.8, 0.5, 0.5], [0.3, 0.7, 0.5, 0.5]], dtype=torch.float64)
    wanted = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 1], [1, 0, 0, 1]], dtype=torch.uint8)
    assert tuned(Tuned(), curves(LABELS, probabilities, wanted)) == pytest.approx((0.15, 0.75, 0.5, 0.5))
    two = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]], dtype=torch.float64)
    assert tuned(Tuned(), curves(TWO, two, torch.tensor([0, 1, 1]))) == pytest.approx((0.15,))
    assert tuned(Tuned(), curves(FIRST, two, torch.tensor([0, 1, 1]))) == pytest.approx((0.85,))


def test_a_number_is_the_threshold_of_the_positive_class_or_of_every_label() -> None:
    assert fixed(0.3, TWO) == (0.3,)
    assert fixed(0.3, LABELS) == (0.3,) * 4
    assert fixed(None, TWO) == fixed(Tuned(), LABELS) == ()


@pytest.mark.parametrize("given", [0, 1, -0.5, "x", {"kind": "tuned", "metric": "accuracy"}, {"kind": "best"}])
def test_what_is_no_threshold_is_refused(given: Any) -> None:
    with pytest.raises(DloptError):
        Train.model_validate({"threshold": given})
    assert TypeAdapter(Threshold).validate_python({"kind": "tuned"}) == Tuned(metric="f1")


def test_a_signature_gets_its_thresholds_and_is_the_same_bytes_without_any() -> None:
    content = signature(NUMBERS).model_dump_json().encode()
    assert signed(content, ()) == content
    found = Signature.model_validate_json(signed(content, (0.25,)))
    assert found.target == TWO.model_copy(update={"thresholds": (0.25,)})
    assert found.inputs == (NUMBERS,)


# From data to server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def learn(home: Path, data: Artifact, threshold: Any, **train: Any) -> Artifact:
    """A model that a few epochs have taught, as one worker leaves it."""
    settings = Train(epochs=4, batch_size=64, optimizer=Adam(lr=0.01), threshold=threshold, **train)
    return once(Stage("model", _work), Fit(seed=3, model=Mlp(hidden=(16,)), augment=(), train=settings), home, data)


def _work(section: Fit, out: Path, data: Artifact) -> dict[str, Any]:
    info = Worker(Assignment(fit=section, data=data.path, out=out, feed="resident"), 0, 1, CPU).run()
    shutil.rmtree(out / "checkpoints")
    assert info is not None
    return info


def rare(home: Path, target: Target) -> Artifact:
    """The positive class, or the first label."""
    rarer = 0.8 if target.kind == "category" and target.positive_index else -0.8
    return prepared(home, signature(NUMBERS, target=target), noise=0.3, rare=rarer, train=1500, validation=1000, test=1500)


def test_a_rare_class_has_a_better_test_f1_with_a_tuned_threshold_than_at_one_half(home: Path) -> None:
    data = rare(home, TWO)
    half, found = learn(home, data, None), learn(home, data, Tuned())
    assert half.read("weights.safetensors") == found.read("weights.safetensors")
    assert 0.02 < data.info["labels"]["test"]["yes"] / 1500 < 0.25
    assert found.info["metrics"]["test"]["f1"] > half.info["metrics"]["test"]["f1"] + 0.02
    assert found.info["metrics"]["validation"]["f1"] > half.info["metrics"]["validation"]["f1"]
    assert found.info["metrics"]["test"]["roc_auc"] == half.info["metrics"]["test"]["roc_auc"]


@pytest.mark.parametrize("target", [TWO, FIRST, LABELS], ids=["second", "first", "labels"])
@pytest.mark.parametrize("threshold", [Tuned(), Tuned(metric="youden"), 0.2], ids=["f1", "youden", "fixed"])
def test_metrics_predictions_export_and_server_follow_the_thresholds(home: Path, target: Target, threshold: Any) -> None:
    data = rare(home, target)
    model = learn(home, data, threshold)
    found, test = Signature.model_validate_json(model.read("signature.json")), Split.open(data, "test")
    outputs, wanted = predict(trained_network(model, data), test, CPU)
    expected = reached(found.target, outputs)
    table = pq.read_table(model.path / "predictions.parquet")["predicted"].to_pylist()
    assert (table if target.kind == "multi_label" else [[one] for one in table]) == expected
    assert expected != reached(target, outputs)  # it makes a difference
    if target.kind == "category":
        given = np.array(expected)[:, 0]
        f1 = reference.f1_score(wanted, given, pos_label=target.positive_index)
        assert model.info["metrics"]["test"]["f1"] == pytest.approx(f1, rel=1e-12)
    export = once(EXPORT, Onnx(), home, model, data)
    assert Signature.model_validate_json(export.read("signature.json")) == found
    app = application_of(export, "m", Serve(max_rows=2000))
    raw = [dict(zip(NUMBERS.columns, row, strict=True)) for row in test.read()["numbers"].tolist()]
    reply = ask(app, "POST", PREDICT, content=json.dumps({"instances": raw})).json()["predictions"]  # NaN is missing
    names = [row["labels"] if "labels" in row else [row["label"]] for row in reply]
    assert [[target.labels.index(name) for name in row] for row in names] == expected
    told = ask(app, "GET", "/v1/models/m/metadata").json()
    assert tuple(told["thresholds"]) == found.target.thresholds == pytest.approx(tuple(told["signature"]["target"]["thresholds"]))


def reached(target: Target, outputs: Tensor) -> list[list[int]]:
    values, least = outputs.float().numpy(), np.float32(target.thresholds or (0.5,) * target.size)
    if target.kind == "multi_label":
        return [np.flatnonzero(row).tolist() for row in values >= least]
    positive = target.positive_index
    return [[positive if value >= least[0] else 1 - positive] for value in values[:, positive]]


def test_an_export_that_gives_another_label_at_the_threshold_is_seen(home: Path) -> None:
    data = rare(home, TWO)
    model = learn(home, data, Tuned())
    found, test = Signature.model_validate_json(model.read("signature.json")), Split.open(data, "test")
    content = once(EXPORT, Onnx(), home, model, data).read("model.onnx")
    expected = predict(trained_network(model, data), test, CPU)[0].numpy()
    assert compared(content, found, test, expected)[1] == 0
    (cut,) = found.target.thresholds
    row = int(np.abs(expected[:, 1] - cut).argmin())
    expected[row] = [1 - cut, cut] + (1 if expected[row, 1] < cut else -1) * np.array([-1e-4, 1e-4])  # on the other side
    assert compared(content, found, test, expected)[1] == 1


@pytest.mark.parametrize("target", [TWO, LABELS], ids=["two", "labels"])
def test_the_loss_that_is_measured_is_the_one_that_is_trained_without_weights_and_smoothing(home: Path, target: Target) -> None:
    data = rare(home, target)
    test = Split.open(data, "test")
    default: type[CrossEntropy | Binary] = CrossEntropy if target.kind == "category" else Binary
    for loss in (Focal(gamma=3, label_smoothing=0.2), default(label_smoothing=0.2)):
        area = "macro_roc_auc" if target == LABELS else "roc_auc"
        model = learn(home, data, None, loss=loss, class_weights="balanced", monitor=area)
        network = trained_network(model, data)
        rows = {name: torch.from_numpy(values.copy()) for name, values in test.read().items()}
        wanted = rows.pop(target.name)
        with torch.no_grad():
            measured = loss_of(loss.model_copy(update={"label_smoothing": 0.0}), target, network.output)
            plain = measured(network(rows).double(), wanted, "none")
        assert model.info["metrics"]["test"]["loss"] == pytest.approx(plain.mean().item(), rel=1e-9)
        np.testing.assert_allclose(pq.read_table(model.path / "predictions.parquet")["loss"], plain, rtol=1e-6, atol=1e-7)
        assert model.info["metrics"]["test"][area] > 0.7
