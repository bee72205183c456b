"""What a job says of serving. Stays light: a job file is checked without onnxruntime and Ray."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dlopt.part import Part


class Replicas(Part):
    """How many replicas autoscaling may use."""

    min: int = Field(1, ge=1)
    """Replicas that always run."""
    max: int = Field(4, ge=1)
    """Replicas under the heaviest load."""

    @model_validator(mode="after")
    def max_is_at_least_min(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max {self.max} is less than min {self.min}")
        return self


class Serve(Part):
    """How the exported model is served over HTTP."""

    replicas: Annotated[int, Field(ge=1)] | Replicas = 1
    """Copies of the model, each in a process of its own: a number, or {min, max} to scale with the load."""
    provider: Literal["cpu", "cuda", "tensorrt", "openvino"] = "cpu"
    """What onnxruntime computes with; where its build has none of it, the CPU does, and the log says so."""
    threads: int = Field(1, ge=1)
    """CPU threads that one replica computes with; on a cluster it reserves as many CPUs."""
    max_batch: int = Field(64, ge=1)
    """Rows of waiting requests that are run together. Nothing ever waits for a batch to fill."""
    max_rows: int = Field(4096, ge=1)
    """A request with more rows is refused with status 400."""
    max_bytes: int = Field(64 * 2**20, ge=1024)
    """A request body with more bytes is refused with status 413."""
    max_waiting: int = Field(512, ge=1)
    """Requests in one replica at a time; more are refused with status 429."""
    body_seconds: float = Field(30, ge=0.1)
    """A client that takes longer to send its request's head, or its body, gets status 408."""
    request_seconds: float = Field(30, ge=0.1)
    """A request that the model has not answered by then gets status 503."""
    latency_target: float = Field(0.1, gt=0)
    """A batch takes no more rows than run in so many seconds, as far as was measured."""
    drain_seconds: float = Field(5, ge=0)
    """After SIGTERM the server says that it is not ready, and goes on for so long, until whoever sends it requests has noticed."""
    rate: float = Field(0, ge=0)
    """Requests a second of one key, of all replicas of a machine together; more get status 429. 0 is any; a file of keys may say other for
    one."""

    @property
    def least_replicas(self) -> int:
        """Replicas that always run."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas.min

    @property
    def most_replicas(self) -> int:
        """Replicas under the heaviest load."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas.max


def app(arguments: Mapping[str, Any]) -> Any:
    """A Ray Serve application builder: `serve run dlopt.serve:app run=RUN keys=FILE`, and the import path for `serve deploy` and KubeRay.

    arguments: run (a folder, or a job's name), home (the folder of runs), keys (a file of API keys, or none). Raises DloptError.
    """
    return import_module("dlopt.serve.servers.cluster").built(
        arguments
    )  # by its name: a replica imports this module, and must not need Ray
