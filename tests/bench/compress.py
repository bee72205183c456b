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
PLACES: dict[str, str] = {}
"""Where MNIST is, if it is not where the jobs say."""
STATIC = [{"kind": "quantize", "mode": "static", "per_channel": True}]
MLP_1024 = {"name": "mlp_1024", "model.hidden": [1024, 1024], "train.epochs": 4}
CNN = {"train.epochs": 2}
RESNET_8 = {"name": "resnet_8", "model": {"kind": "resnet", "blocks": [1, 1, 1]}, "train.epochs": 2}
CASES = {
    "lenet_300_100": ("lenet_300_100.yaml", {}),  # Deep Compression: 27 KB at 1.58 % error; Sparse VD: 68 times at 1.92 %
    "lenet_5": ("lenet_5.yaml", {}),  # Deep Compression: 44 KB at 0.74 % error; Sparse VD: 280 times at 0.75 %
    "mlp_1024": ("mnist_full.yaml", MLP_1024 | {"compress": [{"kind": "quantize"}]}),
    "mlp_1024_static": ("mnist_full.yaml", MLP_1024 | {"compress": STATIC}),
    "cnn": ("mnist_cnn.yaml", CNN | {"compress": STATIC}),
    "resnet_8": ("mnist_cnn.yaml", RESNET_8 | {"compress": STATIC}),
    "resnet_8_half": ("mnist_cnn.yaml", RESNET_8 | {"compress": [{"kind": "structured", "work": 0.5, "epochs": 1, "rate": 0.3}]}),
}
SEEDS = (1, 2, 3)
TAUGHT = {"name": "mlp_128_taught", "train.epochs": 6}


def distilled(home: Path) -> None:
    """The CNN's knowledge in the MLP of 128 units, beside the same MLP trained alone: the same epochs, three seeds."""
    teacher = dlopt.run(JOBS / "mnist_cnn.yaml", home=home, **PLACES, **CNN)
    pairs = []
    for seed in SEEDS:
        part = {"kind": "distil", "teacher": str(teacher.folder)}
        done = dlopt.run(JOBS / "mnist_full.yaml", home=home, **PLACES, **TAUGHT, seed=seed, compress=[part])
        pairs.append([row["value"] for row in done.compressed])
        print(f"distil, seed {seed}: alone {pairs[-1][0]:.4f}, taught {pairs[-1][1]:.4f}", flush=True)
    alone, taught = zip(*pairs, strict=True)
    gain, spread = sum(taught) / len(taught) - sum(alone) / len(alone), max(max(alone) - min(alone), max(taught) - min(taught))
    print(f"distil: teacher {teacher.metrics['test']['accuracy']:.4f}, gain {gain:.4f}, the larger spread of the two {spread:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=[*CASES, "distil"], choices=[*CASES, "distil", []], metavar="CASE")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="train.parquet and test.parquet of MNIST, if not where the jobs say")
    parser.add_argument("--home", type=Path, default=Path("runs"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.data:
        PLACES.update({"data.source.path": str(options.data / "train.parquet"), "data.test.path": str(options.data / "test.parquet")})
    for case in options.cases:
        if case == "distil":
            distilled(options.home)
            continue
        job, overrides = CASES[case]
        done = dlopt.run(JOBS / job, home=options.home, **PLACES, **overrides)
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
