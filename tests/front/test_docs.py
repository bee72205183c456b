"""The documentation: it builds without a warning, asks for nothing from elsewhere, and its commands, Python and notebook run."""

from __future__ import annotations

import io
import json
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import dlopt
from dlopt import cli, docs
from dlopt.docs.executed import NOTEBOOK, executed
from tests.commands import here
from tests.packages import package

PAGES = sorted(docs.PAGES.rglob("*.md"))
FENCE = re.compile(r"^```(.*?)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SH, PYTHON = ("sh", "sh cluster", "sh serve", "sh install"), ("python", "python serve", "python sketch")
"""What a block of commands or of Python may be called: those with a second word need a cluster, a server, a fresh environment, or stand
for code of the reader's own, and are not run here as they are."""
LOADED = re.compile(r'<(?:script|img|iframe|source)[^>]*\bsrc="([^"]+)"|<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="([^"]+)"')
TOUR = ("start", "tables", "images", "texts", "python")


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(kind, text) for kind, text in FENCE.findall(page.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_what_it_is_and_every_command_is_one(page: Path) -> None:
    for kind, text in blocks(page):
        language = kind.partition(" ")[0]
        assert kind in {"sh": SH, "python": PYTHON}.get(language, (language,)) and language, f"{kind}\n{text}"
        if language == "python":
            compile(text, str(page), "exec")
        for words in commands(text) if language == "sh" else ():
            cli._options(words)


def commands(text: str) -> list[list[str]]:
    """The words of each `dlopt` command of a block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("dlopt ")]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", TOUR)
def test_the_first_steps_run_as_they_stand(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package("mlxtend", "samples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DLOPT_HOME", raising=False)
    space: dict[str, Any] = {}
    for kind, text in blocks(docs.PAGES / f"{name}.md"):
        if kind == "python":
            exec(compile(text, name, "exec"), space)
        for words in commands(text) if kind == "sh" else ():
            ended = here(capsys, *words)
            assert ended.returncode == 0, ended.stderr


def test_the_site_builds_without_a_warning_and_asks_for_nothing_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package("mkdocs", "docs")
    ended = here(capsys, "docs", "-o", tmp_path / "site")
    assert ended.returncode == 0, ended.stderr
    pages = {str(path.relative_to(tmp_path / "site")): path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "start.html", "notebook.html", "commands.html", "fields/train.html", "how.html", "comparison.html"} <= set(pages)
    for name, page in pages.items():
        loaded = [url for pair in LOADED.findall(page) for url in pair]
        assert [url for url in loaded if "://" in url or url.startswith("//")] == [], name
    assert "What becomes of the learning rate" in pages["fields/train.html"]
    assert "dlopt plot-schedule" in pages["commands.html"]


def test_a_page_is_shown_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    ended = here(capsys, "docs", "start")
    assert ended.returncode == 0 and "Five minutes to a served model" in ended.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_notebook_runs_and_its_predictions_are_those_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell by cell as Jupyter runs it. What is stored are the same cells, executed before, without an error."""
    package("pandas", "sklearn")
    monkeypatch.chdir(tmp_path)
    stored = json.loads(NOTEBOOK.read_text())
    with redirect_stdout(io.StringIO()):
        found, space = executed(stored)
    assert [cell["source"] for cell in found["cells"]] == [cell["source"] for cell in stored["cells"]]
    assert [len(cell.get("outputs", ())) for cell in found["cells"]] == [len(cell.get("outputs", ())) for cell in stored["cells"]]
    run = space["run"]
    assert isinstance(run, dlopt.Run)
    told = run.predict(space["test"])
    predicted = run.predictions
    assert sorted(told["probability"].round(5)) == pytest.approx(sorted(predicted["probability"].to_pylist()), abs=2e-5)
    assert sorted(told["label"]) == sorted(run.signature.target.labels[code] for code in predicted["predicted"].to_pylist())
    shown = [output["data"] for cell in found["cells"] for output in cell.get("outputs", ()) if "data" in output]
    assert any("<iframe" in "".join(data.get("text/html", "")) for data in shown)
