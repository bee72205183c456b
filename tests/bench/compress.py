"""What compression costs and brings on all of MNIST, beside what others have published: `python -m tests.bench.compress [CASE ...]`.

Each case is a job; its table is that of the run: bytes, packed bytes, numbers, times on one thread (both files in turn), test accuracy,
agreement. What is there already in --home is not trained again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import dlopt

JOBS = Path(__file__).resolve().parents[2] / "jobs"
WHOLE, STATIC = [{"kind": "quantize"}], [{"kind": "quantize", "mode": "static"}]
CASES = {
    "lenet_300_100": ("lenet_300_100.yaml", {}),  # Deep Compression: 27 KB at 1.58 % error; Sparse VD: 68 times at 1.92 %
    "mlp_1024": (
        "mnist_full.yaml",
        {"name": "mlp_1024", "model.hidden": [1024, 1024], "train.epochs": 4, "compress": [{"kind": "quantize"}]},
    ),
    "cnn": ("mnist_cnn.yaml", {"compress": STATIC}),
    "resnet_8": (
        "mnist_cnn.yaml",
        {"name": "resnet_8", "model": {"kind": "resnet", "blocks": [1, 1, 1]}, "train.epochs": 2, "compress": STATIC},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES), choices=[*CASES, []], metavar="CASE")
    parser.add_argument("--home", type=Path, default=Path("runs"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for case in options.cases:
        job, overrides = CASES[case]
        done = dlopt.run(JOBS / job, home=options.home, **overrides)
        if options.json:
            print(json.dumps({"case": case, "run": str(done.folder), "table": done.compressed}), flush=True)
            continue
        before, after = done.compressed
        print(f"{case}: error {1 - before['value']:.2%} -> {1 - after['value']:.2%}, agreement {after['agreement']:.4f}")
        print(f"  bytes {before['bytes']:,} -> {after['bytes']:,} ({after['bytes'] / before['bytes']:.3f}), packed {after['zlib']:,}")
        print(
            f"  numbers {before['parameters']:,} -> {after['nonzero']:,} not 0; packed, {before['bytes'] / after['zlib']:.0f} times smaller"
        )
        times = (f"{batch}: {before[f'seconds_{batch}'] / after[f'seconds_{batch}']:.2f} times as fast" for batch in (1, 32))
        print(f"  at batch {', '.join(times)}", flush=True)


if __name__ == "__main__":
    main()
