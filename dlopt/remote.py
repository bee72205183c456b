"""A home in an object store (s3://, gs://), for which a folder of each machine stands, as a cache.

What is made in the folder is put into the store before it counts as made, file by file, what names the files last; what is not here is
fetched by its name. Nothing is decided by listing, which a store may do late. Processes know of it by an environment variable.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from dlopt.part import DloptError

VARIABLE = "DLOPT_REMOTE_HOME"
MANIFEST = "manifest.json"
"""The file of an artifact that names all others, with which it is whole."""
TRIES, PAUSE = 4, 0.5
"""How often a store is asked, and seconds before the second time, which double."""
EVERY = 1.0
"""Seconds between two looks of `Exchange`."""


@dataclass(frozen=True)
class Remote:
    """A home in a store."""

    address: str
    folder: Path
    """Which stands for it on this machine."""
    spread: bool = False
    """Whether other machines work on it at the same time."""

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        place, path = import_module("dlopt.data.sources.places").place_of(self.address)  # by its name: this module is below it
        return place.filesystem, str(path).rstrip("/")

    @property
    def filesystem(self) -> Any:
        """pyarrow's."""
        return self._opened[0]

    def key(self, path: Path) -> str:
        """Where a path of the folder lies, within the file system."""
        inside = path.relative_to(self.folder)
        return f"{self._opened[1]}/{inside}" if inside.parts else self._opened[1]

    def said(self, path: Path) -> str:
        """The same for people."""
        return f"{self.address.partition('?')[0].rstrip('/')}/{path.relative_to(self.folder)}"

    def asked(self, what: str, path: Path, function: Any, *given: Any) -> Any:
        """What a function of the file system says, which is asked again when it fails. Raises DloptError; FileNotFoundError at once."""
        for number in range(TRIES):
            try:
                return function(*given)
            except FileNotFoundError:
                raise
            except (OSError, ValueError) as error:
                if number == TRIES - 1:
                    line = str(error).strip().splitlines()[0]
                    raise DloptError(f"--home: cannot {what} {self.said(path)}: {line}") from None
                time.sleep(PAUSE * 2**number)

    def put(self, path: Path) -> None:
        """A file, whole or not at all: a store shows nothing before all of it has come."""

        def write() -> None:
            with open(path, "rb") as source, self.filesystem.open_output_stream(self.key(path)) as sink:
                while piece := source.read(2**23):
                    sink.write(piece)

        self.asked("write", path, write)

    def get(self, path: Path) -> bool:
        """Fetch a file, whatever there is of it here; whether the store has it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")

        def read() -> None:
            with self.filesystem.open_input_stream(self.key(path), compression=None) as source, open(temporary, "wb") as sink:
                while piece := source.read(2**23):
                    sink.write(piece)

        try:
            self.asked("read", path, read)
            temporary.replace(path)
            return True
        except FileNotFoundError:
            return False
        finally:
            temporary.unlink(missing_ok=True)

    def info(self, path: Path) -> Any:
        """pyarrow's FileInfo."""
        return self.asked("look at", path, self.filesystem.get_file_info, self.key(path))

    def has(self, path: Path) -> bool:
        return bool(self.info(path).is_file)


def home_path(home: str | Path) -> Path:
    """The folder of a home: itself, or what stands for an object store on this machine. Asks nobody."""
    address = str(home)
    if "://" not in address:
        return Path(address).expanduser()
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dlopt" / "homes"
    folder = (cached / hashlib.sha256(address.encode()).hexdigest()[:12]).resolve()
    os.environ[VARIABLE] = json.dumps({"address": address, "folder": str(folder), "spread": False})
    return folder


