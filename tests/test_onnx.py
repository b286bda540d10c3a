"""Tests of the exported file: its shapes, its figures in two runtimes, its fused attention."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from calls import call, error_line, records
from conftest import command_of
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, BertTokenizerFast

import squad_utils
from cli import UserError
from deploy import onnx_check, onnx_file
from squad_utils import Windows
from tasks import qa, task

LENGTH = 100  # max_seq_length_c; no multiple of 8


@pytest.fixture(scope="module")
def windows(tiny_bert: Path, sample: Path) -> Windows:
    """Real windows, shorter than LENGTH, so that all are padded."""
    data = squad_utils.load_squad(str(sample / "dev-v1.1.json"), "--squad_dev_data")
    tokenizer = BertTokenizerFast.from_pretrained(tiny_bert)
    return qa.make_windows(data, tokenizer, 16, 70, 32, for_training=False)


def save_model(folder: Path, **settings: Any) -> Path:
    """A BERT of 2 layers with random weights, large enough for uneven attention."""
    torch.manual_seed(0)
    config = BertConfig(
        **{"vocab_size": 650, "num_hidden_layers": 2, "max_position_embeddings": 128, **settings}
    )
    model = BertForQuestionAnswering(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention.self" in name or "qa_outputs" in name:
                parameter.normal_(std=config.hidden_size**-0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, windows: Windows) -> Path:
    """A folder with a checkpoint of hidden size 128 (2 heads of 64) and its model.onnx."""
    folder = tmp_path_factory.mktemp("exported")
    save_model(folder, hidden_size=128, num_attention_heads=2, intermediate_size=256)
    assert 0 <= task.export(qa.QaTask, str(folder), qa.rows_of(windows), LENGTH).difference < 1e-5
    return folder


def expected(folder: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Start and end logits of the library's own model, as it was saved."""
    model = BertForQuestionAnswering.from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return [outputs.start_logits.numpy(), outputs.end_logits.numpy()]


def random_inputs(batch: int, length: int) -> dict[str, np.ndarray]:
    """Random tokens; each row is padded by another length, the first by none."""
    rng = np.random.default_rng(batch * 1000 + length)
    real = np.linspace(length, length // 4, batch).astype(int)[:, None]
    position = np.broadcast_to(np.arange(length), (batch, length))
    mask = (position < real).astype(np.int64)
    return {
        "input_ids": rng.integers(5, 650, (batch, length)) * mask,
        "attention_mask": mask,
        "token_type_ids": (position > length // 5).astype(np.int64) * mask,
        "position_ids": position.copy().astype(np.int64),
    }


def largest_gap(found: list[np.ndarray], right: list[np.ndarray]) -> float:
    """Over both outputs; the logits compared are no constants."""
    assert len(found) == len(right) == 2 and min(each.std() for each in right) > 0.1
    assert not np.allclose(right[0], right[1], atol=0.1)
    return max(float(np.abs(a - b).max()) for a, b in zip(found, right, strict=True))


# ------------------------------------------------------------------------------------------------
# The file


def test_declared_inputs_and_outputs(exported: Path) -> None:
    """int64 [1, max_seq_length_c] in, float32 [1, max_seq_length_c] out, names and opset."""
    model = onnx.load(exported / "model.onnx")
    found = {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_value for dim in value.type.tensor_type.shape.dim],
            [dim.dim_param for dim in value.type.tensor_type.shape.dim],
        )
        for value in [*model.graph.input, *model.graph.output]
    }
    whole, real = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    inputs = ["input_ids", "attention_mask", "token_type_ids", "position_ids"]
    assert [value.name for value in model.graph.input] == inputs
    assert [value.name for value in model.graph.output] == ["output_s", "output_e"]
    for name, (kind, sizes, symbols) in found.items():
        assert kind == (real if name.startswith("output") else whole)
        assert sizes == [1, LENGTH] and symbols == ["", ""]
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [17]


