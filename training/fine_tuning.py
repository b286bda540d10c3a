"""Fine-tuning of any task: flags, checks, stages with or without quantizers, results."""

from __future__ import annotations

import argparse
import contextlib
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

from bert.attention import center_keys, fuse_attention
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
from cli import ArgumentParser, UserError, number, warn
from int8 import quantizers
from int8.calibration import calibrate, check_scope
from int8.quantizers import hold_weight_range, save_quantized
from int8.settings import NncfConfig, read_nncf_config
from squad_utils import INPUTS
from training import accuracy, flags, results
from training.machine import make_accelerator, use_all_gpus
from training.passes import Batches, LossFunction, to_device
from training.run import CHECKPOINTS, Run, check_output_dir
from training.stage import Evaluation, Stage, warm_up_linear_decay

# While only the ranges train, a step moves a range by at most about so much of its size.
QUANTIZER_RATE = 0.001


class FineTunable(results.Deliverable, accuracy.Scored, Protocol):
    """The members of a task that fine-tuning uses; tasks.task.Task documents them."""

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
    """Add the flags of models, training and quantization.

    Args:
        teacher: the kind of model that --model_teacher takes, for --help.
    """
    add = parser.group(flags.MODELS).add_argument
    add("--model_student", required=True, metavar="MODEL",
        help="BERT to train, packed or not: a folder or a hub name")  # fmt: skip
    add("--model_teacher", default="bert-large-uncased-whole-word-masking", metavar="MODEL",
        help=f"{teacher} to learn from, of the student's hidden size and vocabulary: a folder or a"
        " hub name; loaded only if --supervision_weight is over 0")  # fmt: skip
    add = parser.group(flags.TRAINING).add_argument
    add("--num_train_epochs", type=flags.not_negative, default=2.0, metavar="EPOCHS",
        help="passes over the training data, may be a fraction; 0 only evaluates and"
        " exports")  # fmt: skip
    add("--learning_rate", type=flags.rate, default=3e-5, metavar="RATE",
        help="learning rate at the first step; it falls linearly to 0")  # fmt: skip
    add("--freeze_list", default="none", metavar="NAME,...",
        help="do not train parameters whose name contains one of these")  # fmt: skip
    add("--supervision_weight", type=flags.not_negative, default=0.0, metavar="WEIGHT",
        help="weight of the squared error between the hidden states of student and"
        " teacher")  # fmt: skip
    add("--dropout", type=number(float, 0, 0.9), default=0.0, metavar="PROBABILITY",
        help="probability of dropout in training; on a CPU dropout takes longer than the rest of"
        " a step")  # fmt: skip
    add = parser.group(flags.INT8).add_argument
    add("--nncf_config", metavar="FILE",
        help="quantize to INT8 with the settings of this JSON file; docs/int8.md explains its keys"
        " (default: none, train in floating point)")  # fmt: skip
    add("--quantizer_epochs", type=flags.not_negative, default=1.0, metavar="EPOCHS",
        help="epochs after calibration in which only the quantizers' ranges train, at a learning"
        f" rate of {QUANTIZER_RATE} times their size, rising over the first 1% and falling to"
        " 0")  # fmt: skip
    add("--max_drop", type=flags.not_negative, default=1.0, metavar="POINTS",
        help="points of F1 (embeddings: of top 5) on dev that calibration may lose; beyond that the"
        " layers that cost most go back to floating point, at most a quarter of them; 100:"
        " never")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """The checked flags, and the models and files that they name.

    Attributes:
        task: its files have been read.
        teacher: the model whose hidden states are learned, or None.
        settings: the settings of quantization, or None.
        arguments: all that identifies this run.
        found: the result of `check_output_dir`.
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
        """Whether the student has quantizers or will get them."""
        return self.settings is not None or self.student.quantized

    @property
    def best_by(self) -> str | None:
        """The figure by which the best weights are kept, or None to keep the last."""
        return self.task.best_by if self.args.keep == "best" else None

    def plan(self) -> list[Stage]:
        """The stages: to quantize, first the quantizers' ranges alone, then all weights."""
        args = self.args
        weights = Stage(
            name="weights" if args.nncf_config else "fine-tuning",
            num_epochs=args.num_train_epochs,
            learning_rate=args.learning_rate,
            total_batch_size=args.total_train_batch_size,
            micro_batch_size=args.per_gpu_train_batch_size,
            keep=self.best_by,
        )
        ranges = replace(
            weights,
            name="ranges",
            num_epochs=args.quantizer_epochs if args.nncf_config else 0.0,
            learning_rate=QUANTIZER_RATE,
            schedule=warm_up_linear_decay,
        )
        plan = [stage for stage in (ranges, weights) if stage.num_epochs]
        return [replace(stage, number=i + 1, count=len(plan)) for i, stage in enumerate(plan)]


