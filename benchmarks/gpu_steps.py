"""The parts of benchmarks/gpu.py that train for some steps in this process."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch import nn
from transformers import BertForQuestionAnswering

from benchmarks.gpu_timing import (
    ROOT,
    SPECIAL,
    Bench,
    Clock,
    RandomBatches,
    random_tokens,
    synchronize,
    timed,
    timing_run,
    work,
    work_of_bert,
    work_of_packed,
)
from bert import attention
from bert.attention import fuse_attention
from bert.embedding import BertForEmbedding
from cli import memory_is_full
from int8 import calibration, settings
from tasks.embedding_loss import EmbeddingLoss, HardNegatives, Mining, PairBatches, parse_loss_cfg
from tasks.hidden_states import StateLoss
from tasks.qa import QaLoss
from tasks.texts import Pairs, Texts
from training import passes
from training.fine_tuning import freeze, set_dropout
from training.machine import linear_weights

# Of a card's data sheet, in bf16, or fp16 (T4, V100); the first whose name is in the card's.
DENSE_TERAFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362,
    "L4": 121, "T4": 65, "V100": 125,
}  # fmt: skip


def measure_peak(bench: Bench) -> dict[str, Any]:
    """The rate of a large matrix product, the best of five, and the data sheet's rate."""
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


def measure_fine_tuning(bench: Bench, profile: str | None = "fine_tuning") -> dict[str, Any]:
    """QA 1: windows of 384 tokens, embeddings frozen, 48 windows per step."""
    sizes = bench.sizes
    batches = RandomBatches(sizes, sizes.warm_up + sizes.steps + 1, 48)
    with timing_run(bench.precision, bench.device == "cpu") as run:
        loss = QaLoss(run, None, 0.0, 0.0)
        operations = work_of_bert(sizes, 6)
        return timed(bench, run, bench.student(), batches, loss, 48, 2, operations, profile)


def measure_plain_passes(bench: Bench) -> dict[str, Any]:
    """The same with passes of two windows, masks and no compiler."""

    def passes_of_two(gradient: passes.StepGradient, epoch: int, chosen: np.ndarray) -> int:
        return 2 * bench.sizes.length

    with (
        mock.patch.object(passes.StepGradient, "_measure", passes_of_two),
        mock.patch.object(passes, "COMPILE_OPERATIONS", float("inf")),
        mock.patch.object(passes, "MAX_GRAPHS", 0),
        mock.patch.object(attention, "has_flash", lambda: False),
    ):
        few = replace(bench, sizes=replace(bench.sizes, warm_up=1, steps=2))
        return measure_fine_tuning(few, profile=None)


class StepTimes(transformers.TrainerCallback):
    """A callback that reads a `Clock` when a step of the Trainer begins."""

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
    backend = "aot_eager" if bench.args.dry_run else "inductor"
    # It sets variables for accelerate, which our own loop and commands must not see.
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
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
                # A compiler of C++ takes a minute, and shows nothing in a dry run.
                torch_compile_backend=backend if compiled else None,
                dataloader_num_workers=0 if bench.args.dry_run else 4,
                use_cpu=bench.device == "cpu",
                logging_strategy="no",
                logging_nan_inf_filter=False,  # it would wait for the GPU after every step
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
        with timing_run(bench.precision, bench.device == "cpu") as run:
            loss = QaLoss(run, None, 0.0, 0.0)
            figures = timed(bench, run, ours, batches, loss, 48, 2)
            our_seconds += figures["seconds_a_step"] * sizes.steps
        while True:
            try:
                their_seconds += trainer_seconds(bench, theirs, features, size, compiled)
                break
            except RuntimeError as error:
                if size == 1 or not memory_is_full(error):
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
    """QA 2's final stage, 64 windows per step."""
    sizes = bench.sizes
    teacher, student = bench.teacher(), bench.packed(merged=False)
    for name, parameter in student.named_parameters():
        parts = ("_map.", "embeddings.LayerNorm.", "state_maps.", "layers.")
        parameter.requires_grad_(any(part in name for part in parts))
    layers = sizes.pack.num_hidden_layers
    weights = tuple(1.5**i / sum(1.5**j for j in range(layers + 1)) for i in range(layers + 1))
    embedding_maps = linear_weights(student.bert.embeddings)  # their inputs need no gradient
    operations = (
        work_of_bert(sizes, 2)
        + work_of_packed(sizes, linear_weights(student.bert) - embedding_maps)
        + work(sizes, 4, embedding_maps)
    )
    batches = RandomBatches(sizes, sizes.warm_up + sizes.steps + 1, 64)
    with timing_run(bench.precision, bench.device == "cpu") as run:
        loss = StateLoss(run, teacher, layers, weights)
        return timed(bench, run, student, batches, loss, 64, 4, operations, profile="distillation")


