"""A Ray cluster of several nodes on this machine, which come and go: in a process of its own, with an environment of its own.

The head has no CPUs, so that whatever trains is on the other nodes, and the driver is not.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.commands import ROOT, environment
from tests.served import descendants

HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""A node that is gone is noticed within about 5 seconds."""
SETTINGS = HEALTH | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}


class Nodes:
    """Talks to the process that holds the cluster."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.count = process, 0
        self.address = self._heard()

    def add(self, cpus: int = 1) -> None:
        """A node more."""
        self.count += 1
        self._asked(f"add {cpus}")

    def drain(self, worker: int, seconds: float) -> None:
        """Announce that the node of this process goes away in so many seconds."""
        self._asked(f"drain {worker} {seconds}")

    def take(self, cpus: int) -> None:
        """Another job takes CPUs, on one node."""
        self._asked(f"take {cpus}")

    def give_back(self) -> None:
        """It has ended."""
        self._asked("give_back")

    def _asked(self, line: str) -> str:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._heard()

    def _heard(self) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("nodes: "):
                return line.removeprefix("nodes: ").strip()
        raise RuntimeError(f"the cluster has ended: exit code {self.process.wait()}")


@contextmanager
def cluster(count: int, mark: str) -> Iterator[Nodes]:
    """A cluster with so many nodes of one CPU, whose processes bear a mark; all are ended afterwards."""
    words = [sys.executable, "-m", "tests.nodes"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(words, cwd=ROOT, env=environment(**SETTINGS, DLOPT_CHAOS=mark), **pipes)
    try:
        nodes = Nodes(process)
        for _ in range(count):
            nodes.add()
        yield nodes
    finally:
        process.communicate(timeout=60)  # the end of its input is the end of the cluster


class _Held:
    """The cluster, in the process that holds it; each method is a command."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes: list[Any] = []
        self.taken: list[Any] = []
        ray.init(address=self.cluster.address, log_to_driver=False)

    def add(self, cpus: str) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=int(cpus), object_store_memory=80 * 2**20))

    def drain(self, worker: str, seconds: str) -> None:
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        node = next(node for node in self.nodes if int(worker) in descendants(node.all_processes["raylet"][0].process.pid))
        deadline = int((time.time() + float(seconds)) * 1000)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = GcsClient(address=self.cluster.address).drain_node(node.node_id, reason, "a test", deadline)
        assert accepted, why

    def take(self, cpus: str) -> None:
        import ray

        class Other:
            def there(self) -> None: ...

        self.taken.append(ray.remote(num_cpus=int(cpus))(Other).remote())
        ray.get(self.taken[-1].there.remote())

    def give_back(self) -> None:
        import ray

        for other in self.taken:
            ray.kill(other)
        self.taken = []

    def close(self) -> None:
        import ray

        ray.shutdown()
        self.cluster.shutdown()


def main() -> None:
    """Hold a cluster until the input ends; the answer to each command is a line."""
    held = _Held()
    try:
        print(f"nodes: {held.cluster.address}", flush=True)
        for line in sys.stdin:
            name, *words = line.split()
            commands: dict[str, Callable[..., None]] = {
                "add": held.add,
                "drain": held.drain,
                "take": held.take,
                "give_back": held.give_back,
            }
            commands[name](*words)
            print("nodes: done", flush=True)
    finally:
        held.close()


if __name__ == "__main__":
    main()
