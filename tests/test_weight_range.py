"""Tests of weight_range: from calibration to the file, integers whose sums nowhere overflow."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from nncf.quantization.algorithms.fast_bias_correction.algorithm import FastBiasCorrection
from transformers import BertConfig, BertForQuestionAnswering

from bert import model_folder
from bert.attention import fuse_attention
from cli import UserError
from deploy import cpu, int8_file, onnx_check, onnx_file
from deploy.int8_file import PAIR_LIMIT
from deploy.onnx_file import QA_OUTPUTS
from int8 import calibration, quantizers
from int8.settings import NncfConfig, read_nncf_config
from int8.weight_range import WeightRange, least_scale
from squad_utils import INPUTS
from tasks import qa

LENGTH = 24
Feed = dict[str, np.ndarray]
Made = Callable[..., NncfConfig]


@pytest.fixture
def settings(tmp_path: Path) -> Made:
    """Settings of --nncf_config, read from a file with these keys."""

    def make(**keys: object) -> NncfConfig:
        path = tmp_path / "nncf_config.json"
        path.write_text(json.dumps({"model_type": "transformer", "preset": "mixed", **keys}))
        return read_nncf_config(str(path))

    return make


def feed(seed: int = 0) -> Feed:
    """Random tokens, without padding, [1, LENGTH]."""
    rng = np.random.default_rng(seed)
    return {
        "input_ids": rng.integers(5, 60, (1, LENGTH)),
        "attention_mask": np.ones((1, LENGTH), np.int64),
        "token_type_ids": np.zeros((1, LENGTH), np.int64),
        "position_ids": np.arange(LENGTH)[None],
    }


def tensors(arrays_by_name: Feed) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(each) for name, each in arrays_by_name.items()}


def small_bert(seed: int = 0) -> BertForQuestionAnswering:
    """A BERT of 2 layers whose weights are large enough for its layers to do something."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = BertForQuestionAnswering(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return fuse_attention(model, separate_products=True).eval()


def worst_case() -> BertForQuestionAnswering:
    """A BERT in which a layer's weights are all as large as they get, and its inputs too."""
    model = small_bert()
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        norm = layer.attention.output.LayerNorm
        norm.weight.zero_()
        norm.bias.fill_(1.0)
        layer.intermediate.dense.weight.copy_(
            torch.where(torch.arange(64)[:, None] % 2 == 0, 0.02, -0.02).expand(64, 32)
        )
    return model


def quantized(model: torch.nn.Module, config: NncfConfig) -> torch.nn.Module:
    return calibration.calibrate(copy.deepcopy(model), config, [tensors(feed())])


def file_of(model: torch.nn.Module, path: Path) -> tuple[onnx.ModelProto, onnx_check.Check]:
    """The exported file of a model with quantizers, and its check."""
    model = copy.deepcopy(model)
    quantizers.make_exportable(model)
    check = onnx_file.export_onnx(
        onnx_file.ExportedGraph(model, qa.QaTask.outputs), str(path), [feed()], int8=True
    )
    return onnx.load(path), check


def integer_weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The INT8 weights of a file's matrix products, [in, out], by name."""
    factors = {name for node in model.graph.node if node.op_type == "MatMul" for name in node.input}
    stored = {
        node.input[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.output[0] in factors
    }
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name in stored and tensor.data_type == onnx.TensorProto.INT8
    }


