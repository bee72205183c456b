"""`dlopt compare`: runs side by side in one page, whose numbers are those of the artifacts."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlopt.part import DloptError, Signature, Target
from dlopt.report import compare, plots
from dlopt.train.job import Fit
from tests.commands import here, refused_here
from tests.report.test_report import DIGITS, IMAGE, NUMBERS, Read, epoch_line, fit_of, make, step_line
from tests.report.test_report_health import finding, look

NOTHING = "\N{EN DASH}"
LAYERS = [f"body.hidden{place}.linear" for place in range(1, 21)]
VANISHED = [10.0 ** (place - 12) for place in range(20)]
HEALTHY: list[float | None] = [0.5] * 20
SAYS = "vanishing gradient: hardly any reaches body.hidden1.linear; use activation relu"
AMOUNT = Target(name="amount", kind="number", columns=("amount",))
JOB = {"name": "digits", "data": {"inputs": [{"kind": "image", "column": "image"}]}, "model": {"kind": "mlp", "hidden": [64, 64]}}


def lines(losses: list[float | None], split: str = "validation") -> list[dict[str, Any]]:
    """Of an epoch each, with a logged step in the middle."""
    found = []
    for epoch, loss in enumerate(losses, start=1):
        scores = {"loss": loss, "accuracy": epoch / 10, "r2": epoch / 10}
        line = epoch_line(epoch, validation=scores if split == "validation" else None)
        found += [step_line(10 * epoch, loss), line if split == "validation" else line | {"train": scores}]
    return found


def run(
    home: Path,
    name: str,
    test: dict[str, float | None],
    *,
    target: Target = DIGITS,
    curve: list[dict[str, Any]] | None = None,
    health: list[dict[str, Any]] | None = None,
    fit: Fit | None = None,
    job: dict[str, Any] | None = None,
    folder: str = "",
) -> Path:
    """A run's folder, with a made-up model."""
    signature = Signature(inputs=(IMAGE if target is DIGITS else NUMBERS,), target=target)
    files = {"signature.json": signature.model_dump_json().encode(), "metrics.jsonl": as_lines(curve or lines([2.0, 1.0, 0.5]))}
    if health is not None:
        files["health.jsonl"] = as_lines(health)
    info = {"metrics": {"validation": test, "test": test}, "best_epoch": 2, "epochs": 3, "steps": 186, "rows_per_second": 41234.5}
    info["seconds"] = {"start": 0.5, "train": 9.75, "evaluate": 0.25}
    model = make(home / (folder or name), "model", info, files, fit or fit_of())
    place = home / f"{folder or name}-1"
    place.mkdir(parents=True)
    (place / "job.yaml").write_text(yaml.safe_dump(JOB | {"name": name} | (job or {})))
    record = {"name": name, "created": "2026-01-02", "artifacts": {"model": str(model.path)}}
    (place / "run.json").write_text(json.dumps(record))
    return place


def as_lines(found: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in found).encode()


def vanishing(home: Path) -> Path:
    """A deep network of sigmoids."""
    looks = [look(1, LAYERS, VANISHED), look(20, LAYERS, VANISHED, [finding(20, "vanishing", LAYERS[:12], SAYS)])]
    model = {"model": {"kind": "mlp", "hidden": [64, 64], "activation": "sigmoid"}, "train": {"optimizer": {"lr": 0.001}}}
    return run(home, "sigmoid", {"loss": 2.3, "accuracy": 0.1, "macro_f1": 0.02}, curve=lines([2.3, 2.25, 2.3]), health=looks, job=model)


def healthy(home: Path) -> Path:
    """Its cure."""
    looks = [look(step, LAYERS, HEALTHY) for step in (1, 2, 5)]
    model = {"model": {"kind": "mlp", "hidden": [64, 64], "residual": True}, "train": {"optimizer": {"lr": 0.001}}}
    return run(home, "residual", {"loss": 0.25, "accuracy": 0.925, "macro_f1": 0.92}, health=looks, job=model)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """Of the two."""
    home = tmp_path_factory.mktemp("home")
    return written(home, vanishing(home), healthy(home))


def written(home: Path, *folders: Path) -> Read:
    compare.write(home / "compare.html", folders)
    return Read(home / "compare.html")


