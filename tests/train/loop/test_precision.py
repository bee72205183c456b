"""Mixed precision: it learns as float32 does, its scale of the loss finds its way, and what is kept and measured stays float32."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from dlopt.artifact import Stage, once
from dlopt.data.feed.batches import Batch
from dlopt.data.prepared import Split, as_table, write_part
from dlopt.models import Cnn, Mlp, TextTransformer
from dlopt.models.norms import BatchNorm, RmsNorm
from dlopt.optim.averages import Ema
from dlopt.optim.constraints import ClipNorm
from dlopt.optim.optimizers import Adam, Lbfgs, Sgd
from dlopt.optim.optimizers_library import Sophia
from dlopt.part import DloptError, Part
from dlopt.train.checkpoint.checkpoints import newest
from dlopt.train.checkpoint.packing import unpack
from dlopt.train.checkpoint.stores import CHECKPOINTS, Disk
from dlopt.train.job import Fit, Train
from dlopt.train.loop.gradients import Sharpness, plain, unscaled
from dlopt.train.loop.losses import loss_of
from dlopt.train.loop.objectives import supervised
from dlopt.train.loop.precision import HIGHEST, LOWEST, LossScale, Precision, mixed, scale_of
from dlopt.train.loop.steps import Step, peaked, steps
from dlopt.train.measure.evaluate import evaluate
from dlopt.train.parallel.ddp import DDP
from dlopt.train.start import load_network
from dlopt.train.watch import metrics_log
from dlopt.train.watch.metrics_log import HEALTH
from tests import sets
from tests.cases import crossed
from tests.models.test_models import image
from tests.processes import together
from tests.train.loop.test_worker import CPU, work

OBJECTIVE = supervised(loss_of(None, sets.TWO, nn.Identity()), 0, 0, 1)
PIXELS = sets.signature(image(8, 8, 1), target=sets.THREE)
WORDS = sets.signature(sets.TEXT, target=sets.THREE)
MODELS = {
    "cnn": (PIXELS, Cnn(channels=(8, 16), hidden=32, dropout=0.0, norm="batch")),
    "text_transformer": (WORDS, TextTransformer(width=32, depth=1, dropout=0.0, norm="rms")),
}


class Bars(Part):
    """How many images of each split."""

    train: int = 2000
    test: int = 2000


def write_bars(section: Bars, out: Path) -> dict[str, Any]:
    """Noise with a brighter row, a brighter column, or both, somewhere: what class an image is of."""
    generator = np.random.default_rng(8)
    (out / "signature.json").write_text(PIXELS.model_dump_json())
    (out / "statistics.json").write_text(json.dumps({PIXELS.inputs[0].name: sets.fitted(PIXELS.inputs[0]).model_dump()}))
    for name, count in {"train": section.train, "validation": 100, "test": section.test}.items():
        images, label = generator.integers(0, 100, (count, 8, 8, 1), dtype=np.uint8), generator.integers(0, 3, count)
        for values, kind, (row, column) in zip(images, label, generator.integers(0, 8, (count, 2)), strict=True):
            if kind != 1:
                values[row] += 100
            if kind != 0:
                values[:, column] += 50
        table = as_table(PIXELS, {PIXELS.inputs[0].name: images, PIXELS.target.name: label})
        write_part(table, PIXELS, out / name / "part-00000.parquet")
    return {}


def section(model: Any, precision: Precision, **train: Any) -> Fit:
    settings: dict[str, Any] = {"epochs": 4, "batch_size": 32, "optimizer": Adam(lr=3e-3), "log_every": 1} | train
    return Fit(seed=1, model=model, augment=(), train=Train(precision=precision, **settings))


def lines(out: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_log.read(out / metrics_log.NAME) if "loss" in line]


def overflows(out: Path) -> list[tuple[int, float]]:
    """Steps that were left out, and the scale from there on."""
    return [(line["step"], line["loss_scale"]) for line in metrics_log.read(out / HEALTH) if "loss_scale" in line]


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_half_precision_learns_to_within_a_percentage_point_of_float32(kind: str, tmp_path: Path) -> None:
    signature, model = MODELS[kind]
    bars = once(Stage("data", write_bars), Bars(), tmp_path)
    data = bars if kind == "cnn" else sets.prepared(tmp_path, signature, noise=0.02, train=2000, test=2000)
    found = {}
    for precision in ("float32", "bfloat16", "float16"):
        info = work(section(model, precision, epochs=8), data, tmp_path / precision)
        found[precision] = info["metrics"]["test"]["accuracy"]
    assert found["float32"] > 0.9  # a third is chance
    assert found["bfloat16"] == pytest.approx(found["float32"], abs=0.01)
    assert found["float16"] == pytest.approx(found["float32"], abs=0.01)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_layers_compute_in_half_precision_and_all_that_is_kept_stays_float32(precision: Precision, tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, PIXELS)
    fit = section(MODELS["cnn"][1], precision, epochs=2, average=Ema())
    info = work(fit, data, tmp_path / "out")
    weights = load_tensors((tmp_path / "out" / "weights.safetensors").read_bytes())
    assert {value.dtype for value in weights.values()} == {torch.float32}
    found, _ = newest(Disk(tmp_path / "out" / CHECKPOINTS))
    assert found
    assert {value.dtype for part in found.tensors.values() for value in part.values() if value.is_floating_point()} == {torch.float32}
    network = load_network(fit, data)
    network.load_state_dict(weights)
    measured = evaluate(network, Split.open(data, "test"), CPU)
    assert measured["loss"] == pytest.approx(info["metrics"]["test"]["loss"], abs=1e-12)  # to digits that half precision has not
    exact = [line["loss"] for line in lines(tmp_path / "out")]
    rough = work(section(MODELS["cnn"][1], "float32", epochs=2, average=Ema()), data, tmp_path / "float32")
    assert rough["steps"] == len(exact)
    others = [line["loss"] for line in lines(tmp_path / "float32")]
    assert exact[0] == pytest.approx(others[0], rel=0.02) and exact[0] != others[0]


class Two(nn.Module):
    """Logits of two classes from numbers called x."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.hidden, self.linear = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.linear(torch.tanh(self.hidden(inputs["x"])))


