"""Fine-tuning of any task: flags, checks, stages with or without quantizers, what is left."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedModel

from bert.attention import fuse_attention
from bert.model_folder import (
    UNMERGED,
    check_model,
    check_teacher,
    load_model,
    load_state_maps,
    load_teacher,
    load_tokenizer,
    unmerged_folder,
)
from bert.packed import merge
from cli import ArgumentParser, UserError, is_main_process, number, warn
from int8 import quantizers
from int8.calibration import calibrate, check_scope
from int8.quantizers import hold_weight_range, is_quantized, save_quantized
from int8.settings import NncfConfig, read_nncf_config
from squad_utils import INPUTS
from training import flags, results
from training.flags import check_arguments, claim_output_dir, not_negative, open_run, rate
from training.loop import Stage, constant_rate, train
from training.machine import in_half, make_accelerator, use_all_gpus
from training.passes import Batches, LossFunction, to_device
from training.run import CHECKPOINTS, Run

QUANTIZER_RATE = 0.01  # learning rate of the quantizers' ranges while nothing else trains


def add_fine_tuning_arguments(parser: ArgumentParser, teacher: str) -> None:
    """The models (`teacher`: what that must be), learning rate and epochs, quantization."""
    add = parser.group(flags.MODELS).add_argument
    add("--model_student", required=True, metavar="MODEL",
        help="BERT to train, packed or not: a folder or a hub name")  # fmt: skip
    add("--model_teacher", default="bert-large-uncased-whole-word-masking", metavar="MODEL",
        help=f"{teacher} to learn from, of the student's hidden size and vocabulary: a folder or a"
        " hub name; loaded only if --supervision_weight is over 0")  # fmt: skip
    add = parser.group(flags.TRAINING).add_argument
    add("--num_train_epochs", type=not_negative, default=2.0, metavar="EPOCHS",
        help="passes over the training data, may be a fraction; 0 only evaluates and"
        " exports")  # fmt: skip
    add("--learning_rate", type=rate, default=3e-5, metavar="RATE",
        help="learning rate of the first step; it falls linearly to 0")  # fmt: skip
    add("--freeze_list", default="none", metavar="NAME,...",
        help="parameters with one of these in their names are not trained")  # fmt: skip
    add("--supervision_weight", type=not_negative, default=0.0, metavar="WEIGHT",
        help="weight of the squared error between the student's and the teacher's hidden"
        " states")  # fmt: skip
    add("--dropout", type=number(float, 0, 0.9), default=0.0, metavar="PROBABILITY",
        help="probability of dropout while training; on a CPU it takes longer than the rest of a"
        " step")  # fmt: skip
    add = parser.group(flags.INT8).add_argument
    add("--nncf_config", metavar="FILE",
        help="quantize to INT8 with the settings of this JSON file; docs/int8.md explains its keys"
        " (default: none, train in floating point)")  # fmt: skip
    add("--quantizer_epochs", type=not_negative, default=1.0, metavar="EPOCHS",
        help="epochs after calibration in which only the quantizers' ranges are trained, at a"
        f" learning rate of {QUANTIZER_RATE}")  # fmt: skip


def plan_stages(args: argparse.Namespace) -> list[Stage]:
    """The stages: where a model is being quantized, first the quantizers' ranges alone."""
    weights = Stage(
        name="weights" if args.nncf_config else "fine-tuning",
        num_epochs=args.num_train_epochs,
        learning_rate=args.learning_rate,
        total_batch_size=args.total_train_batch_size,
        micro_batch_size=args.per_gpu_train_batch_size,
    )
    ranges = replace(
        weights,
        name="ranges",
        num_epochs=args.quantizer_epochs if args.nncf_config else 0.0,
        learning_rate=QUANTIZER_RATE,
        schedule=constant_rate,
    )
    plan = [stage for stage in (ranges, weights) if stage.num_epochs]
    return [replace(stage, number=i + 1, count=len(plan)) for i, stage in enumerate(plan)]