def results(page: Read) -> dict[tuple[str, str], list[str]]:
    """(split, title) to the cells of the table of results."""
    found, split = {}, ""
    for title, *cells in page.tables["metrics"][1:]:
        split = split if cells else title
        if cells:
            found[split, title] = cells
    return found


def labels(page: Read) -> list[str]:
    """What each figure shows, in words."""
    return [element["aria-label"] for element in page.all("div") if element.get("role") == "img"]


def test_what_differs_in_the_jobs_is_listed_by_its_key_and_nothing_else(page: Read) -> None:
    assert page.tables["differences"] == [
        ["key", "sigmoid", "residual"],
        ["model.activation", "sigmoid", NOTHING],
        ["model.residual", NOTHING, "true"],
    ]


def test_lists_of_parts_are_compared_part_by_part_and_lists_of_numbers_whole() -> None:
    jobs = [
        {"name": "a", "augment": [{"kind": "crop", "padding": 2}, {"kind": "flip"}], "betas": [0.9, 0.99], "clip": None, "export": []},
        {"name": "b", "augment": [{"kind": "crop", "padding": 4}], "betas": [0.9, 0.95], "clip": {"kind": "norm"}, "export": []},
    ]
    assert [(row.title, [cell.text for cell in row.cells]) for row in compare.differences(jobs)] == [
        ("augment.0.padding", ["2", "4"]),
        ("augment.1.kind", ["flip", NOTHING]),
        ("betas", ["[0.9, 0.99]", "[0.9, 0.95]"]),
        ("clip", ["null", NOTHING]),
        ("clip.kind", [NOTHING, "norm"]),
    ]


def test_metrics_are_those_of_the_artifacts_and_the_best_is_marked(page: Read) -> None:
    found = results(page)
    assert found["test", "accuracy"] == ["10.00 %", "★ 92.50 %"]
    assert found["test", "macro F1"] == ["0.02", "★ 0.92"]
    assert found["test", "loss cross-entropy, nats a row"] == ["2.3", "★ 0.25"]
    assert found["validation", "accuracy"] == ["10.00 %", "★ 92.50 %"]
    assert found["time", "training steps alone"] == ["9.8 s", "9.8 s"]
    assert found["time", "epoch that is kept"] == ["2 of 3", "2 of 3"]


@pytest.mark.parametrize(
    ("key", "values", "marked"),
    [
        ("accuracy", [0.5, 0.75, 0.75], [False, True, True]),
        ("rmse", [3.0, 2.0, None], [False, True, False]),
        ("loss", [math.nan, 1.0, 2.0], [False, True, False]),
        ("r2", [0.5, 0.5], [False, False]),
        ("r2", [0.5, None], [False, False]),
    ],
)
def test_the_best_is_the_smallest_loss_or_error_or_the_largest_of_the_rest(key: str, values: list[Any], marked: list[bool]) -> None:
    assert compare.best(key, values) == marked


def test_curves_of_both_runs_are_in_one_figure_with_their_names(page: Read) -> None:
    found = labels(page)
    assert "Loss by epoch: sigmoid from 2.3 to 2.3; residual from 2 to 0.5." in found
    assert "Accuracy by epoch: sigmoid from 10.00 % to 30.00 %; residual from 10.00 % to 30.00 %." in found
    assert "Loss of the batch by step: sigmoid from 2.3 to 2.3; residual from 2 to 0.5." in found


def test_a_run_without_validation_is_drawn_by_its_training_and_says_so(tmp_path: Path) -> None:
    first = run(tmp_path, "with", {"loss": 1.0, "accuracy": 0.5})
    other = run(tmp_path, "without", {"loss": 1.0, "accuracy": 0.5}, curve=lines([4.0, 3.0], split="train"))
    page = written(tmp_path, first, other)
    assert "Loss by epoch: with from 2 to 0.5; without (train) from 4 to 3." in labels(page)
    assert "stroke-dasharray" in page.path.read_text()