def check(
    args: argparse.Namespace, task_class: type[FineTunable], every: Sequence[type[FineTunable]]
) -> Job | None:
    """Find a user's mistakes before anything takes long.

    Args:
        every: all tasks, to recognise a model of another task.

    Returns:
        the job, or None if the output folder has the results of this very command.

    Raises:
        UserError: for the first mistake found.
    """
    flags.check_arguments(args)
    taught, length = args.supervision_weight > 0, args.max_seq_length_c
    # In FP32 a packed student learns hidden states before it is merged.
    unmerged = taught and not args.nncf_config
    student = open_model(args.model_student, "--model_student", length, before_merging=unmerged)
    task_class.check(student, every)
    if args.nncf_config and student.packed and not student.merged:
        raise UserError(
            f"--model_student: {args.model_student} is packed but not merged; quantize the merged"
            " model in the folder above it"
        )
    if args.dropout and student.packed:
        raise UserError(
            f"--dropout: {args.model_student} is packed and has no dropout; leave the flag out"
        )
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
    found = check_output_dir(args, arguments)
    if found == "finished":
        return None
    return Job(args, task, student, teacher, settings, arguments, found)


def load(job: Job) -> tuple[Run, PreTrainedModel, PreTrainedModel | None]:
    """Start a process per GPU, open the run, and load the student and the teacher, if any."""
    args, task = job.args, job.task
    use_all_gpus(args.no_cuda)
    accelerator = make_accelerator(args.precision, args.no_cuda, args.seed)
    student = load_model(job.student, task.auto_class)
    task.apply_flags(student)
    task.tokenize(job.student.tokenizer)
    run = Run(accelerator, args, job.arguments, job.found)
    task.make_evaluation(run)
    frozen = freeze(student, args.freeze_list)
    run.say(f"{task.describe()}; {run.machine()}; {frozen / 1e6:.1f} M parameters frozen")
    if job.teacher is None:
        return run, student, None
    if job.student.state_maps is not None:
        job.student.state_maps.to(accelerator.device)
    return run, student, load_teacher(job.teacher, task.auto_class, accelerator.device)


def add_quantizers(job: Job, run: Run, student: PreTrainedModel) -> PreTrainedModel:
    """Give the student calibrated quantizers if --nncf_config asks for them, and set dropout."""
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
    """The stages of the run, from the stage of its newest state on."""
    plan, position = job.plan(), run.states.position()
    first = [stage.name for stage in plan].index(position["stage"]) if position else 0
    return plan[first:]


def select_trained(student: PreTrainedModel, stage: Stage, freeze_list: str) -> None:
    """Select what the stage trains: only the ranges of quantizers, or all that is not frozen."""
    if stage.name == "ranges":
        quantizers.select_ranges(student)
    else:
        freeze(student, freeze_list)


