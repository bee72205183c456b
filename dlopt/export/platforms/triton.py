"""A model repository of NVIDIA's Triton Inference Server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from dlopt.artifact import write_atomically
from dlopt.export.base import Compute, ExportFormat
from dlopt.part import DloptError

if TYPE_CHECKING:
    import onnx

    from dlopt.export.trained import Trained

TYPES = {
    "FLOAT": "TYPE_FP32",
    "DOUBLE": "TYPE_FP64",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
    "UINT8": "TYPE_UINT8",
    "STRING": "TYPE_STRING",
}
"""ONNX's names of types to Triton's."""


class Triton(ExportFormat):
    """A model repository that Triton serves: a folder model with config.pbtxt, the classes' names, and the ONNX file as its version 1.
    Batches are put together by the server."""

    use: ClassVar[str] = (
        "# tritonserver --model-repository FOLDER, the one that holds the folder model\n"
        "import tritonclient.http as triton\n"
        'given = triton.InferInput(name, array.shape, datatype)  # as client.get_model_metadata("model") says\n'
        "given.set_data_from_numpy(array)\n"
        'outputs = triton.InferenceServerClient("localhost:8000").infer("model", [given]).as_numpy(output)'
    )
    file: ClassVar[str] = "model/config.pbtxt"

    kind: Literal["triton"] = "triton"
    backend: Literal["onnxruntime", "python"] = "onnxruntime"
    """What of the server runs it: onnxruntime, as NVIDIA's images have it; or python, with a model.py, where numpy and onnxruntime are
    installed for the server's Python."""
    batch: int = Field(64, ge=1)
    """The most rows that the server puts together."""
    delay: int = Field(0, ge=0)
    """Microseconds that a request waits for others to be put together with."""

    def write(self, trained: Trained, out: Path) -> dict[str, Any]:
        import onnx

        from dlopt.export.graph import opset_of, written

        content = written(trained)
        (out / "model" / "1").mkdir(parents=True)
        write_atomically(out / "model" / "1" / "model.onnx", content)
        labels = [str(label) for label in trained.signature.target.labels]
        if any("\n" in label for label in labels):
            raise DloptError("export: triton: a label with a line break cannot be written into labels.txt: rename that class")
        if labels:
            write_atomically(out / "model" / "labels.txt", "".join(f"{label}\n" for label in labels))
        if self.backend == "python":
            write_atomically(out / "model" / "1" / "model.py", source())
        write_atomically(out / self.file, "\n".join(self._config(onnx.load_from_string(content).graph, bool(labels))) + "\n")
        return {"opset": opset_of(content)}

    def _config(self, graph: onnx.GraphProto, labels: bool) -> Iterator[str]:
        """The lines of config.pbtxt, a message ModelConfig as text."""
        yield 'name: "model"'
        yield f'backend: "{self.backend}"'
        yield f"max_batch_size: {self.batch}"
        for what, values in (("input", graph.input), ("output", graph.output)):
            for value in values:
                kind, dims = _type_of(value)
                named = ' label_filename: "labels.txt"' if labels and what == "output" else ""
                yield f"{what} {{ name: {json.dumps(value.name, ensure_ascii=False)} data_type: {kind} dims: {dims}{named} }}"
        yield f"dynamic_batching {{ max_queue_delay_microseconds: {self.delay} }}"

    def load(self, out: Path, trained: Trained) -> Compute:
        """As the backend does: by onnxruntime, or by what model.py says."""
        from dlopt.export.graph import session_of

        folder = out / "model" / "1"
        if self.backend == "onnxruntime":
            return session_of((folder / "model.onnx").read_bytes(), trained.signature)
        space: dict[str, Any] = {"__name__": "model"}
        exec(compile((folder / "model.py").read_text(), "model.py", "exec"), space)
        model = space["TritonPythonModel"]()
        model.load(str(folder))
        return lambda tensors: model.compute(tensors)[0]


def _type_of(value: onnx.ValueInfoProto) -> tuple[str, list[int]]:
    """Triton's type, and the sizes but for the rows': -1 where there may be any."""
    import onnx

    tensor = value.type.tensor_type
    return TYPES[onnx.TensorProto.DataType.Name(tensor.elem_type)], [size.dim_value or -1 for size in tensor.shape.dim[1:]]


def source() -> str:
    """The model of the backend python."""
    return Path(__file__).with_name("triton_model.py").read_text()
