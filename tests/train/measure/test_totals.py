"""An epoch's losses add up to the same bits wherever the epoch was interrupted, and over workers to what they are together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dlopt.train.checkpoint.state import Record
from dlopt.train.loop.steps import Step
from dlopt.train.measure.totals import Totals
from tests.processes import together

ROWS = [7, 7, 7, 3] * 600
"""More steps than are added up at a time."""


def steps(seed: int, classes: bool = True) -> list[Step]:
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(len(ROWS), generator=generator)
    return [Step(loss, torch.tensor(place % 5) if classes else None, 1.0, 1.0, True) for place, loss in enumerate(losses)]


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("cuts", [[], [1], [999, 1000, 1001, 2399], list(range(1, len(ROWS)))], ids=len)
def test_where_an_epoch_is_cut_changes_no_bit(cuts: list[int], classes: bool) -> None:
    whole, found = Record(), Record()
    for record, places in ((whole, []), (found, cuts)):
        totals = Totals(1)
        for place, (step, rows) in enumerate(zip(steps(1, classes), ROWS, strict=True), start=1):
            totals.add(step, rows, record)
            if place in places:
                totals.settle(record)
                totals = Totals(1)
        totals.settle(record)
    assert found.sums == whole.sums
    exact = sum(step.loss.double().item() * rows for step, rows in zip(steps(1), ROWS, strict=True))
    assert found.sums[0] == pytest.approx(exact, rel=1e-12)
    assert found.sums[1:] == ([sum(place % 5 for place in range(len(ROWS)))] if classes else [])


def test_what_was_forgotten_does_not_count() -> None:
    totals, record = Totals(1), Record(sums=[2.0, 1.0])
    totals.add(steps(1)[0], 7, record)
    totals.forget()
    totals.settle(record)
    assert record.sums == [2.0, 1.0]


def _add(rank: int, world: int, folder: Path) -> None:
    totals, record = Totals(2), Record()
    for step, rows in zip(steps(rank), ROWS, strict=True):
        totals.add(step, rows, record)
    totals.settle(record)
    Path(folder, str(rank)).write_text(json.dumps(record.sums))


def test_all_workers_know_the_sum_of_all(tmp_path: Path) -> None:
    together(2, _add, tmp_path)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()
    sums = [(a.loss.double() + b.loss.double()).item() * rows for a, b, rows in zip(steps(0), steps(1), ROWS, strict=True)]
    assert json.loads((tmp_path / "0").read_text()) == pytest.approx([sum(sums), 2 * sum(place % 5 for place in range(len(ROWS)))])
