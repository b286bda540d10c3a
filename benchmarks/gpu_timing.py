"""The shared code of the parts of benchmarks/gpu.py: models, data, the clock, operation counts.

MFU is the share of the card's dense peak rate that the model's own operations take: the products
of linear layers and of attention, forward and backward, on tokens without padding. Work that is
done twice, such as recomputed activations, does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering

import squad_utils
from bert.attention import fuse_attention
from bert.packed import PackedBertForQuestionAnswering
from bert_pack import PackCfg, packed_config
from squad_utils import SpecialIds, Tokens, Windows
from training.fine_tuning import freeze
from training.loop import Stage, train
from training.machine import make_accelerator
from training.passes import Batches
from training.run import Run, read_log

ROOT = Path(__file__).resolve().parent.parent
SPECIAL = SpecialIds(cls=1, sep=2, pad=0)
QUESTION = 16  # tokens of a generated question
KERNELS = 25  # rows of a profile
PROFILED_STEPS = 3


@dataclass(frozen=True)
class Sizes:
    """The sizes of a measurement, real or of a dry run.

    Attributes:
        bert: arguments of BertConfig.
        pack: the packed model.
        length: tokens of every window.
        product: rows and columns of the matrices that give the measured rate.
        warm_up, steps: steps before those that are timed, and timed ones.
        mined: contexts mined from in a step.
        questions: of the commands' training file.
    """

    bert: dict[str, int]
    pack: PackCfg
    length: int
    product: int
    warm_up: int
    steps: int
    mined: int
    questions: int


def bert_sizes(layers: int, hidden: int, heads: int, vocabulary: int) -> dict[str, int]:
    """Arguments of a BertConfig; the feed-forward is four times as wide."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": vocabulary,
    }


REAL = Sizes(bert_sizes(24, 1024, 16, 30522), PackCfg(), 384, 8192, 5, 20, 256, 64)
TINY = Sizes(bert_sizes(2, 64, 4, 2000), PackCfg(2, 2, 2, 32), 64, 128, 1, 2, 8, 12)


@dataclass
class Bench:
    """The state that all parts share.

    Attributes:
        device: "cuda", or "cpu" in a dry run.
        precision: as --precision of the scripts.
        parts: figures by part, so far.
    """

    args: argparse.Namespace
    sizes: Sizes
    device: str
    precision: str
    parts: dict[str, dict[str, Any]]

    def config(self) -> BertConfig:
        """Of the large model, without dropout, which the scripts do not have either."""
        return BertConfig(
            **self.sizes.bert, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )

    def make(self, model_class: Any, config: Any) -> Any:
        """A model with random weights, made on the device, which takes less time than on a CPU."""
        with torch.device(self.device):
            return model_class(config)

    def student(self) -> Any:
        """The large QA model as train_qa.py trains it with --freeze_list=embedding."""
        model = fuse_attention(self.make(BertForQuestionAnswering, self.config()))
        freeze(model, "embedding")
        return model

    def teacher(self, model_class: Any = BertForQuestionAnswering) -> Any:
        model = fuse_attention(self.make(model_class, self.config()))
        return model.eval().requires_grad_(False)

    def packed(self, merged: bool) -> Any:
        """The packed model with the heads that it has in its final stage."""
        config = packed_config(self.config(), self.sizes.pack)
        config.merged, config.num_attention_heads = merged, self.sizes.pack.num_attention_heads
        return self.make(PackedBertForQuestionAnswering, config)


