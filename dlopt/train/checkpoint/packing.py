"""State of an optimizer as flat tensors and JSON, and back, to the bit.

torch's own `load_state_dict` casts state to the type of its parameter, and a file keeps no memory format: both would make training go on
a little differently from how it would have, and a fused kernel, which walks through memory, would take one element for another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

Tensors = dict[str, Tensor]
UNSAVED = ("params", "names")
"""What of a parameter group follows from the network."""


def pack(state: Any, copied: bool = False) -> tuple[Tensors, Any]:
    """Nested dictionaries, lists, tuples, tensors, numbers, texts, None as ({name: tensor on the CPU}, JSON that says where they belong). A
    tensor is named by the keys that lead to it.

    copied: whether all tensors are; else what lies on the CPU already mostly is not: write it before the next step.
    """
    packer = _Packer(copied)
    rest = packer.pack(state, ())
    for device in packer.gpus:
        torch.cuda.current_stream(device).synchronize()
    return packer.tensors, rest


def unpack(tensors: Tensors, rest: Any) -> Any:
    """What `pack` was given, tensors in the order in memory that they had."""
    if not isinstance(rest, dict):
        return rest
    ((kind, value),) = rest.items()
    match kind:
        case "tensor":
            return tensors[value]
        case "ordered":
            name, order = value
            return tensors[name].permute([order.index(dimension) for dimension in range(len(order))])
        case "dict":
            return {key: unpack(tensors, inside) for key, inside in value}
        case "number":
            return float(value)
        case _:
            values = [unpack(tensors, inside) for inside in value]
            return tuple(values) if kind == "tuple" else values


class _Packer:
    def __init__(self, copied: bool) -> None:
        self.copied, self.tensors = copied, Tensors()
        self.stored = set[int]()
        """Addresses of what is in `tensors` already, since safetensors takes no two of one storage."""
        self.gpus = set[torch.device]()
        """From which copies are under way, all at once, into memory that they reach by themselves."""

    def pack(self, state: Any, path: tuple[Any, ...]) -> Any:
        match state:
            case Tensor():
                return self._tensor(state, ".".join(map(str, path)))
            case dict():
                return {"dict": [[key, self.pack(value, (*path, key))] for key, value in state.items()]}
            case list() | tuple():
                kind = "tuple" if isinstance(state, tuple) else "list"
                return {kind: [self.pack(value, (*path, index)) for index, value in enumerate(state)]}
            case float() if not math.isfinite(state):
                return {"number": str(state)}
            case None | bool() | int() | float() | str():
                return state
        raise TypeError(f"cannot pack a {type(state).__name__}")

    def _tensor(self, value: Tensor, name: str) -> dict[str, Any]:
        """Its dimensions are stored with the one of the longest stride first, so that it lies in the file as it does in memory."""
        while name in self.tensors:  # keys may have dots
            name += "'"
        order = sorted(range(value.dim()), key=lambda dimension: -value.stride()[dimension])
        lying = self._on_host(value.detach()).permute(order)
        storage = lying.untyped_storage()
        alone = lying.is_contiguous() and storage.nbytes() == lying.nbytes and storage.data_ptr() not in self.stored
        self.tensors[name] = lying if alone else lying.clone(memory_format=torch.contiguous_format)
        self.stored.add(storage.data_ptr())
        return {"tensor": name} if order == list(range(value.dim())) else {"ordered": [name, order]}

    def _on_host(self, value: Tensor) -> Tensor:
        if not value.is_cuda or torch.empty_like(value, device="meta").stride() != value.stride():
            return value.to("cpu", copy=self.copied)
        self.gpus.add(value.device)
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` as `pack` takes it: groups without what follows from the network."""
    state = optimizer.state_dict()
    groups = [{key: value for key, value in group.items() if key not in UNSAVED} for group in state["param_groups"]]
    return state | {"param_groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put into an optimizer, made anew for the same parameters, what `optimizer_state` said of another one: to the bit."""
    fresh = optimizer.state_dict()["param_groups"]
    kept = [{key: group[key] for key in UNSAVED if key in group} for group in fresh]
    groups = [saved | mine for saved, mine in zip(state["param_groups"], kept, strict=True)]
    optimizer.load_state_dict(state | {"param_groups": groups})
    fused = [(parameter, group.get("fused")) for group in optimizer.param_groups for parameter in group["params"]]
    for index, (parameter, walks) in enumerate(fused):
        if index in state["state"]:
            optimizer.state[parameter] = _placed(state["state"][index], optimizer.state[parameter], parameter if walks else None)


def _placed(saved: Any, loaded: Any, parameter: Parameter | None) -> Any:
    """What was saved, in its own type, where torch put it. parameter: in whose memory format state of its shape must lie, if in any."""
    if isinstance(saved, dict):
        return {key: _placed(value, loaded[key], parameter) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(_placed(value, other, parameter) for value, other in zip(saved, loaded, strict=True))
    if not isinstance(saved, Tensor):
        return saved
    if parameter is not None and saved.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=saved.dtype, device=loaded.device, requires_grad=False).copy_(saved)
    return saved.to(loaded.device, copy=True)


CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16"}
CODES |= {"int8": "I8", "uint8": "U8", "bool": "BOOL"}
"""Types of numbers, as a safetensors file has them."""


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file of tensors on the CPU, in pieces that are not copied: the library's own `save` makes the whole file in memory. The
    longest numbers come first, so that all are aligned."""
    ordered = dict(sorted(tensors.items(), key=lambda named: (-named[1].element_size(), named[0])))
    header: dict[str, Any] = {}
    end = 0
    for name, value in ordered.items():
        begin, end = end, end + value.nbytes
        header[name] = {"dtype": CODES[str(value.dtype).removeprefix("torch.")], "shape": list(value.shape), "data_offsets": [begin, end]}
    said = json.dumps(header, separators=(",", ":")).encode()
    said += b" " * (-len(said) % 8)
    yield len(said).to_bytes(8, "little") + said
    for value in ordered.values():
        if value.numel():
            yield memoryview(value.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class Seen:
    """Size and SHA-256 of what has gone through."""

    def __init__(self) -> None:
        self.size, self.digest = 0, sha256()

    def through(self, given: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        for piece in given:
            self.size += len(piece)
            self.digest.update(piece)
            yield piece

    def as_json(self) -> dict[str, Any]:
        return {"size": self.size, "sha256": self.digest.hexdigest()}