def measure_int8(bench: Bench) -> dict[str, Any]:
    """QA 3 with its teacher and without, and the packed model without quantizers; 32 per step."""
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
    config = settings.read_nncf_config(str(ROOT / "nncf_config.json"))
    original = fuse_attention(bench.packed(merged=True), separate_products=True).eval()
    calibration.check_scope(config, original)
    quantized = calibration.calibrate(original, config, samples).to(bench.device)
    for model in (plain, quantized):
        freeze(model, "none")
        set_dropout(fuse_attention(model), 0.0)
    figures = {}
    with timing_run(bench.precision, bench.device == "cpu") as run:
        loss = QaLoss(run, teacher, 1.0, 0.02, maps)
        taught_figures = timed(bench, run, quantized, batches, loss, 32, 8, taught, profile="int8")
        figures |= {f"with_teacher_{name}": each for name, each in taught_figures.items()}
    for name, model in (("alone", quantized), ("without_quantizers", plain)):
        with timing_run(bench.precision, bench.device == "cpu") as run:
            loss = QaLoss(run, None, 0.0, 0.0)
            alone = timed(bench, run, model, batches, loss, 32, 8, own)
        figures |= {f"{name}_{key}": each for key, each in alone.items()}
    seconds = [figures[f"{name}_seconds_a_step"] for name in ("alone", "without_quantizers")]
    return {**figures, "step_by_step_without_quantizers": seconds[0] / seconds[1]}


def measure_embeddings(bench: Bench) -> dict[str, Any]:
    """Embedding 1: triplets of 32 pairs per step, mined from 256 contexts; and with a teacher."""
    sizes, rng, count = bench.sizes, np.random.default_rng(0), 32
    pairs_of = count * (sizes.warm_up + sizes.steps + 1)
    vocabulary = sizes.bert["vocab_size"]
    every = np.arange(pairs_of)

    def texts(length: int) -> Texts:
        strings = [f"text {i} of {length}" for i in every]
        return Texts(strings, random_tokens(rng, pairs_of, length - 2, vocabulary), SPECIAL)

    question = min(32, sizes.length // 2)
    # Each context is an article of its own, so no context answers another's question.
    pairs = Pairs(texts(question), texts(sizes.length), every, every, every, [("?",)] * pairs_of)
    tokens = count * (question + 2 * sizes.length) + count * question + sizes.mined * sizes.length
    cfg = parse_loss_cfg("triplet_num:1,emb_loss:none")
    figures = {}
    for name, teacher in (("", None), ("with_teacher_", bench.teacher(BertForEmbedding))):
        model = fuse_attention(bench.make(BertForEmbedding, bench.config()))
        freeze(model, "embeddings")
        with timing_run(bench.precision, bench.device == "cpu") as run:
            mining = HardNegatives(run, pairs, Mining(sizes.mined, 8, 32, 1.0), 0, cfg)
            batches = PairBatches(pairs, mining, count, 0)
            loss = EmbeddingLoss(run, teacher, cfg, 0.02)
            found = timed(bench, run, model, batches, loss, count, 2)
        found["tokens_a_second_mined_too"] = tokens / found["seconds_a_step"]
        figures |= {f"{name}{key}": each for key, each in found.items()}
    return figures
