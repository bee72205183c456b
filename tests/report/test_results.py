"""What the report says of targets of every kind, and how it writes rows of every kind, from artifacts made by hand."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn import metrics as reference

from dlopt.data.kinds import tokenizer as text
from dlopt.data.kinds.text import TextInput
from dlopt.data.kinds.tokenizer import tokens_of, train_tokenizer
from dlopt.data.prepared import Split
from dlopt.data.stats.describe import describe
from dlopt.data.stats.summary import summarise
from dlopt.models import Mlp
from dlopt.part import Feature, Signature, Target
from dlopt.report import plots, rows
from dlopt.report.importance import importance
from dlopt.report.results import KINDS, THRESHOLDS, Categories, Labels, Numbers, Results, precision_recall, roc
from dlopt.report.rows import cells
from dlopt.train.measure.evaluate import write_predictions
from dlopt.train.start import trained_network
from tests import sets
from tests.report.test_report import IMAGE, LINES, METRICS, NUMBERS, Read, Run, epoch_line, fit_of, make_data, make_model, pixels
from tests.served import FLIGHTS, SAID

SPAM = Target(name="kind", labels=("ham", "spam"))
TAGS = Target(name="tags", kind="multi_label", labels=("art", "law", "<i>sea</i>"))
PRICE = Target(name="price", kind="number", columns=("price",))
PLACE = Target(name="place", kind="number", columns=("x", "y"))
GENERATOR = np.random.default_rng(11)


def run_of(
    home: Path,
    target: Target,
    truth: np.ndarray,
    predictions: dict[str, Any],
    metrics: dict[str, Any],
    train: dict[str, Any] | None = None,
    **data: Any,
) -> Run:
    """A run on two columns of numbers, whose test split has these targets, in the order of the predictions."""
    count = len(truth)
    splits = {name: {"numbers": np.arange(2 * count, dtype=np.float32).reshape(count, 2), target.name: truth} for name in ("train", "test")}
    signature = Signature(inputs=(NUMBERS,), target=target)
    told = {"row": np.arange(count)} | predictions
    lines = [epoch_line(epoch, validation=metrics) for epoch in (1, 2, 3)]
    model = make_model(home, signature, dict.fromkeys(("train", "test"), metrics), lines, told, fit=fit_of(**(train or {})))
    return Run(make_data(home, signature, splits, **data), model, splits["test"], told)


def spam(home: Path, truth: np.ndarray, score: np.ndarray, target: Target = SPAM, **data: Any) -> Run:
    """Two classes, the score being the probability of the second one."""
    predicted = (score > 0.5).astype(int)
    probability = np.where(predicted == 1, score, 1 - score)
    loss = -np.log(np.where(truth == 1, score, 1 - score))
    found = {"label": truth, "predicted": predicted, "probability": probability, "score": score, "loss": loss}
    positive = 1 if target.positive in (None, target.labels[1]) else 0
    found["score"] = score if positive == 1 else 1 - score
    told = {"loss": 0.25, "accuracy": float((truth == predicted).mean()), "macro_f1": 0.8, "f1": 0.7, "roc_auc": 0.9}
    return run_of(home, target, truth, found, told, **data)


def random_scores(count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Truths, a quarter of them 1, and scores that know something of them, many of them equal."""
    truth = (GENERATOR.random(count) < 0.25).astype(np.int64)
    return truth, np.clip(0.25 * truth + GENERATOR.random(count).round(2) * 0.7, 0.01, 0.99)


WARNINGS = [f"column {name} looks <b>odd</b>" for name in "abcde"]
RULES = [
    {"kind": "drop_duplicates", "title": "drop_duplicates of a, b", "dropped": 1234},
    {"kind": "outliers", "title": "outliers of c", "dropped": 0, "capped": {"c": 5}},
]
FOLDS = [{"loss": 0.2, "accuracy": 0.9, "roc_auc": 0.95}, {"loss": 0.4, "accuracy": 0.8, "roc_auc": None}]


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """A page of all that there can be: warnings, cleaning, a profile and folds."""
    columns = {"month": GENERATOR.integers(1, 13, 500).astype(float), "kind": GENERATOR.integers(0, 2, 500).astype(str)}
    columns["month"][:50] = np.nan
    profile = describe({"train": summarise(columns, {"month": "number", "kind": "category"}, ["kind"])}, ["kind"])
    home = tmp_path_factory.mktemp("two")
    run = spam(home, *random_scores(), warnings=WARNINGS, cleaning=RULES, left_out=["x", "y"], profile=profile)
    return run.write(home / "report.html", folds=FOLDS)


