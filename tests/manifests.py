"""Kubernetes manifests against the schemas of their custom resources: an unknown key is a fault, as `kubectl --validate` has it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from tests.conftest import SHARED, missing

CRDS = SHARED / "data" / "kuberay-crds"
FILES = {"RayCluster": "rayclusters.yaml", "RayJob": "rayjobs.yaml", "RayService": "rayservices.yaml"}
OPEN = "x-kubernetes-preserve-unknown-fields"


def documents(path: Path) -> list[dict[str, Any]]:
    """Of a file of manifests."""
    return [found for found in yaml.safe_load_all(path.read_text()) if found]


def faults(manifest: dict[str, Any]) -> list[str]:
    """What the schema of its kind has against it, a line each: `spec.rayVersoin: unknown key`."""
    found = []
    for error in _validator(manifest["kind"], manifest["apiVersion"].partition("/")[2]).iter_errors(manifest):
        where = ".".join(str(part) for part in error.absolute_path)
        if error.validator == "additionalProperties":
            keys = sorted(set(error.instance) - set(error.schema["properties"]))
            found += [f"{where}.{key}: unknown key" for key in keys]
        else:
            found.append(f"{where}: {error.message.splitlines()[0]:.120}")
    return found


@cache
def _validator(kind: str, version: str) -> Draft202012Validator:
    if not CRDS.is_dir():
        missing(f"there are no schemas of KubeRay at {CRDS}")
    definition = yaml.load((CRDS / FILES[kind]).read_bytes(), yaml.CSafeLoader)
    (schema,) = [one["schema"]["openAPIV3Schema"] for one in definition["spec"]["versions"] if one["name"] == version]
    return Draft202012Validator(_strict(schema))


def _strict(schema: Any) -> Any:
    """As JSON Schema, with unknown keys refused where the API server would drop them."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {
        key: {name: _strict(one) for name, one in value.items()} if key == "properties" else _strict(value) for key, value in schema.items()
    }
    if strict.get("properties") and "additionalProperties" not in strict and not strict.get(OPEN):
        strict["additionalProperties"] = False
    if strict.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
    return strict
