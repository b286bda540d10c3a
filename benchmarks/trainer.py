"""The shared code of comparisons with transformers.Trainer: flags, data, and the Trainer itself."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from cli import ArgumentParser, number
from squad_utils import SquadData
from training.machine import PRECISIONS


def add_arguments(parser: ArgumentParser) -> None:
    """The flags that set the training of both sides."""
    positive, add = number(int, 1), parser.add_argument
    add("--model", required=True, help="BERT to train: a folder or a hub name")
    add("--squad_train_data", required=True, help="SQuAD JSON to train on")
    add("--max_seq_length_q", type=positive, default=64, help="most tokens of a question")
    add("--max_seq_length_c", type=positive, default=384, help="tokens of question and context")
    add("--doc_stride", type=positive, default=128, help="as each side defines it")
    add("--batch_size", type=positive, default=32, help="of one optimisation step, of both")
    add("--micro_batch_size", type=positive, default=8, help="of one pass of ours")
    add("--learning_rate", type=number(float, 0, 1, True), default=2e-4, help="of both")
    add("--freeze_list", default="none", help="as in train_qa.py, for ours alone")
    add("--precision", choices=PRECISIONS, default="auto", help="of ours; the Trainer has FP32")
    add("--no_cuda", action="store_true", help="run on the CPU even if there is a GPU")
    add("--seed", type=number(int, 0), default=42, help="of everything random")
    add("--json", help="write all figures to this file")


def trainer_features(
    args: argparse.Namespace, data: SquadData, chosen: np.ndarray, tokenizer: Any
) -> list[dict[str, np.ndarray]]:
    """The examples of the library's own QA example, for the questions `chosen`.

    Padded to max_seq_length_c; the first answer of each question is learnt; (0, 0), the [CLS]
    token, where the window lacks part of it.
    """
    encoded = tokenizer(
        [data.questions[q].lstrip() for q in chosen],
        [data.contexts[data.context_of[q]] for q in chosen],
        truncation="only_second",
        max_length=args.max_seq_length_c,
        stride=args.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
    )
    features = []
    for i, sample in enumerate(encoded["overflow_to_sample_mapping"]):
        feature = {
            name: np.array(encoded[name][i], np.int64)
            for name in ("input_ids", "token_type_ids", "attention_mask")
        }
        start = end = 0
        answers = data.answers[chosen[sample]]
        if answers:
            begin, text = answers[0]
            context = np.flatnonzero([part == 1 for part in encoded.sequence_ids(i)])
            starts, ends = np.array(encoded["offset_mapping"][i])[context].T
            if starts[0] <= begin and ends[-1] >= begin + len(text):
                start = context[np.searchsorted(starts, begin, side="right") - 1]
                end = context[np.searchsorted(ends, begin + len(text), side="left")]
        feature["start_positions"], feature["end_positions"] = np.int64(start), np.int64(end)
        features.append(feature)
    return features


def make_trainer(
    args: argparse.Namespace,
    model: nn.Module,
    features: list[dict[str, np.ndarray]],
    folder: str,
    **arguments: Any,
) -> transformers.Trainer:
    """The Trainer with its defaults, except for the settings that both sides must share."""
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=folder,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            seed=args.seed,
            use_cpu=args.no_cuda or not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=features,
    )
