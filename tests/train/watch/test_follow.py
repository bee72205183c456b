"""What is said of training while it runs: progress, the time left, why nothing comes, and what a person should know. No Ray: files are
written as workers write them, and the clock is a number."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dlopt.artifact import write_atomically
from dlopt.part import Target
from dlopt.progress import WARNING
from dlopt.terminal import EVERY, LONGEST, Terminal, pause
from dlopt.train.job import Train
from dlopt.train.progress.follow import NewLines, ProgressReader, Status, _shown
from dlopt.train.progress.forecast import Forecast, clock, rounded
from dlopt.train.watch.metrics_log import HEALTH, NAME, SPEED, STARTS, MetricsWriter
from tests.sets import LABELS, NUMBER, TWO

ROWS, BATCH, EPOCHS, STEPS = 1000, 100, 4, 10
"""Of the training that is made up: 10 steps an epoch."""


class Files:
    """The files of a run, as worker 0 writes them."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def start(self, step: int = 0, workers: int = 2, damaged: tuple[str, ...] = ()) -> None:
        where = {"epoch": step // STEPS, "batch": step % STEPS, "step": step}
        self._write(STARTS, where | {"workers": workers, "hosts": ["a"] * workers, "damaged": list(damaged), "time": 0.0})

    def step(self, step: int, **changed: Any) -> None:
        line = {"step": step, "epoch": (step - 1) // STEPS + 1, "rows": step * BATCH, "loss": 1 / step, "rate": 0.1, "gradient_norm": 2.0}
        self._write(NAME, line | changed)

    def epoch(self, epoch: int, accuracy: float | None = 0.75) -> None:
        validation = None if accuracy is None else {"loss": 0.5, "accuracy": accuracy}
        train = {"loss": 0.25, "accuracy": 0.875}
        self._write(NAME, {"epoch": epoch, "step": epoch * STEPS, "train": train, "validation": validation, "seconds": random.random()})

    def speed(self, step: int, time: float, rows_per_second: float | None = 100.0, **changed: Any) -> None:
        line = {"step": step, "epoch": (step - 1) // STEPS + 1, "rows": step * BATCH, "time": time, "rows_per_second": rows_per_second}
        line |= {"step_seconds": 1.0, "data_wait": 0.25, "checkpoint_seconds": 0.5, "workers": 2, "slow": None}
        self._write(SPEED, line | changed)

    def health(self, step: int, **line: Any) -> None:
        self._write(HEALTH, {"epoch": (step - 1) // STEPS + 1, "step": step} | line)

    def back(self, step: int) -> None:
        """Another group of workers takes out what it will do again."""
        for name in (NAME, SPEED, HEALTH):
            MetricsWriter(self.out, step // STEPS, step, name).close()

    def _write(self, name: str, line: dict[str, Any]) -> None:
        with open(self.out / name, "a") as file:
            file.write(json.dumps(line) + "\n")


class Heard:
    """What a follower has said."""

    def __init__(self, out: Path, waiting: str | None = None) -> None:
        self.lines: list[tuple[float | None, str]] = []
        said = Status(EPOCHS, STEPS, "accuracy", Forecast(ROWS, EPOCHS), lambda: self.waiting)
        self.waiting = waiting
        self.follower = ProgressReader(out, said, lambda stage, share, text: self.lines.append((share, text)))

    def at(self, now: float) -> list[str]:
        """What is said at a second of the clock."""
        before = len(self.lines)
        self.follower.look(now)
        return [text.replace(WARNING, "! ") for _, text in self.lines[before:]]


def test_progress_in_words(tmp_path: Path) -> None:
    files, heard = Files(tmp_path), Heard(tmp_path)
    assert heard.at(0) == []
    files.start()
    assert heard.at(1) == ["2 workers set out"]
    files.step(1, loss=0.5)
    assert heard.at(2) == ["epoch 1/4  loss 0.5000"]
    assert heard.at(3) == []
    files.epoch(1)
    files.step(11, loss=None)
    assert heard.at(4) == ["epoch 2/4  validation accuracy 0.75"]
    files.epoch(2, accuracy=None)
    assert heard.at(5) == ["epoch 3/4"]
    for second in range(3):
        files.speed(21 + second, 100.0 + second)
        files.step(21 + second, loss=0.1234)
        said = heard.at(6.0 + second)
    assert said == ["epoch 3/4  loss 0.1234  100 rows/s  0:17 left"]
    files.epoch(4)
    assert heard.at(9)[0].startswith("epoch 4/4")
    assert [share for share, _ in heard.lines] == [0, 1 / 40, 11 / 40, 20 / 40, 21 / 40, 22 / 40, 23 / 40, 1]


@pytest.mark.parametrize(
    ("target", "monitor", "shown"),
    [(TWO, "loss", "accuracy"), (TWO, "roc_auc", "roc_auc"), (LABELS, "loss", "accuracy"), (NUMBER, "loss", "r2"), (NUMBER, "mae", "mae")],
)
def test_progress_shows_what_decides_or_else_what_says_most(target: Target, monitor: str, shown: str) -> None:
    assert _shown(Train.model_validate({"monitor": monitor}), target) == shown


# When nothing comes


def test_why_nothing_comes_is_said_where_it_is_known_and_else_for_how_long(tmp_path: Path) -> None:
    files, heard = Files(tmp_path), Heard(tmp_path, waiting="waiting for 2 CPUs: 1 of 4 is free")
    assert heard.at(0) == ["waiting for 2 CPUs: 1 of 4 is free"]
    assert heard.at(1) == []
    files.start(step=20)
    assert heard.at(2) == ["2 workers set out from step 20"]
    heard.waiting = None
    assert heard.at(11) == []
    assert heard.at(14) == ["2 workers set out from step 20, no step for 12 s"]
    files.step(21, loss=0.5)
    assert heard.at(15) == ["epoch 3/4  loss 0.5000"]
    assert heard.at(24) == []
    assert heard.at(57) == ["epoch 3/4  loss 0.5000  no step for 42 s"]
    assert heard.at(15 + 125) == ["epoch 3/4  loss 0.5000  no step for 2:05"]
    heard.waiting = "waiting for 2 CPUs: 1 of 4 is free"
    assert heard.at(141) == ["epoch 3/4  loss 0.5000  waiting for 2 CPUs: 1 of 4 is free"]


def test_slow_steps_are_given_their_time_and_the_end_of_an_epoch_is_no_missing_step(tmp_path: Path) -> None:
    files, heard = Files(tmp_path), Heard(tmp_path)
    files.start()
    files.speed(9, 0.0, step_seconds=20.0)
    assert heard.at(0) == ["epoch 1/4  100 rows/s"]
    assert heard.at(79) == []
    assert heard.at(81) == ["epoch 1/4  no step for 81 s"]
    files.speed(10, 90.0, step_seconds=0.5)
    heard.at(90)
    assert heard.at(101) == ["epoch 1/4  measuring for 11 s"]


# What a person should know


def test_lost_workers_and_resizes_are_a_line_each(tmp_path: Path) -> None:
    files, heard = Files(tmp_path), Heard(tmp_path)
    files.start(workers=2)
    files.step(15)
    assert heard.at(0) == ["epoch 2/4  loss 0.0667"]
    files.start(12, workers=2)
    assert heard.at(1) == [
        "! training goes on from step 12 with 2 workers",
        "2 workers set out from step 12",
    ]
    files.start(12, workers=1)
    assert heard.at(2)[0] == "! training goes on from step 12, now with 1 worker"
    files.start(14, workers=2)
    assert heard.at(3)[0] == "! training goes on from step 14, now with 2 workers"


def test_damaged_checkpoints_are_a_line_each(tmp_path: Path) -> None:
    files, heard = Files(tmp_path), Heard(tmp_path)
    files.start(3, damaged=("000002: model.safetensors is damaged", "000001: state.json is missing"))
    assert heard.at(0)[:2] == ["! 000002: model.safetensors is damaged", "! 000001: state.json is missing"]
    assert heard.at(1) == []


def test_checkpoints_that_are_left_out_are_told_of_once(tmp_path: Path) -> None:
    files, heard = Files(tmp_path), Heard(tmp_path)
    files.start()
    said: list[str] = []
    for second in range(4):
        files.speed(second + 1, second, skipped_checkpoints=max(0, second - 1), longest_checkpoint=61.7)
        said += [line for line in heard.at(second) if line.startswith("!")]
    assert len(said) == 1 and said[0].startswith("! a checkpoint takes 62 s to write, longer than the time between two: training goes on")


def test_a_slow_worker_is_told_once_and_again_only_after_it_has_recovered(tmp_path: Path) -> None:
    files, heard = Files(tmp_path), Heard(tmp_path)
    slow = {"rank": 1, "host": "b", "times": 2.345}
    files.start()
    said = []
    for second in range(100):
        found = slow if second in (3, 4, 5, 20, 80, 81) else {"rank": 0, "host": "a", "times": 3.0} if second == 6 else None
        files.speed(second + 1, second, slow=found)
        said += [(second, text) for text in heard.at(second) if text.startswith("!")]
    one = "! worker 1 on b is slow: its steps take 2.3 times as long as others'"
    assert said == [(3, one), (6, one.replace("1 on b", "0 on a").replace("2.3", "3.0")), (80, one)]


def test_what_the_health_of_layers_says_is_said_once_also_after_a_restart(tmp_path: Path) -> None:
    files, heard = Files(tmp_path), Heard(tmp_path)
    finding = {"step": 5, "kind": "dead", "layers": ["0"], "says": "layer 0 is dead"}
    files.start()
    files.health(5, findings=[finding])
    assert heard.at(0)[0] == "! layer 0 is dead"
    files.back(2)
    files.start(2)
    files.health(5, findings=[finding])
    assert [text for text in heard.at(1) if "dead" in text] == []
    files.health(7, findings=[finding | {"says": "layer 1 is dead"}])
    assert heard.at(2)[0] == "! layer 1 is dead"


def test_a_roll_back_is_a_line_and_training_goes_on_from_there(tmp_path: Path) -> None:
    files, heard = Files(tmp_path), Heard(tmp_path)
    files.start()
    files.step(38)
    heard.at(0)
    files.back(10)
    files.health(10, rollback="epoch 4, step 38: the loss is not finite", rate=0.05)
    assert heard.at(1)[0] == "! went back to step 10 and on at a rate of 0.05: epoch 4, step 38: the loss is not finite"
    files.step(11, loss=0.75)
    assert heard.at(2) == ["epoch 2/4  loss 0.7500"]
    assert heard.lines[-1][0] == 11 / 40


def test_what_an_earlier_process_has_gone_through_is_not_said_again(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.start(damaged=("000001 is damaged",))
    files.start(5)
    files.speed(6, 1.0, slow={"rank": 0, "host": "a", "times": 9.0})
    files.step(19)
    files.health(5, findings=[{"says": "layer 0 is dead"}])
    heard = Heard(tmp_path)
    assert heard.at(0) == []
    files.start(18)
    assert heard.at(1) == ["2 workers set out from step 18"]
    files.start(18)
    assert heard.at(2) == ["! training goes on from step 18 with 2 workers"]


# Lines, each once


def test_lines_that_a_restart_writes_again_are_given_once(tmp_path: Path) -> None:
    files, lines = Files(tmp_path), NewLines(tmp_path / NAME)
    for step in (1, 2, 3):
        files.step(step)
    files.epoch(1)
    assert [line["step"] for line in lines.new()[1]] == [1, 2, 3, 10]
    files.back(2)
    assert lines.new() == (None, [])
    files.step(3, loss=1 / 3 + 1e-9)  # more workers add up in another order
    assert lines.new() == (None, [])
    files.epoch(1)  # and has taken other seconds
    files.step(11)
    back, new = lines.new()
    assert (back, [line["step"] for line in new]) == (None, [11])


def test_lines_of_another_way_come_with_the_step_that_they_begin_at(tmp_path: Path) -> None:
    files, lines = Files(tmp_path), NewLines(tmp_path / NAME)
    for step in (9, 10):
        files.step(step)
    files.epoch(1, accuracy=0.5)
    files.step(11)
    lines.new()
    files.back(9)
    files.step(10)
    files.epoch(1, accuracy=0.25)
    files.step(11)
    back, new = lines.new()
    assert back == 10
    assert [("loss" in line, line["step"]) for line in new] == [(True, 10), (False, 10), (True, 11)]  # all that is of step 10
    assert lines.new() == (None, [])


# Time left


def test_the_time_left_knows_of_the_ends_of_epochs_and_counts_down() -> None:
    """6 epochs of 1000 rows at 10 rows a second, and 20 s to measure after each: 720 s in all."""
    forecast, errors = Forecast(ROWS, 6), {}
    for second, rows in _course(6, 10, 20):
        if rows is not None:
            forecast.add({"time": 5000 + second, "rows": rows, "epoch": (rows - 1) // ROWS + 1, "rows_per_second": 10.0}, second)
        left = forecast.left(second)
        if left is not None:
            errors[second] = left - (720 - second)
    assert min(errors) == 3
    assert errors[119] == pytest.approx(-6 * 20)  # nobody can know of the measuring before it
    assert all(abs(errors[second]) < 1 for second in range(170, 721))
    assert forecast.speed() == 10


def _course(epochs: int, rate: int, measuring: int) -> Iterator[tuple[int, int | None]]:
    """(second, rows so far) once a second; None while the validation split is measured."""
    for second in range(1, epochs * (ROWS // rate + measuring) + 1):
        epoch, within = divmod(second - 1, ROWS // rate + measuring)
        yield second, epoch * ROWS + (within + 1) * rate if within < ROWS // rate else None


def test_epochs_of_less_than_a_second_are_counted_as_a_whole() -> None:
    forecast = Forecast(1000, 100)
    for second in range(30):
        forecast.add({"time": second, "rows": 2000 * second, "epoch": 2 * second + 1, "rows_per_second": 2000.0}, second)
    assert forecast.left(29) == pytest.approx(21, abs=0.01)


def test_the_time_left_does_not_jump_however_speed_varies() -> None:
    generator = random.Random(3)
    forecast, rows, last = Forecast(100_000, 10), 0, None
    for second in range(300):
        speed = generator.choice([50, 150]) * (1 if second < 150 else 2)  # as if a worker had come
        rows += speed
        forecast.add({"time": second, "rows": rows, "epoch": rows // 100_000 + 1, "rows_per_second": speed}, second)
        left = forecast.left(second)
        if second > 60 and last is not None and left is not None:
            assert abs(left / last - 1) < 0.02
        last = left
    assert last == pytest.approx((1_000_000 - rows) / 200, rel=0.1)


def test_another_group_of_workers_has_a_speed_of_its_own() -> None:
    forecast = Forecast(1000, 100)
    for second in range(50):
        forecast.add({"time": second, "rows": 100 * second, "epoch": second // 10 + 1, "rows_per_second": 100}, second)
    assert forecast.left(49) == pytest.approx(951, abs=1)
    forecast.restart()
    assert forecast.left(50) is None and forecast.speed() is None
    for second in range(50, 60):
        forecast.add({"time": second, "rows": 5000 + 10 * second, "epoch": 6, "rows_per_second": 10}, second)
    assert forecast.left(59) == pytest.approx((100_000 - 5590) / 10, rel=0.01)


def test_times_and_speeds_are_written_as_people_do() -> None:
    assert [clock(seconds) for seconds in (0.4, 59.6, 245, 3753, 86400 + 3 * 3600 + 245)] == [
        "0:00",
        "1:00",
        "4:05",
        "1:02:33",
        "1 d 3:04:05",
    ]
    assert [rounded(rows) for rows in (0.4517, 45.17, 451.7, 12345.6, 1234567)] == ["0.452", "45.2", "452", "12,300", "1,230,000"]


# A log


def test_a_log_of_hours_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert [pause(seconds) for seconds in (0, 250, 1000, 36000)] == [EVERY, EVERY, 20, LONGEST]
    terminal = Terminal("digits")
    for second in range(5):
        terminal.progress("fit", 0.5, f"epoch 1/4  {second} left")
    for _ in range(5):
        terminal.progress("report", None, "drawing")
    terminal.progress("report", 0.5, WARNING + "look out")
    assert capsys.readouterr().err.splitlines() == [
        "digits: fit  50%  epoch 1/4  0 left",
        "digits: report  drawing",
        "! digits: report  warning: look out",
    ]


def test_half_a_line_is_waited_for(tmp_path: Path) -> None:
    lines = NewLines(tmp_path / NAME)
    write_atomically(tmp_path / NAME, '{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert lines.new() == (None, [{"step": 1, "loss": 0.5}])
    with open(tmp_path / NAME, "a") as file:
        file.write('ss": 0.25}\n')
    assert lines.new() == (None, [{"step": 2, "loss": 0.25}])


def test_what_a_log_has_left_out_is_written_once_it_may_if_it_still_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines are some time apart; the last thing that is said before a long silence is said a moment after another one."""
    terminal = Terminal("digits")
    terminal.progress("fit", 0.0, "starting 2 workers")
    said = Status(EPOCHS, STEPS, "accuracy", Forecast(ROWS, EPOCHS), lambda: "waiting for 2 CPUs: 1 of 4 is free")
    follower = ProgressReader(tmp_path, said, terminal.progress)
    for second in (1.0, 2.0):
        follower.look(second)
        follower.again()
    monkeypatch.setattr("dlopt.terminal.EVERY", 0.0)
    follower.look(6.0)
    follower.again()
    follower.again()
    assert capsys.readouterr().err.splitlines() == [
        "digits: fit   0%  starting 2 workers",
        "digits: fit   0%  waiting for 2 CPUs: 1 of 4 is free",
    ]