def test_one_file_with_all_weights(exported: Path, tmp_path: Path) -> None:
    """No external data, nothing temporary left; the file alone, elsewhere, is a model."""
    names = {file.name for file in exported.iterdir()}
    assert names == {"config.json", "model.safetensors", "model.onnx"}
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    assert all(
        weight.data_location != onnx.TensorProto.EXTERNAL for weight in model.graph.initializer
    )
    shutil.copy(exported / "model.onnx", tmp_path)
    onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])


def test_onnx_runtime_equals_pytorch(exported: Path, windows: Windows) -> None:
    """On windows of the data and on random ones, against the library's own attention and mask."""
    session = onnxruntime.InferenceSession(
        exported / "model.onnx", providers=["CPUExecutionProvider"]
    )
    cases = [
        squad_utils.make_batch(windows, np.array([w]), pad_to=LENGTH)
        for w in (windows.total_lengths.argmin(), windows.total_lengths.argmax())
    ]
    cases.append(random_inputs(1, LENGTH))
    assert cases[0]["attention_mask"].sum() <= 70 < cases[2]["attention_mask"].sum() == LENGTH
    for inputs in cases:
        found = session.run(["output_s", "output_e"], inputs)
        assert largest_gap(found, expected(exported, inputs)) < 1e-5


# ------------------------------------------------------------------------------------------------
# OpenVINO


def compile_openvino(folder: Path, shape: tuple[int, int]) -> openvino.CompiledModel:
    core = openvino.Core()
    model = core.read_model(folder / "model.onnx")
    model.reshape({name: list(shape) for name in squad_utils.INPUTS})
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return core.compile_model(model, "CPU", settings)


@pytest.mark.parametrize("shape", [(1, 32), (8, 128)])
def test_openvino_reshapes_and_equals_pytorch(exported: Path, shape: tuple[int, int]) -> None:
    """Other batch sizes and lengths than the declared ones, with padding."""
    compiled = compile_openvino(exported, shape)
    inputs = random_inputs(*shape)
    results = compiled(inputs)
    found = [results[name] for name in ("output_s", "output_e")]
    assert found[0].shape == shape
    assert largest_gap(found, expected(exported, inputs)) < 1e-4


@pytest.mark.parametrize("shape", [(1, LENGTH), (1, 32), (8, 128)])
def test_openvino_fuses_attention(exported: Path, shape: tuple[int, int]) -> None:
    """One node does the whole attention of each layer: both its products and the softmax.

    No product or softmax of attention is left over. The matrix products of weights, which are
    FullyConnected nodes, are those of the model: query, key, value, output and the two of the
    feed-forward part in each of 2 layers, and the one to the logits.
    """
    runtime = compile_openvino(exported, shape).get_runtime_model()
    info = [op.get_rt_info() for op in runtime.get_ops()]
    kinds = [each["layerType"].astype(str) for each in info]
    sources = [each["originalLayersNames"].astype(str) for each in info]
    for layer in range(2):
        attention = f"layer.{layer}/attention/self/"
        holders = [
            kind
            for kind, source in zip(kinds, sources, strict=True)
            if f"{attention}Softmax" in source and f"{attention}MatMul_1" in source
        ]
        assert len(holders) == 1 and holders[0] in ("Subgraph", "ScaledDotProductAttention")
    assert not [kind for kind in kinds if re.search("softmax|^MatMul", kind, re.IGNORECASE)]
    assert kinds.count("FullyConnected") <= 6 * 2 + 1


# ------------------------------------------------------------------------------------------------
# What can go wrong


