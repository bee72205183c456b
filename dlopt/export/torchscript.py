"""TorchScript, for C++ and for servers that load nothing else."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dlopt.artifact import write_atomically
from dlopt.export.base import Compute, ExportFormat

if TYPE_CHECKING:
    from dlopt.export.trained import Trained


class TorchScript(ExportFormat):
    """A traced TorchScript module: tensors in the order of the signature, categories as their codes. PyTorch keeps the format, and no
    longer develops it: torch_export is what follows."""

    of_onnx: ClassVar[bool] = False
    strings: ClassVar[bool] = False
    use: ClassVar[str] = 'import torch\noutputs = torch.jit.load("model.torchscript.pt")(*tensors)  # in the order of signature.json'
    file: ClassVar[str] = "model.torchscript.pt"

    kind: Literal["torchscript"] = "torchscript"

    def write(self, trained: Trained, out: Path) -> dict[str, Any]:
        write_atomically(out / self.file, scripted(trained))
        return {}

    def load(self, out: Path, trained: Trained) -> Compute:
        import torch

        from dlopt.export.trained import called

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return called(torch.jit.load(str(out / self.file)), trained.signature)


def scripted(trained: Trained) -> bytes:
    """A trained model as a file of TorchScript. Raises DloptError."""
    import torch

    from dlopt.export.trained import examples, unsaid

    content = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing; what a trace could get wrong, the proof sees
        try:
            traced = torch.jit.freeze(torch.jit.trace(trained.graph, examples(trained.signature), check_trace=False))
            torch.jit.save(traced, content, _extra_files={"signature.json": trained.signature.model_dump_json().encode()})
        except Exception as error:  # what tracing and own code raise is of many types
            raise unsaid("TorchScript", error) from error
    return content.getvalue()
