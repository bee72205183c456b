"""A network over a split: whatever workers share it out, whatever the kind of target, the metrics and predictions are of its rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as reference
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dlopt.artifact import Artifact
from dlopt.data.prepared import Split
from dlopt.export.onnx import trained_network
from dlopt.models import Mlp, Network
from dlopt.part import Target
from dlopt.train.evaluate import evaluate, predict, write_predictions
from tests.sets import CATEGORIES, HASHED, LABELS, NUMBER, NUMBERS, PAIR, TEXT, THREE, TWO, prepared, signature, trained

CPU = torch.device("cpu")
TARGETS = pytest.mark.parametrize("target", [TWO, THREE, LABELS, NUMBER, PAIR], ids=lambda target: target.name)


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


@TARGETS
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


def _evaluated(rank: int, world: int, home: str, target: Target) -> None:
    dist.init_process_group("gloo", init_method=f"file://{home}/rendezvous-{world}", rank=rank, world_size=world)
    data, model = made(Path(home), target, test=20000)
    found = evaluate(trained_network(model, data), Split.open(data, "test"), CPU, rank, world)
    torch.save(found, Path(home) / f"found-{world}-{rank}")
    dist.destroy_process_group()


@TARGETS
def test_metrics_are_the_same_however_many_workers_share_the_split_out(target: Target, tmp_path: Path) -> None:
    data, model = made(tmp_path, target, test=20000)
    test = Split.open(data, "test")
    assert 3 <= len(test.chunks) < 40
    alone = evaluate(trained_network(model, data), test, CPU)
    assert None not in alone.values()
    mp.spawn(_evaluated, args=(3, str(tmp_path), target), nprocs=3)
    for rank in range(3):
        assert torch.load(tmp_path / f"found-3-{rank}") == pytest.approx(alone, rel=1e-13)


def test_more_workers_than_chunks_give_the_same_metrics_too(tmp_path: Path) -> None:
    data, model = made(tmp_path, TWO, test=80)
    assert len(Split.open(data, "test").chunks) == 1
    alone = evaluate(trained_network(model, data), Split.open(data, "test"), CPU)
    _more(tmp_path)
    assert torch.load(tmp_path / "found-2-1") == pytest.approx(alone, rel=1e-13)


def _more(home: Path) -> None:
    mp.spawn(_evaluated_few, args=(2, str(home)), nprocs=2)


def _evaluated_few(rank: int, world: int, home: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{home}/rendezvous-{world}", rank=rank, world_size=world)
    data, model = made(Path(home), TWO, test=80)
    torch.save(evaluate(trained_network(model, data), Split.open(data, "test"), CPU, rank, world), Path(home) / f"found-{world}-{rank}")
    dist.destroy_process_group()


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
    np.testing.assert_allclose(table["loss"], -np.log(expected[np.arange(len(wanted)), wanted]), rtol=1e-4)
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
