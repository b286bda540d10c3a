"""nncf_config.json, checked key by key."""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import nncf.torch
from nncf.common.quantization.structs import QuantizationPreset, QuantizationScheme
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
from nncf.quantization.range_estimator import (
    AggregatorType,
    RangeEstimatorParameters,
    StatisticsType,
)

from cli import UserError, did_you_mean, read_object
from int8.weight_range import WeightRange

# The keys of the file: the arguments of nncf.quantize (without `mode`, which is for FP8), and
# weight_range, a key of our own.
SETTINGS: dict[str, Any] = {
    "weight_range": WeightRange,
    "preset": QuantizationPreset | None,
    "target_device": nncf.TargetDevice,
    "subset_size": int,
    "fast_bias_correction": bool,
    "model_type": nncf.ModelType | None,
    "ignored_scope": nncf.IgnoredScope,
    "advanced_parameters": AdvancedQuantizationParameters,
}

# Patterns of fnmatch for keys that NNCF accepts but that change no bit of a quantized model here:
# its torch backend has a single value for some; others are for convolutions or other frameworks.
WITHOUT_EFFECT = (
    "target_device",
    "fast_bias_correction",
    "ignored_scope.validate",
    "advanced_parameters.quantize_outputs",
    "advanced_parameters.inplace_statistics",
    "advanced_parameters.disable_channel_alignment",
    "advanced_parameters.batchwise_statistics",
    "advanced_parameters.quantizer_propagation_rule",
    "advanced_parameters.backend_params",
    "advanced_parameters.bias_correction_params.apply_for_all_nodes",
    "advanced_parameters.smooth_quant_alphas.convolution",
    "advanced_parameters.*_quantization_params.num_bits",
    "advanced_parameters.*_quantization_params.signedness_to_force",
    "advanced_parameters.*_quantization_params.narrow_range",
    "advanced_parameters.activations_quantization_params.per_channel",
    "advanced_parameters.*.clipping_value",
    "advanced_parameters.weights_range_estimator_params.*.aggregator_type",
)


@dataclasses.dataclass(frozen=True)
class Limit:
    """The numbers that a key may have: `allows` checks a number, `text` describes them."""

    text: str
    allows: Callable[[float], bool]


ALPHA = Limit("-1 or from 0 to 1", lambda value: value == -1 or 0 <= value <= 1)
LIMITS = {
    "subset_size": Limit("at least 1", lambda value: value >= 1),
    "advanced_parameters.smooth_quant_alpha": ALPHA,
    "advanced_parameters.smooth_quant_alphas.*": ALPHA,
    "advanced_parameters.*.quantile_outlier_prob": Limit(
        "at least 0 and below 0.5", lambda value: 0 <= value < 0.5
    ),
    "advanced_parameters.bias_correction_params.threshold": Limit(
        "at least 0", lambda value: value >= 0
    ),
}


@dataclasses.dataclass(frozen=True)
class NncfConfig:
    """The settings of --nncf_config.

    Attributes:
        path, raw: the file and its content.
        arguments: the arguments of nncf.quantize.
        weight_range: the integers that the weights of linear layers may be.
        without_effect: keys of the file that change nothing, by their names in the file.
    """

    path: str
    raw: dict[str, Any]
    arguments: dict[str, Any]
    weight_range: WeightRange = WeightRange.PAIRS
    without_effect: tuple[str, ...] = ()

    @property
    def subset_size(self) -> int:
        """The number of windows for calibration."""
        return int(self.arguments.get("subset_size", 300))


def read_nncf_config(path: str) -> NncfConfig:
    """Read the arguments of nncf.quantize from a JSON file, checking every key and value.

    Raises:
        UserError: not a readable JSON object; an unknown key; a value of the wrong type or range.
    """
    raw = read_object(path, "--nncf_config")
    settings: dict[str, object] = raw
    old_names: dict[str, str] = {}
    left_out: list[str] = []
    if "compression" in raw or "input_info" in raw:
        settings, old_names, left_out = _of_before_3(raw, path)
    _check_keys(settings, SETTINGS, path, "")
    arguments = {key: _build(SETTINGS[key], value, path, key) for key, value in settings.items()}
    for key, value in _leaves(settings):
        limits = [limit for pattern, limit in LIMITS.items() if fnmatch.fnmatchcase(key, pattern)]
        if limits and isinstance(value, int | float) and not limits[0].allows(value):
            raise UserError(f"--nncf_config: {path}: {key} is {value}, not {limits[0].text}")
    advanced = arguments.get("advanced_parameters")
    for name in ("weights", "activations"):
        _check_histogram(getattr(advanced, f"{name}_range_estimator_params", None), path, name)
        key = f"{name}_quantization_params"
        parameters = getattr(advanced, key, None)
        if parameters is not None and parameters.num_bits not in (None, 8):
            raise UserError(
                f"--nncf_config: {path}: advanced_parameters.{key}.num_bits is"
                f" {parameters.num_bits}; only 8 is INT8"
            )
    for i, pattern in enumerate(getattr(arguments.get("ignored_scope"), "patterns", [])):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"--nncf_config: {path}: ignored_scope.patterns[{i}], {pattern!r}, is not a"
                f" regular expression: {error}"
            ) from None
    left_out += [old_names.get(key, key) for key in _idle_keys(settings)]
    return NncfConfig(path, raw, arguments, _weight_range(arguments, path), tuple(left_out))


