"""Accuracy control: layers go back to floating point until quantization costs little on dev."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Protocol, TypedDict, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cli import UserError
from deploy import onnx_file
from int8 import float_layers
from training.passes import to_device
from training.run import CHECKPOINTS, Run
from training.stage import Evaluation
from training.states import read_json, write_json

WINDOWS = 32  # calibration windows on which the error of each layer is measured
MEASURING_SECONDS = 600.0
FLOAT_SHARE = 0.25  # of all INT8 layers, at most so many go back
ERRORS = "layer_errors.json"  # in the run's checkpoints: the error of each layer alone
DECISION = "float_layers.json"  # there: the layers that went back, before any training


class Scored(Protocol):
    """The members of a task that accuracy control uses; tasks.task.Task documents them."""

    drop_by: ClassVar[str]
    score_names: ClassVar[dict[str, str]]
    outputs: ClassVar[onnx_file.Outputs]

    @property
    def evaluation(self) -> Evaluation: ...
    def calibration(self, count: int) -> Iterator[dict[str, Tensor]]: ...


class Decision(TypedDict):
    """The outcome for one run.

    Attributes:
        max_drop: the limit.
        calibration_lost, lost: points lost with all layers in INT8, and with the layers put back.
        windows: the windows on which errors were measured, 0 if calibration kept to the limit.
        layers: the layers put back: their name and `error`, in percent.
    """

    max_drop: float
    calibration_lost: float
    lost: float
    windows: int
    layers: list[dict[str, str | float]]


class Errors(TypedDict):
    """What is measured: seconds so far, and per layer its error on each window, in percent."""

    seconds: float
    errors: dict[str, list[float]]


def stages(made: Decision | None) -> list[str]:
    """The stages of the log from calibration to the last layer put back."""
    return ["calibrated", *(stage_name(i + 1) for i in range(len(made["layers"]) if made else 0))]


def stage_name(count: int) -> str:
    """The name of the stage with `count` layers in floating point."""
    return f"{count} in float"


def decision(run: Run) -> Decision | None:
    """The decision of this run, or None before it."""
    found = read_json(os.path.join(run.output_dir, CHECKPOINTS, DECISION))
    return cast(Decision, found) if found else None


def control(
    run: Run,
    task: Scored,
    max_drop: float,
    fp32: PreTrainedModel,
    quantized: PreTrainedModel,
    load: Callable[[], PreTrainedModel],
) -> list[str]:
    """Put layers of `quantized` back to floating point, one at a time, until it loses little.

    The loss is that of the task's figure on dev, from stage "fp32" to the quantized model. The
    layers with the largest errors go first. Each step is logged, so a run that continues, with
    another limit or the same, repeats none.

    Args:
        max_drop: the most points of the figure that may be lost.
        load: loads the calibrated model once more.

    Returns:
        the stages of the log; the last is that of the model as it is now.

    Raises:
        UserError: a quarter of the layers does not suffice; or the run has trained with another
            limit.
    """
    path = os.path.join(run.output_dir, CHECKPOINTS, DECISION)
    made = decision(run)
    run.accelerator.wait_for_everyone()  # all have read it; the main process may write it now
    if made:
        if made["max_drop"] != max_drop:
            raise UserError(
                f"--max_drop: the run in {run.output_dir} trains with {made['max_drop']:g}; go on"
                " with that, or choose another folder or --overwrite_output_dir"
            )
        for layer in made["layers"]:
            float_layers.put_back(quantized, str(layer["name"]), fp32)
        return stages(made)
    label, before = task.score_names[task.drop_by], _score(run, task, "fp32")
    lost = calibration_lost = before - _score(run, task, "calibrated")
    back: list[dict[str, str | float]] = []
    windows = 0
    if lost > max_drop:
        layers = len(float_layers.int8_layers(quantized))
        quarter = max(1, math.floor(FLOAT_SHARE * layers))
        run.say(
            f"calibration costs {lost:.2f} points of {label}, over --max_drop={max_drop:g}: up to"
            f" {quarter} of {layers} layers go back to floating point, each followed by an"
            " evaluation on dev"
        )
        measured = _measure(run, task, fp32, load)
        windows = len(next(iter(measured.values())))
        order = sorted(measured, key=lambda name: -_mean(measured[name]))
        run.say(table({name: _mean(measured[name]) for name in order[:quarter]}, windows))
        least = lost
        for name in order[:quarter]:
            float_layers.put_back(quantized, name, fp32)
            back.append({"name": name, "error": _mean(measured[name])})
            stage = stage_name(len(back))
            run.evaluate_once(stage, lambda: task.evaluation(quantized, fp32=True))
            lost = before - _score(run, task, stage)
            least = min(least, lost)
            if lost <= max_drop:
                break
        else:
            raise UserError(
                f"--max_drop: calibration costs {calibration_lost:.2f} points of {label}, and"
                f" {lost:.2f} with a quarter of the layers, {quarter} of {layers}, in floating"
                f" point (at best {least:.2f}), over {max_drop:g}; the same command with a higher"
                " --max_drop trains on from here, and repeats nothing"
            )
        run.say(f"{len(back)} of {layers} layers stay in floating point; {lost:.2f} {label} lost")
    made = Decision(
        max_drop=max_drop,
        calibration_lost=calibration_lost,
        lost=lost,
        windows=windows,
        layers=back,
    )
    if run.main:
        write_json(path, made)
    run.accelerator.wait_for_everyone()
    return stages(made)


def table(errors: Mapping[str, float], windows: int) -> str:
    """Layers and their errors as lines of text."""
    width = max(len(name) for name in errors)
    lines = [f"error of each layer alone, % of the outputs' standard deviation, {windows} windows"]
    lines += [f"{i:4} {name:{width}} {error:8.2f}" for i, (name, error) in
              enumerate(errors.items(), 1)]  # fmt: skip
    return "\n".join(lines)


def _score(run: Run, task: Scored, stage: str) -> float:
    """A stage's logged figure."""
    record = run.evaluated(stage)
    assert record is not None  # evaluate_once has logged it
    return float(record[task.drop_by])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _measure(
    run: Run, task: Scored, fp32: PreTrainedModel, load: Callable[[], PreTrainedModel]
) -> dict[str, list[float]]:
    """The error of each layer alone on each window, by the main process; saved after each window.

    It ends after WINDOWS windows, or before a window that would exceed MEASURING_SECONDS. All
    layers are measured on the same windows.
    """
    path = os.path.join(run.output_dir, CHECKPOINTS, ERRORS)
    if run.main and not os.path.exists(path):
        partly = f"{path}.part"
        found = cast(Errors, read_json(partly) or {"seconds": 0.0, "errors": {}})
        done = len(next(iter(found["errors"].values()), []))
        model = load()
        layers = float_layers.int8_layers(model)
        corrected = float_layers.round_nothing(model, fp32)
        for sample in list(task.calibration(WINDOWS))[done:]:
            if done and found["seconds"] * (done + 1) / done > MEASURING_SECONDS:
                break
            began = time.monotonic()
            sample = to_device(sample, run.accelerator.device)
            reference = _outputs(task, fp32, sample)
            for name in float_layers.each_alone(model, layers, fp32, corrected):
                run.stop_if_asked()
                outputs = _outputs(task, model, sample)
                kept = sample["attention_mask"].bool() if task.outputs.per_token else None
                parts = [
                    float_layers.relative_error(ours, theirs, kept)
                    for ours, theirs in zip(outputs, reference, strict=True)
                ]
                found["errors"].setdefault(name, []).append(_mean(parts))
            done += 1
            found["seconds"] += time.monotonic() - began
            write_json(partly, found)
        os.replace(partly, path)
    run.wait_for(path)
    errors: dict[str, list[float]] = read_json(path)["errors"]
    return errors


@torch.no_grad()
def _outputs(task: Scored, model: PreTrainedModel, sample: dict[str, Tensor]) -> list[Tensor]:
    """The outputs of one window that the exported file has too."""
    outputs = model(**sample)
    return [outputs[field] for field in task.outputs.fields]
