"""nncf_config.json: its keys, checked one by one."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import nncf.torch
from nncf.common.quantization.structs import QuantizationPreset, QuantizationScheme
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters

from cli import UserError, did_you_mean
from int8.weight_range import WeightRange

# What the file may give: the arguments of nncf.quantize (without `mode`, which is for FP8), and a
# key of our own.
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


@dataclasses.dataclass(frozen=True)
class NncfConfig:
    """What --nncf_config says.

    Attributes:
        path, raw: the file, and what it holds.
        arguments: of nncf.quantize.
        weight_range: which integers the weights of linear layers may be.
        left_out: keys of a file in the format of NNCF before 3.0 that have no meaning any more.
    """

    path: str
    raw: dict[str, Any]
    arguments: dict[str, Any]
    weight_range: WeightRange = WeightRange.PAIRS
    left_out: tuple[str, ...] = ()

    @property
    def subset_size(self) -> int:
        """Windows to calibrate on."""
        return int(self.arguments.get("subset_size", 300))


def read_nncf_config(path: str) -> NncfConfig:
    """Read the arguments of nncf.quantize from a JSON file, checking every key and value.

    Raises:
        UserError: not a readable JSON object; an unknown key; a value of the wrong type or range.
    """
    try:
        with open(path, encoding="utf-8") as file:
            raw = json.load(file)
    except OSError as error:
        raise UserError(f"--nncf_config: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--nncf_config: {path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"--nncf_config: {path} is not a JSON object of settings")
    settings: dict[str, object] = raw
    left_out: tuple[str, ...] = ()
    if "compression" in raw or "input_info" in raw:
        settings, left_out = _of_before_3(raw, path)
    _check_keys(settings, SETTINGS, path, "")
    arguments = {key: _build(SETTINGS[key], value, path, key) for key, value in settings.items()}
    if arguments.get("subset_size", 1) < 1:
        raise UserError(
            f"--nncf_config: {path}: subset_size is {arguments['subset_size']}, below 1"
        )
    advanced = arguments.get("advanced_parameters")
    for name in ("weights", "activations"):
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
    return NncfConfig(path, raw, arguments, _weight_range(arguments, path), left_out)


def _weight_range(arguments: dict[str, Any], path: str) -> WeightRange:
    """Take weight_range out of the arguments; NNCF's overflow_fix asks for half of the range too.

    Raises:
        UserError: the two differ, or the weights' quantizers cannot hold the range.
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
    """Raise a UserError for the first key that is not known."""
    for key in raw:
        if key not in known:
            hint = did_you_mean(key, known)
            raise UserError(f"--nncf_config: {path}: unknown key {where}{key}; {hint}")


def _build(kind: object, value: object, path: str, where: str) -> Any:
    """A value of type `kind` from what JSON gave; dataclasses from objects, enums from strings."""

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
        # Where the library's values say nothing ('0' ... '3'), by name.
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


def _of_before_3(raw: Mapping[str, object], path: str) -> tuple[dict[str, object], tuple[str, ...]]:
    """Today's settings for those of an NNCFConfig, and the keys of which nothing is left."""
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
    settings: dict[str, object] = {"model_type": "transformer"}
    advanced: dict[str, object] = {}
    left_out = [key for key in raw if key not in ("compression", "target_device")]
    if "target_device" in raw:
        settings["target_device"] = raw["target_device"]
    for key, value in compression.items():
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
            left_out += [f"{where}.{k}" for k in value if k not in names]
        elif key == "initializer" and isinstance(value, dict):
            samples = _build(dict, value.get("range", {}), path, f"{where}.range")
            if "num_init_samples" in samples:
                settings["subset_size"] = samples["num_init_samples"]
            left_out += [f"{where}.range.{k}" for k in samples if k != "num_init_samples"]
            left_out += [f"{where}.{k}" for k in value if k != "range"]
        elif key in ("overflow_fix", "quantize_outputs"):
            advanced[key] = value
        elif key != "algorithm":
            left_out.append(where)
    if advanced:
        settings["advanced_parameters"] = advanced
    return settings, tuple(left_out)
