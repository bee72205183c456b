"""The documentation: pages as Markdown in this folder, fields of jobs written from the parts, built by mkdocs into a site that asks
for nothing from elsewhere."""

from __future__ import annotations

import os
import shutil
import tempfile
import webbrowser
from collections.abc import Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dlopt.artifact import versions
from dlopt.part import DloptError

PAGES = Path(__file__).parent / "pages"
CONFIG = PAGES.parent / "mkdocs.yml"


def folder_of_pages() -> Path:
    """Where built pages stay: in the user's cache, by version."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dlopt" / f"docs-{versions().get('dlopt', '0')}"


def build(out: Path, commands: Mapping[str, str]) -> Path:
    """Build all pages into a folder, any warning being an error. commands: name to the text of its help. Raises DloptError."""
    try:
        from mkdocs.commands.build import build as mkdocs_build
        from mkdocs.config import load_config
    except ImportError:
        raise DloptError("docs: mkdocs is not installed: pip install 'dlopt[docs]', or show a page here: dlopt docs start") from None
    from mkdocs.exceptions import Abort

    out = out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(str(CONFIG), site_dir=str(Path(folder) / "site"), strict=True)
        config.extra["commands"] = dict(commands)
        config.plugins.on_startup(command="build", dirty=False)
        try:
            mkdocs_build(config)
        except Abort as error:
            raise DloptError(f"docs: {error}") from None
        finally:
            config.plugins.on_shutdown()
        if out.exists() and not (out / "sitemap.xml").exists() and any(out.iterdir()):
            raise DloptError(f"docs: {out} holds other files: give an empty folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(Path(folder) / "site", out)
    return out


class _Quiet(SimpleHTTPRequestHandler):
    """One that says nothing of requests."""

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def serve(site: Path) -> None:
    """Open the pages in a browser, from a server on this machine alone, without which a browser would not search them; until Ctrl-C."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site))) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        print(f"{url}   Ctrl-C ends it", flush=True)
        webbrowser.open(url)
        server.serve_forever()


def show(name: str) -> None:
    """A page in the terminal. Raises DloptError for one that there is not."""
    from rich.console import Console
    from rich.markdown import Markdown

    pages = {str(path.relative_to(PAGES).with_suffix("")): path for path in sorted(PAGES.rglob("*.md"))}
    if name not in pages:
        raise DloptError(f"docs: there is no page {name!r}; there are {', '.join(pages)}")
    Console().print(Markdown(pages[name].read_text()))
