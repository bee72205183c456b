"""The notebook of the documentation, run cell by cell in one namespace and stored with what it shows: `python -m dlopt.docs.executed`."""

from __future__ import annotations

import ast
import copy
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parent / "notebook.ipynb"
MOST = 60_000
"""Letters of a shown page that are stored; of a larger one, such as a whole report, its frame alone with a word on it."""


def executed(notebook: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The notebook with its outputs, and the namespace that is left."""
    found, space = copy.deepcopy(notebook), dict[str, Any]()
    count = 0
    for cell in found["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell |= {"outputs": _outputs("".join(cell["source"]), space, count), "execution_count": count}
    return found, space


def _outputs(source: str, space: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What a cell prints, and what its last expression shows."""
    body = ast.parse(source)
    last = ast.Expression(body.body.pop().value) if body.body and isinstance(body.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(body, f"cell {count}", "exec"), space)
        value = eval(compile(last, f"cell {count}", "eval"), space) if last else None
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": [repr(value)]}
        if hasattr(value, "_repr_html_"):
            page = value._repr_html_()
            data["text/html"] = [page if len(page) <= MOST else _frame(page)]
        outputs.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return outputs


def _frame(page: str) -> str:
    """A frame whose content would make the notebook heavy."""
    head = page.partition(" srcdoc=")[0]
    note = "&lt;p style='font: 16px sans-serif'&gt;The page is shown here when the cell is run.&lt;/p&gt;"
    return f'{head} srcdoc="{note}"></iframe>'


if __name__ == "__main__":
    made, _ = executed(json.loads(NOTEBOOK.read_text()))
    NOTEBOOK.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
