"""Tests of the folder of an INT8 model: what it holds, and what loads it."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.function_hook.wrapper import get_hook_storage
from nncf.torch.quantization.layers import SQMultiply
from safetensors.torch import load_file
from test_weight_range import LENGTH, feed, file_of, quantized, small_bert, tensors
from torch import nn
from transformers import AutoModelForQuestionAnswering, PreTrainedModel

import bert_pack  # noqa: F401 - registers packed models
from bert.attention import fuse_attention
from bert.model_folder import load_model, open_model
from bert.packed import PackedBertConfig, PackedBertForQuestionAnswering
from int8 import calibration, quantizers
from int8.settings import NncfConfig, read_nncf_config
from squad_utils import INPUTS


def small_packed() -> PackedBertForQuestionAnswering:
    """A packed and merged BERT of 2 layers."""
    torch.manual_seed(0)
    config = PackedBertConfig(
        vocab_size=60, max_position_embeddings=64, hidden_size=32, state_size=48, head_size=16,
        num_hidden_layers=2, num_attention_heads=2, ff_iter_num=2, merged=True,
    )  # fmt: skip
    model = PackedBertForQuestionAnswering(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return fuse_attention(model, separate_products=True).eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": small_bert,
    "packed_bert": small_packed,
}


def settings(**keys: object) -> NncfConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nncf_config.json"
        path.write_text(json.dumps({"model_type": "transformer", "preset": "mixed", **keys}))
        return read_nncf_config(str(path))


@functools.cache
def _smoothed(kind: str) -> PreTrainedModel:
    return quantized(MODELS[kind](), settings())


def smoothed(kind: str) -> PreTrainedModel:
    """A model with quantizers and SmoothQuant, to be changed at will."""
    return copy.deepcopy(_smoothed(kind))


def logits(model: PreTrainedModel, seed: int = 7) -> torch.Tensor:
    with torch.no_grad():
        outputs = model(**tensors(feed(seed)))
    return torch.cat([outputs.start_logits, outputs.end_logits])


def without_quantizers(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights, and SmoothQuant's scales; nothing is rounded."""
    model = copy.deepcopy(model)
    for name, _ in list(quantizers.quantizers(model)):
        get_hook_storage(model).set_submodule(name, nn.Identity())
    return model


def plain(folder: Path) -> PreTrainedModel:
    """The model as anyone loads it, with the attention that the quantizers' model has: another
    order of sums would give other bits."""
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    return fuse_attention(model, separate_products=True).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_from_pretrained_gives_the_answers_of_the_weights_without_quantizers(
    kind: str, tmp_path: Path
) -> None:
    model = smoothed(kind)
    quantizers.save_quantized(model, str(tmp_path))
    assert torch.equal(logits(plain(tmp_path)), logits(without_quantizers(model)))
    assert not torch.equal(logits(plain(tmp_path)), logits(model))
    # Bias correction has moved biases, and nothing has moved a weight.
    saved = load_file(tmp_path / "model.safetensors")
    for name, value in MODELS[kind]().state_dict().items():
        if not name.endswith("bias"):
            assert torch.equal(saved[name], value), name


@pytest.mark.parametrize("kind", MODELS)
def test_a_loaded_folder_is_the_model_that_was_saved(kind: str, tmp_path: Path) -> None:
    """To the bit; after training too, which leaves the scales as they are."""
    model = smoothed(kind)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for step in range(3):
        outputs = model(**tensors(feed(step)))
        (outputs.start_logits[:, 3] - outputs.end_logits[:, 5]).square().sum().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    folder, again = tmp_path / "folder", tmp_path / "again"
    quantizers.save_quantized(model, str(folder))
    loaded = load_model(open_model(str(folder), "--model"), AutoModelForQuestionAnswering, True)
    loaded.eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(plain(folder)), logits(without_quantizers(model)))
    assert not any(name.endswith("_scale_value") for name, _ in loaded.named_parameters())
    quantizers.save_quantized(loaded, str(again))
    for name in ("model.safetensors", quantizers.QUANTIZERS, quantizers.QUANTIZER_WEIGHTS):
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name


