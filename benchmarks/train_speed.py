"""How fast train_qa.py trains: against transformers.Trainer, and against bare matrix products.

    python -m benchmarks.train_speed --model=FOLDER_OR_NAME \
        --squad_train_data=train-v1.1.json --squad_dev_data=dev-v1.1.json --json=figures.json

The parts, each of which can be skipped:

    speed  examples/s of our loop and of the Trainer in alternating rounds, each in a process of
           its own, and the time of nothing but the matrix products that our steps consist of
    f1     one epoch on a part of the questions with each, both evaluated by the same code

An example is a window: [CLS] question [SEP] part of the context [SEP]. The Trainer has its
defaults and the data of the library's own QA example: windows padded to max_seq_length, FP32, the
dropout of the model's configuration. Ours is `loop.train`, the loop of train_qa.py, with
that script's defaults. Both train the same model with the same batch size and learning rate.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import io
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering

from bert.attention import fuse_attention
from bert.model_folder import load_model, open_model
from cli import ArgumentParser, UserError, number, run_main, warn
from squad_utils import SquadData, Windows, load_squad
from tasks import qa
from tasks.squad_scores import built_in_scorer
from training.fine_tuning import freeze, set_dropout
from training.loop import Stage, train
from training.machine import PRECISIONS, make_accelerator, pick_precision
from training.run import Run, read_log
from training.states import write_json

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

IDLE_LOAD = 0.5  # load average over which the figures are not to be trusted
SPEED_TARGETS = {"bf16": 8.0, "no": 3.0}  # times the Trainer's examples/s on a CPU, by precision
BARE_TARGET = 0.5  # of the rate of the bare matrix products
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    positive, not_negative = number(int, 1), number(int, 0)
    add = parser.add_argument
    add("--model", required=True, help="BERT to train: a folder or a hub name")
    add("--squad_train_data", required=True, help="SQuAD JSON to train on")
    add("--squad_dev_data", required=True, help="SQuAD JSON to evaluate on")
    add("--max_seq_length_q", type=positive, default=64, help="tokens a question is cut to")
    add("--max_seq_length_c", type=positive, default=384, help="tokens of question and context")
    add("--doc_stride", type=positive, default=128, help="as each side defines it")
    add("--batch_size", type=positive, default=32, help="of one optimisation step, of both")
    add("--micro_batch_size", type=positive, default=8, help="of one pass of ours")
    add("--learning_rate", type=number(float, 0, 1, True), default=2e-4, help="of both")
    add("--freeze_list", default="none", help="as in train_qa.py, for ours alone")
    add("--precision", choices=PRECISIONS, default="auto", help="of ours; the Trainer has FP32")
    add("--no_cuda", action="store_true", help="run on the CPU though a GPU is there")
    add("--seed", type=not_negative, default=42, help="of everything random")
    add("--rounds", type=positive, default=3, help="alternations between ours and the Trainer")
    add("--round_steps", type=positive, default=8, help="timed steps of ours in a round")
    add("--trainer_round_steps", type=positive, default=1, help="timed Trainer steps in a round")
    add("--warm_up_steps", type=positive, default=2, help="untimed steps before each round's")
    add("--num_questions", type=positive, default=1000, help="to train on in the f1 part, about")
    add("--num_dev_questions", type=not_negative, default=0, help="to evaluate on; 0: all")
    add("--skip_speed", action="store_true")
    add("--skip_f1", action="store_true")
    add("--json", help="write all figures there")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------
# One round of each side


@dataclass(frozen=True)
class Timing:
    """What a round measured; warm-up is left out."""

    examples: int
    tokens: int  # padding left out
    seconds: float

    @property
    def rate(self) -> float:
        """Examples a second."""
        return self.examples / self.seconds


def overall(timings: list[Timing]) -> Timing:
    """Several rounds as one: its rate is all examples over all seconds."""
    return Timing(
        sum(each.examples for each in timings),
        sum(each.tokens for each in timings),
        sum(each.seconds for each in timings),
    )


def new_accelerator(args: argparse.Namespace) -> Accelerator:
    """The accelerator of train_qa.py, though a Trainer has run in this process.

    Accelerators share their precision through class attributes, and the Trainer sets its own.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return make_accelerator(args.precision, args.no_cuda, args.seed)


