"""Pack a fine-tuned BERT into a small one and distill it, without labels, stage by stage.

The loss of every stage is the mean squared error between the hidden states of teacher and
student; the last stage can add the error of their outputs. The output folder gets the merged
student with its model.onnx, and the unmerged student, with which distillation can continue. The
same command again continues a stopped run.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import signal
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import bert_pack
from bert.model_folder import (
    UNMERGED,
    OpenedModel,
    check_teacher,
    count_parameters,
    load_model,
    load_teacher,
    open_model,
)
from bert.packed import PackedBertConfig, PackedBertPreTrainedModel, merge
from cli import ArgumentParser, UserError, is_main_process, number, run_main
from tasks import TASKS, EmbeddingTask, QaTask, Task
from tasks.hidden_states import StateLoss
from tasks.qa import LOGITS_TEMPERATURE, LOGITS_WEIGHT
from training import results
from training.flags import (
    DATA,
    GROUPS,
    MODELS,
    PACKING,
    TRAINING,
    add_data_arguments,
    add_run_arguments,
    check_arguments,
    over_0,
    positive,
    rate,
)
from training.loop import train
from training.machine import in_half, make_accelerator, running, use_all_gpus
from training.passes import to_device
from training.run import Run, check_output_dir
from training.stage import Stage, warm_up, warm_up_linear_decay

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports silently

STAGES = ("embeddings", "grow", "feed-forward", "heads", "final")
QUARTER = 0.25  # epochs of `embeddings`, and of each k of `grow`: each has little to learn
OUTPUTS_IN = ("final",)  # stages that also learn the teacher's outputs
# --passes: the share of each stage, and the defaults that it gives other flags. The rate of the
# stage final is the task's packing_rate.
PASSES = {"heads": 0.2, "final": 0.8}
PASSES_FLAGS = {
    "warm_up_steps": 40,
    "total_train_batch_size_for_tune": 16,
}
SAMPLE_WINDOWS = 256  # the sample on which a packed model is fitted to its teacher


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(GROUPS, description=__doc__.splitlines()[0])
    add = parser.group(MODELS).add_argument
    add("--model_student", required=True, metavar="MODEL",
        help="fine-tuned BERT to pack: a folder or a hub name; if it is packed already,"
        " distillation continues with it")  # fmt: skip
    add("--model_teacher", type=comma_separated, required=True, metavar="MODEL",
        help="fine-tuned BERT to learn from: a folder or a hub name; several, MODEL,MODEL,...: the"
        " student learns the hidden states of the first and the mean of all logits")  # fmt: skip
    add_data_arguments(parser, max_seq_length_q=64)
    add = parser.group(DATA).add_argument
    add("--extra_pairs", type=number(float, 0, 100), default=0.0, metavar="FACTOR",
        help="question answering: add FACTOR x as many windows to each epoch, new ones each time:"
        " questions with another context of their article, unlabelled")  # fmt: skip
    add("--extra_texts", type=comma_separated, metavar="FILE,...",
        help="take half of these windows from texts: documents, or folders of them, as ask.py"
        " reads them; blank lines separate paragraphs (default: none)")  # fmt: skip
    add("--eval_extra_contexts", metavar="FILE",
        help="embeddings: SQuAD JSON whose contexts are searched beside those of the dev data"
        " (default: none)")  # fmt: skip
    add_packing_arguments(parser)
    add_stage_arguments(parser)
    add_run_arguments(parser)
    args = parser.parse_args()
    if args.passes is None:
        return args
    by_plan = dict.fromkeys(("stages", "num_train_epochs", "learning_rate_for_tune"))
    parser.set_defaults(**by_plan, **PASSES_FLAGS)
    args = parser.parse_args()
    for flag in ("stages", "num_train_epochs"):
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag}: --passes={args.passes:g} plans that; leave one of them out")
    return args


def add_packing_arguments(parser: ArgumentParser) -> None:
    add = parser.group(PACKING).add_argument
    add("--pack_cfg", metavar="KEY:VALUE,...",
        default="num_hidden_layers:12,ff_iter_num:4,num_attention_heads:8,hidden_size:512,"
        "pack_emb:1,hidden_act:orig",
        help="the packed model. num_hidden_layers; hidden_size: its width, a multiple of the heads;"
        " num_attention_heads: heads kept in each layer, of their old size; ff_iter_num: layers"
        " that replace the feed-forward, 0 keeps it; pack_emb: 1 shrinks the embedding tables to"
        " hidden_size, 0 keeps them; hidden_act: orig, or an activation of the Transformers"
        " library")  # fmt: skip
    add("--pack_start", choices=tuple(bert_pack.STARTS), default="teacher",
        help="whether packed weights are first fitted to the teacher or start at"
        " random")  # fmt: skip


def add_stage_arguments(parser: ArgumentParser) -> None:
    add = parser.group(TRAINING).add_argument
    add("--stages", type=stages, default=",".join(STAGES), metavar="STAGE,...",
        help="stages that run, always in this order")  # fmt: skip
    add("--num_train_epochs", type=over_0, default=16.0, metavar="EPOCHS",
        help="epochs of each of the last three stages, may be a fraction; embeddings takes a"
        " quarter of an epoch, and so does grow for each layer")  # fmt: skip
    add("--passes", type=over_0, metavar="PASSES",
        help="plan stages, epochs, warm-up, learning rates and batch sizes for so many passes over"
        " the training data, in place of --stages and --num_train_epochs; other flags keep their"
        " given values (default: none)")  # fmt: skip
    add("--max_steps_per_stage", type=positive, metavar="STEPS",
        help="end each stage after so many steps (default: no limit)")  # fmt: skip
    add("--warm_up_steps", type=positive, metavar="STEPS",
        help="steps in which each stage's learning rate rises (default: 1%% of its"
        " steps)")  # fmt: skip
    add("--learning_rate", type=rate, default=5e-4, metavar="RATE",
        help="learning rate of all stages except final, constant after the warm-up")  # fmt: skip
    add("--learning_rate_for_tune", type=rate, default=10e-4, metavar="RATE",
        help="learning rate of the stage final; it falls linearly to 0")  # fmt: skip
    add("--total_train_batch_size_for_tune", type=positive, default=64, metavar="N",
        help="windows or texts per step of the stage final")  # fmt: skip
    add("--loss_weight_alpha", type=number(float, 0, 100, True), default=1.5, metavar="FACTOR",
        help="in the stage final, the error of hidden state i weighs FACTOR^i")  # fmt: skip
    add("--embedding_weight", type=number(float, 0, 1e6), default=0.0, metavar="WEIGHT",
        help="embeddings: weight of the squared error of the embedding in the stage final, beside"
        " the error of the states")  # fmt: skip
    add("--logits_weight", type=number(float, 0, 1e6), metavar="WEIGHT",
        help="question answering: weight of the soft cross-entropy between the teacher's and the"
        " student's start and end in the stage final, beside the error of the states"
        f" (default: {LOGITS_WEIGHT:g})")  # fmt: skip
    add("--logits_temperature", type=number(float, 0, 100, True), metavar="T",
        help="question answering: divides the logits of that cross-entropy"
        f" (default: {LOGITS_TEMPERATURE:g})")  # fmt: skip


def comma_separated(text: str) -> list[str]:
    """An argparse type: names, separated by commas."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name")
    return found


