"""What a finished run tells people: curves.png, the model card, the versions it ran with."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, ClassVar, Protocol, TypedDict, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bert.model_folder import count_parameters, save_model, save_state_maps
from deploy import onnx_file
from deploy.cpu import this_cpu
from deploy.onnx_check import Check
from training.run import Run, read_log, summary

PACKAGES = ("torch", "transformers", "accelerate", "onnx", "onnxruntime", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures may depend on."""
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in PACKAGES}}


class OnnxFigures(TypedDict):
    """What metrics.json tells of the check of model.onnx."""

    passed: bool
    difference: float | None


class Metrics(TypedDict, total=False):
    """What a model card reads of metrics.json; each task has figures of its own."""

    f1: float
    exact_match: float
    top_1: float
    top_5: float
    mrr: float
    arguments: Mapping[str, object]
    counts: dict[str, int]
    parameters: int
    train_seconds: float
    precision: str
    int8: object
    onnx_check: OnnxFigures


class Deliverable(Protocol):
    """What a task does when results are written; tasks.task.Task has the meanings."""

    args: argparse.Namespace
    score_names: ClassVar[dict[str, str]]

    def counts(self) -> dict[str, int]: ...
    def write_answers(self) -> None: ...
    def write_reader(
        self, tokenizer: PreTrainedTokenizerFast, figures: Mapping[str, float]
    ) -> None: ...
    def export(self) -> Check: ...
    def write_card(self, metrics: Metrics, script: str, made: str) -> None: ...


@dataclass(frozen=True)
class Delivery:
    """What a run has come to.

    Attributes:
        models: what is saved, by folder in the output folder; "" is what is deployed.
        figures: of that model, in FP32.
        others: further figures, by what they are of.
        stages: of the run, in the table of what each has come to; empty for no table.
        kept: figures of what is left of them, by name.
        more: further entries of metrics.json.
        made: what became of the model, for its card, e.g. "fine-tuned on".
        state_maps: of a merged model that was taught, or None.
    """

    models: dict[str, PreTrainedModel]
    figures: dict[str, float]
    others: dict[str, dict[str, float]]
    stages: Sequence[str]
    kept: dict[str, dict[str, float]]
    more: dict[str, object]
    made: str
    state_maps: nn.ModuleList | None = None


def deliver(
    run: Run, task: Deliverable, tokenizer: PreTrainedTokenizerFast, result: Delivery
) -> None:
    """Save, export, check and describe what a run has come to, and end the run.

    Raises:
        UserError: the exported file has not passed its check; all else is written by then.
    """
    folder = run.output_dir
    if run.main:
        with run.writing_results():
            for name, model in result.models.items():
                save_model(model.cpu(), tokenizer, os.path.join(folder, name))
            if result.state_maps is not None:
                save_state_maps(result.state_maps, folder)
            task.write_answers()
            task.write_reader(tokenizer, result.figures)
            check = task.export()
            run.stop_if_asked()
            file = onnx_file.describe_check(check, folder)
            sizes = result.more.get("sizes")
            if isinstance(sizes, dict):
                sizes["student"]["onnx_bytes"] = file["onnx_bytes"]
            table = stage_table(run, result.stages, {**result.kept, **result.others})
            entries = {
                **result.figures,
                **describe_run(run),
                "counts": task.counts(),
                "parameters": count_parameters(result.models[""]),
                **file,
                **result.others,
                **result.more,
                **({"stages": table} if result.stages else {}),
            }
            metrics = cast(Metrics, entries)  # and figures of any name
            draw_curves(folder, task.score_names)
            task.write_card(metrics, os.path.basename(sys.argv[0]), result.made)
            run.finish(metrics)
            if result.stages:
                show_table(table, task.score_names)
        onnx_file.require(check, folder)
    run.accelerator.end_training()
    run.say(f"{folder}: {summary(result.figures)}; model.onnx checked")


def describe_run(run: Run) -> dict[str, object]:
    """What metrics.json tells of any run: its times, its machine, its arguments, the versions."""
    seconds: dict[str, float] = {}
    for record in read_log(run.output_dir):
        seconds[record["stage"]] = max(
            seconds.get(record["stage"], 0.0), record.get("seconds", 0.0)
        )
    return {
        "train_seconds": sum(seconds.values()),
        "total_seconds": time.time() - run.started,
        "precision": run.precision,  # of training
        "evaluated_in": "fp32",
        "processes": run.accelerator.num_processes,
        "device": run.accelerator.device.type,
        "cpu": asdict(this_cpu()),
        "gpu": describe_gpu(run),
        "arguments": run.arguments,
        "versions": versions(),
    }


