"""Measure training on one GPU: share of its peak rate, against the Trainer, whole commands.

    python -m benchmarks.gpu --minutes=9 --output_dir=models/gpu-figures

Run it from the repository's root. It needs no network: the models have BERT-large's shape and
random weights, and the data is generated. `gpu.json` and `gpu.md` in the output folder are written
after each part. The same command again measures what is missing there or has failed, so it may be
run in pieces. `--dry-run` goes through all parts with tiny models on a CPU.

MFU is the share of the card's dense peak rate that the model's own operations take: the products
of linear layers and of attention, forward and backward, on tokens without padding. Work that is
done twice, such as recomputed activations, does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

STARTED = time.monotonic()  # imports count against --minutes
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # before torch looks: one GPU for all parts
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, BertModel, BertTokenizerFast

import nncf_utils
import squad_utils
from bert_pack import PackCfg, PackedBertForQuestionAnswering, packed_config
from cli_utils import ArgumentParser, UserError, number, run_main, warn
from emb_loss import EmbLoss, HardNegatives, PairBatches, parse_loss_cfg
from emb_task import Pairs, Texts
from embedding_model import BertForEmbedding
from examples import make_sample
from fast_attention import fuse_attention
from model_utils import freeze, set_dropout
from pack_and_distill import StateLoss
from qa_task import QaLoss
from run_utils import Run, read_log, write_json
from squad_utils import SpecialIds, Tokens, Windows
from train_utils import Stage, make_accelerator, train

ROOT = Path(__file__).resolve().parent.parent
SPECIAL = SpecialIds(cls=1, sep=2, pad=0)
QUESTION = 16  # tokens of a generated question
KERNELS = 25  # rows of a profile
PROFILED_STEPS = 3
POLL_SECONDS = 0.2  # between looks at the GPU's memory
PATIENCE = 4  # times a part's estimate, after which it is given up
DENSE_TERAFLOPS = {  # of a card's data sheet, bf16 or (T4, V100) fp16; the first that is in its name
    "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362,
    "L4": 121, "T4": 65, "V100": 125,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured: the real ones, or those of a dry run.

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
    """What all parts share.

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
    """Wait for what a GPU has been given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------
# Data


def random_tokens(rng: np.random.Generator, texts: int, length: int, vocabulary: int) -> Tokens:
    """Texts of `length` random tokens each."""
    ids = rng.integers(5, vocabulary, texts * length).astype(np.int32)
    return Tokens(ids, np.arange(texts + 1, dtype=np.int64) * length, None)


class RandomBatches:
    """Batches of random windows, all of the same length, for `train_utils.train`.

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
    """A run that keeps no states and says nothing."""

    def save(self, position: dict[str, Any]) -> bool:
        return True

    def say(self, text: str) -> None:
        pass


@contextlib.contextmanager
def timing_run(bench: Bench) -> Iterator[TimingRun]:
    """A run in a folder that does not stay."""
    # Accelerators share their precision through class attributes, and the Trainer sets its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = make_accelerator(bench.precision, bench.device == "cpu", seed=0)
    with tempfile.TemporaryDirectory() as folder:
        yield TimingRun(accelerator, folder, {}, "new", 1e9, 1, "none")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the run had taken
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
    before_step: Any = None,
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
        train(run, model, stage, batches, loss, before_step=before_step)
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
        activity = "CUDA" if bench.device == "cuda" else "CPU"
        activities = [getattr(torch.profiler.ProfilerActivity, activity)]
        profiler = torch.profiler.profile(activities=activities)
        steps = min(PROFILED_STEPS, sizes.steps)
        clock = go(steps, profiler)
        path = Path(bench.args.output_dir) / f"profile-{profile}.txt"
        busy = write_profile(path, profiler, clock.seconds, activity)
        figures["busy_share_of_gpu"] = busy / clock.seconds
    return figures