# Two classes


def test_the_roc_curve_and_its_area_are_those_of_scikit_learn() -> None:
    truth, score = random_scores()
    x, y, area = roc(score, truth == 1)
    expected = reference.roc_curve(truth, score, drop_intermediate=False)
    np.testing.assert_allclose(x, expected[0])
    np.testing.assert_allclose(y, expected[1])
    assert area == pytest.approx(reference.roc_auc_score(truth, score))


def test_the_average_precision_is_that_of_scikit_learn() -> None:
    truth, score = random_scores()
    recall, precision, average = precision_recall(score, truth == 1)
    expected = reference.precision_recall_curve(truth, score)
    np.testing.assert_allclose(recall, expected[1][-2::-1])
    np.testing.assert_allclose(precision, expected[0][-2::-1])
    assert average == pytest.approx(reference.average_precision_score(truth, score))


@pytest.mark.parametrize("positive", ["spam", "ham"])
def test_two_classes_have_curves_and_other_thresholds_of_the_positive_one(tmp_path: Path, positive: str) -> None:
    truth, score = random_scores()
    found = spam(tmp_path, truth, score, SPAM.model_copy(update={"positive": positive})).write(tmp_path / "report.html")
    is_so, probability = (truth == 1, score) if positive == "spam" else (truth == 0, 1 - score)
    assert f"ROC curve, AUC {reference.roc_auc_score(is_so, probability):.4f}" in found.text
    assert f"Precision and recall, AP {reference.average_precision_score(is_so, probability):.4f}" in found.text
    table = found.tables["thresholds"]
    assert [line[0] for line in table[1:]] == [f"{threshold:.1f}" for threshold in THRESHOLDS]
    given = np.float32(probability) >= np.float32(THRESHOLDS[6])
    precision, recall, f1, _ = reference.precision_recall_fscore_support(is_so, given, average="binary", zero_division=0)
    assert table[7][1:] == [str(given.sum()), *(f"{100 * share:.1f} %" for share in (recall, precision, f1))]
    assert f"Other thresholds for {positive}" in found.text


@pytest.mark.parametrize("threshold", [0.3, {"kind": "tuned", "metric": "youden"}])
def test_the_threshold_that_the_model_has_stands_among_the_others(tmp_path: Path, threshold: Any) -> None:
    truth, score = random_scores()
    found = spam(tmp_path, truth, score, SPAM.model_copy(update={"thresholds": (0.3125,)}), train={"threshold": threshold})
    page = found.write(tmp_path / "report.html")
    lines = page.tables["thresholds"][1:]
    assert [line[0] for line in lines] == ["0.1", "0.2", "0.3", "0.3125", *(f"{value:.1f}" for value in THRESHOLDS[3:])]
    f1 = reference.f1_score(truth, np.float32(score) >= np.float32(0.3125))
    assert lines[3][-1] == f"{100 * f1:.1f} %"
    said = "Youden's J on the validation split"
    assert "from another probability on than 0.3125" in page.text
    assert (said in page.text) == isinstance(threshold, dict)


def test_labels_have_their_thresholds_beside_them(tmp_path: Path) -> None:
    run, _, _ = tagged(tmp_path, target=TAGS.model_copy(update={"thresholds": (0.25, 0.5, 0.0625)}))
    table = run.write(tmp_path / "report.html").tables["by-label"]
    assert [line[-1] for line in table[:4]] == ["threshold", "0.25", "0.5", "0.0625"]
    assert [len(line) for line in table] == [len(table[0])] * 6


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (None, "test loss 0.25 cross-entropy, nats a row"),
        ({"kind": "focal", "gamma": 1.5}, "test loss 0.25 focal loss, gamma 1.5, nats"),
    ],
)
def test_the_loss_is_named(tmp_path: Path, loss: Any, said: str) -> None:
    assert said in spam(tmp_path, *random_scores(), train={"loss": loss}).write(tmp_path / "report.html").text


def test_two_classes_are_headed_by_what_is_known_of_two_classes(two_classes: Read) -> None:
    text = two_classes.text
    assert "test ROC AUC 0.9 how often a row of spam ranks above another" in text
    assert "test F1 0.7 of spam: the harmonic mean" in text
    assert "ROC AUC by epoch" not in text and text.count("test accuracy") == 1


