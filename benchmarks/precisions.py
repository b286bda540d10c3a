"""The same training in FP32 and in bf16, seed by seed: does bf16 cost F1?

    python -m benchmarks.precisions --output_dir=DIR [--seeds=1,2,3] -- train_qa.py FLAGS ...

FLAGS are a script's flags without --output_dir, --precision and --seed. The figures come from
metrics.json, for the delivered weights in FP32. Stopped runs resume.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

PRECISIONS = ("fp32", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True, help="folder for the runs' folders")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--score", default="f1", help="a figure of metrics.json")
    parser.add_argument("command", nargs="+", help="the script and its flags")
    args = parser.parse_args()
    script, *flags = args.command
    scores: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for seed in args.seeds.split(","):
        for precision in PRECISIONS:
            out = os.path.join(args.output_dir, f"{precision}-{seed}")
            own = [f"--output_dir={out}", f"--precision={precision}", f"--seed={seed}"]
            command = [sys.executable, os.path.join(ROOT, script), *flags, *own]
            subprocess.run(command, check=True)
            with open(os.path.join(out, "metrics.json"), encoding="utf-8") as file:
                scores[precision].append(json.load(file)[args.score])
        print(f"seed {seed}: " + ", ".join(f"{p} {s[-1]:.2f}" for p, s in scores.items()))
    for precision, each in scores.items():
        spread = statistics.stdev(each) if len(each) > 1 else 0.0
        print(f"{precision}: mean {statistics.mean(each):.2f}, standard deviation {spread:.2f}")


if __name__ == "__main__":
    main()
