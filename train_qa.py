"""Fine-tune a BERT for extractive QA on SQuAD and export it to ONNX.

The output folder gets the PyTorch checkpoint, model.onnx beside it, and what happened: metrics,
predictions, curves. The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import time
from typing import Any

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a word

from transformers import AutoModelForQuestionAnswering

import qa_task
import report_utils
from cli_utils import ArgumentParser, UserError, is_main_process, number, run_main, warn
from model_utils import (
    freeze,
    fuse_attention,
    load_config,
    load_model,
    load_tokenizer,
    save_vocabulary,
    set_dropout,
)
from run_utils import Run, check_output_dir, summary, write_json
from squad_scores import load_scorer
from squad_utils import load_squad
from train_utils import (
    PRECISIONS,
    Stage,
    check_batch_sizes,
    make_accelerator,
    pick_precision,
    process_count,
    train,
    use_all_gpus,
)


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    positive, not_negative = number(int, 1, 1_000_000), number(float, 0)
    add = parser.add_argument
    add("--model_student", required=True, help="BERT to train: a folder or a hub name")
    add("--output_dir", required=True, help="folder for all results")
    add("--squad_train_data", required=True, help="SQuAD v1.1 or v2.0 JSON to train on")
    add("--squad_dev_data", required=True, help="SQuAD JSON to evaluate on")
    add("--squad_eval_script", help="evaluate-v1.1.py or -v2.0.py; built-in scorer if left out")
    add(
        "--model_teacher",
        default="bert-large-uncased-whole-word-masking",
        help="QA model to learn from; loaded only where supervision_weight > 0",
    )
    add("--supervision_weight", type=not_negative, default=0.0, help="of hidden states' error")
    add("--kd_weight", type=not_negative, default=1.0, help="of the teacher's distributions")
    add(
        "--freeze_list",
        default="none",
        help="comma-separated substrings of names of parameters that are not trained, or none",
    )
    add("--learning_rate", type=number(float, 0, 1, True), default=3e-5, help="falls linearly to 0")
    add(
        "--num_train_epochs",
        type=number(float, 0, low_open=True),
        default=2.0,
        help="may be a fraction",
    )
    add("--max_seq_length_q", type=positive, default=64, help="tokens a question is cut to")
    add("--max_seq_length_c", type=positive, default=384, help="tokens of question and context")
    add("--doc_stride", type=positive, default=128, help="tokens between windows of a context")
    add("--total_train_batch_size", type=positive, default=32, help="of one optimisation step")
    add("--per_gpu_train_batch_size", type=positive, default=8, help="of one pass of a process")
    add("--per_gpu_eval_batch_size", type=positive, default=16, help="of one pass of a process")
    add("--dropout", type=number(float, 0, 0.9), default=0.0, help="probability while training")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="of everything random")
    add("--no_cuda", action="store_true", help="run on the CPU though a GPU is there")
    add(
        "--precision", choices=PRECISIONS, default="auto", help="auto: bf16 where there is hardware"
    )
    add(
        "--save_minutes", type=not_negative, default=10.0, help="between saved states; 0: each step"
    )
    add("--log_steps", type=positive, default=10, help="steps between records in metrics.jsonl")
    add("--report_to", choices=("none", "tensorboard"), default="none", help="log there too")
    add("--overwrite_output_dir", action="store_true", help="give up what output_dir holds")
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    """What can be checked before any file is read.

    Raises:
        UserError: for the first thing found.
    """
    pick_precision(args.precision, args.no_cuda)
    names = ("total_train_batch_size", "per_gpu_train_batch_size")
    processes = process_count(args.no_cuda)
    check_batch_sizes(args.total_train_batch_size, args.per_gpu_train_batch_size, processes, names)
    room = args.max_seq_length_c - args.max_seq_length_q - 3
    if room < 1:
        raise UserError(
            f"--max_seq_length_c={args.max_seq_length_c} is too short: a question of"
            f" --max_seq_length_q={args.max_seq_length_q}, 3 special tokens and a context need at"
            f" least {args.max_seq_length_q + 4}"
        )
    if room < args.doc_stride:
        warn(
            f"--doc_stride={args.doc_stride} is more than the {room} context tokens beside a long"
            " question: such windows start closer, so that they leave no gap"
        )
    if args.report_to == "tensorboard" and not importlib.util.find_spec("tensorboard"):
        raise UserError("--report_to=tensorboard: pip install tensorboard, or --report_to=none")
    for flag in ("model_student", "model_teacher"):
        if os.path.realpath(args.output_dir) == os.path.realpath(getattr(args, flag)):
            raise UserError(f"--output_dir is the folder of --{flag}; choose another")


def check_model(args: argparse.Namespace, name: str, flag: str) -> Any:
    """The configuration of a model that takes max_seq_length_c tokens.

    Raises:
        UserError: it is not there, is not BERT, or has too few positions.
    """
    config = load_config(name, flag)
    if args.max_seq_length_c > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_length_c={args.max_seq_length_c} is over the"
            f" {config.max_position_embeddings} positions of {name}"
        )
    return config


def check_teacher(args: argparse.Namespace, student: Any, tokenizer: Any) -> None:
    """Check that the teacher fits the student's configuration and tokenizer.

    Raises:
        UserError: as `check_model`, or their hidden sizes or vocabularies differ.
    """
    teacher = check_model(args, args.model_teacher, "--model_teacher")
    if teacher.hidden_size != student.hidden_size:
        raise UserError(
            f"--model_teacher has hidden size {teacher.hidden_size}, --model_student"
            f" {student.hidden_size}: hidden states of one size are needed to compare them"
        )
    vocabulary = load_tokenizer(args.model_teacher, "--model_teacher", teacher).get_vocab()
    if vocabulary != tokenizer.get_vocab():
        raise UserError("--model_teacher has another vocabulary than --model_student")


def main() -> None:
    args = parse_arguments()
    check_arguments(args)
    started = time.time()

    # All that a user may have got wrong comes before anything that takes long.
    config = check_model(args, args.model_student, "--model_student")
    tokenizer = load_tokenizer(args.model_student, "--model_student", config)
    if args.supervision_weight > 0:
        check_teacher(args, config, tokenizer)
    train_data = load_squad(args.squad_train_data, "--squad_train_data")
    dev_data = load_squad(args.squad_dev_data, "--squad_dev_data")
    scorer = load_scorer(args.squad_eval_script, dev_data)
    arguments = {
        **vars(args),
        "sha256_train": train_data.sha256[:16],
        "sha256_dev": dev_data.sha256[:16],
    }
    found = check_output_dir(args.output_dir, arguments, args.overwrite_output_dir)
    if found == "finished":
        if is_main_process():
            print(f"{args.output_dir} is finished; --overwrite_output_dir runs this command again")
        return
    use_all_gpus(args.no_cuda)

    accelerator = make_accelerator(args.precision, args.no_cuda, args.seed)
    student = load_model(args.model_student, "--model_student", AutoModelForQuestionAnswering)
    frozen = freeze(student, args.freeze_list)
    teacher = None
    if args.supervision_weight > 0:
        teacher = load_model(args.model_teacher, "--model_teacher", AutoModelForQuestionAnswering)
        teacher = fuse_attention(teacher).eval().requires_grad_(False).to(accelerator.device)
    set_dropout(fuse_attention(student), args.dropout)

    lengths = (args.max_seq_length_q, args.max_seq_length_c, args.doc_stride)
    train_windows = qa_task.make_windows(train_data, tokenizer, *lengths, for_training=True)
    dev_windows = qa_task.make_windows(dev_data, tokenizer, *lengths, for_training=False)
    if not len(train_windows):
        raise UserError(
            f"--squad_train_data: none of the answers in {train_data.path} is in its context at"
            " answer_start, so there is nothing to learn"
        )
    run = Run(
        accelerator,
        args.output_dir,
        arguments,
        found,
        save_minutes=args.save_minutes,
        log_steps=args.log_steps,
        report_to=args.report_to,
    )
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    run.say(
        f"{len(train_data.ids):,} questions in {len(train_windows):,} windows to train on,"
        f" {len(dev_data.ids):,} to evaluate on; {precision} on {accelerator.num_processes} x"
        f" {accelerator.device.type}; {frozen / 1e6:.1f} M parameters frozen"
    )
    evaluation = qa_task.QaEvaluation(
        run, dev_data, dev_windows, scorer, args.per_gpu_eval_batch_size
    )
    figures = train(
        run,
        student,
        Stage(
            name="qa",
            num_epochs=args.num_train_epochs,
            learning_rate=args.learning_rate,
            total_batch_size=args.total_train_batch_size,
            micro_batch_size=args.per_gpu_train_batch_size,
        ),
        qa_task.QaBatches(train_windows, args.total_train_batch_size, args.seed),
        qa_task.QaLoss(run, teacher, args.kd_weight, args.supervision_weight),
        evaluation,
    )

    if accelerator.is_main_process:
        with run.writing_results():
            save(args, student, tokenizer, evaluation)
            difference = qa_task.export(args.output_dir, dev_windows, args.max_seq_length_c)
            run.stop_if_asked()
            records = report_utils.read_log(args.output_dir)
            metrics = {
                **figures,
                "counts": {
                    "train_questions": len(train_data.ids),
                    "train_windows": len(train_windows),
                    "dev_questions": len(dev_data.ids),
                    "dev_windows": len(dev_windows),
                },
                "parameters": sum(p.numel() for p in student.parameters()),
                "train_seconds": max((r.get("seconds", 0.0) for r in records), default=0.0),
                "total_seconds": time.time() - started,
                "onnx_max_difference": difference,
                "precision": precision,
                "processes": accelerator.num_processes,
                "device": accelerator.device.type,
                "arguments": arguments,
                "versions": report_utils.versions(),
            }
            report_utils.draw_curves(args.output_dir, {"f1": "F1", "exact_match": "exact match"})
            report_utils.write_qa_card(args.output_dir, metrics)
            run.finish(metrics)
    accelerator.end_training()
    run.say(f"{args.output_dir}: {summary(figures)}; model.onnx checked")


def save(
    args: argparse.Namespace, student: Any, tokenizer: Any, evaluation: qa_task.QaEvaluation
) -> None:
    """Write the checkpoint, its tokenizer, and the answers of the last evaluation."""
    student.to("cpu").save_pretrained(args.output_dir)
    save_vocabulary(tokenizer, args.output_dir)
    write_json(os.path.join(args.output_dir, "predictions.json"), evaluation.predictions)
    if evaluation.data.version_2:
        path = os.path.join(args.output_dir, "no_answer_scores.json")
        write_json(path, evaluation.no_answer_scores)


if __name__ == "__main__":
    run_main(main)