def test_a_test_split_of_one_class_has_no_curves(tmp_path: Path) -> None:
    truth, score = np.zeros(200, np.int64), random_scores(200)[1]
    found = spam(tmp_path, truth, score).write(tmp_path / "report.html")
    assert "ROC curve" not in found.text
    assert found.tables["by-class"][2] == ["spam", "0", "-", "0.0 %", "0.0 %"]
    assert found.tables["classes"][2] == ["spam", "0", "0"]


# Labels


def tagged(home: Path, count: int = 300, target: Target = TAGS) -> tuple[Run, np.ndarray, np.ndarray]:
    """Three labels of which one in five is wrong, and what is so and what is said, bool (rows, labels)."""
    truth = GENERATOR.random((count, 3)) < (0.5, 0.3, 0.05)
    predicted = truth ^ (GENERATOR.random((count, 3)) < 0.2)
    lists = {name: [np.flatnonzero(row).tolist() for row in found] for name, found in (("labels", truth), ("predicted", predicted))}
    loss = (truth != predicted).sum(axis=1) + np.linspace(0, 0.5, count)
    told = {"loss": 0.3, "accuracy": 0.8, "subset_accuracy": 0.5, "micro_f1": 0.75, "macro_f1": 0.7, "macro_roc_auc": None}
    return run_of(home, target, truth.astype(np.uint8), lists | {"loss": loss}, told), truth, predicted


@pytest.fixture(scope="module")
def three_labels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Read, Run, np.ndarray, np.ndarray]:
    """The page of it, and it."""
    home = tmp_path_factory.mktemp("three")
    run, truth, predicted = tagged(home)
    return run.write(home / "report.html"), run, truth, predicted


def test_labels_have_recall_precision_and_f1_each_and_together(three_labels: tuple[Read, Run, np.ndarray, np.ndarray]) -> None:
    found, _, truth, predicted = three_labels
    table = found.tables["by-label"]
    precision, recall, f1, support = reference.precision_recall_fscore_support(truth, predicted, zero_division=0)
    for index, label in enumerate(TAGS.labels):
        shares = [f"{100 * share:.1f} %" for share in (recall[index], precision[index], f1[index])]
        assert table[1 + index] == [label, str(support[index]), str(predicted[:, index].sum()), *shares]
    for line, average in zip(table[4:], ("micro", "macro"), strict=True):
        precision, recall, f1, _ = reference.precision_recall_fscore_support(truth, predicted, average=average, zero_division=0)
        assert line[0] == average
        assert line[3:] == [f"{100 * share:.1f} %" for share in (recall, precision, f1)]


def test_mistakes_on_labels_name_all_of_them(three_labels: tuple[Read, Run, np.ndarray, np.ndarray]) -> None:
    found, run, truth, predicted = three_labels
    wrong = np.flatnonzero((truth != predicted).any(axis=1))
    expected = wrong[np.argsort(-run.predictions["loss"][wrong])][:24]
    assert found.mistakes == expected.tolist()
    first = expected[0]
    names = [", ".join(np.array(TAGS.labels)[row[first]]) or "none" for row in (truth, predicted)]
    assert found.tables["values"][0][:3] == ["test row", "labels → predicted", "loss"]
    assert found.tables["values"][1][1] == " → ".join(names)


def test_labels_are_headed_by_micro_f1(three_labels: tuple[Read, Run, np.ndarray, np.ndarray]) -> None:
    found, _, truth, _ = three_labels
    assert "test micro F1 0.75 of all labels of all rows together" in found.text
    assert "test macro F1 0.7" in found.text
    assert "predicts tags , any of 3 labels, from numbers (2 numbers)" in found.text
    assert found.tables["classes"][1] == ["art", *[str(truth[:, 0].sum())] * 2]
    names, *_, values = zip(*found.tables["by-split"], strict=True)
    assert names == ("metric", "rows", "loss", "accuracy", "subset accuracy", "micro F1", "macro F1", "macro ROC AUC")
    assert values == ("test", "300", "0.3", "80.00 %", "50.00 %", "0.75", "0.7", "-")


# Numbers


