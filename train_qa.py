"""Fine-tune a BERT for extractive QA on SQuAD and export it to ONNX; or quantize it to INT8.

The output folder gets the PyTorch checkpoint, model.onnx beside it, and what happened: metrics,
predictions, curves. The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a word


from cli import ArgumentParser, run_main
from tasks import TASKS, QaTask
from training.fine_tuning import add_fine_tuning_arguments, fine_tune
from training.flags import (
    GROUPS,
    TRAINING,
    add_data_arguments,
    add_run_arguments,
    not_negative,
)


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(GROUPS, description=__doc__.splitlines()[0])
    add_fine_tuning_arguments(parser, teacher="QA model")
    parser.group(TRAINING).add_argument(
        "--kd_weight", type=not_negative, default=1.0, metavar="WEIGHT",
        help="weight of the cross-entropy with the teacher's distributions of start and"
        " end")  # fmt: skip
    add_data_arguments(parser, max_seq_length_q=64)
    add_run_arguments(parser)
    return parser.parse_args()


def main() -> None:
    fine_tune(parse_arguments(), QaTask, TASKS)


if __name__ == "__main__":
    run_main(main)
