"""Tests of the fake quantizers: the figures of NNCF's reference, without a wait or an extension."""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
from nncf.torch.quantization import extensions, quantize_functions
from nncf.torch.quantization.layers import AsymmetricQuantizer, PTQuantizerSpec, SymmetricQuantizer
from nncf.torch.quantization.layers import QuantizationMode as Mode
from nncf.torch.quantization.reference import ReferenceBackendType, ReferenceQuantize
from torch import Tensor, nn
from transformers import BertConfig, BertForQuestionAnswering

import bert_pack
from bert.attention import fuse_attention
from bert.packed import PackedBertForQuestionAnswering, merge
from int8 import calibration, fake_quantize, quantizers
from int8.settings import NncfConfig
from int8.weight_range import WeightRange, hold_in_use, use_seven_bits

LENGTH = 16
Kind = dict[str, bool]


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NNCF's own functions are its reference ones here, and no extension can be loaded."""
    plain = ReferenceQuantize(ReferenceBackendType.TORCH)
    functions = types.SimpleNamespace(
        Quantize_forward=plain.forward, Quantize_backward=plain.backward
    )
    monkeypatch.setattr(extensions.QuantizedFunctionsCPU, "_loaded_namespace", functions)
    yield
    fake_quantize._Compiled.failed = False


def make(symmetric: bool, shape: tuple[int, ...], **kind: bool | None) -> nn.Module:
    """A quantizer of 8 bits with random ranges."""
    spec = PTQuantizerSpec(
        num_bits=8,
        mode=Mode.SYMMETRIC if symmetric else Mode.ASYMMETRIC,
        signedness_to_force=kind.get("signed"),
        narrow_range=bool(kind.get("narrow")),
        half_range=bool(kind.get("half")),
        scale_shape=shape,
        logarithm_scale=False,
    )
    quantizer = (SymmetricQuantizer if symmetric else AsymmetricQuantizer)(spec)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape))
    return quantizer


def by_nncf(quantizer: nn.Module, x: Tensor) -> Tensor:
    """What NNCF's own functions make of x."""
    levels = (quantizer.levels, quantizer.level_low, quantizer.level_high)
    if isinstance(quantizer, SymmetricQuantizer):
        return quantize_functions.symmetric_quantize(x, *levels, quantizer.scale, quantizer.eps)
    return quantize_functions.asymmetric_quantize(
        x, *levels, quantizer.input_low, quantizer.input_range, quantizer.eps
    )


