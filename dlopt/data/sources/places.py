"""Where files lie: on disks that every node sees, or behind s3://, gs://, abfs:// and http(s)://.

A Place is opened once, by the process that reads the job, with that process's settings and keys; it travels to the workers as it
is, so that they need no environment variables of their own. Keys are in no file, no digest and no message.
"""

from __future__ import annotations

import datetime
import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.fs as fs

from dlopt.part import DloptError

COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
"""Endings of compressed text files."""
SETTINGS = ("endpoint_override", "region", "scheme", "anonymous")
"""What may follow an object store's path, as in `s3://bucket/folder?endpoint_override=127.0.0.1:9000&scheme=http`."""
REQUESTS = 16
"""How many requests a server gets at once."""
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
        return self.filesystem.open_input_stream(path)

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

    def matching(self, path: str, endings: tuple[str, ...], compressed: bool) -> list[File]:
        """The files of a path, a folder or a glob."""
        base, pattern = _base(path.rstrip("/"))
        if not pattern and self._kind(base) == fs.FileType.File:
            return self.file_infos([base])
        inside = self._inside(base)
        if pattern:
            matches = _regex(path).fullmatch
            return [file for file in inside if matches(file.path)]
        found = [file for file in inside if _ends(file.name, endings, compressed)]
        if inside and not found:
            raise _holds_none(self.prefix + path, endings)
        return found

    def in_folders(self, folder: str) -> list[File] | None:
        """The files in the folders of a folder, no deeper; None where there is no such folder."""
        depth = folder.rstrip("/").count("/") + 2
        inside = self._inside(folder.rstrip("/"))
        return [file for file in inside if file.path.count("/") == depth] if inside else None

    def _kind(self, path: str) -> fs.FileType:
        return self.filesystem.get_file_info([path])[0].type

    def _inside(self, folder: str) -> list[File]:
        """All files in a folder and in its folders."""
        infos = self.filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
        return [File(self.prefix + i.path, i.path, i.size, i.mtime_ns) for i in infos if i.type == fs.FileType.File]


@dataclass(frozen=True)
class Disk(Place):
    """Files of this machine, or of disks that all nodes see under the same path."""

    filesystem: fs.FileSystem = field(default_factory=fs.LocalFileSystem)

    def matching(self, path: str, endings: tuple[str, ...], compressed: bool) -> list[File]:
        if Path(path).is_dir():
            found = [str(file) for file in Path(path).rglob("*") if _ends(file.name, endings, compressed) and not file.is_dir()]
            if not found:
                raise _holds_none(path, endings)
        else:
            found = [path] if Path(path).is_file() else glob.glob(path, recursive=True)
        return self.file_infos([str(Path(file).parent.resolve() / Path(file).name) for file in found])  # a link's own name, not its goal's

    def in_folders(self, folder: str) -> list[File] | None:
        if not Path(folder).is_dir():
            return None
        return self.file_infos([str(file) for file in Path(folder).resolve().glob("*/*") if not file.is_dir()])

    def file_infos(self, paths: Sequence[str]) -> list[File]:
        return [_local_file(path) for path in paths]


@dataclass(frozen=True)
class Azure(Place):
    """Azure's blobs; pyarrow does not pass on when they changed."""

    def file_infos(self, paths: Sequence[str]) -> list[File]:
        return self.each(self._info, paths)

    def _inside(self, folder: str) -> list[File]:
        found = self.filesystem.handler.fs.find(folder, detail=True)
        return [self._file(path, info) for path, info in found.items()]

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
        raw = pa.PythonFile(self.filesystem.open(path, block_size=0), mode="r")
        compression = pa.Codec.detect(urlsplit(path).path).name if urlsplit(path).path.endswith(COMPRESSED) else None
        return pa.CompressedInputStream(raw, compression) if compression else raw

    def file(self, path: str) -> Any:
        return pa.BufferReader(self.read(path))

    def read(self, path: str) -> bytes:
        return bytes(self.filesystem.cat_file(path))

    def file_infos(self, paths: Sequence[str]) -> list[File]:
        return self.each(lambda path: self._info(path) or File(path, path), paths)

    def matching(self, path: str, endings: tuple[str, ...], compressed: bool) -> list[File]:
        found = self._info(path)
        return [found] if found else []

    def in_folders(self, folder: str) -> list[File] | None:
        raise DloptError(f"{folder}: http cannot list folders: copy the files, or list them in a table (kind: image_table)")

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
        return Disk(), path
    if scheme not in PLACES:
        raise DloptError(f"{path}: {scheme}:// is not known; known are {', '.join(f'{name}://' for name in PLACES)} and plain paths")
    with reading(path):
        return PLACES[scheme](scheme, rest)


def matching(paths: str | Sequence[str], endings: tuple[str, ...], compressed: bool = False) -> tuple[Place, list[File]]:
    """The files of paths, folders, globs or addresses, sorted and each once; raises DloptError for what matches none."""
    places, found = [], dict[str, File]()
    for path in [paths] if isinstance(paths, str) else paths:
        place, inside = place_of(path)
        with reading(path):
            files = place.matching(inside, endings, compressed)
        if not files:
            raise DloptError(f"{path}: no such file; workers read it, so give a path that every node can see")
        places.append(place)
        found |= {file.name: file for file in files}
    if any(place != places[0] for place in places):
        raise DloptError(f"{paths[0]}, {paths[1]}, ...: the files of one source must lie in one place")
    return places[0], [found[name] for name in sorted(found)]


@contextmanager
def reading(file: str) -> Iterator[None]:
    """What pyarrow or a file system says of a file that it cannot read, in one line."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:  # fsspec's and aiohttp's errors are OSError and ValueError
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DloptError(f"{file}: cannot be read: {said}") from None


def _local_file(path: str) -> File:
    try:
        stat = os.stat(path)  # noqa: PTH116
    except OSError:  # a link that leads nowhere is found out when it is read
        return File(path, path)
    return File(path, path, stat.st_size, stat.st_mtime_ns)


def _ends(name: str, endings: tuple[str, ...], compressed: bool) -> bool:
    name = name.lower()
    if compressed and name.endswith(COMPRESSED):
        name = name.rpartition(".")[0]
    return name.endswith(endings)


def _holds_none(path: str, endings: tuple[str, ...]) -> DloptError:
    return DloptError(f"{path}: this folder holds no {' or '.join(endings)} file")


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
