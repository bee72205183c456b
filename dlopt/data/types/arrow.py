"""pyarrow, loaded when it is first used: a server's replica reads requests and no files, so it starts without it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc
else:

    class Later:
        """A module that is imported with the first of its attributes that is asked for."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            found = getattr(importlib.import_module(self._name), attribute)
            setattr(self, attribute, found)  # from now on as fast as the module's own
            return found

    pa, pc = Later("pyarrow"), Later("pyarrow.compute")

__all__ = ["pa", "pc"]