def figures(function: object, quantizer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The result, and the gradients of input and ranges."""
    x = x.detach().clone().requires_grad_()
    trained = [p for p in quantizer.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = None
    result = function(x)
    result.backward(grad.to(result.dtype))
    return [result.detach(), x.grad, *(parameter.grad for parameter in trained)]


SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@settings(max_examples=200)
@given(
    st.integers(0, 2**31),
    SHAPES,
    st.booleans(),
    st.booleans(),
    st.sampled_from([True, False]),
    st.booleans(),
    st.booleans(),
)
def test_every_bit_is_that_of_the_reference(
    seed: int, shape: tuple[int, ...], symmetric: bool, channels: bool, signed: bool, narrow: bool,
    half: bool,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    scale_shape = (shape[0], *(1 for _ in shape[1:])) if channels and len(shape) > 1 else (1,)
    quantizer = make(symmetric, scale_shape, signed=signed, narrow=narrow, half=half)
    x, grad = 2 * torch.randn(shape), torch.randn(shape)
    if len(shape) > 2:  # as queries and keys are
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    ours = figures(quantizer, quantizer, x, grad)
    theirs = figures(lambda x: by_nncf(quantizer, x), quantizer, x, grad)
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine, expected)


def test_a_frozen_range_changes_nothing_for_the_input() -> None:
    torch.manual_seed(0)
    for symmetric in (True, False):
        quantizer = make(symmetric, (1,))
        x, grad = torch.randn(8, 9), torch.randn(8, 9)
        expected = figures(quantizer, quantizer, x, grad)[:2]
        quantizer.requires_grad_(False)
        assert all(map(torch.equal, figures(quantizer, quantizer, x, grad), expected))


@pytest.mark.parametrize("symmetric", [True, False])
def test_bf16_gives_the_values_of_fp32(symmetric: bool) -> None:
    """NNCF computes in bf16, and most values are half a step off."""
    torch.manual_seed(0)
    quantizer = make(symmetric, (1,), signed=True)
    x, grad = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    expected = figures(quantizer, quantizer, x.float(), grad.float())
    assert quantizer(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        found = figures(quantizer, quantizer, x, grad)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    assert torch.equal(found[0], expected[0].bfloat16())
    assert torch.equal(found[1], expected[1].bfloat16())
    for mine, theirs in zip(found[2:], expected[2:], strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs)


def test_levels_follow_what_changes_them() -> None:
    quantizer = make(True, (1,), signed=False)
    assert quantizer.levels_in_use == (0, 255)
    other = make(True, (1,), signed=True)
    quantizer.load_state_dict(other.state_dict())
    assert quantizer.levels_in_use == (-128, 127)
    use_seven_bits(quantizer)
    assert quantizer.levels_in_use == (-64, 63)
    with torch.no_grad():
        integers = quantizer(torch.linspace(-9, 9, 999)) / (quantizer.scale.abs() / 63)
    assert integers.round().unique().tolist() == list(range(-64, 64))


# ------------------------------------------------------------------------------------------------
# Weights: rounded once


def held(weight: nn.Parameter) -> SymmetricQuantizer:
    quantizer = make(True, (len(weight), 1), signed=True, narrow=True)
    hold_in_use(quantizer, weight, WeightRange.PAIRS)
    return quantizer


def test_a_weight_is_rounded_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever moves it: AdamW, a loaded state; and whatever moves its range."""
    calls: list[int] = []
    rounds = fake_quantize._round_to
    monkeypatch.setattr(fake_quantize, "_round_to", lambda *a: calls.append(1) or rounds(*a))
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 8))
    quantizer = held(weight)
    trained = [weight, quantizer._scale_param_storage]
    optimizers = [torch.optim.AdamW(trained, fused=True), torch.optim.SGD(trained, lr=0.1)]
    for step in range(4):
        for _ in range(3):
            rounded = quantizer(weight)
            assert torch.equal(rounded, by_nncf(quantizer, weight))
            rounded.square().sum().backward()
        assert len(calls) == step + 1
        optimizers[step % 2].step()
    quantizer.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    hold_in_use(quantizer, weight, WeightRange.HALF)
    rounded = quantizer(weight)
    assert (rounded / quantizer.scale * 127).abs().max() <= 64.01
    assert torch.equal(copy.deepcopy(quantizer)(weight), rounded)


def test_gradients_of_several_passes_add_up() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 8))
    quantizer = held(weight)
    (quantizer(weight).square().sum() + quantizer(weight).square().sum()).backward()
    twice = [weight.grad, quantizer._scale_param_storage.grad]
    once = figures(quantizer, quantizer, weight, 2 * quantizer(weight).detach())[1:]
    for mine, expected in zip(twice, once, strict=True):
        assert torch.allclose(mine, 2 * expected)


# ------------------------------------------------------------------------------------------------
# Whole models


def model_of(packed: bool) -> nn.Module:
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    if packed:
        cfg = bert_pack.parse_pack_cfg("num_hidden_layers:2,num_attention_heads:2,hidden_size:16")
        student = PackedBertForQuestionAnswering(bert_pack.packed_config(config, cfg))
        return merge(student)
    return BertForQuestionAnswering(config)


def batch(rows: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 60, (rows, LENGTH))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "position_ids": torch.arange(LENGTH).expand(rows, LENGTH).contiguous(),
    }


def quantized(packed: bool) -> nn.Module:
    advanced = AdvancedQuantizationParameters()
    advanced.smooth_quant_alphas.matmul = -1
    arguments = {"advanced_parameters": advanced}
    config = NncfConfig("a file", {}, arguments)
    model = fuse_attention(model_of(packed), separate_products=True).eval()
    return calibration.calibrate(model, config, [batch(1)])


