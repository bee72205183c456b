"""What is shown of training while it runs."""

from __future__ import annotations

import pytest

from dlopt.part import Target
from dlopt.train.follow import _Seen, _shown
from dlopt.train.section import Train
from tests.sets import LABELS, NUMBER, TWO


def test_progress_in_words() -> None:
    seen = _Seen(3, "accuracy")
    seen.add([{"step": 1, "epoch": 1, "loss": 0.5}])
    assert str(seen) == "epoch 1/3  loss 0.5000"
    seen.add([{"step": 2, "epoch": 1, "train": {}, "validation": {"accuracy": 0.75}}, {"step": 3, "epoch": 2, "loss": None}])
    assert (seen.step, str(seen)) == (3, "epoch 2/3  validation accuracy 0.75")
    seen.add([{"step": 4, "epoch": 2, "train": {}, "validation": {"accuracy": None}}])
    assert str(seen) == "epoch 3/3"
    seen.add([{"step": 6, "epoch": 3, "train": {}, "validation": None}])
    assert str(seen) == "epoch 3/3"


@pytest.mark.parametrize(
    ("target", "monitor", "shown"),
    [(TWO, "loss", "accuracy"), (TWO, "roc_auc", "roc_auc"), (LABELS, "loss", "accuracy"), (NUMBER, "loss", "r2"), (NUMBER, "mae", "mae")],
)
def test_progress_shows_what_decides_or_else_what_says_most(target: Target, monitor: str, shown: str) -> None:
    assert _shown(Train.model_validate({"monitor": monitor}), target) == shown
