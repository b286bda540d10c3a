"""Tests of model.ort.onnx, the form of an INT8 file that ONNX Runtime alone runs."""

from __future__ import annotations

from pathlib import Path

import nncf
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from bert.packed import PackedBertConfig, PackedBertForQuestionAnswering
from deploy import onnx_check, onnx_file, ort_file, runtime
from deploy.int8_file import PAIR_LIMIT
from int8 import calibration, quantizers
from int8.settings import NncfConfig
from squad_utils import INPUTS
from tasks import qa

LENGTH = 16


def feed(seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens, the last two of them padding, [1, LENGTH]."""
    rng = np.random.default_rng(seed)
    row = np.arange(LENGTH)[None]
    arrays = (rng.integers(5, 60, (1, LENGTH)), (row < LENGTH - 2).astype(np.int64), 0 * row, row)
    return dict(zip(INPUTS, arrays, strict=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, onnx_file.ExportedGraph]:
    """model.onnx of a packed INT8 model whose biases are all equal, and its graph."""
    torch.manual_seed(0)
    config = PackedBertConfig(
        vocab_size=60, max_position_embeddings=LENGTH, hidden_size=32, state_size=32, head_size=16,
        num_hidden_layers=2, num_attention_heads=2, ff_iter_num=2, merged=True,
    )  # fmt: skip
    model = PackedBertForQuestionAnswering(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" not in name:
                parameter.add_(0.15 * torch.randn_like(parameter))
    for layer in model.bert.layers:
        layer.separate_products = True
    advanced = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)
    scope = nncf.IgnoredScope(types=["matmul"])
    arguments = {"advanced_parameters": advanced, "ignored_scope": scope}
    settings = NncfConfig("", {}, {**arguments, "model_type": nncf.ModelType.TRANSFORMER})
    sample = {name: torch.from_numpy(each) for name, each in feed().items()}
    model = calibration.calibrate(model, settings, [sample])
    quantizers.make_exportable(model)
    graph = onnx_file.ExportedGraph(model, qa.QaTask.outputs).eval()
    path = tmp_path_factory.mktemp("folder") / "model.onnx"
    assert onnx_file.export_onnx(graph, str(path), [feed(1)], int8=True).passed
    return path, graph


def test_every_linear_layer_is_an_integer_product_that_holds_the_pair_rule(
    made: tuple[Path, onnx_file.ExportedGraph],
) -> None:
    path, _ = made
    model = onnx.load(runtime.ort_path(str(path)))
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 2 * (3 + 1 + 2) + 1  # query, key and value are three
    for product in products:
        sizes = np.abs(weights[product.input[1]].astype(int))
        assert (sizes[0::2] + sizes[1::2]).max() <= PAIR_LIMIT
        assert len(weights[product.input[6]]) == sizes.shape[1]


def test_the_standard_file_is_integer_too_where_biases_are_equal(
    made: tuple[Path, onnx_file.ExportedGraph], tmp_path: Path
) -> None:
    """Of equal constants the exporter keeps one, and refers to it."""
    path, _ = made
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "Gemm" not in kinds and kinds.count("MatMulIntegerToFloat") == 13


def test_it_computes_what_pytorch_computes(made: tuple[Path, onnx_file.ExportedGraph]) -> None:
    path, graph = made
    model = onnx.load(runtime.ort_path(str(path)))
    assert onnx_check.rounds_alike(model, graph, [feed(2), feed(3)])
    inputs = feed(4)
    with torch.no_grad():
        expected = [each.numpy() for each in graph(*map(torch.from_numpy, inputs.values()))]
    opened = runtime.in_onnxruntime(runtime.for_onnxruntime(str(path)), False)
    for mine, theirs in zip(opened.compile(LENGTH)(inputs), expected, strict=True):
        assert np.abs(mine - theirs).mean() < 0.05 * theirs.std()
    shorter = {name: each[:, :9] for name, each in inputs.items()}
    assert opened.compile(9)(shorter)[0].shape == (1, 9)


@pytest.mark.parametrize("part", [1, 3, 6])
def test_a_file_with_a_wrong_weight_scale_or_bias_is_not_delivered(
    part: int,
    made: tuple[Path, onnx_file.ExportedGraph],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path, graph = made
    convert = ort_file.converted

    def wrong(model: onnx.ModelProto) -> onnx.ModelProto:
        result = convert(model)
        (*_, product, _) = [n for n in result.graph.node if n.op_type == "MatMulIntegerToFloat"]
        (tensor,) = [t for t in result.graph.initializer if t.name == product.input[part]]
        value = onnx.numpy_helper.to_array(tensor)
        changed = {1: -value, 3: value * 1.5, 6: value + np.resize([0.5, -0.5], value.shape)}[
            part
        ].astype(value.dtype)
        tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
        return result

    monkeypatch.setattr(ort_file, "converted", wrong)
    other = str(path.with_name(f"wrong{part}.onnx"))
    assert onnx_file.export_onnx(graph, other, [feed(1)], int8=True).passed
    assert not Path(runtime.ort_path(other)).exists()
    assert f"no wrong{part}.ort.onnx" in capfd.readouterr().err
    assert runtime.for_onnxruntime(other) == other


def test_a_second_export_replaces_it(made: tuple[Path, onnx_file.ExportedGraph]) -> None:
    """So it never belongs to another model.onnx than the one beside it."""
    path, graph = made
    other = path.with_name("again.onnx")
    Path(runtime.ort_path(str(other))).write_bytes(b"of an earlier model")
    onnx_file.export_onnx(graph, str(other), [feed(1)], int8=True)
    assert onnx.load(runtime.ort_path(str(other))).graph.node
