"""The main job on an embedded default: sample data -> fine-tuning -> packing -> questions.

Every command is printed before it runs, so that it can be copied and changed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
DATA = "examples/data"


def step(*command: str, stdin: str | None = None) -> None:
    """Print a command of this Python and run it in the project's folder; stop if it fails."""
    redirect = f" < {stdin}" if stdin else ""
    print(f"\n$ python {shlex.join(command)}{redirect}", flush=True)
    with open(os.path.join(ROOT, stdin) if stdin else os.devnull) as source:
        code = subprocess.call([sys.executable, *command], cwd=ROOT, stdin=source)
    if code:
        sys.exit(code)


def demo_weights() -> str:
    """The folder of the small BERT that the demo starts from by default."""
    command = [sys.executable, os.path.join(HERE, "demo_weights.py")]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(result.returncode)
    return result.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="another BERT: a folder or a hub name")
    own_model = parser.parse_args().model
    model = own_model or demo_weights()
    name = f"-{os.path.basename(os.path.normpath(own_model))}" if own_model else ""
    output_dir = f"models/demo-qa{name}"
    step("examples/make_sample.py", f"--output_dir={DATA}")
    step(
        "train_qa.py",
        f"--model_student={model}",
        f"--output_dir={output_dir}",
        f"--squad_train_data={DATA}/train-v1.1.json",
        f"--squad_dev_data={DATA}/dev-v1.1.json",
        "--freeze_list=embedding",
        "--learning_rate=3e-4",
        "--num_train_epochs=4",
        "--max_seq_length_q=32",
        "--total_train_batch_size=16",
        "--per_gpu_train_batch_size=16",
    )
    ask(output_dir)
    packed_dir = f"models/demo-packed{name}"
    step(
        "pack_and_distill.py",
        f"--model_student={output_dir}",
        f"--model_teacher={output_dir}",
        f"--output_dir={packed_dir}",
        f"--squad_train_data={DATA}/train-v1.1.json",
        f"--squad_dev_data={DATA}/dev-v1.1.json",
        f"--pack_cfg={pack_cfg(output_dir)}",
        "--stages=embeddings,grow",  # the others need more than some minutes
        "--warm_up_steps=10",
        "--max_seq_length_q=32",
        "--total_train_batch_size=16",
        "--total_train_batch_size_for_tune=16",
        "--per_gpu_train_batch_size=16",
        "--per_gpu_eval_batch_size=32",
    )
    ask(packed_dir)
    print(f"Ask it more: python ask.py --model={packed_dir} --context=<a text file>")


def ask(model: str) -> None:
    """Ask a model about the article."""
    step(
        "ask.py",
        f"--model={model}",
        "--context=examples/article.txt",
        stdin="examples/questions.txt",
    )


def pack_cfg(model: str) -> str:
    """All layers and heads, at two thirds of the width, with a slim feed-forward."""
    with open(os.path.join(ROOT, model, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    heads = config["num_attention_heads"]
    width = config["hidden_size"] * 2 // 3 // heads * heads
    return (
        f"num_hidden_layers:{config['num_hidden_layers']},ff_iter_num:4,"
        f"num_attention_heads:{heads},hidden_size:{width},pack_emb:1,hidden_act:orig"
    )


if __name__ == "__main__":
    main()
