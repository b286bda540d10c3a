"""Tests of accuracy control: which layers cost most, and that they go back to floating point."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from calls import call, records
from conftest import command_of
from test_int8_folder import MODELS, feed, logits, plain, settings, smoothed, tensors
from test_weight_range import file_of, quantized
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, PreTrainedModel

from bert.model_folder import load_model, open_model
from cli import Interrupted, UserError
from int8 import float_layers, quantizers
from int8.float_layers import int8_layers
from tasks.qa import QaTask
from training import accuracy
from training.run import check_output_dir


def fp32(kind: str) -> PreTrainedModel:
    return MODELS[kind]()


@pytest.mark.parametrize("kind", MODELS)
def test_layers_round_one_at_a_time(kind: str) -> None:
    reference, model = fp32(kind), smoothed(kind)
    layers = int8_layers(model)
    corrected = float_layers.round_nothing(model, reference)
    assert corrected and torch.equal(logits(model), logits(reference))
    seen = []
    for name in float_layers.each_alone(model, layers, reference, corrected):
        seen.append(name)
        assert not torch.equal(logits(model), logits(reference)), name
    assert seen == [layer.name for layer in layers]
    assert torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize("kind", MODELS)
def test_all_layers_put_back_are_the_fp32_model(kind: str) -> None:
    reference, model = fp32(kind), smoothed(kind)
    for left, layer in reversed(list(enumerate(int8_layers(model)))):
        assert not torch.equal(logits(model), logits(reference))
        float_layers.put_back(model, layer.name, reference)
        assert len(int8_layers(model)) == left
    assert torch.equal(logits(model), logits(reference))


def test_an_input_that_other_layers_read_stays_rounded_for_them() -> None:
    """Without SmoothQuant query, key and value share the quantizer of their input."""
    alphas = {"smooth_quant_alphas": {"matmul": -1}}
    reference = fp32("bert")
    model = quantized(copy.deepcopy(reference), settings(advanced_parameters=alphas))
    name = "bert.encoder.layer.1.attention.self.{}"
    float_layers.put_back(model, name.format("query"), reference)
    of = {layer.name: layer for layer in quantizers.operations(model)}
    assert not of[name.format("query")].int8 and not of[name.format("query")].quantizers
    assert of[name.format("key")].int8 and of[name.format("value")].int8


@pytest.mark.parametrize("kind", MODELS)
def test_a_layer_put_back_stays_so_when_saved_loaded_and_exported(
    kind: str, tmp_path: Path
) -> None:
    reference, model = fp32(kind), smoothed(kind)
    layers = [layer.name for layer in int8_layers(model)]
    products = sum(layer.kind == "matmul" for layer in int8_layers(model))  # without weights
    names = ["bert.embeddings.word_embeddings", layers[-2]]
    for name in names:
        float_layers.put_back(model, name, reference)
    quantizers.save_quantized(model, str(tmp_path))
    loaded = load_model(open_model(str(tmp_path), "--model"), AutoModelForQuestionAnswering, True)
    loaded.eval()
    assert torch.equal(logits(loaded), logits(model))
    assert {layer.name for layer in int8_layers(loaded)} == set(layers) - set(names)
    expected = logits(loaded)
    assert plain(tmp_path).state_dict().keys() == reference.state_dict().keys()
    file, _ = file_of(loaded, tmp_path / "model.onnx")
    integers = sum(len(t.dims) == 2 and t.data_type == onnx.TensorProto.INT8
                   for t in file.graph.initializer)  # fmt: skip
    joined = sum(name.endswith(".qkv") for name in layers)  # three products in the file
    assert integers == len(layers) - products - len(names) + 2 * joined
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(file.SerializeToString(), options)
    found = np.concatenate(session.run(None, feed(7)))
    assert np.abs(found - expected.numpy()).max() < 0.02 * float(expected.std())


# ------------------------------------------------------------------------------------------------
# The control


class FakeRun:
    """The members of a run that accuracy control uses; its log is in memory."""

    main = True

    def __init__(self, folder: Path) -> None:
        (folder / "checkpoints").mkdir(exist_ok=True)
        self.output_dir = str(folder)
        self.log: dict[str, dict[str, float]] = {"fp32": {"f1": 90.0}}
        self.said: list[str] = []
        self.accelerator = SimpleNamespace(
            wait_for_everyone=lambda: None, device=torch.device("cpu")
        )
        self.stop_after: float = float("inf")

    def say(self, text: str) -> None:
        self.said.append(text)

    def evaluated(self, stage: str) -> dict[str, float] | None:
        return self.log.get(stage)

    def evaluate_once(self, stage: str, evaluate: Callable[[], dict[str, float]]) -> None:
        if stage not in self.log:
            self.log[stage] = evaluate()

    def stop_if_asked(self) -> None:
        self.stop_after -= 1
        if self.stop_after < 0:
            raise Interrupted("stopped", 2)

    def wait_for(self, path: str) -> None:
        assert Path(path).exists()


class Control:
    """A run with a model that loses `each` points of F1 per INT8 layer beyond `free` ones."""

    def __init__(self, folder: Path, lost: float, each: float) -> None:
        self.run, self.lost, self.each, self.windows = FakeRun(folder), lost, each, 0
        self.fp32, self.model = fp32("packed_bert"), smoothed("packed_bert")
        self.total = len(int8_layers(self.model))
        self.run.log["calibrated"] = {"f1": 90.0 - lost}
        self.task: Any = SimpleNamespace(
            drop_by="f1",
            score_names=QaTask.score_names,
            outputs=QaTask.outputs,
            evaluation=self.evaluation,
            calibration=self.calibration,
        )

    def evaluation(self, model: PreTrainedModel, fp32: bool = False) -> dict[str, float]:
        put_back = self.total - len(int8_layers(model))
        return {"f1": 90.0 - self.lost + self.each * put_back}

    def calibration(self, count: int) -> Iterator[dict[str, Tensor]]:
        for seed in range(count):
            yield tensors(feed(seed))

    def __call__(self, max_drop: float) -> list[str]:
        run: Any = self.run
        load = lambda: smoothed("packed_bert")  # noqa: E731
        return accuracy.control(run, self.task, max_drop, self.fp32, self.model, load)


@pytest.fixture
def few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "WINDOWS", 4)


def test_a_small_loss_changes_nothing(tmp_path: Path) -> None:
    control = Control(tmp_path, lost=1.0, each=1.0)
    assert control(max_drop=1.0) == ["calibrated"]
    assert len(int8_layers(control.model)) == control.total
    assert accuracy.decision(control.run)["layers"] == []  # type: ignore[index, arg-type]
    assert not (tmp_path / "checkpoints" / accuracy.ERRORS).exists()


@pytest.mark.usefixtures("few_windows")
def test_the_costliest_layers_go_back_until_it_holds(tmp_path: Path) -> None:
    control = Control(tmp_path, lost=3.0, each=1.1)
    assert control(max_drop=1.0) == ["calibrated", "1 in float", "2 in float"]
    measured = json.loads((tmp_path / "checkpoints" / accuracy.ERRORS).read_text())["errors"]
    assert len(measured) == control.total and {len(each) for each in measured.values()} == {4}
    order = sorted(measured, key=lambda name: -np.mean(measured[name]))
    made = json.loads((tmp_path / "checkpoints" / accuracy.DECISION).read_text())
    assert [layer["name"] for layer in made["layers"]] == order[:2]
    assert (made["windows"], made["calibration_lost"]) == (4, 3.0)
    assert made["lost"] == pytest.approx(0.8)
    left = {layer.name for layer in int8_layers(control.model)}
    assert left == set(measured) - set(order[:2])
    table = next(text for text in control.run.said if "error of each layer alone" in text)
    assert order[0] in table.splitlines()[1] and len(table.splitlines()) == 1 + control.total // 4
    # A run that continues has the same layers, and computes nothing.
    control.model = smoothed("packed_bert")
    control.run.evaluate_once = None  # type: ignore[assignment, method-assign]
    assert control(max_drop=1.0)[-1] == "2 in float"
    assert {layer.name for layer in int8_layers(control.model)} == left
    with pytest.raises(UserError, match="trains with 1; go on"):
        control(max_drop=2.0)


@pytest.mark.usefixtures("few_windows")
def test_a_quarter_that_does_not_suffice_is_an_error_that_keeps_its_work(tmp_path: Path) -> None:
    control = Control(tmp_path, lost=9.0, each=0.5)
    quarter = control.total // 4
    reached = 9.0 - 0.5 * quarter
    with pytest.raises(UserError, match=f"a quarter of the layers, {quarter} of") as error:
        control(max_drop=1.0)
    assert f"{reached:.2f} with" in str(error.value) and "\n" not in str(error.value)
    assert accuracy.decision(control.run) is None  # type: ignore[arg-type]
    control.model = smoothed("packed_bert")
    control.calibration = control.evaluation = None  # type: ignore[assignment, method-assign]
    control.task.evaluation = control.task.calibration = None
    assert control(max_drop=8.0) == ["calibrated", "1 in float", "2 in float"]
    assert len(int8_layers(control.model)) == control.total - 2


@pytest.mark.usefixtures("few_windows")
def test_measuring_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    whole, control = (Control(tmp_path / n, lost=3.0, each=2.5) for n in _folders(tmp_path))
    whole(max_drop=1.0)
    control.run.stop_after = 2.5 * control.total  # in the third window
    with pytest.raises(Interrupted):
        control(max_drop=1.0)
    control.run.stop_after = 2 * control.total  # two windows are left, not three
    control(max_drop=1.0)
    errors = [
        json.loads((Path(each.run.output_dir) / "checkpoints" / accuracy.ERRORS).read_text())
        for each in (whole, control)
    ]
    assert errors[0]["errors"] == errors[1]["errors"]


def _folders(folder: Path) -> tuple[str, str]:
    for name in ("whole", "stopped"):
        (folder / name).mkdir()
    return "whole", "stopped"


def test_measuring_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a window, if the next would take too long; and the table says how many there were."""
    monkeypatch.setattr(accuracy, "MEASURING_SECONDS", 0.0)
    control = Control(tmp_path, lost=3.0, each=2.5)
    control(max_drop=1.0)
    assert accuracy.decision(control.run)["windows"] == 1  # type: ignore[index, arg-type]
    assert any("1 windows" in text for text in control.run.said)