def batches(count: int, rows: int = 16) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        x = torch.randn(rows, 4, generator=generator)
        found.append(Batch({"x": x}, (x[:, 0] > 0).long(), rows))
    return found


def running(
    model: nn.Module, data: list[Batch], scale: LossScale | None, precision: Precision = "float16", clip: float = 1e9
) -> Iterator[Step]:
    objective, gradient = mixed(OBJECTIVE, precision, CPU, scale), unscaled(plain, scale)
    optimizer = peaked(torch.optim.SGD(model.parameters(), lr=1.0))
    return steps(model, optimizer, data, objective, gradient, lambda _: 0.1, ClipNorm(limit=clip), scale=scale)


def train(model: nn.Module, count: int, scale: LossScale | None, precision: Precision = "float16", clip: float = 1e9) -> list[Step]:
    return list(running(model, batches(count), scale, precision, clip))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def test_a_scale_that_is_too_large_skips_exactly_its_step_and_is_halved() -> None:
    model, scale, data = Two(), LossScale(scale=2.0**10), batches(6)
    done = []
    for step in running(model, data, scale):
        done.append(step)
        if len(done) == 2:
            scale.scale, before = 2.0**24, weights(model)
        if len(done) == 3:
            assert scale == LossScale(2.0**23, 0) and torch.equal(weights(model), before)
            scale.scale = 2.0**10
    assert [step.taken for step in done] == [True, True, False, True, True, True]
    assert [step.overflowed for step in done] == [not step.taken for step in done]
    assert scale == LossScale(2.0**10, 3)
    assert done[2].loss.isfinite() and done[2].loss < 1.5 * math.log(2)  # which no scale changes
    other = Two()
    assert all(step.taken for step in running(other, data[:2] + data[3:], LossScale(scale=2.0**10)))
    assert torch.equal(weights(model), weights(other))


def test_norms_and_clipping_see_gradients_as_they_are_whatever_the_scale() -> None:
    found = []
    for scale in (LossScale(scale=1.0), LossScale(scale=2.0**10)):
        model = Two()
        found.append(([step.norm.item() for step in train(model, 5, scale, clip=0.05)], weights(model)))
    (norms, after), (others, same) = found
    assert norms == others and norms[0] < 10  # a power of 2 changes no digit
    assert torch.equal(after, same)
    model = Two()
    step = train(model, 1, LossScale(scale=2.0**10), clip=0.05)[0]
    assert step.norm.item() > 0.05
    moved = (weights(model) - weights(Two())).norm().item()
    assert moved == pytest.approx(0.1 * 0.05, rel=1e-5)  # the rate times the clipped norm


