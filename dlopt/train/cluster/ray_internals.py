"""All that training takes from Ray's internals, which may move with any version of Ray; and what is lost when one of them has gone:

| what                                            | for                                      | without it                          |
|-------------------------------------------------|------------------------------------------|-------------------------------------|
| DatasetsCallback, PlacementGroupCleanerCallback | `SUPERFLUOUS`: two processes less        | a start takes up to 12 s more       |
| FixedScalingPolicy                              | `Unannounced`: one process less          | a start takes 2 s more              |
| WorkerCallback, get_train_context               | `Listening`: notices in the main thread  | no checkpoint before a preemption   |
| Worker...Error                                  | `loss_of`: why a group of workers ended  | losses without room count           |
| limits                                          | `room.nodes`: what a cluster can grow to | refused is what needs it to grow    |
| group_of                                        | `room.sweep`: a killed controller's room | it stays taken until the run's end  |

tests/train/parallel/test_ray_internals.py names what has gone. Below, `dlopt.session` and `dlopt.data.feed.dealer` have three more.
"""

from __future__ import annotations

from typing import Any

from ray._private.state import state
from ray._raylet import PlacementGroupID
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.util.placement_group import PlacementGroup

__all__ = [
    "DatasetsCallback",
    "FixedScalingPolicy",
    "PlacementGroupCleanerCallback",
    "WorkerCallback",
    "WorkerGroupStartupFailedError",
    "WorkerGroupStartupTimeoutError",
    "WorkerHealthCheckFailedError",
    "WorkerHealthCheckTimeoutError",
    "get_train_context",
    "group_of",
    "limits",
]


def limits() -> dict[str, Any] | None:
    """The most of each resource that a cluster which grows by itself can have; None of any other."""
    return state.get_max_resources_from_cluster_config()


def group_of(name: str) -> PlacementGroup:
    """The placement group of a hexadecimal id."""
    return PlacementGroup(PlacementGroupID(bytes.fromhex(name)))