def _leaves(settings: Mapping[str, object], where: str = "") -> Iterator[tuple[str, object]]:
    """The full names ("a.b.c") and the values of all keys whose value has no keys of NNCF."""
    for key, value in settings.items():
        if isinstance(value, dict) and key != "backend_params":
            yield from _leaves(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def _idle_keys(settings: Mapping[str, object]) -> Iterator[str]:
    """Keys that change nothing, at all or together with the other keys."""
    given = dict(_leaves(settings))
    advanced = "advanced_parameters"
    weights = f"{advanced}.weights_quantization_params.mode"
    for key, value in given.items():
        above, _, name = key.rpartition(".")
        statistics = f"{given.get(f'{above}.statistics_type')}"
        aggregator = f"{given.get(f'{above}.aggregator_type')}"
        if (
            any(fnmatch.fnmatchcase(key, pattern) for pattern in WITHOUT_EFFECT)
            or (name == "overflow_fix" and value != "enable")
            # NNCF runs SmoothQuant for transformers alone.
            or ("smooth_quant_alpha" in key and settings.get("model_type") != "transformer")
            # A symmetric range has no minimum of its own.
            or (
                above == f"{advanced}.weights_range_estimator_params.min"
                and given.get(weights) != "asymmetric"
            )
            or (
                name == "quantile_outlier_prob"
                and "quantile" not in statistics
                and ("no_outliers" not in aggregator or ".weights_" in key)
            )
        ):
            yield key


def _check_histogram(ranges: RangeEstimatorParameters | None, path: str, name: str) -> None:
    """Check that both ends of a range are fitted by histogram, or neither.

    Raises:
        UserError: one alone is, or one without raw statistics.
    """
    by_histogram = set()
    for end in (ranges.min, ranges.max) if ranges else ():
        by_histogram.add(end.statistics_type == StatisticsType.RAW)
        by_histogram.add(end.aggregator_type == AggregatorType.HISTOGRAM)
    if len(by_histogram) > 1:
        raise UserError(
            f"--nncf_config: {path}: advanced_parameters.{name}_range_estimator_params: a histogram"
            " needs statistics_type raw and aggregator_type histogram, both in min and in max"
        )


def _weight_range(arguments: dict[str, Any], path: str) -> WeightRange:
    """Take weight_range out of the arguments. NNCF's overflow_fix: enable means half.

    Raises:
        UserError: overflow_fix contradicts weight_range, or the weights' quantizers cannot hold it.
    """
    advanced = arguments.get("advanced_parameters")
    halved = getattr(advanced, "overflow_fix", None) == nncf.OverflowFix.ENABLE
    chosen = arguments.pop("weight_range", WeightRange.HALF if halved else WeightRange.PAIRS)
    if halved and chosen != WeightRange.HALF:
        raise UserError(
            f"--nncf_config: {path}: overflow_fix: enable means weight_range: half, and"
            f" weight_range is {chosen}; leave one of them out"
        )
    weights = getattr(advanced, "weights_quantization_params", None)
    if weights and weights.mode == QuantizationScheme.ASYMMETRIC and chosen != WeightRange.FULL:
        raise UserError(
            f"--nncf_config: {path}: weights_quantization_params.mode is asymmetric, which cannot"
            f" hold weight_range: {chosen}; use symmetric, or weight_range: full for CPUs with VNNI"
        )
    return chosen


def _check_keys(raw: Iterable[str], known: Iterable[str], path: str, where: str) -> None:
    """Raise a UserError for the first unknown key."""
    for key in raw:
        if key not in known:
            hint = did_you_mean(key, known)
            raise UserError(f"--nncf_config: {path}: unknown key {where}{key}; {hint}")


def _build(kind: object, value: object, path: str, where: str) -> Any:
    """A value of type `kind` from a JSON value: dataclasses from objects, enums from strings."""

    def wrong(needed: str) -> UserError:
        return UserError(f"--nncf_config: {path}: {where} is {json.dumps(value)}, not {needed}")

    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = typing.get_args(kind)
        if value is None and types.NoneType in kinds:
            return None
        kind = kinds[0]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise wrong("an object")
        hints = typing.get_type_hints(kind)
        _check_keys(value, hints, path, f"{where}.")
        return kind(**{k: _build(hints[k], v, path, f"{where}.{k}") for k, v in value.items()})
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        # By name where the library's values are only digits ('0' ... '3').
        texts = all(str(each.value).isdigit() for each in kind)
        members = {each.name.lower() if texts else each.value: each for each in kind}
        if not isinstance(value, str) or value not in members:
            raise wrong(f"one of {', '.join(members)}")
        return members[value]
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise wrong("a list")
        (inner,) = typing.get_args(kind)
        return [_build(inner, each, path, f"{where}[{i}]") for i, each in enumerate(value)]
    plain = typing.get_origin(kind) or kind
    assert isinstance(plain, type)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string",
             dict: "an object"}  # fmt: skip
    accepted = (int, float) if plain is float else (plain,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and plain is not bool):
        raise wrong(names[plain])
    return value