def check_models(
    args: argparse.Namespace, task_class: Any, every: tuple[Any, ...]
) -> tuple[Any, nn.ModuleList | None]:
    """The student's tokenizer, and the maps of a merged student's states.

    A packed student that is to learn hidden states in FP32 becomes the one before merging.

    Raises:
        UserError: student or teacher are missing, of another task, or do not fit each other.
    """
    supervised, quantized = args.supervision_weight > 0, is_quantized(args.model_student)
    if supervised and not quantized and not args.nncf_config:
        args.model_student = unmerged_folder(args.model_student)
    config = check_model(args.model_student, "--model_student", args.max_seq_length_c)
    architecture = (config.architectures or [""])[0]
    task_class.check(architecture, args.model_student, "--model_student", every)
    if args.nncf_config and getattr(config, "merged", True) is False:
        raise UserError(
            f"--model_student: {args.model_student} is packed but not merged; quantize the folder"
            " that it lies in"
        )
    tokenizer = load_tokenizer(args.model_student, "--model_student", config)
    if args.dropout and config.model_type != "bert":
        raise UserError(f"--dropout: {args.model_student} is packed and has none; leave it out")
    merged = getattr(config, "merged", False)
    state_maps = load_state_maps(args.model_student, config) if merged else None
    if supervised:
        teacher = check_model(args.model_teacher, "--model_teacher", args.max_seq_length_c)
        architecture = (teacher.architectures or [""])[0]
        task_class.check(architecture, args.model_teacher, "--model_teacher", every)
        check_teacher(args.model_teacher, teacher, config, tokenizer, state_maps is not None)
    return tokenizer, state_maps


def fine_tune(args: argparse.Namespace, task_class: Any, every: tuple[Any, ...]) -> None:
    """Fine-tune --model_student for a task, quantized where --nncf_config says so, and export it.

    Args:
        task_class: the task.
        every: all tasks, to tell a model of another one.
    """
    check_arguments(args)

    # All that a user may have got wrong comes before anything that takes long.
    tokenizer, state_maps = check_models(args, task_class, every)
    task = task_class(args)
    arguments = {**vars(args), **task.hashes()}
    settings = None
    if args.nncf_config:
        settings = check_nncf_config(args.nncf_config, args.model_student, task.auto_class)
        arguments["nncf"] = settings.raw
    found = claim_output_dir(args, arguments)
    if found == "finished":
        return
    use_all_gpus(args.no_cuda)

    accelerator = make_accelerator(args.precision, args.no_cuda, args.seed)
    student = load_model(args.model_student, "--model_student", task.auto_class)
    task.apply_flags(student)
    task.tokenize(tokenizer)
    run = open_run(accelerator, args, arguments, found)
    evaluation = task.make_evaluation(run)
    frozen = freeze(student, args.freeze_list)
    teacher = None
    if args.supervision_weight > 0:
        teacher = load_teacher(args.model_teacher, task.auto_class, accelerator.device)
        if state_maps is not None:
            state_maps.to(accelerator.device)
    quantized = is_quantized(args.model_student)
    if settings and quantized:
        quantizers.hold_weight_range(student, settings.weight_range)
        run.say(
            f"--model_student {args.model_student} is quantized already: training goes on, with"
            f" weight_range {settings.weight_range}"
        )
    elif settings:
        student, quantized = quantize(run, student, settings, task), True
        frozen = freeze(student, args.freeze_list)  # another model, which quantizers belong to
    set_dropout(fuse_attention(student), args.dropout)
    run.say(f"{task.describe()}; {run.machine()}; {frozen / 1e6:.1f} M parameters frozen")
    # What INT8 arithmetic gives is that of FP32 with rounding, not that of bf16.
    evaluate = functools.partial(evaluation, precise=quantized)
    taught_by = None if teacher is None else in_half(teacher, accelerator)
    loss, batches = task.fine_tuning(run, taught_by, state_maps)
    train_stages(run, args, task, student, batches, loss, evaluate)
    unmerged = None
    if getattr(student.config, "merged", True) is False:
        unmerged, student = student, merge(student)
    # Of the weights that are delivered, in FP32 as the exported file computes.
    figures = evaluation(student.to(accelerator.device), precise=True)
    others = task.score_in_teacher_index(student, teacher) if teacher is not None else {}

    stages = ("fp32", "calibrated", "ranges", "weights", "fine-tuning") if quantized else ()
    delivery = results.Delivery(
        models={"": student, **({UNMERGED: unmerged} if unmerged is not None else {})},
        figures=figures,
        others=others,
        stages=stages,
        kept={"kept": figures},
        more={"int8": quantizers.what_is_int8(student.cpu())} if quantized else {},
        made="quantized to INT8 on" if quantized else "fine-tuned on",
        state_maps=state_maps if quantized else None,
    )
    results.deliver(run, task, tokenizer, delivery)


