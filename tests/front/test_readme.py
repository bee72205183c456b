"""What the README and the documentation say is so: the job, the tree, the example of a new part, and the commands that CI runs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from pydantic import TypeAdapter

from dlopt import docs
from dlopt.models import Model
from dlopt.models.layers import ACTIVATIONS, DROPOUTS, INITS
from dlopt.models.norms import NORMS
from dlopt.optim import optimizers_library
from dlopt.optim.averages import Averaging
from dlopt.optim.constraints import Clip
from dlopt.optim.optimizers import Optimizer
from dlopt.optim.schedules import Schedule
from dlopt.train.loop.losses import LossPart
from tests.commands import ROOT

README = (ROOT / "README.md").read_text()
PAGES = "\n".join(path.read_text() for path in sorted(docs.PAGES.glob("*.md")))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str, text: str = README) -> list[str]:
    return [text for kind, text in FENCE.findall(text) if kind == language]


def test_the_readme_is_short_and_points_at_what_is_there() -> None:
    assert len(README.encode()) <= 8000
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 15 and [link for link in links if not (ROOT / link).is_file()] == []


def test_the_job_in_the_readme_is_the_main_job() -> None:
    (job,) = [found for text in blocks("yaml") if "data" in (found := yaml.safe_load(text))]
    assert job == yaml.safe_load((ROOT / "jobs" / "mnist.yaml").read_text())


def test_the_two_commands_install_and_run_and_ci_runs_the_second() -> None:
    first, second = (text.strip() for text in blocks("")[:2])
    assert first == "pip install -e '.[samples]' && dlopt run jobs/mnist.yaml"
    install, run = second.split(" && ")
    steps = (ROOT / ".ci" / "run").read_text().splitlines()
    assert install.replace("pip install", "pip install -q") in steps
    assert any(line.split()[:1] == [run] for line in steps)


def test_the_tree_names_every_file_and_no_other() -> None:
    (tree,) = [text for text in blocks("text", PAGES) if text.startswith("dlopt/\n")]
    named = set(re.findall(r"[\w/]+\.(?:py|html)", tree))
    files = {path for kind in ("py", "html") for path in (ROOT / "dlopt").rglob(f"*.{kind}") if not path.name.startswith("__")}
    folded = (
        "api",
        "cli",
        "docs",
        "models",
        "optim",
        "report",
        "sources",
        "types",
        "kinds",
        "clean",
        "table",
        "stats",
        "feed",
        "augment",
        "loop",
        "parallel",
        "checkpoint",
        "measure",
        "watch",
        "servers",
        "front",
        "inference",
        "client",
        "cluster",
        "progress",
        "track",
        "protocols",
        "export",
        "platforms",
        "compress",
    )  # a line for the whole folder
    there = {path.name for path in files if path.parent.name not in folded}
    assert [name for name in folded if f"{name}/" not in tree] == []
    assert {Path(name).name for name in named} == there


def test_the_optimizer_of_the_pages_is_a_class_and_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = [text for text in blocks("python", PAGES) if "class Adan" in text]
    source = Path(optimizers_library.__file__).read_text()
    last = next(line for line in source.splitlines() if line.startswith("Library = "))
    assert last.removeprefix("Library = ") in example
    (tmp_path / "with_another_optimizer.py").write_text(source.replace(last, example, 1))
    monkeypatch.syspath_prepend(tmp_path)
    changed = importlib.import_module("with_another_optimizer")
    part = TypeAdapter(changed.Library).validate_python({"kind": "adan", "lr": "3e-4"})
    weights = torch.nn.Parameter(torch.ones(2))
    optimizer = part.build([weights])
    weights.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 3e-4
    assert 0 < 1 - float(weights.detach().max()) < 1e-3


UNIONS = {"model": Model, "optimizer": Optimizer, "schedule": Schedule, "loss": LossPart, "clip": Clip, "average": Averaging}


def kinds(union: Any) -> list[str]:
    """Of all parts in a union of unions."""
    if hasattr(union, "model_fields"):
        return [union.model_fields["kind"].default]
    return [kind for inner in get_args(union) for kind in kinds(inner)]


@pytest.mark.parametrize("union", UNIONS.values(), ids=UNIONS.keys())
def test_every_kind_of_part_is_named(union: Any) -> None:
    found = kinds(union)
    assert len(found) == len(set(found)) > 1
    assert [kind for kind in found if f"`{kind}`" not in PAGES and f"{{kind: {kind}}}" not in PAGES] == []


@pytest.mark.parametrize("table", [ACTIVATIONS, INITS, DROPOUTS, NORMS], ids=["activation", "init", "dropout", "norm"])
def test_every_line_of_a_table_is_named(table: dict[str, Any]) -> None:
    assert [name for name in table if f"`{name}`" not in PAGES] == []


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_job_says_what_it_shows_and_is_in_the_readme(path: Path) -> None:
    assert f"jobs/{path.name}" in README
    assert f"dlopt run jobs/{path.name}" in path.read_text()
