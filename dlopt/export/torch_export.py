"""torch.export's programs, which torch.export.load reads without the code of the model."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dlopt.artifact import write_atomically
from dlopt.export.base import Compute, ExportFormat

if TYPE_CHECKING:
    from dlopt.export.trained import Trained


class TorchExport(ExportFormat):
    """A program of torch.export, for any number of rows from 1 on: tensors in the order of the signature, categories as their codes."""

    of_onnx: ClassVar[bool] = False
    strings: ClassVar[bool] = False
    use: ClassVar[str] = 'import torch\noutputs = torch.export.load("model.pt2").module()(*tensors)  # in the order of signature.json'
    file: ClassVar[str] = "model.pt2"

    kind: Literal["torch_export"] = "torch_export"

    def write(self, trained: Trained, out: Path) -> dict[str, Any]:
        import torch

        from dlopt.export.trained import examples, unsaid

        rows = torch.export.Dim("rows", min=1)
        sizes = [
            {0: rows, 1: torch.export.Dim(f"length{place}", min=1, max=feature.size)} if feature.holds == "tokens" else {0: rows}
            for place, feature in enumerate(trained.signature.inputs)
        ]
        content = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                program = torch.export.export(trained.graph, examples(trained.signature, rows=3), dynamic_shapes=(tuple(sizes),))
                torch.export.save(program, content, extra_files={"signature.json": trained.signature.model_dump_json()})
            except Exception as error:  # what torch.export and own code raise is of many types
                raise unsaid("a program of torch.export", error) from error
        write_atomically(out / self.file, content.getvalue())
        return {}

    def load(self, out: Path, trained: Trained) -> Compute:
        import torch

        from dlopt.export.trained import called

        return called(torch.export.load(str(out / self.file)).module(), trained.signature)