def _compression(raw: Mapping[str, object], path: str) -> dict[str, object]:
    """The settings of an NNCFConfig's only algorithm, quantization."""
    compression = raw.get("compression", {})
    if isinstance(compression, list):
        if len(compression) != 1:
            raise UserError(
                f"--nncf_config: {path}: compression lists {len(compression)} algorithms; one,"
                " quantization, is possible"
            )
        compression = compression[0]
    if not isinstance(compression, dict):
        raise UserError(f"--nncf_config: {path}: compression is not an object")
    algorithm = compression.get("algorithm", "quantization")
    if algorithm != "quantization":
        raise UserError(
            f"--nncf_config: {path}: compression.algorithm is {algorithm!r}, not 'quantization'"
        )
    return compression


def _of_before_3(
    raw: Mapping[str, object], path: str
) -> tuple[dict[str, object], dict[str, str], list[str]]:
    """Convert the settings of an NNCFConfig, as NNCF had it before version 3.

    Returns:
        today's settings, the old names of today's keys, and the old keys without a successor.
    """
    settings: dict[str, object] = {"model_type": "transformer"}
    advanced: dict[str, object] = {}
    old_names: dict[str, str] = {}
    left_out = [key for key in raw if key not in ("compression", "target_device")]
    if "target_device" in raw:
        settings["target_device"] = raw["target_device"]
    for key, value in _compression(raw, path).items():
        where = f"compression.{key}"
        if key == "preset":
            settings["preset"] = value
        elif key == "ignored_scopes":
            scopes = _build(list[str], [value] if isinstance(value, str) else value, path, where)
            patterns = [s[len("{re}") :] for s in scopes if s.startswith("{re}")]
            if patterns:
                settings["ignored_scope"] = {"patterns": patterns}
            left_out += [f"{where} {s!r}" for s in scopes if not s.startswith("{re}")]
        elif key in ("weights", "activations") and isinstance(value, dict):
            names = {"bits": "num_bits", "mode": "mode", "per_channel": "per_channel",
                     "signed": "signedness_to_force"}  # fmt: skip
            known = {names[k]: v for k, v in value.items() if k in names}
            if known:
                advanced[f"{key}_quantization_params"] = known
            today = f"advanced_parameters.{key}_quantization_params"
            old_names |= {f"{today}.{names[k]}": f"{where}.{k}" for k in value if k in names}
            left_out += [f"{where}.{k}" for k in value if k not in names]
        elif key == "initializer" and isinstance(value, dict):
            samples = _build(dict, value.get("range", {}), path, f"{where}.range")
            if "num_init_samples" in samples:
                settings["subset_size"] = samples["num_init_samples"]
            left_out += [f"{where}.range.{k}" for k in samples if k != "num_init_samples"]
            left_out += [f"{where}.{k}" for k in value if k != "range"]
        elif key in ("overflow_fix", "quantize_outputs"):
            advanced[key] = value
            old_names[f"advanced_parameters.{key}"] = where
        elif key != "algorithm":
            left_out.append(where)
    if advanced:
        settings["advanced_parameters"] = advanced
    return settings, old_names, left_out