def saturating_product(inputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What kernels without VNNI compute: two neighbouring products are added in 16 bits, with
    saturation; then all pairs in 32 bits.

    Args:
        inputs: u8 [rows, in].
        weights: s8 [in, out].
    """
    odd = len(weights) % 2
    inputs = np.pad(inputs.astype(np.int64), ((0, 0), (0, odd)))
    weights = np.pad(weights.astype(np.int64), ((0, odd), (0, 0)))
    products = inputs[:, :, None] * weights[None]
    pairs = products[:, 0::2] + products[:, 1::2]
    return pairs.clip(-(2**15), 2**15 - 1).sum(axis=1)


def overflows(model: onnx.ModelProto) -> bool:
    """Whether some inputs give other sums with saturation, for any weight of a file.

    The worst inputs of a channel are 255 where its weights have the sign of the pair, else 0.
    """
    for weights in integer_weights(model).values():
        for sign in (1, -1):
            inputs = np.where(sign * weights.T > 0, 255, 0)  # a row for each channel
            exact = inputs @ weights.astype(np.int64)
            if not np.array_equal(saturating_product(inputs, weights), exact):
                return True
    return False


# ------------------------------------------------------------------------------------------------
# The rule


@given(
    arrays.arrays(
        np.int16, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.integers(-999, 999)
    ),
    st.sampled_from([WeightRange.PAIRS, WeightRange.HALF]),
)
def test_integers_at_the_least_scale_are_allowed(hundredths: np.ndarray, kind: WeightRange) -> None:
    weight = (hundredths / 100).astype(np.float32)
    scale = least_scale(torch.from_numpy(weight), kind).numpy()
    step = np.where(scale > 0, scale, 1) / 127
    integers = np.abs(np.rint(weight / step)).astype(int)
    integers = np.pad(integers, ((0, 0), (0, integers.shape[1] % 2)))
    pairs = integers[:, 0::2] + integers[:, 1::2]
    assert pairs.max() <= PAIR_LIMIT
    if kind == WeightRange.HALF:
        assert integers.max() <= 64
    used = (weight != 0).any(axis=1)
    largest = pairs if kind == WeightRange.PAIRS else integers
    # No channel gives away more than the rounding.
    assert (largest.max(axis=1)[used] >= (126 if kind == WeightRange.PAIRS else 64)).all()


@pytest.mark.parametrize("kind", list(WeightRange))
def test_a_file_keeps_its_range_after_training(
    kind: WeightRange, settings: Made, tmp_path: Path
) -> None:
    """Weights and ranges that training has moved far."""
    model = quantized(small_bert(), settings(weight_range=kind))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(20):
        outputs = model(**tensors(feed(step)))
        (outputs.start_logits[:, 3] - outputs.end_logits[:, 5]).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for quantizer, weight in quantizers.second_factors(model):
            quantizer._scale_param_storage.data.mul_(0.5)
            if weight is not None:
                weight.mul_(1 + 0.3 * torch.randn_like(weight))
    quantizers.save_quantized(model, str(tmp_path))
    file, check = file_of(model, tmp_path / "model.onnx")
    weights = integer_weights(file)
    assert len(weights) == 13
    assert check.passed
    assert check.largest_pair == int8_file.largest_pair(file)
    assert (check.largest_pair <= PAIR_LIMIT) == (kind != WeightRange.FULL)
    assert overflows(file) == (kind == WeightRange.FULL)
    if kind == WeightRange.HALF:
        assert max(np.abs(each.astype(int)).max() for each in weights.values()) <= 64


def test_training_uses_the_integers_of_the_file(settings: Made) -> None:
    """A scale that has become too small is raised before it rounds anything."""
    model = quantized(small_bert(), settings())
    quantizer, weight = next(iter(quantizers.second_factors(model)))
    with torch.no_grad():
        quantizer._scale_param_storage.mul_(0.1)
    rounded = quantizer(weight)
    step = quantizer.scale / 127
    pairs = (rounded / step).round().abs().unflatten(1, (-1, 2)).sum(dim=2)
    assert pairs.max() <= PAIR_LIMIT
    assert (rounded - weight).abs().max() <= step.max()


def test_two_uses_before_a_backward_pass(settings: Made) -> None:
    """As those of a question and its context in one loss."""
    model = quantized(small_bert(), settings())
    model.train()
    first, second = (model(**tensors(feed(seed))) for seed in (1, 2))
    (first.start_logits.sum() + second.end_logits.sum()).backward()
    assert all(q._scale_param_storage.grad is not None for q, _ in quantizers.second_factors(model))


def test_biases_are_corrected_for_the_rounding_that_stays(
    settings: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, seen = FastBiasCorrection.apply, []

    def look_then_apply(self: FastBiasCorrection, model: torch.nn.Module, *args, **kwargs):
        for quantizer, weight in quantizers.second_factors(model.model):
            if weight is not None:
                least = least_scale(weight, WeightRange.PAIRS)
                seen.append(bool((quantizer.scale >= least).all()))
        return apply(self, model, *args, **kwargs)

    monkeypatch.setattr(FastBiasCorrection, "apply", look_then_apply)
    quantized(small_bert(), settings())
    assert len(seen) == 13 and all(seen)


def test_products_of_two_activations_hold_the_rule(settings: Made, tmp_path: Path) -> None:
    """Queries x keys in INT8: keys are 7 bits, however large they get."""
    model = quantized(small_bert(), settings())
    keys = [q for q, weight in quantizers.second_factors(model) if weight is None]
    assert len(keys) == 2
    for quantizer in keys:
        with torch.no_grad():
            rounded = (quantizer(1000 * torch.randn(4, 32)) / (quantizer.scale / 63)).numpy()
        assert rounded.min() == pytest.approx(-64) and rounded.max() == pytest.approx(63)
        integers = np.rint(rounded).T.astype(int)
        queries = np.full((1, len(integers)), 255)  # the largest that there are
        for worst in (integers, -np.abs(integers), np.full_like(integers, -64)):
            assert np.array_equal(saturating_product(queries, worst), queries @ worst)
    file, check = file_of(model, tmp_path / "model.onnx")
    assert check.passed and not int8_file.overflow_causes(file)
    full, _ = file_of(quantized(small_bert(), settings(weight_range="full")), tmp_path / "f.onnx")
    assert int8_file.multiplies_activations(full)
    quantizers.save_quantized(model, str(tmp_path))
    again = fuse_attention(
        BertForQuestionAnswering.from_pretrained(tmp_path), separate_products=True
    )
    again = quantizers.load_quantizers(again, str(tmp_path), "--model").eval()
    with torch.no_grad():
        first, second = (each(**tensors(feed(7))).start_logits for each in (model, again))
    assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------------
# The worst case, in the runtimes of this machine


def test_the_largest_weights_and_inputs_are_right_in_both_runtimes(
    settings: Made, tmp_path: Path
) -> None:
    """Weights that would be 127, inputs that are 255: on CPUs without VNNI the full range fails."""
    model = quantized(worst_case(), settings())
    path = tmp_path / "model.onnx"
    file, check = file_of(model, path)
    assert check.passed and not overflows(file)
    full, _ = file_of(quantized(worst_case(), settings(weight_range="full")), tmp_path / "f.onnx")
    name = next(n for n in integer_weights(full) if "intermediate" in n)
    assert set(np.abs(integer_weights(full)[name].astype(int)).ravel()) == {127}
    assert overflows(full)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", precision)
    for seed in range(3):
        inputs = feed(seed)
        with torch.no_grad():
            outputs = model(**tensors(inputs))
        expected = np.concatenate([outputs.start_logits.numpy(), outputs.end_logits.numpy()])
        for found in (session.run(list(QA_OUTPUTS), inputs), list(compiled(inputs).values())):
            assert np.abs(np.concatenate(found) - expected).max() < 0.05 * expected.std()


# ------------------------------------------------------------------------------------------------
# The check


def test_the_verdict_is_of_the_file_and_not_of_the_machine(
    settings: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """A runtime that computes something else is told of, and the file passes."""

    def wrong_runtime(path: str):
        yield "ONNX Runtime", lambda: lambda inputs: [np.zeros((1, LENGTH), np.float32)] * 2
        yield "OpenVINO", lambda: 1 / 0

    monkeypatch.setattr(onnx_check, "_as_users_do", wrong_runtime)
    monkeypatch.setattr(onnx_file, "this_cpu", lambda: cpu.Cpu("an old CPU", ("avx2",)))
    model = quantized(small_bert(), settings(weight_range="full"))
    _, check = file_of(model, tmp_path / "model.onnx")
    assert check.passed and check.difference < 1e-5
    assert check.runtimes["ONNX Runtime"] > 0.5 > check.runtimes["exact"]
    described = onnx_file.describe_check(check, str(tmp_path))["onnx_check"]
    assert described["runtimes"]["OpenVINO"] is None and described["passed"]
    lines = [each for each in capfd.readouterr().err.splitlines() if "warning: " in each]
    assert len(lines) == 2 and all("weight_range pairs" in line for line in lines)
    assert "ONNX Runtime on this machine" in lines[0]
    assert "OpenVINO on this machine" in lines[1] and "does not run the file" in lines[1]


@pytest.mark.parametrize("part", ["weight", "scale", "bias", "zero point"])
def test_a_file_that_computes_something_else_fails(
    part: str, settings: Made, tmp_path: Path
) -> None:
    """One changed layer is enough: its outputs, or the integers that it rounds to."""
    model = quantized(small_bert(), settings())
    path = tmp_path / "model.onnx"
    file, check = file_of(model, path)
    assert check.passed
    tensors_by_name = {tensor.name: tensor for tensor in file.graph.initializer}
    for node in file.graph.node:
        if part == "weight" and node.op_type == "DequantizeLinear" and "dequantize" in node.name:
            change, target = (lambda each: -each), tensors_by_name.get(node.input[0])
        elif part == "scale" and node.op_type == "QuantizeLinear":
            change, target = (lambda each: each * 1.05), node.input[1]
        elif part == "zero point" and node.op_type == "QuantizeLinear":
            change, target = (lambda each: each + 2), node.input[2]
        elif part == "bias" and node.op_type == "Add" and any("apart" in n for n in node.input):
            name = next(n for n in node.input if "apart" in n)
            change, target = (lambda each: each + 0.5), tensors_by_name[name]
        else:
            continue
        if target is None:
            continue
        _change(file.graph, target, change)
        if part != "weight":
            break
    onnx.save(file, path)
    graph = onnx_file.ExportedGraph(copy.deepcopy(model), qa.QaTask.outputs)
    quantizers.make_exportable(graph.model)
    assert not onnx_check.check_file(str(path), graph.eval(), [feed()], int8=True).passed


def _change(graph: onnx.GraphProto, target: onnx.TensorProto | str, change: Callable) -> None:
    """Change a constant, which is an initializer or the output of a Constant node."""
    if isinstance(target, str):
        constants = {tensor.name: tensor for tensor in graph.initializer}
        constants |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
        aliases = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Identity"}
        while target in aliases:
            target = aliases[target]
        target = constants[target]
    value = onnx.numpy_helper.to_array(target)
    target.CopyFrom(onnx.numpy_helper.from_array(change(value).astype(value.dtype), target.name))


def test_roundings_that_flip_are_counted_and_do_not_fail(settings: Made, tmp_path: Path) -> None:
    """LayerNorm's gains, moved by a millionth, change what is rounded and nothing else."""
    model = quantized(small_bert(), settings())
    path = tmp_path / "model.onnx"
    file_of(model, path)
    moved = copy.deepcopy(model)
    quantizers.make_exportable(moved)
    with torch.no_grad():
        moved.bert.embeddings.LayerNorm.weight.mul_(1 + 3e-5 * torch.randn(32))
    feeds = [feed(seed) for seed in range(8)]
    graph = onnx_file.ExportedGraph(moved, qa.QaTask.outputs).eval()
    check = onnx_check.check_file(str(path), graph, feeds, int8=True)
    assert 0 < check.flipped < 0.01
    assert check.passed and check.difference < 1e-3


# ------------------------------------------------------------------------------------------------
# Settings and folders


def test_the_default_is_safe_and_overflow_fix_is_half(settings: Made) -> None:
    assert settings().weight_range == WeightRange.PAIRS
    assert settings(weight_range="full").weight_range == WeightRange.FULL
    enable = {"advanced_parameters": {"overflow_fix": "enable"}}
    assert settings(**enable).weight_range == WeightRange.HALF
    assert "weight_range" not in settings(weight_range="half").arguments


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weight_range": "quarter"}, 'weight_range is "quarter", not one of pairs, half, full'),
        (
            {"weight_range": "full", "advanced_parameters": {"overflow_fix": "enable"}},
            "overflow_fix: enable means weight_range: half",
        ),
        (
            {"advanced_parameters": {"weights_quantization_params": {"mode": "asymmetric"}}},
            "cannot hold weight_range: pairs; use symmetric",
        ),
    ],
)
def test_ranges_that_cannot_be_held_are_one_line(settings: Made, keys: dict, message: str) -> None:
    with pytest.raises(UserError, match="--nncf_config") as error:
        settings(**keys)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [WeightRange.PAIRS, WeightRange.FULL, None])
