"""Quantization phase by phase: FP32, calibrated, ranges trained, weights trained, over seeds.

    python -m benchmarks.int8_ranges --models=DIR,DIR --squad_train_data=TRAIN \
        --squad_dev_data=DEV --output_dir=DIR [--settings=given,tensor] [--seeds=1,2] \
        [--questions=3000] [--ranges=0.1 --weights=0.4] [--jobs=4 --minutes=10] \
        [--flags="--precision=fp32"]

Each row is a run of train_qa.py or train_qcemb.py with a variant of --nncf_config (SETTINGS). The
main figures are F1 and MRR, by which the best weights are kept; a table of EM and top 5 follows.
The last column is the standard error over draws of questions of the trained F1 minus FP32's, where
the folder of the FP32 model has its predictions.json: less than twice that is chance.
Rows that int8_ranges.json has are not run again, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.packing import ROOT, Job, is_embedder, run_all, scores, subset
from cli import ArgumentParser, Interrupted, UserError, number, run_main

PHASES = ("fp32", "calibrated", "ranges", "weights")
SHARED = "--keep=last --per_gpu_train_batch_size=32 --per_gpu_eval_batch_size=64 --max_drop=100"
EMBEDDING = "--loss_cfg=triplet_num:0,in_batch:1 --hnm_num=32 --hnm_batch_size=32"
RANGES = "activations_range_estimator_params"


def ends(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """How the two ends of activations' ranges are fitted."""
    return {"advanced_parameters": {RANGES: {"min": low, "max": high}}}


QUANTILE = {"statistics_type": "quantile", "aggregator_type": "mean", "quantile_outlier_prob": 1e-4}
HISTOGRAM = {"statistics_type": "raw", "aggregator_type": "histogram"}
# What a variant changes in --nncf_config.
SETTINGS: dict[str, dict[str, Any]] = {
    "given": {},
    "tensor": {"advanced_parameters": {"weights_quantization_params": {"per_channel": False}}},
    "performance": {"preset": "performance"},
    "unsmoothed": {"advanced_parameters": {"smooth_quant_alphas": {"matmul": -1}}},
    "quantile": ends(QUANTILE, QUANTILE),
    "mse": ends(HISTOGRAM, HISTOGRAM),
}


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", required=True, help="comma-separated FP32 models of any task")
    add("--squad_train_data", required=True)
    add("--squad_dev_data", required=True)
    add("--output_dir", required=True, help="folder of all runs and int8_ranges.json")
    add("--nncf_config", default=str(ROOT / "nncf_config.json"))
    add("--settings", default="given", help=f"comma-separated, of {', '.join(SETTINGS)}")
    add("--seeds", default="1,2", help="comma-separated numbers")
    add("--questions", type=number(int, 1),
        help="train on random articles with about so many questions (default: all)")  # fmt: skip
    add("--ranges", type=number(float, 0), default=0.25, help="epochs on ranges alone")
    add("--weights", type=number(float, 0), default=0.5, help="epochs on all weights")
    add("--learning_rate", type=number(float, 0), default=1e-4)
    add("--jobs", type=number(int, 1), default=1, help="parallel runs")
    add("--minutes", type=number(float, 0), default=float("inf"),
        help="start no run after so many")  # fmt: skip
    add("--flags", default="", help="further flags of all runs, in one string")
    return parser.parse_args()


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes at any depth."""
    settings = copy.deepcopy(settings)
    for key, value in changes.items():
        inner = settings.get(key)
        settings[key] = merged(inner, value) if isinstance(inner, dict) else value
    return settings


def run_folder(folder: Path, title: str, seed: str) -> Path:
    """The folder of a run, which a row's title and a seed give."""
    return folder / f"{title.replace(', ', '-')}-{seed}"


