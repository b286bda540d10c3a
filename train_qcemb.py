"""Fine-tune a BERT to embed questions and contexts, so that the nearest context has the answer.

The output folder gets the PyTorch checkpoint, its model.onnx, metrics and curves. The same command
again continues a stopped run.
"""

from __future__ import annotations

import argparse
import functools
import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports silently

from bert.embedding import POOLERS, POOLINGS
from cli import ArgumentParser, UserError, number, run_main
from tasks import TASKS, EmbeddingTask
from tasks.embedding_loss import parse_loss_cfg
from training import fine_tuning
from training.flags import (
    DATA,
    GROUPS,
    MODELS,
    NEGATIVES,
    TRAINING,
    add_data_arguments,
    add_run_arguments,
    positive,
)
from training.loop import train
from training.machine import in_half


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(GROUPS, description=__doc__.splitlines()[0])
    fine_tuning.add_fine_tuning_arguments(parser, teacher="embedding model")
    add = parser.group(MODELS).add_argument
    add("--pooling", choices=POOLINGS,
        help="embed the state of [CLS] or the mean of all states (default: the model's"
        " configuration, else cls)")  # fmt: skip
    add("--pooler", choices=POOLERS, default="pretrained",
        help="initial weights of the linear layer behind --pooling; pretrained ones have learned"
        " from [CLS] only, so use identity for mean")  # fmt: skip
    parser.group(DATA).add_argument(
        "--eval_extra_contexts", metavar="FILE",
        help="SQuAD JSON whose contexts are searched beside those of the dev data (default:"
        " none)")  # fmt: skip
    parser.group(TRAINING).add_argument(
        "--loss_cfg", default="triplet_num:1,emb_loss:none", metavar="KEY:VALUE,...",
        help="the loss. triplet_num: 1 compares distances to the question, 2 also the distance"
        " between the contexts, 0 leaves only in_batch; emb_loss: none, or L1 or L2, which adds"
        " that distance to the teacher's embedding; in_batch (0): 1 adds a softmax over all"
        " contexts of the step and those mined for it; temperature (learned): of that softmax, a"
        " number, or learned, which starts where the first step's loss is least")  # fmt: skip
    add = parser.group(NEGATIVES).add_argument
    add("--hnm_num", type=positive, default=256, metavar="N",
        help="random contexts that each step embeds and mines")  # fmt: skip
    add("--hnm_batch_size", type=positive, default=8, metavar="N",
        help="random contexts per pass of one process on a CPU; a GPU takes more")  # fmt: skip
    add("--hnm_hist_num", type=positive, default=32, metavar="STEPS",
        help="steps for which random contexts are kept and mined")  # fmt: skip
    add("--hnm_hist_alpha", type=number(float, 0, 100, True), default=1.0, metavar="FACTOR",
        help="distances of contexts that are n steps old are multiplied by FACTOR^n")  # fmt: skip
    add_data_arguments(parser, max_seq_length_q=32)
    add_run_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()

    # Check: find a user's mistakes before anything takes long.
    cfg = parse_loss_cfg(args.loss_cfg)
    if cfg.emb_loss != "none" and not args.supervision_weight:
        raise UserError(
            f"--loss_cfg: emb_loss:{cfg.emb_loss} needs a teacher: --supervision_weight over 0"
        )
    job = fine_tuning.check(args, EmbeddingTask, TASKS)
    if job is None:  # the output folder has the results
        return

    # Load student and teacher; prepare the student: with --nncf_config, insert quantizers.
    run, student, teacher = fine_tuning.load(job)
    student = fine_tuning.add_quantizers(job, run, student)

    # Train stage by stage by the losses of tasks.embedding_loss.EmbeddingLoss.
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
