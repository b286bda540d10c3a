"""INT8 by NNCF: its configuration file, calibration, quantizers saved and loaded, what is INT8.

A quantized model is the FP32 model with NNCF's fake quantizers hooked into it: they round what
goes into linear layers, and their weights, to the values that INT8 arithmetic will have, and they
train like anything else. `onnx_utils` turns them into QuantizeLinear / DequantizeLinear.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import functools
import json
import logging
import os
import re
import shutil
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import nncf
import nncf.torch
import numpy as np
import torch
from nncf.common.quantization.structs import QuantizationPreset, QuantizationScheme
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
from nncf.quantization.algorithms.post_training import algorithm as post_training
from nncf.scopes import get_ignored_node_names_from_subgraph
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from nncf.torch.function_hook.wrapper import get_hook_storage, wrap_model
from nncf.torch.quantization.layers import BaseQuantizer, SymmetricQuantizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedModel

from cli_utils import UserError, is_main_process, warn
from deploy.cpu import this_cpu
from fast_attention import fuse_attention
from int8 import fake_quantize  # noqa: F401 - takes the place of NNCF's functions
from int8.weight_range import HoldWeightRange, WeightRange, hold_in_use, use_seven_bits
from model_utils import QUANTIZERS, is_quantized, load_model
from onnx_utils import INPUTS
from run_utils import CHECKPOINTS, Run
from training.passes import to_device

QUANTIZER_WEIGHTS = "quantizers.safetensors"  # beside model_utils.QUANTIZERS: their ranges
CALIBRATED = "calibrated"  # in CHECKPOINTS: the quantized model as calibration leaves it
HOOKS = "__nncf_hooks."  # what the names of the quantizers' parameters begin with
WEIGHT_RANGE = "weight_range"  # in model_utils.QUANTIZERS, beside NNCF's own keys

nncf.set_log_level(logging.ERROR)
# It warns at each saved state that ranges which several inputs share are stored once.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)

# What nncf.quantize raises for settings that its torch backend does not have.
REFUSALS = (
    ValueError,
    nncf.InternalError,
    nncf.ParameterNotSupportedError,
    nncf.ValidationError,
)


# ------------------------------------------------------------------------------------------------
# The configuration file

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
    settings, left_out = raw, ()
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


def _check_keys(raw: dict[str, Any], known: typing.Iterable[str], path: str, where: str) -> None:
    """Raise a UserError for the first key that is not known."""
    known = list(known)
    for key in raw:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise UserError(f"--nncf_config: {path}: unknown key {where}{key}; {hint}")


def _build(kind: Any, value: Any, path: str, where: str) -> Any:
    """A value of type `kind` from what JSON gave; dataclasses from objects, enums from strings."""

    def wrong(needed: str) -> UserError:
        return UserError(f"--nncf_config: {path}: {where} is {json.dumps(value)}, not {needed}")

    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = typing.get_args(kind)
        if value is None and types.NoneType in kinds:
            return None
        kind = kinds[0]
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise wrong("an object")
        hints = typing.get_type_hints(kind)
        _check_keys(value, hints, path, f"{where}.")
        return kind(**{k: _build(hints[k], v, path, f"{where}.{k}") for k, v in value.items()})
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        # Where the library's values say nothing ('0' ... '3'), by name.
        texts = all(str(each.value).isdigit() for each in kind)
        names = {each.name.lower() if texts else each.value: each for each in kind}
        if not isinstance(value, str) or value not in names:
            raise wrong(f"one of {', '.join(names)}")
        return names[value]
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise wrong("a list")
        (inner,) = typing.get_args(kind)
        return [_build(inner, each, path, f"{where}[{i}]") for i, each in enumerate(value)]
    kind = typing.get_origin(kind) or kind
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string",
             dict: "an object"}  # fmt: skip
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise wrong(names[kind])
    return value


def _of_before_3(raw: dict[str, Any], path: str) -> tuple[dict[str, Any], tuple[str, ...]]:
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
    settings: dict[str, Any] = {"model_type": "transformer"}
    advanced: dict[str, Any] = {}
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


# ------------------------------------------------------------------------------------------------
# Calibration


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a model.

    Attributes:
        name: that of its module, e.g. "bert.layers.0.qkv"; NNCF's where it has no weights.
        node: NNCF's name, which ignored_scope goes by.
        kind: e.g. "linear", "matmul", "softmax".
    """

    name: str
    node: str
    kind: str


