"""A hook of mkdocs: pages that are written from the code and from the notebook, so that they cannot differ from these."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from pydantic import BaseModel

from dlopt.fields import Entry, entries
from dlopt.mistakes import tag_of
from dlopt.spec import Job

PAGES = {
    "data": ["data"],
    "model": ["model"],
    "train": ["train"],
    "augment": ["augment"],
    "rest": ["resources", "compress", "export", "serve"],
}
"""Pages of fields, and the fields of a job that are on each."""
NOTEBOOK = Path(__file__).parent / "notebook.ipynb"


def on_files(files: Any, config: Any) -> Any:
    """Add them to what is built."""
    for name, text in pages(config.extra.get("commands", {})).items():
        files.append(File.generated(config, name, content=text))
    return files


def pages(helps: Mapping[str, str]) -> dict[str, str]:
    """Path to Markdown of every written page."""
    found = {"commands.md": commands(helps), "notebook.md": notebook(json.loads(NOTEBOOK.read_text())), "fields/job.md": job()}
    return found | {f"fields/{name}.md": "\n".join(_fields(name, names)) for name, names in PAGES.items()}


def commands(helps: Mapping[str, str]) -> str:
    """What each command says of itself."""
    codes = "0 done, 2 a mistake that you can mend (a line each), 1 a failure of the system, with its cause, 130 Ctrl-C"
    parts = ["# Commands", f"As `dlopt COMMAND --help` has them. Exit codes: {codes}, 141 nobody reads on, 143 SIGTERM."]
    return "\n\n".join(parts + [f"## dlopt {name}\n\n```text\n{text.strip()}\n```" for name, text in helps.items()])


def job() -> str:
    """The top of a job."""
    where = {field: page for page, names in PAGES.items() for field in names}
    lines = ["# A job", "", _one_line(Job.__doc__), "", "`dlopt explain FIELD` says the same in a terminal.", "", *_HEAD]
    for entry in entries(Job):
        name = f"[`{entry.path}`]({where[entry.path]}.md#{entry.path})" if entry.path in where else f"`{entry.path}`"
        lines.append(f"| {name} | {_cell(entry.takes)} | {_cell(entry.default, code=True)} | {_cell(entry.says)} |")
    return "\n".join(lines)


_HEAD = ["| field | takes | default | |", "|---|---|---|---|"]


def _fields(title: str, names: list[str]) -> Iterator[str]:
    yield f"# {', '.join(f'`{name}`' for name in names)}"
    seen: set[type[BaseModel]] = set()
    of_job = {entry.path: entry for entry in entries(Job)}
    for name in names:
        yield f"\n## {name}\n"
        entry = of_job[name]
        yield f"{entry.says}\n"
        yield from _parts(entry, seen)


def _parts(entry: Entry, seen: set[type[BaseModel]]) -> Iterator[str]:
    """Every part that can stand at a field, each once, and what is below it."""
    for part in entry.parts:
        if part in seen:
            continue
        seen.add(part)
        tag = tag_of(part)
        yield f"\n### {entry.path}{f': {tag}' if tag else ''}\n"
        yield f"{' '.join(inspect.cleandoc(part.__doc__ or '').split())}\n".replace("<", "&lt;").replace("{", "&#123;")
        below = list(entries(part, f"{entry.path}."))
        if below:
            yield from _HEAD
        for field in below:
            name = field.path.removeprefix(f"{entry.path}.")
            yield f"| `{name}` | {_cell(field.takes)} | {_cell(field.default, code=True)} | {_cell(field.says)} |"
        for field in below:
            yield from _parts(field, seen)


def _cell(text: str, code: bool = False) -> str:
    text = _one_line(text).replace("|", "\\|")
    if code:
        return f"`{text}`" if text else "must be given"
    return text.replace("<", "&lt;").replace("{", "&#123;").replace("*", "\\*").replace("_", "\\_")


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def notebook(found: dict[str, Any]) -> str:
    """An executed notebook as Markdown: code, and what it printed or showed."""
    parts = []
    for cell in found["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "text/html" in data:
                parts.append("".join(data["text/html"]))
            elif text := "".join(data.get("text/plain", output.get("text", []))):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
