"""The speed of train_qa.py, compared with transformers.Trainer and bare matrix products.

    python -m benchmarks.train_speed --model=FOLDER_OR_NAME --squad_train_data=train-v1.1.json

It measures the examples per second of our loop and of the Trainer in alternating rounds, each in a
process of its own, and the time of the matrix products alone in our steps. An example is a window:
[CLS] question [SEP] part of the context [SEP]. The Trainer has its defaults and the data of the
library's own QA example: windows padded to max_seq_length, FP32, the dropout of the configuration.
Our loop is `loop.train` with the defaults of train_qa.py. Both train the same model with the same
batch size and learning rate.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import io
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForQuestionAnswering

import squad_utils
from benchmarks.gpu_timing import synchronize, timing_run
from benchmarks.trainer import add_arguments, make_trainer, trainer_features
from bert.attention import fuse_attention
from bert.model_folder import load_model, open_model
from cli import ArgumentParser, UserError, number, run_main
from squad_utils import Windows
from tasks import qa
from training.fine_tuning import freeze, set_dropout
from training.loop import Stage, train
from training.machine import pick_precision
from training.run import read_log
from training.states import write_json

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ------------------------------------------------------------------------------------------------
# One round of each side


@dataclass(frozen=True)
class Timing:
    """The figures of a round, without its warm-up."""

    examples: int
    seconds: float

    @property
    def rate(self) -> float:
        """Examples per second."""
        return self.examples / self.seconds


def overall(timings: list[Timing]) -> Timing:
    """Several rounds as one, whose rate is all examples divided by all seconds."""
    return Timing(sum(each.examples for each in timings), sum(each.seconds for each in timings))


class ChosenSteps(qa.QaBatches):
    """The given steps as one epoch."""

    def __init__(self, windows: Windows, chosen: list[np.ndarray], seed: int) -> None:
        super().__init__(windows, len(chosen[0]), seed)
        self.chosen = chosen

    def steps(self, epoch: int) -> list[np.ndarray]:
        return self.chosen


def our_round(args: argparse.Namespace, windows: Windows, steps: list[np.ndarray]) -> Timing:
    """Train the model for the given steps in the loop of train_qa.py, with its defaults.

    The seconds are those of the loop's own log: they include making the batches, the backward
    pass, clipping, AdamW and the log.
    """
    model = load_model(open_model(args.model, "--model"), AutoModelForQuestionAnswering, True)
    freeze(model, args.freeze_list)
    set_dropout(fuse_attention(model), 0.0)
    # The longest steps come first, so that memory does not grow later.
    longest = sorted(steps, key=lambda step: -windows.total_lengths[step].max())
    warm = [longest[i % len(longest)] for i in range(args.warm_up_steps)]
    stage = Stage("round", 1, args.learning_rate, len(steps[0]), args.micro_batch_size)
    batches = ChosenSteps(windows, warm + steps, args.seed)
    with (
        timing_run(args.precision, args.no_cuda, args.seed) as run,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        train(run, model, stage, batches, qa.QaLoss(run, None, 0.0, 0.0))
        records = [record for record in read_log(run.output_dir) if "loss" in record]
    began = records[len(warm) - 1]["seconds"]
    return Timing(sum(map(len, steps)), records[-1]["seconds"] - began)


class StepClock(transformers.TrainerCallback):
    """Records the times at which the given steps end."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps, self.times = steps, []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps:  # waiting after every step would slow a GPU down
            synchronize()
            self.times.append(time.perf_counter())


def trainer_round(args: argparse.Namespace, features: list[dict[str, np.ndarray]]) -> Timing:
    """Train the model for some steps with the Trainer."""
    model = load_model(open_model(args.model, "--model"), AutoModelForQuestionAnswering, True)
    total = args.warm_up_steps + args.trainer_round_steps
    # Whole batches, whatever the number of features.
    features = [features[i % len(features)] for i in range(total * args.batch_size)]
    clock = StepClock((args.warm_up_steps, total))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = make_trainer(args, model, features, folder, max_steps=total)
        trainer.add_callback(clock)
        trainer.train()
    return Timing(args.trainer_round_steps * args.batch_size, clock.times[1] - clock.times[0])


# ------------------------------------------------------------------------------------------------
# Bare matrix products


def micro_batch_shapes(
    windows: Windows, steps: list[np.ndarray], micro_batch_size: int
) -> list[tuple[int, int]]:
    """(windows, padded length) of every pass of the steps."""
    shapes = []
    for step in steps:
        for chosen in np.split(step, range(micro_batch_size, len(step), micro_batch_size)):
            longest = int(windows.total_lengths[chosen].max())
            shapes.append((len(chosen), squad_utils.padded(longest)))
    return shapes


