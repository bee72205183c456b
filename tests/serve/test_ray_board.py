"""What is served on several machines, in an actor of Ray."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dlopt.part import DloptError
from dlopt.serve import Serve
from dlopt.serve.models.lineup import Entry, Version, begun, deployed, rolled_back
from dlopt.serve.watch.metrics import Family
from tests.served import make_export

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


COUNTED: list[Family] = [("rows", "Rows", "counter", [("rows_total", (("model", "m"),), 3.0)])]


def test_all_see_one_state_and_a_lost_actor_is_replaced_with_what_they_know(tmp_path: Path) -> None:
    import ray

    from dlopt.serve.servers.ray_board import NAMESPACE, RayBoard

    state = begun([Entry.of(make_export(tmp_path), "m", Serve())])
    one, other = RayBoard("m", state), RayBoard("m", state)
    try:
        assert one.read(-1) == state and other.read(0) is None
        changed = one.change(lambda state: deployed(state, "m", "2", Version(path="/x", digest="d")), "ann", "deploy", model="m")
        assert changed.models["m"].default == "2"
        assert other.read(0) == changed and other.now().revision == 1
        with pytest.raises(DloptError, match="there is no model 'x'; there is m"):
            other.change(lambda state: rolled_back(state, "x"), "ann", "rollback")
        assert [(line["who"], line["what"]) for line in other.lines()] == [("dlopt", "start"), ("ann", "deploy")]
        assert one.tell("here", 1.0, COUNTED) == {"here": (1.0, True, COUNTED)}
        assert list(other.tell("there", 1.0, COUNTED)) == ["here", "there"]
        ray.kill(ray.get_actor("board of m", namespace=NAMESPACE))
        deadline = time.monotonic() + 30
        while True:
            try:
                assert other.now() == changed
                break
            except ray.exceptions.RayActorError:
                assert time.monotonic() < deadline
        assert one.now() == changed
        assert list(other.tell("there", 2.0, COUNTED)) == ["here", "there"]
    finally:
        one.close()
