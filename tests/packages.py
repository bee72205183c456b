"""Packages that may be missing on a user's machine, but not in CI."""

from __future__ import annotations

import importlib
from typing import Any

from tests.conftest import missing


def package(module: str, extra: str) -> Any:
    """The module; the test is skipped where it is not installed, and fails there in CI."""
    try:
        return importlib.import_module(module)
    except ImportError as why:
        missing(f"{why}: pip install 'dlopt[{extra}]'")
