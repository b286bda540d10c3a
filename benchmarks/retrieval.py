"""Retrieval on SQuAD: untrained weights, sentence-transformers, and all our stages, in one table.

    pip install sentence-transformers
    python -m benchmarks.retrieval --model=DIR --squad_train_data=TRAIN --squad_dev_data=DEV \
        --output_dir=DIR

Dev's questions are searched among the contexts of dev and train. sentence-transformers trains with
its MultipleNegativesRankingLoss, in bf16, as long as our longest fine-tuning. Every command is
printed before it runs; the same command again resumes a stopped run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch

from cli import ArgumentParser, number, run_main

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

LENGTHS = {"max_seq_length_q": 32, "max_seq_length_c": 384}
SCORES = {"top_1": "top 1", "top_5": "top 5", "mrr": "MRR"}
BATCH = 32  # pairs per step, in all trainings


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    positive = number(float, 0, 1000, True)
    add("--model", required=True, help="pretrained BERT, a folder")
    add("--squad_train_data", required=True)
    add("--squad_dev_data", required=True)
    add("--output_dir", required=True, help="folder of all runs and of retrieval.json")
    add("--epochs_triplet", type=positive, default=0.2, help="of fine-tuning by the method's loss")
    add("--epochs_in_batch", type=positive, default=0.2, help="of fine-tuning with in_batch")
    add("--learning_rate", type=positive, default=5e-5, help="of fine-tuning")
    add("--epochs_packed", type=positive, default=1.0, help="of distillation's final stage")
    add("--pack_cfg", default="num_hidden_layers:6,ff_iter_num:4,num_attention_heads:12,"
        "hidden_size:288,pack_emb:1,hidden_act:orig")  # fmt: skip
    add("--epochs_int8", type=positive, default=0.15, help="of training in INT8")
    add("--learning_rate_int8", type=positive, default=2e-4)
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------
# Ours


def stage(folder: str, command: list[str], flags: dict[str, Any]) -> dict[str, Any]:
    """Run a script of ours, unless it has finished before; return its metrics.json."""
    command = [*command, f"--output_dir={folder}"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    code = subprocess.call([sys.executable, *command], cwd=ROOT)
    if code:
        sys.exit(code)
    with open(os.path.join(folder, "metrics.json"), encoding="utf-8") as file:
        return json.load(file)


# ------------------------------------------------------------------------------------------------
# sentence-transformers


def sentence_transformer(model: str) -> Any:
    """The mean of the last states over tokens, scaled to length 1."""
    from sentence_transformers import SentenceTransformer, models

    bert = models.Transformer(model, max_seq_length=LENGTHS["max_seq_length_c"])
    pooling = models.Pooling(bert.get_word_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[bert, pooling, models.Normalize()], device="cpu")


def evaluate(model: Any, args: argparse.Namespace) -> dict[str, float]:
    """Our metrics on sentence-transformers' vectors, computed in FP32."""
    from transformers import AutoTokenizer

    from squad_utils import load_squad
    from tasks.embedding import make_pairs, ranks, retrieval_figures

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_squad(args.squad_dev_data, "--squad_dev_data")
    pairs = make_pairs(data, tokenizer, *LENGTHS.values())
    known = set(pairs.contexts.strings)
    extra = load_squad(args.squad_train_data, "--squad_train_data").contexts
    contexts = pairs.contexts.strings + [text for text in dict.fromkeys(extra) if text not in known]
    vectors = model.encode(contexts, batch_size=BATCH, convert_to_tensor=True)
    questions = model.encode(pairs.questions.strings, batch_size=BATCH, convert_to_tensor=True)
    own = torch.from_numpy(pairs.context)
    return retrieval_figures(ranks(questions[torch.from_numpy(pairs.question)], vectors, own))