def priced(home: Path, truth: np.ndarray, predicted: np.ndarray, target: Target = PRICE) -> Run:
    columns = {f"target.{name}": truth[:, index] for index, name in enumerate(target.columns)}
    columns |= {f"predicted.{name}": predicted[:, index] for index, name in enumerate(target.columns)}
    loss = ((truth - predicted) ** 2).mean(axis=1)
    told = {"loss": 0.1, "r2": 0.5, "mae": 3.0, "rmse": 4.0}
    return run_of(home, target, truth.astype(np.float32), columns | {"loss": loss}, told)


def test_numbers_have_their_errors_in_units_of_the_data(tmp_path: Path) -> None:
    truth = GENERATOR.normal(100, 20, (500, 2)).round(3)
    predicted = truth + GENERATOR.normal((1, -3), (5, 2), (500, 2))
    found = priced(tmp_path, truth, predicted, PLACE).write(tmp_path / "report.html")
    assert len(found.tables["by-number"]) == 3
    for index, line in enumerate(found.tables["by-number"][1:]):
        true, said = truth[:, index], predicted[:, index]
        expected = [
            reference.mean_absolute_error(true, said),
            reference.root_mean_squared_error(true, said),
            reference.r2_score(true, said),
            (said - true).mean(),
        ]
        assert line[0] == PLACE.columns[index]
        assert [float(value) for value in line[1:]] == pytest.approx(expected, rel=1e-3)


def test_the_worst_mistake_on_a_number_is_the_furthest_off(tmp_path: Path) -> None:
    truth = np.arange(200.0)[:, None]
    predicted = truth + np.where(np.arange(200) == 17, -42.5, 0.25)[:, None]
    predicted[[3, 4]] = truth[[3, 4]]
    found = priced(tmp_path, truth, predicted).write(tmp_path / "report.html")
    assert found.tables["values"][0] == ["test row", "true → predicted", "error", "loss", "month", "<i>distance</i>"]
    assert found.tables["values"][1] == ["17", "17 → -25.5", "-42.5", "1806", "34", "35"]
    assert not {3, 4} & set(found.mistakes)
    assert "The 24 of 198 test rows with the highest loss: true → predicted." in found.text


def test_numbers_are_headed_by_how_much_is_explained(tmp_path: Path) -> None:
    truth = np.arange(200.0)[:, None]
    found = priced(tmp_path, truth, truth + 1).write(tmp_path / "report.html")
    assert "test R² 0.5 share of the variance" in found.text
    assert "test MAE 3 mean absolute error, in units of the data test RMSE 4" in found.text
    said = [element["aria-label"] for element in found.all("div") if element.get("role") == "img"]
    assert "price: predicted by true value of 200 rows, from 0 to 199." in said
    assert any(line.startswith("R² by epoch, 1 to 3: validation from 0.5 to 0.5") for line in said)
    assert "classes" not in found.tables and "Accuracy" not in found.text


def test_a_number_that_never_changes_and_one_that_is_not_finite_do_not_stop_the_page(tmp_path: Path) -> None:
    truth = np.full((200, 1), 7.0)
    predicted = np.where(np.arange(200) == 5, np.nan, 7.0)[:, None]
    found = priced(tmp_path, truth, predicted).write(tmp_path / "report.html")
    assert found.tables["by-number"][1] == ["price", "not finite", "not finite", "-", "not finite"]
    assert found.mistakes == [5]


def test_many_points_are_a_small_plot_of_how_many_lie_where() -> None:
    true = GENERATOR.normal(0, 1, 200_000)
    predicted = true + GENERATOR.normal(0, 0.5, 200_000)
    svg = plots.scatter("many", true, predicted)
    assert len(svg) < 120_000
    assert 50 < svg.count("<use") < 36 * 36
    assert len(plots.errors("many", predicted - true, "error")) < 20_000
    assert plots.scatter("few", true[:100], predicted[:100]).count("<use") >= 100


# As training writes it


def written(home: Path, target: Target) -> tuple[Results, dict[str, float | None]]:
    """What a network of no training says of a test split, as the report reads it, and the metrics that training has of it."""
    data = sets.prepared(home, sets.signature(sets.NUMBERS, target=target))
    network, test = trained_network(sets.trained(home, data, Mlp(hidden=(16,))), data), Split.open(data, "test")
    metrics = write_predictions(home / "predictions.parquet", network, test, torch.device("cpu"))
    return KINDS[target.kind](target, pq.read_table(home / "predictions.parquet")), metrics