# What arithmetic is done in; the rest moves numbers about.
KINDS = ("embedding", "linear", "matmul", "softmax", "layer_norm", "gelu", "relu", "add", "mul")


def operations(model: nn.Module) -> list[Operation]:
    """The operations that compute in one pass of the model, in their order."""
    found = []
    graph = _graph(model)
    for node in graph.get_all_nodes():
        if node.node_type not in KINDS:
            continue
        sources = [_source(graph, edge.from_node)[0] for edge in graph.get_input_edges(node)]
        weights = [
            source.node_name.removesuffix(".weight")
            for source in sources
            if source.node_type == "nncf_model_const" and source.node_name.endswith(".weight")
        ]
        name = weights[0] if weights else node.node_name
        found.append(Operation(name, node.node_name, node.node_type))
    return found


def check_nncf_config(path: str, model_name: str, auto_class: Any) -> NncfConfig:
    """The settings of --nncf_config, checked against --model_student; says what is left out.

    Raises:
        UserError: as `read_nncf_config`, `check_scope` and `calibrate`.
    """
    config = read_nncf_config(path)
    if config.left_out and is_main_process():
        warn(
            f"--nncf_config: {path} is of NNCF before 3.0; without a meaning today:"
            f" {', '.join(config.left_out)}"
        )
    if not is_quantized(model_name):
        model = load_model(model_name, "--model_student", auto_class, quiet=True)
        check_scope(config, fuse_attention(model, plain=True).eval())
        _try_settings(config)
    return config


def _try_settings(config: NncfConfig) -> None:
    """Quantize a BERT of no size: NNCF tells what it refuses only then.

    Raises:
        UserError: as `calibrate`.
    """
    tiny = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8
    )
    arguments = {**config.arguments, "ignored_scope": None}  # which is of another model
    sample = dict.fromkeys(INPUTS, torch.zeros(1, 8, dtype=torch.long))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        model = fuse_attention(BertForQuestionAnswering(tiny), plain=True)
        calibrate(model, dataclasses.replace(config, arguments=arguments), [sample])


def quantize(run: Run, model: PreTrainedModel, config: NncfConfig, task: Any) -> PreTrainedModel:
    """The model with quantizers, calibrated on the task's windows and evaluated before and after.

    That is done once: a run that goes on, and the processes beside the main one, find the model
    among the run's checkpoints.
    """
    device = run.accelerator.device
    folder = os.path.join(run.output_dir, CHECKPOINTS, CALIBRATED)
    model = fuse_attention(model, plain=True).eval().to(device)
    run.evaluate_once("fp32", lambda: task.evaluation(model, precise=True))
    if run.main and not is_quantized(folder):
        samples = [to_device(sample, device) for sample in task.calibration(config.subset_size)]
        run.say(f"calibrating quantizers on {len(samples)} windows")
        quantized = calibrate(model, config, samples, run.stop_if_asked).cpu()
        shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
        save_quantized(quantized, f"{folder}.tmp")
        os.replace(f"{folder}.tmp", folder)
    run.accelerator.wait_for_everyone()
    quantized = load_model(folder, "--output_dir", task.auto_class, quiet=True).eval().to(device)
    hold_weight_range(quantized, config.weight_range)
    run.evaluate_once("calibrated", lambda: task.evaluation(quantized, precise=True))
    run.note(quantized, "calibrated", 0, run.evaluated("calibrated")[task.best_by])
    return quantized


def _graph(model: nn.Module) -> Any:
    """NNCF's graph of one pass of a model."""
    ids = torch.zeros(1, 8, dtype=torch.long, device=next(model.parameters()).device)
    return build_nncf_graph(wrap_model(model), dict.fromkeys(INPUTS, ids))


