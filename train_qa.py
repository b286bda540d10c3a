"""Fine-tune a BERT for extractive QA on SQuAD and export it to ONNX.

The output folder gets the PyTorch checkpoint, model.onnx beside it, and what happened: metrics,
predictions, curves. The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import signal
import time

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a word

import report_utils
from cli_utils import ArgumentParser, UserError, number, run_main
from fast_attention import fuse_attention
from model_utils import (
    check_model,
    check_teacher,
    freeze,
    load_model,
    load_tokenizer,
    save_model,
    set_dropout,
    unmerged_folder,
)
from qa_task import QaLoss, QaTask
from run_arguments import (
    add_data_arguments,
    add_run_arguments,
    check_arguments,
    claim_output_dir,
    not_negative,
    open_run,
    over_0,
    rate,
)
from run_utils import summary
from train_utils import Stage, make_accelerator, train, use_all_gpus


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model_student", required=True, help="BERT to train: a folder or a hub name")
    add_data_arguments(parser, max_seq_length_q=64)
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
    add("--learning_rate", type=rate, default=3e-5, help="falls linearly to 0")
    add("--num_train_epochs", type=over_0, default=2.0, help="may be a fraction")
    add("--dropout", type=number(float, 0, 0.9), default=0.0, help="probability while training")
    add_run_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    check_arguments(args, batch_sizes=("total_train_batch_size",))
    started = time.time()

    # All that a user may have got wrong comes before anything that takes long.
    if args.supervision_weight > 0:  # hidden states of the teacher's size are needed
        args.model_student = unmerged_folder(args.model_student)
    config = check_model(args.model_student, "--model_student", args.max_seq_length_c)
    tokenizer = load_tokenizer(args.model_student, "--model_student", config)
    if args.dropout and config.model_type != "bert":
        raise UserError(f"--dropout: {args.model_student} is packed and has none; leave it out")
    if args.supervision_weight > 0:
        teacher_config = check_model(args.model_teacher, "--model_teacher", args.max_seq_length_c)
        check_teacher(args.model_teacher, teacher_config, config, tokenizer)
    task = QaTask(args)
    arguments = {**vars(args), **task.hashes()}
    found = claim_output_dir(args, arguments)
    if found == "finished":
        return
    use_all_gpus(args.no_cuda)

    accelerator = make_accelerator(args.precision, args.no_cuda, args.seed)
    student = load_model(args.model_student, "--model_student", task.auto_class)
    frozen = freeze(student, args.freeze_list)
    teacher = None
    if args.supervision_weight > 0:
        teacher = load_model(args.model_teacher, "--model_teacher", task.auto_class)
        teacher = fuse_attention(teacher).eval().requires_grad_(False).to(accelerator.device)
    set_dropout(fuse_attention(student), args.dropout)
    task.tokenize(tokenizer)
    run = open_run(accelerator, args, arguments, found)
    run.say(f"{task.describe()}; {run.machine()}; {frozen / 1e6:.1f} M parameters frozen")
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
        task.batches(args.total_train_batch_size),
        QaLoss(run, teacher, args.kd_weight, args.supervision_weight),
        task.make_evaluation(run),
    )

    if run.main:
        with run.writing_results():
            student = save_model(student, tokenizer, args.output_dir)
            task.write_answers()
            difference = task.export()
            run.stop_if_asked()
            metrics = {
                **figures,
                **report_utils.describe_run(run, arguments, started),
                "counts": task.counts(),
                "parameters": sum(p.numel() for p in student.parameters()),
                "onnx_max_difference": difference,
            }
            report_utils.draw_curves(args.output_dir, task.score_names)
            report_utils.write_qa_card(args.output_dir, metrics, "train_qa.py", "fine-tuned on")
            run.finish(metrics)
    accelerator.end_training()
    run.say(f"{args.output_dir}: {summary(figures)}; model.onnx checked")


if __name__ == "__main__":
    run_main(main)
