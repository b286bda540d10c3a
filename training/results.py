"""The results of a finished run: its folder, metrics.json, curves.png, the model card."""

from __future__ import annotations

import argparse
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bert.attention import fuse_attention
from bert.model_folder import AutoClass, load_model, open_model, save_model, save_state_maps
from deploy import onnx_file, timing
from deploy.cpu import this_cpu
from deploy.onnx_check import Check
from int8.quantizers import how_it_loads
from training.run import Run, read_log, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # a type only: importing it takes half a second

# The packages on whose versions figures may depend.
PACKAGES = ("torch", "transformers", "accelerate", "onnx", "onnxruntime", "numpy")
STYLES, COLORS = ("-", "--", "-.", ":"), 10  # curves vary in colour first, then in dashes
# The entries of a training record that are not losses.
NO_LOSS = (
    *("stage", "step", "epoch", "learning_rate", "examples_per_second", "tokens_per_second"),
    *("padding", "seconds", "seconds_left", "seconds_left_all"),
)


@dataclass(frozen=True)
class TaskCard:
    """The task's part of the model card.

    Attributes:
        title: the purpose of its models.
        tag: the hub's name for that purpose, its pipeline_tag.
        rows: from the name of a figure to the figure.
        outputs: a sentence on the outputs of the exported file.
        inputs: how a text becomes the file's inputs.
    """

    title: str
    tag: str
    rows: Mapping[str, object]
    outputs: str
    inputs: str


class Deliverable(Protocol):
    """The members of a task that write results; tasks.task.Task documents them."""

    args: argparse.Namespace
    auto_class: ClassVar[AutoClass]
    score_names: ClassVar[dict[str, str]]

    def counts(self) -> dict[str, int]: ...
    def write_answers(self) -> None: ...
    def write_reader(
        self, tokenizer: PreTrainedTokenizerFast, figures: Mapping[str, float]
    ) -> None: ...
    def export(self) -> Check: ...
    def card(self, figures: Mapping[str, float]) -> TaskCard: ...


@dataclass(frozen=True)
class Delivery:
    """The results of a run, measured on models that `load` has loaded.

    Attributes:
        figures: figures of the deployed model in FP32.
        parameters: number of the deployed model's weights.
        packed: whether the deployed model is packed.
        others: from a name to further figures.
        stages: the rows of `stage_table`; empty for no table.
        kept: from the name of a saved model to its figures, for the table.
        more: further entries of metrics.json.
        made: how the model was made, for its card, e.g. "fine-tuned on".
    """

    figures: dict[str, float]
    parameters: int
    packed: bool
    others: dict[str, dict[str, float]]
    stages: Sequence[str]
    kept: dict[str, dict[str, float]]
    more: dict[str, object]
    made: str


def save(
    run: Run,
    tokenizer: PreTrainedTokenizerFast,
    models: dict[str, PreTrainedModel],
    state_maps: nn.ModuleList | None = None,
) -> None:
    """Save the trained models and free their memory: all figures are those of `load`ed models.

    Args:
        models: from a folder in the output folder to its model; "" is the deployed model. Their
            weights are gone afterwards.
        state_maps: the maps with which a merged model learned hidden states, or None.
    """
    if run.main:
        with run.writing_results():
            for name, model in models.items():
                save_model(model.cpu(), tokenizer, os.path.join(run.output_dir, name))
            if state_maps is not None:
                save_state_maps(state_maps, run.output_dir)
    run.accelerator.wait_for_everyone()
    for model in models.values():
        model.to_empty(device="meta")


def load(run: Run, task: Deliverable, name: str = "") -> PreTrainedModel:
    """Load a model that `save` has saved, as a user would, ready for evaluation."""
    folder = os.path.join(run.output_dir, name)
    model = load_model(open_model(folder, "--output_dir"), task.auto_class, quiet=True)
    return fuse_attention(model).eval().to(run.accelerator.device)


