"""The flags that all training scripts share, and the checks that need no files."""

from __future__ import annotations

import argparse
import importlib.util
import os

from cli import ArgumentParser, UserError, number
from squad_utils import MAX_ANSWER_LENGTH
from training.machine import PRECISIONS, pick_precision
from training.run import RUN_FOLDERS

positive, not_negative = number(int, 1, 1_000_000), number(float, 0)
over_0, rate = number(float, 0, low_open=True), number(float, 0, 1, True)

# The titles under which --help shows the flags, in this order.
MODELS, DATA, PACKING = "models and folder", "data", "packing"
TRAINING, NEGATIVES = "training", "hard negatives"
INT8, MACHINE, RUN = "quantization", "the machine", "results and logs"
GROUPS = (MODELS, DATA, PACKING, TRAINING, NEGATIVES, INT8, MACHINE, RUN)


def add_data_arguments(parser: ArgumentParser, max_seq_length_q: int) -> None:
    """Add SQuAD files, lengths and batch sizes; the default question length depends on the task."""
    parser.group(MODELS).add_argument(
        "--output_dir", required=True, metavar="FOLDER", help="folder for all results"
    )
    add = parser.group(DATA).add_argument
    add("--squad_train_data", required=True, metavar="FILE",
        help="SQuAD v1.1 or v2.0 to train on: JSON, or another layout of docs/data.md")  # fmt: skip
    add("--squad_dev_data", required=True, metavar="FILE",
        help="the same to evaluate on, of the same version")  # fmt: skip
    add("--squad_eval_script", metavar="FILE",
        help="evaluate-v1.1.py or evaluate-v2.0.py, which scores answers; embeddings do not use it"
        " (default: the built-in scorer, which computes the same)")  # fmt: skip
    add("--max_seq_length_q", type=positive, default=max_seq_length_q, metavar="TOKENS",
        help="tokens of a question; a longer one is cut")  # fmt: skip
    add("--max_seq_length_c", type=positive, default=384, metavar="TOKENS",
        help="tokens of question and context together; embeddings: tokens of a context; a longer"
        " one is cut")  # fmt: skip
    add("--doc_stride", type=positive, default=128, metavar="TOKENS",
        help="tokens from the start of one window of a long context to the start of the next;"
        " embeddings have no windows")  # fmt: skip
    add("--max_answer_length", type=positive, default=MAX_ANSWER_LENGTH, metavar="TOKENS",
        help="tokens of the longest answer that evaluation and ask.py search for; embeddings do"
        " not use it")  # fmt: skip
    parser.group(TRAINING).add_argument(
        "--total_train_batch_size", type=positive, default=32, metavar="N",
        help="windows (embeddings: questions) per optimisation step")  # fmt: skip
    add = parser.group(MACHINE).add_argument
    add("--per_gpu_train_batch_size", type=positive, default=8, metavar="N",
        help="windows or questions per pass of one process on a CPU; a GPU takes as many as its"
        " memory holds")  # fmt: skip
    add("--per_gpu_eval_batch_size", type=positive, default=16, metavar="N",
        help="windows or texts per pass of one process in an evaluation")  # fmt: skip


def add_run_arguments(parser: ArgumentParser) -> None:
    """Add the flags for the seed, the machine, the results and the logs."""
    parser.group(TRAINING).add_argument(
        "--seed", type=number(int, 0, 2**32 - 1), default=42, metavar="N",
        help="seed of the random numbers")  # fmt: skip
    add = parser.group(MACHINE).add_argument
    add("--no_cuda", action="store_true", help="run on the CPU even if there is a GPU")
    add("--precision", choices=PRECISIONS, default="auto",
        help="arithmetic of training; auto takes bf16 if the hardware has it, else fp16 on a GPU"
        " and fp32 on a CPU")  # fmt: skip
    add = parser.group(RUN).add_argument
    add("--keep", choices=("last", "best"), default="best",
        help="which weights are saved and exported: the best on the dev data (by F1;"
        " embeddings: by MRR), or the last")  # fmt: skip
    add("--save_minutes", type=not_negative, default=10.0, metavar="MINUTES",
        help="minutes between two saved states; 0 saves after each step")  # fmt: skip
    add("--log_steps", type=positive, default=10, metavar="STEPS",
        help="steps between two records in metrics.jsonl")  # fmt: skip
    add("--report_to", choices=("none", "tensorboard"), default="none",
        help="another log; tensorboard needs `pip install tensorboard`")  # fmt: skip
    add("--overwrite_output_dir", action="store_true",
        help="delete the results of another command's run from --output_dir")  # fmt: skip


def check_arguments(args: argparse.Namespace) -> None:
    """Check the flags before any file is read.

    Raises:
        UserError: for the first mistake found.
    """
    pick_precision(args.precision, args.no_cuda)
    if args.report_to == "tensorboard" and not importlib.util.find_spec("tensorboard"):
        raise UserError("--report_to=tensorboard: pip install tensorboard, or --report_to=none")
    taught = args.model_teacher if isinstance(args.model_teacher, list) else [args.model_teacher]
    models = [("model_student", args.model_student), *(("model_teacher", each) for each in taught)]
    for flag, name in models:
        output, model = os.path.realpath(args.output_dir), os.path.realpath(name)
        if output == model:
            raise UserError(f"--output_dir is the folder of --{flag}; choose another")
        # A run removes these folders as it starts.
        if any(f"{model}/".startswith(os.path.join(output, each, "")) for each in RUN_FOLDERS):
            raise UserError(f"--output_dir: --{flag} lies in it and would be lost; choose another")
