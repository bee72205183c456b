"""Archives of TorchServe."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from dlopt.artifact import write_atomically
from dlopt.export.base import Compute, ExportFormat

if TYPE_CHECKING:
    from dlopt.export.trained import Trained

SERIALIZED, HANDLER, SIGNATURE = "model.torchscript.pt", "handler.py", "signature.json"
MADE = (1980, 1, 1, 0, 0, 0)
"""When files of an archive were made: the same model gives the same bytes."""


class TorchServe(ExportFormat):
    """An archive for PyTorch's server: TorchScript, and a handler that takes raw rows as JSON, {"instances": [row, ...]}, a list of rows or
    one row, and answers {"predictions": [...]}. It needs torch and numpy there (texts: and tokenizers)."""

    of_onnx: ClassVar[bool] = False
    use: ClassVar[str] = (
        "# torchserve --start --model-store FOLDER --models model=model.mar\n"
        "import requests\n"
        'answer = requests.post("http://localhost:8080/predictions/model", json={"instances": rows}).json()["predictions"]'
    )
    file: ClassVar[str] = "model.mar"

    kind: Literal["torchserve"] = "torchserve"
    model: str = Field("model", pattern=r"^[A-Za-z0-9][\w.-]*$")
    """The name that it is registered by."""
    version: str = Field("1.0", pattern=r"^\d+(\.\d+)*$")
    """The model's version."""

    def write(self, trained: Trained, out: Path) -> dict[str, Any]:
        from dlopt.export.pickled import source
        from dlopt.export.platforms import torchserve_handler
        from dlopt.export.torchscript import scripted

        served = {"modelName": self.model, "modelVersion": self.version, "serializedFile": SERIALIZED, "handler": f"{HANDLER}:handle"}
        manifest = {"runtime": "python", "archiverVersion": "0.12.0", "model": served}
        files = {
            "MAR-INF/MANIFEST.json": json.dumps(manifest, indent=1).encode(),
            SERIALIZED: scripted(trained),
            HANDLER: source(torchserve_handler).encode(),
            SIGNATURE: trained.signature.model_dump_json().encode(),
        }
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(zipfile.ZipInfo(name, MADE), data, zipfile.ZIP_DEFLATED)
        write_atomically(out / self.file, content.getvalue())
        return {}

    def load(self, out: Path, trained: Trained) -> Compute:
        """By the handler that is in the archive."""
        with tempfile.TemporaryDirectory(prefix="dlopt-") as folder:
            with zipfile.ZipFile(out / self.file) as archive:
                archive.extractall(folder)
            space: dict[str, Any] = {"__name__": "handler", "SOURCE": ""}
            exec(compile((Path(folder) / HANDLER).read_text(), HANDLER, "exec"), space)
            compute: Compute = space["loaded"](folder).compute
            return compute