@pytest.mark.parametrize("positive", ["no", "yes"])
def test_the_report_says_of_two_classes_what_the_metrics_say(tmp_path: Path, positive: str) -> None:
    found, metrics = written(tmp_path, sets.TWO.model_copy(update={"positive": positive}))
    assert isinstance(found, Categories)
    truth = found.label == found.target.positive_index
    assert roc(found.score, truth)[2] == pytest.approx(metrics["roc_auc"])
    assert precision_recall(found.score, truth)[2] == pytest.approx(metrics["average_precision"])
    score = found.scores[found.target.positive_index]
    assert (score.label, score.f1, score.recall) == (positive, pytest.approx(metrics["f1"]), pytest.approx(metrics["recall"]))
    assert 1 - len(found.wrong) / found.rows == pytest.approx(metrics["accuracy"])


def test_the_report_says_of_labels_what_the_metrics_say(tmp_path: Path) -> None:
    found, metrics = written(tmp_path, sets.LABELS)
    assert isinstance(found, Labels)
    assert (found.micro.f1, found.macro.f1) == (pytest.approx(metrics["micro_f1"]), pytest.approx(metrics["macro_f1"]))
    assert 1 - len(found.wrong) / found.rows == pytest.approx(metrics["subset_accuracy"])


def test_the_report_says_of_numbers_what_the_metrics_say(tmp_path: Path) -> None:
    found, metrics = written(tmp_path, sets.PAIR)
    assert isinstance(found, Numbers)
    for name in ("mae", "rmse", "r2"):
        assert np.mean([getattr(number, name) for number in found.numbers]) == pytest.approx(metrics[name], rel=1e-5)


# Rows


def test_mistakes_show_the_row_as_a_person_would_write_it(tmp_path: Path) -> None:
    """Numbers, categories by their names, parts of dates, text and a picture, side by side."""
    tokenizer = train_tokenizer(SAID, TextInput(columns=("title", "body"), min_frequency=1))
    words = Feature(name="words", kind="text", dtype="int32", shape=(8,), columns=("title", "body"), tokenizer=tokenizer, tokens=20)
    hashed = Feature(name="codes", kind="category", dtype="int32", shape=(1,), columns=("tail",), buckets=50)
    signature = Signature(inputs=(*FLIGHTS.inputs, words, hashed, IMAGE), target=SPAM)
    count = 80
    values = {
        "numbers": np.full((count, 2), np.nan, np.float32),
        "categories": np.zeros((count, 2), np.int32),
        "dates": np.full((count, 2), 5, np.float32),
        "words": np.tile(tokens_of(words).encode([SAID[0]]), (count, 1)),
        "codes": np.full((count, 1), 17, np.int32),
        "image": GENERATOR.integers(0, 256, (count, 28, 28, 1), dtype=np.uint8),
        "kind": np.zeros(count, np.int64),
    }
    values["numbers"][70] = 2.5, 1234567
    values["categories"][70], values["categories"][3] = (3, 300), (1, 0)
    loss = np.where(np.arange(count) == 70, 5.0, 2.0)
    wrong = np.isin(np.arange(count), (3, 70)).astype(int)
    told = {"row": np.arange(count), "label": values["kind"], "predicted": wrong, "probability": np.full(count, 0.75), "loss": loss}
    model = make_model(tmp_path, signature, METRICS, LINES, told | {"score": np.full(count, 0.75)})
    run = Run(make_data(tmp_path, signature, dict.fromkeys(("train", "validation", "test"), values)), model, values, told)
    found = run.write(tmp_path / "report.html")
    names, day = ["delay", "distance", "carrier", "airport", "day", "title + body", "tail"], "month 5, weekday Saturday"
    assert found.tables["values"] == [
        ["test row", "label → predicted", "probability", "loss", "image", *names],
        [
            "70",
            "ham → spam",
            "75.0 %",
            "5",
            "",
            "2.5",
            "1.23457e+06",
            "UA",
            "A299",
            day,
            "please call me now",
            "#17",
        ],
        [
            "3",
            "ham → spam",
            "75.0 %",
            "2",
            "",
            "missing",
            "missing",
            "missing",
            "unknown",
            day,
            "please call me now",
            "#17",
        ],
    ]
    shown = [image for image in found.all("img") if image["alt"] == "ham, taken for spam"]
    assert [pixels(image["src"]).tolist() for image in shown] == [values["image"][row, :, :, 0].tolist() for row in (70, 3)]


