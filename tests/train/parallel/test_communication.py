"""Two workers that tell each other less than whole gradients after every step: what is lost by it, what is not, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dlopt.artifact import Artifact
from dlopt.models import Mlp
from dlopt.optim.averages import Ema
from dlopt.optim.optimizers import Adam, Lbfgs, Sgd
from dlopt.optim.optimizers_library import ScheduleFreeSgd
from dlopt.optim.wrappers import Lookahead
from dlopt.part import DloptError
from dlopt.train.checkpoint.stores import CHECKPOINTS, Checkpointing, Every
from dlopt.train.job import Fit, Resources, Train, refuse_other_workers
from dlopt.train.loop.gradients import Sharpness
from dlopt.train.parallel import ddp
from dlopt.train.parallel.compression import Bfloat16, PowerSGD, PowerSGDParallel
from dlopt.train.parallel.ddp import DDP
from dlopt.train.parallel.local_sgd import LocalSGD, LocalSGDParallel
from dlopt.train.stage import fit as fit_stage
from dlopt.train.training import Training
from dlopt.train.watch import metrics_log
from dlopt.train.watch.divergence import Divergence
from dlopt.train.watch.metrics_log import STARTS
from dlopt.train.worker import Assignment, Worker
from tests.processes import together
from tests.train.loop.test_worker import CPU, prepared
from tests.trained import curve, fit, prepare_digits, quick

WIDE = Mlp(hidden=(32, 32), dropout=0.2, norm="batch")
PLAIN = Mlp(hidden=(32, 32), dropout=0.0)
SLOW = Sgd(lr=0.05)
POWER = PowerSGD(rank=2, start_step=3)


def section(model: Mlp = PLAIN, **train: Any) -> Fit:
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 32, "optimizer": SLOW, "log_every": 1, "precision": "float64"} | train
    return Fit(seed=1, model=model, augment=(), train=Train(**settings))


KINDS = {
    "power_sgd": {"compression": POWER},
    "local_sgd": {"synchronization": LocalSGD(replicas=2, every=4)},
}
RUNS: dict[str, Fit] = {
    "ddp": section(average=Ema(decay=0.9), l2=0.01, micro_batch_size=8),
    "every_step": section(average=Ema(decay=0.9), l2=0.01, micro_batch_size=8, synchronization=LocalSGD(replicas=2, every=1)),
    "mean": section(synchronization=LocalSGD(replicas=2, every=4)),
    "whole": section(),
    "halved": section(compression=Bfloat16()),
    "scaled": section(precision="float16", synchronization=LocalSGD(replicas=2, every=4)),
    "learned": section(epochs=12, optimizer=Adam(lr=1e-2), monitor="accuracy"),
    "learned_bfloat16": section(epochs=12, optimizer=Adam(lr=1e-2), monitor="accuracy", compression=Bfloat16()),
    "learned_power_sgd": section(epochs=12, optimizer=Adam(lr=1e-2), monitor="accuracy", compression=PowerSGD(rank=2, start_step=6)),
    "learned_local_sgd": section(epochs=12, optimizer=Adam(lr=1e-2), monitor="accuracy", synchronization=LocalSGD(replicas=2)),
}
RUNS |= {
    f"{kind}_{which}": section(WIDE, optimizer=Adam(lr=1e-2), precision="float32", **given)
    for kind, given in KINDS.items()
    for which in ("one", "again", "killed")
}
LEARNED = {name for name in RUNS if name.startswith("learned")}
"""301 rows are ten steps an epoch, which two workers cannot share out evenly."""


class Killed(BaseException):
    """Stands for the end of a process."""


def run(rank: int, home: Path, name: str, found: Fit | None = None, **resources: Any) -> dict[str, Any] | None:
    """What one of two workers does; its process has a group."""
    out = home / name
    out.mkdir(exist_ok=True)
    given = Resources(workers=2, **resources)
    assignment = Assignment(fit=found or RUNS[name], resources=given, data=data_of(home).path, out=out, feed="resident")
    info = Worker(assignment, rank, dist.get_world_size(), CPU).run()
    if info:
        (out / f"info-{rank}.json").write_text(json.dumps(info))
    return info


def data_of(home: Path) -> Artifact:
    return prepared(home, train=301, validation=500)


def died(rank: int, home: Path, name: str, at: int) -> None:
    """A run whose process ends after step `at`; checkpoints are due every five steps."""
    between = Training._between_steps

    def die(training: Training) -> None:
        between(training)
        if training.state.record.step == at:
            raise Killed

    Training._between_steps = die  # type: ignore[method-assign]
    try:
        run(rank, home, name, checkpoint=Checkpointing(every=Every(steps=5)))
    except Killed:
        pass
    finally:
        Training._between_steps = between  # type: ignore[method-assign]
    dist.barrier()


class Counted(TorchDispatchMode):
    """Counts what is exchanged, by whatever."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def counted(rank: int, home: Path, name: str, found: Fit) -> None:
    """Writes for each step whether anything was exchanged in it, and a hash of the weights after it."""
    lines: list[tuple[bool, str]] = []
    between, mode, before = Training._between_steps, Counted(), [0]

    def look(training: Training) -> None:
        between(training)
        weights = torch.cat([value.double().reshape(-1) for value in training.network.state_dict().values()])
        lines.append((mode.count > before[0], repr(weights.tolist())))
        before[0] = mode.count
        if training.state.record.step % 10 == 0:
            before[0] = math.inf  # type: ignore[call-overload]  # what an epoch's end tells is not looked at

    Training._between_steps = look  # type: ignore[method-assign]
    try:
        with mode:
            run(rank, home, name, found)
    finally:
        Training._between_steps = between  # type: ignore[method-assign]
    (home / f"{name}-{rank}.json").write_text(json.dumps(lines[1:10]))  # the first step's exchange may be that of the start