class TimingRun(Run):
    """A run that keeps no states and says nothing: there is nothing to go on with."""

    def __init__(self, accelerator: Accelerator, folder: str) -> None:
        super().__init__(
            accelerator, folder, {}, "new", save_minutes=1e9, log_steps=1, report_to="none"
        )
        self.states.save = lambda position: True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def say(self, text: str) -> None:
        pass


class ChosenSteps(qa.QaBatches):
    """The steps it is given as one epoch."""

    def __init__(self, windows: Windows, chosen: list[np.ndarray], seed: int) -> None:
        super().__init__(windows, len(chosen[0]), seed)
        self.chosen = chosen

    def steps(self, epoch: int) -> list[np.ndarray]:
        return self.chosen


def warm_up(windows: Windows, steps: list[np.ndarray], count: int) -> list[np.ndarray]:
    """The longest steps: after them, memory need not grow."""
    by_length = sorted(steps, key=lambda step: -windows.total_lengths[step].max())
    return [by_length[i % len(by_length)] for i in range(count)]


def our_round(
    args: argparse.Namespace,
    model: nn.Module,
    windows: Windows,
    steps: list[np.ndarray],
    micro_batch_size: int,
) -> Timing:
    """Train `model`, with fused attention, for the given steps in the loop of train_qa.py.

    The seconds are those of the loop's own log: they include making the batches, the backward
    pass, clipping, AdamW and the log.
    """
    warm = warm_up(windows, steps, args.warm_up_steps)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = TimingRun(new_accelerator(args), folder)
        train(
            run,
            model,
            Stage("round", 1, args.learning_rate, len(steps[0]), micro_batch_size),
            ChosenSteps(windows, warm + steps, args.seed),
            qa.QaLoss(run, None, 0.0, 0.0),
            lambda _: {},
        )
        records = [record for record in read_log(folder) if "evaluation" not in record]
    return Timing(
        examples=sum(map(len, steps)),
        tokens=int(sum(windows.total_lengths[step].sum() for step in steps)),
        seconds=records[-1]["seconds"] - records[len(warm) - 1]["seconds"],
    )


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


class StepClock(transformers.TrainerCallback):
    """The times at which the given steps have ended."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps, self.times = steps, []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps:  # waiting after every step would slow a GPU down
            synchronize()
            self.times.append(time.perf_counter())


def synchronize() -> None:
    """Wait for what a GPU has been given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_trainer(
    args: argparse.Namespace,
    model: nn.Module,
    features: list[dict[str, np.ndarray]],
    folder: str,
    **arguments: Any,
) -> transformers.Trainer:
    """The Trainer with its defaults, except for what must be the same for both sides."""
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=folder,
            learning_rate=args.learning_rate,
            seed=args.seed,
            use_cpu=args.no_cuda or not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=features,
    )


