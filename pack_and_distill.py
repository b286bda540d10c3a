"""Pack a fine-tuned BERT into a small one and distill it, without labels, stage by stage.

The loss of every stage is the mean squared error between the hidden states of teacher and
student; the last stage adds that of their outputs. The output folder gets the merged student with
its model.onnx, and the student before merging, with which distillation can go on. The same command
again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import functools
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
from bert_pack import HeadImportance, PackCfg
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
    claim_output_dir,
    open_run,
    over_0,
    positive,
    rate,
)
from training.loop import Stage, train, warm_up, warm_up_linear_decay
from training.machine import in_half, make_accelerator, running, use_all_gpus
from training.passes import to_device
from training.run import Run

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a word


STAGES = ("embeddings", "grow", "feed-forward", "heads", "final")
QUARTER = 0.25  # epochs of the first stages, which have little to learn each
OUTPUTS_IN = ("final",)  # stages that learn the teacher's outputs beside its states
# How --passes are spent: shares by stage, and what flags are by default beside it.
PASSES = {"heads": 0.2, "final": 0.8}
PASSES_FLAGS = {
    "warm_up_steps": 40,
    "learning_rate_for_tune": 5e-4,
    "total_train_batch_size_for_tune": 32,
}
SAMPLE_WINDOWS = 256  # on which a packed model's weights are fitted to the teacher's


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(GROUPS, description=__doc__.splitlines()[0])
    add = parser.group(MODELS).add_argument
    add("--model_student", required=True, metavar="MODEL",
        help="fine-tuned BERT to pack: a folder or a hub name; if it is packed already, distill"
        " on from it")  # fmt: skip
    add("--model_teacher", type=comma_separated, required=True, metavar="MODEL",
        help="fine-tuned BERT whose hidden states are the target: a folder or a hub name; of"
        " several, MODEL,MODEL,..., all give the target of the logits, their mean, and the first"
        " that of the states")  # fmt: skip
    add_data_arguments(parser, max_seq_length_q=64)
    add = parser.group(DATA).add_argument
    add("--extra_pairs", type=number(float, 0, 100), default=0.0, metavar="FACTOR",
        help="question answering: add FACTOR x as many windows to each epoch, new ones each time:"
        " questions with another context of their article, unlabelled")  # fmt: skip
    add("--extra_texts", type=comma_separated, metavar="FILE,...",
        help="take half of these windows from plain texts: files, or folders with .txt and .md"
        " files; blank lines part paragraphs (default: none)")  # fmt: skip
    parser.group(DATA).add_argument(
        "--eval_extra_contexts", metavar="FILE",
        help="embeddings: SQuAD JSON whose contexts are searched beside those of the dev data"
        " (default: none)")  # fmt: skip
    add = parser.group(PACKING).add_argument
    add("--pack_cfg", metavar="KEY:VALUE,...",
        default="num_hidden_layers:12,ff_iter_num:4,num_attention_heads:8,hidden_size:512,"
        "pack_emb:1,hidden_act:orig",
        help="the packed model. num_hidden_layers; hidden_size: its width, a multiple of the heads;"
        " num_attention_heads: heads kept in each layer, of their old size; ff_iter_num: layers in"
        " place of the feed-forward, 0 keeps that; pack_emb: 1 shrinks the embedding tables to"
        " hidden_size, 0 keeps them; hidden_act: orig, or an activation of the Transformers"
        " library")  # fmt: skip
    add("--pack_start", choices=tuple(bert_pack.STARTS), default="teacher",
        help="packed weights are first fitted to the teacher, or start at random")  # fmt: skip
    add = parser.group(TRAINING).add_argument
    add("--stages", type=stages, default=",".join(STAGES), metavar="STAGE,...",
        help="stages that run, always in this order")  # fmt: skip
    add("--num_train_epochs", type=over_0, default=16.0, metavar="EPOCHS",
        help="epochs of each of the last three stages, may be a fraction; embeddings takes a"
        " quarter of an epoch, and grow as much for each layer")  # fmt: skip
    add("--passes", type=over_0, metavar="PASSES",
        help="plan stages, epochs, warm-up, learning rates and batch sizes for so many passes over"
        " the training data, in place of --stages and --num_train_epochs; other flags count as"
        " given (default: none)")  # fmt: skip
    add("--max_steps_per_stage", type=positive, metavar="STEPS",
        help="end each stage after so many steps (default: no limit)")  # fmt: skip
    add("--warm_up_steps", type=positive, metavar="STEPS",
        help="steps in which each stage's learning rate rises (default: 1%% of its"
        " steps)")  # fmt: skip
    add("--learning_rate", type=rate, default=5e-4, metavar="RATE",
        help="learning rate of all stages but final, constant after the warm-up")  # fmt: skip
    add("--learning_rate_for_tune", type=rate, default=10e-4, metavar="RATE",
        help="learning rate of the stage final; it falls linearly to 0")  # fmt: skip
    add("--total_train_batch_size_for_tune", type=positive, default=64, metavar="N",
        help="windows or texts in one step of the stage final")  # fmt: skip
    add("--loss_weight_alpha", type=number(float, 0, 100, True), default=1.5, metavar="FACTOR",
        help="in the stage final, the error of hidden state i weighs FACTOR^i")  # fmt: skip
    add("--embedding_weight", type=number(float, 0, 1e6), default=0.0, metavar="WEIGHT",
        help="embeddings: weight of the squared error of the embedding itself in the stage final,"
        " beside that of the states")  # fmt: skip
    add("--logits_weight", type=number(float, 0, 1e6), metavar="WEIGHT",
        help="question answering: weight of the soft cross-entropy of start and end with the"
        " teacher's in the stage final, beside the error of the states"
        f" (default: {LOGITS_WEIGHT:g})")  # fmt: skip
    add("--logits_temperature", type=number(float, 0, 100, True), metavar="T",
        help="question answering: divides the logits of that cross-entropy"
        f" (default: {LOGITS_TEMPERATURE:g})")  # fmt: skip
    add_run_arguments(parser)
    args = parser.parse_args()
    if args.passes is None:
        return args
    parser.set_defaults(stages=None, num_train_epochs=None, **PASSES_FLAGS)
    args = parser.parse_args()
    for flag in ("stages", "num_train_epochs"):
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag}: --passes={args.passes:g} plans that; leave one of them out")
    return args


def comma_separated(text: str) -> list[str]:
    """An argparse type: names with commas between them."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name")
    return found


