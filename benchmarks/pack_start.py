"""Several starts of packing side by side, before any training.

For each start: the mean squared error of every hidden state and F1, on the dev file. The starts
leave out one after the other what `bert_pack.pack` does.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import bert_pack
from bert.model_folder import load_teacher, open_model
from cli import ArgumentParser, run_main
from pack_and_distill import SAMPLE_WINDOWS
from squad_utils import INPUTS
from tasks.hidden_states import (
    state_errors,
    teacher_states,
)
from tasks.qa import QaTask
from training.flags import add_data_arguments, add_run_arguments
from training.machine import make_accelerator
from training.run import Run

principal_directions = bert_pack.principal_directions


def random_directions(bert: object, sample: object, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    full = bert.config.hidden_size
    return torch.linalg.qr(torch.randn(full, width, generator=generator, dtype=torch.float64))[0]


def rotated_directions(bert: object, sample: object, width: int) -> Tensor:
    """The space of the principal directions, in random axes."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    return principal_directions(bert, sample, width) @ axes


@contextmanager
def changed(**values: object) -> Iterator[None]:
    """Replace constants and functions of bert_pack in the meantime."""
    kept = {name: getattr(bert_pack, name) for name in values}
    for name, value in values.items():
        setattr(bert_pack, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(bert_pack, name, value)


NO_LEAST_SQUARES = {"RIDGE": 1e12}
STARTS: dict[str, dict[str, object] | None] = {
    "random maps and weights": None,
    "projections onto random directions": {
        **NO_LEAST_SQUARES,
        "FIT_STEPS": 0,
        "principal_directions": random_directions,
    },
    "projections onto principal directions": {**NO_LEAST_SQUARES, "FIT_STEPS": 0},
    "the same and least squares": {"FIT_STEPS": 0},
    "the same and 100 steps of regression": {"FIT_STEPS": 100},
    "the same and 500 steps (default)": {},
    "the same and 1000 steps": {"FIT_STEPS": 1000},
    "default in random axes of the principal space": {"principal_directions": rotated_directions},
}


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="fine-tuned QA model to pack")
    add("--pack_cfg", required=True)
    add("--only", help="part of a start's name")
    add_data_arguments(parser, max_seq_length_q=64)
    add_run_arguments(parser)
    with tempfile.TemporaryDirectory() as folder:
        args = parser.parse_args([*sys.argv[1:], f"--output_dir={folder}"])
        opened = open_model(args.model, "--model", args.max_seq_length_c)
        cfg = bert_pack.parse_pack_cfg(args.pack_cfg)
        bert_pack.check_pack_cfg(cfg, opened.config)
        task = QaTask(args)
        accelerator = make_accelerator(args.precision, args.no_cuda, args.seed)
        teacher = load_teacher(opened, task.auto_class, accelerator.device)
        task.tokenize(opened.tokenizer)
        run = Run(accelerator, args, {}, "new")
        evaluation = task.make_evaluation(run)
        sample = list(task.sample(SAMPLE_WINDOWS))
        sample = [{k: v.to(accelerator.device) for k, v in batch.items()} for batch in sample]
        print(f"teacher: F1 {evaluation(teacher)['f1']:.2f}")
        for name, changes in STARTS.items():
            if args.only and args.only not in name:
                continue
            began = time.perf_counter()
            with changed(**(changes or {})):
                start, bf16 = "random" if changes is None else "teacher", run.precision == "bf16"
                student = bert_pack.pack(teacher, cfg, sample, start=start, bf16=bf16)
            seconds = time.perf_counter() - began
            errors = mean_errors(task, student, teacher, cfg.num_hidden_layers)
            row = {
                "start": name,
                "seconds": round(seconds, 1),
                "f1": round(evaluation(student)["f1"], 2),
                "mean": round(sum(errors) / len(errors), 4),
                "states": [round(error, 4) for error in errors],
            }
            print(json.dumps(row), flush=True)


@torch.no_grad()
def mean_errors(task: QaTask, student: object, teacher: object, n: int) -> list[float]:
    """Mean squared error of each state over the windows of the dev file."""
    import numpy as np

    import squad_utils

    windows, depth = task.dev_windows, teacher.config.num_hidden_layers
    order = np.argsort(windows.total_lengths, kind="stable")
    sums, count = torch.zeros(n + 1, dtype=torch.float64), 0
    for chosen in np.split(order, range(32, len(order), 32)):
        arrays = squad_utils.make_batch(windows, chosen)
        batch = {k: torch.from_numpy(arrays[k]).to(teacher.device) for k in INPUTS}
        taught = teacher_states(teacher.base_model, batch, depth)
        states = student(**batch, output_hidden_states=True).hidden_states
        targets = [taught[i * depth // n] for i in range(n + 1)]
        sums += state_errors(states, targets, batch["attention_mask"]).double().sum(dim=1).cpu()
        count += len(chosen)
    return (sums / count).tolist()


if __name__ == "__main__":
    run_main(main)
