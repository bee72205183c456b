"""A user's own module: in a job, written out and read again, refused where its program does not run, and taken along to other processes."""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from torch import Tensor, nn

from dlopt import spec
from dlopt.artifact import once
from dlopt.data.section import Data
from dlopt.export import Onnx
from dlopt.export.proof import fed
from dlopt.export.stage import EXPORT
from dlopt.models import custom as table
from dlopt.models.custom import Custom, custom, draws_by_row, factory_of, register
from dlopt.part import DloptError, Signature
from dlopt.spec import Job
from dlopt.train.start import trained_network
from tests import sets
from tests.commands import refused
from tests.graphs import beyond_rounding, built, fitted, graph, tensors, without_gradient
from tests.models.test_models import categories, numbers, same
from tests.sets import CATEGORIES, EVERYTHING, LABELS, NUMBERS, TEXT, THREE, TWO, inputs_of, signature


class Tower(nn.Module):
    """Numbers through one hidden layer; categories, if there are any, through an embedding of the first column."""

    def __init__(self, signature: Signature, width: int, shifts: Any = ()) -> None:
        super().__init__()
        self.names = [feature.name for feature in signature.inputs if feature.kind == "number"]
        self.codes = [feature for feature in signature.inputs if feature.kind == "category"]
        self.tables = nn.ModuleList(nn.Embedding(feature.codes[0], 2) for feature in self.codes)
        self.hidden, self.shifts = nn.LazyLinear(width), list(shifts)
        self.out = nn.Linear(width, signature.num_outputs)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        flat = [inputs[name] for name in self.names]
        flat += [table(inputs[feature.name][:, 0]) for feature, table in zip(self.codes, self.tables, strict=True)]
        return self.out(torch.relu(self.hidden(torch.cat(flat, dim=1))))


def net(signature: Signature, width: int = 4) -> nn.Module:
    return Tower(signature, width)


def outputs(signature: Signature, count: int) -> nn.Module:
    return nn.Sequential(Tower(signature, 3), nn.Linear(signature.num_outputs, count))


def nothing(signature: Signature) -> Any:
    return None


FOUND = signature(NUMBERS, CATEGORIES, target=THREE)


def job(model: Any, source: str = "rows.csv") -> Job:
    data = {
        "source": {"kind": "csv", "path": source},
        "inputs": [{"kind": "number", "columns": ["a"]}, {"kind": "category", "columns": ["b"]}],
        "target": {"kind": "category", "column": "label"},
    }
    return Job(name="mine", data=Data.model_validate(data), model=model)


def test_a_network_of_the_users_own_is_built_with_its_settings() -> None:
    built_net = built(custom(Tower, width=7), FOUND)
    assert isinstance(built_net.body, Tower) and built_net.body.hidden.in_features == 3 + 2 and built_net.body.hidden.out_features == 7
    assert built_net(tensors(inputs_of(FOUND, 5))).shape == (5, 3)
    assert built(custom(net), FOUND).body.hidden.out_features == 4
    assert without_gradient(built_net, FOUND) == []