def stages(text: str) -> list[str]:
    """An argparse type: the stages that a text names, in the order of the method."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in STAGES or names.count(name) > 1:
            what = "given twice" if name in STAGES else "not a stage"
            message = f"{name!r} is {what}; the stages are {','.join(STAGES)}"
            raise argparse.ArgumentTypeError(message)
    return [name for name in STAGES if name in names]


# ------------------------------------------------------------------------------------------------
# The stages


@dataclass(frozen=True)
class Distillation:
    """A stage of distillation: how long, on which states, and what trains.

    Attributes:
        weights: of the errors of states 0..k; only the first k layers run.
        trains: parts of the names of the parameters that train ...
        except_for: ... without these.
        outputs: whether the teacher's outputs are learned as well.
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
    """The stages that run, and their epochs; of `grow`, those of each k = 1..n.

    A pass is as many windows as the training file has, whichever they are: with extra pairs, an
    epoch is 1 + FACTOR passes. A window in a stage that runs k of n layers counts k / n, so those
    of `grow` count (n + 1) / 2 in all, and that of `embeddings` counts nothing.
    """
    early = ("embeddings", "grow")
    if args.passes is None:
        return {name: QUARTER if name in early else args.num_train_epochs for name in args.stages}
    epochs = {name: share * args.passes / (1 + args.extra_pairs) for name, share in PASSES.items()}
    if "grow" in epochs:
        epochs["grow"] /= (num_layers + 1) / 2
    return {**epochs, "embeddings": QUARTER} if "embeddings" in epochs else epochs