def test_layers_stand_beside_each_other_with_findings_below(page: Read) -> None:
    gradients = [label for label in labels(page) if label.startswith("Gradient norm by layer")]
    assert [re.findall(r"from ([\d.e+-]+) \(.*\) to ([\d.e+-]+) \(", label) for label in gradients] == [
        [("1e-12", "1e+07")],
        [("0.5", "0.5")],
    ]
    assert "sigmoid 1 finding step 20: vanishing gradient: hardly any reaches body.hidden1.linear; use activation relu" in without_figures(
        page
    )
    assert "Nothing was found in 3 looks at the layers." in page.text


def without_figures(page: Read) -> str:
    text = re.sub(r"<svg.*?</svg>|<style.*?</style>|<[^>]*>", " ", page.path.read_text(), flags=re.DOTALL)
    return " ".join(text.split())


def test_the_same_norm_has_the_same_colour_in_all_runs(tmp_path: Path) -> None:
    """The scale beside a map says what the colours stand for: its numbers are the same, though the runs' own norms are not."""
    page = written(tmp_path, vanishing(tmp_path), healthy(tmp_path))
    maps = [svg for svg in re.findall(r"<svg.*?</svg>", page.path.read_text(), re.DOTALL) if "<image" in svg]
    scales = [re.findall(r">((?:\d+e[+-]\d+|0\.\d+|1|10+))</text>", svg.rpartition("<image")[2]) for svg in maps]
    assert len(maps) == 2
    assert scales[0] == scales[1]
    assert len(scales[0]) >= 4


def test_few_layers_are_a_map_as_well_beside_another_run(tmp_path: Path) -> None:
    few = run(tmp_path, "few", {"loss": 1.0, "accuracy": 0.5}, health=[look(1, ["a", "b"], [1.0, 2.0])])
    page = written(tmp_path, few, healthy(tmp_path))
    assert page.path.read_text().count("<image") == 4  # two maps, each with a scale


def test_a_run_that_was_not_watched_says_so(tmp_path: Path) -> None:
    page = written(tmp_path, run(tmp_path, "unwatched", {"loss": 1.0, "accuracy": 0.5}), healthy(tmp_path))
    assert "unwatched Its layers were not looked at: train.health was off." in without_figures(page)
    neither = written(tmp_path, tmp_path / "unwatched-1", run(tmp_path, "again", {"loss": 1.0, "accuracy": 0.5}))
    assert neither.text.count("Its layers were not looked at") == 2


def test_another_target_has_rows_and_curves_of_its_own(tmp_path: Path) -> None:
    number = run(tmp_path, "amounts", {"loss": 0.5, "r2": 0.5, "mae": 3.25, "rmse": None}, target=AMOUNT)
    page = written(tmp_path, healthy(tmp_path), number)
    found = results(page)
    assert found["test", "accuracy"] == ["92.50 %", NOTHING]
    assert found["test", "R²"] == [NOTHING, "0.5"]
    assert found["test", "MAE"] == [NOTHING, "3.25"]
    assert found["test", "RMSE"] == [NOTHING, "not finite"]
    assert found["test", "loss cross-entropy, nats a row"] == ["0.25", NOTHING]
    assert "★" not in str(found)
    assert [label for label in labels(page) if label.startswith("Loss by epoch")] == [
        "Loss by epoch: residual from 2 to 0.5.",
        "Loss by epoch: amounts from 2 to 0.5.",
    ]


def test_losses_of_different_kinds_are_not_held_against_each_other(tmp_path: Path) -> None:
    focal = run(tmp_path, "focal", {"loss": 0.125, "accuracy": 0.95}, fit=fit_of(loss={"kind": "focal", "gamma": 2}))
    found = results(written(tmp_path, healthy(tmp_path), focal))
    assert found["test", "accuracy"] == ["92.50 %", "★ 95.00 %"]
    assert found["test", "loss cross-entropy, nats a row"] == ["0.25", NOTHING]
    assert found["test", "loss focal loss, gamma 2, nats"] == [NOTHING, "0.125"]


def test_values_that_are_not_finite_do_not_stop_the_page(tmp_path: Path) -> None:
    lost = run(tmp_path, "lost", {"loss": None, "accuracy": 0.1}, curve=lines([None, None]), health=[look(1, LAYERS, [None] * 20)])
    page = written(tmp_path, lost, healthy(tmp_path))
    assert results(page)["test", "loss cross-entropy, nats a row"] == ["not finite", "0.25"]
    assert "Loss by epoch: lost from not finite to not finite; residual from 2 to 0.5." in labels(page)


