"""metrics.jsonl is read while it is written, cut where a writer was killed, and holds no line of an epoch that was undone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dlopt.train.watch.metrics_log import NAME, MetricsReader, MetricsWriter, read


def test_lines_come_back_as_they_were_written(tmp_path: Path) -> None:
    log = MetricsWriter(tmp_path, 0, 0)
    log.write(epoch=1, step=10, loss=0.1 + 0.2)
    log.write(epoch=1, train={"loss": 0.5}, validation=None)
    log.flush()
    expected = [{"epoch": 1, "step": 10, "loss": 0.1 + 0.2}, {"epoch": 1, "train": {"loss": 0.5}, "validation": None}]
    assert list(read(tmp_path / NAME)) == expected
    log.close()
    assert list(read(tmp_path / NAME)) == expected


def test_there_are_no_lines_where_there_is_no_file(tmp_path: Path) -> None:
    assert list(read(tmp_path / NAME)) == []


@pytest.mark.parametrize("half", [b'{"epoch": 2, "lo', b"{", b'{"epoch": 2, "name": "\xc3', b"\0\0\0\0"])
def test_half_a_line_at_the_end_is_not_there_and_the_next_writer_takes_it_out(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / NAME
    path.write_bytes(b'{"step": 1}\n' + half)
    assert list(read(path)) == [{"step": 1}]
    log = MetricsWriter(tmp_path, 1, 1)
    log.write(step=2)
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_lines_of_what_is_trained_again_are_taken_out(tmp_path: Path) -> None:
    """Two steps an epoch; a checkpoint after step 4 may be of before the end of epoch 2, or of after it."""
    ends = [{"step": 2 * epoch, "epoch": epoch, "train": {}} for epoch in (1, 2)]
    steps = [{"step": step, "epoch": (step + 1) // 2} for step in range(1, 6)]
    written = [*steps[:2], ends[0], *steps[2:4], ends[1], steps[4]]
    for position, kept in {(2, 4): written[:6], (1, 4): written[:5], (1, 3): written[:4], (1, 2): written[:3], (0, 2): steps[:2]}.items():
        log = MetricsWriter(tmp_path, 9, 9)
        log.undo(0, 0)
        for line in written:
            log.write(**line)
        log.close()
        log = MetricsWriter(tmp_path, *position)
        log.write(step=9, again=True)
        log.close()
        assert list(read(tmp_path / NAME)) == [*kept, {"step": 9, "again": True}]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    log = MetricsWriter(tmp_path, 0, 0)
    log.write(epoch=1, loss=float("nan"), train={"loss": float("inf"), "accuracy": 0.5})
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / NAME).read_text(), parse_constant=refuse)
    assert line == {"epoch": 1, "loss": None, "train": {"loss": None, "accuracy": 0.5}}


def test_a_tail_reads_each_line_once_and_all_again_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / NAME
    tail = MetricsReader(path)
    assert tail.new() == []
    log = MetricsWriter(tmp_path, 0, 0)
    log.write(epoch=1, step=1)
    log.flush()
    assert tail.new() == [{"epoch": 1, "step": 1}]
    with open(path, "a") as file:
        file.write('{"epoch": 2, "st')
    assert tail.new() == []
    with open(path, "a") as file:
        file.write('ep": 2}\n')
    assert tail.new() == [{"epoch": 2, "step": 2}]
    log.close()
    MetricsWriter(tmp_path, 1, 1).close()
    assert tail.new() == [{"epoch": 1, "step": 1}]