def plan_stages(args: argparse.Namespace, num_layers: int) -> list[Distillation]:
    """The stages of --stages or --passes, of a student of so many layers."""
    epochs, n = plan_epochs(args, num_layers), num_layers
    mean = (1 / (n + 1),) * (n + 1)
    growing = [args.loss_weight_alpha**i for i in range(n + 1)]
    stage = Stage(
        name="",
        num_epochs=0.0,
        learning_rate=args.learning_rate,
        total_batch_size=args.total_train_batch_size,
        micro_batch_size=args.per_gpu_train_batch_size,
        schedule=functools.partial(warm_up, steps=args.warm_up_steps),
        max_steps=args.max_steps_per_stage,
        goes_back=True,
    )

    def named(name: str, part: str = "") -> Stage:
        return replace(stage, name=name + part, num_epochs=epochs[name])

    embeddings = ("_map.", "embeddings.LayerNorm.", "state_maps.0.")
    everything = ("_map.", "embeddings.LayerNorm.", "state_maps.", "layers.")
    plan = []
    if "embeddings" in epochs:
        plan.append(Distillation(named("embeddings"), (1.0,), embeddings))
    if "grow" in epochs:
        for k in range(1, n + 1):
            layers = tuple(f"layers.{i}." for i in range(k))
            maps = tuple(f"state_maps.{i + 1}." for i in range(k))
            equal = (1 / (k + 1),) * (k + 1)
            plan.append(Distillation(named("grow", f" {k}"), equal, embeddings + layers + maps))
    if "feed-forward" in epochs:
        attention = (".qkv.", ".attention_output.")
        plan.append(Distillation(named("feed-forward"), mean, everything, except_for=attention))
    if "heads" in epochs:
        plan.append(Distillation(named("heads"), mean, everything))
    if "final" in epochs:
        final = replace(
            named("final"),
            learning_rate=args.learning_rate_for_tune,
            total_batch_size=args.total_train_batch_size_for_tune,
            schedule=functools.partial(warm_up_linear_decay, steps=args.warm_up_steps),
        )
        weights = tuple(weight / sum(growing) for weight in growing)
        plan.append(Distillation(final, weights, everything))
    return [replace(part, outputs=part.stage.name in OUTPUTS_IN) for part in plan]


