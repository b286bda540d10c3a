"""Fine-tune a BERT to embed questions and contexts, so that the nearest context has the answer.

The output folder gets the PyTorch checkpoint, model.onnx beside it, and what happened: metrics and
curves. The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a word


from bert.embedding import POOLERS, POOLINGS
from cli import ArgumentParser, UserError, number, run_main
from tasks import TASKS, EmbeddingTask
from tasks.embedding_loss import parse_loss_cfg
from training.fine_tuning import add_fine_tuning_arguments, fine_tune
from training.flags import add_data_arguments, add_run_arguments, positive


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_fine_tuning_arguments(parser, teacher="embedding model")
    add("--loss_cfg", default="triplet_num:1,emb_loss:none", help="the loss, key:value,...")
    add("--hnm_num", type=positive, default=256, help="random contexts to mine from in a step")
    add("--hnm_batch_size", type=positive, default=8, help="of them, in one pass; a GPU takes more")
    add("--hnm_hist_num", type=positive, default=32, help="steps whose mined contexts are kept")
    add(
        "--hnm_hist_alpha",
        type=number(float, 0, 100, True),
        default=1.0,
        help="factor on distances of older ones, to the power of their age in steps",
    )
    add("--pooling", choices=POOLINGS, help="cls where the model's configuration has none")
    add(
        "--pooler",
        choices=POOLERS,
        default="pretrained",
        help="what the linear layer starts as; a pretrained one has learned from [CLS] alone",
    )
    add("--eval_extra_contexts", help="SQuAD JSON whose contexts are searched as well")
    add_data_arguments(parser, max_seq_length_q=32)
    add_run_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    cfg = parse_loss_cfg(args.loss_cfg)
    if cfg.emb_loss != "none" and not args.supervision_weight:
        raise UserError(
            f"--loss_cfg: emb_loss:{cfg.emb_loss} needs a teacher: --supervision_weight over 0"
        )
    fine_tune(args, EmbeddingTask, "train_qcemb.py", TASKS)


if __name__ == "__main__":
    run_main(main)
