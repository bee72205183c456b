"""State of optimizers as tensors and JSON: training goes on from it to the last bit."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from dlopt.optim.groups import Group, Parameters
from dlopt.optim.optimizers import Adam
from dlopt.optim.wrappers import Lookahead
from dlopt.train.checkpoint.packing import optimizer_state, pack, pieces, restore_optimizer, unpack
from tests.cases import crossed
from tests.driven import PARTS, Small, advance, batches, named, weights

pytestmark = pytest.mark.usefixtures("one_thread")

PARAMETERS = Parameters(groups=(Group(names="output.*", weight_decay=0.02),))


def through_a_file(state: Any) -> Any:
    tensors, rest = pack(state)
    written, said = save(tensors), json.dumps(rest, allow_nan=False)
    return unpack(load(written), json.loads(said))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


def test_what_is_packed_comes_back_as_it_was() -> None:
    filters = torch.randn(4, 3, 2, 5).to(memory_format=torch.channels_last)
    shared = torch.arange(6.0)
    state = {
        0: {"step": torch.tensor(3.0), "filters": filters, "turned": torch.randn(3, 4).T, "half": torch.ones(2, dtype=torch.bfloat16)},
        "groups": [{"betas": (0.9, 0.1 + 0.2), "fused": True, "foreach": None, "k": 7, "kind": "x", "nothing": [], "none": ()}],
        "numbers": [math.inf, -math.inf, math.nan, 1e-320, -0.0],
        "twice": [shared, shared, shared[2:4], torch.zeros(0)],
    }
    found = through_a_file(state)
    assert same(state, found)
    assert found[0]["filters"].stride() == filters.stride()
    assert found[0]["turned"].stride() == (1, 4)
    assert math.copysign(1, found["numbers"][-1]) == -1


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot pack a set"):
        pack({"where": {1, 2}})


def fresh(part: Any, dtype: torch.dtype, seed: int, ahead: Lookahead | None = None) -> tuple[Small, torch.optim.Optimizer]:
    network = Small(dtype, seed)
    grouped = part.kind != "lbfgs" and part.kind != "rprop"
    optimizer = part.build((PARAMETERS if grouped else Parameters()).of(network, part))
    return network, ahead.wrap(optimizer) if ahead else optimizer


def assert_goes_on(part: Any, dtype: torch.dtype, before: int, ahead: Lookahead | None = None) -> None:
    """Some steps, a file, a network and an optimizer made anew, and five steps are as good as all of them at once."""
    network, optimizer = fresh(part, dtype, 1, ahead)
    feed, other_feed = batches(dtype), batches(dtype)
    advance(network, optimizer, feed, before)
    state, values = through_a_file(optimizer_state(optimizer)), weights(network)
    other, restored = fresh(part, dtype, 99, ahead)
    advance(other, restored, batches(dtype), 2)  # what it was before must not matter
    other.load_state_dict(values)
    restore_optimizer(restored, state)
    for _ in range(before):
        next(other_feed)
    advance(network, optimizer, feed, 5)
    advance(other, restored, other_feed, 5)
    assert same(weights(network), weights(other))
    assert same(optimizer_state(optimizer), optimizer_state(restored))
    assert not same(values, weights(network))


@pytest.mark.parametrize(
    ("part", "dtype"), crossed(PARTS, [torch.float32, torch.float64], ids=[list(map(named, PARTS)), ["float32", "float64"]])
)
def test_training_goes_on_to_the_last_bit(part: Any, dtype: torch.dtype) -> None:
    assert_goes_on(part, dtype, 5)


@pytest.mark.parametrize("part", PARTS, ids=named)
def test_training_goes_on_from_before_its_first_step(part: Any) -> None:
    assert_goes_on(part, torch.float32, 0)


@pytest.mark.parametrize("part", [part for part in PARTS if part.kind in ("sgd", "adam", "muon", "sophia", "prodigy")], ids=named)
def test_slow_weights_go_on_to_the_last_bit(part: Any) -> None:
    assert_goes_on(part, torch.float32, 4, Lookahead(steps=3))


def test_state_of_a_fused_optimizer_lies_as_its_parameter_does_wherever_it_comes_from() -> None:
    """Saved for filters that lie in rows, restored for the same ones channels last: each element keeps its place."""
    start = torch.randn(4, 3, 2, 5)
    gradients = torch.randn(6, *start.shape)
    found = []
    for last in (False, True):
        parameter = nn.Parameter(start.clone())
        optimizer = Adam().build([parameter])
        for index, gradient in enumerate(gradients):
            if last and index == 3:
                state = through_a_file(optimizer_state(optimizer))
                parameter = nn.Parameter(parameter.detach().to(memory_format=torch.channels_last))
                optimizer = Adam().build([parameter])
                restore_optimizer(optimizer, state)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
            optimizer.step()
        found.append(parameter.detach())
    assert found[1].stride() != found[0].stride()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-7)


def test_what_was_restored_from_stays_as_it_was() -> None:
    network, optimizer = fresh(Adam(), torch.float32, 1)
    advance(network, optimizer, batches(), 2)
    state = through_a_file(optimizer_state(optimizer))
    kept = through_a_file(state)
    restore_optimizer(optimizer, state)
    advance(network, optimizer, batches(), 2)
    assert same(state, kept)


def test_a_file_is_written_piece_by_piece_and_read_by_the_library_to_the_bit() -> None:
    """No piece is a copy of more than a tensor that does not lie in order."""
    dtypes = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64]
    tensors = {str(dtype): (100 * torch.rand(3, 5)).to(dtype) for dtype in dtypes}
    tensors |= {"turned": torch.rand(4, 6).T, "single": torch.tensor(2.5), "none": torch.zeros(0, 3), "half of one": torch.rand(8)[4:]}
    written = [bytes(piece) for piece in pieces(tensors)]
    found = load(b"".join(written))
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert len(written) == len(tensors)  # the header, and each that has numbers
    large = torch.rand(1000)
    _, piece = pieces({"a": large})
    assert any(piece)
    large.zero_()
    assert not any(piece)  # the same memory
