"""Estimators as files: their source, and what is beside a pickle since loading one executes what it says."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from dlopt.artifact import write_atomically
from dlopt.export.base import Compute, ExportFormat
from dlopt.part import DloptError

if TYPE_CHECKING:
    from dlopt.export.estimator import Estimator
    from dlopt.export.trained import Trained


class Pickled(ExportFormat):
    """What both formats of estimators have in common."""

    file: ClassVar[str]

    def write(self, trained: Trained, out: Path) -> dict[str, Any]:
        from dlopt.export import estimator
        from dlopt.export.graph import written

        graph = written(trained)
        kind = estimator.Regressor if trained.signature.target.kind == "number" else estimator.Classifier
        content = self.dump(kind(graph, trained.signature.model_dump_json(), source()))
        write_atomically(out / self.file, content)
        digest = hashlib.sha256(content).hexdigest()
        write_atomically(out / f"{self.file}.sha256", f"{digest}  {self.file}\n")
        return {"sha256": digest}

    def load(self, out: Path, trained: Trained) -> Compute:
        return load_estimator(out / self.file).compute

    @classmethod
    def dump(cls, made: Estimator) -> bytes:
        """The file."""
        raise NotImplementedError

    @classmethod
    def unpickle(cls, content: bytes) -> Any:
        """What a file holds; executes what it says."""
        raise NotImplementedError


def source(*more: ModuleType) -> str:
    """The code of an estimator, and of modules that build on it, as one text that needs no dlopt."""
    from dlopt.data.types import canonical
    from dlopt.export import estimator

    future = "from __future__ import annotations\n"
    texts = [inspect.getsource(module).replace(future, "") for module in (canonical, estimator, *more)]
    lines = [line for line in "\n".join(texts).splitlines() if not line.startswith(("from dlopt.", "SOURCE ="))]
    return "\n".join([future, *lines, ""])


def load_estimator(path: str | Path, sha256: str | None = None) -> Any:
    """The estimator of a file, whose SHA-256 is compared before anything of it is executed: with the one that is given, or the one in
    the file beside it, FILE.sha256.

    Unpickling executes what a file says, so a file is trusted as far as whoever gave the digest: give the one that you have from a place
    that others cannot write to. Raises DloptError.
    """
    from dlopt.export.joblib import Joblib
    from dlopt.export.pickle import Pickle

    path = Path(path)
    beside = path.with_name(f"{path.name}.sha256")
    try:
        content = path.read_bytes()
        wanted = sha256 or beside.read_text().split()[0]
    except (OSError, IndexError) as error:
        raise DloptError(f"{path}: cannot be checked: {error}: give its sha256, or put {beside.name} beside it") from None
    if hashlib.sha256(content).hexdigest() != wanted.strip().lower():
        where = "the digest that was given" if sha256 else beside.name
        raise DloptError(f"{path}: its content is not what {where} says, so nothing of it was executed: get the file anew")
    form = Joblib if path.suffix == ".joblib" else Pickle
    form().check()
    return form.unpickle(content)