def make_jobs(args: argparse.Namespace, folder: Path) -> list[Job]:
    """All runs: every model and variant with one seed, then with the next."""
    jobs = []
    train = subset(args.squad_train_data, args.questions, folder)
    given = json.loads(Path(args.nncf_config).read_text(encoding="utf-8"))
    for name in args.settings.split(","):
        if name not in SETTINGS:
            raise UserError(f"--settings: {name!r} is none of {', '.join(SETTINGS)}")
        text = json.dumps(merged(given, SETTINGS[name]), indent=1)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    for seed in args.seeds.split(","):
        for model in args.models.split(","):
            embeds = is_embedder(model, "--models")
            for name in args.settings.split(","):
                title = f"{os.path.basename(os.path.abspath(model))}, {name}"
                output_dir = run_folder(folder, title, seed)
                flags = [
                    f"--model_student={os.path.abspath(model)}",
                    f"--squad_train_data={train}",
                    f"--squad_dev_data={os.path.abspath(args.squad_dev_data)}",
                    f"--output_dir={output_dir}",
                    f"--nncf_config={folder / f'{name}.json'}",
                    f"--quantizer_epochs={args.ranges:g}",
                    f"--num_train_epochs={args.weights:g}",
                    f"--learning_rate={args.learning_rate:g}",
                    f"--seed={seed}",
                    *SHARED.split(),
                    *(EMBEDDING.split() if embeds else ()),
                    *shlex.split(args.flags),
                ]
                script = "train_qcemb.py" if embeds else "train_qa.py"
                command = [sys.executable, "-u", str(ROOT / script), *flags]
                jobs.append(Job(title, seed, output_dir, command))
    return jobs


def figures(folder: Path) -> dict[str, Any]:
    """The results of a finished run: those of its last weights, and of each phase."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    scores = ("f1", "exact_match", "top_1", "top_5", "mrr")
    stages = {row["stage"]: row for row in metrics["stages"]}
    phases = {
        phase: {key: row[key] for key in scores if key in row} | {"steps": row["steps"]}
        for phase, row in stages.items()
        if phase in PHASES
    }
    seconds = {phase: stages[phase]["seconds"] for phase in phases}
    return {**phases[list(phases)[-1]], "phases": phases, "seconds": seconds}


def standard_error(folder: Path) -> float | None:
    """Of the F1 that a run gained over its FP32 model, in points, over draws of questions.

    Returns:
        None if the folder is gone, or both models have no predictions for the same questions.
    """
    metrics = folder / "metrics.json"
    if not metrics.exists():
        return None
    arguments = json.loads(metrics.read_text(encoding="utf-8"))["arguments"]
    dev = arguments["squad_dev_data"]
    trained, before = scores(dev, folder), scores(dev, arguments["model_student"])
    if trained is None or before is None:
        return None
    return 100 * float(np.std(trained - before)) / len(trained) ** 0.5


def table(rows: dict[str, Any], keys: tuple[str, str], folder: Path) -> str:
    """The rows as Markdown: the score of each phase by seed, the least gain on calibration, and
    the standard error of the gain in F1.

    Args:
        keys: the score of readers, and of embedders.
        folder: --output_dir.
    """
    lines = [
        f"| {' / '.join(keys)} | FP32 | calibrated | ranges | weights | least gain | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in rows.items():
        key = next(key for key in keys if key in next(iter(runs.values()))["phases"]["fp32"])
        cells = []
        for phase in PHASES:
            reached = [run["phases"][phase][key] for run in runs.values() if phase in run["phases"]]
            if phase == "fp32":
                reached = reached[:1]
            cells.append(", ".join(f"{score:.2f}" for score in reached))
        gains = [
            list(run["phases"].values())[-1][key] - run["phases"]["calibrated"][key]
            for run in runs.values()
        ]
        folders = [run_folder(folder, name, seed) for seed in runs] if key == "f1" else []
        errors = [standard_error(each) for each in folders]
        known = ", ".join(f"{error:.2f}" for error in errors if error is not None)
        cells += [f"{min(gains):+.2f}", known]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: runs save their states
    folder = Path(args.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "int8_ranges.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    try:
        run_all(args, make_jobs(args, folder), rows, path, figures)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command goes on", signal.SIGINT) from None
    finally:
        if rows:
            print(f"\n{table(rows, ('f1', 'mrr'), folder)}")
            print(f"\n{table(rows, ('exact_match', 'top_5'), folder)}")


if __name__ == "__main__":
    run_main(main)
