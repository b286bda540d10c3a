"""Stage QA 1 on a random-weight model of BERT-large's exact shape, for a few steps.

It shows that the shape trains and exports within a memory budget; its scores mean nothing. It
prints the peak memory and the size of model.onnx, which is ready for `ovc` or `mo`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import torch
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

from cli import ArgumentParser, number, run_main

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

BERT_LARGE = {
    "vocab_size": 30522,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
COMMAND = (
    "--freeze_list=embedding",
    "--supervision_weight=0",
    "--learning_rate=3e-5",
    "--max_seq_length_q=64",
    "--max_seq_length_c=384",
    "--per_gpu_eval_batch_size=16",
    "--per_gpu_train_batch_size=2",
    "--total_train_batch_size=48",
)


def part_of_squad(path: str, questions: int, output: str) -> None:
    """Write the first `questions` questions of a SQuAD file."""
    with open(path, encoding="utf-8") as file:
        data = json.load(file)
    left = questions
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = paragraph["qas"][:left]
            left -= len(paragraph["qas"])
        article["paragraphs"] = [p for p in article["paragraphs"] if p["qas"]]
    data["data"] = [article for article in data["data"] if article["paragraphs"]]
    with open(output, "w", encoding="utf-8") as file:
        json.dump(data, file)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--tokenizer", required=True, help="any BERT with the uncased vocabulary, for its tokenizer"
    )
    add("--squad_train_data", required=True, help="SQuAD JSON")
    add("--squad_dev_data", required=True, help="SQuAD JSON")
    add("--steps", type=number(int, 1), default=3, help="optimisation steps of 48 windows")
    add("--work_dir", default="models/bert-large-shape", help="folder for model and results")
    args = parser.parse_args()

    model = os.path.join(args.work_dir, "random")
    os.makedirs(model, exist_ok=True)
    torch.manual_seed(0)
    BertForQuestionAnswering(BertConfig(**BERT_LARGE)).save_pretrained(model)
    AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(model)
    train, dev = (os.path.join(args.work_dir, name) for name in ("train.json", "dev.json"))
    part_of_squad(args.squad_train_data, 40 * args.steps, train)
    part_of_squad(args.squad_dev_data, 16, dev)
    output_dir = os.path.join(args.work_dir, "qa")
    command = [
        sys.executable,
        os.path.join(ROOT, "train_qa.py"),
        f"--model_student={model}",
        f"--output_dir={output_dir}",
        f"--squad_train_data={train}",
        f"--squad_dev_data={dev}",
        "--num_train_epochs=1",
        "--overwrite_output_dir",
        *COMMAND,
    ]
    code = subprocess.call(command)
    if code:
        sys.exit(code)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    with open(os.path.join(output_dir, "metrics.json"), encoding="utf-8") as file:
        metrics = json.load(file)
    onnx = os.path.join(output_dir, "model.onnx")
    print(f"\nparameters          {metrics['parameters'] / 1e6:.2f} M")
    print(f"peak memory         {peak:.2f} GB")
    print(f"training            {metrics['train_seconds']:.0f} s")
    print(f"model.onnx          {os.path.getsize(onnx) / 1e6:.1f} MB, one file: {onnx}")
    print(f"largest difference  {metrics['onnx_check']['difference']:.1e}")


if __name__ == "__main__":
    run_main(main)
