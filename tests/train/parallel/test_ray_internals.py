"""What training takes from Ray's internals is where it was: the first test to fail when a version of Ray moves it."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FILE = Path(__file__).parents[3] / "dlopt/train/cluster/ray_internals.py"
TAKEN = [
    (node.module, alias.name)
    for node in ast.walk(ast.parse(FILE.read_text()))
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ray")
    for alias in node.names
]


@pytest.mark.parametrize(("module", "name"), TAKEN, ids=[name for _, name in TAKEN])
def test_it_is_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def pip(*words: str) -> str | None:
    """What it says, or None where it fails."""
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, timeout=240, check=False)
    return done.stdout if done.returncode == 0 else None


LOOK = """
import importlib, json, sys
missing = [f"{module}.{name}" for module, name in json.loads(sys.argv[1]) if not hasattr(importlib.import_module(module), name)]
import ray
print(json.dumps([ray.__version__, missing]))
"""


@pytest.mark.slow
def test_it_is_there_in_the_newest_ray_that_the_package_index_has(tmp_path: Path, record_property: Callable[[str, str], None]) -> None:
    said = pip("index", "versions", "ray")
    found = re.search(r"ray \(([\d.]+)\)", said or "")
    if not found:
        pytest.skip("no package index tells the versions of ray")
    newest, folder = found[1], tmp_path / "ray"
    if newest != importlib.metadata.version("ray") and pip("install", "--no-deps", "--target", str(folder), f"ray=={newest}") is None:
        pytest.skip(f"ray {newest} cannot be installed here")
    environment = os.environ | {"PYTHONPATH": str(folder)}
    taken = json.dumps([*TAKEN, *(("ray.train.torch", name) for name in ("TorchTrainer", "TorchConfig", "get_device"))])
    done = subprocess.run([sys.executable, "-c", LOOK, taken], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    version, missing = json.loads(done.stdout.splitlines()[-1])
    record_property("the newest ray", version)
    assert (version, missing) == (newest, [])


def test_training_takes_nothing_from_them_elsewhere() -> None:
    found = {
        path.name
        for path in FILE.parents[1].rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and any(part.startswith("_") and part != "__future__" for part in (node.module or "").split("."))
    }
    assert found == {FILE.name}


def test_ray_train_still_calls_what_is_overridden() -> None:
    from ray.train.torch import TorchTrainer

    from dlopt.train.cluster.ray_internals import FixedScalingPolicy, WorkerCallback

    for owner, methods in (
        (TorchTrainer, ("_create_default_callbacks", "_initialize_and_run_controller")),
        (FixedScalingPolicy, ("after_controller_start", "_maybe_send_resource_request")),
        (WorkerCallback, ("after_init_train_context",)),
    ):
        assert [name for name in methods if not hasattr(owner, name)] == []
