"""Tests of the keys of nncf_config.json: each documented one does what docs/int8.md says, and one
that does nothing is told of."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import call
from conftest import ROOT, command_of
from nncf.torch.function_hook.wrapper import get_hook_storage
from nncf.torch.quantization.layers import (
    AsymmetricQuantizer,
    BaseQuantizer,
    SQMultiply,
    SymmetricQuantizer,
)
from test_weight_range import feed, tensors
from transformers import BertConfig, BertForQuestionAnswering

from bert.attention import fuse_attention
from cli import UserError
from int8 import calibration, quantizers, settings
from int8.settings import NncfConfig, read_nncf_config

Keys = dict[str, Any]
ADVANCED = "advanced_parameters"
BASE: Keys = {"model_type": "transformer", "preset": "mixed", "weight_range": "full"}


@functools.cache
def source() -> BertForQuestionAnswering:
    """A BERT of one layer; one of its states' 16 coordinates is far larger than the others."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=64,
    )  # fmt: skip
    model = BertForQuestionAnswering(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        model.bert.embeddings.LayerNorm.weight[3] = 30.0
    return fuse_attention(model, separate_products=True).eval()


def read(keys: Keys) -> NncfConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nncf_config.json"
        path.write_text(json.dumps(keys))
        return read_nncf_config(str(path))


def nested(key: str, value: object) -> Keys:
    """{"a": {"b": value}} for the key a.b."""
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


def together(*several: Keys) -> Keys:
    """All of them, those within objects too."""
    result: Keys = {}
    for keys in several:
        for key, value in keys.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = together(result[key], value) if both else value
    return result


@functools.cache
def _calibrated(keys: str, samples: int) -> BertForQuestionAnswering:
    config, model = read(json.loads(keys)), copy.deepcopy(source())
    calibration.check_scope(config, model)
    return calibration.calibrate(model, config, [tensors(feed(seed)) for seed in range(samples)])


def calibrated(*keys: Keys, samples: int = 3) -> BertForQuestionAnswering:
    """The model, quantized with `BASE` and these keys."""
    return _calibrated(json.dumps(together(BASE, *keys)), samples)


def of(model: BertForQuestionAnswering, weights: bool) -> dict[str, BaseQuantizer]:
    """The quantizers of weights, or those of activations."""
    found = quantizers.quantizers(model)
    return {name: each for name, each in found if quantizers.weight_quantizer(name) == weights}


def ends(model: BertForQuestionAnswering, weights: bool = False) -> list[tuple[float, float]]:
    """The lowest and highest value of each quantizer, on average over its channels."""
    with torch.no_grad():
        ranges = [each.get_input_low_input_high() for each in of(model, weights).values()]
    return [(float(low.mean()), float(high.mean())) for low, high in ranges]


def smoothing(model: BertForQuestionAnswering) -> list[torch.Tensor]:
    modules = get_hook_storage(model).modules()
    return [each.scale.flatten() for each in modules if isinstance(each, SQMultiply)]


def in_float(model: BertForQuestionAnswering, kind: str) -> int:
    """How many operations of a kind are not INT8."""
    return next(int(r["float"]) for r in quantizers.what_is_int8(model) if r["kind"] == kind)


def integers(model: BertForQuestionAnswering) -> Iterator[torch.Tensor]:
    """The integers [N, K] of each linear layer's weight, without their signs."""
    for quantizer, weight in quantizers.second_factors(model):
        if weight is not None:
            with torch.no_grad():
                yield (quantizer(weight) / (quantizer.scale / 127)).round().abs()


def biases_moved(model: BertForQuestionAnswering) -> int:
    before = source().state_dict()
    after = model.state_dict()
    return sum(not torch.equal(after[name], before[name]) for name in before if "bias" in name)


# ------------------------------------------------------------------------------------------------
# What each documented key does


def preset() -> None:
    kinds = {type(each) for each in of(calibrated({"preset": "mixed"}), weights=False).values()}
    assert AsymmetricQuantizer in kinds
    model = calibrated({"preset": "performance"})
    assert {type(each) for each in of(model, weights=False).values()} == {SymmetricQuantizer}


def model_type() -> None:
    transformer, other = calibrated(), calibrated({"model_type": None})
    assert (in_float(transformer, "matmul"), in_float(other, "matmul")) == (1, 0)
    assert smoothing(transformer) and not smoothing(other)


def weight_range() -> None:
    largest, pairs = {}, {}
    for kind in ("pairs", "half", "full"):
        weights = list(integers(calibrated({"weight_range": kind})))
        largest[kind] = max(float(each.max()) for each in weights)
        pairs[kind] = max(float(each.unflatten(1, (-1, 2)).sum(2).max()) for each in weights)
    assert (largest["half"], largest["full"]) == (64, 127) and 64 < largest["pairs"] < 128
    assert pairs["pairs"] <= 128 < pairs["full"]


def subset_size() -> None:
    assert read({"subset_size": 7}).subset_size == 7
    assert ends(calibrated(samples=1)) != ends(calibrated(samples=3))


def ignored_names() -> None:
    assert in_float(calibrated(nested("ignored_scope.names", ["qa_outputs"])), "linear") == 1


def ignored_patterns() -> None:
    assert (
        in_float(calibrated(nested("ignored_scope.patterns", [".*query", ".*key"])), "linear") == 2
    )


def ignored_types() -> None:
    assert in_float(calibrated(), "matmul") == 1
    assert in_float(calibrated(nested("ignored_scope.types", ["matmul"])), "matmul") == 2


def ignored_subgraphs() -> None:
    layer = "bert.encoder.layer.0"
    part = {"inputs": [f"{layer}.intermediate.dense"], "outputs": [f"{layer}.output.dense"]}
    assert in_float(calibrated(nested("ignored_scope.subgraphs", [part])), "linear") == 2


def alphas() -> None:
    key = f"{ADVANCED}.smooth_quant_alphas.matmul"
    assert not smoothing(calibrated(nested(key, -1)))
    # The first linear layers read the coordinate that is far larger than the others.
    little, much = (smoothing(calibrated(nested(key, alpha)))[0] for alpha in (0.3, 0.95))
    assert little[3] == little.min() and much[3] == much.min()
    assert much[3] / much.median() < little[3] / little.median() < 1


def weights_mode() -> None:
    model = calibrated(nested(f"{ADVANCED}.weights_quantization_params.mode", "asymmetric"))
    assert {type(each) for each in of(model, weights=True).values()} == {AsymmetricQuantizer}
    assert {type(each) for each in of(calibrated(), weights=True).values()} == {SymmetricQuantizer}


def weights_per_channel() -> None:
    model = calibrated(nested(f"{ADVANCED}.weights_quantization_params.per_channel", False))
    assert {each.scale.numel() for each in of(model, weights=True).values()} == {1}
    assert {each.scale.numel() for each in of(calibrated(), weights=True).values()} > {16, 24, 60}


def activations_mode() -> None:
    """Whatever the preset would choose."""
    key = f"{ADVANCED}.activations_quantization_params.mode"
    model = calibrated({"preset": "mixed"}, nested(key, "symmetric"))
    assert {type(each) for each in of(model, weights=False).values()} == {SymmetricQuantizer}
    model = calibrated({"preset": "performance"}, nested(key, "asymmetric"))
    assert AsymmetricQuantizer in {type(each) for each in of(model, weights=False).values()}


def activations_statistics() -> None:
    """A quantile leaves out what is beyond it; a larger share leaves out more."""
    lows, highs = [], []
    for share in (None, 0.01, 0.2):
        estimator: Keys = {}
        if share:
            quantile = {"statistics_type": "quantile", "quantile_outlier_prob": share}
            estimator = nested(
                f"{ADVANCED}.activations_range_estimator_params",
                {"min": quantile, "max": quantile},
            )
        found = ends(calibrated(estimator))
        lows.append(sum(low for low, _ in found))
        highs.append(sum(high for _, high in found))
    assert lows == sorted(lows) and highs == sorted(highs, reverse=True)
    assert len(set(lows)) == len(set(highs)) == 3


def activations_aggregator() -> None:
    """The ends of all windows, or the means of each one's."""
    widest = {"min": {"aggregator_type": "min"}, "max": {"aggregator_type": "max"}}
    key = f"{ADVANCED}.activations_range_estimator_params"
    for (low, high), (mean_low, mean_high) in zip(
        ends(calibrated(nested(key, widest))), ends(calibrated()), strict=True
    ):
        assert low <= mean_low and mean_high <= high and (low, high) != (mean_low, mean_high)
    histogram = {"statistics_type": "raw", "aggregator_type": "histogram"}
    model = calibrated(nested(key, {"min": histogram, "max": histogram}))
    assert ends(model) != ends(calibrated())


def weights_largest() -> None:
    sizes = []
    for share in (None, 0.05, 0.2):
        quantile = {"statistics_type": "abs_quantile", "quantile_outlier_prob": share}
        key = f"{ADVANCED}.weights_range_estimator_params.max"
        model = calibrated(nested(key, quantile) if share else {})
        sizes.append(sum(high for _, high in ends(model, weights=True)))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def weights_smallest() -> None:
    lows = []
    for share in (None, 0.05, 0.2):
        quantile = {"statistics_type": "quantile", "quantile_outlier_prob": share}
        key = f"{ADVANCED}.weights_range_estimator_params.min"
        mode = nested(f"{ADVANCED}.weights_quantization_params.mode", "asymmetric")
        model = calibrated(mode, nested(key, quantile) if share else {})
        lows.append(sum(low for low, _ in ends(model, weights=True)))
    assert lows == sorted(lows) and len(set(lows)) == 3


def overflow_fix() -> None:
    config = read(nested(f"{ADVANCED}.overflow_fix", "enable"))
    assert config.weight_range == "half" and not config.without_effect


def no_bias_correction() -> None:
    assert biases_moved(calibrated()) > 0
    assert biases_moved(calibrated(nested(f"{ADVANCED}.disable_bias_correction", True))) == 0


def bias_threshold() -> None:
    key = f"{ADVANCED}.bias_correction_params.threshold"
    none, all_biases = (biases_moved(calibrated(nested(key, limit))) for limit in (0, 1e9))
    assert none == 0 < all_biases


ESTIMATORS = f"{ADVANCED}.{{}}_range_estimator_params.{{}}.{{}}"
EFFECTS = {
    "preset": preset,
    "model_type": model_type,
    "weight_range": weight_range,
    "subset_size": subset_size,
    "ignored_scope.names": ignored_names,
    "ignored_scope.patterns": ignored_patterns,
    "ignored_scope.types": ignored_types,
    "ignored_scope.subgraphs": ignored_subgraphs,
    f"{ADVANCED}.smooth_quant_alphas.matmul": alphas,
    f"{ADVANCED}.weights_quantization_params.mode": weights_mode,
    f"{ADVANCED}.weights_quantization_params.per_channel": weights_per_channel,
    f"{ADVANCED}.activations_quantization_params.mode": activations_mode,
    ESTIMATORS.format("activations", "min", "statistics_type"): activations_statistics,
    ESTIMATORS.format("activations", "max", "statistics_type"): activations_statistics,
    ESTIMATORS.format("activations", "min", "quantile_outlier_prob"): activations_statistics,
    ESTIMATORS.format("activations", "max", "quantile_outlier_prob"): activations_statistics,
    ESTIMATORS.format("activations", "min", "aggregator_type"): activations_aggregator,
    ESTIMATORS.format("activations", "max", "aggregator_type"): activations_aggregator,
    ESTIMATORS.format("weights", "max", "statistics_type"): weights_largest,
    ESTIMATORS.format("weights", "max", "quantile_outlier_prob"): weights_largest,
    ESTIMATORS.format("weights", "min", "statistics_type"): weights_smallest,
    ESTIMATORS.format("weights", "min", "quantile_outlier_prob"): weights_smallest,
    f"{ADVANCED}.overflow_fix": overflow_fix,
    f"{ADVANCED}.disable_bias_correction": no_bias_correction,
    f"{ADVANCED}.bias_correction_params.threshold": bias_threshold,
}  # fmt: skip
# NNCF's own old name of smooth_quant_alphas.matmul, which is taken and not documented.
OLD = (f"{ADVANCED}.smooth_quant_alpha",)


@pytest.mark.parametrize("effect", dict.fromkeys(EFFECTS.values()), ids=lambda f: f.__name__)
def test_a_documented_key_changes_the_model_as_it_says(effect: typing.Callable[[], None]) -> None:
    effect()


def all_keys(kinds: dict[str, Any], where: str = "") -> Iterator[str]:
    """Every key that a file may have."""
    for name, kind in kinds.items():
        inner = kind if typing.get_origin(kind) is list else (typing.get_args(kind) or (kind,))[0]
        if dataclasses.is_dataclass(inner):
            yield from all_keys(typing.get_type_hints(inner), f"{where}{name}.")
        else:
            yield f"{where}{name}"


def test_every_key_is_documented_or_told_to_have_no_effect() -> None:
    text = (ROOT / "docs" / "int8.md").read_text()
    rows = "".join(line for line in text.splitlines() if line.startswith("| `"))
    documented = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", rows))))
    for key in all_keys(settings.SETTINGS):
        idle = [*read_any(key)]
        assert (key in EFFECTS) + (key in OLD) + bool(idle) == 1, key
        if key in EFFECTS:
            assert documented.issuperset(key.split(".")), key
    assert not documented & {
        "target_device", "fast_bias_correction", "validate", "quantize_outputs", "clipping_value",
        "quantizer_propagation_rule", "narrow_range", "signedness_to_force", "num_bits",
    }  # fmt: skip


def read_any(key: str) -> Iterator[str]:
    """The key, if it is among those that change nothing whatever their value."""
    beside = {
        "model_type": "transformer",
        **nested(f"{ADVANCED}.weights_quantization_params.mode", "asymmetric"),
    }
    if key.endswith("quantile_outlier_prob"):
        above = key.rpartition(".")[0]
        beside = together(beside, nested(f"{above}.statistics_type", "quantile"))
    value = (
        "enable" if key.endswith("overflow_fix") else "transformer" if key == "model_type" else 0
    )
    return (k for k in settings._idle_keys(together(beside, nested(key, value))) if k == key)


# ------------------------------------------------------------------------------------------------
# Keys that do nothing

IDLE = {
    "target_device": "GPU",
    "fast_bias_correction": True,
    "ignored_scope.validate": False,
    f"{ADVANCED}.quantize_outputs": True,
    f"{ADVANCED}.inplace_statistics": False,
    f"{ADVANCED}.disable_channel_alignment": False,
    f"{ADVANCED}.batchwise_statistics": True,
    f"{ADVANCED}.backend_params": {"x": 1},
    f"{ADVANCED}.overflow_fix": "first_layer_only",
    f"{ADVANCED}.bias_correction_params.apply_for_all_nodes": False,
    f"{ADVANCED}.smooth_quant_alphas.convolution": 0.5,
    f"{ADVANCED}.weights_quantization_params.num_bits": 8,
    f"{ADVANCED}.weights_quantization_params.signedness_to_force": True,
    f"{ADVANCED}.weights_quantization_params.narrow_range": True,
    f"{ADVANCED}.activations_quantization_params.num_bits": 8,
    f"{ADVANCED}.activations_quantization_params.per_channel": False,
    f"{ADVANCED}.activations_quantization_params.narrow_range": False,
    ESTIMATORS.format("activations", "min", "clipping_value"): 0.1,
    ESTIMATORS.format("activations", "max", "clipping_value"): 0.1,
    ESTIMATORS.format("activations", "max", "quantile_outlier_prob"): 0.3,
    ESTIMATORS.format("weights", "max", "clipping_value"): 0.1,
    ESTIMATORS.format("weights", "max", "aggregator_type"): "mean",
    ESTIMATORS.format("weights", "max", "quantile_outlier_prob"): 0.3,
    ESTIMATORS.format("weights", "min", "statistics_type"): "quantile",
}


@pytest.mark.parametrize(
    "rule",
    ["do_not_merge_branches", "merge_if_all_branches_same", "merge_with_potential_requantization"],
)
def test_keys_without_effect_are_told_and_change_no_bit(rule: str) -> None:
    idle = {**IDLE, f"{ADVANCED}.quantizer_propagation_rule": rule}
    keys = [nested(key, value) for key, value in idle.items()]
    assert set(read(together(BASE, *keys)).without_effect) == set(idle)
    without, model = (calibrated(*given).state_dict() for given in ([], keys))
    assert without.keys() == model.keys()
    assert all(torch.equal(without[name], model[name]) for name in without)


def test_smoothing_without_model_type_is_told() -> None:
    alpha = f"{ADVANCED}.smooth_quant_alphas.matmul"
    assert read(nested(alpha, 0.5)).without_effect == (alpha,)
    assert read({"model_type": "transformer", **nested(alpha, 0.5)}).without_effect == ()


def test_a_users_file_with_keys_without_effect_is_warned_about_in_one_line(
    teacher: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """The last of its keys ends the run before anything takes long."""
    path = tmp_path / "nncf_config.json"
    keys = (nested("target_device", "CPU"), nested(f"{ADVANCED}.quantize_outputs", True))
    path.write_text(json.dumps(together(*keys, nested("ignored_scope.names", ["nothing"]))))
    out = tmp_path / "out"
    assert call(command_of("train_qa", teacher, few, out, f"--nncf_config={path}")) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "without effect" in line]
    assert lines == [
        f"warning: --nncf_config: {path}: keys without effect: target_device,"
        f" {ADVANCED}.quantize_outputs"
    ]


def test_our_own_file_has_no_key_without_effect() -> None:
    assert read_nncf_config(str(ROOT / "nncf_config.json")).without_effect == ()


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("subset_size", 0, "at least 1"),
        (f"{ADVANCED}.smooth_quant_alphas.matmul", 5, "-1 or from 0 to 1"),
        (f"{ADVANCED}.smooth_quant_alphas.matmul", -0.5, "-1 or from 0 to 1"),
        (f"{ADVANCED}.smooth_quant_alphas.matmul", float("nan"), "-1 or from 0 to 1"),
        (f"{ADVANCED}.smooth_quant_alpha", 1.1, "-1 or from 0 to 1"),
        (f"{ADVANCED}.bias_correction_params.threshold", -1, "at least 0"),
        (ESTIMATORS.format("weights", "max", "quantile_outlier_prob"), 0.5, "below 0.5"),
        (ESTIMATORS.format("activations", "min", "quantile_outlier_prob"), -0.1, "below 0.5"),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(key: str, value: float, allowed: str) -> None:
    with pytest.raises(UserError, match="--nncf_config") as error:
        read(nested(key, value))
    assert f"{key} is {value}, not " in str(error.value) and allowed in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "ends",
    [
        {"min": {"statistics_type": "raw"}},
        {"max": {"aggregator_type": "histogram"}},
        {"min": {"statistics_type": "raw", "aggregator_type": "histogram"}},
    ],
)
def test_half_a_histogram_is_refused_in_one_line(ends: Keys) -> None:
    with pytest.raises(UserError, match="a histogram needs") as error:
        read(nested(f"{ADVANCED}.activations_range_estimator_params", ends))
    assert "\n" not in str(error.value)
