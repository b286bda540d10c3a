"""The quantizers of a model: trained, saved, loaded, exported, counted.

A quantized model is the FP32 model with NNCF's fake quantizers hooked into it. They round the
inputs and weights of linear layers to the values that INT8 arithmetic will have. They train like
other parameters, and the exporter turns them into QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator

import nncf.torch
import numpy as np
import torch
from nncf.common.graph import NNCFGraph, NNCFNode
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE, get_hook_storage, wrap_model
from nncf.torch.quantization.layers import BaseQuantizer, SQMultiply, SymmetricQuantizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cli import UserError, in_one_line, read_object
from int8 import fake_quantize  # noqa: F401 - takes the place of NNCF's functions
from int8.weight_range import WeightRange, hold_in_use, use_seven_bits
from squad_utils import INPUTS

QUANTIZERS = "quantizers.json"  # in a quantized model's folder: the places of its quantizers
QUANTIZER_WEIGHTS = "quantizers.safetensors"  # beside it: their ranges
HOOKS = "__nncf_hooks."  # the prefix of the quantizers' parameters
WEIGHT_RANGE = "weight_range"  # a key of QUANTIZERS, beside NNCF's own
PLAIN_WEIGHTS = "plain_weights"  # a key: whether SmoothQuant's scales are divided out of weights
# Operations that do arithmetic; others only move numbers.
KINDS = ("embedding", "linear", "matmul", "softmax", "layer_norm", "gelu", "relu", "add", "mul")
# Operations that can be INT8 -> inputs with quantizers; an embedding's input 0 is indices.
INT8_INPUTS = {"embedding": {1}, "linear": {0, 1}, "matmul": {0, 1}}
MOVING = ("transpose", "flatten", "unflatten", "view", "reshape", "permute", "chunk", "unbind",
          "contiguous")  # fmt: skip
WHY_FLOAT = {
    "matmul": "an input is softmax's, which 8 bits round too coarsely, or it is in ignored_scope",
    "softmax": "exponentials need the range of floating point",
    "layer_norm": "a variance needs the range of floating point",
    "gelu": "its input is a sum in floating point already",
    "relu": "its input is a sum in floating point already",
    "add": "residual sums keep their precision",
    "mul": "scales of attention and masks",
}
WHY_LAYER = "in ignored_scope, or put back to floating point by --max_drop"

nncf.set_log_level(logging.ERROR)
# At each saved state it would warn that ranges of several inputs are stored once.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


# ------------------------------------------------------------------------------------------------
# The operations of a model


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a model.

    Attributes:
        name: its module's name, e.g. "bert.layers.0.qkv"; NNCF's name if it has no weights.
        node: NNCF's name, by which ignored_scope finds it.
        kind: e.g. "linear", "matmul", "softmax".
        quantizers: the names of its inputs' quantizers, by the number of the input.
    """

    name: str
    node: str
    kind: str
    quantizers: dict[int, str]

    @property
    def int8(self) -> bool:
        """Whether it computes in INT8."""
        needed = INT8_INPUTS.get(self.kind)
        return needed is not None and needed <= self.quantizers.keys()


def operations(model: nn.Module) -> list[Operation]:
    """The operations that compute in one pass of the model, in their order."""
    found = []
    graph = _graph(model)
    for node in graph.get_all_nodes():
        if node.node_type not in KINDS:
            continue
        sources = {
            edge.input_port_id: _source(graph, edge.from_node)
            for edge in graph.get_input_edges(node)
        }
        weights = [
            source.node_name.removesuffix(".weight")
            for source, _ in sources.values()
            if source.node_type == "nncf_model_const" and source.node_name.endswith(".weight")
        ]
        name = weights[0] if weights else node.node_name
        rounding = {port: each for port, (_, each) in sources.items() if each is not None}
        found.append(Operation(name, node.node_name, node.node_type, rounding))
    return found


def _graph(model: nn.Module) -> NNCFGraph:
    """NNCF's graph of one pass of a model."""
    ids = torch.zeros(1, 8, dtype=torch.long, device=next(model.parameters()).device)
    return build_nncf_graph(wrap_model(model), dict.fromkeys(INPUTS, ids))


# ------------------------------------------------------------------------------------------------
# The quantizers of a model


def quantizers(model: nn.Module) -> Iterator[tuple[str, BaseQuantizer]]:
    """NNCF's name and module of each quantizer; none of a model that is not quantized."""
    if not hasattr(model, ATR_HOOK_STORAGE):
        return
    for name, module in get_hook_storage(model).named_hooks():
        if isinstance(module, BaseQuantizer):
            yield name, module


