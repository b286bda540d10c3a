"""F1 after one epoch of train_qa.py and of transformers.Trainer, from the same weights.

    python -m benchmarks.train_f1 --model=FOLDER_OR_NAME --squad_train_data=train-v1.1.json \\
        --squad_dev_data=dev-v1.1.json

benchmarks/trainer.py makes the Trainer. train_qa.py evaluates both.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import transformers
from transformers import AutoModelForQuestionAnswering

from benchmarks.gpu_timing import ROOT
from benchmarks.trainer import add_arguments, make_trainer, trainer_features
from bert.model_folder import load_model, open_model
from cli import ArgumentParser, UserError, number, run_main
from squad_utils import load_squad
from training.states import write_json


def write_part(source: str, flag: str, count: int, path: str) -> None:
    """Write about `count` questions of a file: whole paragraphs, spread evenly over it."""
    data = load_squad(source, flag)
    paragraphs = [each for article in data.articles for each in article["paragraphs"]]
    kept = max(1, min(len(paragraphs), round(len(paragraphs) * count / len(data.ids))))
    places = [int((i + 0.5) * len(paragraphs) / kept) for i in range(kept)]
    part = {"title": "part", "paragraphs": [paragraphs[place] for place in places]}
    write_json(path, {"version": "2.0" if data.version_2 else "1.1", "data": [part]})


def train_qa(args: argparse.Namespace, model: str, output_dir: str, **flags: Any) -> dict[str, Any]:
    """Run train_qa.py; give its metrics.json."""
    same = ("max_seq_length_q", "max_seq_length_c", "doc_stride", "learning_rate", "precision")
    flags |= {name: getattr(args, name) for name in (*same, "freeze_list", "seed")}
    flags |= {"model_student": model, "output_dir": output_dir}
    flags |= {"total_train_batch_size": args.batch_size}
    flags |= {"per_gpu_train_batch_size": args.micro_batch_size}
    command = [sys.executable, str(ROOT / "train_qa.py")]
    command += [f"--{name}={value}" for name, value in flags.items()]
    if subprocess.run(command + ["--no_cuda"] * args.no_cuda).returncode:
        raise UserError("train_qa.py failed; what it printed is above")
    with open(os.path.join(output_dir, "metrics.json"), encoding="utf-8") as file:
        return json.load(file)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    add = parser.add_argument
    add("--squad_dev_data", required=True, help="SQuAD JSON to evaluate on")
    add(
        "--num_questions",
        type=number(int, 1),
        default=1000,
        help="about so many questions to train on",
    )
    add(
        "--num_dev_questions",
        type=number(int, 1),
        default=10**6,
        help="about so many questions to evaluate on",
    )
    args = parser.parse_args()
    tokenizer = open_model(args.model, "--model").tokenizer
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, evaluated, train_file, dev_file = (
            os.path.join(folder, name)
            for name in ("ours", "theirs", "evaluated", "train.json", "dev.json")
        )
        write_part(args.squad_train_data, "--squad_train_data", args.num_questions, train_file)
        write_part(args.squad_dev_data, "--squad_dev_data", args.num_dev_questions, dev_file)
        files = {"squad_train_data": train_file, "squad_dev_data": dev_file}
        mine = train_qa(args, args.model, ours, num_train_epochs=1, **files)

        transformers.set_seed(args.seed)
        model = load_model(open_model(args.model, "--model"), AutoModelForQuestionAnswering, True)
        data = load_squad(train_file, "--squad_train_data")
        features = trainer_features(args, data, np.arange(len(data.ids)), tokenizer)
        trainer = make_trainer(args, model, features, theirs, num_train_epochs=1)
        with contextlib.redirect_stdout(io.StringIO()):
            seconds = trainer.train().metrics["train_runtime"]
        trainer.save_model(theirs)
        tokenizer.save_pretrained(theirs)
        its = train_qa(args, theirs, evaluated, num_train_epochs=0, **files)
    rows = {
        "ours": {"f1": mine["f1"], "exact_match": mine["exact_match"]},
        "Trainer": {"f1": its["f1"], "exact_match": its["exact_match"]},
    }
    for row, taken in zip(rows.values(), (mine["train_seconds"], seconds), strict=True):
        row["seconds"] = taken
    print(f"\n{len(data.ids):,} questions, an epoch:")
    for name, row in rows.items():
        print(f"{name:8} F1 {row['f1']:.2f}, EM {row['exact_match']:.2f}, {row['seconds']:.1f} s")
    if args.json:
        write_json(args.json, {"arguments": vars(args), **rows})


if __name__ == "__main__":
    run_main(main)