def check_scope(config: NncfConfig, model: nn.Module) -> None:
    """Check that every part of ignored_scope is something in the model.

    Names and patterns may be those of modules; they become NNCF's, as do types and subgraphs.

    Raises:
        UserError: one of them matches nothing.
    """
    scope = config.arguments.get("ignored_scope")
    if scope is None:
        return
    all_operations = operations(model)
    names: set[str] = set()
    for key, given in (
        ("names", scope.names),
        ("patterns", scope.patterns),
        ("types", scope.types),
    ):
        for value in given:
            matched = [o for o in all_operations if _matches(key, value, o)]
            if not matched:
                known = {"types": [o.kind for o in all_operations]}.get(
                    key, [o.name for o in all_operations]
                )
                close = difflib.get_close_matches(value, known, n=3, cutoff=0.3) or known[:3]
                raise UserError(
                    f"--nncf_config: {config.path}: ignored_scope.{key}: {value!r} matches nothing"
                    f" in this model; it has {', '.join(dict.fromkeys(close))}"
                )
            names.update(o.node for o in matched)
    nodes = {o.name: o.node for o in all_operations}
    for i, part in enumerate(scope.subgraphs):
        ends = [[nodes.get(n, n) for n in given] for given in (part.inputs, part.outputs)]
        try:
            inside = get_ignored_node_names_from_subgraph(_graph(model), nncf.Subgraph(*ends))
        except REFUSALS:
            inside = []
        if not inside:
            raise UserError(
                f"--nncf_config: {config.path}: ignored_scope.subgraphs[{i}]: no way leads from its"
                " inputs to its outputs in this model"
            )
        names.update(inside)
    config.arguments["ignored_scope"] = dataclasses.replace(
        scope, names=sorted(names), patterns=[], types=[], subgraphs=[], validate=False
    )


def _matches(key: str, value: str, operation: Operation) -> bool:
    if key == "types":
        return operation.kind == value
    if key == "names":
        return value in (operation.name, operation.node)
    return any(re.fullmatch(value, name) for name in (operation.name, operation.node))


def calibrate(
    model: PreTrainedModel,
    config: NncfConfig,
    samples: Sequence[dict[str, Tensor]],
    before_each: Callable[[], None] = lambda: None,
) -> PreTrainedModel:
    """A copy of `model` with quantizers whose ranges fit the samples.

    Args:
        samples: inputs [1, max_seq_length_c] each, padded as they will be at run time.
        before_each: called before each of them, in each of NNCF's passes over them.

    Raises:
        UserError: settings that NNCF has, but not for torch models.
    """

    def inputs(sample: dict[str, Tensor]) -> dict[str, Tensor]:
        before_each()
        return sample

    arguments = {**config.arguments, "subset_size": len(samples)}
    try:
        with torch.no_grad(), _holding(config.weight_range):
            model = nncf.quantize(model.eval(), nncf.Dataset(list(samples), inputs), **arguments)
            return hold_weight_range(model, config.weight_range)
    except REFUSALS as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--nncf_config: {config.path}: NNCF refuses it: {reason}") from None


@contextlib.contextmanager
def _holding(weight_range: WeightRange) -> Iterator[None]:
    """Let nncf.quantize hold the range of weights before it corrects biases."""
    make_pipeline = post_training.create_ptq_pipeline

    def with_range(**arguments: Any) -> Any:
        pipeline = make_pipeline(**arguments)
        hold_all = functools.partial(hold_weight_range, weight_range=weight_range)
        pipeline.pipeline_steps[-1].insert(1, HoldWeightRange(hold_all))  # 0 fits the ranges
        return pipeline

    with mock.patch.object(post_training, "create_ptq_pipeline", with_range):
        yield


# ------------------------------------------------------------------------------------------------
# The quantizers of a model


def quantizers(model: nn.Module) -> Iterator[tuple[str, BaseQuantizer]]:
    """NNCF's name and module of each quantizer."""
    for name, module in get_hook_storage(model).named_hooks():
        if isinstance(module, BaseQuantizer):
            yield name, module


def select_ranges(model: nn.Module) -> None:
    """Let the ranges of the quantizers train, and nothing else."""
    model.requires_grad_(False)
    for _, quantizer in quantizers(model):
        quantizer.enable_gradients()


def weight_quantizer(name: str) -> bool:
    """Whether a quantizer, by its name, is one of weights: the second input of an operation that
    has weights."""
    _, operation, port = decode_hook_name(name)
    return port == 1 and operation.split("/")[-2] in ("linear", "embedding")