def stages(text: str) -> list[str]:
    """An argparse type: names of stages, separated by commas; returned in their fixed order."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in STAGES or names.count(name) > 1:
            problem = "given twice" if name in STAGES else "not a stage"
            raise argparse.ArgumentTypeError(
                f"{name!r} is {problem}; the stages are {','.join(STAGES)}"
            )
    return [name for name in STAGES if name in names]


# ------------------------------------------------------------------------------------------------
# The stages


@dataclass(frozen=True)
class Distillation:
    """A stage of distillation: how it trains, which states it learns, which parameters change.

    Attributes:
        weights: weights of the errors of states 0..k; only the first k layers run.
        trains: a parameter trains if its name contains one of these ...
        except_for: ... and none of these.
        outputs: whether the student also learns the teacher's outputs.
    """

    stage: Stage
    weights: tuple[float, ...]
    trains: tuple[str, ...]
    except_for: tuple[str, ...] = ()
    outputs: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.weights) - 1


def plan_epochs(args: argparse.Namespace, num_layers: int) -> dict[str, float]:
    """The stages that run, and the epochs of each; for `grow`, the epochs of each k = 1..n.

    A pass is as many windows as the training file has: with extra pairs, an epoch is 1 + FACTOR
    passes. A window in a stage that runs k of n layers counts k / n. So an epoch of each k of
    `grow` counts (n + 1) / 2 epochs in all, and `embeddings` counts nothing.
    """
    early = ("embeddings", "grow")
    if args.passes is None:
        return {name: QUARTER if name in early else args.num_train_epochs for name in args.stages}
    epochs = {name: share * args.passes / (1 + args.extra_pairs) for name, share in PASSES.items()}
    if "grow" in epochs:
        epochs["grow"] /= (num_layers + 1) / 2
    return {**epochs, "embeddings": QUARTER} if "embeddings" in epochs else epochs


def equal_weights(k: int) -> tuple[float, ...]:
    """The weights of states 0..k whose weighted sum is the mean."""
    return (1 / (k + 1),) * (k + 1)


def plan_stages(args: argparse.Namespace, num_layers: int, task: type[Task]) -> list[Distillation]:
    """The stages of --stages or --passes, for a student with `num_layers` layers."""
    given = args.learning_rate_for_tune
    epochs, n = plan_epochs(args, num_layers), num_layers
    growing = [args.loss_weight_alpha**i for i in range(n + 1)]
    embeddings = ("_map.", "embeddings.LayerNorm.", "state_maps.0.")
    everything = ("_map.", "embeddings.LayerNorm.", "state_maps.", "layers.")
    attention = (".qkv.", ".attention_output.")

    def stage(name: str, part: str = "") -> Stage:
        return Stage(
            name=name + part,
            num_epochs=epochs.get(name, 0.0),
            learning_rate=args.learning_rate,
            total_batch_size=args.total_train_batch_size,
            micro_batch_size=args.per_gpu_train_batch_size,
            schedule=functools.partial(warm_up, steps=args.warm_up_steps),
            max_steps=args.max_steps_per_stage,
            goes_back=True,
        )

    def layers(k: int) -> tuple[str, ...]:
        """The first k layers with the maps after them."""
        return tuple(name for i in range(k) for name in (f"layers.{i}.", f"state_maps.{i + 1}."))

    final = replace(
        stage("final"),
        learning_rate=task.packing_rate if given is None else given,
        total_batch_size=args.total_train_batch_size_for_tune,
        schedule=functools.partial(warm_up_linear_decay, steps=args.warm_up_steps),
    )
    grow = [
        Distillation(stage("grow", f" {k}"), equal_weights(k), embeddings + layers(k))
        for k in range(1, n + 1)
    ]
    plan = [
        Distillation(stage("embeddings"), equal_weights(0), embeddings),
        *grow,
        Distillation(stage("feed-forward"), equal_weights(n), everything, except_for=attention),
        Distillation(stage("heads"), equal_weights(n), everything),
        Distillation(final, tuple(weight / sum(growing) for weight in growing), everything),
    ]
    return [
        replace(part, outputs=part.stage.name in OUTPUTS_IN)
        for part in plan
        if part.stage.num_epochs
    ]


def number_stages(plan: list[Distillation], examples: int) -> list[Distillation]:
    """Tell each stage its number, and how much work the later stages are, in its own steps.

    An example counts as much work as layers run, and half a layer for the rest.
    """
    steps = [part.stage.total_steps(-(-examples // part.stage.total_batch_size)) for part in plan]
    work = [part.stage.total_batch_size * (part.num_layers + 0.5) for part in plan]  # per step
    totals = [count * each for count, each in zip(steps, work, strict=True)]
    return [
        replace(
            part,
            stage=replace(
                part.stage,
                number=i + 1,
                count=len(plan),
                work_after=sum(totals[i + 1 :]) / work[i],
            ),
        )
        for i, part in enumerate(plan)
    ]


def describe_plan(plan: list[Distillation], args: argparse.Namespace, examples: int) -> str:
    """The plan of --passes, one stage per line; `examples` is the number per epoch."""
    a_pass = round(examples / (1 + args.extra_pairs))
    lines = [
        f"--passes={args.passes:g}, each of {a_pass:,} windows or texts; learning rates rise over"
        f" {args.warm_up_steps} steps:"
    ]
    for part in plan:
        stage, share = part.stage, part.num_layers / plan[-1].num_layers
        size = stage.total_batch_size
        steps = stage.total_steps(-(-examples // size))
        lines.append(
            f"  {stage.name}: {steps * size * share / a_pass:.2f} passes, {steps:,} steps of"
            f" {size}, learning rate {stage.learning_rate:g}"
        )
    return "\n".join(lines)


def select_trained(student: nn.Module, part: Distillation) -> None:
    """Let only the stage's parameters train."""
    for name, parameter in student.named_parameters():
        named = any(each in name for each in part.trains)
        parameter.requires_grad_(named and not any(each in name for each in part.except_for))


