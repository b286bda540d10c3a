"""Ways to spend a few passes of packing, side by side: F1 and EM on dev, over several seeds.

    python -m benchmarks.packing --model=DIR --squad_train_data=TRAIN --squad_dev_data=DEV \
        --output_dir=DIR [--questions=6000 --passes=2 --seeds=1,2 --jobs=4 --minutes=60] \
        [--only="states alone,logits 0.1"]

Each run is one of `pack_and_distill.py`, with the flags and the constants of a configuration. What
packing.json has is not run again, and a run that was stopped goes on. Where the folder of --model
has its predictions.json on the same dev file, the table tells how much of its F1 is kept, with a
bootstrap interval over questions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cli import ArgumentParser, Interrupted, UserError, number, run_main

ROOT = Path(__file__).resolve().parent.parent
PACK_CFG = (
    "num_hidden_layers:6,ff_iter_num:4,num_attention_heads:6,hidden_size:192,pack_emb:1,"
    "hidden_act:orig"
)
SHARED = "--keep=last --max_seq_length_q=64 --per_gpu_eval_batch_size=64 --save_minutes=5"
BOOTSTRAP = 2000  # draws of questions
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Configuration:
    """A configuration of runs: flags, and constants of pack_and_distill.py.

    Attributes:
        shares: of the passes, by stage; None for the script's own.
        outputs_in: the stages that learn the teacher's logits.
        states: whether those stages learn its states.
    """

    flags: str = ""
    shares: dict[str, float] | None = field(default_factory=lambda: {"final": 1.0})
    outputs_in: tuple[str, ...] = ("final",)
    states: bool = True


HEADS = {"heads": 0.2, "final": 0.8}
BOTH = ("heads", "final")
CONFIGURATIONS: dict[str, Configuration] = {
    "states alone": Configuration("--logits_weight=0"),
    **{
        f"logits {weight:g}": Configuration(f"--logits_weight={weight}")
        for weight in (0.03, 0.1, 0.3, 1)
    },
    **{
        f"logits {weight:g} at T {t}": Configuration(
            f"--logits_weight={weight} --logits_temperature={t}"
        )
        for weight in (0.1, 0.3)
        for t in (2, 4)
    },
    "logits alone": Configuration("--logits_weight=1", states=False),
    **{
        f"extra {factor:g} and {name}": Configuration(
            f"--extra_pairs={factor} --logits_weight={weight}"
        )
        for factor in (0.5, 1)
        for name, weight in (("states alone", 0), ("logits 0.1", 0.1))
    },
    "heads 0.2 then final": Configuration("--logits_weight=0.1", HEADS),
    "heads 0.2 with logits then final": Configuration("--logits_weight=0.1", HEADS, BOTH),
    "heads 0.5 then final": Configuration("--logits_weight=0.1", {"heads": 0.5, "final": 0.5}),
    "all stages": Configuration(
        "--logits_weight=0.1",
        {"embeddings": 0, "grow": 0.1, "feed-forward": 0.1, "heads": 0.1, "final": 0.7},
    ),
    "rate 2.5e-4": Configuration("--logits_weight=0.1 --learning_rate_for_tune=2.5e-4"),
    "rate 1e-3": Configuration("--logits_weight=0.1 --learning_rate_for_tune=1e-3"),
    "batch 16": Configuration("--logits_weight=0.1 --total_train_batch_size_for_tune=16"),
    **{
        f"heads and 1e-3 with {weight:g} and T {t}": Configuration(
            f"--learning_rate_for_tune=1e-3 --logits_weight={weight} --logits_temperature={t}",
            HEADS,
        )
        for weight, t in ((0.001, 1), (0.003, 1), (0.01, 1), (0.03, 1), (0.01, 2), (0.1, 4))
    },
    "heads and 1e-3 with states alone": Configuration(
        "--learning_rate_for_tune=1e-3 --logits_weight=0", HEADS
    ),
    "heads and 1e-3 by 16": Configuration(
        "--learning_rate_for_tune=1e-3 --total_train_batch_size_for_tune=16 --logits_weight=0.01",
        HEADS,
    ),
    "heads and 2e-3": Configuration("--learning_rate_for_tune=2e-3 --logits_weight=0.01", HEADS),
    "the plan of --passes": Configuration("", None),
    **{
        f"the plan of --passes with {weight:g} and T {t}": Configuration(
            f"--logits_weight={weight} --logits_temperature={t}", None
        )
        for weight, t in ((0.001, 1), (0.01, 1), (0.1, 4))
    },
}


def run(name: str) -> None:
    """Run pack_and_distill.py by a configuration, in a process of its own."""
    import pack_and_distill

    configure(pack_and_distill, CONFIGURATIONS[name])
    run_main(pack_and_distill.main)


def configure(script: Any, configuration: Configuration) -> None:
    """Set the constants of the module pack_and_distill."""
    plan_stages, script.OUTPUTS_IN = script.plan_stages, configuration.outputs_in
    if configuration.shares is not None:
        script.PASSES = configuration.shares

    def without_states(*arguments: Any) -> list[Any]:
        return [
            replace(part, weights=(0.0,) * len(part.weights)) if part.outputs else part
            for part in plan_stages(*arguments)
        ]

    if not configuration.states:
        script.plan_stages = without_states


# ------------------------------------------------------------------------------------------------
# The runs


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="fine-tuned QA model to pack, which is also the teacher")
    add("--squad_train_data", required=True)
    add("--squad_dev_data", required=True)
    add("--output_dir", required=True, help="folder of all runs, packing.json and packing.md")
    add(
        "--questions",
        type=number(int, 1),
        help="train on random articles with about so many questions (default: all)",
    )
    add(
        "--passes",
        type=number(float, 0, low_open=True),
        default=2.0,
        help="passes over the data per run",
    )
    add("--seeds", default="1,2", help="comma-separated numbers")
    add("--only", help="comma-separated parts of names (default: all)")
    add("--jobs", type=number(int, 1), default=1, help="parallel runs")
    add("--minutes", type=number(float, 0), default=float("inf"),
        help="start no run after so many")  # fmt: skip
    add("--pack_cfg", default=PACK_CFG)
    add("--flags", default="", help="further flags of all runs, in one string")
    return parser.parse_args()


def chosen(only: str | None) -> list[str]:
    """The configurations whose name contains one of the parts.

    Raises:
        UserError: a part is in no name.
    """
    found: list[str] = []
    for part in only.split(",") if only else [""]:
        named = [name for name in CONFIGURATIONS if name == part]
        named = named or [name for name in CONFIGURATIONS if part in name]
        if not named:
            raise UserError(
                f"--only: {part!r} is in no name; there are {', '.join(CONFIGURATIONS)}"
            )
        found += [name for name in named if name not in found]
    return found


def subset(path: str, questions: int | None, folder: Path) -> str:
    """The file, or one with random articles of it that have at least so many questions."""
    if questions is None:
        return os.path.abspath(path)
    target = folder / f"train-{questions}.json"
    if not target.exists():
        root = json.loads(Path(path).read_text(encoding="utf-8"))
        articles = root["data"]
        random.Random(0).shuffle(articles)
        counts = np.cumsum([sum(len(p["qas"]) for p in a["paragraphs"]) for a in articles])
        root["data"] = articles[: int(np.searchsorted(counts, questions)) + 1]
        target.write_text(json.dumps(root), encoding="utf-8")
    return str(target)


@dataclass(frozen=True)
class Job:
    """A run: its configuration and seed, its folder, its command."""

    name: str
    seed: str
    folder: Path
    command: list[str]


def make_jobs(args: argparse.Namespace, train: str) -> list[Job]:
    """All runs: one seed of every configuration, then the next seed."""
    jobs = []
    for seed in args.seeds.split(","):
        for name in chosen(args.only):
            folder = Path(args.output_dir).resolve() / f"{name.replace(' ', '-')}-{seed}"
            flags = [
                f"--model_student={os.path.abspath(args.model)}",
                f"--model_teacher={os.path.abspath(args.model)}",
                f"--squad_train_data={train}",
                f"--squad_dev_data={os.path.abspath(args.squad_dev_data)}",
                f"--output_dir={folder}",
                f"--pack_cfg={args.pack_cfg}",
                f"--passes={args.passes:g}",
                f"--seed={seed}",
                *SHARED.split(),
                *CONFIGURATIONS[name].flags.split(),
                *shlex.split(args.flags),
            ]
            child = f"from benchmarks import packing; packing.run({name!r})"
            jobs.append(Job(name, seed, folder, [sys.executable, "-c", child, *flags]))
    return jobs


def start(job: Job, jobs: int) -> subprocess.Popen[bytes]:
    """Start a run on its share of the cores, with its output in a file beside its folder."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
    print(f"{job.name}, seed {job.seed}: {shlex.join(job.command[3:])}", flush=True)
    with open(f"{job.folder}.log", "ab") as log:
        return subprocess.Popen(job.command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def figures(folder: Path) -> dict[str, Any]:
    """The results of a finished run.

    Returns:
        f1, exact_match; `by_step`: F1 of each evaluation, by stage and step; those of the teacher
        and of the start; seconds a step of the final stage.
    """
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    stages = {row["stage"]: row for row in metrics["stages"]}
    return {
        "f1": metrics["f1"],
        "exact_match": metrics["exact_match"],
        "teacher_f1": stages["teacher"]["f1"],
        "start_f1": stages["packed"]["f1"],
        "by_step": [(r["stage"], r["step"], r["f1"]) for r in log if r.get("evaluation")],
        "seconds_a_step": stages["final"]["seconds"] / stages["final"]["steps"],
        "train_seconds": metrics["train_seconds"],
        "gops": metrics["sizes"]["student"]["gops"],
    }


def run_all(
    args: argparse.Namespace,
    jobs: list[Job],
    rows: dict[str, Any],
    path: Path,
    read: Callable[[Path], dict[str, Any]] | None = None,
) -> None:
    """Run the runs that `rows` lacks, --jobs at a time; write `rows` to `path` after each.

    Args:
        read: from the folder of a finished run to its row; None for `figures`.
    """
    began = time.monotonic()
    waiting = [job for job in jobs if job.seed not in rows.get(job.name, {})]
    going: list[tuple[Job, subprocess.Popen[bytes]]] = []
    try:
        while waiting or going:
            late = time.monotonic() - began > 60 * args.minutes
            while waiting and len(going) < args.jobs and not late:
                job = waiting.pop(0)
                going.append((job, start(job, args.jobs)))
            if late and not going:
                print(f"{len(waiting)} runs are left; the same command goes on", flush=True)
                return
            time.sleep(POLL_SECONDS)
            for job, process in [each for each in going if each[1].poll() is not None]:
                going.remove((job, process))
                take_in(job, process.returncode, rows, path, read or figures)
    finally:
        for _, process in going:  # each saves its state
            process.terminate()
        for _, process in going:
            process.wait()


def take_in(
    job: Job,
    code: int,
    rows: dict[str, Any],
    path: Path,
    read: Callable[[Path], dict[str, Any]],
) -> None:
    """Record the results of a run; a failed run is repeated by the same command."""
    if code:
        print(f"{job.name}, seed {job.seed}: FAILED, see {job.folder}.log", flush=True)
        return
    row = rows.setdefault(job.name, {})[job.seed] = read(job.folder)
    partly = path.with_suffix(".part")  # a kill leaves the old file or the new one
    partly.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    partly.replace(path)
    scores = ", ".join(f"{key} {row[key]:.2f}" for key in ("f1", "top_5") if key in row)
    print(f"{job.name}, seed {job.seed}: {scores}", flush=True)


# ------------------------------------------------------------------------------------------------
# The table


def scores(dev: str, folder: str | Path) -> np.ndarray | None:
    """F1 per dev question from the predictions.json in a folder; None if questions are missing."""
    from deploy.squad_scores import f1

    path = Path(folder) / "predictions.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    with open(dev, encoding="utf-8") as file:
        articles = json.load(file)["data"]
    questions = [qa for a in articles for p in a["paragraphs"] for qa in p["qas"]]
    if not all(qa["id"] in found for qa in questions):
        return None
    best = []
    for qa in questions:
        answer = found[qa["id"]]
        of_each = (f1(answer, each["text"]) for each in qa["answers"])
        best.append(max(of_each, default=float(not answer)))
    return np.array(best)


def interval(student: np.ndarray, teacher: np.ndarray) -> tuple[float, float]:
    """The kept share of the teacher's F1, in percent: the middle 95% over draws of questions.

    Args:
        student, teacher: F1 of each question, 0 .. 1; the student's a mean over its seeds.
    """
    draws = np.random.default_rng(0).integers(0, len(student), (BOOTSTRAP, len(student)))
    kept = 100 * student[draws].mean(axis=1) / teacher[draws].mean(axis=1)
    low, high = np.percentile(kept, [2.5, 97.5])
    return float(low), float(high)


def table(rows: dict[str, Any], dev: str, model: str, output_dir: str) -> str:
    """The rows as Markdown, one line per configuration."""
    teacher = scores(dev, model)
    lines = [
        "| | F1 by seed | F1 | EM | of the teacher's F1 | s a step |",
        "|---|---|---|---|---|---|",
    ]
    for name in [name for name in CONFIGURATIONS if name in rows]:
        runs = list(rows[name].values())
        mean = {
            key: float(np.mean([run[key] for run in runs])) for key in runs[0] if key != "by_step"
        }
        kept = f"{100 * mean['f1'] / mean['teacher_f1']:.1f}%" if mean["teacher_f1"] else ""
        folders = [Path(output_dir) / f"{name.replace(' ', '-')}-{seed}" for seed in rows[name]]
        own = [scores(dev, folder) for folder in folders]
        if teacher is not None and all(each is not None for each in own):
            low, high = interval(np.mean(own, axis=0), teacher)
            kept += f" ({low:.1f} to {high:.1f})"
        by_seed = ", ".join(f"{run['f1']:.2f}" for run in runs)
        lines.append(
            f"| {name} | {by_seed} | {mean['f1']:.2f} | {mean['exact_match']:.2f} | {kept} |"
            f" {mean['seconds_a_step']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: runs save their states
    chosen(args.only)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "packing.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    train = subset(args.squad_train_data, args.questions, output_dir.resolve())
    try:
        run_all(args, make_jobs(args, train), rows, path)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command goes on", signal.SIGINT) from None
    finally:
        text = table(rows, args.squad_dev_data, args.model, args.output_dir)
        (output_dir / "packing.md").write_text(f"{text}\n", encoding="utf-8")
        print(f"\n{text}")


if __name__ == "__main__":
    run_main(main)