def second_factors(model: nn.Module) -> Iterator[tuple[SymmetricQuantizer, Tensor | None]]:
    """The quantizer of each second factor of a matrix product that is INT8.

    Yields:
        the quantizer, and the weight [N, K] of a linear layer; None in its place for a product of
        two activations.
    """
    parameters, storage = dict(model.named_parameters()), get_hook_storage(model)
    graph = _graph(model)
    for node in graph.get_all_nodes():
        if node.node_type not in ("linear", "matmul"):
            continue
        inputs = {edge.input_port_id: edge.from_node for edge in graph.get_input_edges(node)}
        (_, first), (source, second) = (_source(graph, inputs[port]) for port in (0, 1))
        if second is None or (node.node_type == "matmul" and first is None):
            continue
        quantizer = storage.get_submodule(second)
        if isinstance(quantizer, SymmetricQuantizer):
            yield quantizer, parameters[source.node_name] if node.node_type == "linear" else None


def hold_weight_range(model: nn.Module, weight_range: WeightRange) -> nn.Module:
    """Hold the range of all weights of linear layers from now on, and return the model.

    The second factor of a product of two activations, such as the keys', has 7 bits then, for the
    same reason as weights.
    """
    for quantizer, weight in list(second_factors(model)):
        if weight is not None:
            hold_in_use(quantizer, weight, weight_range)
        elif weight_range != WeightRange.FULL:
            use_seven_bits(quantizer)
    model.weight_range = weight_range
    return model


def warn_of_overflow(model: nn.Module, what: str) -> None:
    """Say that integer kernels of this CPU overflow with a model's weights, where that is so."""
    cpu = this_cpu()
    if model.weight_range == WeightRange.FULL and not cpu.sums_exactly:
        here = f"this one, {cpu.name}" if cpu.features else "this one may be"
        warn(
            f"{what}: its INT8 weights use the full range: integer kernels overflow on CPUs without"
            f" VNNI, such as {here}. Train it on with --nncf_config and weight_range: pairs"
        )


def save_quantized(model: PreTrainedModel, folder: str) -> None:
    """Save a model so that its weights load as any checkpoint's: quantizers in their own files."""
    hold_weight_range(model, model.weight_range)  # the last step may have moved weights since
    # Cloned, since a range that several inputs share may be stored only once in a file.
    state = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    ranges = {name: state.pop(name) for name in list(state) if name.startswith(HOOKS)}
    model.save_pretrained(folder, state_dict=state)
    save_file(ranges, os.path.join(folder, QUANTIZER_WEIGHTS))
    with open(os.path.join(folder, QUANTIZERS), "w", encoding="utf-8") as file:
        json.dump({**nncf.torch.get_config(model), WEIGHT_RANGE: model.weight_range}, file)


def load_quantizers(model: PreTrainedModel, folder: str, flag: str) -> PreTrainedModel:
    """Put the quantizers of a folder into its model.

    Raises:
        UserError: the files are damaged.
    """
    try:
        with open(os.path.join(folder, QUANTIZERS), encoding="utf-8") as file:
            config = json.load(file)
        weight_range = WeightRange(config.pop(WEIGHT_RANGE, WeightRange.FULL))
        model = nncf.torch.load_from_config(model, config)
        state = load_file(os.path.join(folder, QUANTIZER_WEIGHTS))
        missing = [
            name
            for name in model.load_state_dict(state, strict=False).missing_keys
            if name.startswith(HOOKS)
        ]
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{flag}: the quantizers of {folder} do not load: {reason}") from None
    if missing:
        raise UserError(f"{flag}: {folder}/{QUANTIZER_WEIGHTS} lacks {missing[0]}")
    return hold_weight_range(model, weight_range)


def what_is_int8(model: nn.Module) -> list[dict[str, Any]]:
    """For each kind of operation: how many there are, how many are INT8, and why others are not."""
    inputs: dict[str, set[int]] = {}
    graph = _graph(model)
    for node in graph.get_all_nodes():
        if node.node_type not in KINDS:
            continue
        for edge in graph.get_input_edges(node):
            if _source(graph, edge.from_node)[1] is not None:
                inputs.setdefault(node.node_name, set()).add(edge.input_port_id)
    counts: dict[str, list[list[str]]] = {}
    for operation in operations(model):
        # An embedding reads indices: its table is all that can be INT8.
        needed = {1} if operation.kind == "embedding" else {0, 1}
        int8 = operation.kind in INT8_KINDS and needed <= inputs.get(operation.node, set())
        counts.setdefault(operation.kind, [[], []])[int8].append(operation.name)
    return [
        {
            "kind": kind,
            "int8": len(quantized),
            "float": len(others),
            **({"why": WHY_FLOAT.get(kind, "in ignored_scope")} if others else {}),
        }
        for kind, (others, quantized) in counts.items()
    ]


