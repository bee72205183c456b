"""A network over a split: whatever workers share it out, whatever the kind of target, the metrics and predictions are of its rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as reference
import torch

from dlopt.artifact import Artifact
from dlopt.data.prepared import RowGroup, Split
from dlopt.models import Mlp, Network
from dlopt.part import Target
from dlopt.train.measure import evaluate as module
from dlopt.train.measure.evaluate import evaluate, predict, write_predictions
from dlopt.train.start import trained_network
from tests.models.test_models import image
from tests.processes import together
from tests.sets import CATEGORIES, HASHED, LABELS, NUMBER, NUMBERS, PAIR, TEXT, THREE, TWO, prepared, signature, trained

CPU = torch.device("cpu")
KINDS = [TWO, THREE, LABELS, NUMBER, PAIR]


def made(home: Path, target: Target, **rows: int) -> tuple[Artifact, Artifact]:
    """Data and model."""
    data = prepared(home, signature(NUMBERS, CATEGORIES, HASHED, TEXT, target=target), **rows)
    return data, trained(home, data, Mlp(hidden=(16,), dropout=0.5))


def torchs(network: Network, split: Split) -> np.ndarray:
    """Outputs of all rows at once, texts as long as they lie on disk."""
    rows = {name: torch.from_numpy(values.copy()) for name, values in split.read().items() if name != split.signature.target.name}
    with torch.no_grad():
        return network(rows).double().numpy()


def probabilities(outputs: np.ndarray, target: Target) -> np.ndarray:
    if target.kind == "number":
        return outputs
    odds = np.exp(outputs)
    return odds / odds.sum(axis=1, keepdims=True) if target.kind == "category" else odds / (1 + odds)


@pytest.mark.parametrize("target", KINDS, ids=lambda target: target.name)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_are_in_row_order_without_dropout_and_the_mode_stays(target: Target, training: bool, tmp_path: Path) -> None:
    data, model = made(tmp_path, target, test=3000)
    network, test = trained_network(model, data), Split.open(data, "test")
    expected = probabilities(torchs(network, test), target)
    found, wanted = predict(network.train(training), test, CPU)
    assert network.training is training
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(wanted.numpy(), test.read()[target.name])


SHARED = [*((target, 5000) for target in KINDS), (TWO, 80)]
"""Of the last one there is one chunk, and so nothing to do for one of two workers."""


def _evaluated(rank: int, world: int, home: Path) -> None:
    for index, (target, rows) in enumerate(SHARED):
        data, model = made(Path(home), target, test=rows)
        found = evaluate(trained_network(model, data), Split.open(data, "test"), CPU, rank, 2)
        (Path(home) / f"found-{index}-{rank}").write_text(json.dumps(found))


@pytest.mark.slow
def test_metrics_are_the_same_however_many_workers_share_the_split_out(tmp_path: Path) -> None:
    alone, chunks = [], []
    for target, rows in SHARED:
        data, model = made(tmp_path, target, test=rows)
        test = Split.open(data, "test")
        alone.append(evaluate(trained_network(model, data), test, CPU))
        chunks.append(len(test.chunks))
    assert all(None not in found.values() for found in alone)
    assert chunks[-1] == 1 and all(count % 2 and count > 2 for count in chunks[:-1])  # shared out unevenly
    together(2, _evaluated, tmp_path)
    for index, expected in enumerate(alone):
        for rank in range(2):
            found = json.loads((tmp_path / f"found-{index}-{rank}").read_text())
            assert found == pytest.approx(expected, rel=1e-13)


def written(home: Path, target: Target, rows: int = 2500) -> tuple[pa.Table, np.ndarray, np.ndarray, dict[str, float | None]]:
    """predictions.parquet, the outputs it ought to tell, the targets, and the metrics."""
    data, model = made(home, target, test=rows)
    network, test = trained_network(model, data), Split.open(data, "test")
    metrics = write_predictions(home / "predictions.parquet", network, test, CPU)
    assert metrics == evaluate(network, test, CPU)
    table = pq.read_table(home / "predictions.parquet")
    assert table["row"].to_pylist() == list(range(rows))
    assert table["loss"].to_numpy().mean() == pytest.approx(metrics["loss"], rel=1e-6)
    return table, torchs(network, test), test.read()[target.name], metrics


@pytest.mark.parametrize("target", [TWO, THREE, TWO.model_copy(update={"positive": "no"})], ids=["two", "three", "the first is positive"])
def test_predictions_of_classes(target: Target, tmp_path: Path) -> None:
    table, outputs, wanted, metrics = written(tmp_path, target)
    expected = probabilities(outputs, target)
    assert table.column_names == ["row", "label", "predicted", "probability", *(["score"] if target.size == 2 else []), "loss"]
    np.testing.assert_array_equal(table["label"], wanted)
    np.testing.assert_array_equal(table["predicted"], expected.argmax(axis=1))
    np.testing.assert_allclose(table["probability"], expected.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(table["loss"], -np.log(expected[np.arange(len(wanted)), wanted]), rtol=1e-6)
    if target.size == 2:
        positive = 0 if target.positive == "no" else 1
        np.testing.assert_allclose(table["score"], expected[:, positive], atol=1e-6)
        assert reference.roc_auc_score(wanted == positive, table["score"]) == pytest.approx(metrics["roc_auc"], rel=1e-12)
        f1 = reference.f1_score(wanted == positive, table["predicted"].to_numpy() == positive)
        assert f1 == pytest.approx(metrics["f1"], rel=1e-12)


def test_predictions_of_labels(tmp_path: Path) -> None:
    table, outputs, wanted, _ = written(tmp_path, LABELS)
    expected = probabilities(outputs, LABELS)
    assert table.column_names == ["row", "labels", "predicted", "probabilities", "loss"]
    assert table["labels"].to_pylist() == [np.flatnonzero(row).tolist() for row in wanted]
    assert table["predicted"].to_pylist() == [np.flatnonzero(row > 0.5).tolist() for row in expected]
    np.testing.assert_allclose(np.array(table["probabilities"].to_pylist()), expected, atol=1e-6)
    assert max(map(len, table["labels"].to_pylist())) > 1


@pytest.mark.parametrize("target", [NUMBER, PAIR], ids=["one", "two"])
def test_predictions_of_numbers_are_in_the_datas_units(target: Target, tmp_path: Path) -> None:
    table, outputs, wanted, _ = written(tmp_path, target)
    assert table.column_names == ["row", *(f"{kind}.{column}" for column in target.columns for kind in ("target", "predicted")), "loss"]
    for index, column in enumerate(target.columns):
        np.testing.assert_array_equal(table[f"target.{column}"], wanted[:, index])
        np.testing.assert_allclose(table[f"predicted.{column}"], outputs[:, index], rtol=1e-6)
    assert 500 < wanted.mean() < 1500


def test_an_accelerator_is_given_many_chunks_at_once_and_a_cpu_each_for_itself() -> None:
    """Of rows of 600 bytes 1,024 are a batch, of rows of 150 kB some hundred."""
    small, large = signature(NUMBERS, target=TWO), signature(image(224, 224, 3), target=TWO)
    for given, rows, batch in ((small, 300, 1024), (large, 64, 445)):
        chunks = tuple(RowGroup("a", index, index * rows, rows) for index in range(20))
        split = Split(given, chunks)
        assert [len(some) for some in module._groups(split, CPU, chunks)] == [1] * 20
        there = module._groups(split, torch.device("meta"), chunks)
        assert [chunk for some in there for chunk in some] == list(chunks)
        assert batch / 2 < len(there[0]) * rows <= batch
        assert module._calls(split, torch.device("meta"), chunks) == len(there)
