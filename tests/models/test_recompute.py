"""Activations that are computed again: the same bits in less memory, for each family of networks, and with all that training does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.data.feed.batches import Batch
from dlopt.models import Cnn, FtTransformer, Joint, Mlp, Network, Resnet, TableResnet, TextBag, TextCnn, TextTransformer, Vit, build_network
from dlopt.models.recompute import blocks, recompute
from dlopt.optim.optimizers import Adam
from dlopt.optim.optimizers_library import Sophia
from dlopt.part import Signature
from dlopt.train.job import Fit, Resources, Train
from dlopt.train.loop.gradients import Sharpness, accumulated
from dlopt.train.loop.losses import loss_of
from dlopt.train.loop.objectives import supervised
from dlopt.train.loop.precision import Precision
from dlopt.train.parallel.strategies import Parallelism, parallel_of
from dlopt.train.watch.health import Watch
from dlopt.train.watch.layers import Health
from dlopt.train.worker import Assignment, Worker
from tests import sets
from tests.models.test_models import image
from tests.processes import together
from tests.train.loop.test_worker import CPU

PIXELS = sets.signature(image(16, 16, 3), target=sets.THREE)
TABLE = sets.signature(sets.NUMBERS, sets.CATEGORIES, target=sets.THREE)
WORDS = sets.signature(sets.TEXT, target=sets.THREE)
FAMILIES: dict[str, tuple[Signature, Any, int]] = {
    "mlp": (PIXELS, Mlp(hidden=(64, 64, 64), norm="batch"), 3),
    "residual mlp": (PIXELS, Mlp(hidden=(64, 64, 64), residual=True), 3),
    "cnn": (PIXELS, Cnn(norm="batch", block_dropout=0.1), 3),
    "resnet": (PIXELS, Resnet(stochastic_depth=0.2, dropout=0.1), 7),
    "vit": (PIXELS, Vit(dropout=0.1, stochastic_depth=0.1, pooling="class_token"), 4),
    "text_transformer": (WORDS, TextTransformer(attention_dropout=0.1, hidden=(16,)), 3),
    "text_cnn": (WORDS, TextCnn(), 1),
    "text_bag": (WORDS, TextBag(hidden=(32,)), 2),
    "table_resnet": (TABLE, TableResnet(), 3),
    "ft_transformer": (TABLE, FtTransformer(residual_dropout=0.1), 3),
    "joint": (sets.signature(*sets.EVERYTHING, target=sets.THREE), Joint(hidden=(32, 32)), 6),
}
"""Inputs, a model with dropout, and how many blocks it has."""


def network_of(family: str) -> Network:
    found, model, _ = FAMILIES[family]
    statistics = {feature.name: sets.fitted(feature) for feature in found.inputs if feature.kind in ("image", "number", "date")}
    return build_network(model, found, statistics, seed=3).train()


def inputs_of(family: str, rows: int = 48) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in sets.inputs_of(FAMILIES[family][0], rows, 1).items()}


@contextmanager
def kept() -> Iterator[list[int]]:
    """Bytes that are kept for the way back: now, and at most."""
    bytes_of = [0, 0]

    class Kept:
        def __init__(self, values: Tensor) -> None:
            self.values, self.size = values, values.untyped_storage().nbytes()
            bytes_of[0] += self.size
            bytes_of[1] = max(bytes_of)

        def __del__(self) -> None:
            bytes_of[0] -= self.size

    with torch.autograd.graph.saved_tensors_hooks(lambda values: Kept(values.detach()), lambda one: one.values):
        yield bytes_of


def train(network: nn.Module, inputs: dict[str, Tensor], steps: int = 3) -> tuple[dict[str, Tensor], Tensor, int]:
    """State and random number after some steps, and how many bytes were kept at most."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    target = torch.arange(len(next(iter(inputs.values())))) % 3
    with kept() as bytes_of, torch.random.fork_rng():
        for step in range(steps):
            torch.manual_seed(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs), target).backward()
            drawn = torch.rand(1)
            optimizer.step()
    return {name: value.clone() for name, value in network.state_dict().items()}, drawn, bytes_of[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_come_of_less_memory_under_the_same_names(family: str) -> None:
    plain, again, inputs = network_of(family), network_of(family), inputs_of(family)
    assert recompute(again) == FAMILIES[family][2]
    expected, drawn, most = train(plain, inputs)
    found, same, less = train(again, inputs)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(drawn, same)
    assert less < 0.65 * most
    start = network_of(family).state_dict()
    assert any(not torch.equal(start[name], value) for name, value in found.items())
    assert torch.equal(again.eval()(inputs), plain.eval()(inputs))


class Own(nn.Module):
    """A user's network, with torch's own batch norm, and layers in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3))
        self.more = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(2))
        self.out = nn.Linear(32, 3)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        values = self.first(inputs["x"])
        for layer in self.more:
            values = values + layer(values)
        return self.out(values)


def test_a_network_of_the_users_is_computed_again_child_by_child_and_its_running_statistics_are_updated_once() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain, again = Own(), Own()
    again.load_state_dict(plain.state_dict())
    assert list(blocks(again)) == [again.first, *again.more, again.out]
    recompute(again)
    inputs = {"x": torch.randn(30, 4, generator=torch.Generator().manual_seed(2))}
    expected, _, most = train(plain, inputs)
    found, _, less = train(again, inputs)
    assert expected["first.1.num_batches_tracked"] == found["first.1.num_batches_tracked"] == 3
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert less < most


def test_a_watch_counts_no_row_twice() -> None:
    """Layers that are called once more on the way back are not heard again."""
    found = []
    for again in (False, True):
        network = network_of("residual mlp")
        if again:
            recompute(network)
        with torch.no_grad():
            for name, bias in network.named_parameters():
                if name.endswith("linear.bias"):
                    bias[:5] = -1000.0  # units that give nothing
        watch, inputs = Watch(network, Health()), inputs_of("residual mlp")
        for step in (1, 2):
            torch.manual_seed(step)
            watch.ready(step)
            nn.functional.cross_entropy(network(inputs), torch.arange(48) % 3).backward()
            watch.look(step, 1.0, 1.0)
        found.append({name: idle.tolist() for name, idle in watch.units.idle.items()})
    assert found[0] == found[1] and len(found[0]) == 3
    assert all(rows[:5] == [96] * 5 for rows in found[1].values())


def section(model: Any, precision: Precision = "float32", **train: Any) -> Fit:
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 64, "optimizer": Adam(lr=1e-2), "log_every": 1} | train
    return Fit(seed=1, model=model, augment=(), train=Train(precision=precision, **settings))


def bits(fit: Fit, data: Any, out: Path, again: bool) -> bytes:
    out.mkdir()
    resources = Resources(checkpoint_activations=again)
    Worker(Assignment(fit=fit, data=data.path, out=out, feed="resident", resources=resources), 0, 1, CPU).run()
    return (out / "weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"precision": "bfloat16"},
        {"precision": "float16", "micro_batch_size": 20},
        {"sharpness": Sharpness()},
        {"optimizer": Sophia(lr=1e-2)},
    ],
    ids=["float32", "bfloat16", "float16 in micro batches", "sharpness", "sophia"],
)
def test_a_job_gives_the_same_bits_whatever_else_it_asks_for(train: dict[str, Any], tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS))
    fit = section(Mlp(hidden=(16, 16), norm="batch", dropout=0.2), **train)
    assert bits(fit, data, tmp_path / "plain", False) == bits(fit, data, tmp_path / "again", True)


def worker(rank: int, world: int, folder: Path, parallelism: Parallelism) -> None:
    """One of two; worker 1 has no row of the last batch."""
    found = []
    for again in (False, True):
        network = network_of("mlp").double()
        if again:
            recompute(network)
        parallel = parallel_of(parallelism, network, rank, 2)
        model, optimizer = parallel.module(), torch.optim.SGD(parallel.local.parameters(), lr=0.05)
        objective = supervised(loss_of(None, sets.THREE, nn.Identity()), 0, 0, 2)
        gradient = parallel.gradient(accumulated(10, parallel.partly))
        for step in range(3):
            inputs = {name: values[rank::2] if step < 2 else values[: 48 * (1 - rank)] for name, values in inputs_of("mlp").items()}
            target = torch.arange(len(next(iter(inputs.values())))) % 3
            torch.manual_seed(10 * step + rank)
            optimizer.zero_grad()
            gradient(objective, model, Batch(inputs, target, 48, most=24 if step < 2 else 48))
            optimizer.step()
        found.append({name: value.flatten().tolist() for name, value in parallel.gather(parallel.local.state_dict()).items()})
    Path(folder, str(rank)).write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_two_workers_with_a_batch_norm_and_micro_batches_give_the_same_bits(parallelism: Parallelism, tmp_path: Path) -> None:
    together(2, worker, tmp_path, parallelism)
    plain, again = json.loads((tmp_path / "0").read_text())
    assert plain == again
    start = {name: value.double().flatten().tolist() for name, value in network_of("mlp").state_dict().items()}
    assert list(plain) == list(start) and all(plain[name] != value for name, value in start.items() if "running" in name)
    if parallelism == "ddp":
        assert json.loads((tmp_path / "1").read_text()) == [plain, again]
