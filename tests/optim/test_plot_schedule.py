"""The plot of a job's schedule, in letters and in files; and how many rows there are to train on, before anything is prepared."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dlopt.data import count
from dlopt.data.kinds import CategoryTarget, NumberInput
from dlopt.data.section import Data
from dlopt.data.sources import Arrow, Csv, Images, ImageTable, JsonLines, Parquet, Sample
from dlopt.data.table.split import Fold, GivenSplit, RandomSplit
from dlopt.models import Mlp
from dlopt.optim.optimizers import Adam
from dlopt.optim.schedules import Chain, Constant, Cosine, OneCycle, Plateau, ScaleLr, Scheduled, Span, StepDecay
from dlopt.part import DloptError
from dlopt.report.schedule import HEIGHT, POINTS, WIDTH, Curve, curve_of, text, write
from dlopt.train.job import Fit, Train


def curve(schedule: Scheduled, epochs: int = 4, rows: int = 1000, **train: Any) -> Curve:
    given = {"optimizer": Adam(lr=0.02), "batch_size": 100, "epochs": epochs} | train
    return curve_of(Fit(seed=0, model=Mlp(), augment=(), train=Train(schedule=schedule, **given)), rows)


def test_the_curve_has_the_rate_of_every_step() -> None:
    found = curve(Cosine(warmup=Span(epochs=1)))
    assert found.steps.tolist() == list(range(40))
    assert found.rates[:11] == pytest.approx([0.002 * step for step in range(11)])
    assert found.rates[-1] == pytest.approx(0.02 * Cosine().factor(29, found.course._replace(steps=30)))
    assert (found.what, found.says) == ("learning rate", "")


def test_a_long_run_is_drawn_by_some_of_its_steps_the_first_and_the_last_among_them() -> None:
    found = curve(Cosine(), epochs=20, rows=100_000)
    assert len(found.steps) == POINTS
    assert (found.steps[0], found.steps[-1]) == (0, 19_999)


def test_the_rate_is_the_scaled_one_and_a_share_where_it_is_yet_to_be_found() -> None:
    assert curve(Constant(), scale_lr=ScaleLr(base=50)).rates[0] == pytest.approx(0.04)
    found = curve(Constant(level=0.5), optimizer=Adam(lr="auto"))
    assert (found.rates[0], found.what) == (0.5, "share of the peak rate")
    assert found.says == "The peak rate is found by a range test when training begins."


def test_a_plateau_is_said_to_be_unknown_be_it_in_a_chain() -> None:
    chain = Chain(parts=(Plateau(length=Span(epochs=2)), Cosine()))
    assert curve(chain).says.startswith("Falls of a plateau depend on the validation split")


def test_a_schedule_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DloptError, match=r"train\.schedule\.warmup: 50 steps is more than the 40 steps"):
        curve(Cosine(warmup=Span(steps=50)))


def columns(plot: str) -> np.ndarray:
    """The canvas of a plot in letters, bool (lines from the bottom up, columns)."""
    rows = [line.partition("|")[2].ljust(WIDTH) for line in plot.splitlines()[1 : 1 + HEIGHT]]
    return np.array([[letter == "*" for letter in row] for row in rows])[::-1]


def test_the_plot_in_letters_rises_and_falls_as_the_rate_does() -> None:
    found = curve(Cosine(warmup=Span(epochs=1)), rows=10_000)
    plot = text(found)
    canvas = columns(plot)
    assert canvas.any(axis=0).all()  # no column is empty
    middle = (canvas * np.arange(HEIGHT)[:, None]).sum(axis=0) / canvas.sum(axis=0) / (HEIGHT - 1) * 0.02
    rates = found.rates[(np.arange(WIDTH) + 0.5).astype(int) * len(found.rates) // WIDTH]
    assert np.abs(middle - rates).max() < 0.02 * 1.5 / (HEIGHT - 1)
    first, *_, ruler, names = plot.splitlines()
    assert first.strip() == "learning rate" and "0.02 |" in plot
    assert names.split() == ["epoch", "0", "1", "2", "3", "4"]
    assert [names.index(number) for number in "01234"] == [at for at, letter in enumerate(ruler) if letter == "+"]


def test_a_fall_at_once_is_a_line_down_and_a_run_of_few_steps_leaves_no_gap() -> None:
    canvas = columns(text(curve(StepDecay(step_size=Span(epochs=2), decay=0.1), rows=100)))
    assert canvas.any(axis=0).all()
    assert (canvas.sum(axis=0) > HEIGHT / 2).sum() == 1


@pytest.mark.parametrize(("epochs", "named"), [(1, 2), (13, 7), (120, 13), (5000, 11)])
def test_epochs_are_named_as_long_as_there_is_room(epochs: int, named: int) -> None:
    names = text(curve(OneCycle(), epochs=epochs)).splitlines()[-1].split()[1:]
    assert len(names) == named
    assert len(set(np.diff([int(name) for name in names]))) == 1


def test_a_figure_is_written_by_its_ending_with_epochs_steps_and_the_note(tmp_path: Path) -> None:
    found = curve(Chain(parts=(Plateau(length=Span(epochs=2)), Cosine())), rows=5000)
    for name in ("a.svg", "b.png", "c.html"):
        write(tmp_path / "new" / name, found, "R & D: chain")
    svg = ET.parse(tmp_path / "new" / "a.svg").getroot()
    words = {"".join(element.itertext()).strip() for element in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"R & D: chain", "epoch", "step", "learning rate", found.says} <= words
    assert {"0", "1", "2", "3", "4"} <= words and words & {"200", "250"}
    assert Image.open(tmp_path / "new" / "b.png").width > 600
    page = (tmp_path / "new" / "c.html").read_text()
    assert "<title>R &amp; D: chain</title>" in page and page.count("<svg") == 1


@pytest.mark.parametrize("ending", ["svg", "png", "html"])
def test_the_same_schedule_gives_the_same_file(tmp_path: Path, ending: str) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.{ending}", curve(Cosine()), "job")
    assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()
    write(tmp_path / f"c.{ending}", curve(Cosine(floor=0.5)), "job")
    assert (tmp_path / f"a.{ending}").read_bytes() != (tmp_path / f"c.{ending}").read_bytes()


def test_another_ending_and_a_place_that_cannot_be_written_to_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DloptError, match=r"--output: plot\.gif: the ending must be one of \.svg, \.png, \.html"):
        write(Path("plot.gif"), curve(Cosine()), "job")
    (tmp_path / "file").touch()
    with pytest.raises(DloptError, match=r"--output: cannot write to"):
        write(tmp_path / "file" / "plot.svg", curve(Cosine()), "job")


def table(rows: int) -> pa.Table:
    return pa.table({"a": list(range(rows)), "c": ["yn"[row % 2] for row in range(rows)]})


def section(source: Any, **more: Any) -> Data:
    return Data(source=source, inputs=(NumberInput(columns=("a",)),), target=CategoryTarget(column="c"), **more)


def test_rows_of_files_are_counted(tmp_path: Path) -> None:
    for part in range(2):
        pq.write_table(table(300), tmp_path / f"{part}.parquet", row_group_size=100)
    pyarrow.csv.write_csv(table(250), tmp_path / "rows.csv")
    pyarrow.feather.write_feather(table(70), tmp_path / "rows.feather")
    (tmp_path / "rows.jsonl").write_text('{"a": 1, "c": "y"}\n' * 30)
    assert count.source_rows(Parquet(path=str(tmp_path / "*.parquet"))) == 600
    assert count.source_rows(Csv(path=str(tmp_path / "rows.csv"))) == 250
    assert count.source_rows(Arrow(path=str(tmp_path / "rows.feather"))) == 70
    assert count.source_rows(JsonLines(path=str(tmp_path / "rows.jsonl"))) == 30


def test_images_are_counted_by_their_files_or_by_the_table_that_lists_them(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "images" / label / f"{number}.png").touch()
    pyarrow.csv.write_csv(pa.table({"image": ["a/0.png"] * 5}), tmp_path / "list.csv")
    assert count.source_rows(Images(path=str(tmp_path / "images"))) == 6
    listed = ImageTable(table=Csv(path=str(tmp_path / "list.csv")), folder=str(tmp_path / "images"))
    assert count.source_rows(listed) == 5


def test_a_sample_is_counted(mnist: None) -> None:
    assert count.source_rows(Sample()) == 5000


def test_files_that_are_too_large_to_be_read_for_a_count_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow.csv.write_csv(table(250), tmp_path / "rows.csv")
    monkeypatch.setattr(count, "MOST_BYTES", 1000)
    assert count.training_rows(section(Csv(path=str(tmp_path / "rows.csv")))) is None


def test_the_training_split_has_its_share_of_the_rows(tmp_path: Path) -> None:
    pyarrow.csv.write_csv(table(250), tmp_path / "rows.csv")
    source = Csv(path=str(tmp_path / "rows.csv"))
    assert count.training_rows(section(source)) == 200
    split = RandomSplit(train=0.5, validation=0.3, test=0.2)
    assert count.training_rows(section(source, split=split)) == 125
    assert count.training_rows(section(source, split=split, fold=Fold(index=1, of=4))) == 150
    assert count.training_rows(section(source, split=GivenSplit(column="a"))) is None
