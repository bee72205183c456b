"""The report's page, from artifacts made by hand: its figures, that it stands alone, and that a browser draws it."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dlopt.artifact import Artifact, Stage, once
from dlopt.data.augment import RandomCrop
from dlopt.data.prepared import Rows, Split, as_table, write_part
from dlopt.data.sources import Sample
from dlopt.models.mlp import Mlp
from dlopt.part import DloptError, Feature, Part, Signature, Target
from dlopt.report import Samples, page, plots
from dlopt.report.samples import samples
from dlopt.train.job import Fit, Train
from tests.cases import few
from tests.conftest import program

IMAGE = Feature(name="image", kind="image", dtype="uint8", shape=(28, 28, 1), columns=("image",))
NUMBERS = Feature(name="numbers", kind="number", dtype="float32", shape=(2,), columns=("month", "<i>distance</i>"))
DIGITS = Target(name="label", labels=tuple(range(10)))


class Made(Part):
    """Makes the digest of a made-up artifact its own."""

    what: str = ""


def make(home: Path, stage: str, info: dict[str, Any], files: dict[str, bytes], section: Part | None = None) -> Artifact:
    """A sealed artifact of these files."""

    def fill(_: Part, out: Path) -> dict[str, Any]:
        for name, content in files.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
        return info

    return once(Stage(stage, fill), section or Made(), home)


def make_data(
    home: Path, signature: Signature, splits: dict[str, Rows], bad_reasons: dict[str, int] | None = None, profile: Any = None, **info: Any
) -> Artifact:
    """A data artifact as `prepare` leaves it, its splits of these rows, each in two files."""
    target, labels = signature.target, {}
    files = {"signature.json": signature.model_dump_json().encode()}
    if profile:
        files["profile.json"] = json.dumps(profile).encode()
    for split, rows in splits.items():
        found = rows[target.name]
        if target.labels:
            counts = np.bincount(found, minlength=target.size) if target.kind == "category" else found.sum(axis=0, dtype=int)
            labels[split] = {str(label): rows for label, rows in zip(target.labels, counts.tolist(), strict=True) if rows}
        for number, part in enumerate(np.array_split(np.arange(len(found)), 2)):
            path = home / "part.parquet"
            write_part(as_table(signature, {name: values[part] for name, values in rows.items()}), signature, path)
            files[f"{split}/part-{number:05d}.parquet"] = path.read_bytes()
    bad_reasons = bad_reasons or {}
    counts = {name: len(splits.get(name, {target.name: ()})[target.name]) for name in ("train", "validation", "test")}
    bad = sum(bad_reasons.values())
    counts = {"read": sum(counts.values()) + 4 + bad, "bad": bad, "dropped": 4, "duplicates": 3} | counts
    seconds = {"decode": 1.25, "write": 2.5}
    info = {"cleaning": [], "left_out": [], "warnings": []} | info
    info |= {"counts": counts, "bad_reasons": bad_reasons, "labels": labels, "seconds": seconds}
    return make(home, "data", info, files)


def fit_of(**train: Any) -> Fit:
    return Fit(seed=7, model=Mlp(), augment=(RandomCrop(padding=2),), train=Train(**train))


def make_model(
    home: Path,
    signature: Signature,
    metrics: dict[str, dict[str, Any]],
    lines: list[dict[str, Any]],
    predictions: dict[str, Any] | None = None,
    best_epoch: int = 1,
    fit: Fit | None = None,
) -> Artifact:
    """A model artifact as `fit` leaves it, apart from the weights."""
    files = {
        "signature.json": signature.model_dump_json().encode(),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode(),
    }
    if predictions:
        path = home / "predictions.parquet"
        types = {"row": pa.int64(), "label": pa.int64(), "labels": pa.list_(pa.int64())}
        types["predicted"] = pa.list_(pa.int64()) if "labels" in predictions else pa.int64()
        pq.write_table(pa.table({name: pa.array(found, types.get(name, pa.float32())) for name, found in predictions.items()}), path)
        files[path.name] = path.read_bytes()
    epochs = max(line["epoch"] for line in lines)
    info = {"metrics": metrics, "best_epoch": best_epoch, "epochs": epochs, "steps": 62 * epochs, "stopped": "finished", "restarts": 1}
    info |= {"seconds": {"start": 0.5, "train": 9.75, "evaluate": 0.25}, "rows_per_second": 41234.5, "workers": 1, "feed": "resident"}
    return make(home, "model", info, files, fit or fit_of())


def epoch_line(epoch: int, loss: float | None = 0.5, validation: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"epoch": epoch, "step": 62 * epoch, "train": {"loss": loss, "accuracy": 0.75}, "validation": validation, "seconds": 0.5}


def step_line(step: int, loss: float | None = 0.5, norm: float | None = 1.0) -> dict[str, Any]:
    return {"step": step, "epoch": 1, "rows": 64 * step, "loss": loss, "rate": 0.001, "gradient_norm": norm}


class Read(HTMLParser):
    """What a browser would make of a page: its tables by id, texts, and everything that it refers to."""

    VOID = {"meta", "link", "img"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.tables: dict[str, list[list[str]]] = {}
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.now: list[list[str]] | None = None
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.elements.append((tag, found))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.now = self.tables.setdefault(found.get("id", f"table {len(self.tables)}"), [])
        if tag == "tr" and self.now is not None:
            self.now.append([])
        if tag in ("td", "th") and self.now is not None:
            self.now[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words += data.split()
        if self.now and self.now[-1] and {"td", "th"} & set(self.open):
            self.now[-1][-1] = (self.now[-1][-1] + " " + data.strip()).strip()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [found for name, found in self.elements if name == tag]

    @property
    def mistakes(self) -> list[int]:
        return [int(found["data-row"]) for _, found in self.elements if found.get("class") == "mistake"]


def pixels(source: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(base64.b64decode(source.partition("base64,")[2]))))


@dataclass(frozen=True)
class Run:
    """A made-up run, and the rows and predictions of its test split."""

    data: Artifact
    model: Artifact
    test: Rows
    predictions: dict[str, np.ndarray]
    exports: dict[str, Artifact] = field(default_factory=dict)
    samples: Samples | None = None
    job: str = "name: digits\n"

    def write(self, path: Path, folds: Any = None) -> Read:
        made = {"data": self.data, "model": self.model, "exports": self.exports, "samples": self.samples}
        page.write(path, name="digits", job_yaml=self.job, folds=folds, **made)
        return Read(path)


METRICS = {split: {"loss": 0.25, "accuracy": 0.9, "macro_f1": 0.875} for split in ("train", "validation", "test")}
LINES = [line for epoch in range(1, 4) for line in (step_line(62 * epoch), epoch_line(epoch, validation={"loss": 0.6, "accuracy": 0.7}))]


def predict(label: np.ndarray, wrong: dict[int, int], loss: dict[int, float], classes: int = 10) -> dict[str, np.ndarray]:
    """Predictions of which these rows are wrong by so many classes, with these losses (0.01 otherwise)."""
    predicted, losses = label.copy(), np.full(len(label), 0.01)
    for row, by in wrong.items():
        predicted[row] = (label[row] + by) % classes
    for row, value in loss.items():
        losses[row] = value
    found = {"row": np.arange(len(label)), "label": label, "predicted": predicted, "probability": np.exp(-losses), "loss": losses}
    return found | ({"score": np.where(predicted == 1, np.exp(-losses), 1 - np.exp(-losses))} if classes == 2 else {})


def noise(home: Path) -> Run:
    """Noise as images of ten classes: 600 to train on, 100 to validate, and 200 to test, of which 20 are wrong."""
    generator = np.random.default_rng(3)

    def rows(count: int) -> Rows:
        return {"image": generator.integers(0, 256, (count, 28, 28, 1), dtype=np.uint8), "label": generator.permutation(count) % 10}

    splits = {"train": rows(600), "validation": rows(100), "test": rows(200)}
    signature = Signature(inputs=(IMAGE,), target=DIGITS)
    data = make_data(home, signature, splits, {"image: no image": 4, "label: no label": 2})
    chosen = generator.choice(200, 20, replace=False).tolist()
    losses = dict(zip(chosen, generator.uniform(1, 5, 20), strict=True)) | {generator.integers(200): 9.0}
    predictions = predict(splits["test"]["label"], {row: 1 + row % 3 for row in chosen}, losses)
    model = make_model(home, signature, METRICS, LINES, predictions, best_epoch=2, fit=fit_of(epochs=3))
    export = make(home, "export", {"largest_difference": 3.25e-7, "rows": 200, "opset": 18, "bytes": 412345}, {"model.onnx": b"1"})
    samples = Samples(splits["train"]["image"][:8], np.stack([255 - splits["train"]["image"][:8]] * 4))
    return Run(data, model, splits["test"], predictions, {"onnx": export}, samples)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return noise(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def shown(digits: Run, tmp_path_factory: pytest.TempPathFactory) -> Read:
    """The page of the digits."""
    return digits.write(tmp_path_factory.mktemp("shown") / "report.html")


def test_the_interval_of_wilson_is_that_of_the_textbook() -> None:
    assert page.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert page.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=5e-5)
    assert page.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)


def test_the_page_says_first_how_good_the_model_is(digits: Run, shown: Read) -> None:
    text = shown.text
    headline = text[: text.index("The kept weights")]
    low, high = page.wilson(180, 200)
    assert f"90.00 % 95 % interval {100 * low:.1f} % to {100 * high:.1f} % · 180 of 200 rows right" in headline
    assert "test loss 0.25" in headline
    assert "best epoch 2 of 3 trained" in headline
    assert "training speed 41,234 rows/s" in headline
    assert "test macro F1 0.875 mean of all classes, each counting alike" in headline
    seconds = sum(artifact.manifest.seconds for artifact in (digits.data, digits.model, *digits.exports.values()))
    assert f"time {seconds:.1f} s" in headline


def test_the_page_counts_the_rows_that_were_read_and_set_aside(shown: Read) -> None:
    assert "rows read 910 bad 6 dropped by cleaning 4 duplicates among them 3 Train 600 Validation 100 Test 200" in shown.text
    assert ["image: no image", "4"] in shown.tables["reasons"]
    assert shown.tables["classes"][0] == ["label", "train", "validation", "test"]
    assert shown.tables["classes"][4] == ["3", "60", "10", "20"]


def test_the_confusion_matrix_has_the_counts_of_the_predictions(digits: Run, shown: Read) -> None:
    table = shown.tables["confusion"]
    expected = np.zeros((10, 10), dtype=int)
    for label, predicted in zip(digits.predictions["label"], digits.predictions["predicted"], strict=True):
        expected[label, predicted] += 1
    assert table[0] == ["", *map(str, range(10))]
    assert [row[0] for row in table[1:]] == [str(label) for label in range(10)]
    assert np.array_equal(np.array([row[1:] for row in table[1:]], dtype=int), expected)


def test_recall_and_precision_are_those_of_each_class(digits: Run, shown: Read) -> None:
    table = shown.tables["by-class"]
    label, predicted = digits.predictions["label"], digits.predictions["predicted"]
    right = ((label == 7) & (predicted == 7)).sum()
    given = (predicted == 7).sum()
    assert table[8] == ["7", "20", *(f"{100 * share:.1f} %" for share in (right / 20, right / given, 2 * right / (20 + given)))]


def test_the_worst_mistakes_come_first_with_their_own_images(digits: Run, shown: Read) -> None:
    wrong = np.flatnonzero(digits.predictions["label"] != digits.predictions["predicted"])
    expected = wrong[np.argsort(-digits.predictions["loss"][wrong])]
    assert shown.mistakes == expected.tolist()
    pictures = [image for image in shown.all("img") if "taken for" in image["alt"]]
    assert [pixels(image["src"]).tolist() for image in pictures] == [digits.test["image"][row, :, :, 0].tolist() for row in expected]
    first = expected[0]
    label, predicted = digits.predictions["label"][first], digits.predictions["predicted"][first]
    assert f"{label} → {predicted} {100 * digits.predictions['probability'][first]:.1f} %" in shown.text


def test_a_loss_that_is_not_a_number_is_the_worst_mistake(tmp_path: Path) -> None:
    run = numbers(tmp_path, ("no", "yes"), wrong={3: 1, 4: 1, 5: 1}, loss={3: 2.0, 4: math.nan, 5: 8.0})
    assert run.write(tmp_path / "report.html").mistakes == [4, 5, 3]


def test_only_the_worst_mistakes_are_shown(tmp_path: Path) -> None:
    run = numbers(tmp_path, ("no", "yes"), wrong=dict.fromkeys(range(50), 1), loss={row: 1.0 + row for row in range(50)})
    assert run.write(tmp_path / "report.html").mistakes == list(range(49, 49 - page.WORST, -1))


def test_augmented_samples_stand_below_their_originals(digits: Run, shown: Read) -> None:
    images = {image["alt"]: pixels(image["src"]) for image in shown.all("img")}
    assert digits.samples is not None
    assert np.array_equal(images["training image 2, original"], digits.samples.original[1, :, :, 0])
    assert np.array_equal(images["training image 8, epoch 4"], digits.samples.augmented[3, 7, :, :, 0])


def test_large_images_are_shown_small() -> None:
    image = np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8)
    found = plots.picture(image)
    assert pixels(found).shape == (48, 96, 3)
    assert len(found) < 8000


def numbers(home: Path, labels: tuple[Any, ...], wrong: dict[int, int], loss: dict[int, float], split: str = "test") -> Run:
    """A run on two columns of numbers, 10 rows a class and at least 200 in each split: train and `split`."""
    count = max(10 * len(labels), 200)
    values = np.arange(2 * count, dtype=np.float32).reshape(count, 2) / 4
    values[::7, 1] = np.nan
    rows = {"numbers": values, "late": np.arange(count) % len(labels)}
    signature = Signature(inputs=(NUMBERS,), target=Target(name="late", labels=labels))
    data = make_data(home, signature, {"train": rows} | {split: rows})
    predictions = predict(rows["late"], wrong, loss, len(labels)) if split == "test" else None
    metrics = {name: METRICS[name] for name in ("train", split)}
    lines = [epoch_line(1, validation=METRICS["validation"] if split == "validation" else None)]
    return Run(data, make_model(home, signature, metrics, lines, predictions), rows, predictions or {})


def test_mistakes_on_numbers_are_a_table_of_their_values(tmp_path: Path) -> None:
    found = numbers(tmp_path, ("no", "yes"), wrong={7: 1, 150: 1}, loss={7: 1.5, 150: 2.5}).write(tmp_path / "report.html")
    assert found.tables["values"] == [
        ["test row", "label → predicted", "probability", "loss", "month", "<i>distance</i>"],
        ["150", "no → yes", "8.2 %", "2.5", "75", "75.25"],
        ["7", "yes → no", "22.3 %", "1.5", "3.5", "missing"],
    ]


def test_many_classes_have_their_most_confused_pairs_listed(tmp_path: Path) -> None:
    names = tuple(f"class {index:03d}" for index in range(200))
    wrong = {row: 1 if row % 200 == 17 else 5 for row in (17, 217, 417, 617, 33, 233, 999)}
    found = numbers(tmp_path, names, wrong, dict.fromkeys(wrong, 3.0)).write(tmp_path / "report.html")
    assert "confusion" not in found.tables
    assert found.tables["confused"] == [
        ["true class", "predicted", "rows", "of the class"],
        ["class 017", "class 018", "4", "40.0 %"],
        ["class 033", "class 038", "2", "20.0 %"],
        ["class 199", "class 004", "1", "10.0 %"],
    ]
    assert len(found.tables["by-class"]) == 201


def test_a_run_without_mistakes_says_so(tmp_path: Path) -> None:
    text = numbers(tmp_path, ("no", "yes"), {}, {}).write(tmp_path / "report.html").text
    assert "Worst mistakes None: all 200 rows are right." in text


def test_a_run_without_a_test_split_shows_validation_and_says_so(tmp_path: Path) -> None:
    found = numbers(tmp_path, ("no", "yes"), {}, {}, split="validation").write(tmp_path / "report.html")
    assert "validation accuracy 90.00 %" in found.text
    assert "There is no test split" in found.text
    assert found.mistakes == []
    assert "confusion" not in found.tables


def test_what_a_run_does_not_have_is_left_out(tmp_path: Path) -> None:
    text = numbers(tmp_path, ("no", "yes"), {}, {}, split="train").write(tmp_path / "report.html").text
    assert not {"Thresholds", "Folds", "Cleaning", "Warnings", "Examples"} & set(text.split())
    assert "train accuracy 90.00 %" in text
    assert "There is no validation split" in text
    assert "No step was logged: there were 62, and train.log_every is 10." in text
    assert "Augmentation" not in text


def test_values_that_are_not_finite_do_not_stop_the_page(digits: Run, tmp_path: Path) -> None:
    lost = [step_line(step, *((None, None) if step in (1, 4) else (1.0, 2.0 * step))) for step in range(1, 8)]
    lines = [*lost, epoch_line(1, None, {"loss": math.nan, "accuracy": 0.1}), epoch_line(2, None, {"loss": None, "accuracy": 0.1})]
    metrics = METRICS | {"test": {"loss": None, "accuracy": 0.5, "macro_f1": None}}
    signature = Signature(inputs=(IMAGE,), target=DIGITS)
    run = replace(
        digits, model=make_model(tmp_path, signature, metrics, lines, digits.predictions, fit=fit_of(clip={"kind": "norm", "limit": 1.0}))
    )
    found = run.write(tmp_path / "report.html")
    assert "test loss not finite" in found.text
    said = [element["aria-label"] for element in found.all("div") if "aria-label" in element]
    assert any("Gradient norm by step, 1 to 7: from 4 to 14; 2 of 7 logged values not finite" in text for text in said)


def test_each_curve_has_a_label_and_the_best_epoch_a_mark() -> None:
    svg = plots.by_epoch("Loss", [1, 2, 3], {"train": np.array([3.0, 2.0, 1.0]), "validation": np.array([3.0, 2.0, 2.5])}, best=2)
    assert re.findall(r">([a-z][^<]*)</text>", svg) == ["epoch", "best epoch 2", "train", "validation"]
    heights = [float(height) for height in re.findall(r'y="([\d.]+)"[^>]*>(?:train|validation)<', svg)]
    assert heights[0] > heights[1] + 20  # the lower loss stands lower


def test_labels_of_curves_that_end_together_do_not_touch() -> None:
    svg = plots.by_epoch("Loss", [1, 2], {"train": np.array([2.0, 1.0]), "validation": np.array([3.0, 1.001])}, best=2)
    heights = [float(height) for height in re.findall(r'y="([\d.]+)"[^>]*>(?:train|validation)<', svg)]
    assert abs(heights[0] - heights[1]) > 9


def test_a_hundred_thousand_steps_are_a_small_plot() -> None:
    steps = np.arange(100_000)
    values = np.random.default_rng(0).normal(5, 1, 100_000)
    values[::1000] = np.nan
    assert len(plots.by_step("Gradient norm", steps, values)) < 60_000
    assert len(plots.by_step("Learning rate", steps, values, smooth=True)) < 60_000


def test_the_page_stands_alone(shown: Read) -> None:
    content = shown.path.read_text()
    assert "<script" not in content
    assert not re.search(r"https?://|@import|url\((?!#)", content)
    refers = [value for _, attributes in shown.elements for name, value in attributes.items() if name in ("src", "href", "xlink:href")]
    assert refers
    assert all(value.startswith(("data:", "#")) for value in refers)
    ids = [attributes["id"] for _, attributes in shown.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in refers if value.startswith("#")} <= set(ids)
    policy = next(element["content"] for element in shown.all("meta") if element.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert all(image["alt"] for image in shown.all("img"))


def test_what_the_user_named_is_never_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = numbers(tmp_path, ('"><img src=x>', evil), wrong={0: 1}, loss={0: 3.0})
    found = replace(run, job=f"</pre>{evil}").write(tmp_path / "report.html")
    content = (tmp_path / "report.html").read_text()
    assert "<script" not in content
    assert "<i>" not in content
    assert found.all("img") == []
    assert f"</pre>{evil}" in found.text
    assert found.tables["values"][1][1] == f'"><img src=x> → {evil}'
    assert found.tables["confusion"][2][0] == evil


def test_the_same_run_gives_the_same_bytes(digits: Run, shown: Read, tmp_path: Path) -> None:
    assert digits.write(tmp_path / "again.html").path.read_bytes() == shown.path.read_bytes()


@pytest.mark.parametrize("what", ["predictions.parquet", "metrics.jsonl", "test/part-00000.parquet"])
def test_a_damaged_file_is_refused(tmp_path: Path, what: str) -> None:
    run = numbers(tmp_path, ("no", "yes"), wrong={7: 1}, loss={7: 1.5})
    path = (run.data if what.startswith("test") else run.model).path / what
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DloptError, match=f"{what}: content differs from its seal"):
        run.write(tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_page_is_written_without_torch_and_ray() -> None:
    script = "import sys, dlopt.report.page; print(*{'torch', 'ray', 'matplotlib.pyplot'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_samples_are_the_rows_as_training_sees_them(digits: Run) -> None:
    fit = fit_of(batch_size=16)
    found = samples(digits.data, fit)
    assert found is not None
    assert found.original.shape == (8, 28, 28, 1)
    images = Split.open(digits.data, "train").read()["image"]
    assert np.array_equal(found.original, images[:8])
    for index, original in enumerate(found.original):  # a crop of the image with a black frame of two pixels
        framed = np.pad(original, ((2, 2), (2, 2), (0, 0)))
        crops = [framed[y : y + 28, x : x + 28] for y in range(5) for x in range(5)]
        assert all(any(np.array_equal(crop, seen[index]) for crop in crops) for seen in found.augmented)
    assert len({seen.tobytes() for seen in found.augmented}) == 4
    assert samples(digits.data, fit.model_copy(update={"augment": ()})) is None


def test_the_page_of_real_digits_is_small(mnist: None, tmp_path: Path) -> None:
    table = Sample().peek(5000)
    order = np.random.default_rng(0).permutation(5000)[:1000]
    images = table["image"].combine_chunks().flatten().flatten().to_numpy().reshape(-1, 28, 28, 1)
    rows = {"image": images[order], "label": table["label"].to_numpy()[order]}
    signature = Signature(inputs=(IMAGE,), target=DIGITS)
    data = make_data(tmp_path, signature, {"train": rows, "validation": rows, "test": rows})
    predictions = predict(rows["label"], dict.fromkeys(range(40), 1), dict.fromkeys(range(40), 2.0))
    lines = [step_line(step) for step in range(10, 950, 10)] + [epoch_line(epoch, 1 / epoch) for epoch in range(1, 16)]
    model = make_model(tmp_path, signature, METRICS, lines, predictions)
    Run(data, model, rows, predictions, samples=samples(data, fit_of())).write(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 300_000


GREEN = (0, 200, 83)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
FLAGS += " --disable-sync --hide-scrollbars --force-device-scale-factor=1 --enable-logging=stderr --window-size=1200,4400"


@pytest.mark.parametrize(
    ("dark", "colours"), few(1, [(True, ["14171c", "7da2ff", "ffb26b"]), (False, ["f6f7f9", "2457d6", "b4530a"])], several=True)
)
def test_a_browser_draws_the_page_in_light_and_dark(digits: Run, tmp_path: Path, dark: bool, colours: list[str]) -> None:
    image = np.tile(np.uint8(GREEN), (1, 28, 28, 1))
    replace(digits, samples=Samples(image, image[None])).write(tmp_path / "report.html")
    flags = [*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", (tmp_path / "report.html").as_uri()]
    chromium = program("chromium", "chromium-browser", "google-chrome")
    done = subprocess.run([chromium, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Content Security Policy" not in done.stderr
    seen = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    curves = seen[330:720]
    for place, colour in zip((seen, curves, curves), colours, strict=True):  # the paper, and the curves of train and validation
        assert (place == tuple(bytes.fromhex(colour))).all(axis=2).sum() > 100
    assert (seen == GREEN).all(axis=2).sum() >= 64 * 64