def test_a_folder_of_scaled_weights_loads_and_trains_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions saved them: scales of any size, in the weights, and no mark."""
    monkeypatch.setattr(calibration, "nearest_power_of_two", lambda scales: scales)
    model = quantized(small_bert(), settings())
    quantizers.save_quantized(model, str(tmp_path))
    file = tmp_path / quantizers.QUANTIZERS
    config = json.loads(file.read_text())
    assert config.pop(quantizers.PLAIN_WEIGHTS) is False
    file.write_text(json.dumps(config))
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.items())
    loaded = load_model(open_model(str(tmp_path), "--model"), AutoModelForQuestionAnswering, True)
    loaded.eval()
    assert torch.equal(logits(loaded), logits(model))
    scales = [name for name, _ in loaded.named_parameters() if name.endswith("_scale_value")]
    assert len(scales) == 9
    assert "no model by itself" in quantizers.how_it_loads(str(tmp_path), "train_qa.py")


def test_the_card_says_what_loads_how(tmp_path: Path) -> None:
    quantizers.save_quantized(smoothed("bert"), str(tmp_path))
    text = quantizers.how_it_loads(str(tmp_path), "train_qa.py")
    assert "`train_qa.py --model_student=<this folder>` loads the INT8 model" in text
    assert "`model.safetensors` is a plain model in FP32, which `from_pretrained` loads" in text


@given(st.floats(2.0**-40, 2.0**40, width=32))
def test_scales_are_rounded_to_the_nearest_power_of_two(scale: float) -> None:
    (found,) = calibration.nearest_power_of_two(torch.tensor([scale])).tolist()
    assert torch.frexp(torch.tensor(found)).mantissa == 0.5
    assert 0.5**0.5 <= scale / found <= 2**0.5 * (1 + 1e-6)


def test_all_scales_are_powers_of_two_after_calibration() -> None:
    model = smoothed("bert")
    modules = [m for m in get_hook_storage(model).modules() if isinstance(m, SQMultiply)]
    assert len(modules) == 9 and len({float(s) for m in modules for s in m.scale.flatten()}) > 3
    assert quantizers.has_exact_scales(model)


# ------------------------------------------------------------------------------------------------
# Embedding tables in the exported file


@pytest.mark.parametrize("per_channel", [True, False])
def test_each_row_of_an_exported_embedding_table_is_that_of_pytorch(
    per_channel: bool, tmp_path: Path
) -> None:
    """Read behind each look-up, before a LayerNorm hides what is wrong."""
    model = small_bert()
    with torch.no_grad():  # ranges that lie far from symmetric
        model.bert.embeddings.word_embeddings.weight.add_(torch.linspace(-1, 1, 60)[:, None])
    weights = {"mode": "asymmetric", "per_channel": per_channel}
    advanced = {"weights_quantization_params": weights}
    model = quantized(model, settings(weight_range="full", advanced_parameters=advanced))
    names = {o.node: o.name for o in quantizers.operations(model) if o.kind == "embedding"}
    tables = {}  # as PyTorch rounds them
    with torch.no_grad():
        for name, quantizer in quantizers.quantizers(model):
            if module := names.get(decode_hook_name(name)[1]):
                tables[module] = quantizer(model.get_submodule(module).weight).numpy()
    file, check = file_of(model, tmp_path / "model.onnx")
    assert check.passed
    inputs = dict(zip(("word", "position", "token_type"), np.array(INPUTS)[[0, 3, 2]], strict=True))
    looked_up = {  # the output of each look-up, by the input that it reads
        node.output[0]: next(n for n in file.graph.node if n.name == f"{base}.look").input[1]
        for node in file.graph.node
        if (base := node.name.rpartition(".")[0]) and "embeddings" in base
        and node.name.endswith((".multiply", ".dequantize"))
    }  # fmt: skip
    assert sorted(looked_up.values()) == sorted(inputs.values())
    file.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in looked_up)
    session = onnxruntime.InferenceSession(
        file.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for module, expected in tables.items():
        given = inputs[module.rpartition(".")[2].removesuffix("_embeddings")]
        (output,) = [name for name, ids in looked_up.items() if ids == given]
        for start in range(0, len(expected), LENGTH):
            rows = np.arange(start, start + LENGTH).clip(max=len(expected) - 1)
            (found,) = session.run([output], {**feed(), given: rows[None]})
            assert np.abs(found[0] - expected[rows]).max() < 1e-5
