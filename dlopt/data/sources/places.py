"""Where files lie: on disks that every node sees, or behind s3://, gs://, abfs:// and http(s)://.

A Place is opened once, by the process that reads the job, with that process's settings and keys; it travels to the workers as it
is, so that they need no environment variables of their own. Keys are in no file, no digest and no message.
"""

from __future__ import annotations

import datetime
import glob
import itertools
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as fs

from dlopt.part import DloptError

COMPRESSED = (".gz", ".bz2", ".zst", ".lz4", ".zip")
"""Endings of compressed text files."""
ZIP = ".zip"
"""Of these one that holds a single text file is read."""
HIDDEN = (".", "_")
"""What names begin with that programs keep for themselves: .ipynb_checkpoints, ._photo.jpg, _SUCCESS. pyarrow leaves out the same."""
HIDDEN_FILES, OTHER_FILES, LOOSE_FILES = "hidden, by names that begin with . or _", "of another kind", "in no class's folder"
SETTINGS = ("endpoint_override", "region", "scheme", "anonymous")
"""What may follow an object store's path, as in `s3://bucket/folder?endpoint_override=127.0.0.1:9000&scheme=http`."""
LISTED = 2**16
"""Files of a folder that become columns at a time."""
REQUESTS = 16
"""How many requests a server gets at once."""
UNREADABLE = (pa.ArrowException, EOFError, ValueError, zlib.error, zipfile.BadZipFile)
"""What is raised of a file that cannot be read, beside OSError; fsspec's and aiohttp's errors are OSError and ValueError."""
SENT = "DLOPT_SENT"
"""The environment variable that names the folder of what `dlopt submit` has sent along, on the cluster."""
CONNECT_SECONDS = 10.0
"""How long an object store may take to answer before it is said not to."""


@dataclass(frozen=True)
class File:
    """One file as it is found."""

    name: str
    """Absolute path or address, as it is said to the user."""
    path: str
    """The same within its place."""
    size: int = 0
    changed: int | str | None = None
    """When or how it last changed: nanoseconds, or what a web server says of it."""
    inside: str = ""
    """Its path within the folder that was asked for; "" of a file that was asked for itself."""

    @property
    def folder(self) -> str:
        """The folders on the way to it from there."""
        return self.inside.rpartition("/")[0]

    @property
    def state(self) -> list[str | int | None]:
        """What tells its content from another's: changed files are new data."""
        return [as_sent(self.name), self.size, self.changed]


LeftOut = list[str]
"""Names of files that are no data."""


@dataclass(frozen=True)
class Listing:
    """What there is of some paths, and what of it is no data."""

    place: Place
    files: list[File]
    """Sorted, each once."""
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    """By why they are left out."""


@dataclass(frozen=True)
class Folders:
    """The files in the folders of a folder. There may be millions, so they are columns."""

    place: Place
    path: str
    """The folder, within its place."""
    files: pa.Table
    """`inside`, the path of each within the folder, by which they are sorted; `size`; and `changed`, as text."""
    left_out: dict[str, LeftOut]


