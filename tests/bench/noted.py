"""`dlopt`, whose worker 0 tells when it begins and when it has done its first step. It imports nothing ahead of the command's imports."""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FIRST = "first"
"""A file in the model's folder: [when the worker began, when its first step was done], by time.time()."""


class Noting(importlib.abc.MetaPathFinder):
    """Puts the notes into the worker's function as soon as the command imports the stage that makes it."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name != "dlopt.train.stage":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec and spec.loader
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            module._work = noted(module._work)  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def noted(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*words: Any) -> Any:
        work = make(*words)

        def noting(config: dict[str, Any]) -> Any:
            from dlopt.train import training

            began, step = time.time(), training.Training._between_steps

            def first(self: Any) -> None:
                training.Training._between_steps = step  # type: ignore[method-assign]
                if self.rank == 0:
                    (Path(config["out"]) / FIRST).write_text(json.dumps([began, time.time()]))
                step(self)

            training.Training._between_steps = first  # type: ignore[method-assign]
            return work(config)

        return noting

    return made


if __name__ == "__main__":
    print(f"{FIRST} python {time.time()}", file=sys.stderr, flush=True)
    sys.meta_path.insert(0, Noting())
    from dlopt.cli import main

    sys.exit(main())
