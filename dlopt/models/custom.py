"""A user's own torch.nn.Module in a job, with everything else of the line unchanged: through Python, not through a job file.

    from dlopt.models.custom import custom

    def net(signature, width):
        return Net(...)    # takes {name: tensor}, as dlopt.models.preprocess leaves them; gives (rows, signature.num_outputs)

    run(Job(name="mine", data=..., model=custom(net, width=8)), Path("runs"))

The job holds a name, a digest of the source and the settings, all JSON, so that artifacts are told apart and found again as those of
any other model. The factory itself stays in a table of the process; whoever starts other processes (Ray Train) takes it along.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from dlopt.models import noise
from dlopt.models.preprocess import Preprocess
from dlopt.part import DloptError, Feature, Part, Signature

Factory = Callable[..., nn.Module]
"""factory(signature, **settings): a function or a class at the top of a module."""
DIGITS = 12
_FACTORIES: dict[tuple[str, str], Factory] = {}
"""What this process can build, by name and digest of the source."""


class Custom(Part):
    """A network that a program of the user's makes. Comes from `dlopt.models.custom.custom(factory, **settings)`, not from a job file."""

    kind: Literal["custom"] = "custom"
    name: str
    """The factory's name in its module."""
    digest: str
    """Of the source of its module: another source is another model, which is trained anew."""
    settings: dict[str, JsonValue] = {}
    """What the factory is called with, beside the signature."""

    def build(self, signature: Signature) -> nn.Module:
        """Raises DloptError when the program has no such factory, and when what it makes is no module or has other outputs."""
        signature = _with_codes(signature)
        network = factory_of(self)(signature, **self.settings)
        if not isinstance(network, nn.Module):
            raise DloptError(f"model: {self.name} must return a torch.nn.Module, not {type(network).__name__}")
        _refuse_other_outputs(self.name, network, signature)
        return network


def custom(factory: Factory, **settings: Any) -> Custom:
    """The model of a job that `factory(signature, **settings)` makes; the factory can be built in this process from now on.

    factory: a function, or a class of modules, at the top of a module, of which the network must be a function: what it depends on
    is that module's source, other packages, and the settings. settings: numbers, texts, lists and mappings; tuples become lists.
    Raises DloptError when the factory is of another kind, its source cannot be read, or the settings do not suit it.
    """
    name = _name(factory)
    part = Custom(name=name, digest=_digest(factory, name), settings=_as_json(name, settings))
    try:
        inspect.signature(factory).bind(None, **part.settings)
    except TypeError as error:
        raise DloptError(f"model: {name}(signature, **settings) cannot be called with these settings: {error}") from None
    register(part, factory)
    return part


def register(part: Custom, factory: Factory) -> None:
    """Let this process build a part; a process that was started by another calls it with what `factory_of` gave there."""
    _FACTORIES[part.name, part.digest] = factory


def factory_of(part: Custom) -> Factory:
    """Raises DloptError when this process has not made the part, and was not told of it."""
    known = _FACTORIES.get((part.name, part.digest))
    if known is None:
        other = any(name == part.name for name, _ in _FACTORIES)
        why = "and its source is another one now" if other else "not from a job file"
        raise DloptError(f"model: {part.name} comes from Python, {why}: run the program that calls custom({part.name}, ...)")
    return known


def draws_by_row(network: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether a network in training gives rows, at least two, the same outputs in two parts as all at once, as layers of
    `dlopt.models.noise` do. Batch norms are left out of it. The network and torch's generators are afterwards as they were."""
    network, values = copy.deepcopy(network), next(iter(inputs.values()))
    rows, gpus = len(values), [values.device] if values.is_cuda else []
    for layer in network.modules():
        layer.training = getattr(layer, "running_mean", None) is None
    with torch.random.fork_rng(devices=gpus), torch.no_grad():
        parts = [_step_of(network, inputs, low, high) for low, high in ((0, rows), (0, rows // 2), (rows // 2, rows))]
    return torch.allclose(torch.cat(parts[1:]), parts[0], rtol=1e-3, atol=1e-3 * float(parts[0].abs().max()), equal_nan=True)


def _step_of(network: nn.Module, inputs: dict[str, Tensor], low: int, high: int) -> Tensor:
    """Outputs of some rows in the first step of training."""
    some = {name: values[low:high] for name, values in inputs.items()}
    with noise.step(0, 0):
        noise.part(low, high - low, next(iter(some.values())).device)
        outputs: Tensor = network(some)
    return outputs


def _name(factory: Factory) -> str:
    """The qualified name of a function or class that its module's source defines; anything else could hold what no digest sees."""
    name = getattr(factory, "__qualname__", type(factory).__name__)
    if not (inspect.isfunction(factory) or inspect.isclass(factory)) or "<" in name:
        raise DloptError(
            f"model: custom({name}) takes a function or class at the top of a module: what varies are settings, custom(net, width=8)"
        )
    return name


def _digest(factory: Factory, name: str) -> str:
    """Of the module's source; of a notebook, which is no file, the source of the factory alone."""
    for source in (inspect.getmodule(factory), factory):
        try:
            return hashlib.sha256(inspect.getsource(source).encode()).hexdigest()[:DIGITS]  # type: ignore[arg-type]
        except (OSError, TypeError):
            continue
    raise DloptError(f"model: custom({name}): its source cannot be read: put it into a file, so that changes of it are seen")


def _as_json(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they come back from a job that was written out."""
    try:
        copied: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise DloptError(f"model: custom({name}): settings are numbers, texts, lists and mappings of such: {error}") from None
    return copied


def _with_codes(signature: Signature) -> Signature:
    """Before the data is read, when a job is checked, no value of a category is known: then one of each column stands in."""
    inputs = [
        feature.model_copy(update={"vocabularies": (("",),) * len(feature.columns)})
        if feature.holds == "codes" and not feature.codes
        else feature
        for feature in signature.inputs
    ]
    return signature.model_copy(update={"inputs": tuple(inputs)})


def _refuse_other_outputs(name: str, network: nn.Module, signature: Signature) -> None:
    """Two rows of zeros tell; they also give lazy layers their sizes."""
    training = network.training
    with torch.no_grad():
        outputs = network.eval()({feature.name: _zeros(feature) for feature in signature.inputs})
    network.train(training)
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if shape != (2, signature.num_outputs):
        raise DloptError(f"model: {name} gives {shape} for two rows, and must give (2, {signature.num_outputs}): (rows, outputs)")


def _zeros(feature: Feature) -> Tensor:
    """Two rows of an input as preprocessing leaves it."""
    if feature.holds == "pixels":
        height, width, channels = feature.shape
        return torch.zeros(2, channels, height, width)
    if feature.holds == "numbers":
        return torch.zeros(2, Preprocess.width(feature))
    return torch.zeros(2, *feature.shape, dtype=torch.int32)