def test_six_runs_of_one_job_have_names_and_colours_of_their_own(tmp_path: Path) -> None:
    folders = [run(tmp_path, "digits", {"loss": 1.0 + place, "accuracy": 0.5}, folder=f"run{place}") for place in range(6)]
    page = written(tmp_path, *folders)
    assert page.tables["metrics"][0][1:] == [f"run{place}-1" for place in range(6)]
    assert results(page)["test", "loss cross-entropy, nats a row"] == ["★ 1", "2", "3", "4", "5", "6"]
    content = page.path.read_text()
    colours = [plots.COLOURS[colour] for colour in plots.OF_RUN]
    assert all(len(re.findall(rf"--{colour}: light-dark\(", content)) == 1 for colour in colours)
    assert all(f"fill: var(--{colour})" in content for colour in colours)
    plotted = re.findall(r"<svg.*?</svg>", content, re.DOTALL)
    assert len(plotted) >= 3
    for svg in plotted[:3]:  # curves that end together, and names that do not touch
        heights = sorted(float(height) for height in re.findall(r'y="([\d.]+)"[^>]*>run\d-1<', svg))
        assert len(heights) == 6
        assert min(b - a for a, b in pairwise(heights)) > 9


def test_jobs_that_differ_in_nothing_say_so(tmp_path: Path) -> None:
    page = written(tmp_path, *(run(tmp_path, name, {"loss": 1.0, "accuracy": 0.5}) for name in "ab"))
    assert "What differs in their jobs Nothing but their names." in page.text


def test_the_command_writes_the_page_where_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    folder = vanishing(home)
    healthy(home)
    monkeypatch.chdir(tmp_path)
    ended = here(capsys, "compare", folder, "residual", "--home", home)
    assert (ended.returncode, ended.stdout) == (0, "compare.html\n")
    assert Read(tmp_path / "compare.html").tables["differences"][0] == ["key", "sigmoid", "residual"]
    there = here(capsys, "compare", "sigmoid", "residual", "--home", home, "-o", "new/both.html")
    assert there.stdout == "new/both.html\n"
    assert (tmp_path / "new/both.html").read_bytes() == (tmp_path / "compare.html").read_bytes()


def test_a_mistake_is_one_line_and_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, where = healthy(tmp_path), ("--home", tmp_path, "-o", tmp_path / "page.html")
    assert refused_here(capsys, "compare", "residual", *where) == "RUN: 1 given, and 2 to 6 can be compared"
    assert refused_here(capsys, "compare", *["residual"] * 7, *where) == "RUN: 7 given, and 2 to 6 can be compared"
    assert refused_here(capsys, "compare", "residual", "sigmoid", *where).startswith("sigmoid: neither a run's folder nor the name")
    assert refused_here(capsys, "compare", "residual", folder, *where).startswith(f"RUN: {folder} is given twice; ")
    (folder / "job.yaml").unlink()
    vanishing(tmp_path)
    assert refused_here(capsys, "compare", "residual", "sigmoid", *where) == f"{folder}/job.yaml: missing or damaged: run the job again"
    assert not (tmp_path / "page.html").exists()


def test_a_damaged_file_of_a_model_is_refused(tmp_path: Path) -> None:
    folders = [vanishing(tmp_path), healthy(tmp_path)]
    (path,) = (tmp_path / "sigmoid").rglob("health.jsonl")
    path.write_bytes(path.read_bytes().replace(b"relu", b"tanh"))
    with pytest.raises(DloptError, match=r"health.jsonl: content differs from its seal"):
        compare.write(tmp_path / "page.html", folders)


def test_the_page_stands_alone_and_names_are_never_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>$x_1$"
    page = written(tmp_path, run(tmp_path, evil, {"loss": 1.0, "accuracy": 0.5}, folder="evil"), healthy(tmp_path))
    content = page.path.read_text()
    assert "<script" not in content
    assert page.tables["metrics"][0][1] == evil
    assert not re.search(r"https?://|@import|url\((?!#)", content)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