def train_stages(
    run: Run,
    args: argparse.Namespace,
    task: Any,
    student: PreTrainedModel,
    batches: Batches,
    loss: LossFunction,
    evaluate: Callable[[nn.Module], dict[str, float]],
) -> None:
    """Train the student through the stages, from where the newest state is; keep the best."""
    plan, position = plan_stages(args), run.position()
    if position:
        names = [stage.name for stage in plan]
        plan = plan[names.index(position["stage"]) :]
    for stage in plan:
        if stage.name == "ranges":
            quantizers.select_ranges(student)
        else:
            freeze(student, args.freeze_list)
        train(
            run,
            student,
            stage,
            batches,
            loss,
            evaluate,
            keep=task.best_by if args.keep == "best" else None,
        )
    if args.keep == "best":
        run.load_best(student)


# ------------------------------------------------------------------------------------------------
# What trains
def freeze(model: nn.Module, freeze_list: str, flag: str = "--freeze_list") -> int:
    """Exclude parameters from training whose name has one of the listed substrings.

    Args:
        freeze_list: comma-separated substrings; "none" or "" freezes nothing.

    Returns:
        the number of frozen weights.

    Raises:
        UserError: a substring matches no parameter (shows close names), or nothing is left.
    """
    parts = [part.strip() for part in freeze_list.split(",") if part.strip()]
    if parts == ["none"]:
        parts = []
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(part in name for name in names):
            words = sorted({word for name in names for word in [name, *name.split(".")]})
            by_case = [word for word in words if part.lower() in word.lower()]
            close = by_case or difflib.get_close_matches(part, words, cutoff=0.4) or words
            raise UserError(f"{flag}: no parameter's name has {part!r}; try {', '.join(close[:3])}")
    for name, parameter in model.named_parameters():
        trains = parameter.is_floating_point() and not any(part in name for part in parts)
        parameter.requires_grad_(trains)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"{flag}: {freeze_list} leaves nothing to train")
    return sum(p.numel() for p in model.parameters() if not p.requires_grad)


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout of the model; its saved configuration keeps the original figure."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


CALIBRATED = "calibrated"  # in CHECKPOINTS: the quantized model as calibration leaves it


def check_nncf_config(path: str, model_name: str, auto_class: Any) -> NncfConfig:
    """The settings of --nncf_config, checked against --model_student; says what is left out.

    Raises:
        UserError: as `read_nncf_config`, `check_scope` and `calibrate`.
    """
    config = read_nncf_config(path)
    if config.left_out and is_main_process():
        warn(
            f"--nncf_config: {path} is of NNCF before 3.0; without a meaning today:"
            f" {', '.join(config.left_out)}"
        )
    if not is_quantized(model_name):
        model = load_model(model_name, "--model_student", auto_class, quiet=True)
        check_scope(config, fuse_attention(model, plain=True).eval())
        _try_settings(config)
    return config


def _try_settings(config: NncfConfig) -> None:
    """Quantize a BERT of no size: NNCF tells what it refuses only then.

    Raises:
        UserError: as `calibrate`.
    """
    tiny = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8
    )
    arguments = {**config.arguments, "ignored_scope": None}  # which is of another model
    sample = dict.fromkeys(INPUTS, torch.zeros(1, 8, dtype=torch.long))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        model = fuse_attention(BertForQuestionAnswering(tiny), plain=True)
        calibrate(model, dataclasses.replace(config, arguments=arguments), [sample])


def quantize(run: Run, model: PreTrainedModel, config: NncfConfig, task: Any) -> PreTrainedModel:
    """The model with quantizers, calibrated on the task's windows and evaluated before and after.

    That is done once: a run that goes on, and the processes beside the main one, find the model
    among the run's checkpoints.
    """
    device = run.accelerator.device
    folder = os.path.join(run.output_dir, CHECKPOINTS, CALIBRATED)
    model = fuse_attention(model, plain=True).eval().to(device)
    run.evaluate_once("fp32", lambda: task.evaluation(model, precise=True))
    if run.main and not is_quantized(folder):
        samples = [to_device(sample, device) for sample in task.calibration(config.subset_size)]
        run.say(f"calibrating quantizers on {len(samples)} windows")
        quantized = calibrate(model, config, samples, run.stop_if_asked).cpu()
        shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
        save_quantized(quantized, f"{folder}.tmp")
        os.replace(f"{folder}.tmp", folder)
    run.accelerator.wait_for_everyone()
    quantized = load_model(folder, "--output_dir", task.auto_class, quiet=True).eval().to(device)
    hold_weight_range(quantized, config.weight_range)
    run.evaluate_once("calibrated", lambda: task.evaluation(quantized, precise=True))
    run.note(quantized, "calibrated", 0, run.evaluated("calibrated")[task.best_by])
    return quantized