def odd(batch_of: Callable[..., Any], steps: set[int]) -> Callable[..., Any]:
    """The second worker's inputs of some steps of each epoch are not finite."""

    def batches(self: Any, found: Any) -> Any:
        for step, batch in enumerate(batch_of(self, found), start=1):
            broken = self.rank == 1 and step in steps
            yield batch._replace(inputs={"numbers": batch.inputs["numbers"] * math.inf}) if broken else batch

    return batches


def with_odd_batches(rank: int, home: Path, name: str, found: Fit, kind: type, steps: set[int]) -> None:
    batches = kind.batches  # type: ignore[attr-defined]
    kind.batches = odd(batches, steps)  # type: ignore[attr-defined]
    try:
        run(rank, home, name, found)
    except DloptError as error:
        (home / name / f"error-{rank}").write_text(str(error))
    finally:
        kind.batches = batches  # type: ignore[attr-defined]


def low_rank(rank: int, home: Path) -> None:
    """Gradients of a layer of 32 x 24: those of four rows over both workers, and what is sent of many in six steps."""
    torch.manual_seed(10 + rank)
    few, many = torch.randn(2, 24).double(), [torch.randn(40, 24).double() for _ in range(6)]
    weights = torch.randn(40, 32).double()

    def layer() -> nn.Linear:
        torch.manual_seed(3)
        return nn.Linear(24, 32, bias=True).double()

    def gradient(held: DDP, inputs: Tensor) -> Tensor:
        held.network.zero_grad()
        (held.network(inputs) * weights[: len(inputs)]).sum().backward()
        held.reducer.finish()
        return held.network.weight.grad.clone()  # type: ignore[union-attr, operator, no-any-return]

    whole, alike, parallel = (
        DDP(layer(), rank, 2),
        *(PowerSGDParallel(layer(), rank, 2, PowerSGD(rank=of, start_step=0), 5) for of in (4, 2)),
    )
    for held in (whole, alike, parallel):
        held.module()
    true = [gradient(whole, inputs) for inputs in (few, *many)]
    exact, sent = gradient(alike, few), []
    for step, inputs in enumerate(many):
        parallel.begin(step)
        sent.append(gradient(parallel, inputs))
    left = parallel.unsent.errors["weight"].clone()
    dist.all_reduce(left)
    (home / f"low-rank-{rank}.json").write_text(
        json.dumps(
            {
                "exact": (exact - true[0]).norm().item() / true[0].norm().item(),
                "ranks": [int(torch.linalg.matrix_rank(one, rtol=1e-9)) for one in sent],
                "sent_and_left": (sum(sent) + left / 2 - sum(true[1:])).norm().item(),
                "left": left.norm().item(),
            }
        )
    )


