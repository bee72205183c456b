"""What a machine has, as plain values. Needs Python alone, since it is sent as it stands to nodes that may have no dlopt."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("dlopt", "ray", "torch", "pyarrow", "numpy", "onnxruntime")


def look(home: str | None, mark: str) -> dict[str, Any]:
    """Bytes, seconds since 1970 and versions; home: a folder in which a file of this mark and host is left, if it can be."""
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": {name: _version(name) for name in PACKAGES},
        "disk": _disk(Path(tempfile.gettempdir())),
        "shared_memory": _disk(Path("/dev/shm")) if Path("/dev/shm").is_dir() else None,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "gpus": _gpus(),
        "time": time.time(),
    }
    return found | ({"home": _home(Path(home), f"{mark}-{found['host']}-{os.getpid()}")} if home else {})


def seen(home: str, mark: str) -> list[str]:
    """The files of a mark that this machine sees in a home."""
    return sorted(path.name for path in Path(home).glob(f".doctor-{mark}-*"))


def now() -> float:
    """This machine's clock."""
    return time.time()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _disk(path: Path) -> dict[str, Any]:
    total, _, free = shutil.disk_usage(path)
    return {"path": str(path), "total": total, "free": free}


def _gpus() -> list[str]:
    """By the driver, whatever torch can do with them."""
    try:
        said = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return said.stdout.split("\n")[:-1] if said.returncode == 0 else []


def _home(home: Path, name: str) -> dict[str, Any]:
    """Whether it can be written: a file under another name, flushed, renamed and read."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with open(home / f".doctor-new-{name}", "w") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
        (home / f".doctor-new-{name}").rename(home / f".doctor-{name}")
        if (home / f".doctor-{name}").read_text() != name:
            return {"error": "what is written there is not what is read"}
        return {"error": None, "file": f".doctor-{name}", **_disk(home)}
    except OSError as error:
        return {"error": error.strerror or str(error)}