# ------------------------------------------------------------------------------------------------
# The run


def check_models(
    args: argparse.Namespace, cfg: bert_pack.PackCfg
) -> tuple[OpenedModel, list[OpenedModel], type[Task]]:
    """Open student and teachers, check them and the flags, and find their task.

    Raises:
        UserError: a model does not fit --pack_cfg, --max_seq_length_c, a task, the flags, or the
            other models; or it is quantized.
    """
    length = args.max_seq_length_c
    student = open_model(args.model_student, "--model_student", length, before_merging=True)
    teachers = [open_model(name, "--model_teacher", length) for name in args.model_teacher]
    found: list[type[Task]] = []
    for model in (student, *teachers):
        if model.quantized:
            raise UserError(
                f"{model.flag}: {model.name} is quantized; give the model from before quantization"
            )
        task = next((each for each in TASKS if model.architecture in each.architectures), None)
        if task is None:
            raise UserError(
                f"{model.flag}: {model.name} is {model.architecture or 'no architecture'}, which"
                " belongs to no task that can be distilled; fine-tune it first (train_qa.py,"
                " train_qcemb.py)"
            )
        found.append(task)
    if len(set(found)) > 1:
        raise UserError("--model_student and --model_teacher belong to different tasks")
    for each in teachers:
        if each.packed:
            raise UserError(
                f"--model_teacher: {each.name} is packed; give the model from before packing"
            )
    check_flags(args, found[0])
    check_teacher(teachers[0], student)
    for each in teachers[1:]:  # only their logits are used, so their hidden sizes may differ
        if each.tokenizer.get_vocab() != student.tokenizer.get_vocab():
            raise UserError(
                f"--model_teacher: {each.name} has another vocabulary than --model_student"
            )
    if not student.packed:
        bert_pack.check_pack_cfg(cfg, student.config)
        return student, teachers, found[0]
    if args.pack_start != "teacher":
        raise UserError(
            f"--pack_start: {args.model_student} is packed, its weights stay; leave the flag out"
        )
    differing = [
        f"{key}:{value}, not {key}:{getattr(cfg, key)}"
        for key, value in (student.config.pack_cfg or {}).items()
        if value != getattr(cfg, key)
    ]
    if differing:
        raise UserError(
            f"--pack_cfg: {args.model_student} was packed with {', '.join(differing)}; give the"
            " same values to distill on, or an unpacked model"
        )
    return student, teachers, found[0]


