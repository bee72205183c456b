"""A run whose model is that of another one, made small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dlopt.compress import Compression, Compressor
from dlopt.part import DloptError, Part
from dlopt.progress import Progress, silent
from dlopt.runs import Outcome


class _Chosen(Part):
    """Gives messages their beginning."""

    compress: tuple[Compression, ...]


def compress(folder: Path, parts: Sequence[Compressor], progress: Progress = silent) -> Outcome:
    """Do these with a run's model, in this order. Raises DloptError."""
    from dlopt import pipeline

    if not parts:
        raise DloptError("compress: name what to do, such as quantize: `dlopt explain compress` has them all")
    return pipeline.compress(folder, parts, progress)


def parts_of(given: Sequence[str | Mapping[str, Any]]) -> tuple[Compressor, ...]:
    """Parts of mappings, of YAML of such, or of bare kinds. Raises DloptError."""
    try:
        read = [yaml.safe_load(one) if isinstance(one, str) else dict(one) for one in given]
    except yaml.YAMLError as error:
        raise DloptError(f"compress: not YAML: {' '.join(str(error).split())[:100]}") from None
    return _Chosen.validated({"compress": [{"kind": one} if isinstance(one, str) else one for one in read]}).compress