@pytest.mark.parametrize("packed", [False, True])
def test_no_pass_reads_a_value(packed: bool) -> None:
    """On the meta device there are none: to read one is an error, as a wait is on a GPU."""
    model = quantized(packed).to("meta").train()
    inputs = {name: each.to("meta") for name, each in batch(3).items()}
    if not packed:  # from a mask of two dimensions, the library's BERT reads whether it is needed
        inputs["attention_mask"] = inputs["attention_mask"][:, None, None].bool()
    for _ in range(2):
        outputs = model(**inputs)
        (outputs.start_logits.sum() + outputs.end_logits.sum()).backward()
    names = [name for name, _ in quantizers.quantizers(model)]
    assert len(names) > 20
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_no_extension_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("NNCF compiles")

    monkeypatch.setattr(extensions.QuantizedFunctionsCPU, "_loaded_namespace", None)
    monkeypatch.setattr(extensions.QuantizedFunctionsCPULoader, "load", fail)
    model = quantized(packed=False).train()
    model(**batch(2)).start_logits.sum().backward()


# ------------------------------------------------------------------------------------------------
# Compiled


def test_without_a_working_compiler_the_plain_functions_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> object:
        def fail(*_: object) -> None:
            raise RuntimeError("no such compiler\nand a long story")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(fake_quantize, "PLAIN_VALUES", 0)
    monkeypatch.setattr(fake_quantize, "_has_compiler", lambda: True)
    monkeypatch.setattr(fake_quantize, "_round_to", fake_quantize._Compiled(fake_quantize.round_to))
    quantizer = make(False, (1,))
    x = torch.randn(4, 5)
    for _ in range(3):
        assert torch.equal(quantizer(x), by_nncf(quantizer, x))
    lines = capfd.readouterr().err.splitlines()
    assert len([line for line in lines if "no such compiler" in line]) == 1
    assert not any("long story" in line for line in lines)


def test_all_kinds_of_inputs_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers with queries x keys in INT8 have more kinds than torch compiles by default."""

    def traced_alone(function: Callable[..., Tensor], **flags: Any) -> Callable[..., Tensor]:
        flags = {name: each for name, each in flags.items() if name != "options"}
        return compile_function(function, backend="eager", **flags)  # a second for all kinds

    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", traced_alone)
    monkeypatch.setattr(fake_quantize, "PLAIN_VALUES", 0)
    monkeypatch.setattr(fake_quantize, "_has_compiler", lambda: True)
    compiled = fake_quantize._Compiled(fake_quantize.round_to)
    kinds = itertools.product((1, 2, 3, 4), (torch.float32, torch.bfloat16), (False, True))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for dims, dtype, inference in kinds:
            with torch.inference_mode(inference):
                values = torch.rand(*[3] * dims, dtype=dtype)
                low, width, steps = (torch.rand(1) + 1 for _ in range(3))
                compiled(values, low, width, steps, dtype)
    assert not fake_quantize._Compiled.failed


def test_no_short_run_and_no_machine_without_a_compiler_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x = torch.randn(4, 5)
    monkeypatch.setattr(fake_quantize._Compiled, "values_seen", 0)
    assert not fake_quantize._Compiled._pays(x)
    monkeypatch.setattr(fake_quantize, "PLAIN_VALUES", 0)
    monkeypatch.setenv("CXX", "none")
    assert not fake_quantize._Compiled._pays(x)


@pytest.mark.slow
@pytest.mark.skipif(not fake_quantize._has_compiler(), reason="no C++ compiler")
def test_compiled_functions_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for name in ("_round_to", "_gradients"):
        function = getattr(fake_quantize, name).function
        monkeypatch.setattr(fake_quantize, name, fake_quantize._Compiled(function))
    for symmetric, shape in ((False, (1,)), (True, (40, 1))):
        quantizer = make(symmetric, shape, signed=True)
        x, grad = torch.randn(40, 300), torch.randn(40, 300)
        expected = figures(quantizer, quantizer, x, grad)
        with monkeypatch.context() as patch:
            patch.setattr(fake_quantize, "PLAIN_VALUES", 0)
            found = figures(quantizer, quantizer, x, grad)
        assert all(map(torch.equal, found, expected))
    assert fake_quantize._gradients.compiled is not None and not fake_quantize._Compiled.failed