def trainer_round(
    args: argparse.Namespace,
    model: nn.Module,
    features: list[dict[str, np.ndarray]],
    steps: int,
    batch_size: int,
    micro_batch_size: int,
) -> Timing:
    """Train `model` for some steps with the Trainer."""
    total = args.warm_up_steps + steps
    # Whole batches, whatever the number of features.
    features = [features[i % len(features)] for i in range(total * batch_size)]
    clock = StepClock((args.warm_up_steps, total))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = make_trainer(
            args,
            model,
            features,
            folder,
            max_steps=total,
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=batch_size // micro_batch_size,
        )
        trainer.add_callback(clock)
        trainer.train()
    tokens = np.mean([feature["attention_mask"].sum() for feature in features])
    examples = steps * batch_size
    return Timing(examples, int(tokens * examples), clock.times[1] - clock.times[0])


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
            shapes.append((len(chosen), -(-longest // 8) * 8))  # as squad_utils.make_batch
    return shapes


def layer_products(
    config: Any, batch: int, length: int, dtype: torch.dtype, device: str, one_qkv: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The matrix products of one encoder layer, forward and backward: (left, right, result).

    Left out is what is no product or hardly any: biases, softmax, norms, GELU, dropout, the
    conversion of weights, the optimizer, and the output layer of two columns. Nothing counts as
    frozen: with a frozen embedding, one product more than ours has, the first layer's dx of QKV.

    Args:
        one_qkv: query, key and value as one product, not as three.
    """

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    hidden, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    qkv = [(hidden, 3 * hidden)] if one_qkv else [(hidden, hidden)] * 3
    positions = batch * length
    products = []
    for inside, outside in [*qkv, (hidden, hidden), (hidden, wide), (wide, hidden)]:
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


def bare_seconds(
    config: Any,
    shapes: list[tuple[int, int]],
    dtype: torch.dtype,
    device: str,
    one_qkv: bool,
) -> float:
    """Seconds of all encoder layers' matrix products, forward and backward, for some batches.

    The results go to memory that is there already, and the layers share theirs, so that caches
    serve these products better than those of a training.
    """
    seconds = 0.0
    for shape in shapes:
        products = layer_products(config, *shape, dtype, device, one_qkv)
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
# The parts


def prepared(args: argparse.Namespace, model: nn.Module) -> nn.Module:
    """A model as train_qa.py makes it ready for training with its defaults."""
    freeze(model, args.freeze_list)
    fuse_attention(model)
    set_dropout(model, 0.0)
    return model


def sample_rounds(
    args: argparse.Namespace, windows: Windows, batch_size: int, steps: int
) -> list[list[np.ndarray]]:
    """For each round `steps` steps of the epoch that train_qa.py plans.

    A step's windows are of similar length, and its time goes with that length. So the steps are
    taken at even distances from all whole steps sorted by length, and dealt out to the rounds.
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
    """Call a function in a process of its own: one side's memory must not slow the other down."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def our_fresh_round(args: argparse.Namespace, windows: Windows, steps: list[np.ndarray]) -> Timing:
    """`our_round` with a model as it was loaded."""
    model = load_model(open_model(args.model, "--model"), AutoModelForQuestionAnswering, True)
    return our_round(args, prepared(args, model), windows, steps, args.micro_batch_size)


def trainer_fresh_round(args: argparse.Namespace, features: list[dict[str, np.ndarray]]) -> Timing:
    """`trainer_round` with a model as it was loaded."""
    model = load_model(open_model(args.model, "--model"), AutoModelForQuestionAnswering, True)
    size = args.batch_size
    return trainer_round(args, model, features, args.trainer_round_steps, size, size)


def measure_speed(
    args: argparse.Namespace, data: SquadData, windows: Windows, tokenizer: Any
) -> dict[str, Any]:
    """Part speed: alternating rounds of ours, the bare matrix products, and the Trainer."""
    device = "cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu"
    precision = pick_precision(args.precision, args.no_cuda)
    config = open_model(args.model, "--model").config
    rounds = sample_rounds(args, windows, args.batch_size, args.round_steps)
    sampled = np.concatenate([step for steps in rounds for step in steps])
    print(
        f"speed: {DTYPES[precision]} for ours; the {len(sampled)} windows that are timed have"
        f" {windows.total_lengths[sampled].mean():.1f} tokens in the mean, the whole epoch's"
        f" {windows.total_lengths.mean():.1f}",
        flush=True,
    )
    our_rounds, trainer_rounds = [], []
    bare: dict[str, list[float]] = {"as_run": [], "three_qkv": []}
    for r, steps in enumerate(rounds):
        our_rounds.append(in_fresh_process(our_fresh_round, args, windows, steps))
        shapes = micro_batch_shapes(windows, steps, args.micro_batch_size)
        for name, one_qkv in (("as_run", True), ("three_qkv", False)):
            with torch.inference_mode():
                seconds = bare_seconds(config, shapes, DTYPES[precision], device, one_qkv)
            bare[name].append(seconds)
        questions = np.unique(windows.question[np.concatenate(steps)])
        features = trainer_features(args, data, questions, tokenizer)
        trainer_rounds.append(in_fresh_process(trainer_fresh_round, args, features))
        print(
            f"round {r + 1}: ours {our_rounds[-1].rate:.2f} examples/s, Trainer"
            f" {trainer_rounds[-1].rate:.2f}, ratio"
            f" {our_rounds[-1].rate / trainer_rounds[-1].rate:.2f}, bare matrix products"
            f" {our_rounds[-1].examples / bare['as_run'][-1]:.2f}",
            flush=True,
        )
    our_total, trainer_total = overall(our_rounds), overall(trainer_rounds)
    ratios = [a.rate / b.rate for a, b in zip(our_rounds, trainer_rounds, strict=True)]
    return {
        "device": device,
        "precision": precision,
        "our_rates": [each.rate for each in our_rounds],
        "trainer_rates": [each.rate for each in trainer_rounds],
        "ratios": ratios,
        "our_rate": our_total.rate,
        "our_tokens_per_second": our_total.tokens / our_total.seconds,
        "trainer_rate": trainer_total.rate,
        "trainer_tokens_per_second": trainer_total.tokens / trainer_total.seconds,
        "ratio": our_total.rate / trainer_total.rate,
        "median_ratio": float(np.median(ratios)),
        "bare_rate": {name: our_total.examples / sum(each) for name, each in bare.items()},
        "share_of_bare": {name: sum(each) / our_total.seconds for name, each in bare.items()},
        "sampled_mean_tokens": float(windows.total_lengths[sampled].mean()),
        "epoch_mean_tokens": float(windows.total_lengths.mean()),
    }


def write_part(data: SquadData, count: int, path: str) -> None:
    """Write about `count` questions of the data: whole paragraphs, spread evenly over the file."""
    paragraphs = [(a, p) for a, article in enumerate(data.articles) for p in article["paragraphs"]]
    kept = len(paragraphs)
    if count:
        kept = max(1, min(kept, round(kept * count / len(data.ids))))
    articles: dict[int, dict[str, Any]] = {}
    for i in range(kept):
        a, paragraph = paragraphs[int((i + 0.5) * len(paragraphs) / kept)]
        title = data.articles[a].get("title", "")
        articles.setdefault(a, {"title": title, "paragraphs": []})["paragraphs"].append(paragraph)
    version = "2.0" if data.version_2 else "1.1"
    write_json(path, {"version": version, "data": list(articles.values())})


def measure_f1(
    args: argparse.Namespace, train_data: SquadData, dev_data: SquadData, tokenizer: Any
) -> dict[str, Any]:
    """Part f1: an epoch of train_qa.py and one of the Trainer, from the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        train_path, dev_path = os.path.join(folder, "train.json"), os.path.join(folder, "dev.json")
        write_part(train_data, args.num_questions, train_path)
        write_part(dev_data, args.num_dev_questions, dev_path)
        train_data = load_squad(train_path, "--squad_train_data")
        dev_data = load_squad(dev_path, "--squad_dev_data")
        print(
            f"f1: an epoch on {len(train_data.ids):,} questions, evaluated on"
            f" {len(dev_data.ids):,}; ours, by train_qa.py:",
            flush=True,
        )
        output_dir = os.path.join(folder, "ours")
        flags = {
            "model_student": args.model,
            "output_dir": output_dir,
            "squad_train_data": train_path,
            "squad_dev_data": dev_path,
            "num_train_epochs": 1,
            "total_train_batch_size": args.batch_size,
            "per_gpu_train_batch_size": args.micro_batch_size,
        }
        same = ("max_seq_length_q", "max_seq_length_c", "doc_stride", "learning_rate")
        flags |= {name: getattr(args, name) for name in (*same, "freeze_list", "precision", "seed")}
        command = [sys.executable, os.path.join(ROOT, "train_qa.py")]
        command += [f"--{name}={value}" for name, value in flags.items()]
        if subprocess.run(command + ["--no_cuda"] * args.no_cuda).returncode:
            raise UserError("train_qa.py failed; what it printed is above")
        with open(os.path.join(output_dir, "metrics.json"), encoding="utf-8") as file:
            metrics = json.load(file)

        print("f1: the Trainer", flush=True)
        transformers.set_seed(args.seed)
        model = load_model(open_model(args.model, "--model"), AutoModelForQuestionAnswering, True)
        features = trainer_features(args, train_data, np.arange(len(train_data.ids)), tokenizer)
        trainer = make_trainer(
            args,
            model,
            features,
            os.path.join(folder, "trainer"),
            num_train_epochs=1,
            per_device_train_batch_size=args.batch_size,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            trainer_seconds = trainer.train().metrics["train_runtime"]

        # The code, and the precision, that train_qa.py evaluates with.
        evaluation_dir = os.path.join(folder, "evaluation")
        os.makedirs(evaluation_dir)
        run = TimingRun(new_accelerator(args), evaluation_dir)
        lengths = (args.max_seq_length_q, args.max_seq_length_c, args.doc_stride)
        dev_windows = qa.make_windows(dev_data, tokenizer, *lengths, for_training=False)
        evaluation = qa.QaEvaluation(run, dev_data, dev_windows, built_in_scorer, 16)
        figures = evaluation(fuse_attention(model))
    questions = len(train_data.ids)
    return {
        "train_questions": questions,
        "our_windows": metrics["counts"]["train_windows"],
        "trainer_windows": len(features),
        "dev_questions": len(dev_data.ids),
        "our_f1": metrics["f1"],
        "our_exact_match": metrics["exact_match"],
        "our_seconds": metrics["train_seconds"],
        "trainer_f1": figures["f1"],
        "trainer_exact_match": figures["exact_match"],
        "trainer_seconds": trainer_seconds,
        # Ours may cut a few more windows: an epoch is the same questions for both.
        "ratio": trainer_seconds / metrics["train_seconds"],
    }


# ------------------------------------------------------------------------------------------------
# The report


def report(figures: dict[str, Any], target: float | None) -> str:
    """All figures as a markdown table; the last columns say what is required and whether it is met.

    Args:
        target: required ratio of our examples/s to the Trainer's, if any.
    """
    rows: list[tuple[str, str, float | None, float]] = []  # name, shown, required, value

    def add(name: str, value: float, shown: str, required: float | None = None) -> None:
        rows.append((name, shown, required, value))

    if speed := figures.get("speed"):
        for name, key in (("ours", "our"), ("Trainer", "trainer")):
            rate, tokens = speed[f"{key}_rate"], speed[f"{key}_tokens_per_second"]
            add(f"{name}, examples/s (tokens/s)", rate, f"{rate:.2f} ({tokens:,.0f})")
        add("ours / Trainer, all rounds", speed["ratio"], f"{speed['ratio']:.2f}", target)
        median = speed["median_ratio"]
        add("ours / Trainer, median of the rounds", median, f"{median:.2f}", target)
        for key, name in (
            ("as_run", "QKV as one product, as ours runs it"),
            ("three_qkv", "QKV as three products"),
        ):
            rate, share = speed["bare_rate"][key], speed["share_of_bare"][key]
            add(f"bare matrix products ({name}), examples/s", rate, f"{rate:.2f}")
            add(f"ours / bare ({name})", share, f"{share:.3f}", BARE_TARGET)
    if f1 := figures.get("f1"):
        for name, key in (("ours", "our"), ("Trainer", "trainer")):
            score, exact = f1[f"{key}_f1"], f1[f"{key}_exact_match"]
            seconds = f1[f"{key}_seconds"]
            add(f"epoch by {name}, seconds", seconds, f"{seconds:.1f}")
            add(
                f"F1 (EM) after the epoch by {name}",
                score,
                f"{score:.2f} ({exact:.2f})",
                f1["trainer_f1"] if key == "our" else None,
            )
        add("whole epoch, ours / Trainer", f1["ratio"], f"{f1['ratio']:.2f}", target)
    lines = ["| measure | value | at least | met |", "|---|---|---|---|"]
    for name, shown, required, value in rows:
        if required is None:
            lines.append(f"| {name} | {shown} | | |")
        else:
            met = "yes" if value >= required else "no"
            lines.append(f"| {name} | {shown} | {required:.4g} | {met} |")
    return "\n".join(lines)


def main() -> None:
    args = parse_arguments()
    gpu = torch.cuda.is_available() and not args.no_cuda
    if gpu and torch.cuda.device_count() > 1:
        raise UserError("several GPUs are visible; CUDA_VISIBLE_DEVICES=0 leaves one")
    load = os.getloadavg()[0]
    if load > IDLE_LOAD:
        warn(
            f"other processes use this machine (load average {load:.2f}): they slow both sides"
            " down, and not alike"
        )
    precision = pick_precision(args.precision, args.no_cuda)
    train_data = load_squad(args.squad_train_data, "--squad_train_data")
    dev_data = load_squad(args.squad_dev_data, "--squad_dev_data")
    tokenizer = open_model(args.model, "--model").tokenizer

    figures: dict[str, Any] = {
        "arguments": vars(args),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
        "load_average_before": load,
    }
    if not args.skip_speed:
        lengths = (args.max_seq_length_q, args.max_seq_length_c, args.doc_stride)
        windows = qa.make_windows(train_data, tokenizer, *lengths, for_training=True)
    if not args.skip_speed:
        figures["speed"] = measure_speed(args, train_data, windows, tokenizer)
    if not args.skip_f1:
        figures["f1"] = measure_f1(args, train_data, dev_data, tokenizer)
    if args.json:
        write_json(args.json, figures)
    print("\n" + report(figures, None if gpu else SPEED_TARGETS[precision]), flush=True)


if __name__ == "__main__":
    run_main(main)