def layer_products(
    config: Any, batch: int, length: int, dtype: torch.dtype, device: str
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The matrix products of one encoder layer, forward and backward: (left, right, result).

    Other work is left out: biases, softmax, norms, GELU, dropout, the conversion of weights, the
    optimizer, and the output layer of two columns. No layer counts as frozen. With a frozen
    embedding, our loop saves one product, the first layer's dx of QKV.
    """

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    hidden, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    positions = batch * length
    products = []
    for inside, outside in [
        (hidden, 3 * hidden),  # query, key and value as one layer
        (hidden, hidden),
        (hidden, wide),
        (wide, hidden),
    ]:
        x, dx = matrix(positions, inside), matrix(positions, inside)
        y, dy = matrix(positions, outside), matrix(positions, outside)
        weight, dweight = matrix(outside, inside), matrix(outside, inside)
        products += [(x, weight.T, y), (dy, weight, dx), (dy.T, x, dweight)]

    size = hidden // heads
    query, key, value, dcontext, thin = (matrix(batch * heads, length, size) for _ in range(5))
    weights, dscores, square = (matrix(batch * heads, length, length) for _ in range(3))
    products += [
        (query, key.mT, square),  # scores
        (weights, value, thin),  # context
        (dcontext, value.mT, square),  # gradient of weights
        (weights.mT, dcontext, thin),  # of value
        (dscores, key, thin),  # of query
        (dscores.mT, query, thin),  # of key
    ]
    return products


@torch.inference_mode()
def bare_seconds(
    config: Any, shapes: list[tuple[int, int]], dtype: torch.dtype, device: str
) -> float:
    """Seconds of all encoder layers' matrix products, forward and backward, for some batches.

    The results go to memory that is allocated before, and the layers share it, so caches serve
    these products better than those of a training.
    """
    seconds = 0.0
    for shape in shapes:
        products = layer_products(config, *shape, dtype, device)
        for layer in range(-1, config.num_hidden_layers):
            if layer == 0:  # the one before was warm-up
                synchronize()
                began = time.perf_counter()
            for left, right, result in products:
                torch.matmul(left, right, out=result)
        synchronize()
        seconds += time.perf_counter() - began
    return seconds


# ------------------------------------------------------------------------------------------------
# Rounds


def sample_rounds(
    args: argparse.Namespace, windows: Windows, batch_size: int, steps: int
) -> list[list[np.ndarray]]:
    """`steps` steps per round, from the epoch that train_qa.py plans.

    A step's windows are of similar length, which decides the step's time. So the steps are taken at
    even distances from all whole steps, sorted by length, and dealt out to the rounds.
    """
    planned = qa.QaBatches(windows, batch_size, args.seed).steps(0)
    whole = [step for step in planned if len(step) == batch_size]
    if not whole:
        raise UserError(f"--squad_train_data: fewer windows than a batch of {batch_size}")
    whole.sort(key=lambda step: windows.total_lengths[step].sum())
    count = args.rounds * steps
    taken = [whole[int((i + 0.5) * len(whole) / count)] for i in range(count)]
    rng = np.random.default_rng(args.seed)
    dealt = np.stack([rng.permutation(args.rounds) for _ in range(steps)])  # [steps, rounds]
    return [
        [taken[s * args.rounds + dealt[s, r]] for s in range(steps)] for r in range(args.rounds)
    ]


def in_fresh_process(function: Callable[..., Timing], *arguments: Any) -> Timing:
    """Call a function in a process of its own, so that one side's memory cannot slow the other."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    positive, add = number(int, 1), parser.add_argument
    add("--rounds", type=positive, default=3, help="alternations between ours and the Trainer")
    add("--round_steps", type=positive, default=8, help="timed steps of ours in a round")
    add("--trainer_round_steps", type=positive, default=1, help="timed Trainer steps in a round")
    add("--warm_up_steps", type=positive, default=2, help="untimed steps before each round's")
    args = parser.parse_args()
    gpu = torch.cuda.is_available() and not args.no_cuda
    if gpu and torch.cuda.device_count() > 1:
        raise UserError("several GPUs are visible; CUDA_VISIBLE_DEVICES=0 leaves one")
    dtype = DTYPES[pick_precision(args.precision, args.no_cuda)]
    data = squad_utils.load_squad(args.squad_train_data, "--squad_train_data")
    opened = open_model(args.model, "--model")
    config, tokenizer = opened.config, opened.tokenizer
    lengths = (args.max_seq_length_q, args.max_seq_length_c, args.doc_stride)
    windows = qa.make_windows(data, tokenizer, *lengths, for_training=True)
    rounds = sample_rounds(args, windows, args.batch_size, args.round_steps)
    sampled = np.concatenate([step for steps in rounds for step in steps])
    print(
        f"{dtype} for ours; the {len(sampled)} windows that are timed have"
        f" {windows.total_lengths[sampled].mean():.1f} tokens in the mean, the whole epoch's"
        f" {windows.total_lengths.mean():.1f}",
        flush=True,
    )
    sides: dict[str, list[Timing]] = {"ours": [], "Trainer": [], "bare matrix products": []}
    for r, steps in enumerate(rounds):
        ours = in_fresh_process(our_round, args, windows, steps)
        shapes = micro_batch_shapes(windows, steps, args.micro_batch_size)
        bare = bare_seconds(config, shapes, dtype, "cuda" if gpu else "cpu")
        questions = np.unique(windows.question[np.concatenate(steps)])
        features = trainer_features(args, data, questions, tokenizer)
        trainer = in_fresh_process(trainer_round, args, features)
        found = (ours, trainer, Timing(ours.examples, bare))
        for side, timing in zip(sides.values(), found, strict=True):
            side.append(timing)
        rates = ", ".join(f"{name} {side[-1].rate:.2f}" for name, side in sides.items())
        print(f"round {r + 1}, examples/s: {rates}", flush=True)
    ratios = [a.rate / b.rate for a, b in zip(sides["ours"], sides["Trainer"], strict=True)]
    rate = {name: overall(side).rate for name, side in sides.items()}
    figures = {
        "arguments": vars(args),
        "threads": torch.get_num_threads(),
        "rates": {name: [each.rate for each in side] for name, side in sides.items()},
        "rate": rate,
        "ours_over_trainer": rate["ours"] / rate["Trainer"],
        "ratios": ratios,
        "share_of_bare": rate["ours"] / rate["bare matrix products"],
    }
    print(
        f"all rounds: {figures['ours_over_trainer']:.2f} times the Trainer (rounds:"
        f" {', '.join(f'{each:.2f}' for each in ratios)}), {figures['share_of_bare']:.1%} of the"
        " rate of the bare matrix products"
    )
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    run_main(main)
