"""torch.compile in training: the same curve but for the last digits where it can be done, and one line where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.artifact import Artifact
from dlopt.data.feed.batches import Batch
from dlopt.models import Cnn, Mlp, Network
from dlopt.models.preprocess import Preprocess
from dlopt.optim.optimizers import Adam
from dlopt.part import DloptError
from dlopt.train.job import Fit, Resources, Train
from dlopt.train.loop.compiled import Compiled, compile_network
from dlopt.train.loop.losses import loss_of
from dlopt.train.loop.objectives import supervised
from dlopt.train.watch import metrics_log
from dlopt.train.watch.metrics_log import STARTS
from dlopt.train.worker import Assignment, Worker
from tests import sets
from tests.conftest import program
from tests.models.test_models import image
from tests.train.loop.test_worker import CPU, prepared

OBJECTIVE = supervised(loss_of(None, sets.THREE, nn.Identity()), 0, 0, 1)
SIGNATURE = sets.signature(sets.NUMBERS, target=sets.THREE)


@pytest.fixture(autouse=True)
def cached(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is compiled lies nowhere else."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
    yield
    torch._dynamo.config.suppress_errors = False
    torch._dynamo.reset()


@pytest.fixture
def compiler() -> None:
    """Of C++, which torch's needs on a CPU."""
    program(os.environ.get("CXX", "g++"))


def work(fit: Fit, data: Artifact, out: Path, compiled: bool) -> list[str]:
    """Train; what was warned of."""
    out.mkdir(parents=True)
    Worker(Assignment(fit=fit, data=data.path, out=out, feed="resident", resources=Resources(compile=compiled)), 0, 1, CPU).run()
    (start,) = metrics_log.read(out / STARTS)
    return start["warnings"]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics_log.read(out / metrics_log.NAME) if "loss" in line]


def section(model: Any) -> Fit:
    return Fit(seed=1, model=model, augment=(), train=Train(epochs=2, batch_size=32, optimizer=Adam(lr=1e-2), log_every=1))


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_compiled_network_follows_the_curve_of_the_plain_one(tmp_path: Path) -> None:
    data, fit = prepared(tmp_path), section(Mlp(hidden=(16, 16), norm="batch", dropout=0.2))
    assert work(fit, data, tmp_path / "plain", compiled=False) == []
    assert work(fit, data, tmp_path / "compiled", compiled=True) == []
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    names = [(tmp_path / name / "weights.safetensors").read_bytes()[8:400] for name in ("plain", "compiled")]
    assert names[0] == names[1]  # the header has the names and shapes
    looks = [[line for line in metrics_log.read(tmp_path / name / "health.jsonl") if "layers" in line] for name in ("plain", "compiled")]
    assert [line["dead"] for line in looks[0]] == [line["dead"] for line in looks[1]] and looks[0][0]["dead"][0] is not None


def test_convolutions_on_a_cpu_are_left_alone_and_it_is_said(tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, sets.signature(image(8, 8, 1), target=sets.THREE))
    (said,) = work(section(Cnn(channels=(4,))), data, tmp_path / "out", compiled=True)
    assert said.startswith("resources.compile: the network is trained as it is, not compiled: torch's compiler spoils the memory of conv")
    assert len(losses(tmp_path / "out")) == 20


class Odd(nn.Module):
    """What torch's compiler is lost with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return lost(self.linear(torch.cat([inputs[name][:, :3] for name in inputs], dim=1)))


@torch.library.custom_op("tests::lost", mutates_args=())
def lost(values: Tensor) -> Tensor:
    """It has no rule for what comes out of it but running it."""
    return values.clone()


lost.register_autograd(lambda ctx, gradient: gradient)


@lost.register_fake
def _(values: Tensor) -> Tensor:
    raise RuntimeError("no shape of this can be known")


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_graph_that_cannot_be_compiled_is_told_of_in_one_line_and_leaves_no_trace() -> None:
    network = Network(Preprocess(SIGNATURE, {"numbers": sets.fitted(sets.NUMBERS)}), Odd(), nn.Identity())
    inputs = {name: torch.from_numpy(values) for name, values in sets.inputs_of(SIGNATURE, 16).items()}
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.random.get_rng_state()
    said = compile_network(network, SIGNATURE.inputs, OBJECTIVE, Batch(inputs, torch.arange(16) % 3, 16))
    assert said is not None and said.startswith("resources.compile: the network is trained as it is") and "\n" not in said
    assert not isinstance(network.forward, Compiled)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in network.parameters())


PROGRAM = """
import json, sys
from pathlib import Path
from tests.train.loop.test_compiled import losses, prepared, section, work
from dlopt.models import Mlp
home = Path(sys.argv[1])
said = work(section(Mlp(hidden=(16,), dropout=0.0)), prepared(home), home / "out", compiled=True)
print(json.dumps({"said": said, "losses": losses(home / "out")}))
"""


@pytest.mark.slow
def test_without_a_compiler_there_is_one_line_and_the_same_bits(tmp_path: Path) -> None:
    work(section(Mlp(hidden=(16,), dropout=0.0)), prepared(tmp_path / "plain"), tmp_path / "plain" / "out", compiled=False)
    environment = os.environ | {"CXX": "/nothing/here", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "bare")],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (said,) = found["said"]
    assert said.startswith("resources.compile: the network is trained as it is, not compiled: ") and "compiler" in said
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr and len(done.stderr) < 300
    assert found["losses"] == losses(tmp_path / "plain" / "out")


@pytest.mark.parametrize("other", [{"checkpoint_activations": True}, {"parallelism": "fsdp"}])
def test_what_works_block_by_block_is_refused_to_be_compiled(other: dict[str, Any]) -> None:
    with pytest.raises(DloptError, match="works block by block, which cannot be compiled: take one of them out"):
        Resources(compile=True, **other)