def describe_gpu(run: Run) -> dict[str, str | int] | None:
    """The GPU of this process and the most memory that it took, or None on a CPU."""
    device = run.accelerator.device
    if device.type != "cuda":
        return None
    return {
        "name": torch.cuda.get_device_name(device),
        "peak_bytes": torch.cuda.max_memory_reserved(device),
    }


def stage_table(
    run: Run, names: Sequence[str], others: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """What each stage came to: its figures, its steps, its seconds; and figures of `others`."""
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
    """Print `stage_table`; score_names as in `draw_curves`."""
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
    """Draw loss, learning rate and scores of metrics.jsonl over the steps into curves.png.

    The steps of several stages follow one another. A "teacher" among them, which has scores alone,
    is a horizontal line.

    A run that trains nothing has none.

    Args:
        score_names: what to call the figures of evaluations, e.g. {"f1": "F1"}.
    """
    if not any("loss" in record for record in read_log(output_dir)):
        return
    import matplotlib  # half a second, which only the end of a run needs

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # for the backend that is chosen by now

    records, borders = _one_after_another(read_log(output_dir))
    training = [record for record in records if "evaluation" not in record]
    evaluations = [record for record in records if "evaluation" in record]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    steps = [record["step"] for record in training]
    losses = [key for key in training[0] if key.endswith("loss") or key in LOSSES] if steps else []
    for name in losses if len(losses) > 2 else ["loss"]:
        values = [record[name] for record in training]
        top.plot(steps, values, label=name, linewidth=1, marker="." if len(steps) < 30 else None)
    top.set(ylabel="loss", title=os.path.basename(os.path.abspath(output_dir)))
    top.set_ylim(bottom=0)
    top.grid(alpha=0.3)
    rate = top.twinx()
    rate.plot(steps, [record["learning_rate"] for record in training], color="grey", linestyle=":")
    rate.set(ylabel="learning rate (dotted)", ylim=(0, None))
    top.legend(loc="upper right")
    for border, stage in borders if len(borders) > 1 else []:
        for axes in (top, bottom):
            axes.axvline(border, color="grey", linewidth=0.5)
        top.annotate(f" {stage}", (border, 0), rotation=90, fontsize=7, va="bottom")
    for key, label in score_names.items():
        points = [
            (record["step"], record[key])
            for record in evaluations
            if key in record and record["stage"] != "teacher"
        ]
        (line,) = bottom.plot(*zip(*points, strict=True), marker="o", label=label)
        for record in evaluations:
            if record["stage"] == "teacher":
                color = line.get_color()
                bottom.axhline(record[key], color=color, linestyle="--", label=f"teacher's {label}")
        for step, value in points:
            bottom.annotate(
                f"{value:.1f}", (step, value), textcoords="offset points", xytext=(0, 6)
            )
    bottom.set(xlabel="optimisation step", ylabel="score on dev, %")
    bottom.margins(y=0.2)
    bottom.grid(alpha=0.3)
    bottom.legend(loc="lower right")
    figure.savefig(os.path.join(output_dir, "curves.png"), dpi=110)
    plt.close(figure)


def _one_after_another(
    records: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """Records with steps counted over all stages, and where each stage that trains begins."""
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


LOSSES = ("answer", "distillation", "hidden_states")


def write_qa_card(output_dir: str, metrics: Metrics, script: str, made: str) -> None:
    """Write README.md, the model card of a QA model, from what metrics.json will hold.

    Args:
        script: that ran.
        made: what became of the model there, e.g. "fine-tuned on".
    """
    arguments, counts = metrics["arguments"], metrics["counts"]
    length = arguments["max_seq_length_c"]
    dev = os.path.basename(str(arguments["squad_dev_data"]))
    _write_card(
        output_dir,
        metrics,
        script,
        f"Extractive question answering: `{arguments['model_student']}` {made}",
        "question-answering",
        {
            f"F1 on `{dev}`": f"{metrics['f1']:.2f}",
            "exact match": f"{metrics['exact_match']:.2f}",
            "dev questions": counts["dev_questions"],
            "training questions": counts["train_questions"],
        },
        "outputs\n`output_s` and `output_e`, the logits of the answer's first and last token,"
        f" float32 [1, {length}].",
        "The input is `[CLS] question [SEP] context [SEP]`, token types 0 and 1; questions are cut"
        f"\nto {arguments['max_seq_length_q']} tokens, and contexts that do not fit are covered by"
        f" windows {arguments['doc_stride']} tokens apart.",
    )


def write_emb_card(output_dir: str, metrics: Metrics, script: str, made: str) -> None:
    """Write README.md, the model card of an embedding model; arguments as of `write_qa_card`."""
    arguments, counts = metrics["arguments"], metrics["counts"]
    contexts = counts["dev_contexts"] + counts["extra_contexts"]
    dev = os.path.basename(str(arguments["squad_dev_data"]))
    _write_card(
        output_dir,
        metrics,
        script,
        f"Embeddings of questions and contexts: `{arguments['model_student']}` {made}",
        "sentence-similarity",
        {
            f"own context nearest, `{dev}`": f"{metrics['top_1']:.2f}%",
            "among the 5 nearest": f"{metrics['top_5']:.2f}%",
            "mean reciprocal rank": f"{metrics['mrr']:.2f}%",
            "dev questions": counts["dev_questions"],
            "contexts searched": contexts,
            "training pairs": counts["train_pairs"],
        },
        "output\n`embedding`, float32 [1, H].",
        "The input is `[CLS] text [SEP]`, token types 0; questions are cut to"
        f" {arguments['max_seq_length_q']} tokens in all,\ncontexts to"
        f" {arguments['max_seq_length_c']}. The right context is the one whose embedding is nearest"
        " (L2) to the question's.",
    )


def command_line(script: str, arguments: Mapping[str, object]) -> str:
    """The command of a run, a flag a line, for a shell."""
    flags = []
    for key, value in arguments.items():
        # 0 is a value. What is not a flag tells a run from others all the same.
        if value is None or value is False or key == "nncf" or key.startswith("sha256"):
            continue
        text = ",".join(value) if isinstance(value, list) else value
        flags.append(f"--{key}" if value is True else shlex.quote(f"--{key}={text}"))
    return " \\\n  ".join([f"python3 {script}", *flags])


def _write_card(
    output_dir: str,
    metrics: Metrics,
    script: str,
    what: str,
    tag: str,
    figures: Mapping[str, object],
    outputs: str,
    inputs: str,
) -> None:
    """Write README.md: what every model card tells, and what a task adds to it."""
    arguments = metrics["arguments"]
    name = os.path.basename(os.path.abspath(output_dir))
    rows = "\n".join(f"| {key} | {value} |" for key, value in figures.items())
    text = f"""---
pipeline_tag: {tag}
library_name: transformers
tags: [bert, {tag}, squad, onnx, openvino]
---
# {name}

{what}
`{os.path.basename(str(arguments["squad_train_data"]))}`.

| | |
|---|---|
{rows}
| parameters | {metrics["parameters"] / 1e6:.2f} M |
| training time | {metrics["train_seconds"] / 60:.1f} min |
| precision of training | {metrics["precision"]} |

## Use
{_use(output_dir, metrics, script)}
{_file(metrics)}. Inputs
`input_ids`, `attention_mask`, `token_type_ids`, `position_ids`, int64
[1, {arguments["max_seq_length_c"]}]; {outputs}
On the windows it was checked on it differs from the PyTorch model by {_difference(metrics)}. In
OpenVINO it can be reshaped to other batch sizes and lengths.

{inputs}

## Training
```
{command_line(script, arguments)}
```
"""
    with open(os.path.join(output_dir, "README.md"), "w", encoding="utf-8") as file:
        file.write(text)


def _use(output_dir: str, metrics: Metrics, script: str) -> str:
    """How to load the checkpoint."""
    if "int8" in metrics:
        return (
            "`model.safetensors` holds the weights in FP32, `quantizers.json` and"
            " `quantizers.safetensors`\nwhat rounds them and the activations to INT8 in training:"
            f" `{script} --model_student=<this folder>`\nloads all of it."
        )
    with open(os.path.join(output_dir, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    packed = config["model_type"] == "packed_bert"
    registration = "import bert_pack  # which makes packed models known\n" if packed else ""
    name = "AutoModelForQuestionAnswering"
    if "Embedding" in config["architectures"][0]:
        name, registration = (
            "AutoModelForEmbedding",
            "from bert.embedding import AutoModelForEmbedding\n",
        )
    imported = f"{name}, " if name == "AutoModelForQuestionAnswering" else ""
    return f"""```python
{registration}from transformers import {imported}AutoTokenizer

model = {name}.from_pretrained("{output_dir}")
tokenizer = AutoTokenizer.from_pretrained("{output_dir}")
```"""


def _file(metrics: Metrics) -> str:
    """What the exported file is."""
    if metrics["onnx_check"]["passed"]:
        return "`model.onnx` is the same model for ONNX Runtime and OpenVINO (`ovc model.onnx`)"
    return "`model.failed.onnx` is NOT the same model: it has failed its check"


def _difference(metrics: Metrics) -> str:
    difference = metrics["onnx_check"]["difference"]
    if difference is None:
        return "what is no number"
    if "int8" in metrics:
        return f"{difference:.1e} standard deviations of its outputs on average, layer by layer"
    return f"at most {difference:.1e}"
