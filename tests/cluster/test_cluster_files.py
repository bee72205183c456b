"""cluster/ and deploy/kubernetes: files hold to Ray's and KubeRay's own schemas, and what they start is asked for a token."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlopt import cli
from tests.commands import ROOT
from tests.manifests import FILES, documents, faults

LAUNCHER = sorted((ROOT / "cluster").glob("*.yaml"))
KUBERAY = [*sorted((ROOT / "cluster" / "kuberay").glob("*.yaml")), *sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))]
MANIFESTS = [(path.stem, found) for path in KUBERAY for found in documents(path) if found["kind"] in FILES]


def prepared(path: Path) -> dict[str, Any]:
    """A launcher's file as `ray up` reads it, with its defaults; raises what it would."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    found: dict[str, Any] = prepare_config(yaml.safe_load(path.read_text()))
    found.setdefault("cluster_synced_files", [])
    validate_config(found)
    return found


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
def test_ray_up_takes_the_launchers_files(path: Path) -> None:
    found = prepared(path)
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = found[name][-1]
        assert "RAY_AUTH_MODE=token" in start and "--disable-usage-stats" in start, name
        assert "\n" not in start
    assert "--num-cpus=0" in found["head_start_ray_commands"][-1]
    assert "~/.ray/auth_token" in found["file_mounts"]
    types = found["available_node_types"]
    assert all(kind["max_workers"] >= kind.get("min_workers", 0) for kind in types.values())


@pytest.mark.parametrize("path", [path for path in LAUNCHER if path.stem != "on-premise"], ids=lambda path: path.stem)
def test_clouds_have_spot_workers_of_both_groups_and_a_head_that_stays(path: Path) -> None:
    types = prepared(path)["available_node_types"]
    spot = {"aws": "'MarketType': 'spot'", "gcp": "'provisioningModel': 'SPOT'"}[path.stem]
    assert {name for name, kind in types.items() if spot in str(kind["node_config"])} == {"cpu", "gpu"}
    assert types["gpu"]["resources"]["GPU"] == 1 and types["cpu"]["labels"] == {"dlopt/group": "cpu"}


def test_a_wrong_key_in_a_launchers_file_is_seen(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(
        (ROOT / "cluster" / "aws.yaml").read_text().replace("idle_timeout_minutes", "idle_timeout_minuets")
    )
    with pytest.raises(Exception, match="idle_timeout_minuets"):
        prepared(tmp_path / "wrong.yaml")


@pytest.mark.parametrize(("name", "manifest"), MANIFESTS, ids=[name for name, _ in MANIFESTS])
def test_manifests_hold_to_the_schemas(name: str, manifest: dict[str, Any]) -> None:
    assert faults(manifest) == []


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (("spec", "rayVersoin"), "spec.rayVersoin: unknown key"),
        (
            ("spec", "headGroupSpec", "template", "spec", "containers", 0, "imag"),
            ".template.spec.containers.0.imag: unknown key",
        ),
        (("spec", "authOptions", "mode"), "spec.authOptions.mode: 'x' is not one of ['disabled', 'token']"),
    ],
    ids=["top", "deep", "value"],
)
def test_a_wrong_key_in_a_manifest_is_one_line(place: tuple[Any, ...], says: str) -> None:
    manifest = copy.deepcopy(dict(MANIFESTS)["ray-cluster"])
    at = manifest
    for part in place[:-1]:
        at = at[part]
    at[place[-1]] = "x"
    (found,) = faults(manifest)
    assert found.endswith(says)


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def containers(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield from group["template"]["spec"]["containers"]


@pytest.mark.parametrize(("name", "manifest"), MANIFESTS, ids=[name for name, _ in MANIFESTS])
def test_clusters_ask_for_a_token_and_their_containers_are_bounded(name: str, manifest: dict[str, Any]) -> None:
    cluster = cluster_of(manifest)
    assert cluster["authOptions"]["mode"] == "token" and cluster["networkPolicy"]["mode"] == "DenyAllIngress"
    assert cluster["rayVersion"] == version("ray")
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for container in containers(cluster):
        assert container["resources"]["limits"].keys() == container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert container["image"].endswith(f":{version('dlopt')}")
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_probes_of_a_cluster_are_python_that_ray_answers_without_a_token() -> None:
    public = ("52365/api/local_raylet_healthz", "8265/api/gcs_healthz")
    for container in containers(cluster_of(dict(MANIFESTS)["ray-cluster"])):
        for probe in ("readinessProbe", "livenessProbe"):
            python, flag, code = container[probe]["exec"]["command"]
            compile(code, "probe", "exec")
            assert (python, flag) == ("python", "-c") and public[0] in code


def test_what_a_service_serves_is_an_application_of_ray_serve() -> None:
    from ray.serve.schema import ServeDeploySchema

    found = ServeDeploySchema.model_validate(yaml.safe_load(dict(MANIFESTS)["ray-service"]["spec"]["serveConfigV2"]))
    (application,) = found.applications
    module, name = application.import_path.split(":")
    assert callable(getattr(import_module(module), name)) and application.args["keys"]  # type: ignore[index]


def test_what_a_job_runs_is_a_command_of_dlopt() -> None:
    job = dict(MANIFESTS)["ray-job"]
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[0] == "dlopt"
    cli._options(words[1:])
    assert (ROOT / "jobs" / Path(words[2]).name).is_file()
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
