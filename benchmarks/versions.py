"""The training speed of two versions of the scripts on this machine, in tokens per second.

    python -m benchmarks.versions --before=FOLDER --model=BERT --work_dir=/tmp/versions \
        --squad_train_data=train-v1.1.json --squad_dev_data=dev-v1.1.json

FOLDER is a checkout of another version. Each round runs each training with both versions, as a user
does, for a few steps. The first steps, in which caches fill, do not count. This version makes the
models from which trainings start, once.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from cli import ArgumentParser, UserError, number, run_main
from deploy.cpu import this_cpu
from training.run import read_log

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = 3  # steps
SMALL = "--per_gpu_train_batch_size=8 --total_train_batch_size=16 --log_steps=1 --keep=last"
PACK = "--total_train_batch_size_for_tune=16 --stages=final"
SIZES = "num_hidden_layers:6,ff_iter_num:4,num_attention_heads:6,hidden_size:192"
# {epochs}: those of the steps that are asked for; {reader}: what the first training leaves.
TRAININGS = {
    "question answering": "train_qa.py --model_student={model} --num_train_epochs={epochs}",
    "distillation": "pack_and_distill.py --model_student={reader} --model_teacher={reader}"
    f" --pack_cfg={SIZES} {PACK} --max_steps_per_stage={{steps}}",
    "INT8": "train_qa.py --model_student={reader} --num_train_epochs={epochs} --quantizer_epochs=0"
    " --nncf_config={settings}",
    "embeddings": "train_qcemb.py --model_student={model} --num_train_epochs={epochs}"
    " --max_seq_length_q=32 --hnm_num=32 --hnm_batch_size=32",
}


def tokens_a_second(folder: Path, stages: tuple[str, ...]) -> list[float]:
    """Tokens per second of each step of a run's stages, without the first steps."""
    log = [r for r in read_log(str(folder)) if r["stage"] in stages and "evaluation" not in r]
    return [record["tokens_per_second"] for record in log[LEFT_OUT:]]


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--before", required=True, help="folder of the other version")
    add("--model", required=True, help="a small BERT: a folder")
    add("--squad_train_data", required=True)
    add("--squad_dev_data", required=True, help="a few questions are enough")
    add("--work_dir", required=True, help="folder for what is trained; it is emptied")
    add("--precision", default="auto")
    add("--steps", type=number(int, LEFT_OUT + 1), default=12, help="of a training")
    add("--rounds", type=number(int, 1), default=3)
    add("--only", choices=TRAININGS, help="one training (default: all)")
    args = parser.parse_args()
    work = Path(args.work_dir)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    settings = work / "nncf_config.json"
    settings.write_text(json.dumps({"model_type": "transformer", "subset_size": 8}))
    with open(args.squad_train_data, encoding="utf-8") as file:
        paragraphs = [p for article in json.load(file)["data"] for p in article["paragraphs"]]
    questions = sum(len(paragraph["qas"]) for paragraph in paragraphs)

    def run(version: Path, name: str, folder: Path) -> list[float]:
        shutil.rmtree(folder, ignore_errors=True)
        names = {"model": args.model, "reader": work / "reader", "settings": settings}
        names |= {"steps": args.steps, "epochs": args.steps * 16 / questions}
        script, *flags = TRAININGS[name].format(**names).split()
        flags += [*SMALL.split(), f"--output_dir={folder}", f"--precision={args.precision}"]
        flags += [f"--squad_{part}_data={getattr(args, f'squad_{part}_data')}"
                  for part in ("train", "dev")]  # fmt: skip
        done = subprocess.run(
            [sys.executable, script, *flags], cwd=version, capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"{version}: {name} failed: {done.stderr.strip().splitlines()[-1]}")
        return tokens_a_second(folder, ("fine-tuning", "final", "weights"))

    run(ROOT, "question answering", work / "reader")
    print(f"{this_cpu().name}, {args.rounds} rounds of {args.steps} steps\n", flush=True)
    print("| training | before, tokens/s | now, tokens/s | now / before, by round |")
    print("|---|---|---|---|", flush=True)
    for name in [args.only] if args.only else TRAININGS:
        rates: dict[Path, list[float]] = {Path(args.before).resolve(): [], ROOT: []}
        for number_of_round in range(args.rounds):
            order = list(rates) if number_of_round % 2 == 0 else list(rates)[::-1]
            for version in order:
                rates[version].append(statistics.median(run(version, name, work / "out")))
        before, now = rates.values()
        ratios = ", ".join(f"{new / old:.2f}" for old, new in zip(before, now, strict=True))
        medians = [f"{statistics.median(each):,.0f}" for each in (before, now)]
        print(f"| {name} | {medians[0]} | {medians[1]} | {ratios} |", flush=True)


if __name__ == "__main__":
    run_main(main)