def words_of(kind: str, sentence: str, max_length: int = 64) -> list[list[str]]:
    """A sentence as the report shows it, after a tokenizer of a kind."""
    tokenizer = train_tokenizer([sentence, *SAID], TextInput(column="message", min_frequency=1, tokenizer=kind, vocab_size=500))
    shape = {"shape": (max_length,), "columns": ("message",), "tokens": 500}
    feature = Feature(name="text", kind="text", dtype="int32", tokenizer=tokenizer, **shape)
    signature = Signature(inputs=(feature,), target=SPAM)
    return rows.cells(signature, {"text": tokens_of(feature).encode([sentence])})


@pytest.mark.parametrize("kind", ["word", "bpe", "char"])
def test_every_tokenizer_gives_its_text_back(kind: str) -> None:
    assert words_of(kind, "grüße , 東京 now !") == [["grüße , 東京 now !"]]


def test_a_long_text_is_cut() -> None:
    ((shown,),) = words_of("word", "now " * 500, max_length=500)
    assert shown == f"{'now ' * 99}now…"


def test_without_the_tokenizer_texts_are_their_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    feature = Feature(name="text", kind="text", dtype="int32", shape=(4,), columns=("message",), tokenizer="{}", tokens=9)
    for cached in (text._library, text._parsed):
        cached.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tokenizers", None)  # for the import system, not installed
        found = rows.cells(Signature(inputs=(feature,), target=SPAM), {"text": np.int32([[5, 3, 0, 0], [7, 0, 0, 0]])})
    text._library.cache_clear()
    assert found == [["5 3"], ["7"]]


# Data, and folds


def test_warnings_stand_at_the_top_and_whole_in_the_data(tmp_path: Path) -> None:
    found = spam(tmp_path, *random_scores(), warnings=WARNINGS).write(tmp_path / "report.html")
    assert found.text.index("5 warnings about the data") < found.text.index("The kept weights")
    assert found.text.count(WARNINGS[0]) == 2 and found.text.count(WARNINGS[4]) == 1
    assert "<b>odd" not in found.path.read_text()
    assert any(link["href"] == "#warnings" for link in found.all("a"))
    assert "warnings" in {attributes.get("id") for _, attributes in found.elements}


def test_cleaning_says_what_it_dropped(two_classes: Read) -> None:
    cleaning = two_classes.tables["cleaning"]
    assert cleaning[1:] == [["drop_duplicates of a, b", "1,234", ""], ["outliers of c", "0", "capped c 5"]]
    assert "too many of their values are missing: x, y." in two_classes.text


def test_the_profile_is_drawn_where_there_is_one(two_classes: Read) -> None:
    assert [line[:2] for line in two_classes.tables["columns"][1:]] == [["month", "number"], ["kind", "category, target"]]
    assert "10.0%" in two_classes.tables["columns"][1]
    said = [element["aria-label"] for element in two_classes.all("div") if element.get("role") == "img"]
    assert any(line.startswith("Histogram of month") for line in said)


def test_examples_of_each_class_are_its_own_images(tmp_path: Path) -> None:
    label = np.arange(90) % 3
    image = np.zeros((90, 28, 28, 1), np.uint8) + (40 * label[:, None, None, None] + 1).astype(np.uint8)
    signature = Signature(inputs=(IMAGE,), target=Target(name="label", labels=("cat", "dog", "owl")))
    values = {"image": image, "label": label}
    data = make_data(tmp_path, signature, dict.fromkeys(("train", "validation", "test"), values))
    found = Run(data, make_model(tmp_path, signature, METRICS, LINES), values, {}).write(tmp_path / "report.html")
    shown = [(picture["alt"], int(pixels(picture["src"])[0, 0])) for picture in found.all("img") if "example" in picture["alt"]]
    expected = [(f"example {place} of {name}", 40 * at + 1) for at, name in enumerate(("cat", "dog", "owl")) for place in range(1, 9)]
    assert shown == expected


def test_folds_have_their_mean_and_spread(two_classes: Read) -> None:
    spread = np.std([0.2, 0.4], ddof=1), np.std([0.9, 0.8], ddof=1)
    assert two_classes.tables["folds"] == [
        ["fold", "loss", "accuracy", "ROC AUC"],
        ["1", "0.2", "90.00 %", "0.95"],
        ["2", "0.4", "80.00 %", "-"],
        ["mean", "0.3", "85.00 %", "0.95"],
        ["spread", f"{spread[0]:.4g}", f"{100 * spread[1]:.2f} %", "-"],
    ]