def train_sentence_transformers(args: argparse.Namespace, seconds: float) -> dict[str, float]:
    """MultipleNegativesRankingLoss on the same pairs, for as many steps as take `seconds`."""
    import datasets
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.training_args import BatchSamplers

    from squad_utils import load_squad

    data = load_squad(args.squad_train_data, "--squad_train_data")
    asked = np.random.default_rng(42).permutation(np.flatnonzero(data.answerable))
    pairs = datasets.Dataset.from_dict(
        {
            "anchor": [data.questions[i] for i in asked],
            "positive": [data.contexts[data.context_of[i]] for i in asked],
        }
    )

    def train(steps: int, rate: float) -> tuple[Any, float]:
        model = sentence_transformer(args.model)
        settings = SentenceTransformerTrainingArguments(
            output_dir=os.path.join(args.output_dir, "sentence-transformers"),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            warmup_steps=max(1, steps // 10),
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            save_strategy="no",
            report_to="none",
            seed=42,
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=settings,
            train_dataset=pairs,
            loss=MultipleNegativesRankingLoss(model),
        )
        began = time.perf_counter()
        trainer.train()
        return model, time.perf_counter() - began

    _, first = train(2, args.learning_rate)
    _, more = train(6, args.learning_rate)
    steps = max(8, round(seconds / ((more - first) / 4)))
    print(f"sentence-transformers: {steps} steps of {BATCH} pairs", flush=True)
    model, taken = train(steps, args.learning_rate)
    return {**evaluate(model, args), "train_seconds": taken, "pairs": steps * BATCH}


# ------------------------------------------------------------------------------------------------


def main() -> None:
    args = parse_arguments()
    args.output_dir = os.path.abspath(args.output_dir)
    os.makedirs(args.output_dir, exist_ok=True)
    table = os.path.join(args.output_dir, "retrieval.json")
    rows: dict[str, dict[str, Any]] = {}
    if os.path.isfile(table):
        with open(table, encoding="utf-8") as file:
            rows = json.load(file)

    def keep(name: str, metrics: dict[str, Any]) -> None:
        rows[name] = {key: metrics[key] for key in (*SCORES, "train_seconds") if key in metrics}
        if "teacher_index" in metrics:
            rows[f"{name}, among its teacher's contexts"] = metrics["teacher_index"]
        with open(table, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
        print(f"{name}: {rows[name]}", flush=True)

    def folder(name: str) -> str:
        return os.path.join(args.output_dir, name)

    data = {
        "squad_train_data": os.path.abspath(args.squad_train_data),
        "squad_dev_data": os.path.abspath(args.squad_dev_data),
        "eval_extra_contexts": os.path.abspath(args.squad_train_data),
        "total_train_batch_size": BATCH,
        "per_gpu_train_batch_size": BATCH,
        "per_gpu_eval_batch_size": BATCH,
        **LENGTHS,
    }
    start = {"model_student": args.model, "pooling": "mean", "pooler": "identity"}
    tune = {
        **data,
        "learning_rate": args.learning_rate,
        "hnm_num": 64,
        "hnm_batch_size": 8,  # of similar length: less padding than in larger ones
    }

    if "untrained, mean of states" not in rows:
        keep("untrained, mean of states", evaluate(sentence_transformer(args.model), args))
    in_batch = "triplet_num:0,in_batch:1"
    flags = {**tune, **start, "loss_cfg": in_batch, "num_train_epochs": args.epochs_in_batch}
    ours = stage(folder("in-batch"), ["train_qcemb.py"], flags)
    keep("fine-tuned, in_batch", ours)
    flags = {**tune, **start, "loss_cfg": "triplet_num:1", "num_train_epochs": args.epochs_triplet}
    triplet = stage(folder("triplet"), ["train_qcemb.py"], flags)
    keep("fine-tuned, triplet", triplet)
    best = "in-batch" if ours["mrr"] >= triplet["mrr"] else "triplet"
    if "sentence-transformers" not in rows:
        seconds = max(ours["train_seconds"], triplet["train_seconds"])
        keep("sentence-transformers", train_sentence_transformers(args, seconds))

    taught = {"model_student": folder(best), "model_teacher": folder(best)}
    packing = {
        "pack_cfg": args.pack_cfg,
        "stages": "final",
        "embedding_weight": 30,
        "num_train_epochs": args.epochs_packed,
        "warm_up_steps": 40,
        "learning_rate_for_tune": 5e-4,
        "total_train_batch_size_for_tune": BATCH,
    }
    flags = {**data, **taught, **packing}
    keep("packed", stage(folder("packed"), ["pack_and_distill.py"], flags))
    int8 = {
        "model_student": folder("packed"),
        "nncf_config": "nncf_config.json",
        "supervision_weight": 0.02,
        "loss_cfg": f"{in_batch},emb_loss:L2" if best == "in-batch" else "emb_loss:L2",
        "learning_rate": args.learning_rate_int8,
        "quantizer_epochs": 0.01,
        "num_train_epochs": args.epochs_int8,
    }
    flags = {**tune, **taught, **int8}
    keep("packed, INT8", stage(folder("int8"), ["train_qcemb.py"], flags))

    print(f"\n{'':44}" + "".join(f"{label:>8}" for label in SCORES.values()) + f"{'minutes':>9}")
    for name, row in rows.items():
        cells = "".join(f"{row[key]:8.2f}" for key in SCORES)
        taken = f"{row['train_seconds'] / 60:9.1f}" if "train_seconds" in row else ""
        print(f"{name:44}{cells}{taken}")


if __name__ == "__main__":
    run_main(main)
