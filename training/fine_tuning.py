"""Fine-tuning of any task: flags, checks, stages with or without quantizers, what is left."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bert.attention import fuse_attention
from bert.model_folder import (
    UNMERGED,
    AutoClass,
    OpenedModel,
    check_teacher,
    count_parameters,
    load_model,
    load_teacher,
    open_model,
)
from bert.packed import merge
from cli import ArgumentParser, UserError, is_main_process, number, warn
from int8 import quantizers
from int8.calibration import calibrate, check_scope
from int8.quantizers import hold_weight_range, save_quantized
from int8.settings import NncfConfig, read_nncf_config
from squad_utils import INPUTS
from training import flags, results
from training.flags import check_arguments, claim_output_dir, not_negative, open_run, rate
from training.loop import Evaluation, Stage, constant_rate
from training.machine import make_accelerator, use_all_gpus
from training.passes import Batches, LossFunction, to_device
from training.run import CHECKPOINTS, Run

QUANTIZER_RATE = 0.01  # learning rate of the quantizers' ranges while nothing else trains


class FineTunable(results.Deliverable, Protocol):
    """What fine-tuning uses of a task; tasks.task.Task has the meanings."""

    architectures: ClassVar[tuple[str, ...]]
    best_by: ClassVar[str]

    @property
    def evaluation(self) -> Evaluation: ...
    def __init__(self, args: argparse.Namespace) -> None: ...
    @classmethod
    def check(cls, model: OpenedModel, every: Sequence[type[FineTunable]]) -> None: ...
    def hashes(self) -> dict[str, str]: ...
    def tokenize(self, tokenizer: PreTrainedTokenizerFast) -> None: ...
    def apply_flags(self, student: PreTrainedModel) -> None: ...
    def make_evaluation(self, run: Run) -> Evaluation: ...
    def fine_tuning(
        self, run: Run, teacher: PreTrainedModel | None, state_maps: nn.ModuleList | None
    ) -> tuple[LossFunction, Batches]: ...
    def calibration(self, count: int) -> Iterator[dict[str, Tensor]]: ...
    def describe(self) -> str: ...
    def score_in_teacher_index(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> dict[str, dict[str, float]]: ...


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


@dataclass(frozen=True)
class Job:
    """What the flags ask for, checked.

    Attributes:
        task: with its files read.
        teacher: to learn hidden states from, or None.
        settings: of quantization, or None.
        arguments: all that tells this run from another.
        found: what the output folder holds, as `claim_output_dir` says.
    """

    args: argparse.Namespace
    task: FineTunable
    student: OpenedModel
    teacher: OpenedModel | None
    settings: NncfConfig | None
    arguments: dict[str, object]
    found: str

    @property
    def quantized(self) -> bool:
        """Whether the student has quantizers, or is to get them."""
        return self.settings is not None or self.student.quantized

    @property
    def best_by(self) -> str | None:
        """The figure by which weights are kept, or None to keep the last."""
        return self.task.best_by if self.args.keep == "best" else None


def check(
    args: argparse.Namespace, task_class: type[FineTunable], every: Sequence[type[FineTunable]]
) -> Job | None:
    """Check all that a user may have got wrong, before anything takes long.

    Args:
        every: all tasks, to tell a model of another one.

    Returns:
        None if the output folder has the results of this very command.

    Raises:
        UserError: for the first mistake found.
    """
    check_arguments(args)
    taught, length = args.supervision_weight > 0, args.max_seq_length_c
    # A packed one that is to learn hidden states in FP32 is the one before merging.
    before_merging = taught and not args.nncf_config
    student = open_model(
        args.model_student, "--model_student", length, before_merging=before_merging
    )
    task_class.check(student, every)
    if args.nncf_config and student.packed and not student.merged:
        raise UserError(
            f"--model_student: {args.model_student} is packed but not merged; quantize the folder"
            " that it lies in"
        )
    if args.dropout and student.packed:
        raise UserError(f"--dropout: {args.model_student} is packed and has none; leave it out")
    teacher = None
    if taught:
        teacher = open_model(args.model_teacher, "--model_teacher", length)
        task_class.check(teacher, every)
        check_teacher(teacher, student)
    task = task_class(args)
    arguments, settings = {**vars(args), **task.hashes()}, None
    if args.nncf_config:
        settings = check_nncf_config(args.nncf_config, student, task.auto_class)
        arguments["nncf"] = settings.raw
    found = claim_output_dir(args, arguments)
    if found == "finished":
        return None
    return Job(args, task, student, teacher, settings, arguments, found)


def load(job: Job) -> tuple[Run, PreTrainedModel, PreTrainedModel | None]:
    """On all GPUs: open the run, and load its student and, if it has one, its teacher."""
    args, task = job.args, job.task
    use_all_gpus(args.no_cuda)
    accelerator = make_accelerator(args.precision, args.no_cuda, args.seed)
    student = load_model(job.student, task.auto_class)
    task.apply_flags(student)
    task.tokenize(job.student.tokenizer)
    run = open_run(accelerator, args, job.arguments, job.found)
    task.make_evaluation(run)
    frozen = freeze(student, args.freeze_list)
    run.say(f"{task.describe()}; {run.machine()}; {frozen / 1e6:.1f} M parameters frozen")
    if job.teacher is None:
        return run, student, None
    if job.student.state_maps is not None:
        job.student.state_maps.to(accelerator.device)
    return run, student, load_teacher(job.teacher, task.auto_class, accelerator.device)


def add_quantizers(job: Job, run: Run, student: PreTrainedModel) -> PreTrainedModel:
    """The student with calibrated quantizers, if --nncf_config asks for them; ready to train."""
    if job.settings and job.student.quantized:
        hold_weight_range(student, job.settings.weight_range)
        run.say(
            f"--model_student {job.args.model_student} is quantized already: training goes on, with"
            f" weight_range {job.settings.weight_range}"
        )
    elif job.settings:
        student = quantize(run, student, job.settings, job)
    set_dropout(fuse_attention(student), job.args.dropout)
    return student


def stages_to_go(job: Job, run: Run) -> list[Stage]:
    """The stages of the run, from that of its newest state on."""
    plan, position = plan_stages(job.args), run.states.position()
    if position:
        names = [stage.name for stage in plan]
        plan = plan[names.index(position["stage"]) :]
    return plan


def select_trained(student: PreTrainedModel, stage: Stage, freeze_list: str) -> None:
    """Let train what the stage trains: the ranges of quantizers alone, or what is not frozen."""
    if stage.name == "ranges":
        quantizers.select_ranges(student)
    else:
        freeze(student, freeze_list)


def deliver(job: Job, run: Run, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    """Save it; evaluate the folder, in FP32 as the exported file computes; export, describe it.

    A packed student that has learned hidden states is merged for that, and saved before it as well.
    """
    task, models = job.task, {}
    if getattr(student.config, "merged", True) is False:
        models[UNMERGED], student = student, merge(student)
    models[""] = student
    state_maps = job.student.state_maps if job.quantized else None
    results.save(run, job.student.tokenizer, models, state_maps)
    saved = results.load(run, task)
    figures = task.evaluation(saved, fp32=True)
    others = {} if teacher is None else task.score_in_teacher_index(saved, teacher)
    names = ("fp32", "calibrated", "ranges", "weights", "fine-tuning")
    delivery = results.Delivery(
        figures=figures,
        parameters=count_parameters(saved),
        packed=job.student.packed,
        others=others,
        stages=names if job.quantized else (),
        kept={"kept": figures},
        more={"int8": quantizers.what_is_int8(saved.cpu())} if job.quantized else {},
        made=_made(job),
    )
    del saved  # the export loads it anew
    results.deliver(run, task, job.student.tokenizer, delivery)


def _made(job: Job) -> str:
    """What became of the model on the training data, for its card."""
    if job.settings and not job.student.quantized:
        return "quantized to INT8 on"
    return "fine-tuned on" if plan_stages(job.args) else "not trained on"


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


# ------------------------------------------------------------------------------------------------
# Quantization

CALIBRATED = "calibrated"  # in CHECKPOINTS: the quantized model as calibration leaves it


def check_nncf_config(path: str, student: OpenedModel, auto_class: AutoClass) -> NncfConfig:
    """The settings of --nncf_config, checked against --model_student; names keys without effect.

    Raises:
        UserError: as `read_nncf_config`, `check_scope` and `calibrate`.
    """
    config = read_nncf_config(path)
    if config.without_effect and is_main_process():
        warn(f"--nncf_config: {path}: keys without effect: {', '.join(config.without_effect)}")
    if not student.quantized:
        model = load_model(student, auto_class, quiet=True)
        check_scope(config, fuse_attention(model, separate_products=True).eval())
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
        model = fuse_attention(BertForQuestionAnswering(tiny), separate_products=True)
        calibrate(model, dataclasses.replace(config, arguments=arguments), [sample])


def quantize(run: Run, model: PreTrainedModel, config: NncfConfig, job: Job) -> PreTrainedModel:
    """The model with quantizers, calibrated on the task's windows and evaluated before and after.

    That is done once: a run that goes on, and the processes beside the main one, find the model
    among the run's checkpoints.
    """
    task, device = job.task, run.accelerator.device
    folder = os.path.join(run.output_dir, CHECKPOINTS, CALIBRATED)
    model = fuse_attention(model, separate_products=True).eval().to(device)
    run.evaluate_once("fp32", lambda: task.evaluation(model, fp32=True))
    if run.main and not os.path.isdir(folder):
        samples = [to_device(sample, device) for sample in task.calibration(config.subset_size)]
        run.say(f"calibrating quantizers on {len(samples)} windows")
        quantized = calibrate(model, config, samples, run.stop_if_asked).cpu()
        shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
        save_quantized(quantized, f"{folder}.tmp")
        os.replace(f"{folder}.tmp", folder)
    run.wait_for(folder)
    found = replace(job.student, flag="--output_dir", folder=folder, local=True, quantized=True)
    quantized = load_model(found, task.auto_class, quiet=True).eval().to(device)
    hold_weight_range(quantized, config.weight_range)
    run.evaluate_once("calibrated", lambda: task.evaluation(quantized, fp32=True))
    calibrated = run.evaluated("calibrated")
    assert calibrated is not None  # just now, or by an earlier part of the run
    run.states.keep_if_best(quantized, "calibrated", 0, calibrated[task.best_by])
    return quantized
