"""OpenVINO's intermediate representation."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dlopt.export.base import Compute, ExportFormat

if TYPE_CHECKING:
    from dlopt.export.trained import Trained


class OpenVino(ExportFormat):
    """OpenVINO's intermediate representation, model.xml and model.bin, for Intel's processors: tensors by the names of signature.json,
    categories as their codes."""

    package: ClassVar[str] = "openvino"
    extra: ClassVar[str] = "openvino"
    strings: ClassVar[bool] = False
    use: ClassVar[str] = (
        "import openvino  # computes in bfloat16 where the processor can, unless it is told not to\n"
        'model = openvino.Core().compile_model("model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})\n'
        "outputs = model(tensors)[0]  # {name: array} as signature.json says"
    )
    file: ClassVar[str] = "model.xml"

    kind: Literal["openvino"] = "openvino"

    def write(self, trained: Trained, out: Path) -> dict[str, Any]:
        import openvino

        from dlopt.export.graph import written
        from dlopt.export.trained import unsaid

        content = written(trained, strings=False)
        try:
            model = openvino.convert_model(io.BytesIO(content))
            openvino.save_model(model, str(out / self.file), compress_to_fp16=False)
        except Exception as error:  # what OpenVINO raises is of many types
            raise unsaid("OpenVINO", error) from error
        return {"openvino": openvino.__version__.split("-")[0]}

    def load(self, out: Path, trained: Trained) -> Compute:
        import openvino

        model = openvino.Core().compile_model(str(out / self.file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda tensors: model(tensors)[0]