@dataclass(frozen=True)
class Place:
    """A file system, and what stands before its paths in an address."""

    filesystem: fs.FileSystem
    prefix: str = ""

    @property
    def is_local(self) -> bool:
        return not self.prefix

    def stream(self, path: str) -> Any:
        """The bytes of a file from its beginning, decompressed if its name says that it is compressed."""
        return unzipped(self.file(path)) if path.lower().endswith(ZIP) else self.filesystem.open_input_stream(path)

    def file(self, path: str) -> Any:
        """A file to be read at any place."""
        return self.filesystem.open_input_file(path)

    def read(self, path: str) -> bytes:
        with self.filesystem.open_input_stream(path, compression=None) as stream:
            return stream.read()

    def each(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """What a function that waits for the place says of each item; of a server, many at once."""
        if self.is_local:
            return list(map(function, items))
        with ThreadPoolExecutor(REQUESTS) as threads:
            return list(threads.map(function, items))

    def file_infos(self, paths: Sequence[str]) -> list[File]:
        """Sizes and times; a file that is not there has none."""
        found = self.filesystem.get_file_info(list(paths))
        return [File(self.prefix + path, path, info.size or 0, info.mtime_ns) for path, info in zip(paths, found, strict=True)]

    def under(self, path: str) -> tuple[list[File], str]:
        """All files of a path, a folder or a glob, and the glob's pattern from its first wildcard on; "" for no glob."""
        base, pattern = _base(path.rstrip("/"))
        if not pattern and self.kind(base) == fs.FileType.File:
            return self.file_infos([base]), ""
        matches = _regex(path).fullmatch if pattern else None
        return [file for file in self._inside(base) if not matches or matches(file.path)], pattern

    def walked(self, folder: str) -> Iterator[tuple[str, int, int | str | None]]:
        """(path within the folder, size, when or how it changed) of each file in a folder and in its folders."""
        return ((file.inside, file.size, file.changed) for file in self._inside(folder))

    def kind(self, path: str) -> fs.FileType:
        return self.filesystem.get_file_info([path])[0].type

    def _inside(self, folder: str) -> list[File]:
        """All files in a folder and in its folders."""
        infos = self.filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
        start = len(folder) + 1 if folder else 0
        return [File(self.prefix + i.path, i.path, i.size, i.mtime_ns, i.path[start:]) for i in infos if i.type == fs.FileType.File]


@dataclass(frozen=True)
class Disk(Place):
    """Files of this machine, or of disks that all nodes see under the same path."""

    filesystem: fs.FileSystem = field(default_factory=fs.LocalFileSystem)

    def under(self, path: str) -> tuple[list[File], str]:
        base, pattern = _base(path)
        if Path(path).is_dir():
            base, pattern, found = path, "", [inside for inside, _ in _entries(path)]
        elif Path(path).is_file() or not pattern:
            return self.file_infos([_absolute(path)] if os.path.lexists(path) else []), ""
        else:
            found = [os.path.relpath(file, base or ".") for file in glob.glob(path, recursive=True) if not Path(file).is_dir()]
        root = str(Path(base).resolve()).rstrip("/")
        return [_local_file(f"{root}/{inside}", inside) for inside in found], pattern

    def walked(self, folder: str) -> Iterator[tuple[str, int, int | str | None]]:
        for inside, entry in _entries(folder):
            try:
                stat = entry.stat()
            except OSError:  # a link that leads nowhere is found out when it is read
                yield inside, 0, None
            else:
                yield inside, stat.st_size, stat.st_mtime_ns

    def file_infos(self, paths: Sequence[str]) -> list[File]:
        return [_local_file(path) for path in paths]


@dataclass(frozen=True)
class Azure(Place):
    """Azure's blobs; pyarrow does not pass on when they changed."""

    def file_infos(self, paths: Sequence[str]) -> list[File]:
        return self.each(self._info, paths)

    def _inside(self, folder: str) -> list[File]:
        found = self.filesystem.handler.fs.find(folder, detail=True)
        return [replace(self._file(path, info), inside=path[len(folder) + 1 :]) for path, info in found.items()]

    def _info(self, path: str) -> File:
        try:
            return self._file(path, self.filesystem.handler.fs.info(path))
        except FileNotFoundError:
            return File(self.prefix + path, path)

    def _file(self, path: str, info: dict[str, Any]) -> File:
        return File(self.prefix + path, path, info.get("size") or 0, info.get("etag") or str(info.get("last_modified")))


@dataclass(frozen=True)
class Web(Place):
    """Files behind http:// and https://, which cannot be listed. A server need not know ranges of bytes, so files are read whole."""

    filesystem: Any
    """fsspec's."""
    prefix: str = "http"

    def stream(self, path: str) -> Any:
        if urlsplit(path).path.lower().endswith(ZIP):
            return unzipped(self.file(path))
        raw = pa.PythonFile(self.filesystem.open(path, block_size=0), mode="r")
        compression = pa.Codec.detect(urlsplit(path).path).name if urlsplit(path).path.endswith(COMPRESSED) else None
        return pa.CompressedInputStream(raw, compression) if compression else raw

    def file(self, path: str) -> Any:
        return pa.BufferReader(self.read(path))

    def read(self, path: str) -> bytes:
        return bytes(self.filesystem.cat_file(path))

    def file_infos(self, paths: Sequence[str]) -> list[File]:
        return self.each(lambda path: self._info(path) or File(path, path), paths)

    def under(self, path: str) -> tuple[list[File], str]:
        found = self._info(path)
        return [found] if found else [], ""

    def _info(self, path: str) -> File | None:
        try:
            info = self.filesystem.info(path)
        except FileNotFoundError as error:
            if isinstance(error.__cause__, OSError):  # nobody answers, which is not the same as no file
                raise error.__cause__ from None
            return None
        return File(path, path, info.get("size") or 0, info.get("ETag") or info.get("Last-Modified"))


def place_of(path: str) -> tuple[Place, str]:
    """The file system of a path or address, and the path within it; raises DloptError when there is none for it."""
    scheme, found, rest = path.partition("://")
    if not found:
        return Disk(), os.path.expanduser(path)  # noqa: PTH111 (a Path would lose a trailing slash and wildcards' meaning)
    if scheme not in PLACES:
        raise DloptError(f"{path}: {scheme}:// is not known; known are {', '.join(f'{name}://' for name in PLACES)} and plain paths")
    with reading(path):
        return PLACES[scheme](scheme, rest)


def matching(paths: str | Sequence[str], endings: tuple[str, ...], compressed: bool = False) -> Listing:
    """The files of paths, folders, globs or addresses; raises DloptError for what matches none. In a folder only files with these endings
    are meant; hidden ones are left out, in folders and where a wildcard does not begin as they do."""
    places, found, left_out = [], dict[str, File](), dict[str, LeftOut]()
    for path in [paths] if isinstance(paths, str) else paths:
        place, inside = place_of(path)
        with reading(path):
            files, pattern = place.under(inside)
        if not files and not (place.is_local and Path(inside).is_dir()):
            here = "" if "://" in path or Path(path).is_absolute() else f" in {Path.cwd()}, from where relative paths go"
            raise DloptError(f"{path}: no such file{here}; workers read it, so give a path that every node can see")
        kept = []
        for file in files:
            if is_hidden(file.inside, pattern):
                left_out.setdefault(HIDDEN_FILES, []).append(file.inside)
            elif pattern or not file.inside or _ends(file.name, endings, compressed):
                kept.append(file)
            else:
                left_out.setdefault(OTHER_FILES, []).append(file.inside)
        if not kept:
            raise DloptError(f"{path}: this folder holds no {' or '.join(endings)} file{_but(left_out)}")
        if not compressed and (packed := next((file.name for file in kept if file.name.lower().endswith(ZIP)), "")):
            raise DloptError(f"{packed}: is a zip archive: unpack it")
        places.append(place)
        found |= {file.name: file for file in kept}
    if any(place != places[0] for place in places):
        raise DloptError(f"{paths[0]}, {paths[1]}, ...: the files of one source must lie in one place")
    return Listing(places[0], [found[name] for name in sorted(found)], left_out)


def in_folders(path: str, endings: tuple[str, ...]) -> Folders:
    """The files, however deep, in the folders of a folder, which are its classes, as torchvision's ImageFolder has it, but without what is
    hidden. Raises DloptError when there is no such folder."""
    place, folder = place_of(path)
    if isinstance(place, Web):
        raise DloptError(f"{path}: http cannot list folders: copy the files, or list them in a table (kind: image_table)")
    folder = str(Path(folder).resolve()) if place.is_local else folder.rstrip("/")
    with reading(path):
        kind = place.kind(folder)
        files = _as_columns(place.walked(folder) if kind == fs.FileType.Directory else iter(()))
    if folder.lower().endswith(ZIP) and kind == fs.FileType.File:
        raise DloptError(f"{path}: is a zip archive: unpack it")
    if not len(files) and kind != fs.FileType.Directory:
        raise DloptError(f"{path}: no such folder; workers read it, so give a path that every node can see")
    left_out = dict[str, LeftOut]()
    ends = f"(?i)(?:{'|'.join(map(re.escape, endings))})$"
    for why, pattern, keep in ((HIDDEN_FILES, "(?:^|/)[._]", False), (OTHER_FILES, ends, True), (LOOSE_FILES, "/", True)):
        kept = pc.equal(pc.match_substring_regex(files["inside"], pattern), keep)
        if names := files["inside"].filter(pc.invert(kept)).to_pylist():
            left_out[why] = names
        files = files.filter(kept)
    return Folders(place, folder, files.sort_by("inside").combine_chunks(), left_out)


def _as_columns(files: Iterator[tuple[str, int, int | str | None]]) -> pa.Table:
    """See `Folders.files`."""
    schema = pa.schema([("inside", pa.large_string()), ("size", pa.int64()), ("changed", pa.string())])
    parts = [schema.empty_table()]
    while some := list(itertools.islice(files, LISTED)):
        names, sizes, changes = zip(*some, strict=True)
        said = [None if change is None else str(change) for change in changes]
        try:
            parts.append(pa.table([names, sizes, said], schema=schema))
        except UnicodeEncodeError as error:
            raise DloptError(f"{error.object!a}: the name of this file is not UTF-8: rename it") from None
    return pa.concat_tables(parts)


def as_sent(name: str) -> str:
    """The name of a file or a folder; of one that was sent with a job, within what was sent: Ray puts that elsewhere each time."""
    root = os.environ.get(SENT)
    return os.path.relpath(name, root) if root and name.startswith(f"{root}/") else name


def is_hidden(inside: str, pattern: str = "") -> bool:
    """Whether a file's name, or that of a folder on the way to it, begins as those do that programs keep for themselves, and no part of a
    glob's pattern that begins so asks for it."""
    if not any(part.startswith(HIDDEN) for part in inside.split("/")):
        return False
    asked = [part for part in pattern.split("/") if part.startswith(HIDDEN)]
    return any(part.startswith(HIDDEN) and not any(fnmatchcase(part, one) for one in asked) for part in inside.split("/"))


def say_left_out(left_out: dict[str, LeftOut]) -> str:
    """What is left out, in one line; "" for nothing."""
    said = [f"{len(names):,} {why} ({', '.join(names[:2])}{', ...' * (len(names) > 2)})" for why, names in left_out.items()]
    return f"files left out: {'; '.join(said)}" if said else ""


def _but(left_out: dict[str, LeftOut]) -> str:
    return f" but {len(left_out[HIDDEN_FILES])} {HIDDEN_FILES}" if HIDDEN_FILES in left_out else ""


@contextmanager
def reading(file: str) -> Iterator[None]:
    """What pyarrow or a file system says of a file that it cannot read, in one line."""
    try:
        yield
    except (*UNREADABLE, OSError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DloptError(f"{file}: cannot be read: {said}") from None


def unzipped(archive: Any) -> Any:
    """The bytes of the one file in a zip archive, from its beginning. Raises ValueError when there are several, or a password."""
    try:
        opened = zipfile.ZipFile(archive)
    except (zipfile.BadZipFile, pa.ArrowException, OSError):
        raise ValueError("this is no zip archive") from None
    inside = [info for info in opened.infolist() if not info.is_dir() and not is_hidden(info.filename)]
    if len(inside) != 1:
        raise ValueError(f"this zip archive holds {len(inside)} files, and one can be read: unpack it")
    if inside[0].flag_bits & 1:
        raise ValueError("this zip archive asks for a password: unpack it")
    return opened.open(inside[0])


def _entries(folder: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The files in a folder and in its folders, and their paths within it. Links to folders are followed, but not in circles."""
    left = [(folder, "", frozenset[tuple[int, int]]())]
    while left:
        path, inside, above = left.pop()
        stat = os.stat(path)  # noqa: PTH116
        if (here := (stat.st_dev, stat.st_ino)) in above:
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir():
                    left.append((entry.path, f"{inside}{entry.name}/", above | {here}))
                else:
                    yield inside + entry.name, entry


def _absolute(path: str) -> str:
    """With a link's own name, not its goal's."""
    return str(Path(path).parent.resolve() / Path(path).name)


def _local_file(path: str, inside: str = "") -> File:
    try:
        stat = os.stat(path)  # noqa: PTH116
    except OSError:  # a link that leads nowhere is found out when it is read
        return File(path, path, inside=inside)
    return File(path, path, stat.st_size, stat.st_mtime_ns, inside)


def _ends(name: str, endings: tuple[str, ...], compressed: bool) -> bool:
    name = name.lower()
    if compressed and name.endswith(COMPRESSED):
        name = name.rpartition(".")[0]
    return name.endswith(endings)


def _base(path: str) -> tuple[str, str]:
    """The folders before the first part with a wildcard, and the rest."""
    parts = path.split("/")
    wild = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return "/".join(parts[:wild]), "/".join(parts[wild:])


def _regex(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression, as the module `glob` reads it: * stays within a folder, ** does not."""
    parts = pattern.split("/")
    said = ["(?:[^/]+/)*" if part == "**" else _part(part) + "/" for part in parts[:-1]]
    return re.compile("".join(said) + (".*" if parts[-1] == "**" else _part(parts[-1])), re.DOTALL)


def _part(part: str) -> str:
    def said(found: re.Match[str]) -> str:
        token = found[0]
        if token[0] == "[" and len(token) > 1:
            return "[" + token[1:].replace("!", "^", token[1] == "!").replace("\\", "\\\\")
        return {"*": "[^/]*", "?": "[^/]"}.get(token[0]) or re.escape(token)

    return re.sub(r"\*+|\[!?\]?[^\]]*\]|.", said, part)


def _settings(rest: str) -> tuple[str, dict[str, str]]:
    """A path and the settings that follow it; a question mark may also be a glob's."""
    path, mark, query = rest.rpartition("?")
    if not mark or "=" not in query:
        return rest, {}
    settings = dict(parse_qsl(query))
    for name in settings:
        if name not in SETTINGS:
            raise DloptError(f"{path}: {name!r} is no setting of an object store: {', '.join(SETTINGS)}")
    return path, settings


def _endpoint(settings: dict[str, str], *variables: str) -> dict[str, str]:
    """`endpoint_override` and `scheme` of a server that speaks an object store's protocol, from the path or the environment."""
    said = settings.get("endpoint_override") or next((os.environ[name] for name in variables if os.environ.get(name)), "")
    scheme, found, host = said.rpartition("://")
    if not said:
        return {}
    return {"endpoint_override": host.rstrip("/"), "scheme": settings.get("scheme") or (scheme if found else "https")}


def _s3(scheme: str, rest: str) -> tuple[Place, str]:
    """AWS, or a server that speaks its protocol: `AWS_ENDPOINT_URL`, or `?endpoint_override=` after the path."""
    path, settings = _settings(rest)
    endpoint = _endpoint(settings, "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    region = settings.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    names = {"access_key": "AWS_ACCESS_KEY_ID", "secret_key": "AWS_SECRET_ACCESS_KEY", "session_token": "AWS_SESSION_TOKEN"}
    keys = {key: os.environ[name] for key, name in names.items() if os.environ.get(name)}
    if settings.get("anonymous", "false").lower() == "true":
        keys = {"anonymous": True}  # type: ignore[dict-item]
    region = region or ("us-east-1" if endpoint else fs.resolve_s3_region(path.partition("/")[0]))
    return Place(fs.S3FileSystem(**keys, **endpoint, region=region, connect_timeout=CONNECT_SECONDS), "s3://"), path


def _gs(scheme: str, rest: str) -> tuple[Place, str]:
    """Google Cloud Storage, or an emulator: `STORAGE_EMULATOR_HOST`, or `?endpoint_override=` after the path."""
    path, settings = _settings(rest)
    endpoint = _endpoint(settings, "STORAGE_EMULATOR_HOST")
    anonymous = bool(endpoint) or settings.get("anonymous", "false").lower() == "true"
    seconds = datetime.timedelta(seconds=CONNECT_SECONDS)
    return Place(fs.GcsFileSystem(anonymous=anonymous, retry_time_limit=seconds, **endpoint), "gs://"), path


def _abfs(scheme: str, rest: str) -> tuple[Place, str]:
    """Azure, with the account of `AZURE_STORAGE_CONNECTION_STRING`, or of `AZURE_STORAGE_ACCOUNT_NAME` and its key or token."""
    try:
        import adlfs  # noqa: F401
    except ImportError:
        raise DloptError(f"{scheme}://{rest}: needs another package: pip install 'dlopt[remote]'") from None
    import fsspec

    names = ("account_name", "account_key", "connection_string", "sas_token", "tenant_id", "client_id", "client_secret")
    keys = {name: os.environ[variable] for name in names if os.environ.get(variable := f"AZURE_STORAGE_{name.upper()}")}
    filesystem, path = fsspec.core.url_to_fs(f"{scheme}://{rest}", **keys)
    return Azure(fs.PyFileSystem(fs.FSSpecHandler(filesystem)), f"{scheme}://"), path


def _http(scheme: str, rest: str) -> tuple[Place, str]:
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise DloptError(f"{scheme}://{rest}: needs another package: pip install 'dlopt[remote]'") from None
    import fsspec

    return Web(fsspec.filesystem("http")), f"{scheme}://{rest}"


PLACES: dict[str, Callable[[str, str], tuple[Place, str]]] = {
    "file": lambda scheme, rest: (Disk(), rest),
    "s3": _s3,
    "gs": _gs,
    "abfs": _abfs,
    "http": _http,
    "https": _http,
}
"""What stands before :// in a path, and what opens it."""