def write_profile(path: Path, profiler: Any, seconds: float, activity: str) -> float:
    """Write a table of the most expensive kernels; returns the seconds of all of them."""
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
    for name, own in kernels.most_common(KERNELS):
        share = own / max(busy, 1e-12)
        lines.append(f"{share:9.1%} {own * 1e3:9.2f} {calls[name]:7}  {name[:140]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return busy


def linear_weights(model: nn.Module, part: str = "") -> int:
    """Weights of the linear layers whose names have `part` in them."""
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and part in name
    )


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


# ------------------------------------------------------------------------------------------------
# The parts


def measure_peak(bench: Bench) -> dict[str, Any]:
    """The rate of a large matrix product, best of five goes, and the rate of the data sheet."""
    size, dtype = bench.sizes.product, {"fp16": torch.float16}.get(bench.precision, torch.bfloat16)
    left, right, result = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(3))
    best, products = 0.0, 20
    for _ in range(5):
        synchronize()
        began = time.perf_counter()
        for _ in range(products):
            torch.matmul(left, right, out=result)
        synchronize()
        best = max(best, products * 2 * size**3 / (time.perf_counter() - began) / 1e12)
    name = torch.cuda.get_device_name() if bench.device == "cuda" else "a CPU"
    known = next((rate for card, rate in DENSE_TERAFLOPS.items() if card in name), None)
    return {
        "measured_teraflops": best,
        "dense_teraflops": known or best,
        "dense_peak_is": "the data sheet's" if known else f"measured: {name} is not in the table",
    }


def measure_fine_tuning(bench: Bench) -> dict[str, Any]:
    """QA 1: windows of 384 tokens, embeddings frozen, 48 a step."""
    sizes = bench.sizes
    batches = RandomBatches(sizes, sizes.warm_up + sizes.steps + 1, 48)
    with timing_run(bench) as run:
        loss = QaLoss(run, None, 0.0, 0.0)
        operations = work_of_bert(sizes, 6)
        return timed(
            bench, run, bench.student(), batches, loss, 48, 2, operations, profile="fine_tuning"
        )


class StepTimes(transformers.TrainerCallback):
    """The Trainer's clock: a `Clock` that is asked when a step begins."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock(state.global_step, 0)


def trainer_seconds(
    bench: Bench, model: nn.Module, features: list[dict[str, Any]], size: int, compiled: bool
) -> float:
    """Seconds of the timed steps of 48 windows by the Trainer, in passes of `size`."""
    sizes = bench.sizes
    clock = Clock(sizes.warm_up, sizes.warm_up + sizes.steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=folder,
                max_steps=sizes.warm_up + sizes.steps + 1,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=48 // size,
                learning_rate=1e-5,
                bf16=bench.precision == "bf16",
                fp16=bench.precision == "fp16",
                optim="adamw_torch_fused",
                torch_compile=compiled,
                dataloader_num_workers=0 if bench.args.dry_run else 4,
                use_cpu=bench.device == "cpu",
                logging_strategy="no",
                logging_nan_inf_filter=False,  # which waits for the GPU after every step
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=features,
            callbacks=[StepTimes(clock)],
        )
        trainer.train()
    return clock.seconds


def measure_trainer(bench: Bench, compiled: bool = False) -> dict[str, Any]:
    """Ours and transformers.Trainer in turn, on the same windows, with the Trainer's best flags."""
    sizes = bench.sizes
    batches = RandomBatches(sizes, sizes.warm_up + sizes.steps + 1, 48)
    features = []
    for i in range(len(batches.windows)):
        row = {name: tensor[0] for name, tensor in batches.batch(0, np.array([i])).items()}
        start, end = row.pop("targets")
        features.append({**row, "start_positions": start, "end_positions": end})
    ours = bench.student()
    config = bench.config()
    config._attn_implementation = "sdpa"
    theirs = bench.make(BertForQuestionAnswering, config)
    freeze(theirs, "embedding")
    our_seconds = their_seconds = 0.0
    size, rounds = 48, 1 if compiled or bench.args.dry_run else 2
    for _ in range(rounds):
        with timing_run(bench) as run:
            loss = QaLoss(run, None, 0.0, 0.0)
            figures = timed(bench, run, ours, batches, loss, 48, 2)
            our_seconds += figures["seconds_a_step"] * sizes.steps
        while True:
            try:
                their_seconds += trainer_seconds(bench, theirs, features, size, compiled)
                break
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
            size //= 2 if size % 2 == 0 else size  # 48, 24, 12, 6, 3, 1
            gc.collect()
            torch.cuda.empty_cache()
    samples = rounds * sizes.steps * 48
    return {
        "our_samples_a_second": samples / our_seconds,
        "trainer_samples_a_second": samples / their_seconds,
        "ours_by_trainer": their_seconds / our_seconds,
        "trainer_windows_a_pass": size,
        "rounds": rounds,
    }