def synchronize() -> None:
    """Wait until a GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------
# Data


def random_tokens(rng: np.random.Generator, texts: int, length: int, vocabulary: int) -> Tokens:
    """Texts of `length` random tokens each."""
    ids = rng.integers(5, vocabulary, texts * length).astype(np.int32)
    return Tokens(ids, np.arange(texts + 1, dtype=np.int64) * length, None)


class RandomBatches(Batches):
    """Batches of random windows, all of the same length, for `loop.train`.

    Attributes:
        largest: windows of the largest batch so far, which tells what the loop makes one pass of.
    """

    def __init__(self, sizes: Sizes, steps: int, step_size: int) -> None:
        rng, count = np.random.default_rng(0), steps * step_size
        room, vocabulary = sizes.length - 3 - QUESTION, sizes.bert["vocab_size"]
        first = rng.integers(0, room - 4, count)
        self.windows = Windows(
            contexts=random_tokens(rng, count, room, vocabulary),
            questions=random_tokens(rng, count, QUESTION, vocabulary),
            context_of=np.arange(count, dtype=np.int32),
            question=np.arange(count, dtype=np.int32),
            first=np.zeros(count, np.int32),
            length=np.full(count, room, np.int32),
            answer_bounds=np.arange(count + 1),
            answer_tokens=np.stack([first, first + 3], axis=1).astype(np.int32),
            special=SPECIAL,
        )
        self.targets = squad_utils.targets(self.windows, rng)
        self.step_size, self.largest = step_size, 0

    def steps(self, epoch: int) -> list[np.ndarray]:
        return list(np.arange(len(self.windows)).reshape(-1, self.step_size))

    def tokens(self, chosen: np.ndarray) -> np.ndarray:
        """int64, the tokens of each window."""
        return self.windows.total_lengths[chosen]

    def batch(self, epoch: int, chosen: np.ndarray) -> dict[str, torch.Tensor]:
        self.largest = max(self.largest, len(chosen))
        arrays = {**squad_utils.make_batch(self.windows, chosen), "targets": self.targets[chosen]}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


# ------------------------------------------------------------------------------------------------
# Timing


class TimingRun(Run):
    """A run that saves and prints nothing."""

    def say(self, text: str) -> None:
        pass


@contextlib.contextmanager
def timing_run(precision: str, no_cuda: bool, seed: int = 0) -> Iterator[TimingRun]:
    """A run in a temporary folder."""
    # Accelerators share their precision through class attributes, and the Trainer sets its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = make_accelerator(precision, no_cuda, seed)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with tempfile.TemporaryDirectory() as folder:
        flags = argparse.Namespace(
            output_dir=folder,
            save_minutes=1e9,
            log_steps=1,
            report_to="none",
            overwrite_output_dir=False,
        )
        run = TimingRun(accelerator, flags, {}, "new")
        run.states.save = lambda position: True
        for number, handler in handlers.items():  # a run asks its loop to stop: there is no need
            signal.signal(number, handler)
        yield run


class Clock:
    """The time from the beginning of one step to that of another, both synchronised.

    It stands where a stage has the schedule of its learning rate, which the loop calls at the
    beginning of every step. A profiler, if given, runs meanwhile.
    """

    def __init__(self, first: int, last: int, profiler: Any = None) -> None:
        self.first, self.last, self.profiler = first, last, profiler
        self.times: dict[int, float] = {}

    def __call__(self, step: int, total: int) -> float:
        if step in (self.first, self.last) and step not in self.times:
            synchronize()
            if self.profiler and step == self.first:
                self.profiler.start()
            self.times[step] = time.perf_counter()
            if self.profiler and step == self.last:
                self.profiler.stop()
        return 1.0

    @property
    def seconds(self) -> float:
        return self.times[self.last] - self.times[self.first]


def timed(
    bench: Bench,
    run: Run,
    model: nn.Module,
    batches: Any,
    loss: Any,
    size: int,
    passes_of: int,
    operations: float | None = None,
    profile: str | None = None,
) -> dict[str, Any]:
    """Train `model` for some steps in the scripts' own loop; figures of those after the warm-up.

    Args:
        batches: of an epoch of warm-up, timed steps and one more.
        size, passes_of: examples of a step, and of a pass as --per_gpu_train_batch_size has it.
        operations: of one example, forward and backward, for the share of the peak rate.
        profile: what to call a profile of further steps, if one is asked for.
    """
    sizes = bench.sizes

    def go(steps: int, profiler: Any = None) -> Clock:
        clock = Clock(sizes.warm_up, sizes.warm_up + steps, profiler)
        count = sizes.warm_up + steps + 1
        stage = Stage("timed", 1, 1e-5, size, passes_of, schedule=clock, max_steps=count)
        train(run, model, stage, batches, loss)
        return clock

    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = go(sizes.steps)
    rate = sizes.steps * size / clock.seconds
    figures = {"seconds_a_step": clock.seconds / sizes.steps, "samples_a_second": rate}
    if isinstance(batches, RandomBatches):
        figures["tokens_a_second"] = rate * sizes.length
        figures["windows_a_pass"] = batches.largest
    if operations:
        figures["teraflops"] = rate * operations / 1e12
        figures["mfu"] = figures["teraflops"] / bench.parts["peak"]["dense_teraflops"]
    if bench.device == "cuda":
        figures["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
    losses = [record["loss"] for record in read_log(run.output_dir) if "loss" in record]
    figures |= {"first_loss": losses[0], "last_loss": losses[-1]}
    if profile and bench.args.profile:
        try:
            figures["busy_share_of_gpu"] = profiled(bench, go, profile)
        except Exception as error:  # without it the figures above are as good
            figures["profile_failed"] = repr(error)
    return figures


def profiled(bench: Bench, go: Callable[[int, Any], Clock], name: str) -> float:
    """Write a table of the most expensive kernels of a few steps.

    Args:
        go: trains for so many steps with a profiler.

    Returns:
        the share of the time in which kernels ran.
    """
    activity = "CUDA" if bench.device == "cuda" else "CPU"
    profiler = torch.profiler.profile(
        activities=[getattr(torch.profiler.ProfilerActivity, activity)]
    )
    seconds = go(min(PROFILED_STEPS, bench.sizes.steps), profiler).seconds
    kernels: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.key_averages():
        kind = getattr(event, "device_type", None)
        if kind != getattr(torch.autograd.DeviceType, activity) or event.is_user_annotation:
            continue
        own = event.self_device_time_total if activity == "CUDA" else event.self_cpu_time_total
        kernels[event.key] += own / 1e6
        calls[event.key] += event.count
    busy = sum(kernels.values())
    lines = [
        f"{busy:.4f} s of kernels in {seconds:.4f} s",
        "",
        "    share        ms   calls  kernel",
    ]
    for kernel, own in kernels.most_common(KERNELS):
        share = own / max(busy, 1e-12)
        lines.append(f"{share:9.1%} {own * 1e3:9.2f} {calls[kernel]:7}  {kernel[:140]}")
    path = Path(bench.args.output_dir) / f"profile-{name}.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return busy / seconds


def work(sizes: Sizes, factor: int, weights: float, width: int = 0, layers: int = 0) -> float:
    """Operations of one window.

    Args:
        factor: 2 forward; 4 with the gradient of the inputs or of the weights; 6 with both.
        weights: of linear layers.
        width, layers: of attention, whose two products count as weights of 2 x length x width.
    """
    return factor * sizes.length * (weights + 2 * sizes.length * width * layers)


def work_of_bert(sizes: Sizes, factor: int) -> float:
    """Operations of one window in the encoder of the large model."""
    hidden, layers = sizes.bert["hidden_size"], sizes.bert["num_hidden_layers"]
    weights = layers * (4 * hidden**2 + 2 * hidden * sizes.bert["intermediate_size"])
    return work(sizes, factor, weights, hidden, layers)


def work_of_packed(sizes: Sizes, weights: int) -> float:
    """Operations of one window, forward and backward, in packed layers of so many weights."""
    pack = sizes.pack
    head_size = sizes.bert["hidden_size"] // sizes.bert["num_attention_heads"]
    return work(sizes, 6, weights, pack.num_attention_heads * head_size, pack.num_hidden_layers)