def check_flags(args: argparse.Namespace, task: type[Task]) -> None:
    """Check that the flags of loss and data apply to this task and to a stage that runs.

    Raises:
        UserError: one of them does not.
    """
    for flag in ("eval_extra_contexts", "embedding_weight"):
        if getattr(args, flag) and task is not EmbeddingTask:
            raise UserError(f"--{flag} is for embedding models; leave the flag out")
    for flag in ("logits_weight", "logits_temperature", "extra_texts"):
        if getattr(args, flag) is not None and task is not QaTask:
            raise UserError(f"--{flag} is for question answering; leave the flag out")
    if args.extra_pairs and task is not QaTask:
        raise UserError("--extra_pairs is for question answering; leave the flag out")
    if args.extra_texts and not args.extra_pairs:
        raise UserError("--extra_texts needs --extra_pairs, which says how many windows are drawn")
    where = " and ".join(OUTPUTS_IN)
    learned = set(OUTPUTS_IN).intersection(PASSES if args.stages is None else args.stages)
    for flag in ("embedding_weight", "logits_weight", "logits_temperature"):
        if getattr(args, flag) and not learned:
            raise UserError(f"--{flag} counts in the {where} stage, which --stages leaves out")
    if args.logits_temperature is not None and args.logits_weight == 0:
        raise UserError("--logits_temperature does nothing with --logits_weight=0")
    averaged = task is QaTask and learned and args.logits_weight != 0
    if len(args.model_teacher) > 1 and not averaged:
        raise UserError(
            "--model_teacher: with several models the logits are averaged, which only question"
            f" answering learns, in the {where} stage unless --logits_weight is 0; give one"
        )


