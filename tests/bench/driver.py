"""What the driver of a large `prepare` holds in memory, and what a pass costs by the number of files.

    python -m tests.bench.driver --json
    python -m tests.bench.driver --part bad --part classes

bad: a million rows of CSV that cannot be read among two million. images: a million files of images in two folders. classes: a million rows
of 10,000 classes, each split exactly. pieces: the same 400,000 rows in 250, 1,000 and 4,000 files; seconds of the stage, as multiples of
those of 250 files. Each is measured in a process of its own, which finds
the files made: the peak of its resident memory, Ray's workers not included.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image

MILLION = 10**6
SECTION = "section.json"
LINKS = 50_000
"""Names of one file; file systems bound their number."""


def prepare(folder: Path) -> dict[str, float]:
    """Of what was made there: seconds of the stage, and the driver's peak in MiB, with what it had before."""
    from dlopt import session
    from dlopt.artifact import once
    from dlopt.data.prepare import PREPARE
    from dlopt.data.section import Data

    with tempfile.TemporaryDirectory() as home, session.connected(cpus=2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        started = time.perf_counter()
        artifact = once(PREPARE, Data.model_validate(json.loads((folder / SECTION).read_text())), Path(home))
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "driver_mib": peak, "driver_mib_before": before, **artifact.info["counts"]}


def bad(folder: Path) -> dict[str, Any]:
    random = np.random.default_rng(0)
    values = pa.array(random.normal(size=2 * MILLION)).cast(pa.string()).to_numpy(zero_copy_only=False)
    values[::2] = [f"no number {row}" for row in range(MILLION)]
    pa.csv.write_csv(pa.table({"x": values, "y": random.integers(0, 2, 2 * MILLION)}), folder / "rows.csv")
    return {
        "source": {"kind": "csv", "path": str(folder / "rows.csv")},
        "most_bad": 1.0,
        "inputs": [{"kind": "number", "columns": ["x"]}],
        "target": {"kind": "category", "column": "y"},
    }


def images(folder: Path) -> dict[str, Any]:
    random = np.random.default_rng(0)
    for number in range(MILLION):
        path = folder / "images" / "ab"[number % 2] / f"{number:07d}.png"
        if number < 2:
            path.parent.mkdir(parents=True)
        if number % LINKS < 2:
            content = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (4, 4), dtype=np.uint8)).save(content, "png")
            path.write_bytes(content.getvalue())
        else:
            os.link(path.parent / f"{number - number % LINKS + number % 2:07d}.png", path)
    return {"source": {"kind": "images", "path": str(folder / "images")}, "inputs": [{"kind": "image"}], "target": {"kind": "category"}}


def classes(folder: Path) -> dict[str, Any]:
    random = np.random.default_rng(0)
    labels = random.permutation(np.arange(MILLION) % 10_000)
    pq.write_table(pa.table({"x": random.normal(size=MILLION), "y": labels}), folder / "rows.parquet")
    return {
        "source": {"kind": "parquet", "path": str(folder / "rows.parquet")},
        "inputs": [{"kind": "number", "columns": ["x"]}],
        "target": {"kind": "category", "column": "y"},
        "split": {"kind": "stratified"},
    }


def pieces(folder: Path, count: str) -> dict[str, Any]:
    table = pa.table({f"x{column}": np.random.default_rng(column).normal(size=400_000) for column in range(8)})
    table = table.append_column("y", pa.array(np.arange(400_000) % 2))
    rows = len(table) // int(count)
    (folder / "pieces").mkdir()
    for number in range(int(count)):
        pq.write_table(table.slice(number * rows, rows), folder / "pieces" / f"part-{number:05d}.parquet")
    return {
        "source": {"kind": "parquet", "path": str(folder / "pieces")},
        "inputs": [{"kind": "number", "columns": [f"x{column}" for column in range(8)]}],
        "target": {"kind": "category", "column": "y"},
    }


MADE: dict[str, Callable[..., dict[str, Any]]] = {"bad": bad, "images": images, "classes": classes, "pieces": pieces}


def measure(name: str, *arguments: str) -> dict[str, float]:
    """Made and measured in processes of their own, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        run("make", folder, name, *arguments)
        found: dict[str, float] = json.loads(run("prepare", folder).splitlines()[-1])
    return found


def run(*words: str) -> str:
    command = [sys.executable, "-m", "tests.bench.driver", "--one", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"RAY_AUTH_MODE": "disabled"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--part", action="append", choices=list(MADE), help="only this one (may be given several times)")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, folder, *words = options.one
        if what == "prepare":
            print(json.dumps(prepare(Path(folder))))
        else:
            (Path(folder) / SECTION).write_text(json.dumps(MADE[words[0]](Path(folder), *words[1:])))
        return
    figures: dict[str, Any] = {name: measure(name) for name in options.part or MADE if name != "pieces"}
    if not options.part or "pieces" in options.part:
        seconds = {count: measure("pieces", count)["seconds"] for count in ("250", "1000", "4000")}
        figures["pieces"] = {f"{count} files, seconds over those of 250": value / seconds["250"] for count, value in seconds.items()}
        figures["pieces"] |= {f"{count} files, seconds": value for count, value in seconds.items()}
    if options.json:
        print(json.dumps(figures, indent=1))
        return
    for title, found in figures.items():
        print(f"{title}: " + ", ".join(f"{name} {value:,.4g}" for name, value in found.items()))


if __name__ == "__main__":
    main()