def select_ranges(model: nn.Module) -> None:
    """Let only the ranges of the quantizers train."""
    model.requires_grad_(False)
    for _, quantizer in quantizers(model):
        quantizer.enable_gradients()


def take_relative_steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """From now on, multiply each step of `optimizer` in a range by the size of what it moves.

    Adam moves every parameter by about the learning rate, whatever its gradient. The scales of one
    model's weights are from 0.04 to 10, and the low ends of its activations from -0.04 (behind
    GELU) to -1.4, so one rate would be far too high for some.
    """
    ranges = [
        parameter
        for _, quantizer in quantizers(model)
        for parameter in quantizer.parameters()
        if parameter.requires_grad
    ]
    if not ranges:
        return
    before: list[Tensor] = []

    @torch.no_grad()
    def remember(*_: object) -> None:
        before[:] = [each.clone() for each in ranges]

    @torch.no_grad()
    def shorten(*_: object) -> None:
        steps = torch._foreach_sub(ranges, before)
        torch._foreach_mul_(steps, torch._foreach_abs(before))
        torch._foreach_copy_(ranges, torch._foreach_add(before, steps))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(shorten)


def weight_quantizer(name: str) -> bool:
    """Whether the quantizer of this name rounds weights: the second input of a linear layer or
    embedding."""
    _, operation, port = decode_hook_name(name)
    return port == 1 and operation.split("/")[-2] in ("linear", "embedding")


def second_factors(model: nn.Module) -> Iterator[tuple[SymmetricQuantizer, Tensor | None]]:
    """The quantizers of the second factors of all INT8 matrix products.

    Yields:
        a quantizer, and the weight [N, K] of its linear layer, or None for a product of two
        activations.
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


def hold_weight_range(model: nn.Module, weight_range: WeightRange) -> None:
    """From now on, hold the range of all weights of linear layers.

    The second factor of a product of two activations, such as the keys, then has 7 bits, for the
    same reason.
    """
    for quantizer, weight in list(second_factors(model)):
        if weight is not None:
            hold_in_use(quantizer, weight, weight_range)
        elif weight_range != WeightRange.FULL:
            use_seven_bits(quantizer)
    model.weight_range = weight_range  # type: ignore[assignment]  # torch types tensors alone


def scaled_weights(model: nn.Module) -> Iterator[tuple[str, SQMultiply]]:
    """SmoothQuant's scaled weights.

    Yields:
        the name of a weight [N, K] that is multiplied by scales, and the module that multiplies the
        layer's input by their inverses [K].
    """
    names = {operation.node: operation.name for operation in operations(model)}
    for name, module in get_hook_storage(model).named_modules(remove_duplicate=False):
        if isinstance(module, SQMultiply):
            yield f"{names[decode_hook_name(name)[1]]}.weight", module


def has_exact_scales(model: nn.Module) -> bool:
    """Whether all of SmoothQuant's scales are powers of two, which divide out exactly."""
    return all(
        bool((torch.frexp(each.scale).mantissa == 0.5).all())
        for each in get_hook_storage(model).modules()
        if isinstance(each, SQMultiply)
    )


def fix_scales(model: nn.Module) -> None:
    """Keep SmoothQuant's scales from training if they are powers of two.

    In NNCF they are parameters. As buffers they are saved the same way.
    """
    if not has_exact_scales(model):  # a model of earlier versions, which trains its scales
        return
    for module in get_hook_storage(model).modules():
        if isinstance(module, SQMultiply) and isinstance(module.scale, nn.Parameter):
            scale = module.scale.detach()
            del module._scale_value
            module.register_buffer("_scale_value", scale)


def save_quantized(model: PreTrainedModel, folder: str) -> None:
    """Save a model's weights as those of a model without quantizers, and its quantizers beside.

    If SmoothQuant's scales are not powers of two, as in models that earlier versions calibrated,
    they stay in the weights.
    """
    weight_range = WeightRange(str(model.weight_range))
    hold_weight_range(model, weight_range)  # the last step may have moved weights
    # Cloned, because the file format refuses a tensor under two names, as of a shared range.
    state = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    plain = has_exact_scales(model)
    if plain:
        for name, module in scaled_weights(model):
            state[name] *= module.scale.detach().flatten()
    ranges = {name: state.pop(name) for name in list(state) if name.startswith(HOOKS)}
    model.save_pretrained(folder, state_dict=state)
    save_file(ranges, os.path.join(folder, QUANTIZER_WEIGHTS))
    config = {
        **nncf.torch.get_config(model), WEIGHT_RANGE: weight_range, PLAIN_WEIGHTS: plain
    }  # fmt: skip
    with open(os.path.join(folder, QUANTIZERS), "w", encoding="utf-8") as file:
        json.dump(config, file)