def show_sizes(
    task: Task,
    teacher: PreTrainedConfig,
    student: PreTrainedConfig,
    cfg: bert_pack.PackCfg,
    length: int,
) -> dict[str, Any]:
    """Print and return the parameters, operations and FP32 size of teacher and merged student."""
    if not isinstance(student, PackedBertConfig):
        student = bert_pack.packed_config(student, cfg)
    student = copy.deepcopy(student)
    student.merged, student.num_attention_heads = True, cfg.num_attention_heads
    sizes = {}
    for name, config in (("teacher", teacher), ("student", student)):
        parameters, gops = bert_pack.size_of(task.auto_class.from_config, config, length)
        sizes[name] = {"parameters": parameters, "gops": gops, "fp32_bytes": 4 * parameters}
        if is_main_process():
            print(
                f"{name}: {parameters / 1e6:.2f} M parameters, {gops:.2f} GOps at 1 x {length},"
                f" {4 * parameters / 1e6:.1f} MB"
            )
    return sizes


def pack_student(
    args: argparse.Namespace,
    cfg: bert_pack.PackCfg,
    opened: OpenedModel,
    task: Task,
    run: Run,
    anew: bool,
) -> PreTrainedModel:
    """Load the student, and pack it unless it is packed already.

    Args:
        anew: False if a saved state will replace the weights, so that they need no fitting.
    """
    device = run.accelerator.device
    model = load_model(opened, task.auto_class).eval()
    if opened.packed:
        run.say(f"--model_student {args.model_student} is packed: distillation goes on")
        return model.to(device)
    start = args.pack_start if anew else "random"
    if start == "teacher":
        run.say(f"packing: fitting weights to the teacher's states on {SAMPLE_WINDOWS} windows")
    sample = (to_device(batch, device) for batch in task.sample(SAMPLE_WINDOWS))

    def report(layer: int, count: int) -> None:
        run.stop_if_asked()
        run.say(f"packing layer {layer} of {count}")

    bf16 = run.precision == "bf16"
    return bert_pack.pack(model.to(device), cfg, sample, report, start=start, bf16=bf16)


def measure_importance(
    run: Run,
    importance: bert_pack.HeadImportance,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    task: Task,
) -> None:
    """Measure the importance of all heads on a sample, if no earlier stage has measured it."""
    run.say(f"measuring the importance of heads on {SAMPLE_WINDOWS} windows")
    num_layers = student.config.num_hidden_layers
    loss = StateLoss(run, teacher, num_layers, equal_weights(num_layers))
    importance.insert(student)
    for batch in task.sample(SAMPLE_WINDOWS):
        with running():
            with run.accelerator.autocast():
                errors = loss(student, to_device(batch, run.accelerator.device))
            run.accelerator.backward(torch.stack(list(errors.values())).sum(dim=0).mean())
        importance.update(run.accelerator)
    importance.remove()
    student.zero_grad()


def distill(
    run: Run,
    task: Task,
    student: PreTrainedModel,
    teachers: list[PreTrainedModel],
    plan: list[Distillation],
    heads: int,
) -> PreTrainedModel:
    """Train the student through the stages of the plan, from the newest state on.

    Args:
        teachers: the student learns the states of the first.
        heads: heads per layer that stay after pruning.

    Returns:
        the pruned student; by --keep its last weights or the best on dev, of which the start
            is one if no head is pruned.
    """
    best_by = task.best_by if task.args.keep == "best" else None
    accelerator, num_layers = run.accelerator, student.config.num_hidden_layers
    names = [part.stage.name for part in plan]
    position = run.states.position()
    first = names.index(position["stage"]) if position else -1
    pruned_at = names.index("heads") if "heads" in names else 0
    start = run.evaluated("packed")
    if best_by and start and not position and student.config.num_attention_heads == heads:
        # The fitted start has the final shape. Trained weights that are as good come before it.
        score = math.nextafter(start[best_by], -math.inf)
        run.states.keep_if_best(student, "packed", 0, score)
    importance = bert_pack.HeadImportance(student, accelerator.device)
    accelerator.register_for_checkpointing(importance)
    for i, part in enumerate(plan):
        output_loss = task.output_loss(run, teachers) if part.outputs else None
        loss = StateLoss(run, teachers[0], num_layers, part.weights, output_loss)
        if i == pruned_at and student.config.num_attention_heads > heads:
            if i > first and not importance.steps:
                measure_importance(run, importance, student, teachers[0], task)
            # A run that continues from this stage or a later one loads the kept heads' weights.
            student = bert_pack.prune_heads(student, importance.most_important(heads))
        if i < first:
            continue
        select_trained(student, part)
        stage = part.stage
        if student.config.num_attention_heads == heads:  # only the final shape can be kept
            stage = replace(stage, keep=best_by)
        if measures := stage.name == "feed-forward" and pruned_at > i:
            importance.insert(student)
            update = functools.partial(importance.update, accelerator)
            stage = replace(stage, after_backward=update)
        batches = task.batches(stage.total_batch_size)
        evaluation = task.evaluation if part.num_layers in (0, num_layers) else None
        train(run, student, stage, batches, loss, evaluation)
        if measures:
            importance.remove()
    if best_by:
        run.states.load_best(student)
    return student


