"""Which module may import which: read from the source, and for what must stay light, seen in a fresh process."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = [
    {"__main__"},
    {"cli"},
    {"sklearn", "docs"},
    {"api"},
    {"cluster", "terminal"},
    {"pipeline", "fields"},
    {"spec"},
    {"compress"},
    {"export", "serve", "report"},
    {"train"},
    {"data"},
    {"models", "optim"},
    {"disk"},
    {"runs"},
    {"artifact", "session", "client"},
    {"remote"},
    {"part", "progress"},
    {"mistakes", "docstrings"},
]
"""From the top down. A module imports what is below it; those in one layer do not import each other."""
RAY = {
    "dlopt.api.scoring",
    "dlopt.data.table.over",
    "dlopt.data.feed.batches",
    "dlopt.data.feed.dealer",
    "dlopt.data.sources.reading",
    "dlopt.train.worker",
    "dlopt.train.cluster.group",
    "dlopt.train.cluster.room",
    "dlopt.train.cluster.ray_internals",
    "dlopt.serve.servers.cluster",
    "dlopt.serve.servers.ray_board",
    "dlopt.session",
    "dlopt.cluster.doctor",
    "dlopt.cluster.head",
    "dlopt.cluster.submit",
}
"""The only modules in which Ray appears."""


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "dlopt").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """What a module imports, at its top or in a function; not what only the type checker sees."""
    found: set[str] = set()
    for node in _run(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: a relative import"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                found.add(below if below in MODULES else str(node.module))
    return found


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below `if TYPE_CHECKING:`."""
    yield node
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield from _run(child)


def package(name: str) -> str:
    """cli of dlopt.cli, data of dlopt.data.feed.batches."""
    return name.split(".")[1]


def depth(name: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if package(name) in layer)


def roots(name: str) -> set[str]:
    return {imported.partition(".")[0] for imported in imports(name)}


def test_every_module_has_its_layer() -> None:
    assert {package(name) for name in MODULES if name != "dlopt"} == set().union(*LAYERS)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "dlopt"])
def test_imports_go_down_only(name: str) -> None:
    up = [
        imported
        for imported in imports(name)
        if imported.startswith("dlopt.") and package(imported) != package(name) and depth(imported) <= depth(name)
    ]
    assert up == []


def test_the_arrows_are_there_to_be_seen() -> None:
    assert "dlopt.pipeline" in imports("dlopt.cli.check")  # in a function
    assert "dlopt.data.prepared" in imports("dlopt.export.proof")
    assert "ray.data" in imports("dlopt.data.feed.dealer")
    assert "dlopt.data.augment" in imports("dlopt.data.feed.sampler") and "ray" not in roots("dlopt.data.feed.sampler")
    assert depth("dlopt.cli") < depth("dlopt.spec") < depth("dlopt.train.loop.steps") < depth("dlopt.models.mlp") < depth("dlopt.part")


def test_ray_is_imported_where_it_is_used_and_nowhere_else() -> None:
    assert {name for name in MODULES if "ray" in roots(name)} <= RAY <= set(MODULES)


def test_torch_stays_out_of_the_nouns_and_out_of_what_a_replica_imports() -> None:
    heavy = {"torch", "ray"}
    for name in ("dlopt.part", "dlopt.artifact", "dlopt.session", "dlopt.runs", "dlopt.progress"):
        assert "torch" not in roots(name)
    seen, todo = set(), ["dlopt.serve.front.application"]
    while todo:
        name = todo.pop()
        if name in MODULES and name not in seen:
            seen.add(name)
            assert not heavy & roots(name), name
            todo += imports(name)
    assert "dlopt.data.kinds" in seen


def test_the_loop_and_the_models_know_no_ray() -> None:
    for name in (
        "dlopt.train.loop.steps",
        "dlopt.train.loop.objectives",
        "dlopt.train.checkpoint.state",
        "dlopt.models",
        "dlopt.optim.schedules",
    ):
        assert not {"ray", "ray.train", "ray.data"} & imports(name)


def loaded(module: str) -> set[str]:
    """The packages that a fresh process has loaded after an import."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


def test_a_replica_starts_without_torch_and_ray() -> None:
    assert not {"torch", "ray", "onnx", "pyarrow"} & loaded("dlopt.serve.front.application")


def test_the_command_line_answers_without_anything_heavy() -> None:
    assert not {"torch", "ray", "numpy", "pydantic", "yaml", "rich"} & loaded("dlopt.cli")


@pytest.mark.parametrize("module", ["dlopt.part", "dlopt.artifact", "dlopt.runs", "dlopt.session", "dlopt.export", "dlopt.serve"])
def test_the_nouns_load_neither_torch_nor_ray(module: str) -> None:
    assert not {"torch", "ray", "numpy"} & loaded(module)
