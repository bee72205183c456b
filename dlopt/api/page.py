"""A page that is a file, shown inline where a notebook can."""

from __future__ import annotations

import html
import webbrowser
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Page:
    """One self-contained HTML file. In a notebook it shows itself; elsewhere `open` shows it in a browser."""

    path: Path
    height: int = 720
    """Of the frame that it is shown in, in pixels."""

    def __fspath__(self) -> str:
        return str(self.path)

    def open(self) -> None:
        """Show it in a browser."""
        webbrowser.open(self.path.resolve().as_uri())

    def _repr_html_(self) -> str:
        content = html.escape(self.path.read_text(), quote=True)
        style = f"width: 100%; height: {self.height}px; border: 1px solid #8884"
        return f'<iframe title="{html.escape(self.path.name)}" sandbox="allow-popups" style="{style}" srcdoc="{content}"></iframe>'