def number_stages(plan: list[Distillation], examples: int) -> list[Distillation]:
    """Tell each stage its place, and how much work comes after it in steps of its own."""

    def work(part: Distillation) -> float:
        """Of one example: of the layers that run, and something for the rest."""
        return part.num_layers + 0.5

    def total(part: Distillation) -> float:
        steps = part.stage.total_steps(-(-examples // part.stage.total_batch_size))
        return steps * part.stage.total_batch_size * work(part)

    return [
        replace(
            part,
            stage=replace(
                part.stage,
                number=i + 1,
                count=len(plan),
                work_after=sum(map(total, plan[i + 1 :]))
                / (work(part) * part.stage.total_batch_size),
            ),
        )
        for i, part in enumerate(plan)
    ]


def describe_plan(plan: list[Distillation], args: argparse.Namespace, examples: int) -> str:
    """What --passes has come to, a stage a line; `examples` are those of an epoch."""
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
    """Let the parameters train that the stage names."""
    for name, parameter in student.named_parameters():
        named = any(each in name for each in part.trains)
        parameter.requires_grad_(named and not any(each in name for each in part.except_for))


# ------------------------------------------------------------------------------------------------
# The run


def check_models(
    args: argparse.Namespace, cfg: PackCfg
) -> tuple[OpenedModel, list[OpenedModel], type[Task]]:
    """Student and teachers, and the task of all.

    Raises:
        UserError: they do not fit --pack_cfg, --max_seq_length_c, a task, or each other; one of
            them is quantized.
    """
    length = args.max_seq_length_c
    student = open_model(args.model_student, "--model_student", length, before_merging=True)
    teachers = [open_model(name, "--model_teacher", length) for name in args.model_teacher]
    found: list[type[Task]] = []
    for model in (student, *teachers):
        if model.quantized:
            raise UserError(
                f"{model.flag}: {model.name} is quantized; give the model that it was made of"
            )
        task = next((each for each in TASKS if model.architecture in each.architectures), None)
        if task is None:
            raise UserError(
                f"{model.flag}: {model.name} is {model.architecture or 'no architecture'}, a model"
                " of no task that can be distilled; fine-tune it first (train_qa.py,"
                " train_qcemb.py)"
            )
        found.append(task)
    if len(set(found)) > 1:
        raise UserError("--model_student and --model_teacher are of different tasks")
    for each in teachers:
        if each.packed:
            raise UserError(f"--model_teacher: {each.name} is packed; give the model it is of")
    check_flags(args, found[0])
    check_teacher(teachers[0], student)
    for each in teachers[1:]:  # only their logits are read: their hidden sizes are their own
        if each.tokenizer.get_vocab() != student.tokenizer.get_vocab():
            raise UserError(
                f"--model_teacher: {each.name} has another vocabulary than --model_student"
            )
    if not student.packed:
        bert_pack.check_pack_cfg(cfg, student.config)
        return student, teachers, found[0]
    if args.pack_start != "teacher":
        raise UserError(
            f"--pack_start: {args.model_student} is packed, its weights stay; leave it out"
        )
    differing = [
        f"{key}:{value}, not {key}:{getattr(cfg, key)}"
        for key, value in (student.config.pack_cfg or {}).items()
        if value != getattr(cfg, key)
    ]
    if differing:
        raise UserError(
            f"--pack_cfg: {args.model_student} was packed with {', '.join(differing)}; give what it"
            " was packed with to distill on, or an unpacked model"
        )
    return student, teachers, found[0]


def check_flags(args: argparse.Namespace, task: type[Task]) -> None:
    """Check that flags of the loss and the data are for this task, and count in some stage.

    Raises:
        UserError: one is not, or does not.
    """
    for flag in ("eval_extra_contexts", "embedding_weight"):
        if getattr(args, flag) and task is not EmbeddingTask:
            raise UserError(f"--{flag} is for embedding models; leave it out")
    for flag in ("logits_weight", "logits_temperature", "extra_texts"):
        if getattr(args, flag) is not None and task is not QaTask:
            raise UserError(f"--{flag} is for question answering; leave it out")
    if args.extra_pairs and task is not QaTask:
        raise UserError("--extra_pairs is for question answering; leave it out")
    if args.extra_texts and not args.extra_pairs:
        raise UserError("--extra_texts needs --extra_pairs, which tells how many windows are drawn")
    chosen = PASSES if args.stages is None else args.stages
    learned = set(OUTPUTS_IN).intersection(chosen)
    if not learned:
        for flag in ("embedding_weight", "logits_weight", "logits_temperature"):
            if getattr(args, flag):
                where = " and ".join(OUTPUTS_IN)
                raise UserError(f"--{flag} counts in the {where} stage, which --stages leaves out")
    if args.logits_temperature is not None and args.logits_weight == 0:
        raise UserError("--logits_temperature does nothing with --logits_weight=0; leave it out")
    averaged = task is QaTask and learned and args.logits_weight != 0
    if len(args.model_teacher) > 1 and not averaged:
        raise UserError(
            "--model_teacher: of several models the logits are averaged, which only question"
            f" answering learns, in the {' and '.join(OUTPUTS_IN)} stage with a --logits_weight"
            " over 0; give one"
        )


def show_sizes(
    task: Task, teacher: PreTrainedConfig, student: PreTrainedConfig, cfg: PackCfg, length: int
) -> dict[str, Any]:
    """Print and return parameters, operations and FP32 size of teacher and merged student."""
    if not isinstance(student, PackedBertConfig):
        student = bert_pack.packed_config(student, cfg)
    student = copy.deepcopy(student)
    student.merged, student.num_attention_heads = True, cfg.num_attention_heads
    sizes = {}
    for name, config in (("teacher", teacher), ("student", student)):
        parameters, gops = bert_pack.size_of(task.auto_class.from_config, config, length)
        sizes[name] = {"parameters": parameters, "gops": gops, "fp32_bytes": 4 * parameters}
    if is_main_process():
        for name, size in sizes.items():
            print(
                f"{name}: {size['parameters'] / 1e6:.2f} M parameters,"
                f" {size['gops']:.2f} GOps at 1 x {length}, {size['fp32_bytes'] / 1e6:.1f} MB"
            )
    return sizes


def pack_student(
    args: argparse.Namespace, cfg: PackCfg, opened: OpenedModel, task: Task, run: Run, anew: bool
) -> PreTrainedModel:
    """The student as distillation begins: packed, or loaded if it is so already.

    Args:
        anew: False where a saved state will give the weights, whatever they start as.
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
    importance: HeadImportance,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    task: Task,
) -> None:
    """Measure the importance of all heads on a sample, where no stage before has done so."""
    run.say(f"measuring the importance of heads on {SAMPLE_WINDOWS} windows")
    num_layers = student.config.num_hidden_layers
    mean = (1 / (num_layers + 1),) * (num_layers + 1)
    loss = StateLoss(run, teacher, num_layers, mean)
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
    """Train the student through the stages of the plan, from where the newest state is.

    Args:
        teachers: the first is the one whose states are learned.

    Returns:
        the student with `heads` heads a layer, as --keep says the last or the best on dev.
    """
    best_by = task.best_by if task.args.keep == "best" else None
    accelerator, num_layers = run.accelerator, student.config.num_hidden_layers
    names = [part.stage.name for part in plan]
    position = run.states.position()
    first = names.index(position["stage"]) if position else -1
    pruned_at = names.index("heads") if "heads" in names else 0
    importance = HeadImportance(student, accelerator.device)
    accelerator.register_for_checkpointing(importance)
    for i, part in enumerate(plan):
        output_loss = task.output_loss(run, teachers) if part.outputs else None
        loss = StateLoss(run, teachers[0], num_layers, part.weights, output_loss)
        if i == pruned_at and student.config.num_attention_heads > heads:
            if i > first and not importance.steps:
                measure_importance(run, importance, student, teachers[0], task)
            # A run that goes on from here or later takes the weights of its heads from its state.
            student = bert_pack.prune_heads(student, importance.most_important(heads))
        if i < first:
            continue
        select_trained(student, part)
        measures = part.stage.name == "feed-forward" and pruned_at > i
        if measures:
            importance.insert(student)
        # Only what has its final shape can be kept.
        final = student.config.num_attention_heads == heads
        train(
            run,
            student,
            part.stage,
            task.batches(part.stage.total_batch_size),
            loss,
            task.evaluation if part.num_layers in (0, num_layers) else None,
            after_backward=functools.partial(importance.update, accelerator) if measures else None,
            keep=best_by if final else None,
        )
        if measures:
            importance.remove()
    if best_by:
        run.states.load_best(student)
    return student


def grow_seconds(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the grow stages took, and would have at the pace of the last, which runs all layers."""
    grown = [row for row in rows if row["stage"].startswith("grow ") and row["seconds"]]
    if not grown:
        return {}
    pace = grown[-1]["seconds"] / grown[-1]["steps"]
    return {
        "grow_seconds": sum(row["seconds"] for row in grown),
        "grow_seconds_of_all_layers": pace * sum(row["steps"] for row in grown),
    }


def main() -> None:
    args = parse_arguments()
    check_arguments(args)

    # All that a user may have got wrong comes before anything that takes long.
    cfg = bert_pack.parse_pack_cfg(args.pack_cfg)
    opened, opened_teachers, task_class = check_models(args, cfg)
    task = task_class(args)
    arguments = {**vars(args), **task.hashes()}
    found = claim_output_dir(args, arguments)
    if found == "finished":
        return
    use_all_gpus(args.no_cuda)

    sizes = show_sizes(task, opened_teachers[0].config, opened.config, cfg, args.max_seq_length_c)
    accelerator = make_accelerator(args.precision, args.no_cuda, args.seed)
    teacher, *others = (
        load_teacher(each, task.auto_class, accelerator.device) for each in opened_teachers
    )
    task.tokenize(opened.tokenizer)
    run = open_run(accelerator, args, arguments, found)
    run.say(f"{task.describe()}; {run.machine()}")
    evaluation = task.make_evaluation(run)
    run.evaluate_once("teacher", lambda: evaluation(teacher, fp32=True))
    anew = run.states.position() is None
    student = pack_student(args, cfg, opened, task, run, anew)
    # The head reads the states that the student learns.
    cast(PackedBertPreTrainedModel, student).copy_head(teacher)
    if anew:
        run.evaluate_once("packed", lambda: evaluation(student, fp32=True))
    plan = plan_stages(args, cfg.num_hidden_layers)
    plan = number_stages(plan, task.num_examples)
    if args.passes is not None:
        run.say(describe_plan(plan, args, task.num_examples))
    guides = [in_half(each, accelerator) for each in (teacher, *others)]
    student = distill(run, task, student, guides, plan, cfg.num_attention_heads).eval()

    results.save(run, opened.tokenizer, {UNMERGED: student, "": merge(student)})
    # In FP32, since folding maps away rounds otherwise.
    unmerged = evaluation(results.load(run, task, UNMERGED), fp32=True)
    merged = results.load(run, task)
    figures = evaluation(merged, fp32=True)
    run.evaluate_once("merged", lambda: figures)
    names = ("teacher", "packed", *(part.stage.name for part in plan))
    grown = grow_seconds(results.stage_table(run, names, {}))
    delivery = results.Delivery(
        figures=figures,
        parameters=count_parameters(merged),
        packed=True,
        others=task.score_in_teacher_index(merged, teacher),
        stages=names,
        kept={"unmerged": unmerged, "merged": figures},
        more={"sizes": sizes, **grown},
        made=f"packed (`{args.pack_cfg}`) and distilled on",
    )
    del merged  # the export loads it anew
    results.deliver(run, task, opened.tokenizer, delivery)
    if grown:
        run.say(
            f"the grow stages took {grown['grow_seconds']:,.0f} s; with all layers running they"
            f" would have taken {grown['grow_seconds_of_all_layers']:,.0f} s"
        )


if __name__ == "__main__":
    run_main(main)
