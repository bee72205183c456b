"""What training takes from Ray's internals is where it was: the first test to fail when a version of Ray moves it."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "dlopt/train/cluster/ray_internals.py"
TAKEN = [
    (node.module, alias.name)
    for node in ast.walk(ast.parse(FILE.read_text()))
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ray")
    for alias in node.names
]


@pytest.mark.parametrize(("module", "name"), TAKEN, ids=[name for _, name in TAKEN])
def test_it_is_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


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