INT8_KINDS = ("embedding", "linear", "matmul")
WHY_FLOAT = {
    "matmul": "an input is softmax's, which 8 bits round too coarsely, or it is in ignored_scope",
    "softmax": "exponentials need the range of floating point",
    "layer_norm": "a variance needs the range of floating point",
    "gelu": "its input is a sum in floating point already",
    "relu": "its input is a sum in floating point already",
    "add": "residual sums keep their precision",
    "mul": "scales of attention and masks",
}


MOVING = (
    "transpose",
    "flatten",
    "unflatten",
    "view",
    "reshape",
    "permute",
    "chunk",
    "unbind",
    "contiguous",
)


def _source(graph: Any, node: Any) -> tuple[Any, str | None]:
    """Where numbers come from, seen through quantizers and what only moves them; and the name of
    the last quantizer on the way, or None."""
    quantizer = None
    while True:
        is_quantizer = node.node_type in ("symmetric_quantize", "asymmetric_quantize")
        edges = sorted(graph.get_input_edges(node), key=lambda edge: edge.input_port_id)
        if is_quantizer and quantizer is None:
            names = [edge.from_node.node_name for edge in edges]  # its own parameters among them
            parameter = next(name for name in names if name.startswith(HOOKS))
            quantizer = parameter.removeprefix(HOOKS).rpartition(".")[0]
        if not edges or not (is_quantizer or node.node_type in MOVING):
            return node, quantizer
        node = edges[0].from_node


# ------------------------------------------------------------------------------------------------
# Export


class _FakeQuantize(nn.Module):
    """A quantizer as the one operation that PyTorch exports as QuantizeLinear, DequantizeLinear."""

    def __init__(self, quantizer: BaseQuantizer) -> None:
        super().__init__()
        quantizer.set_levels()
        self.low, self.high, scale, zero_point = quantizer.get_parameters_for_torch_fq()
        self.cut_off = None
        if quantizer.is_half_range:  # QuantizeLinear knows none but all of INT8
            self.cut_off = [float(limit) for limit in quantizer.get_input_low_input_high()]
        self.per_channel = quantizer.per_channel
        self.axis = next((i for i, n in enumerate(quantizer.scale_shape) if n > 1), 0)
        self.register_buffer("scale", scale if self.per_channel else scale[0])
        self.register_buffer("zero_point", zero_point if self.per_channel else zero_point[0])

    def forward(self, values: Tensor) -> Tensor:
        if self.cut_off:
            values = values.clamp(*self.cut_off)
        limits = (self.low, self.high)
        if self.per_channel:
            return torch.fake_quantize_per_channel_affine(
                values, self.scale, self.zero_point, self.axis, *limits
            )
        return torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero_point, *limits)

    def integers_of(self, rounded: Tensor) -> np.ndarray:
        """The integers behind activations that `forward` has rounded, as QuantizeLinear gives
        them: int8 or uint8."""
        integers = torch.round(rounded / self.scale) + self.zero_point
        return integers.numpy().astype(np.int8 if self.low < 0 else np.uint8)


@torch.no_grad()
def make_exportable(model: PreTrainedModel) -> None:
    """Put operations that export to ONNX in the place of NNCF's quantizers, in place.

    Weights of a narrow range are rounded to it, since QuantizeLinear knows none but all of INT8.
    """
    parameters = dict(model.named_parameters())
    storage = get_hook_storage(model)
    known = {node.node_name for node in _graph(model).get_all_nodes()}
    for name, _ in quantizers(model):
        operation = decode_hook_name(name)[1]
        assert operation in known, f"{operation} has a quantizer, but is not in the model"
    weights = {operation.node: operation.name for operation in operations(model)}
    for name, quantizer in list(quantizers(model)):
        if weight_quantizer(name) and quantizer.narrow_range:
            weight = parameters[f"{weights[decode_hook_name(name)[1]]}.weight"]
            low, high = quantizer.get_input_low_input_high()
            weight.copy_(quantizer.quantize(weight.clamp(low, high)))
        storage.set_submodule(name, _FakeQuantize(quantizer))