def test_small_gradients_are_lost_without_a_scale_and_kept_with_it() -> None:
    class Faint(Two):
        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            return super().forward(inputs) * 1e-8

    without, kept = Faint(), Faint()
    assert train(without, 1, None)[0].norm.item() == 0
    assert train(kept, 1, LossScale())[0].norm.item() == pytest.approx(train(Faint(), 1, None, "float32")[0].norm.item(), rel=0.01)


def test_the_scale_doubles_after_two_thousand_good_steps_and_stays_within_bounds() -> None:
    scale = LossScale()
    for _ in range(1999):
        scale.note(True)
    assert scale.scale == 2.0**16
    assert scale.note(True) is False and scale == LossScale(2.0**17, 0)
    scale.note(True)
    assert scale.note(False) is True and scale == LossScale(2.0**16, 0)
    lowest = LossScale(scale=LOWEST)
    assert lowest.note(False) is False and lowest.scale == LOWEST  # the network's doing
    highest = LossScale(HIGHEST, 1999)
    highest.note(True)
    assert highest == LossScale(HIGHEST, 0)
    other = LossScale()
    other.load_state_dict(json.loads(json.dumps(LossScale(2.0**13, 77).state_dict())))
    assert other == LossScale(2.0**13, 77)
    other.load_state_dict({})
    assert other == LossScale()
    assert scale_of("float16") == LossScale() and scale_of("bfloat16") is scale_of("float32") is None


def test_what_overflows_at_the_start_is_logged_and_is_no_divergence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(LossScale, "scale", 2.0**24)
    monkeypatch.setattr(LossScale.__init__, "__defaults__", (2.0**24, 0))
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS), train=300)
    info = work(section(Mlp(hidden=(16,)), "float16", epochs=3), data, tmp_path / "out")
    found = overflows(tmp_path / "out")
    assert len(found) >= 5  # as many as would be a divergence
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    assert [scale for _, scale in found] == [2.0 ** (24 - step) for step, _ in found]
    assert info["rollbacks"] == 0
    assert [line["gradient_norm"] for line in lines(tmp_path / "out")[: len(found)]] == [None] * len(found)
    assert all(line["gradient_norm"] < 100 for line in lines(tmp_path / "out")[len(found) :])
    said = [one for line in metrics_log.read(tmp_path / "out" / HEALTH) for one in line.get("findings", ())]
    assert not [one for one in said if one["kind"] == "not_finite"]


def test_what_no_scale_can_mend_is_a_divergence(tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS), train=300)
    with pytest.raises(DloptError, match="train: training diverges even after"):
        work(section(Mlp(hidden=(16,)), "float16", epochs=3, optimizer=Sgd(lr=1e6)), data, tmp_path / "out")


class Killed(Exception):
    pass


def test_a_resumed_run_has_the_scale_and_the_bits_of_one_that_was_not_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dlopt.train import training
    from dlopt.train.measure import judge

    monkeypatch.setattr(LossScale, "INTERVAL", 6)
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS), train=300)
    fit = section(Mlp(hidden=(16,)), "float16", epochs=4)
    work(fit, data, tmp_path / "whole")

    def killed(state: Any, train: Any, found: Any) -> None:
        judge.judge(state, train, found)
        if state.record.epoch == 3:
            raise Killed

    with monkeypatch.context() as within:
        within.setattr(training, "judge", killed)
        with pytest.raises(Killed):
            work(fit, data, tmp_path / "out")
    store = Disk(tmp_path / "out" / CHECKPOINTS)
    at_kill, _ = newest(store)
    assert at_kill
    scale = unpack({}, at_kill.rest["loss_scale"])
    assert scale["scale"] > 2.0**16 and scale["good"] > 0
    work(fit, data, tmp_path / "out")
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == (tmp_path / "whole" / "weights.safetensors").read_bytes()
    assert overflows(tmp_path / "out") == overflows(tmp_path / "whole")
    out, whole = (newest(Disk(tmp_path / name / CHECKPOINTS))[0] for name in ("out", "whole"))
    assert out and whole and out.rest["loss_scale"] == whole.rest["loss_scale"] != at_kill.rest["loss_scale"]