def spread() -> dict[str, str]:
    """From now on other machines work on the home, too; the environment that their processes need."""
    given = os.environ.get(VARIABLE)
    if given is None:
        return {}
    os.environ[VARIABLE] = json.dumps(json.loads(given) | {"spread": True})
    names = (VARIABLE, "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
    return {name: os.environ[name] for name in names if name in os.environ}


@cache
def _remote(given: str) -> Remote:
    found = json.loads(given)
    return Remote(found["address"], Path(found["folder"]), found["spread"])


def remote_of(path: Path) -> Remote | None:
    """The home in a store that a path belongs to, if it is in one."""
    given = os.environ.get(VARIABLE)
    if given is None:
        return None
    found = _remote(given)
    return found if path.is_absolute() and path.is_relative_to(found.folder) else None


def said(path: Path) -> str:
    """A path as people know it."""
    found = remote_of(path)
    return found.said(path) if found else str(path)


def refuse_unwritable(home: Path) -> None:
    """Raises DloptError when the store of a home, if it is in one, does not take files."""
    if found := remote_of(home):
        home.mkdir(parents=True, exist_ok=True)
        (home / ".home").write_text("written by dlopt, to see whether it can be\n")
        bucket = found.key(home).partition("/")[0]
        try:
            if found.filesystem.get_file_info(bucket).type.name == "NotFound":
                raise DloptError(f"--home: {found.address}: there is no bucket {bucket}: make it, or look at its name and region")
            with found.filesystem.open_output_stream(found.key(home / ".home")) as sink:
                sink.write(b"\n")
        except (OSError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            raise DloptError(f"--home: {found.address} does not let you write: {line}: look at its rights and at your keys") from None


def has(path: Path) -> bool:
    """Whether the store has a file, if it belongs to one."""
    found = remote_of(path)
    return found is not None and found.has(path)


def give(*paths: Path) -> None:
    """Put files into the store that they belong to, in this order. Raises DloptError."""
    for path in paths:
        if found := remote_of(path):
            found.put(path)


def give_spread(path: Path) -> None:
    """The same, of a file that only others who work at the same time need."""
    if (found := remote_of(path)) and found.spread:
        found.put(path)


def take(*paths: Path, anew: bool = False) -> None:
    """Fetch files that are not here. anew: whatever is here of them."""
    for path in paths:
        if (found := remote_of(path)) and (anew or not path.exists()):
            found.get(path)


def take_artifact(path: Path) -> None:
    """Fetch an artifact that is not here: all files that its manifest names, and the manifest last."""
    found = remote_of(path)
    if found is None or (path / MANIFEST).exists():
        return
    try:
        content = found.asked("read", path, _content, found, path / MANIFEST)
        names = list(json.loads(content)["files"])
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        raise DloptError(f"{found.said(path / MANIFEST)}: damaged: delete the folder {found.said(path)} and run the job again") from None
    for name in names:
        if not found.get(path / name):
            raise DloptError(f"{found.said(path / name)}: missing: delete the folder {found.said(path)} and run the job again")
    found.get(path / MANIFEST)


def _content(found: Remote, path: Path) -> bytes:
    with found.filesystem.open_input_stream(found.key(path), compression=None) as source:
        return bytes(source.read())


def give_artifact(path: Path, names: Iterable[str]) -> None:
    """Put a finished artifact into the store, if it is not there: its files, and the manifest, which makes it one, last."""
    found = remote_of(path)
    if found is not None and not found.has(path / MANIFEST):
        give(*(path / name for name in names), path / MANIFEST)


def drop(path: Path) -> None:
    """Remove a folder from the store, what makes it an artifact first."""
    found = remote_of(path)
    if found is None:
        return
    with suppress(FileNotFoundError):
        found.asked("remove", path, found.filesystem.delete_file, found.key(path / MANIFEST))
    with suppress(FileNotFoundError):
        found.asked("remove", path, found.filesystem.delete_dir, found.key(path))


def drop_spread(path: Path) -> None:
    """The same of what only others who work at the same time have needed."""
    if (found := remote_of(path)) and found.spread:
        drop(path)


def unlink(path: Path) -> None:
    """Remove a file, which another machine may have written."""
    path.unlink(missing_ok=True)
    if (found := remote_of(path)) and found.spread:
        with suppress(FileNotFoundError):
            found.asked("remove", path, found.filesystem.delete_file, found.key(path))


def copy(source: Path, goal: Path) -> None:
    """A second name in the store of what it has."""
    found = remote_of(goal)
    if found is not None:
        found.asked("write", goal, found.filesystem.copy_file, found.key(source), found.key(goal))


def folders(home: Path) -> list[str]:
    """The names of the folders of a home in a store, as far as it lists them by now."""
    found = remote_of(home)
    if found is None:
        return []
    selector = import_module("pyarrow.fs").FileSelector(found.key(home), allow_not_found=True)
    return sorted(info.base_name for info in found.asked("list", home, found.filesystem.get_file_info, selector) if not info.is_file)


def machine(folder: Path) -> str:
    """Tells machines, or what they see as their disks, from each other."""
    path = folder / ".machine"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), open(path, "x") as file:
            file.write(uuid.uuid4().hex)
    return path.read_text()


@contextmanager
def exchanged(folder: Path, gives: Sequence[str], takes: Sequence[str]) -> Iterator[None]:
    """Within it, files of a folder go to the store when they change, and come from it when others have changed them, every second; for
    processes of several machines that talk to each other by files. Without such a home nothing."""
    found = remote_of(folder)
    if found is None or not found.spread:
        yield
        return
    exchange, done = Exchange(found, folder, gives, takes), threading.Event()

    def repeat() -> None:
        while not done.wait(EVERY):
            with suppress(DloptError, OSError):  # the next look is soon
                exchange.look()

    thread = threading.Thread(target=repeat, name="dlopt-exchange", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        exchange.look()


def go_on(folder: Path, names: Sequence[str]) -> None:
    """Fetch files that another machine has written last, before this one goes on with them."""
    found = remote_of(folder)
    if found is not None and found.spread:
        folder.mkdir(parents=True, exist_ok=True)
        Exchange(found, folder, (), names).look()


def give_all(folder: Path, but: str) -> dict[str, Any] | None:
    """Put all files of a folder into the store, but those of one folder in it; what `take_from` needs to fetch them."""
    found = remote_of(folder)
    if found is None or not found.spread:
        return None
    there = sorted(path for path in folder.rglob("[!.]*") if path.is_file() and path.relative_to(folder).parts[0] not in (but, MANIFEST))
    give(*there)
    return {"machine": machine(found.folder), "files": [str(path.relative_to(folder)) for path in there]}


def take_from(folder: Path, given: dict[str, Any] | None) -> None:
    """Fetch what another machine has given; of this one all is here."""
    found = remote_of(folder)
    if found is not None and given and given["machine"] != machine(found.folder):
        take(*(folder / name for name in given["files"]), anew=True)


class Exchange:
    """What has been given and taken so far. Of a machine's own files none is taken."""

    def __init__(self, found: Remote, folder: Path, gives: Sequence[str], takes: Sequence[str]) -> None:
        self.found, self.folder, self.gives, self.takes = found, folder, gives, takes
        self.given: dict[str, tuple[int, int]] = {}
        self.taken: dict[str, tuple[Any, int]] = {}
        self.own = machine(found.folder)

    def look(self) -> None:
        """Once."""
        for name in self.gives:
            self._give(name)
        for name in self.takes:
            self._take(name)

    def _give(self, name: str) -> None:
        """A file as it is now; one that is gone goes there, too. Beside it stands whose it is."""
        path = self.folder / name
        try:
            stat = path.stat()
        except FileNotFoundError:
            if self.given.pop(name, None):
                with suppress(FileNotFoundError):
                    self.found.filesystem.delete_file(self.found.key(path))
            return
        if self.given.get(name) != (stat.st_mtime_ns, stat.st_size):
            owner = self.folder / f".{name}.machine"
            if name not in self.given:
                owner.write_text(self.own)
                self.found.put(owner)
            self.found.put(path)
            self.given[name] = (stat.st_mtime_ns, stat.st_size)

    def _take(self, name: str) -> None:
        path, info = self.folder / name, self.found.info(self.folder / name)
        if not info.is_file:
            if self.taken.pop(name, None):
                path.unlink(missing_ok=True)
            return
        if self.taken.get(name) == (info.mtime_ns, info.size):
            return
        with suppress(FileNotFoundError):
            if _content(self.found, self.folder / f".{name}.machine").decode() == self.own:
                return
            self.found.get(path)
            self.taken[name] = (info.mtime_ns, info.size)
