"""The flags that all training scripts share, and what can be checked of them at once."""

from __future__ import annotations

import argparse
import importlib.util
import os
from typing import Any

from accelerate import Accelerator

from cli import ArgumentParser, UserError, is_main_process, number
from training.machine import PRECISIONS, pick_precision
from training.run import RUN_FOLDERS, Run, check_output_dir

positive, not_negative = number(int, 1, 1_000_000), number(float, 0)


over_0, rate = number(float, 0, low_open=True), number(float, 0, 1, True)


def add_data_arguments(parser: ArgumentParser, max_seq_length_q: int) -> None:
    """SQuAD files, lengths and batch sizes; the default length of a question differs by task."""
    add = parser.add_argument
    add("--output_dir", required=True, help="folder for all results")
    add("--squad_train_data", required=True, help="SQuAD v1.1 or v2.0 JSON to train on")
    add("--squad_dev_data", required=True, help="SQuAD JSON to evaluate on")
    add("--squad_eval_script", help="evaluate-v1.1.py or -v2.0.py; built-in scorer if left out")
    add("--max_seq_length_q", type=positive, default=max_seq_length_q,
        help="tokens a question is cut to")  # fmt: skip
    add("--max_seq_length_c", type=positive, default=384, help="tokens of question and context")
    add("--doc_stride", type=positive, default=128, help="tokens between windows of a context")
    add("--total_train_batch_size", type=positive, default=32, help="of one optimisation step")
    add("--per_gpu_train_batch_size", type=positive, default=8,
        help="of one pass of a process; a GPU takes as many as its memory holds")  # fmt: skip
    add("--per_gpu_eval_batch_size", type=positive, default=16, help="of one pass of a process")


def add_run_arguments(parser: ArgumentParser) -> None:
    """The machine, the seed, and what a run keeps and tells."""
    add = parser.add_argument
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="of everything random")
    add("--no_cuda", action="store_true", help="run on the CPU though a GPU is there")
    add(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto: bf16 where there is hardware, else fp16 on a GPU",
    )
    add(
        "--save_minutes", type=not_negative, default=10.0, help="between saved states; 0: each step"
    )
    add("--keep", choices=("last", "best"), default="best", help="by the score on dev")
    add("--log_steps", type=positive, default=10, help="steps between records in metrics.jsonl")
    add("--report_to", choices=("none", "tensorboard"), default="none", help="log there too")
    add("--overwrite_output_dir", action="store_true", help="give up what output_dir holds")


def check_arguments(args: argparse.Namespace) -> None:
    """What can be checked before any file is read.

    Raises:
        UserError: for the first thing found.
    """
    pick_precision(args.precision, args.no_cuda)
    if args.report_to == "tensorboard" and not importlib.util.find_spec("tensorboard"):
        raise UserError("--report_to=tensorboard: pip install tensorboard, or --report_to=none")
    for flag in ("model_student", "model_teacher"):
        output, model = os.path.realpath(args.output_dir), os.path.realpath(getattr(args, flag))
        if output == model:
            raise UserError(f"--output_dir is the folder of --{flag}; choose another")
        # What a run removes as it starts.
        if any(f"{model}/".startswith(os.path.join(output, name, "")) for name in RUN_FOLDERS):
            raise UserError(f"--output_dir: --{flag} lies in it and would be lost; choose another")


def claim_output_dir(args: argparse.Namespace, arguments: dict[str, Any]) -> str:
    """What `run.check_output_dir` finds; says so where this command has finished."""
    found = check_output_dir(args.output_dir, arguments, args.overwrite_output_dir)
    if found == "finished" and is_main_process():
        print(f"{args.output_dir} is finished; --overwrite_output_dir runs this command again")
    return found


def open_run(
    accelerator: Accelerator, args: argparse.Namespace, arguments: dict[str, Any], found: str
) -> Run:
    """The run that the flags describe, in the folder as `claim_output_dir` found it."""
    return Run(
        accelerator,
        args.output_dir,
        arguments,
        found,
        save_minutes=args.save_minutes,
        log_steps=args.log_steps,
        report_to=args.report_to,
    )
