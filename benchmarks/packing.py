"""Ways to spend a few passes of packing, side by side: scores on dev, over several seeds.

    python -m benchmarks.packing --model=DIR --squad_train_data=TRAIN --squad_dev_data=DEV \
        --output_dir=DIR [--questions=6000 --passes=2 --seeds=1,2 --jobs=4 --minutes=60] \
        [--only="states alone,logits 0.1"]

Each run is one of `pack_and_distill.py`, with the flags and the constants of a configuration. The
model's task tells which configurations there are. What packing.json has is not run again, and a run
that was stopped goes on. For embeddings, dev's questions are searched among the contexts of dev and
of the whole train file. Where the folder of a QA model has its predictions.json on the same dev
file, the table tells how much of its F1 is kept, with a bootstrap interval over questions.
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
from collections.abc import Callable, Collection
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
EMBEDDING = "--embedding_weight=30 --max_seq_length_q=32"
# The scores of each task, the main one first, and their names.
QA_SCORES = {"f1": "F1", "exact_match": "EM"}
EMBEDDING_SCORES = {"top_5": "top 5", "top_1": "top 1", "mrr": "MRR"}
# What the configurations with shares of their own have in common. It is written out, since a new
# default of --passes must not change them.
BASE = "--learning_rate_for_tune=5e-4 --total_train_batch_size_for_tune=32 --warm_up_steps=40"
BOOTSTRAP = 2000  # draws of questions
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Configuration:
    """A configuration of runs: flags, and constants of pack_and_distill.py.

    Attributes:
        flags: come after BASE if there are shares, and so replace it.
        shares: of the passes, by stage; None for the plan of --passes, with its rate and batch.
        outputs_in: the stages that learn the teacher's logits.
        states: whether those stages learn its states.
        shape: keys of --pack_cfg that replace the given ones.
    """

    flags: str = ""
    shares: dict[str, float] | None = field(default_factory=lambda: {"final": 1.0})
    outputs_in: tuple[str, ...] = ("final",)
    states: bool = True
    shape: str = ""


HEADS = {"heads": 0.2, "final": 0.8}
BOTH = ("heads", "final")
QA: dict[str, Configuration] = {
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
    "final alone and 1e-3 by 16": Configuration(
        "--learning_rate_for_tune=1e-3 --total_train_batch_size_for_tune=16 --logits_weight=0.01"
    ),
    "heads and 2e-3": Configuration("--learning_rate_for_tune=2e-3 --logits_weight=0.01", HEADS),
    "the plan of --passes": Configuration("", None),
    **{
        f"the plan of --passes with {weight:g} and T {t}": Configuration(
            f"--logits_weight={weight} --logits_temperature={t}", None
        )
        for weight, t in ((0.001, 1), (0.01, 1), (0.1, 4))
    },
    # With 2.04 of the 9.51 GOps that a BERT of 6 layers, 12 heads and hidden size 384 has.
    **{
        f"shape {layers} layers of {size} with {heads} heads and ff {ff}": Configuration(
            "--logits_weight=0.01",
            None,
            shape=f"num_hidden_layers:{layers},ff_iter_num:{ff},num_attention_heads:{heads},"
            f"hidden_size:{size}",
        )
        for layers, ff, heads, size in (
            (6, 4, 6, 192),
            (6, 4, 4, 236),
            (6, 4, 8, 152),
            (6, 2, 6, 240),
            (6, 0, 4, 96),
            (3, 4, 6, 342),
        )
    },
}
EMBEDDINGS = {
    "embeddings by final alone": Configuration(),
    "embeddings by final alone and 2.5e-4 by 16": Configuration(
        "--learning_rate_for_tune=2.5e-4 --total_train_batch_size_for_tune=16"
    ),
    "embeddings by the plan of --passes": Configuration("", None),
}
CONFIGURATIONS = {**QA, **EMBEDDINGS}


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
    add("--model", required=True, help="fine-tuned model to pack, which is also the teacher")
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


def chosen(only: str | None, among: Collection[str]) -> list[str]:
    """The names that contain one of the parts.

    Raises:
        UserError: a part is in no name.
    """
    found: list[str] = []
    for part in only.split(",") if only else [""]:
        named = [name for name in among if name == part]
        named = named or [name for name in among if part in name]
        if not named:
            raise UserError(f"--only: {part!r} is in no name; there are {', '.join(among)}")
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


def is_embedder(model: str, flag: str) -> bool:
    """Whether the model that a flag names embeds texts."""
    from bert.model_folder import open_model

    return "Embedding" in open_model(model, flag).architecture


@dataclass(frozen=True)
class Job:
    """A run: its configuration and seed, its folder, its command."""

    name: str
    seed: str
    folder: Path
    command: list[str]


def reshaped(pack_cfg: str, shape: str) -> str:
    """A --pack_cfg with some keys replaced."""
    pairs = [pair.split(":") for text in (pack_cfg, shape) if text for pair in text.split(",")]
    return ",".join(":".join(pair) for pair in dict(pairs).items())


def make_jobs(args: argparse.Namespace, train: str, configurations: Collection[str]) -> list[Job]:
    """All runs: one seed of every chosen configuration, then the next seed."""
    jobs = []
    for seed in args.seeds.split(","):
        for name in chosen(args.only, configurations):
            configuration = CONFIGURATIONS[name]
            searched = f"--eval_extra_contexts={os.path.abspath(args.squad_train_data)}"
            folder = Path(args.output_dir).resolve() / f"{name.replace(' ', '-')}-{seed}"
            flags = [
                f"--model_student={os.path.abspath(args.model)}",
                f"--model_teacher={os.path.abspath(args.model)}",
                f"--squad_train_data={train}",
                f"--squad_dev_data={os.path.abspath(args.squad_dev_data)}",
                f"--output_dir={folder}",
                f"--pack_cfg={reshaped(args.pack_cfg, configuration.shape)}",
                f"--passes={args.passes:g}",
                f"--seed={seed}",
                *SHARED.split(),
                *((searched, *EMBEDDING.split()) if name in EMBEDDINGS else ()),
                *(() if configuration.shares is None else BASE.split()),
                *configuration.flags.split(),
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
        the scores of its task; its main score of each evaluation, by stage and step, as
        `by_step`; that of the teacher and of the start; seconds a step of the final stage.
    """
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    stages = {row["stage"]: row for row in metrics["stages"]}
    names = QA_SCORES if "f1" in metrics else EMBEDDING_SCORES
    main_score = next(iter(names))
    return {
        **{name: metrics[name] for name in names},
        f"teacher_{main_score}": stages["teacher"][main_score],
        f"start_{main_score}": stages["packed"][main_score],
        "by_step": [(r["stage"], r["step"], r[main_score]) for r in log if r.get("evaluation")],
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


def table(
    rows: dict[str, Any],
    configurations: dict[str, Configuration],
    dev: str,
    model: str,
    output_dir: str,
) -> str:
    """The rows of a task's configurations as Markdown, one line per configuration."""
    embeds = configurations is EMBEDDINGS
    main_score, *others = EMBEDDING_SCORES if embeds else QA_SCORES
    labels = {**QA_SCORES, **EMBEDDING_SCORES}
    main_label = labels[main_score]
    heads = [f"{main_label} by seed", main_label, *(labels[key] for key in others)]
    heads += [f"of the teacher's {main_label}", "GOps", "s a step"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    teacher = None if embeds else scores(dev, model)
    for name in [name for name in configurations if name in rows]:
        runs = list(rows[name].values())
        mean = {
            key: float(np.mean([run[key] for run in runs])) for key in runs[0] if key != "by_step"
        }
        whole = mean[f"teacher_{main_score}"]
        kept = f"{100 * mean[main_score] / whole:.1f}%" if whole else ""
        folders = [Path(output_dir) / f"{name.replace(' ', '-')}-{seed}" for seed in rows[name]]
        own = [scores(dev, folder) for folder in folders]
        if teacher is not None and all(each is not None for each in own):
            low, high = interval(np.mean(own, axis=0), teacher)
            kept += f" ({low:.1f} to {high:.1f})"
        cells = [name, ", ".join(f"{run[main_score]:.2f}" for run in runs)]
        cells += [f"{mean[key]:.2f}" for key in (main_score, *others)]
        cells += [kept, f"{mean['gops']:.2f}", f"{mean['seconds_a_step']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    args = parse_arguments()
    configurations = EMBEDDINGS if is_embedder(args.model, "--model") else QA
    chosen(args.only, configurations)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: runs save their states
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "packing.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    train = subset(args.squad_train_data, args.questions, output_dir.resolve())
    try:
        run_all(args, make_jobs(args, train, configurations), rows, path)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command goes on", signal.SIGINT) from None
    finally:
        text = table(rows, configurations, args.squad_dev_data, args.model, args.output_dir)
        (output_dir / "packing.md").write_text(f"{text}\n", encoding="utf-8")
        print(f"\n{text}")


if __name__ == "__main__":
    run_main(main)