PARTS_OF_GRADIENTS = {
    "micro batches": {"micro_batch_size": 10},
    "sharpness": {"sharpness": Sharpness()},
    "sophia": {"optimizer": Sophia(lr=0.03)},
    "clip and penalty": {"clip": ClipNorm(), "l2": 1e-4},
}
HALVES = ("bfloat16", "float16")


@pytest.mark.parametrize(("train", "precision"), crossed(list(PARTS_OF_GRADIENTS.values()), HALVES, ids=[list(PARTS_OF_GRADIENTS), HALVES]))
def test_half_precision_goes_with_what_gradients_are_made_of(train: dict[str, Any], precision: Precision, tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS), train=600, test=500)
    found = {}
    for name in ("float32", precision):
        info = work(section(Mlp(hidden=(16,), dropout=0.0), name, epochs=8, **train), data, tmp_path / name)  # type: ignore[arg-type]
        found[name] = info["metrics"]["test"]
    assert found["float32"]["accuracy"] > 0.8
    assert found[precision]["accuracy"] == pytest.approx(found["float32"]["accuracy"], abs=0.02)
    assert found[precision]["loss"] != found["float32"]["loss"]


def test_lbfgs_is_refused_half_precision_in_one_line() -> None:
    with pytest.raises(DloptError, match="precision: lbfgs searches by small differences of the loss, which bfloat16 rounds off"):
        Train(optimizer=Lbfgs(), precision="bfloat16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_of_half_precision_is_that_of_float32_rounded(dtype: torch.dtype) -> None:
    layer, values = RmsNorm(8, 1e-5), torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.autocast("cpu", dtype):
        found = layer(values)
    assert found.dtype == dtype
    torch.testing.assert_close(found, layer(values.float()).to(dtype), rtol=0, atol=0)


def worker(rank: int, world: int, folder: Path) -> None:
    """One of two; a step overflows on worker 1 alone."""
    held, scale = DDP(Two(), rank, world), LossScale(scale=2.0**4)
    model = held.module()
    mine = [batch._replace(inputs={"x": batch.inputs["x"] * (1 + rank)}, total=2 * batch.total) for batch in batches(6)]
    mine[2].inputs["x"].mul_(3e4 if rank == 1 else 1)  # beyond what float16 has: infinite there, an ordinary batch here
    objective, gradient = mixed(OBJECTIVE, "float16", CPU, scale), unscaled(held.gradient(plain), scale)
    optimizer = peaked(torch.optim.SGD(model.parameters(), lr=1.0))
    done = list(steps(model, optimizer, mine, objective, gradient, lambda _: 0.1, scale=scale))
    norm = BatchNorm(3)
    with torch.autocast("cpu", torch.bfloat16):
        values = torch.arange(400.0 * 3).view(400, 3)[rank::2].bfloat16()
        normed = norm(values)
    told = {
        "taken": [step.taken for step in done],
        "overflowed": [step.overflowed for step in done],
        "norms": [step.norm.item() for step in done],
        "finite": [bool(step.loss.isfinite()) for step in done],
        "scale": scale.state_dict(),
        "weights": weights(model).tolist(),
        "dtype": str(normed.dtype),
        "mean": norm.running_mean.tolist(),
    }
    Path(folder, str(rank)).write_text(json.dumps(told))


def test_two_workers_leave_out_the_same_step_though_it_overflows_on_one_alone(tmp_path: Path) -> None:
    together(2, worker, tmp_path)
    zero, one = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert zero["finite"] == [True] * 6 and one["finite"][2] is False
    assert zero["taken"] == one["taken"] == [True, True, False, True, True, True]
    assert zero["overflowed"] == one["overflowed"] == [False, False, True, False, False, False]
    assert zero["scale"] == one["scale"] == {"scale": 2.0**3, "good": 3}
    assert zero["weights"] == one["weights"] and all(math.isfinite(value) for value in zero["weights"])
    assert zero["dtype"] == one["dtype"] == "torch.bfloat16"
    assert zero["mean"] == one["mean"]
    values = torch.arange(400.0 * 3).view(400, 3).bfloat16().float()
    torch.testing.assert_close(torch.tensor(zero["mean"]), 0.1 * values.mean(dim=0), rtol=1e-5, atol=1e-5)
