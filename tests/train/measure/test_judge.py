"""Which epoch is the best one where validation is not always finite, what is kept, and what is said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from torch import nn

from dlopt.artifact import Stage, once
from dlopt.data.prepared import as_table, write_part
from dlopt.train.checkpoint.state import Record, TrainingState
from dlopt.train.job import EarlyStopping, Train
from dlopt.train.measure.judge import judge
from tests.train.loop.test_worker import SIGNATURE, Rows, section, work, write
from tests.train.watch.test_follow import STEPS, Files, Heard


def judged(losses: Sequence[float | None], accuracies: Sequence[float] | None = None, **train: Any) -> tuple[TrainingState, list[float]]:
    """The state after epochs with such losses of the validation split, None where they were not finite, and the weight kept after each;
    the weight of an epoch is its number."""
    model = nn.Linear(1, 1, bias=False)
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=1.0), {}, Record())
    settings = Train(epochs=len(losses), batch_size=1, **train)
    kept = []
    for epoch, loss in enumerate(losses, start=1):
        nn.init.constant_(model.weight, epoch)
        state.record.epoch = epoch
        judge(state, settings, {"loss": loss, "accuracy": accuracies[epoch - 1] if accuracies else 0.5})
        kept.append(float(state.best["weight"]))
    return state, kept


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([None, 0.5, 0.4, None, 0.6], 3),
        ([None, None, 0.9, 0.8], 4),
        ([0.5, None, 0.6], 1),
        ([0.5, None, 0.4, None], 3),
        ([None, None, None], 3),
    ],
)
def test_the_best_epoch_is_one_whose_loss_is_finite_and_else_the_newest(losses: list[float | None], best: int) -> None:
    state, kept = judged(losses)
    assert (state.record.best_epoch, kept[-1]) == (best, best)
    finite = [loss for loss in losses if loss is not None]
    assert state.record.best_value == (min(finite) if finite else None)


def test_a_finite_accuracy_of_outputs_that_are_not_finite_is_no_best_one() -> None:
    state, kept = judged([0.7, None, 0.6], [0.5, 0.9, 0.6], monitor="accuracy")
    assert (state.record.best_epoch, state.record.best_value, kept) == (3, -0.6, [1, 1, 3])


def test_early_stopping_waits_its_patience_for_a_finite_loss() -> None:
    patience = EarlyStopping(patience=3)
    assert judged([None] * 3, early_stopping=patience)[0].record.stopped is False
    assert judged([None] * 4, early_stopping=patience)[0].record.stopped is True
    assert judged([None, None, 0.5, None, 0.6], early_stopping=patience)[0].record.stopped is False
    assert judged([0.5, None, None, None], early_stopping=patience)[0].record.stopped is True


def spoilt(given: Rows, out: Path) -> dict[str, Any]:
    """As in test_worker, with a row in validation that no float32 network survives."""
    write(given, out)
    values = np.full((1, 4), 3e38, np.float32)
    write_part(
        as_table(SIGNATURE, {"numbers": values, "label": np.ones(1, np.int64)}), SIGNATURE, out / "validation" / "part-00001.parquet"
    )
    return {}


def test_training_whose_validation_is_never_finite_keeps_its_newest_weights(tmp_path: Path) -> None:
    spoilt_data = once(Stage("data", spoilt), Rows(validation=20), tmp_path)
    info = work(section(epochs=3), spoilt_data, tmp_path / "out")
    assert info["metrics"]["validation"]["loss"] is None and info["best_epoch"] == 3
    without = once(Stage("data", write), Rows(validation=0), tmp_path)
    work(section(epochs=3), without, tmp_path / "plain")
    found, expected = (load_tensors((tmp_path / name / "weights.safetensors").read_bytes()) for name in ("out", "plain"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_validation_that_is_not_finite_is_said_in_one_line_each_time_that_it_begins(tmp_path: Path) -> None:
    files, heard = Files(tmp_path), Heard(tmp_path)
    files.start()

    def epoch(number: int, loss: float | None) -> list[str]:
        validation = {"loss": loss, "accuracy": 0.5}
        train = {"loss": 0.25, "accuracy": 0.875}
        files._write("metrics.jsonl", {"epoch": number, "step": number * STEPS, "train": train, "validation": validation, "seconds": 1.0})
        return [text for text in heard.at(float(number)) if text.startswith("! ")]

    said = [epoch(number, loss) for number, loss in enumerate([None, None, 0.5, None], start=1)]
    assert [len(lines) for lines in said] == [1, 0, 0, 1]
    assert said[0][0].startswith("! epoch 1: the loss of the validation split is not finite") and said[3][0].startswith("! epoch 4:")
