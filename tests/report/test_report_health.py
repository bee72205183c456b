"""The health of training in the report: findings, figures of layers, how they began, and the range test."""

from __future__ import annotations

import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dlopt.report import health, layered
from tests.conftest import program
from tests.report.test_report import FLAGS, Run, digits, fit_of, make

__all__ = ["digits"]  # a fixture

SPREAD = {"mean": 0.001, "std": 0.05, "min": -0.1, "max": 0.1}
SWEEP = {"rates": [1e-5, 1e-4, 1e-3, 1e-2, 1e-1], "losses": [2.3, 2.2, 1.5, 0.8, 9.0], "suggested": 0.003}


def named(count: int) -> list[str]:
    return [f"body.{2 * place + 1}" for place in range(count)]


def look(step: int, layers: list[str], gradient: list[float | None], findings: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    columns = {"weights": [1.0] * len(layers), "update": [0.01] * len(layers), "ratio": [0.01] * len(layers), "dead": [0.0] * len(layers)}
    line = {"epoch": 1, "step": step, "loss": 2.0, "gradient_norm": 1.0, "layers": layers, "gradient": gradient} | columns
    return line | {"findings": findings or []}


def finding(step: int, kind: str, layers: list[str], says: str) -> dict[str, Any]:
    return {"step": step, "kind": kind, "layers": layers, "says": says}


def start(layer: str, std: float | None, zero: float = 0.0) -> dict[str, Any]:
    outputs = {"mean": 0.5, "std": std}
    return {
        "layer": layer,
        "kind": "Linear 64->64",
        "weights": SPREAD,
        "outputs": outputs,
        "activations": outputs | {"zero": zero, "saturated": 0.25},
    }


VANISHING = finding(
    20, "vanishing", named(13), "vanishing gradient: hardly any of it reaches body.1, body.3, ... body.25 (13 layers); use relu"
)
NOTHING = "\N{EN DASH}"
DECAYING: list[float | None] = [10.0**-place for place in range(20)][::-1]
LINES = [
    look(1, named(20), DECAYING),
    look(20, named(20), DECAYING, [VANISHING]),
    {"epoch": 1, "step": 77, "findings": [finding(77, "spike", [], "loss spike: 14, 30 times the 0.47 of the steps before; look")]},
    {"epoch": 1, "step": 200, "rollback": "epoch 2, step 290: the loss blew up", "rate": 1e-4},
]


def with_health(run: Run, home: Path, lines: list[dict[str, Any]], starts: Any = None, sweep: Any = None) -> Run:
    """The run with these files in its model."""
    files = {name: run.model.read(name) for name in run.model.manifest.files}
    files["health.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines).encode()
    files |= {name: json.dumps(found).encode() for name, found in (("layers.json", starts), ("range.json", sweep)) if found}
    return replace(run, model=make(home / "watched", "model", run.model.info, files, fit_of(epochs=3)))


def test_findings_are_a_table_and_the_first_ones_are_said_at_the_top(digits: Run, tmp_path: Path) -> None:
    found = with_health(digits, tmp_path, LINES).write(tmp_path / "report.html")
    assert found.tables["findings"][1:] == [
        ["20", "vanishing gradient", ", ".join(named(13)), "hardly any of it reaches body.1, body.3, ... body.25 (13 layers); use relu"],
        ["77", "loss spike", NOTHING, "14, 30 times the 0.47 of the steps before; look"],
        ["200", "went back", NOTHING, "epoch 2, step 290: the loss blew up: back to the end of epoch 1, and on at a rate of 0.0001"],
    ]
    assert "3 findings about training vanishing gradient: hardly any of it reaches" in found.text[: found.text.index("The kept weights")]
    assert {"#health"} <= {link["href"] for link in found.all("a")}


def test_a_model_without_such_files_has_no_such_part(digits: Run, tmp_path: Path) -> None:
    found = digits.write(tmp_path / "report.html")
    assert "Health" not in found.text
    assert "#health" not in {link["href"] for link in found.all("a")}


def test_healthy_training_says_so(digits: Run, tmp_path: Path) -> None:
    found = with_health(digits, tmp_path, [look(1, named(2), [1.0, 2.0]), look(2, named(2), [0.5, 0.25])]).write(tmp_path / "report.html")
    assert "Nothing was found in 2 looks at the layers" in found.text
    assert "findings" not in found.tables
    labels = [element["aria-label"] for element in found.all("div") if "aria-label" in element]
    assert "Gradient norm by layer, 2 layers, steps 1 to 2; at the last one from 0.25 (body.3) to 0.5 (body.1)." in labels
    assert "Size of a step against the weights, 2 layers, steps 1 to 2; at the last one from 0.01 (body.1) to 0.01 (body.1)." in labels


def test_what_a_restart_has_said_again_is_shown_once_and_each_spike_by_itself() -> None:
    spikes = [finding(step, "spike", [], f"loss spike: {step}") for step in (77, 300)]
    lines = [
        *LINES[:2],
        look(120, named(20), DECAYING, [VANISHING | {"step": 120}]),
        *({"step": one["step"], "findings": [one]} for one in spikes),
    ]
    assert [(found.step, found.what) for found in health.findings(lines)] == [
        ("20", "vanishing gradient"),
        ("77", "loss spike"),
        ("300", "loss spike"),
    ]


def test_layers_at_the_start_have_their_spread_and_a_bar_of_it(digits: Run, tmp_path: Path) -> None:
    starts = [start("body.1", 0.2, zero=0.5), start("body.3", 0.05), start("body.5", None)]
    found = with_health(digits, tmp_path, [], starts).write(tmp_path / "report.html")
    assert found.tables["starts"][0] == ["layer", "kind", "weights", "", "activations", "", "zero", "saturated"]
    assert found.tables["starts"][1] == ["body.1", "Linear 64->64", "0.001 ± 0.05", "", "0.5 ± 0.2", "", "50.0 %", "25.0 %"]
    assert found.tables["starts"][3][4] == "0.5 ± not finite"
    assert [(one.weights_bar, one.activations_bar) for one in health.starting(starts)] == [(1, 1), (1, 0.25), (1, 0)]


def test_the_range_test_shows_the_rate_that_it_suggests(digits: Run, tmp_path: Path) -> None:
    found = with_health(digits, tmp_path, [], None, SWEEP).write(tmp_path / "report.html")
    assert "Range test: a learning rate of 0.003" in found.text
    labels = [element["aria-label"] for element in found.all("div") if "aria-label" in element]
    assert "Loss at learning rates from 1e-05 to 0.1: least 0.8 at 0.01; suggested 0.003." in labels


def lines_of(svg: str) -> list[str]:
    return re.findall(r'<path d="M ([^"]*)" clip-path[^>]*stroke: var\(--(?:accent|second)\)', svg)


def test_few_layers_are_lines_with_their_names_and_many_are_a_map() -> None:
    few = layered.by_layer("g", [1, 2, 5], named(4), np.ones((4, 3)) * np.arange(1, 5)[:, None])
    assert len(lines_of(few)) == 4
    assert "<image" not in few
    assert re.findall(r">(body\.\d)</text>", few) == named(4)
    many = layered.by_layer("g", [1, 2, 5], named(7), np.ones((7, 3)))
    assert lines_of(many) == []
    assert many.count("<image") == 2  # the map and its scale
    assert re.findall(r">(body\.\d+)</text>", many) == named(7)


def test_names_beside_lines_do_not_touch() -> None:
    svg = layered.by_layer("g", [1, 2], named(5), np.ones((5, 2)) * np.array([1.0, 1.001, 1.002, 1.003, 50.0])[:, None])
    heights = sorted(float(height) for height in re.findall(r'y="([\d.]+)"[^>]*>body', svg))
    assert len(heights) == 5
    assert min(np.diff(heights)) > 9


def test_forty_layers_over_ten_thousand_looks_are_a_small_figure() -> None:
    values = np.random.default_rng(0).lognormal(0, 3, (40, 10_000))
    svg = layered.by_layer("g", list(range(1, 10_001)), named(40), values)
    assert len(svg) < 60_000
    assert len(re.findall(r">(body\.\d+)</text>", svg)) == 40


@pytest.mark.parametrize("layers", [2, 20])
def test_values_that_are_zero_or_not_finite_have_their_place(layers: int) -> None:
    values = np.full((layers, 3), math.nan)
    assert len(layered.by_layer("g", [1, 2, 5], named(layers), values)) > 1000
    values[0] = 0.0
    assert len(layered.by_layer("g", [1, 2, 5], named(layers), values)) > 1000
    values[1] = 1e30
    assert len(layered.by_layer("g", [1], named(layers), values[:, :1])) > 1000
    context = health.context([look(1, named(layers), [None, 0.5, *[0.0] * (layers - 2)])], [], None)
    assert context is not None
    assert "1 values not finite" in context["figures"][0].alt


def test_a_layer_that_is_not_in_every_look_has_gaps() -> None:
    lines = [look(1, ["a"], [1.0]), look(2, ["a", "b"], [1.0, 2.0])]
    context = health.context(lines, [], None)
    assert context is not None
    assert context["figures"][0].alt.endswith("from 1 (a) to 2 (b); 1 values not finite.")


def test_long_names_show_as_many_parts_from_their_end_as_fit() -> None:
    assert layered.short("body.1") == "body.1"
    assert layered.short("body.encoder.blocks.3.attention.query") == "…3.attention.query"
    assert layered.short("body.encoder.hidden12.branch.linear") == "…hidden12.branch.linear"
    assert layered.short("a" * 30) == "…" + "a" * 23


def test_the_page_with_it_stands_alone_and_the_same_files_give_the_same_bytes(digits: Run, tmp_path: Path) -> None:
    run = with_health(digits, tmp_path, LINES, [start("body.1", 0.2)], SWEEP)
    found = run.write(tmp_path / "report.html")
    content = (tmp_path / "report.html").read_bytes()
    run.write(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == content
    assert b"<script" not in content
    assert not re.search(rb"https?://|@import|url\((?!#)", content)
    refers = [value for _, attributes in found.elements for name, value in attributes.items() if name in ("src", "href", "xlink:href")]
    assert all(value.startswith(("data:", "#")) for value in refers)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in refers if value.startswith("#")} <= set(ids)


def test_what_layers_are_called_is_never_markup(digits: Run, tmp_path: Path) -> None:
    evil = "<script>1</script>"
    lines = [look(5, [evil, "b"], [1.0, 2.0], [finding(5, "dead", [evil], f"dead units: all of {evil}")])]
    with_health(digits, tmp_path, lines, [start(evil, 0.1)]).write(tmp_path / "report.html")
    assert "<script" not in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_the_map_in_light_and_dark(digits: Run, tmp_path: Path, dark: bool) -> None:
    with_health(digits, tmp_path, LINES, [start("body.1", 0.2)], SWEEP).write(tmp_path / "report.html")
    flags = [*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", (tmp_path / "report.html").as_uri()]
    done = subprocess.run([program("chromium", "chromium-browser", "google-chrome"), *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Content Security Policy" not in done.stderr
    seen = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    hottest = np.array(layered.HOT) * 255
    assert (abs(seen - hottest).max(axis=2) < 6).sum() > 1000  # the last layers' rows, and the end of the scale