def _work(rank: int, world: int, home: Path) -> None:
    low_rank(rank, home)
    for kind in KINDS:
        died(rank, home, f"{kind}_killed", at=19)
    for name in sorted(RUNS.keys() - LEARNED):
        run(rank, home, name)
    counted(rank, home, "counted_ddp", section(WIDE))
    counted(rank, home, "counted_apart", section(WIDE, synchronization=LocalSGD(replicas=2, every=4), log_every=1))
    with_odd_batches(rank, home, "odd_apart", RUNS["mean"], LocalSGDParallel, {3})
    with_odd_batches(rank, home, "odd_power_sgd", section(compression=PowerSGD(rank=2, start_step=0)), PowerSGDParallel, {3})
    lost = section(synchronization=LocalSGD(replicas=2, every=4), divergence=Divergence(most=0))
    with_odd_batches(rank, home, "lost", lost, LocalSGDParallel, set(range(5, 31)))
    (home / "stopped").mkdir(exist_ok=True)
    (home / "stopped" / "stop").write_text("")
    run(rank, home, "stopped", RUNS["mean"])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two workers have left all that they did."""
    folder = tmp_path_factory.mktemp("communication")
    data_of(folder)
    together(2, _work, folder, seconds=480)
    return folder


def _learn(rank: int, world: int, home: Path) -> None:
    for name in sorted(LEARNED):
        run(rank, home, name)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of runs of twelve epochs."""
    folder = tmp_path_factory.mktemp("learned")
    data_of(folder)
    together(2, _learn, folder, seconds=480)
    return folder