def grow_seconds(run: Run, stages: list[str]) -> dict[str, float]:
    """Seconds that the grow stages took, and would have taken with all layers running, as in the
    last of them."""
    rows = results.stage_table(run, stages, {})
    grown = [row for row in rows if row["stage"].startswith("grow ") and row["seconds"]]
    if not grown:
        return {}
    pace = grown[-1]["seconds"] / grown[-1]["steps"]
    return {
        "grow_seconds": sum(row["seconds"] for row in grown),
        "grow_seconds_of_all_layers": pace * sum(row["steps"] for row in grown),
    }


def evaluate_saved(
    run: Run, task: Task, teacher: PreTrainedModel, stages: list[str], more: dict[str, Any]
) -> results.Delivery:
    """Evaluate the saved students, unmerged and merged, in FP32: merging rounds otherwise.

    Args:
        more: further entries of metrics.json.
    """
    unmerged = task.evaluation(results.load(run, task, UNMERGED), fp32=True)
    merged = results.load(run, task)
    figures = task.evaluation(merged, fp32=True)
    run.evaluate_once("merged", lambda: figures)
    return results.Delivery(
        figures=figures,
        parameters=count_parameters(merged),
        packed=True,
        others=task.score_in_teacher_index(merged, teacher),
        stages=("teacher", "packed", *stages),
        kept={"unmerged": unmerged, "merged": figures},
        more=more,
        made=f"packed (`{run.args.pack_cfg}`) and distilled on",
    )


def main() -> None:
    args = parse_arguments()

    # Check: find a user's mistakes before anything takes long.
    check_arguments(args)
    cfg = bert_pack.parse_pack_cfg(args.pack_cfg)
    opened, opened_teachers, task_class = check_models(args, cfg)
    task = task_class(args)
    arguments = {**vars(args), **task.hashes()}
    found = check_output_dir(args, arguments)
    if found == "finished":
        return

    # Load the teachers and the data; open the run, on all GPUs.
    use_all_gpus(args.no_cuda)
    sizes = show_sizes(task, opened_teachers[0].config, opened.config, cfg, args.max_seq_length_c)
    accelerator = make_accelerator(args.precision, args.no_cuda, args.seed)
    teachers = [load_teacher(each, task.auto_class, accelerator.device) for each in opened_teachers]
    task.tokenize(opened.tokenizer)
    run = Run(accelerator, args, arguments, found)
    run.say(f"{task.describe()}; {run.machine()}")
    evaluation = task.make_evaluation(run)
    run.evaluate_once("teacher", lambda: evaluation(teachers[0], fp32=True))

    # Prepare the student: bert_pack.fit_to_teacher fits it to the teacher's states.
    anew = run.states.position() is None
    student = pack_student(args, cfg, opened, task, run, anew)
    # The teacher's head reads the states that the student learns.
    cast(PackedBertPreTrainedModel, student).copy_head(teachers[0])
    if anew:
        run.evaluate_once("packed", lambda: evaluation(student, fp32=True))

    # Train stage by stage (plan_stages) by the error of states (tasks.hidden_states.StateLoss) and
    # outputs (Task.output_loss); remove heads by bert_pack.HeadImportance; keep the best weights.
    plan = number_stages(plan_stages(args, cfg.num_hidden_layers, task_class), task.num_examples)
    if args.passes is not None:
        run.say(describe_plan(plan, args, task.num_examples))
    guides = [in_half(each, accelerator) for each in teachers]
    student = distill(run, task, student, guides, plan, cfg.num_attention_heads).eval()

    # Deliver: bert.packed.merge folds the maps away; evaluate what was saved, then export it.
    results.save(run, opened.tokenizer, {UNMERGED: student, "": merge(student)})
    stages = [part.stage.name for part in plan]
    grown = grow_seconds(run, stages)
    delivery = evaluate_saved(run, task, teachers[0], stages, {"sizes": sizes, **grown})
    results.deliver(run, task, opened.tokenizer, delivery)
    if grown:
        run.say(
            f"the grow stages took {grown['grow_seconds']:,.0f} s; with all layers running they"
            f" would have taken {grown['grow_seconds_of_all_layers']:,.0f} s"
        )


if __name__ == "__main__":
    run_main(main)