def measure_trainer_compiled(bench: Bench) -> dict[str, Any]:
    """The same with torch_compile."""
    return measure_trainer(bench, compiled=True)


def measure_distillation(bench: Bench) -> dict[str, Any]:
    """QA 2's final stage, 64 windows a step."""
    sizes = bench.sizes
    teacher, student = bench.teacher(), bench.packed(merged=False)
    for name, parameter in student.named_parameters():
        parts = ("_map.", "embeddings.LayerNorm.", "state_maps.", "layers.")
        parameter.requires_grad_(any(part in name for part in parts))
    layers = sizes.pack.num_hidden_layers
    weights = tuple(1.5**i / sum(1.5**j for j in range(layers + 1)) for i in range(layers + 1))
    embedding_maps = linear_weights(student, "embeddings.")  # their inputs need no gradient
    operations = (
        work_of_bert(sizes, 2)
        + work_of_packed(sizes, linear_weights(student.bert) - embedding_maps)
        + work(sizes, 4, embedding_maps)
    )
    batches = RandomBatches(sizes, sizes.warm_up + sizes.steps + 1, 64)
    with timing_run(bench) as run:
        loss = StateLoss(run, teacher, layers, weights)
        return timed(bench, run, student, batches, loss, 64, 4, operations, profile="distillation")


def measure_int8(bench: Bench) -> dict[str, Any]:
    """QA 3, with its teacher and without, and the packed model without quantizers; 32 a step."""
    sizes = bench.sizes
    batches = RandomBatches(sizes, sizes.warm_up + sizes.steps + 1, 32)
    teacher, plain = bench.teacher(), bench.packed(merged=True)
    own = work_of_packed(sizes, linear_weights(plain.bert))
    states = sizes.pack.num_hidden_layers + 1
    with torch.device(bench.device):
        maps = nn.ModuleList(
            nn.Linear(sizes.pack.hidden_size, sizes.bert["hidden_size"]) for _ in range(states)
        ).requires_grad_(False)
    taught = own + work_of_bert(sizes, 2) + work(sizes, 4, linear_weights(maps))
    samples = [batches.batch(0, np.array([i])) for i in range(4)]
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    samples = [{name: each[name].to(bench.device) for name in names} for each in samples]
    config = nncf_utils.read_nncf_config(str(ROOT / "nncf_config.json"))
    original = fuse_attention(bench.packed(merged=True), plain=True).eval()
    nncf_utils.check_scope(config, original)
    quantized = nncf_utils.calibrate(original, config, samples).to(bench.device)
    for model in (plain, quantized):
        freeze(model, "none")
        set_dropout(fuse_attention(model), 0.0)
    figures = {}
    with timing_run(bench) as run:
        loss = QaLoss(run, teacher, 1.0, 0.02, maps)
        taught_figures = timed(bench, run, quantized, batches, loss, 32, 8, taught, profile="int8")
        figures |= {f"with_teacher_{name}": each for name, each in taught_figures.items()}
    for name, model in (("alone", quantized), ("without_quantizers", plain)):
        with timing_run(bench) as run:
            loss = QaLoss(run, None, 0.0, 0.0)
            alone = timed(bench, run, model, batches, loss, 32, 8, own)
        figures |= {f"{name}_{key}": each for key, each in alone.items()}
    seconds = [figures[f"{name}_seconds_a_step"] for name in ("alone", "without_quantizers")]
    return {**figures, "step_by_step_without_quantizers": seconds[0] / seconds[1]}