def deliver(
    run: Run, task: Deliverable, tokenizer: PreTrainedTokenizerFast, result: Delivery
) -> None:
    """Export, check and describe the saved model, and end the run.

    Raises:
        UserError: the exported file failed its check; everything else is written by then.
    """
    folder = run.output_dir
    if run.main:
        with run.writing_results():
            task.write_answers()
            task.write_reader(tokenizer, result.figures)
            check = task.export()
            run.stop_if_asked()
            table = stage_table(run, result.stages, {**result.kept, **result.others})
            metrics = {
                **result.figures,
                **describe_run(run),
                "counts": task.counts(),
                "parameters": result.parameters,
                **onnx_file.describe_check(check, folder),
                **result.others,
                **result.more,
                **({"stages": table} if result.stages else {}),
            }
            draw_curves(folder, task.score_names)
            write_card(folder, task, result, metrics)
            student, length = task.args.model_student, task.args.max_seq_length_c
            metrics["deployed"] = timing.deliver(folder, student, length)  # adds to the card too
            run.finish(metrics)
            if result.stages:
                show_table(table, task.score_names)
        onnx_file.require(check, folder)
    run.accelerator.end_training()
    run.say(f"{folder}: {summary(result.figures)}; model.onnx checked")


def describe_run(run: Run) -> dict[str, object]:
    """The entries of metrics.json on times, machine, arguments and versions."""
    seconds: dict[str, float] = {}
    for record in read_log(run.output_dir):
        stage = record["stage"]
        seconds[stage] = max(seconds.get(stage, 0.0), record.get("seconds", 0.0))
    device, gpu = run.accelerator.device, None
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_reserved(device)
        gpu = {"name": name, "peak_bytes": peak}
    return {
        "train_seconds": sum(seconds.values()),
        "total_seconds": time.time() - run.started,
        "precision": run.precision,
        "evaluated_in": "fp32",
        "processes": run.accelerator.num_processes,
        "device": device.type,
        "cpu": asdict(this_cpu()),
        "gpu": gpu,
        "arguments": run.arguments,
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in PACKAGES},
    }


