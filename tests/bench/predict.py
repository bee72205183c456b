"""`dlopt predict` of a million rows against onnxruntime in a loop on the same rows, encoded before: reading, decoding and writing are ours
alone. A table of flights, numbers, categories and dates to one number; weights are random.

    python -m tests.bench.predict --json
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq

from dlopt.api.scoring import BATCH_ROWS, score
from tests.serve.test_predict import FLIGHT_INPUTS, flights, made
from tests.served import FLIGHTS, make_export

PARTS = 10


def measure(rows: int, rounds: int) -> dict[str, object]:
    """Rows a second of each, and the ratios, one a round."""
    home = Path(tempfile.mkdtemp(prefix="bench-", dir="/tmp"))
    try:
        made(home, "flights", FLIGHTS, FLIGHT_INPUTS, {"kind": "number", "columns": ["minutes"]})
        frame = flights(rows)
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), home / "in.parquet", row_group_size=rows // PARTS)
        tensors = encoded(frame)
        pairs = []
        for number in range(rounds):
            start = time.perf_counter()
            score("flights", str(home / "in.parquet"), home / f"out{number}.parquet", home=home)
            ours = rows / (time.perf_counter() - start)
            pairs.append((ours, own_rate(make_export(home, FLIGHTS).path / "model.onnx", tensors, rows)))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    ratios = [ours / own for ours, own in pairs]
    return {
        "rows": rows,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "rows_per_s": round(statistics.median(ours for ours, _ in pairs)),
        "onnxruntime_rows_per_s": round(statistics.median(own for _, own in pairs)),
    }


def encoded(frame: object) -> dict[str, np.ndarray]:
    """What the model takes of all rows."""
    from dlopt.data.kinds import encode_columns

    columns = {name: frame[name].tolist() for name in ("delay", "distance", "carrier", "airport", "day")}  # type: ignore[index]
    for name in ("delay", "distance"):
        columns[name] = [None if value != value else value for value in columns[name]]
    columns["carrier"] = [value if isinstance(value, str) else None for value in columns["carrier"]]
    return encode_columns(FLIGHTS, columns)


def own_rate(model: Path, tensors: dict[str, np.ndarray], rows: int) -> float:
    """Rows a second of onnxruntime with all its threads, in batches as ours."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    start = time.perf_counter()
    for at in range(0, rows, BATCH_ROWS):
        session.run(None, {name: values[at : at + BATCH_ROWS] for name, values in tensors.items()})
    return rows / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found = measure(options.rows, options.rounds)
    print(json.dumps(found) if options.json else "\n".join(f"{name:>24}  {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
