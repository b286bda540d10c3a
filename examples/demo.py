"""The whole method on sample data: fine-tuning, packing, INT8, then questions.

With --search it does the same for embeddings, which find the paragraph with the answer. Every
command is printed before it runs, so that it can be copied and changed.
"""

from __future__ import annotations

import argparse
import hashlib
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
SHARED = (  # flags of all stages
    f"--squad_train_data={DATA}/train-v1.1.json",
    f"--squad_dev_data={DATA}/dev-v1.1.json",
    "--max_seq_length_q=32",
    "--per_gpu_eval_batch_size=32",
)


def batches(size: int) -> tuple[str, str]:
    """The flags for steps of `size` windows in one pass."""
    return f"--total_train_batch_size={size}", f"--per_gpu_train_batch_size={size}"


def step(*command: str, stdin: str | None = None) -> None:
    """Print a command of this Python and run it in the project's folder; stop if it fails."""
    redirect = f" < {stdin}" if stdin else ""
    print(f"\n$ python {shlex.join(command)}{redirect}", flush=True)
    with open(os.path.join(ROOT, stdin) if stdin else os.devnull) as source:
        code = subprocess.call([sys.executable, *command], cwd=ROOT, stdin=source)
    if code:
        sys.exit(code)


def quick_nncf_config() -> str:
    """Write nncf_config.json with a third of its calibration windows, for short texts; its path."""
    with open(os.path.join(ROOT, "nncf_config.json"), encoding="utf-8") as file:
        config = json.load(file)
    path = f"{DATA}/nncf_config.json"
    os.makedirs(os.path.join(ROOT, DATA), exist_ok=True)
    with open(os.path.join(ROOT, path), "w", encoding="utf-8") as file:
        json.dump(config | {"subset_size": 100}, file, indent=2)
    return path


def demo_weights() -> str:
    """The folder of the small BERT that the demo starts from by default."""
    command = [sys.executable, os.path.join(HERE, "demo_weights.py")]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(result.returncode)
    return result.stdout.strip()


def where_and_name(model: str) -> tuple[str, str]:
    """--model as commands in the project's folder need it, and a suffix for output folders.

    A relative path starts at the user's current folder. The suffix differs between models of the
    same base name.
    """
    where = os.path.abspath(model) if os.path.exists(model) else model
    told_apart = hashlib.sha256(where.encode()).hexdigest()[:8]
    return where, f"-{os.path.basename(where)}-{told_apart}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="another BERT: a folder or a hub name")
    parser.add_argument("--search", action="store_true", help="train embeddings instead of QA")
    args = parser.parse_args()
    model, name = where_and_name(args.model) if args.model else (demo_weights(), "")
    step("examples/make_sample.py", f"--output_dir={DATA}")
    if args.search:
        search(model, name)
    else:
        answer(model, name)


def answer(model: str, name: str) -> None:
    """QA in its three stages."""
    tuned, packed, int8 = (f"models/demo-{what}{name}" for what in ("qa", "packed", "int8"))
    step(
        "train_qa.py",
        f"--model_student={model}",
        f"--output_dir={tuned}",
        *SHARED,
        *batches(16),
        "--freeze_list=embedding",
        "--learning_rate=3e-4",
        "--num_train_epochs=2.7",
    )
    ask(f"--model={tuned}", "--context=examples/article.txt")
    step(
        "pack_and_distill.py",
        f"--model_student={tuned}",
        f"--model_teacher={tuned}",
        f"--output_dir={packed}",
        *SHARED,
        f"--pack_cfg={pack_cfg(tuned)}",
        # All layers at once, from the fitted start; the other stages would take much longer.
        "--stages=final",
        "--num_train_epochs=0.6",
        "--warm_up_steps=10",
        "--learning_rate_for_tune=1e-3",
        "--total_train_batch_size_for_tune=8",
        "--per_gpu_train_batch_size=8",
    )
    step(
        "train_qa.py",
        f"--model_student={packed}",
        f"--model_teacher={tuned}",
        f"--output_dir={int8}",
        *SHARED,
        *batches(16),
        f"--nncf_config={quick_nncf_config()}",
        "--max_drop=5",  # of 244 dev questions, a point is two or three
        "--supervision_weight=0.02",
        "--learning_rate=1e-4",
        "--quantizer_epochs=0",
        "--num_train_epochs=0.1",
    )
    ask(f"--model={int8}", "--context=examples/article.txt")
    show({"fine-tuned": tuned, "packed": packed, "packed, INT8": int8}, "f1", "F1")
    print(f"\nAsk it more: python ask.py --model={int8} --context=<a text file>")
    search_model = f"models/demo-emb-int8{name}"  # of make demo-search, if that ran
    finds = os.path.isfile(os.path.join(ROOT, search_model, "model.onnx"))
    print(
        "Or in the browser (pip install -r requirements-serve.txt):\n"
        f"python ask.py --serve --model={int8}{f' --model_emb={search_model}' if finds else ''}"
        " --context=examples/article.txt"
    )