def test_a_folder_of_the_full_range_says_so_where_it_matters(
    kind: WeightRange | None, settings: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """One that does not tell its range was made when all were full."""
    model = quantized(small_bert(), settings(weight_range=kind or "full"))
    quantizers.save_quantized(model, str(tmp_path))
    if kind is None:
        path = tmp_path / "quantizers.json"
        config = json.loads(path.read_text())
        del config["weight_range"]
        path.write_text(json.dumps(config))
    for features, matters in ((("avx2", "vnni"), False), (("avx2",), True), ((), True)):
        monkeypatch.setattr(model_folder, "this_cpu", lambda f=features: cpu.Cpu("a CPU", f))
        base = fuse_attention(
            BertForQuestionAnswering.from_pretrained(tmp_path), separate_products=True
        )
        loaded = quantizers.load_quantizers(base, str(tmp_path), "--model_student")
        model_folder.warn_of_overflow(loaded, "--model_student folder")
        lines = capfd.readouterr().err.splitlines()
        told = [line for line in lines if "INT8 weights use the full range" in line]
        assert len(told) == (matters and kind != WeightRange.PAIRS)


def test_a_folder_of_the_full_range_becomes_safe(settings: Made, tmp_path: Path) -> None:
    """As training on from it with --nncf_config does."""
    model = quantized(small_bert(), settings(weight_range="full"))
    assert overflows(file_of(model, tmp_path / "model.onnx")[0])
    quantizers.hold_weight_range(model, WeightRange.PAIRS)
    assert not overflows(file_of(model, tmp_path / "model.onnx")[0])
    assert set(INPUTS) == set(feed())