def deliver(job: Job, run: Run, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    """Save the student, evaluate the saved folder, export it, and describe it.

    The evaluation is in FP32, as the exported file computes. A packed student that learned hidden
    states is saved twice, unmerged and merged; the merged one is exported.
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
    made = "fine-tuned on" if job.plan() else "not trained on"
    if job.settings and not job.student.quantized:
        made = "quantized to INT8 on"
    more: dict[str, object] = {}
    made_float = accuracy.decision(run)
    if job.quantized:
        more["int8"] = quantizers.what_is_int8(saved.cpu())
    if made_float:
        more["float_layers"] = made_float
    names = ("fp32", *accuracy.stages(made_float), "ranges", "weights", "fine-tuning")
    delivery = results.Delivery(
        figures=figures,
        parameters=count_parameters(saved),
        packed=job.student.packed,
        others=others,
        stages=names if job.quantized else (),
        kept={"kept": figures},
        more=more,
        made=made,
    )
    del saved  # the export loads it anew
    results.deliver(run, task, job.student.tokenizer, delivery)


# ------------------------------------------------------------------------------------------------
# The weights that train


def freeze(model: nn.Module, freeze_list: str) -> int:
    """Exclude parameters from training whose name contains one of the listed substrings.

    Args:
        freeze_list: comma-separated substrings; "none" or "" freezes nothing.

    Returns:
        the number of frozen weights.

    Raises:
        UserError: a substring matches no parameter (the line shows close names), or none is left.
    """
    parts = [part.strip() for part in freeze_list.split(",") if part.strip()]
    parts = [] if parts == ["none"] else parts
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(part in name for name in names):
            words = sorted({word for name in names for word in [name, *name.split(".")]})
            by_case = [word for word in words if part.lower() in word.lower()]
            close = by_case or difflib.get_close_matches(part, words, cutoff=0.4) or words
            raise UserError(
                f"--freeze_list: no parameter's name has {part!r}; try {', '.join(close[:3])}"
            )
    for name, parameter in model.named_parameters():
        trains = parameter.is_floating_point() and not any(part in name for part in parts)
        parameter.requires_grad_(trains)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--freeze_list: {freeze_list} leaves nothing to train")
    return sum(p.numel() for p in model.parameters() if not p.requires_grad)


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout of the model; its saved configuration keeps the original figure."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


# ------------------------------------------------------------------------------------------------
# Quantization

CENTERING = 32  # calibration windows whose keys are centred
CALIBRATED = "calibrated"  # in CHECKPOINTS: the quantized model right after calibration


def check_nncf_config(path: str, student: OpenedModel, auto_class: AutoClass) -> NncfConfig:
    """Read --nncf_config and check it against --model_student; warn of keys without effect.

    Raises:
        UserError: as `read_nncf_config`, `check_scope` and `calibrate`.
    """
    config = read_nncf_config(path)
    if config.without_effect:
        warn(f"--nncf_config: {path}: keys without effect: {', '.join(config.without_effect)}")
    if not student.quantized:
        model = fuse_attention(load_model(student, auto_class, quiet=True), separate_products=True)
        check_scope(config, model.eval())
        _try_settings(config)
    return config


def _try_settings(config: NncfConfig) -> None:
    """Quantize a tiny BERT: NNCF refuses settings only while it quantizes.

    Raises:
        UserError: as `calibrate`.
    """
    tiny = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8
    )
    arguments = {**config.arguments, "ignored_scope": None}  # it names layers of another model
    sample = dict.fromkeys(INPUTS, torch.zeros(1, 8, dtype=torch.long))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        model = fuse_attention(BertForQuestionAnswering(tiny), separate_products=True)
        calibrate(model, replace(config, arguments=arguments), [sample])


def quantize(run: Run, model: PreTrainedModel, config: NncfConfig, job: Job) -> PreTrainedModel:
    """Add quantizers, calibrated on the task's windows; evaluate the model before and after.

    The main process does so once. Other processes, and a run that continues, load the calibrated
    model from the run's checkpoints.
    """
    task, device = job.task, run.accelerator.device
    folder = os.path.join(run.output_dir, CHECKPOINTS, CALIBRATED)
    model = fuse_attention(model, separate_products=True).eval().to(device)
    run.evaluate_once("fp32", lambda: task.evaluation(model, fp32=True))
    # Always, since layers that go back to floating point take this model's biases.
    center_keys(model, (to_device(sample, device) for sample in task.calibration(CENTERING)))
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
    stages = accuracy.control(
        run,
        task,
        job.args.max_drop,
        model,
        quantized,
        lambda: load_model(found, task.auto_class, quiet=True).eval().to(device),
    )
    reached = run.evaluated(stages[-1])
    assert reached is not None  # evaluate_once has logged it
    run.states.keep_if_best(quantized, stages[-1], 0, reached[task.best_by])
    return quantized
