"""The main job on an embedded default: sample data -> fine-tuning, packing, INT8 -> questions.

Every command is printed before it runs, so that it can be copied and changed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time

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
    int8_dir = f"models/demo-int8{name}"
    step(
        "train_qa.py",
        f"--model_student={packed_dir}",
        f"--model_teacher={output_dir}",
        f"--output_dir={int8_dir}",
        f"--squad_train_data={DATA}/train-v1.1.json",
        f"--squad_dev_data={DATA}/dev-v1.1.json",
        "--nncf_config=nncf_config.json",
        "--supervision_weight=0.02",
        "--learning_rate=1e-4",
        "--quantizer_epochs=0.25",
        "--num_train_epochs=0.5",
        "--max_seq_length_q=32",
        "--total_train_batch_size=16",
        "--per_gpu_train_batch_size=16",
        "--per_gpu_eval_batch_size=32",
    )
    ask(int8_dir)
    show({"fine-tuned": output_dir, "packed": packed_dir, "packed, INT8": int8_dir})
    print(f"\nAsk it more: python ask.py --model={int8_dir} --context=<a text file>")


def ask(model: str) -> None:
    """Ask a model about the article."""
    step(
        "ask.py",
        f"--model={model}",
        "--context=examples/article.txt",
        stdin="examples/questions.txt",
    )


def show(models: dict[str, str]) -> None:
    """Print what the stages came to: F1, parameters, size and latency of model.onnx."""
    print(f"\n{'':14}{'F1':>8}{'parameters':>12}{'file':>10}{'1 x 384 in OpenVINO':>22}")
    for name, folder in models.items():
        with open(os.path.join(ROOT, folder, "metrics.json"), encoding="utf-8") as file:
            metrics = json.load(file)
        path = os.path.join(ROOT, folder, "model.onnx")
        print(
            f"{name:14}{metrics['f1']:8.2f}{metrics['parameters'] / 1e6:10.2f} M"
            f"{os.path.getsize(path) / 1e6:7.1f} MB{latency(path):19.1f} ms"
        )


def latency(path: str) -> float:
    """Median milliseconds of a run at the declared shape, at OpenVINO's default precision."""
    import numpy as np
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    feed = {each.any_name: np.ones(each.shape, np.int64) for each in compiled.inputs}
    times = []
    for _ in range(30):
        began = time.perf_counter()
        compiled(feed)
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times[5:])


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
