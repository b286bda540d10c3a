"""Fine-tune a BERT for extractive QA on SQuAD and export it to ONNX; or quantize it to INT8.

The output folder gets the PyTorch checkpoint, its model.onnx, metrics, predictions and curves. The
same command again continues a stopped run.
"""

from __future__ import annotations

import argparse
import functools
import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports silently

from cli import ArgumentParser, number, run_main
from tasks import TASKS, QaTask
from training import fine_tuning
from training.flags import (
    GROUPS,
    NEGATIVES,
    TRAINING,
    add_data_arguments,
    add_run_arguments,
    not_negative,
)
from training.loop import train
from training.machine import in_half


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(GROUPS, description=__doc__.splitlines()[0])
    fine_tuning.add_fine_tuning_arguments(parser, teacher="QA model")
    parser.group(TRAINING).add_argument(
        "--kd_weight", type=not_negative, default=1.0, metavar="WEIGHT",
        help="weight of the cross-entropy between the teacher's and the student's distributions"
        " of start and end")  # fmt: skip
    add = parser.group(NEGATIVES).add_argument
    add("--negative_windows", type=number(int, 0, 100), default=0, metavar="N",
        help="read each question with N windows of other paragraphs that do not hold its answer"
        " but look like it, so that scores of several paragraphs compare; a question with its"
        " windows is then one example of the batch sizes")  # fmt: skip
    add("--model_emb", metavar="FOLDER",
        help="exported embedding model that ranks paragraphs for --negative_windows (default:"
        " BM25)")  # fmt: skip
    add_data_arguments(parser, max_seq_length_q=64)
    add_run_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()

    # Check: find a user's mistakes before anything takes long.
    job = fine_tuning.check(args, QaTask, TASKS)
    if job is None:  # the output folder has the results
        return

    # Load student and teacher; prepare the student: with --nncf_config, insert quantizers.
    run, student, teacher = fine_tuning.load(job)
    student = fine_tuning.add_quantizers(job, run, student)

    # Train stage by stage by the losses of tasks.qa.QaLoss.
    guide = None if teacher is None else in_half(teacher, run.accelerator)
    loss, batches = job.task.fine_tuning(run, guide, job.student.state_maps)
    # INT8 arithmetic is FP32 with rounding, so a quantized model is not evaluated in bf16.
    evaluation = functools.partial(job.task.evaluation, fp32=job.quantized)
    for stage in fine_tuning.stages_to_go(job, run):
        fine_tuning.select_trained(student, stage, args.freeze_list)
        train(run, student, stage, batches, loss, evaluation)

    # Keep the best weights on dev, or the last; save, evaluate and export them.
    if job.best_by:
        run.states.load_best(student)
    fine_tuning.deliver(job, run, student, teacher)


if __name__ == "__main__":
    run_main(main)