def load_quantizers(model: PreTrainedModel, folder: str, flag: str) -> PreTrainedModel:
    """Put a folder's quantizers into its model.

    Raises:
        UserError: the files are damaged.
    """
    with in_one_line(f"{flag}: the quantizers of {folder} do not load"):
        config = read_object(os.path.join(folder, QUANTIZERS), flag)
        weight_range = WeightRange(config.pop(WEIGHT_RANGE, WeightRange.FULL))
        plain = config.pop(PLAIN_WEIGHTS, False)
        model = nncf.torch.load_from_config(model, config)
        state = load_file(os.path.join(folder, QUANTIZER_WEIGHTS))
        missing = [
            name
            for name in model.load_state_dict(state, strict=False).missing_keys
            if name.startswith(HOOKS)
        ]
    if missing:
        raise UserError(f"{flag}: {folder}/{QUANTIZER_WEIGHTS} lacks {missing[0]}")
    if plain:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, module in scaled_weights(model):
                parameters[name].div_(module.scale.flatten())
    fix_scales(model)
    hold_weight_range(model, weight_range)
    return model


def how_it_loads(folder: str, script: str) -> str:
    """A text for the model card of a folder with quantizers: how to load the INT8 model, and which
    model `from_pretrained` loads."""
    plain = read_object(os.path.join(folder, QUANTIZERS), "--output_dir").get(PLAIN_WEIGHTS)
    weights = (
        "is a plain model in FP32, which `from_pretrained` loads"
        if plain
        else "is no model by itself: SmoothQuant's scales are in its weights"
    )
    return (
        f"`{script} --model_student=<this folder>` loads the INT8 model, with its quantizers"
        f"\n(`{QUANTIZERS}`, `{QUANTIZER_WEIGHTS}`). `model.safetensors` {weights}."
    )


def what_is_int8(model: nn.Module) -> list[dict[str, str | int]]:
    """For each kind of operation: how many are INT8, how many are not, and why they are not."""
    counts: dict[str, list[int]] = {}
    for operation in operations(model):
        counts.setdefault(operation.kind, [0, 0])[operation.int8] += 1
    return [
        {
            "kind": kind,
            "int8": quantized,
            "float": others,
            **({"why": WHY_FLOAT.get(kind, WHY_LAYER)} if others else {}),
        }
        for kind, (others, quantized) in counts.items()
    ]


def _source(graph: NNCFGraph, node: NNCFNode) -> tuple[NNCFNode, str | None]:
    """The operation that computes the output of `node`, found back through quantizers and
    operations that only move numbers; and the name of the last quantizer on the way, or None."""
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
    """A quantizer as the operation that PyTorch exports as QuantizeLinear and DequantizeLinear."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: BaseQuantizer) -> None:
        super().__init__()
        quantizer.set_levels()
        self.low, self.high, scale, zero_point = quantizer.get_parameters_for_torch_fq()
        self.cut_off = None
        if quantizer.is_half_range:  # QuantizeLinear has only the full range of INT8
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
        """The integers of activations that `forward` has rounded, int8 or uint8 as those from
        QuantizeLinear."""
        integers = torch.round(rounded / self.scale) + self.zero_point
        return integers.numpy().astype(np.int8 if self.low < 0 else np.uint8)


@torch.no_grad()
def make_exportable(model: PreTrainedModel) -> None:
    """Replace NNCF's quantizers with operations that export to ONNX, in place.

    Weights of a narrow range are rounded to it, since QuantizeLinear has only INT8's full range.
    """
    parameters = dict(model.named_parameters())
    storage = get_hook_storage(model)
    known = {node.node_name for node in _graph(model).get_all_nodes()}
    weights = {operation.node: operation.name for operation in operations(model)}
    for name, quantizer in list(quantizers(model)):
        operation = decode_hook_name(name)[1]
        assert operation in known, f"{operation} has a quantizer, but is not in the model"
        if weight_quantizer(name) and quantizer.narrow_range:
            weight = parameters[f"{weights[operation]}.weight"]
            low, high = quantizer.get_input_low_input_high()
            weight.copy_(quantizer.quantize(weight.clamp(low, high)))
        storage.set_submodule(name, _FakeQuantize(quantizer))