def test_every_page_has_ids_once_and_only_links_that_lead_somewhere(
    two_classes: Read, three_labels: tuple[Read, Run, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    truth = np.arange(200.0)[:, None]
    for found in (two_classes, three_labels[0], priced(tmp_path, truth, truth * 2).write(tmp_path / "report.html")):
        ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        refers = [attributes["href"] for _, attributes in found.elements if attributes.get("href", "").startswith("#")]
        assert {link[1:] for link in refers} <= set(ids)
        content = found.path.read_text()
        assert "<i>" not in content and "<script" not in content


# What the model looks at


@pytest.mark.parametrize("target", [sets.THREE, sets.LABELS, sets.NUMBER], ids=lambda target: target.kind)
def test_importance_is_the_rise_of_the_error_when_a_column_is_dealt_out_anew(tmp_path: Path, target: Target) -> None:
    """Against scikit-learn's losses, on a network of no training; a column whose weights are 0 has none."""
    inputs = (sets.NUMBERS, sets.DATES, sets.CATEGORIES)
    data = sets.prepared(tmp_path, sets.signature(*inputs, target=target))
    model = sets.trained(tmp_path, data, Mlp(hidden=(), dropout=0.0))
    found = importance(model, data)
    assert found and found.columns == ["a", "b", "c", "day", "carrier", "origin"] and found.rows == 80
    network, test = trained_network(model, data), Split.open(data, "test")
    rows = {name: torch.from_numpy(values.copy()) for name, values in test.read(test.chunks).items()}
    wanted = rows.pop(target.name)
    order = np.random.default_rng(11).permutation(80)

    def error() -> float:
        with torch.no_grad():
            outputs = network(rows).double()
        if target.kind == "category":
            return float(reference.log_loss(wanted, outputs.softmax(1), labels=range(3)))
        if target.kind == "multi_label":
            return float(np.mean([reference.log_loss(wanted[:, k], outputs[:, k].sigmoid(), labels=[0, 1]) for k in range(4)]))
        return float(reference.mean_absolute_error(wanted, outputs) / wanted.double().std(correction=0))

    before = error()
    rows["day"] = rows["day"][order]
    assert found.before == pytest.approx(before, rel=1e-6)
    assert found.rises[3] == pytest.approx(error() - before, abs=1e-7) and abs(found.rises).min() > 0


def test_calibration_compares_what_is_said_with_what_is_so(tmp_path: Path) -> None:
    found, _ = written(tmp_path, sets.THREE)
    assert isinstance(found, Categories)
    figure = found.calibration
    so, said = found.label == found.predicted, found.probability
    bins = np.minimum((said * 10).astype(int), 9)
    expected = sum(abs(said[bins == place].mean() - so[bins == place].mean()) * (bins == place).mean() for place in set(bins))
    assert figure and figure.title == f"Calibration, {100 * expected:.1f} % apart"


def test_a_date_among_mistakes_is_one() -> None:
    whole = sets.DATES.model_copy(update={"parts": ("year", "month", "day", "hour"), "shape": (4,), "columns": ("day",)})
    signature = sets.signature(whole)
    rows = {"day": np.array([[2026, 3, 9, 7], [np.nan] * 4], np.float32)}
    assert cells(signature, rows) == [["2026-03-09 07:00"], ["missing"]]
    assert cells(sets.signature(sets.DATES), {"day": np.array([[3, 6]], np.float32)}) == [["month 3, weekday Sunday"]]
    days = whole.model_copy(update={"parts": ("days",), "shape": (1,), "offsets": (20000.0,), "dtype": "float64"})
    assert cells(sets.signature(days), {"day": np.array([[0.25]], np.float32)}) == [["2024-10-04 06:00"]]


@pytest.mark.parametrize(("low", "high"), [(0.3, 4), (0.02, 0.9), (5, 900), (0.11, 1.3), (1e-6, 2)])
def test_a_logarithmic_axis_has_ticks_enough_to_be_read(low: float, high: float) -> None:
    svg = str(plots.by_epoch("Loss", [1, 2, 3], {"train": np.array([high, (low * high) ** 0.5, low])}, best=3, logarithmic=True))
    assert len(re.findall(r">(?:0\.\d+|\d+(?:e-\d+)?)</text>", svg)) >= 3 + 2  # beside those of the epochs, which are 1, 2 and 3