def test_a_mismatch_is_kept_under_another_name(
    exported: Path, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with other weights than the model's is no model.onnx, until an export is right."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(exported / name, tmp_path)
    export = torch.onnx.export

    def export_then_change(graph: nn.Module, *args: Any, **kwargs: Any) -> None:
        export(graph, *args, **kwargs)
        with torch.no_grad():
            graph.model.qa_outputs.bias.add_(0.01)

    model = {"config.json", "model.safetensors"}
    (tmp_path / "model.onnx").write_bytes(b"of an earlier export")
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", export_then_change)
        check = task.export(qa.QaTask, str(tmp_path), qa.rows_of(windows), LENGTH)
    assert not check.passed
    assert {file.name for file in tmp_path.iterdir()} == {*model, "model.failed.onnx"}
    with pytest.raises(
        UserError, match=r"differs .* by 0\.01 .* 0\.001 .*model\.failed\.onnx"
    ) as error:
        onnx_file.require(check, str(tmp_path))
    assert "\n" not in str(error.value)
    onnx_file.require(
        task.export(qa.QaTask, str(tmp_path), qa.rows_of(windows), LENGTH), str(tmp_path)
    )
    assert {file.name for file in tmp_path.iterdir()} == {*model, "model.onnx"}


def test_outputs_that_are_no_numbers_fail_the_check(
    exported: Path, windows: Windows, tmp_path: Path
) -> None:
    """Weights that are not finite compare with nothing."""
    model = BertForQuestionAnswering.from_pretrained(exported)
    with torch.no_grad():
        model.qa_outputs.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    check = task.export(qa.QaTask, str(tmp_path), qa.rows_of(windows), LENGTH)
    with pytest.raises(UserError, match="differs"):
        onnx_file.require(check, str(tmp_path))
    assert not list(tmp_path.glob("model.onnx*"))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_qa", "pack_and_distill"])
def test_a_failed_check_throws_nothing_away(
    script: str,
    teacher: Path,
    few: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    """All results are there, and the same command exports again without training."""
    if script == "train_qa":
        command = command_of("train_qa", teacher, few, tmp_path)
    else:
        command = command_of("pack_and_distill", teacher, few, tmp_path, "--max_steps_per_stage=1")
    with monkeypatch.context() as patch:
        patch.setattr(onnx_check, "MAX_DIFFERENCE", 0.0)
        assert call(command) == 2
    assert "model.failed.onnx" in error_line(capfd.readouterr().err)
    results = {"metrics.json", "predictions.json", "curves.png", "README.md", "model.safetensors"}
    assert results <= {file.name for file in tmp_path.iterdir()}
    assert "has failed its check" in (tmp_path / "README.md").read_text()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert not metrics["onnx_check"]["passed"]
    log = [record for record in records(tmp_path) if "loss" in record]
    weights = (tmp_path / "model.safetensors").read_bytes()

    assert call(command) == 0, capfd.readouterr().err
    assert [record for record in records(tmp_path) if "loss" in record] == log
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "model.onnx").exists() and not (tmp_path / "model.failed.onnx").exists()
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert again["onnx_check"]["passed"] and again["f1"] == metrics["f1"]
    assert not (tmp_path / "checkpoints").exists()
    assert call(command) == 0
    assert "is finished" in capfd.readouterr().out


def test_a_file_that_cannot_be_written_is_a_user_error(exported: Path, tmp_path: Path) -> None:
    """A folder that is not there: one line, no traceback."""
    graph = onnx_file.ExportedGraph(
        BertForQuestionAnswering.from_pretrained(exported), qa.QaTask.outputs
    )
    path = str(tmp_path / "none" / "model.onnx")
    with pytest.raises(UserError, match="none"):
        onnx_file.export_onnx(graph, path, [random_inputs(1, LENGTH)])


def test_dropout_does_not_disturb_the_export(windows: Windows, tmp_path: Path) -> None:
    """A model that trains with dropout, and is in training mode, is exported without it."""
    folder = save_model(
        tmp_path,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.5,
        attention_probs_dropout_prob=0.5,
        classifier_dropout=0.5,
    )
    assert task.export(qa.QaTask, str(folder), qa.rows_of(windows), LENGTH).difference < 1e-5
    model = BertForQuestionAnswering.from_pretrained(folder).train()
    model.set_attn_implementation("eager")
    graph = onnx_file.ExportedGraph(model, qa.QaTask.outputs)
    path = str(tmp_path / "again.onnx")
    batches = [squad_utils.make_batch(windows, np.array([0]), pad_to=LENGTH)]
    assert onnx_file.export_onnx(graph, path, batches).difference < 1e-5
    assert not any(module.training for module in graph.modules())
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert not kinds & {"Dropout", "RandomUniformLike", "Bernoulli"}
