"""Weights as safetensors beside a config.json, the layout of a model on the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dlopt.artifact import write_atomically
from dlopt.export.base import Compute, ExportFormat

if TYPE_CHECKING:
    from dlopt.export.trained import Trained


class Safetensors(ExportFormat):
    """model.safetensors and config.json, the layout of a model on the Hugging Face hub: the bare weights, and what the network is built of.
    Whoever reads them without dlopt has tensors by name, and builds the network."""

    of_onnx: ClassVar[bool] = False
    strings: ClassVar[bool] = False
    use: ClassVar[str] = (
        'from safetensors.torch import load_file\nweights = load_file("model.safetensors")  # of the network that config.json describes'
    )
    file: ClassVar[str] = "model.safetensors"

    kind: Literal["safetensors"] = "safetensors"

    def write(self, trained: Trained, out: Path) -> dict[str, Any]:
        from safetensors.torch import save

        from dlopt.artifact import versions

        tensors = {name: value.detach().contiguous().clone() for name, value in trained.network.state_dict().items()}
        write_atomically(out / self.file, save(tensors, metadata={"format": "pt"}))
        target, section = trained.signature.target, trained.fit.model_dump(mode="json")
        config = {
            "model_type": "dlopt",
            "architectures": [section["model"]["kind"]],
            "id2label": {str(place): str(label) for place, label in enumerate(target.labels)},
            "label2id": {str(label): place for place, label in enumerate(target.labels)},
            "problem_type": {"category": "single_label_classification", "multi_label": "multi_label_classification"}.get(
                target.kind, "regression"
            ),
            "torch_dtype": "float32",
            "dlopt_version": versions().get("dlopt"),
            "model": section["model"],
            "seed": section["seed"],
            "signature": trained.signature.model_dump(mode="json"),
            "statistics": json.loads(trained.model.read("statistics.json")),
        }
        write_atomically(out / "config.json", json.dumps(config, indent=1))
        return {"parameters": sum(value.numel() for value in trained.network.parameters())}

    def load(self, out: Path, trained: Trained) -> Compute:
        """Built anew from config.json alone."""
        from safetensors.torch import load_file

        from dlopt.export.trained import Graph, built_of, called
        from dlopt.models.shape import shaped_like

        tensors = load_file(out / self.file)
        network = shaped_like(built_of(json.loads((out / "config.json").read_bytes())), tensors)
        network.load_state_dict(tensors)
        return called(Graph(network, trained.signature).eval(), trained.signature)