def search(model: str, name: str) -> None:
    """Embeddings in their three stages."""
    kinds = ("emb", "emb-packed", "emb-int8")
    tuned, packed, int8 = (f"models/demo-{what}{name}" for what in kinds)
    mining = ("--hnm_num=16", "--hnm_batch_size=16", "--loss_cfg=triplet_num:0,in_batch:1")
    step(
        "train_qcemb.py",
        f"--model_student={model}",
        f"--output_dir={tuned}",
        *SHARED,
        *batches(16),
        *mining,
        "--pooling=mean",
        "--pooler=identity",
        "--learning_rate=1e-4",
        "--num_train_epochs=0.35",
    )
    step(
        "pack_and_distill.py",
        f"--model_student={tuned}",
        f"--model_teacher={tuned}",
        f"--output_dir={packed}",
        *SHARED,
        f"--pack_cfg={pack_cfg(tuned)}",
        "--stages=final",
        "--embedding_weight=30",
        # The fitted start is nearly there, and the best on dev is kept.
        "--num_train_epochs=0.5",
        "--learning_rate_for_tune=2e-4",
        "--warm_up_steps=10",
        "--total_train_batch_size_for_tune=16",
        "--per_gpu_train_batch_size=16",
    )
    step(
        "train_qcemb.py",
        f"--model_student={packed}",
        f"--model_teacher={tuned}",
        f"--output_dir={int8}",
        *SHARED,
        *batches(16),
        *mining,
        f"--nncf_config={quick_nncf_config()}",
        "--max_drop=5",  # of 244 dev questions, a point is two or three
        "--supervision_weight=0.02",
        "--learning_rate=3e-5",
        "--quantizer_epochs=0.04",
        "--num_train_epochs=0.06",
    )
    texts = write_texts()
    reader = f"models/demo-int8{name}"
    reads = os.path.isfile(os.path.join(ROOT, reader, "model.onnx"))
    if not reads:
        print("\nThere is no reader yet, so only paragraphs are shown; make demo trains one.")
    ask(
        *([f"--model={reader}"] if reads else ["--top_contexts=1"]),
        f"--model_emb={int8}",
        "--context",
        "examples/article.txt",
        texts,
    )
    show({"fine-tuned": tuned, "packed": packed, "packed, INT8": int8}, "top_1", "top 1")
    print(f"\nSearch more: python ask.py --model_emb={int8} --context <text files or folders>")


def write_texts() -> str:
    """Write the dev articles as text files, one line per paragraph; return their folder."""
    folder = f"{DATA}/texts"
    os.makedirs(os.path.join(ROOT, folder), exist_ok=True)
    with open(os.path.join(ROOT, DATA, "dev-v1.1.json"), encoding="utf-8") as file:
        articles = json.load(file)["data"]
    for number, article in enumerate(articles, 1):
        path = os.path.join(ROOT, folder, f"{number:02}.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.write("\n\n".join(p["context"] for p in article["paragraphs"]) + "\n")
    return folder


def ask(*flags: str) -> None:
    """Ask models the questions in questions.txt."""
    step("ask.py", *flags, stdin="examples/questions.txt")


def show(models: dict[str, str], score: str, label: str) -> None:
    """Print the results of the stages: score, parameters, size and latency of model.onnx."""
    print(f"\n{'':14}{label:>8}{'parameters':>12}{'file':>10}{'1 x 384 in OpenVINO':>22}")
    for name, folder in models.items():
        with open(os.path.join(ROOT, folder, "metrics.json"), encoding="utf-8") as file:
            metrics = json.load(file)
        path = os.path.join(ROOT, folder, "model.onnx")
        print(
            f"{name:14}{metrics[score]:8.2f}{metrics['parameters'] / 1e6:10.2f} M"
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
    """--pack_cfg for all layers and heads, two thirds of the width, and a slim feed-forward."""
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
