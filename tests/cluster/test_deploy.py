"""deploy/: images, alerts and dashboards hold to what dlopt and Ray have, and a server runs with what its image installs and no more."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from packaging.requirements import Requirement

from dlopt.train.progress.track.prometheus import COUNTERS, GAUGES
from tests.commands import ROOT, environment
from tests.conftest import program
from tests.served import free_port, make_export

DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.rglob("*Dockerfile"))
RULES = sorted((DEPLOY / "prometheus").glob("*.rules.yml"))
REQUIREMENTS = [Requirement(line) for line in (DEPLOY / "serve-requirements.txt").read_text().splitlines() if line and line[0] != "#"]


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", path.read_text())
    return [(line.split()[0], line.partition(" ")[2]) for line in text.splitlines() if line and not line.startswith("#")]


def complaints(found: list[tuple[str, str]]) -> Iterator[str]:
    """What hadolint would say of it, by the numbers of its rules."""
    for name, rest in found:
        if name == "FROM" and (":" not in rest or ":latest" in rest):
            yield f"DL3006 no tag: {rest}"
        if name == "ADD":
            yield f"DL3020 COPY for files: {rest}"
        if name == "RUN" and "pip install" in rest and "--no-cache-dir" not in rest:
            yield f"DL3042 --no-cache-dir: {rest}"
        if (
            name == "RUN"
            and "apt-get install" in rest
            and ("--no-install-recommends" not in rest or "rm -rf /var/lib/apt/lists" not in rest)
        ):
            yield f"DL3009/DL3015: {rest}"
        if name in ("CMD", "ENTRYPOINT") and not rest.startswith("["):
            yield f"DL3025 exec form: {rest}"
        if name == "RUN" and re.search(r"\b(sudo|curl .*\| *sh)\b", rest):
            yield f"DL3004/DL4006: {rest}"
        if name == "WORKDIR" and not rest.startswith("/"):
            yield f"DL3000 absolute: {rest}"
    users = [rest for name, rest in found if name == "USER"]
    if not users or users[-1] in ("root", "0"):
        yield "DL3002 last user is root"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_have_nothing_against_them(path: Path) -> None:
    found = instructions(path)
    assert list(complaints(found)) == []
    for name, rest in found:
        if name == "COPY" and not rest.startswith("--from"):
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest


def test_a_bad_dockerfile_is_seen() -> None:
    bad = [("FROM", "python"), ("ADD", "a b"), ("RUN", "pip install x"), ("RUN", "apt-get install x"), ("CMD", "dlopt"), ("WORKDIR", "x")]
    assert len(list(complaints(bad))) == 7


def test_the_ranges_of_the_slim_image_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {requirement.name: requirement.specifier for requirement in map(Requirement, project["dependencies"])}
    for requirement in REQUIREMENTS:
        there = metadata.version(requirement.name)
        assert requirement.specifier.contains(there), requirement
        if requirement.name not in ("uvicorn", "httptools"):  # which come with Ray Serve
            assert requirement.specifier == asked[requirement.name], requirement


def closure(requirements: list[Requirement]) -> set[str]:
    """Names of the distributions that pip would install."""
    todo, found = [requirement.name for requirement in requirements], set[str]()
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name not in found:
            found.add(name)
            needs = [Requirement(line) for line in metadata.requires(name) or []]
            todo += [one.name for one in needs if not one.marker or one.marker.evaluate({"extra": ""})]
    return found


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LEFT_OUT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from dlopt.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_server_runs_with_what_its_image_installs(tmp_path: Path) -> None:
    there = closure(REQUIREMENTS) | {"dlopt"}
    modules = metadata.packages_distributions()
    left_out = sorted(module for module, names in modules.items() if not there & {name.lower().replace("_", "-") for name in names})
    assert {"torch", "ray", "onnx", "matplotlib", "pandas"} <= set(left_out)
    export = make_export(tmp_path)
    (tmp_path / "digits-1").mkdir()
    record = {"name": "digits", "created": "2026", "metrics": {}, "artifacts": {"export.onnx": f"../{export.path.relative_to(tmp_path)}"}}
    (tmp_path / "digits-1" / "run.json").write_text(json.dumps(record))
    (tmp_path / "digits-1" / "job.yaml").write_text("serve: {drain_seconds: 0}\n")
    port = free_port()
    command = [sys.executable, "-c", WITHOUT.replace("LEFT_OUT", repr(set(left_out))), "serve", "digits", "--home", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), cwd=ROOT
    )
    assert process.stdout
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if line.startswith("Ctrl-C"):
                break
        else:
            raise AssertionError("".join(said))
        body = {"instances": [[[0] * 28] * 28]}
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/models/digits:predict", json=body, trust_env=False, timeout=30)
        assert reply.status_code == 200 and reply.json()["predictions"][0]["label"] in range(10)
        assert httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).status_code == 200
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def queries() -> dict[str, str]:
    """All that alerts and dashboards ask: where it stands to the query."""
    found = {}
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            found |= {f"{path.name} {rule['alert']}": rule["expr"] for rule in group["rules"]}
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            found |= {f"{path.name} {panel['title']} {target['refId']}": target["expr"] for target in panel["targets"]}
    return found


def exposed() -> set[str]:
    """Series that training and Ray show."""
    ray = Path(str(importlib.util.find_spec("ray").submodule_search_locations[0])) / "dashboard" / "modules" / "metrics" / "dashboards"  # type: ignore[union-attr,index]
    text = "".join((ray / f"{name}_dashboard_panels.py").read_text() for name in ("default", "data"))
    training = {*GAUGES, "metric", "layer_norm", *(f"{name}_total" for name in COUNTERS)}
    return {f"dlopt_train_{name}" for name in training} | set(re.findall(r"\bray_[a-z_]+\b", text)) | {"up", "ALERTS"}


def test_every_series_that_is_asked_for_is_one_that_is_shown() -> None:
    shown = exposed()
    asked = {where: set(re.findall(r"\b(?:ray|dlopt)_[a-z_]+\b", query)) for where, query in queries().items()}
    assert len(asked) > 35 and all(names or "up{" in queries()[where] for where, names in asked.items())
    assert {where: names - shown for where, names in asked.items() if names - shown} == {}


def test_prometheus_takes_its_files_and_each_alert_fires_when_its_fault_is_made(tmp_path: Path) -> None:
    promtool = program("promtool")
    for name in ("prometheus", "serving"):
        shutil.copytree(DEPLOY / name, tmp_path / "deploy" / name)
    for name in ("ray-token", "key"):
        (tmp_path / "deploy" / "prometheus" / name).write_text("x")
    records = [{"record": f"panel:{place}", "expr": query.replace("$", "")} for place, query in enumerate(queries().values())]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "alerts.yml", tmp_path / "tests")
    for words in (
        ["check", "config", "deploy/prometheus/prometheus.yml"],
        ["check", "rules", "panels.yml"],
        ["test", "rules", "tests/alerts.yml"],
    ):
        ended = subprocess.run([promtool, *words], capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    tested = (ROOT / "tests" / "alerts.yml").read_text()
    alerts = [rule["alert"] for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
    assert [name for name in alerts if f'alertname="{name}"' not in tested] == []


def test_alerts_say_how_to_mend() -> None:
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"].keys() == {"summary", "mend"}


def test_dashboards_are_as_they_were_written() -> None:
    spec: Any = importlib.util.spec_from_file_location("write", DEPLOY / "grafana" / "write.py")
    write = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(write)
    for name in write.DASHBOARDS:
        assert (DEPLOY / "grafana" / "dashboards" / f"{name}.json").read_text() == write.text(name), "python deploy/grafana/write.py"
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert write.dashboard("training")["panels"][0]["datasource"]["uid"] == source["uid"]


def test_the_compose_file_names_what_is_there_and_opens_loopback_alone() -> None:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for name, service in found["services"].items():
        assert ":" in service["image"] and not service["image"].endswith(":latest"), name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert set(service.get("secrets", ())) <= set(found["secrets"])
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in found["volumes"] or (DEPLOY / source).exists() or source == "../runs", volume
    build = found["services"]["serve"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()


@pytest.mark.slow
def test_the_slim_image_is_small(tmp_path: Path, record_property: Any) -> None:
    """Its Python packages, installed as its Dockerfile says."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [str(tmp_path / "venv" / "bin" / "pip"), "install", "-q", "--no-cache-dir", "--no-compile"]
    subprocess.run([*pip, "-r", str(DEPLOY / "serve-requirements.txt")], check=True, timeout=600)
    subprocess.run([*pip, "--no-deps", str(ROOT)], check=True, timeout=600)
    size = sum(path.stat().st_size for path in (tmp_path / "venv").rglob("*") if path.is_file() and not path.is_symlink())
    record_property("MB of the slim image's environment", round(size / 1e6))
    assert size < 600e6
    said = subprocess.run([str(tmp_path / "venv/bin/dlopt"), "serve", "--help"], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert said.returncode == 0, said.stderr