def stage_table(
    run: Run, names: Sequence[str], others: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """One row per stage: its figures, steps, seconds and last loss; then the rows of `others`."""
    rows, log = [], read_log(run.output_dir)
    for name in names:
        records = [record for record in log if record["stage"] == name]
        if records:
            rows.append(
                {
                    "stage": name,
                    **(run.evaluated(name) or {}),
                    "seconds": max(r.get("seconds", 0.0) for r in records),
                    "steps": max(r["step"] for r in records),
                    "loss": next((r["loss"] for r in reversed(records) if "loss" in r), None),
                }
            )
    return rows + [{"stage": name, **figures} for name, figures in others.items()]


def show_table(rows: list[dict[str, Any]], score_names: dict[str, str]) -> None:
    """Print the rows of `stage_table`; score_names as in `draw_curves`."""
    scores = "".join(f"{name:>14}" for name in score_names.values())
    print(f"{'':14}{scores}{'loss':>10}{'steps':>8}{'s a step':>10}")
    for row in rows:
        cells = [f"{row['stage']:14}"]
        for key in score_names:
            cells.append(f"{row[key]:14.2f}" if key in row else " " * 14)
        loss, steps = row.get("loss"), row.get("steps", 0)
        cells.append(f"{loss:10.4f}" if loss is not None else " " * 10)
        if steps:
            cells.append(f"{steps:8}{row['seconds'] / steps:10.3f}")
        print("".join(cells))


def draw_curves(output_dir: str, score_names: dict[str, str]) -> None:
    """Draw losses, learning rate and scores of metrics.jsonl over the steps into curves.png.

    The steps of several stages follow one another. A stage "teacher" has only scores, drawn as
    horizontal lines. A run that trains nothing gets no file.

    Args:
        score_names: from a figure of evaluations to its label, e.g. {"f1": "F1"}.
    """
    records, borders = _one_after_another(read_log(output_dir))
    if not any("loss" in record for record in records):
        return
    import matplotlib  # takes half a second, and only here

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # after the choice of a backend

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    top.set(title=os.path.basename(os.path.abspath(output_dir)))
    _draw_losses(top, [record for record in records if "evaluation" not in record])
    for border, stage in borders if len(borders) > 1 else []:
        for axes in (top, bottom):
            axes.axvline(border, color="grey", linewidth=0.5)
        top.annotate(f" {stage}", (border, 0), rotation=90, fontsize=7, va="bottom")
    _draw_scores(bottom, [record for record in records if "evaluation" in record], score_names)
    figure.savefig(os.path.join(output_dir, "curves.png"), dpi=110)
    plt.close(figure)


def _draw_losses(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Draw all logged losses, of which a stage may lack some, and the learning rate."""
    steps = [record["step"] for record in records]
    losses = list(dict.fromkeys(key for record in records for key in record if key not in NO_LOSS))
    marker = "." if len(steps) < 30 else None
    for i, name in enumerate(losses if len(losses) > 2 else ["loss"]):  # one part is its own sum
        values = [record.get(name, math.nan) for record in records]
        line = "-" if name == "loss" else STYLES[i // COLORS % len(STYLES)]
        color = "black" if name == "loss" else f"C{i % COLORS}"
        axes.plot(steps, values, line, label=name, linewidth=1, marker=marker, color=color)
    axes.set(ylabel="loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize="small", ncols=1 + len(losses) // 8)
    rate = axes.twinx()
    rate.plot(steps, [record["learning_rate"] for record in records], color="grey", linestyle=":")
    rate.set(ylabel="learning rate (dotted)", ylim=(0, None))


def _draw_scores(axes: Axes, records: list[dict[str, Any]], names: dict[str, str]) -> None:
    """Draw the figures of evaluations; the teacher's as horizontal lines."""
    teachers = [record for record in records if record["stage"] == "teacher"]
    others = [record for record in records if record["stage"] != "teacher"]
    for key, label in names.items():
        points = [(record["step"], record[key]) for record in others if key in record]
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=label)
        for record in teachers:
            color = line.get_color()
            axes.axhline(record[key], color=color, linestyle="--", label=f"teacher's {label}")
        for step, value in points:
            axes.annotate(f"{value:.1f}", (step, value), textcoords="offset points", xytext=(0, 6))
    axes.set(xlabel="optimisation step", ylabel="score on dev, %")
    axes.margins(y=0.2)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _one_after_another(
    records: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """Count the steps of records over all stages; and the first step and name of each stage
    that trains."""
    offset, last, stage, counted = 0, 0, "", []
    borders: list[tuple[int, str]] = []
    for record in records:
        if record["stage"] != stage:
            offset, stage = last, record["stage"]
            if "loss" in record:
                borders.append((offset, stage))
        last = max(last, offset + record["step"])
        counted.append({**record, "step": offset + record["step"]})
    return counted, borders


def write_card(
    folder: str, task: Deliverable, result: Delivery, metrics: Mapping[str, object]
) -> None:
    """Fill the template card.md with the metrics, and write it as README.md, the model card."""
    part, script = task.card(result.figures), os.path.basename(sys.argv[0])
    tags = ["bert", part.tag, "squad", "onnx", "openvino"]
    card = ModelCard.from_template(
        ModelCardData(pipeline_tag=part.tag, library_name="transformers", tags=tags),
        template_path=os.path.join(os.path.dirname(__file__), "card.md"),  # for jinja2
        folder=folder,
        name=os.path.basename(os.path.abspath(folder)),
        task=part,
        auto_class=task.auto_class,
        packed=result.packed,
        made=result.made,
        train_file=os.path.basename(task.args.squad_train_data),
        script=script,
        command=command_line(script, vars(task.args)),
        int8_use=how_it_loads(folder, script) if "int8" in metrics else "",
        metrics=metrics,
    )
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(f"{card}\n")


def command_line(script: str, arguments: Mapping[str, object]) -> str:
    """The command of a run for a shell, one flag per line."""
    flags = []
    for key, value in arguments.items():
        # 0 is a value. "nncf" and the hashes are no flags.
        if value is None or value is False or key == "nncf" or key.startswith("sha256"):
            continue
        text = ",".join(value) if isinstance(value, list) else value
        flags.append(f"--{key}" if value is True else shlex.quote(f"--{key}={text}"))
    return " \\\n  ".join([f"python3 {script}", *flags])