def lines(out: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without seconds."""
    return [{name: value for name, value in line.items() if name != "seconds"} for line in metrics_log.read(out / metrics_log.NAME)]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out) if "loss" in line]


def far(one: Path, other: Path) -> float:
    """The largest relative difference of the losses of all steps and epochs."""
    pairs = list(zip(lines(one), lines(other), strict=True))
    assert len(pairs) == 33
    assert all(a.get(name) == b.get(name) for a, b in pairs for name in ("step", "epoch", "rows", "rate"))
    each = [(a["loss"], b["loss"]) for a, b in pairs if "loss" in a]
    each += [(a[split]["loss"], b[split]["loss"]) for a, b in pairs if "train" in a for split in ("train", "validation")]
    return max(abs(a - b) / abs(a) for a, b in each)


def test_replicas_that_synchronise_after_every_step_follow_the_curve_of_ddp(home: Path) -> None:
    """With uneven shares, a penalty, averages and micro-batches."""
    assert far(home / "ddp", home / "every_step") < 1e-9


def test_bfloat16_gradients_follow_the_curve_within_their_digits(home: Path) -> None:
    assert 1e-7 < far(home / "whole", home / "halved") < 1e-2


def test_a_gradient_of_low_rank_is_sent_as_it_is_and_what_is_left_of_others_is_kept_for_later(home: Path) -> None:
    for rank in range(2):
        found = json.loads((home / f"low-rank-{rank}.json").read_text())
        assert found["exact"] < 1e-10
        assert found["ranks"] == [2] * 6
        assert found["sent_and_left"] < 1e-9 < 1 < found["left"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_give_the_same_bits_and_so_does_one_that_was_killed_and_goes_on(kind: str, home: Path) -> None:
    one, again, killed = (home / f"{kind}_{which}" for which in ("one", "again", "killed"))
    assert lines(one) == lines(again) == lines(killed)
    assert len({(out / "weights.safetensors").read_bytes() for out in (one, again, killed)}) == 1
    starts = [json.loads(line)["step"] for line in (killed / STARTS).read_text().splitlines()]
    assert starts == [0, 15 if kind == "power_sgd" else 18]  # due at step 15, which is within the second epoch


def test_nothing_is_exchanged_between_two_synchronisations_and_replicas_differ_there(home: Path) -> None:
    told = {name: [json.loads((home / f"counted_{name}-{rank}.json").read_text()) for rank in range(2)] for name in ("ddp", "apart")}
    exchanged = [[step for step, (told, _) in enumerate(mine, start=2) if told] for mine in told["apart"]]
    assert exchanged == [[4, 8, 10]] * 2
    alike = [step for step, (one, two) in enumerate(zip(*told["apart"], strict=True), start=2) if one[1] == two[1]]
    assert alike == [4, 8, 10]
    assert all(told and one[1] == two[1] for one, two in zip(*told["ddp"], strict=True) for told in (one[0], two[0]))


def test_what_is_not_finite_on_one_replica_is_left_out_there_and_the_run_goes_on(home: Path) -> None:
    for name in ("odd_apart", "odd_power_sgd"):
        found = losses(home / name)
        assert [step for step, loss in enumerate(found, start=1) if loss is None or not math.isfinite(loss)] == [3, 13, 23]
        assert found[-1] < found[0]
        assert (home / name / "weights.safetensors").exists()


def test_a_replica_that_takes_no_more_steps_ends_the_run_on_all_workers_with_the_same_line(home: Path) -> None:
    one, two = ((home / "lost" / f"error-{rank}").read_text() for rank in range(2))
    assert one == two
    assert "epoch 1, step 9: the gradient was not finite for 5 steps in a row" in one


def test_a_run_that_is_told_to_end_ends_with_a_checkpoint_at_the_next_synchronisation(home: Path) -> None:
    assert json.loads((home / "stopped" / "info-0.json").read_text()) == {"stopped": "asked", "steps": 4}
    assert sorted(path.name[7:] for path in (home / "stopped" / CHECKPOINTS).iterdir() if path.is_dir()) == [
        "epoch-00000-batch-000000",
        "epoch-00000-batch-000004",
    ]


def test_replicas_in_float16_agree_on_the_scale_of_the_loss_and_learn(home: Path) -> None:
    found = losses(home / "scaled")
    assert found[-1] < 0.8 * found[0]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bfloat16", "power_sgd", "local_sgd"])
def test_it_learns_as_well_as_with_whole_gradients(how: str, learned: Path) -> None:
    whole, found = (json.loads((learned / name / "info-0.json").read_text())["metrics"] for name in ("learned", f"learned_{how}"))
    assert whole["validation"]["accuracy"] > 0.95
    assert found["validation"]["accuracy"] > whole["validation"]["accuracy"] - 0.02


def test_another_number_of_workers_goes_on_from_what_is_common_with_nothing_unsent(tmp_path: Path) -> None:
    layer = nn.Linear(24, 32)
    with mock.patch.object(ddp, "broadcast"):  # there is nobody else
        parallel = PowerSGDParallel(layer, 1, 2, POWER, 5)
    memory: dict[str, Any] = {
        "errors": [{"weight": torch.full((32, 24), float(rank))} for rank in range(3)],
        "bases": {"weight": torch.ones(24, 2)},
    }
    optimizer = torch.optim.SGD(layer.parameters())
    parallel.recall(memory, optimizer)
    assert parallel.unsent.errors == {}
    assert torch.equal(parallel.unsent.bases["weight"], torch.ones(24, 2))
    del memory["errors"][2]
    parallel.recall(memory, optimizer)
    assert torch.equal(parallel.unsent.errors["weight"], torch.ones(32, 24))


def test_one_worker_sends_nothing_so_that_compression_changes_nothing(tmp_path: Path) -> None:
    def weights(name: str, **train: Any) -> bytes:
        (tmp_path / name).mkdir()
        data = prepared(tmp_path)
        Worker(Assignment(fit=section(epochs=1, **train), data=data.path, out=tmp_path / name, feed="resident"), 0, 1, CPU).run()
        return (tmp_path / name / "weights.safetensors").read_bytes()

    assert weights("plain") == weights("bfloat16", compression=Bfloat16()) == weights("power", compression=PowerSGD(start_step=0))


LOCAL = LocalSGD(replicas=2)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"compression": POWER, "synchronization": LOCAL}, "compression: with synchronization no gradients are sent: keep one of them"),
    ({"compression": Bfloat16(), "optimizer": Lbfgs()}, "optimizer: lbfgs searches along the true gradient: take out compression"),
    ({"compression": POWER, "sharpness": Sharpness()}, "compression: power_sgd makes up .* use bfloat16"),
    ({"compression": POWER, "precision": "float16"}, "compression: power_sgd keeps gradients .* use precision: bfloat16"),
    ({"synchronization": LOCAL, "optimizer": Lbfgs()}, "synchronization: lbfgs must know all steps .* use another optimizer"),
    ({"synchronization": LOCAL, "optimizer": ScheduleFreeSgd()}, "synchronization: schedule_free_sgd must know all steps"),
    ({"synchronization": LOCAL, "lookahead": Lookahead()}, "synchronization: lookahead goes back .* take one of them out"),
]


@pytest.mark.parametrize(("train", "said"), REFUSED)
def test_what_makes_no_sense_together_is_one_line(train: dict[str, Any], said: str) -> None:
    with pytest.raises(DloptError, match=said):
        Train(**train)


@pytest.mark.parametrize(
    ("train", "resources", "said"),
    [
        ({"synchronization": LOCAL}, {"workers": 4}, r"^train\.synchronization: its 2 replicas need resources\.workers: 2, not 4$"),
        ({"synchronization": LOCAL}, {}, r"^train\.synchronization: its 2 replicas need resources\.workers: 2, not auto$"),
        ({"synchronization": LOCAL}, {"workers": (2, 2)}, r"^train\.synchronization: its 2 replicas need .*: 2, not \[2, 2\]$"),
        ({"synchronization": LOCAL}, {"workers": 2, "parallelism": "fsdp"}, r"^train\.synchronization: needs .* ddp, not fsdp$"),
        ({"compression": POWER}, {"workers": 2, "parallelism": "zero"}, r"^train\.compression: needs .*: ddp, not zero$"),
    ],
)
def test_workers_that_cannot_do_it_are_refused_before_anything_runs(
    train: dict[str, Any], resources: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(DloptError, match=said):
        refuse_other_workers(Train(**train), Resources(**resources))
    with pytest.raises(DloptError, match=said):
        fit_stage(section(**train), tmp_path, data_of(tmp_path), resources=Resources(**resources))


@pytest.mark.slow
def test_replicas_learn_digits_as_well_through_the_whole_stage(ray_cluster: None, tmp_path: Path) -> None:
    data = prepare_digits(tmp_path / "data", 2000)
    made = partial(fit, home=tmp_path, data=data, workers=2, feed="resident")
    whole, found = (made(quick(epochs=8, optimizer=Adam(lr=3e-3), synchronization=how)) for how in (None, LocalSGD(replicas=2)))
    assert found.info["metrics"]["validation"]["accuracy"] > whole.info["metrics"]["validation"]["accuracy"] - 0.02
    assert len(curve(found)) == len(curve(whole)) == 400
