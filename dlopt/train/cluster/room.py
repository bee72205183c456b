"""What a cluster has, and how many workers there is room for, on each node and in all. Room is asked for by placement groups: they wait in
Ray's own queue, are seen by its autoscaler, and are given whole, so that two jobs cannot hold half of what each of them needs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from dlopt.part import DloptError
from dlopt.train.cluster.ray_internals import group_of, limits

Node = dict[str, float]
"""CPUs and GPUs, by Ray's names, of a node or of a worker."""
SETTLE = 1.0
"""Seconds in which more workers than the least may find room, before a group of elastic workers sets out."""
ARRIVE = 15.0
"""The same, for as many as there was room for just before: an earlier group of workers gives back what it held, and that takes a while."""
ROUNDING = 1e-9


@dataclass(frozen=True)
class Need:
    """What a group of workers takes."""

    least: int
    most: int
    """Workers."""
    worker: Node
    """For each of them."""
    stream: bool = False
    """Whether one CPU more is needed, for what feeds them all."""

    def bundles(self) -> list[Node]:
        """Of the least of workers."""
        return [self.worker] * self.least + [{"CPU": 1.0}] * self.stream

    def total(self) -> Node:
        """Of the least of workers."""
        return {name: sum(bundle.get(name, 0) for bundle in self.bundles()) for name in self.worker}

    def alone(self, nodes: list[Node]) -> int:
        """How many workers fit on nodes that do nothing else, without what feeds them."""
        return sum(int(min(node.get(name, 0) / amount for name, amount in self.worker.items()) + ROUNDING) for node in nodes)

    def fitting(self, nodes: list[Node]) -> int:
        """How many workers fit on nodes that do nothing else."""
        if not self.stream:
            return self.alone(nodes)
        places = [place for place, node in enumerate(nodes) if node.get("CPU", 0) >= 1]
        return max((self.alone([_less(node, here == place) for here, node in enumerate(nodes)]) for place in places), default=0)


def nodes() -> list[Node]:
    """What each node has that is alive; of a cluster that grows by itself, the most that it can have, as if it were one node; without a
    cluster this machine."""
    if not ray.is_initialized():
        return [{"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}]
    if limit := limits():
        return [{name: float(amount) for name, amount in limit.items()}]
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def refuse_never(need: Need, nodes: list[Node]) -> None:
    """Raises DloptError when there can never be room for the least of workers."""
    workers, less = f"{need.least} worker{'s' * (need.least != 1)}", "lower workers or cpus_per_worker"
    for name, amount in need.worker.items():
        wanted, there = need.least * amount, sum(node.get(name, 0) for node in nodes)
        if wanted > there + ROUNDING:
            needed = f"{workers} need{'s' * (need.least == 1)} {_said({name: wanted})}"
            mended = less if name == "CPU" else "lower workers"
            raise DloptError(f"resources.workers: {needed} and the cluster has {there:g}: {mended}")
    if need.alone(nodes) < need.least:
        each = f"{_said(need.worker)}{' each' * (need.least > 1)}"
        raise DloptError(f"resources.workers: {workers} of {each} cannot be placed on the nodes ({_counted(nodes)}): {less}")
    if need.fitting(nodes) < need.least:
        raise DloptError(
            f"resources.feed: a stream needs a CPU beside those of {workers}, and the cluster has "
            f"{sum(node.get('CPU', 0) for node in nodes):g}: {less}, or use feed: resident"
        )


def _less(node: Node, one: bool) -> Node:
    """Without one of its CPUs."""
    return node | {"CPU": node["CPU"] - 1} if one else node


def _counted(nodes: list[Node]) -> str:
    """2 with 4 CPUs, 1 with 8 CPUs and 1 GPU."""
    said = [_said({name: node[name] for name in ("CPU", "GPU") if node.get(name)}) or "nothing" for node in nodes]
    return ", ".join(f"{said.count(one)} with {one}" for one in sorted(set(said)))


def _said(node: Node) -> str:
    return " and ".join(f"{amount:g} {name}{'s' * (amount != 1)}" for name, amount in node.items())


@dataclass
class Room:
    """Places that have been asked for, for the least of workers together and for each worker more."""

    first: list[Any] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)

    @classmethod
    def ask(cls, need: Need, more: int, least: bool = True) -> Room:
        """For the least of workers together, if so, and for each of `more`."""
        first = [placement_group(need.bundles())] if least else []
        return cls(first, [placement_group([need.worker]) for _ in range(more)])

    def enough(self) -> bool:
        """Whether there is room for the least of workers."""
        return all(place.wait(0) for place in self.first)

    def more(self) -> int:
        """For how many more there is."""
        return sum(place.wait(0) for place in self.others)

    def settled(self, promised: int = 0) -> int:
        """For how many more there is, once no more can be expected at once. promised: for so many there was room just before."""
        began = time.monotonic()
        while (more := self.more()) < len(self.others) and time.monotonic() - began < (ARRIVE if more < promised else SETTLE):
            time.sleep(0.05)
        return more

    def leave(self) -> None:
        """Give all of it back."""
        for place in self.first + self.others:
            remove_placement_group(place)


def waiting_for(need: Need) -> str:
    """Why a group of workers has to wait: waiting for 2 CPUs: 1 of 4 is free."""
    free, there, wanted = ray.available_resources(), ray.cluster_resources(), need.total()
    name = next((name for name, amount in wanted.items() if free.get(name, 0) < amount), "CPU")
    now = free.get(name, 0)
    return f"waiting for {_said({name: wanted[name]})}: {now:g} of {there.get(name, 0):g} {'is' if now == 1 else 'are'} free"


def places() -> set[str]:
    """Of all jobs that hold some or wait for it."""
    return {name for name, group in placement_group_table().items() if group["state"] != "REMOVED"}


def sweep(before: set[str]) -> None:
    """Give back places of this driver that were not there before: a controller that was killed leaves those of its workers."""
    mine = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        if group["state"] != "REMOVED" and name not in before and name.endswith(mine):
            remove_placement_group(group_of(name))