def measure_embeddings(bench: Bench) -> dict[str, Any]:
    """Embedding 1: triplets of 32 pairs a step, mined from 256 contexts; with its teacher too."""
    sizes, rng, count = bench.sizes, np.random.default_rng(0), 32
    pairs_of = count * (sizes.warm_up + sizes.steps + 1)
    vocabulary = sizes.bert["vocab_size"]
    every = np.arange(pairs_of)

    def texts(length: int) -> Texts:
        strings = [f"text {i} of {length}" for i in every]
        return Texts(strings, random_tokens(rng, pairs_of, length - 2, vocabulary), SPECIAL)

    question = min(32, sizes.length // 2)
    # Each context is an article of its own: no question is answered by another's.
    pairs = Pairs(texts(question), texts(sizes.length), every, every, every, [("?",)] * pairs_of)
    tokens = count * (question + 2 * sizes.length) + count * question + sizes.mined * sizes.length
    cfg = parse_loss_cfg("triplet_num:1,emb_loss:none")
    figures = {}
    for name, teacher in (("", None), ("with_teacher_", bench.teacher(BertForEmbedding))):
        model = fuse_attention(bench.make(BertForEmbedding, bench.config()))
        freeze(model, "embeddings")
        with timing_run(bench) as run:
            mining = HardNegatives(run, pairs, sizes.mined, 8, 32, 1.0, 0, cfg)
            batches = PairBatches(pairs, mining, count, 0)
            loss = EmbLoss(run, teacher, cfg, 0.02)
            found = timed(bench, run, model, batches, loss, count, 2, before_step=mining)
        found["tokens_a_second_mined_too"] = tokens / found["seconds_a_step"]
        figures |= {f"{name}{key}": each for key, each in found.items()}
    return figures


# ------------------------------------------------------------------------------------------------
# Whole commands

LENGTHS = "--max_seq_length_q={} --max_seq_length_c=384 --per_gpu_eval_batch_size={}"
PACK_CFG = "--pack_cfg=num_hidden_layers:{},ff_iter_num:4,num_attention_heads:{},hidden_size:{}," \
           "pack_emb:1,hidden_act:orig"  # fmt: skip
SIX_PACK = PACK_CFG.format(12, 8, 512) + " --loss_weight_alpha=1.5"
TAUGHT = "--freeze_list=none --supervision_weight=0.02 --nncf_config=nncf_config.json"
MINING = "--hnm_batch_size=8 --hnm_hist_num=32 --hnm_num=256"
# The README's six commands with little data and few steps, and a small model on all of SQuAD.
# {name}: the folder of another command's results; {base}: BERT-large's shape; {model}: --model.
COMMANDS = {
    "qa1": "train_qa.py --model_student={base} --freeze_list=embedding --supervision_weight=0"
    " --learning_rate=3e-5 --per_gpu_train_batch_size=2 --total_train_batch_size=48 "
    + LENGTHS.format(64, 16),
    "qa2": "pack_and_distill.py --model_student={qa1} --model_teacher={qa1} --learning_rate=5e-4"
    " --learning_rate_for_tune=10e-4 --per_gpu_train_batch_size=4 --total_train_batch_size=32"
    f" --total_train_batch_size_for_tune=64 {SIX_PACK} " + LENGTHS.format(64, 32),
    "qa3": "train_qa.py --model_student={qa2} --model_teacher={qa1} --kd_weight=1"
    f" --learning_rate=1e-4 --per_gpu_train_batch_size=8 --total_train_batch_size=32 {TAUGHT} "
    + LENGTHS.format(64, 16),
    "emb1": "train_qcemb.py --model_student={base} --model_teacher={base} --freeze_list=embedding"
    " --supervision_weight=0.02 --loss_cfg=triplet_num:1,emb_loss:none --learning_rate=3e-5"
    f" --per_gpu_train_batch_size=2 --total_train_batch_size=32 {MINING} " + LENGTHS.format(32, 16),
    "emb2": "pack_and_distill.py --model_student={emb1} --model_teacher={emb1}"
    " --learning_rate=3e-4 --learning_rate_for_tune=3e-4 --per_gpu_train_batch_size=4"
    f" --total_train_batch_size=32 --total_train_batch_size_for_tune=32 {SIX_PACK} "
    + LENGTHS.format(32, 32),
    "emb3": "train_qcemb.py --model_student={emb2} --model_teacher={emb1}"
    " --loss_cfg=triplet_num:1,emb_loss:L2 --learning_rate=3e-5 --per_gpu_train_batch_size=8"
    f" --total_train_batch_size=32 {TAUGHT} {MINING} " + LENGTHS.format(32, 16),
    "squad_qa": "train_qa.py --model_student={model} --freeze_list=embedding --learning_rate=2e-4"
    " --num_train_epochs=2 --per_gpu_train_batch_size=32 " + LENGTHS.format(64, 64),
    "squad_packed": "pack_and_distill.py --model_student={squad_qa} --model_teacher={squad_qa}"
    " --stages=heads,final --num_train_epochs=2 --warm_up_steps=40 --learning_rate_for_tune=5e-4"
    " --per_gpu_train_batch_size=32 --total_train_batch_size_for_tune=32 " + LENGTHS.format(64, 64),
    "squad_int8": "train_qa.py --model_student={squad_packed} --model_teacher={squad_qa}"
    " --quantizer_epochs=0 --num_train_epochs=0.4 --learning_rate=2e-4"
    f" --per_gpu_train_batch_size=32 {TAUGHT} " + LENGTHS.format(64, 64),
}
SCORES = ("f1", "exact_match", "mrr", "train_seconds", "parameters", "onnx_bytes")


def make_base(bench: Bench, folder: Path, data: Path) -> None:
    """A model of the large shape with random weights, and a vocabulary of the data's words."""
    words: Counter[str] = Counter()
    for article in json.loads((data / "train-v1.1.json").read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            words.update(paragraph["context"].lower().split())
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    vocabulary += [f"##{letter}" for letter in letters]
    vocabulary += [word for word, _ in words.most_common(1000) if word.isalpha() and len(word) > 1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{each}\n" for each in vocabulary), encoding="utf-8")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    bench.make(BertModel, bench.config()).save_pretrained(folder)


def run_command(bench: Bench, name: str) -> dict[str, Any]:
    """Run one of COMMANDS as a process, after those whose results it reads and are not there."""
    args, sizes = bench.args, bench.sizes
    work_dir = Path(args.work_dir).resolve() / ("dry" if args.dry_run else "real")
    data, base = work_dir / "data", work_dir / "base"
    if not (data / "dev-v1.1.json").exists():
        counts = [f"--num_train={sizes.questions}", f"--num_dev={max(8, sizes.questions // 4)}"]
        make_sample.main([*counts, f"--output_dir={data}"])
    if not (base / "model.safetensors").exists():
        make_base(bench, base, data)
    folders = {each: str(work_dir / each) for each in COMMANDS}
    of_squad = name.startswith("squad")
    for needed in re.findall(r"\{(\w+)\}", COMMANDS[name]):
        if needed in folders and not os.path.exists(Path(folders[needed]) / "metrics.json"):
            run_command(bench, needed)
    train_data, dev_data = data / "train-v1.1.json", data / "dev-v1.1.json"
    if of_squad and args.model:
        train_data, dev_data = map(os.path.abspath, (args.squad_train_data, args.squad_dev_data))
    command = (
        COMMANDS[name]
        .format(base=base, model=os.path.abspath(args.model or base), **folders)
        .split()
    )
    command += [f"--output_dir={folders[name]}", "--overwrite_output_dir"]
    command += [f"--squad_train_data={train_data}", f"--squad_dev_data={dev_data}"]
    packs = command[0] == "pack_and_distill.py"
    if not of_squad:
        command += ["--num_train_epochs=1"] + ["--max_steps_per_stage=2"] * packs
    if packs and (of_squad or args.dry_run):
        config = json.loads((Path(args.model or base) / "config.json").read_text())
        keys = ("num_hidden_layers", "num_attention_heads", "hidden_size")
        layers, heads, hidden = (config[key] for key in keys)
        command.append(PACK_CFG.format(layers, heads // 2, hidden // 2))
    if args.dry_run:
        command += ["--max_seq_length_q=24", "--max_seq_length_c=96", "--doc_stride=48"]
        command += ["--num_train_epochs=0.5", "--no_cuda", "--precision=fp32"]
        command += ["--stages=final"] * packs + ["--quantizer_epochs=0"] * (name[-1] in "38")
    gc.collect()
    before = 0
    if bench.device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info()[0]
    log_path = Path(args.output_dir) / f"{name}.log"
    began, least = time.monotonic(), before
    with open(log_path, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                if bench.device == "cuda":
                    least = min(least, torch.cuda.mem_get_info()[0])
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # those that it has left, if any
            process.wait()
    seconds = time.monotonic() - began
    if process.returncode:
        tail = log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise RuntimeError(f"exit code {process.returncode}\n" + "\n".join(tail))
    metrics = json.loads((Path(folders[name]) / "metrics.json").read_text(encoding="utf-8"))
    figures = {"exit_code": 0, "seconds": seconds, "minutes": seconds / 60}
    figures["export_passed"] = metrics["onnx_check"]["passed"]
    figures["export_difference"] = metrics["onnx_check"]["difference"]
    figures |= {key: metrics[key] for key in SCORES if key in metrics}
    if bench.device == "cuda":
        figures["peak_gigabytes"] = (before - least) / 1e9
    return figures


# ------------------------------------------------------------------------------------------------
# All parts, one after another


@dataclass(frozen=True)
class Part:
    """A part: what measures it, and about how many seconds that takes on an H100."""

    measure: Callable[[Bench], dict[str, Any]]
    seconds: float


PARTS = {
    "peak": Part(measure_peak, 10),
    "fine_tuning": Part(measure_fine_tuning, 60),
    "trainer": Part(measure_trainer, 80),
    "distillation": Part(measure_distillation, 60),
    "int8": Part(measure_int8, 120),
    "embeddings": Part(measure_embeddings, 100),
    "trainer_compiled": Part(measure_trainer_compiled, 120),
}
COMMAND_SECONDS = {"qa1": 90, "qa2": 120, "qa3": 100, "emb1": 90, "emb2": 120, "emb3": 100,
                   "squad_qa": 150, "squad_packed": 300, "squad_int8": 180}  # fmt: skip
PARTS |= {
    name: Part(lambda bench, name=name: run_command(bench, name), seconds)
    for name, seconds in COMMAND_SECONDS.items()
}
GROUPS = {
    "commands": [name for name in COMMANDS if not name.startswith("squad")],
    "squad": [name for name in COMMANDS if name.startswith("squad")],
}


class PartTimeout(Exception):
    """A part takes much longer than it should."""


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output_dir", required=True, help="folder for gpu.json, gpu.md, logs and profiles")
    add("--minutes", type=number(float, 0, low_open=True), default=60.0, help="for this call")
    add("--only", help=f"comma-separated parts: {', '.join([*PARTS, *GROUPS])}; all if left out")
    add("--work_dir", default="models/gpu", help="folder for models that commands make")
    add("--model", help="small pretrained BERT for the squad parts; without it they are left out")
    add("--squad_train_data", help="SQuAD JSON for the squad parts")
    add("--squad_dev_data", help="SQuAD JSON for the squad parts")
    add("--profile", action="store_true", help="the most expensive kernels of three parts too")
    add("--dry-run", action="store_true", help="tiny models on the CPU; the figures mean nothing")
    return parser.parse_args()


def chosen_parts(args: argparse.Namespace) -> list[str]:
    """The parts to measure, in the order of PARTS; `peak`, which others need, is among them.

    Raises:
        UserError: --only names none of them; the squad parts lack what they are made from.
    """
    given = bool(args.model and args.squad_train_data and args.squad_dev_data)
    names = [name for name in PARTS if given or args.dry_run or name not in GROUPS["squad"]]
    if not args.only:
        return names
    asked = {"peak"}
    for name in args.only.split(","):
        if name not in PARTS and name not in GROUPS:
            raise UserError(f"--only: {name!r} is not one of {', '.join([*PARTS, *GROUPS])}")
        asked.update(GROUPS.get(name, [name]))
    if asked - set(names):
        raise UserError("--only: squad needs --model, --squad_train_data and --squad_dev_data")
    return [name for name in names if name in asked]


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """Card, its memory, versions; what figures of one file have to share."""
    machine: dict[str, Any] = {"card": "none: a dry run on a CPU", "torch": torch.__version__}
    machine |= {"python": sys.version.split()[0], "transformers": transformers.__version__}
    if not args.dry_run:
        properties = torch.cuda.get_device_properties(0)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        machine |= {"card": properties.name, "memory_gigabytes": properties.total_memory / 1e9}
        machine |= {"cuda": torch.version.cuda, "precision": "bf16" if native else "fp16"}
    return machine


def measure(bench: Bench, name: str) -> dict[str, Any]:
    """The figures of a part, or what it failed with."""

    def give_up(*_: Any) -> None:
        raise PartTimeout(f"given up after {PATIENCE} times its estimate")

    part, began = PARTS[name], time.monotonic()
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(int(PATIENCE * part.seconds))
    try:
        figures = part.measure(bench)
    except Exception:
        figures = {"error": "\n".join(traceback.format_exc().strip().splitlines()[-20:])}
    finally:
        signal.alarm(0)
    return {**figures, "seconds_of_part": time.monotonic() - began}


def table(machine: dict[str, Any], parts: dict[str, dict[str, Any]]) -> str:
    """All figures as Markdown."""
    lines = [", ".join(f"{key} {shown(value)}" for key, value in machine.items()), ""]
    lines += ["| part | figure | value |", "|---|---|---|"]
    for name, figures in parts.items():
        for key, value in figures.items():
            text = shown(value) if key != "error" else f"`{value.splitlines()[-1][:200]}`"
            lines.append(f"| {name} | {key.replace('_', ' ')} | {text} |")
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A value for people."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def main() -> None:
    args = parse_arguments()
    names = chosen_parts(args)
    if not args.dry_run and not torch.cuda.is_available():
        raise UserError("no CUDA GPU here; --dry-run goes through all parts on the CPU")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    machine, parts, path = describe_machine(args), {}, folder / "gpu.json"
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["machine"] != machine:
            raise UserError(
                f"--output_dir: {path} has figures of another machine ({earlier['machine']['card']},"
                f" torch {earlier['machine']['torch']}); choose another folder"
            )
        parts = earlier["parts"]
    bench = Bench(
        args=args,
        sizes=TINY if args.dry_run else REAL,
        device="cpu" if args.dry_run else "cuda",
        precision=machine.get("precision", "fp32"),
        parts=parts,
    )
    for name in names:
        if "error" not in parts.get(name, {"error": ""}):
            continue
        left = 60 * args.minutes - (time.monotonic() - STARTED)
        if left < PARTS[name].seconds and not args.dry_run:
            warn(f"{name} takes about {PARTS[name].seconds:.0f} s and {left:.0f} s are left: it and"
                 " what follows are for another call")  # fmt: skip
            break
        print(f"-- {name}", flush=True)
        parts[name] = measure(bench, name)
        parts = bench.parts = {each: parts[each] for each in PARTS if each in parts}
        write_json(str(path), {"machine": machine, "parts": parts})
        (folder / "gpu.md").write_text(table(machine, parts), encoding="utf-8")
        for key, value in parts[name].items():
            print(f"{key}: {shown(value)}", flush=True)
        gc.collect()
        if bench.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run_main(main)
