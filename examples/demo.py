"""The main job on an embedded default: sample data -> fine-tuning -> questions to the model.

Every command is printed before it runs, so that it can be copied and changed.
"""

from __future__ import annotations

import argparse
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
    step(
        "ask.py",
        f"--model={output_dir}",
        "--context=examples/article.txt",
        stdin="examples/questions.txt",
    )
    print(f"Ask it more: python ask.py --model={output_dir} --context=<a text file>")


if __name__ == "__main__":
    main()