def test_a_seed_gives_the_same_weights_though_lazy_ones_are_made_last() -> None:
    first, again, other = (dict(built(custom(net), FOUND, seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["body.hidden.weight"], other["body.hidden.weight"])


def test_the_graph_of_an_own_network_says_what_torch_says() -> None:
    model = built(custom(net, width=9), FOUND)
    run = graph(model, FOUND)
    for rows in (1, 0, 300):
        some = inputs_of(FOUND, rows)
        assert beyond_rounding(run(some), model, FOUND, some) <= 0


def test_it_is_trained_stored_and_exported_as_any_other_model(tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, FOUND, train=40, validation=20, test=200)
    model = sets.trained(tmp_path, data, custom(net, width=6))
    assert model.manifest.section["model"] == custom(net, width=6).model_dump(mode="json")
    export = once(EXPORT, Onnx(), tmp_path, model, data)
    rows = inputs_of(FOUND, 50)
    (found,) = onnxruntime.InferenceSession(export.path / Onnx.file).run(None, fed(FOUND, rows))
    with torch.no_grad():
        np.testing.assert_allclose(found, trained_network(model, data)(tensors(rows)).softmax(dim=1).numpy(), atol=1e-6)
    assert sets.trained(tmp_path, data, custom(net, width=6)).path == model.path
    assert sets.trained(tmp_path, data, custom(net, width=5)).path != model.path


def test_it_learns() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(50, 20, (400, 2)).astype(np.float32)
    labels = torch.from_numpy((np.abs(values[:, 0] - 50) > np.abs(values[:, 1] - 50)).astype(np.int64))
    model = built(custom(net, width=32), signature(numbers("a", "b")))
    assert fitted(model, {"numbers": torch.from_numpy(values)}, labels, steps=300, rate=1e-2) > 0.95


def test_a_job_with_it_is_the_same_when_it_is_written_out_and_read_again(tmp_path: Path) -> None:
    made = job(custom(Tower, width=8, shifts=(1, 2.5, None, {"a": "b"})))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json"), sort_keys=False))
    again = spec.load(tmp_path / "job.yaml")
    assert again == made and Job.model_validate_json(made.model_dump_json()) == made
    assert isinstance(again.model, Custom)
    assert again.model.settings == {"width": 8, "shifts": [1, 2.5, None, {"a": "b"}]}
    first, second = (dict(built(model, FOUND).named_parameters()) for model in (made.model, again.model))
    assert all(torch.equal(first[name], second[name]) for name in first)
    narrow = spec.load(tmp_path / "job.yaml", ["model.settings.width=3"])
    assert built(narrow.model, FOUND).body.hidden.out_features == 3


def test_a_program_that_does_not_define_it_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b,label\n1,x,yes\n2,y,no\n")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job(custom(net), str(tmp_path / "rows.csv")).model_dump(mode="json")))
    line = "model: net comes from Python, not from a job file: run the program that calls custom(net, ...)"
    assert refused("check", tmp_path / "job.yaml").endswith(line)


def test_another_source_is_another_model() -> None:
    found = custom(net)
    assert found.digest == custom(Tower, width=1).digest and len(found.digest) == 12
    old = found.model_copy(update={"digest": "0" * 12})
    with pytest.raises(DloptError, match=r"^model: net comes from Python, and its source is another one now: run the program that calls"):
        old.build(FOUND)


def test_the_digest_is_of_the_source_of_the_factorys_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = "from torch import nn\nUNITS = 4\ndef make(signature):\n    return nn.Identity()\n"
    digests = []
    for name, text in (("first_net", source), ("second_net", source), ("third_net", source.replace("4", "5"))):
        (tmp_path / f"{name}.py").write_text(text)
        digests.append(custom(__import__(name).make).digest)
    assert digests[0] == digests[1] != digests[2]


def test_the_vocabulary_may_be_unknown_when_a_job_is_checked() -> None:
    unread = categories(3, 4).model_copy(update={"vocabularies": ()})
    assert isinstance(custom(net).build(signature(NUMBERS, unread)), Tower)


@pytest.mark.parametrize("target", [TWO, THREE, LABELS], ids=lambda target: target.kind)
def test_other_outputs_than_the_target_has_are_refused(target: Any) -> None:
    found = signature(NUMBERS, target=target)
    custom(outputs, count=target.size).build(found)
    line = rf"^model: outputs gives \(2, 7\) for two rows, and must give \(2, {target.size}\): \(rows, outputs\)$"
    with pytest.raises(DloptError, match=line):
        custom(outputs, count=7).build(found)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(DloptError, match=r"^model: nothing must return a torch.nn.Module, not NoneType$"):
        custom(nothing).build(FOUND)


class Everything(nn.Module):
    """Keeps the shapes and types of what it was given."""

    def __init__(self, signature: Signature) -> None:
        super().__init__()
        self.outputs, self.given = signature.num_outputs, {}  # type: ignore[var-annotated]

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        self.given = {name: (tuple(values.shape), values.dtype) for name, values in inputs.items()}
        return torch.zeros(len(next(iter(inputs.values()))), self.outputs)


def test_it_is_tried_on_what_preprocessing_leaves() -> None:
    found = signature(*EVERYTHING, NUMBERS.model_copy(update={"name": "indicated", "indicators": True}))
    network = built(custom(Everything), found)
    tried = dict(network.body.given)
    network(tensors(inputs_of(found, 2)))
    assert tried == network.body.given and tried[TEXT.name] == ((2, 9), torch.int32) and tried["indicated"][0] == (2, 6)


@pytest.mark.parametrize(
    ("factory", "settings", "says"),
    [
        (lambda signature: nn.Identity(), {}, r"custom\(.*<lambda>\) takes a function or class at the top of a module"),
        (functools.partial(net, width=3), {}, r"custom\(partial\) takes a function or class at the top of a module"),
        (
            net,
            {"wide": 3},
            r"net\(signature, \*\*settings\) cannot be called with these settings: got an unexpected keyword argument 'wide'",
        ),
        (Tower, {}, r"Tower\(signature, \*\*settings\) cannot be called with these settings: missing a required argument: 'width'"),
        (net, {"width": torch.zeros(1)}, r"custom\(net\): settings are numbers, texts, lists and mappings of such: Object of type Tensor"),
        (net, {"width": float("nan")}, r"custom\(net\): settings are numbers, texts, lists and mappings of such: "),
    ],
)
def test_what_no_digest_could_tell_apart_is_refused(factory: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(DloptError, match=rf"^model: {says}"):
        custom(factory, **settings)


def test_a_function_within_a_function_is_refused() -> None:
    width = 3

    def inner(signature: Signature) -> nn.Module:
        return Tower(signature, width)

    with pytest.raises(DloptError, match=r"takes a function or class at the top of a module: what varies are settings"):
        custom(inner)


def test_a_source_that_cannot_be_read_is_refused() -> None:
    space: dict[str, Any] = {"__name__": "nowhere"}
    exec("def made(signature): return None", space)
    with pytest.raises(DloptError, match=r"^model: custom\(made\): its source cannot be read: put it into a file"):
        custom(space["made"])


def test_a_process_that_was_told_of_the_factory_builds_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    part = custom(net, width=6)
    factory, weights = factory_of(part), dict(built(part, FOUND).named_parameters())
    monkeypatch.setattr(table, "_FACTORIES", {})
    copy = Custom.model_validate_json(part.model_dump_json())
    with pytest.raises(DloptError, match=r"^model: net comes from Python, not from a job file"):
        factory_of(copy)
    register(copy, factory)
    again = dict(built(copy, FOUND).named_parameters())
    assert all(torch.equal(weights[name], again[name]) for name in weights)


PROGRAM = """
import json, sys
from torch import nn
from dlopt.models.custom import factory_of, custom
from ray import cloudpickle

WIDTH = 5

class Net(nn.Module):
    def __init__(self, outputs, extra):
        super().__init__()
        self.layer = nn.Linear(3, WIDTH + extra)
        self.out = nn.Linear(WIDTH + extra, outputs)

    def forward(self, inputs):
        return self.out(self.layer(inputs["numbers"]))

def make(signature, extra):
    return Net(signature.num_outputs, extra)

part = custom(make, extra=2)
with open(sys.argv[1], "wb") as file:
    file.write(cloudpickle.dumps({"part": part.model_dump_json(), "factory": factory_of(part)}))
"""


@pytest.mark.slow
def test_a_script_ships_its_network_by_value_to_processes_that_cannot_import_it(tmp_path: Path) -> None:
    """As Ray Train sends its config to workers; what is sent holds the class, the function and the constants that they use."""
    (tmp_path / "program.py").write_text(PROGRAM)
    subprocess.run([sys.executable, tmp_path / "program.py", tmp_path / "sent"], check=True, cwd=Path(__file__).parents[2])
    sent = pickle.loads((tmp_path / "sent").read_bytes())
    part = Custom.model_validate_json(sent["part"])
    register(part, sent["factory"])
    network = built(part, signature(NUMBERS, target=THREE))
    assert network.body.layer.out_features == 7
    same(network({"numbers": torch.full((2, 3), 50.0)})[:1], network({"numbers": torch.full((2, 3), 50.0)})[1:])


class Drawing(nn.Module):
    """Takes flat rows and draws as it is told to."""

    def __init__(self, signature: Signature, how: str) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(signature.inputs[0].size, 16), nn.Linear(16, signature.num_outputs)
        self.how, self.drop, self.norm = how, nn.Dropout(0.3), nn.BatchNorm1d(16)
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.3, batch_first=True)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        values = self.norm(self.hidden(next(iter(inputs.values()))))
        if self.how == "layers":
            values = self.drop(torch.relu(self.drop(values)))
        if self.how == "places":  # five tokens of each row, one after the other
            values = self.drop(values[:, None].expand(-1, 5, -1).reshape(-1, 16)).view(-1, 5, 16).mean(1)
        if self.how == "attention":
            values = self.attention(*[values[:, None].expand(-1, 5, -1)] * 3)[0].mean(1)
        if self.how == "last":
            values = self.drop(values.T).T
        if self.how == "function" and self.training:
            values = values + 0.1 * torch.randn_like(values)
        return self.out(values)


@pytest.mark.parametrize(
    ("how", "alone"), [("nothing", True), ("layers", True), ("places", True), ("attention", False), ("last", False), ("function", False)]
)
def test_it_is_known_whether_a_network_draws_row_by_row(how: str, alone: bool) -> None:
    found = signature(NUMBERS, target=THREE)
    network = built(custom(Drawing, how=how), found).train()
    before, drawn = {name: value.clone() for name, value in network.state_dict().items()}, torch.get_rng_state()
    inputs = {name: torch.from_numpy(values) for name, values in inputs_of(found, 40, 1).items()}
    assert draws_by_row(network, inputs) is alone
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state()) and network.training