def test_the_limit_may_change_until_the_run_has_finished(tmp_path: Path) -> None:
    """But not in a run of a version that had no limit: its states may be of other layers."""
    arguments = {"max_drop": 3.0, "seed": 1}
    args: Any = SimpleNamespace(output_dir=str(tmp_path), overwrite_output_dir=False)
    (tmp_path / "checkpoints").mkdir()
    unfinished = tmp_path / "checkpoints" / "run.json"
    unfinished.write_text(json.dumps({"arguments": {"max_drop": 1.0, "seed": 1}}))
    assert check_output_dir(args, arguments) == "unfinished"
    unfinished.write_text(json.dumps({"arguments": {"seed": 1}}))
    with pytest.raises(UserError, match=r"max_drop was absent, now 3\.0"):
        check_output_dir(args, arguments)
    (tmp_path / "metrics.json").write_text(json.dumps({"arguments": {"max_drop": 1.0, "seed": 1}}))
    with pytest.raises(UserError, match=r"finished run of another command .max_drop was 1\.0"):
        check_output_dir(args, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_qa", "train_qcemb"])
def test_float_layers_of_a_whole_run_stay_in_a_later_stage(
    script: str,
    teacher: Path,
    base: Path,
    few: Path,
    sample: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    """Scores on dev are given: those of a tiny model are chance."""
    scores = {"fp32": 90.0, "calibrated": 88.0, "1 in float": 88.5, "2 in float": 89.5}
    monkeypatch.setattr(accuracy, "_score", lambda run, task, stage: scores[stage])
    monkeypatch.setattr(accuracy, "WINDOWS", 2)
    config = tmp_path / "nncf_config.json"
    config.write_text(json.dumps({"model_type": "transformer", "subset_size": 4}))
    first, later = tmp_path / "first", tmp_path / "later"
    model, data = (teacher, few) if script == "train_qa" else (base, sample)
    short = ("--num_train_epochs=0.1", "--total_train_batch_size=8")
    flags = (f"--nncf_config={config}", "--max_drop=1", "--quantizer_epochs=0.1", *short)
    assert call(command_of(script, model, data, first, *flags)) == 0, capfd.readouterr().err
    stages = list(dict.fromkeys(record["stage"] for record in records(first)))
    assert stages == ["fp32", "calibrated", "1 in float", "2 in float", "ranges", "weights"]
    metrics = json.loads((first / "metrics.json").read_text())
    assert [row["stage"] for row in metrics["stages"]] == [*stages, "kept"]
    put_back = {layer["name"] for layer in metrics["float_layers"]["layers"]}
    assert len(put_back) == 2 and metrics["onnx_check"]["passed"]
    assert put_back <= {layer.name for layer in _operations(first) if not layer.int8}
    assert any("--max_drop" in row.get("why", "") for row in metrics["int8"])
    if script == "train_qcemb":
        return  # what follows is the same code for both
    assert call(command_of(script, first, data, later, *short)) == 0, capfd.readouterr().err
    names = ({layer.name for layer in _operations(each) if layer.int8} for each in (first, later))
    assert next(names) == next(names)


def _operations(folder: Path) -> list[quantizers.Operation]:
    from bert.embedding import AutoModelForEmbedding

    opened = open_model(str(folder), "--model")
    kind = AutoModelForEmbedding if "Embedding" in opened.architecture else None
    return quantizers.operations(
        load_model(opened, kind or AutoModelForQuestionAnswering, quiet=True).eval()
    )
