"""ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dlopt.artifact import write_atomically
from dlopt.export.base import Compute, ExportFormat

if TYPE_CHECKING:
    from dlopt.export.trained import Trained


class Onnx(ExportFormat):
    """One self-contained ONNX file: lookup of categories, preprocessing, model and probabilities in one graph, any number of rows."""

    use: ClassVar[str] = (
        "import onnxruntime\n"
        'session = onnxruntime.InferenceSession("model.onnx")\n'
        "(outputs,) = session.run(None, tensors)  # {name: array} as session.get_inputs() says"
    )
    file: ClassVar[str] = "model.onnx"

    kind: Literal["onnx"] = "onnx"
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """Numbers that the model's layers have, in half of the bytes; preprocessing and what comes out stay float32. float16 is what layers
    compute in as well, where the processor can (onnxruntime on CPUs mostly cannot, and computes in float32 between); bfloat16, which
    onnxruntime has no layers of on CPUs, is what weights are kept in, and float32 what is computed."""

    @property
    def name(self) -> str:
        return "onnx" if self.precision == "float32" else f"onnx.{self.precision}"

    @property
    def rounds(self) -> bool:
        return self.precision != "float32"

    def write(self, trained: Trained, out: Path) -> dict[str, Any]:
        from dlopt.export.graph import opset_of, written

        content = written(trained, self.precision)
        write_atomically(out / self.file, content)
        return {"opset": opset_of(content)}

    def load(self, out: Path, trained: Trained) -> Compute:
        from dlopt.export.graph import session_of

        return session_of((out / self.file).read_bytes(), trained.signature)
