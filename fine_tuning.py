"""Fine-tuning, of any task: flags, checks, stages with or without quantizers, what is left behind.

A script says what is its own in a `Learning`: the loss, the batches, what is to be done before a
step. The rest is the same for question answering and for embeddings.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

import nncf_utils
import onnx_utils
import report_utils
from cli_utils import ArgumentParser, UserError, number
from fast_attention import fuse_attention
from model_utils import (
    check_model,
    check_task,
    check_teacher,
    count_parameters,
    freeze,
    is_quantized,
    load_model,
    load_state_maps,
    load_teacher,
    load_tokenizer,
    save_model,
    save_state_maps,
    set_dropout,
    unmerged_folder,
)
from run_arguments import check_arguments, claim_output_dir, not_negative, open_run, rate
from run_utils import Run, summary
from train_utils import (
    Stage,
    constant_rate,
    make_accelerator,
    train,
    use_all_gpus,
)
from training.machine import in_half
from training.passes import Batches, LossFunction

QUANTIZER_RATE = 0.01  # learning rate of the quantizers' ranges while nothing else trains


@dataclass(frozen=True)
class Learning:
    """What a task trains by.

    Attributes:
        before_step: called with the model, the step and its examples before each step, or None.
    """

    loss: LossFunction
    batches: Batches
    before_step: Callable[[nn.Module, int, np.ndarray], None] | None = None


def add_fine_tuning_arguments(parser: ArgumentParser, teacher: str) -> None:
    """The models (`teacher`: what that must be), learning rate and epochs, quantization."""
    add = parser.add_argument
    add("--model_student", required=True, help="BERT to train: a folder or a hub name")
    add(
        "--model_teacher",
        default="bert-large-uncased-whole-word-masking",
        help=f"{teacher} to learn from; loaded only where supervision_weight > 0",
    )
    add("--supervision_weight", type=not_negative, default=0.0, help="of hidden states' error")
    add(
        "--freeze_list",
        default="none",
        help="comma-separated substrings of names of parameters that are not trained, or none",
    )
    add("--learning_rate", type=rate, default=3e-5, help="falls linearly to 0")
    add(
        "--num_train_epochs",
        type=not_negative,
        default=2.0,
        help="may be a fraction; 0: only evaluate and export",
    )
    add("--nncf_config", help="quantize to INT8 with the settings of this file")
    add(
        "--quantizer_epochs",
        type=not_negative,
        default=1.0,
        help="after calibration, on the quantizers' ranges alone",
    )
    add("--dropout", type=number(float, 0, 0.9), default=0.0, help="probability while training")


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


def check_models(args: argparse.Namespace, task_class: Any) -> tuple[Any, nn.ModuleList | None]:
    """The student's tokenizer, and the maps of a merged student's states.

    A packed student that is to learn hidden states in FP32 becomes the one before merging.

    Raises:
        UserError: student or teacher are missing, of another task, or do not fit each other.
    """
    supervised, quantized = args.supervision_weight > 0, is_quantized(args.model_student)
    if supervised and not quantized and not args.nncf_config:
        args.model_student = unmerged_folder(args.model_student)
    config = check_model(args.model_student, "--model_student", args.max_seq_length_c)
    check_task(config, args.model_student, "--model_student", task_class.architectures)
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
        check_task(teacher, args.model_teacher, "--model_teacher", task_class.architectures)
        check_teacher(args.model_teacher, teacher, config, tokenizer, state_maps is not None)
    return tokenizer, state_maps


def fine_tune(
    args: argparse.Namespace,
    task_class: Any,
    script: str,
    learn: Callable[[Run, Any, PreTrainedModel | None, nn.ModuleList | None], Learning],
) -> None:
    """Fine-tune --model_student for a task, quantized where --nncf_config says so, and export it.

    Args:
        task_class: QaTask or EmbTask.
        script: the name of the script that runs.
        learn: called with the run, the task (tokenised), the teacher if there is one, and the maps
            of a merged student's states.
    """
    check_arguments(args)
    started = time.time()

    # All that a user may have got wrong comes before anything that takes long.
    tokenizer, state_maps = check_models(args, task_class)
    task = task_class(args)
    arguments = {**vars(args), **task.hashes()}
    settings = None
    if args.nncf_config:
        settings = nncf_utils.check_nncf_config(
            args.nncf_config, args.model_student, task.auto_class
        )
        arguments["nncf"] = settings.raw
    found = claim_output_dir(args, arguments)
    if found == "finished":
        return
    use_all_gpus(args.no_cuda)

    accelerator = make_accelerator(args.precision, args.no_cuda, args.seed)
    student = load_model(args.model_student, "--model_student", task.auto_class)
    task.adapt(student)
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
        nncf_utils.hold_weight_range(student, settings.weight_range)
        run.say(
            f"--model_student {args.model_student} is quantized already: training goes on, with"
            f" weight_range {settings.weight_range}"
        )
    elif settings:
        student, quantized = nncf_utils.quantize(run, student, settings, task), True
        frozen = freeze(student, args.freeze_list)  # another model, which quantizers belong to
    set_dropout(fuse_attention(student), args.dropout)
    run.say(f"{task.describe()}; {run.machine()}; {frozen / 1e6:.1f} M parameters frozen")
    # What INT8 arithmetic gives is that of FP32 with rounding, not that of bf16.
    evaluate = functools.partial(evaluation, precise=quantized)
    taught_by = None if teacher is None else in_half(teacher, accelerator)
    learning = learn(run, task, taught_by, state_maps)
    train_stages(run, args, task, student, learning, evaluate)
    # Of the weights that are delivered, in FP32 as the exported file computes.
    figures = evaluation(student.to(accelerator.device), precise=True)
    others = task.with_teacher(student, teacher) if teacher is not None else {}

    if run.main:
        with run.writing_results():
            student = save_model(student, tokenizer, args.output_dir)
            if quantized and state_maps is not None:
                save_state_maps(state_maps, args.output_dir)
            task.write_answers()
            check = task.export()
            run.stop_if_asked()
            metrics = {
                **figures,
                **report_utils.describe_run(run, arguments, started),
                "counts": task.counts(),
                "parameters": count_parameters(student),
                **onnx_utils.describe_check(check, args.output_dir),
                **others,
            }
            if quantized:
                stages = ("fp32", "calibrated", "ranges", "weights", "fine-tuning")
                metrics["stages"] = report_utils.stage_table(
                    run, stages, {"kept": figures, **others}
                )
                metrics["int8"] = nncf_utils.what_is_int8(student)
            report_utils.draw_curves(args.output_dir, task.score_names)
            made = "quantized to INT8 on" if quantized else "fine-tuned on"
            task.write_card(metrics, script, made)
            run.finish(metrics)
            if quantized:
                report_utils.show_table(metrics["stages"], task.score_names)
        onnx_utils.require(check, args.output_dir)
    accelerator.end_training()
    run.say(f"{args.output_dir}: {summary(figures)}; model.onnx checked")


def train_stages(
    run: Run,
    args: argparse.Namespace,
    task: Any,
    student: PreTrainedModel,
    learning: Learning,
    evaluate: Callable[[nn.Module], dict[str, float]],
) -> None:
    """Train the student through the stages, from where the newest state is; keep the best."""
    plan, position = plan_stages(args), run.position()
    if position:
        names = [stage.name for stage in plan]
        plan = plan[names.index(position["stage"]) :]
    for stage in plan:
        if stage.name == "ranges":
            nncf_utils.select_ranges(student)
        else:
            freeze(student, args.freeze_list)
        train(
            run,
            student,
            stage,
            learning.batches,
            learning.loss,
            evaluate,
            before_step=learning.before_step,
            keep=task.best_by if args.keep == "best" else None,
        )
    if args.keep == "best":
        run.load_best(student)
