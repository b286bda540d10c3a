"""Export to one ONNX file that OpenVINO and ONNX Runtime take as it is.

The file declares static shapes [1, max_seq_length], as the model converters want them, but
nothing inside depends on them: it is traced with dynamic axes and the shapes are declared after.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cli import UserError, warn
from deploy import int8_file, onnx_check
from deploy.cpu import this_cpu
from deploy.onnx_check import Check
from squad_utils import INPUTS

QA_OUTPUTS = ("output_s", "output_e")
OPSET = 17  # the first with LayerNormalization, and one that openvino-dev 2024.6 still reads
MASKED = -1e4  # added to the scores of padding: 0 after softmax, and a number in FP16 too


@dataclass(frozen=True)
class Outputs:
    """The outputs of an exported file.

    Attributes:
        fields: of the model's own output.
        names: in the file.
        per_token: whether they are [B, L]; a shape alone does not tell, where L is the width too.
    """

    fields: tuple[str, ...]
    names: tuple[str, ...]
    per_token: bool


class ExportedGraph(nn.Module):
    """What a file computes: four int64 [B, L] inputs to the outputs of a model."""

    def __init__(self, model: PreTrainedModel, outputs: Outputs) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=added_mask(attention_mask),
            token_type_ids=token_type_ids,
            position_ids=position_ids,
        )
        return tuple(outputs[field] for field in self.outputs.fields)


def added_mask(attention_mask: Tensor) -> Tensor:
    """The mask as one [B, 1, 1, L] term that is added to scores.

    So it is part of an attention pattern that OpenVINO fuses into one kernel, whatever the library
    makes of a 2-D mask.
    """
    return (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * MASKED


def export_onnx(
    graph: ExportedGraph,
    path: str,
    batches: Sequence[dict[str, np.ndarray]],
    int8: bool = False,
) -> Check:
    """Write `graph` to `path`, declared [1, max_seq_length], and compare it with PyTorch.

    A file that does not pass is kept beside the path, as `failed_path` names it.

    Args:
        graph: of a model in FP32 on the CPU.
        batches: real inputs [1, max_seq_length] to compare on; they give the declared shapes.
        int8: whether the graph has quantizers.

    Returns:
        what the check has found.

    Raises:
        UserError: the file cannot be written.
    """
    # The wrapper's own mode counts: the exporter restores it, and with it all modules' dropout.
    graph.eval()
    temporary = f"{path}.tmp"
    try:
        _trace(graph, temporary, batches[0])
        onnx.checker.check_model(temporary)
        feeds = [{name: batch[name] for name in INPUTS} for batch in batches]
        check = onnx_check.check_file(temporary, graph, feeds, int8)
        kept, other = (path, failed_path(path))[:: 1 if check.passed else -1]
        os.replace(temporary, kept)
        with contextlib.suppress(FileNotFoundError):  # of an earlier export
            os.remove(other)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)
    for name, deviation in onnx_check.strays(check):
        off = f"is {deviation:.2g} standard deviations off the PyTorch model"
        if not math.isfinite(deviation):
            off = "does not run the file, or gives no numbers"
        warn(f"{name} on this machine ({check.cpu}) {off}: {_remedy(name, check)}")
    return check


def failed_path(path: str) -> str:
    """Where a file is kept that does not pass its check: model.failed.onnx."""
    base, extension = os.path.splitext(path)
    return f"{base}.failed{extension}"


def describe_check(check: Check, output_dir: str) -> dict[str, Any]:
    """What metrics.json tells of the file in an output folder and of its check."""
    path = os.path.join(output_dir, "model.onnx")
    return {
        "onnx_bytes": os.path.getsize(path if check.passed else failed_path(path)),
        "onnx_check": {"passed": check.passed, **_finite(asdict(check))},
    }


def _finite(value: Any) -> Any:
    """The same, with None for numbers that are not finite: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require(check: Check, output_dir: str) -> None:
    """To be called when all results are written.

    Raises:
        UserError: the check has failed.
    """
    if check.passed:
        return
    path = os.path.join(output_dir, "model.onnx")
    flipped = f", and {check.flipped:.1%} of its roundings differ" if check.flipped else ""
    raise UserError(
        f"the exported file differs from the PyTorch model by {check.difference:.2g} on real"
        f" inputs, where {check.limit:g} is allowed{flipped}; it is kept as {failed_path(path)},"
        " and the same command exports again without training"
    )


def _remedy(runtime: str, check: Check) -> str:
    """What helps where a runtime strays."""
    if (check.largest_pair or 0) > int8_file.PAIR_LIMIT:
        return "quantize with weight_range pairs, or run it in ONNX Runtime without integer kernels"
    if runtime == "OpenVINO" and this_cpu().has_bf16:
        return "INFERENCE_PRECISION_HINT=f32 keeps it from computing in bf16"
    return "another runtime may be nearer; metrics.json has all"


def _trace(graph: ExportedGraph, path: str, example: dict[str, np.ndarray]) -> None:
    """Write the graph, traced with dynamic axes, with static shapes declared."""
    inputs = tuple(torch.from_numpy(example[name]) for name in INPUTS)
    shapes = {name: inputs[0].shape for name in INPUTS}
    with torch.no_grad():
        shapes |= {n: o.shape for n, o in zip(graph.outputs.names, graph(*inputs), strict=True)}
    lengthy = INPUTS + graph.outputs.names if graph.outputs.per_token else INPUTS
    axes = {name: {0: "batch", **({1: "length"} if name in lengthy else {})} for name in shapes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: the check runs it on other inputs
        torch.onnx.export(
            graph,
            inputs,
            path,
            dynamo=False,  # its graphs keep OpenVINO's attention pattern
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(graph.outputs.names),
            dynamic_axes=axes,
        )
    model = onnx.load(path)
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        _store_int8(model.graph)
        _keep_biases_apart(model.graph)
    for value in [*model.graph.input, *model.graph.output]:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            dim.Clear()
            dim.dim_value = size
    onnx.save(model, path)


def _store_int8(graph: onnx.GraphProto) -> None:
    """Store weights behind QuantizeLinear as the INT8 they are quantized to.

    The exporter leaves FP32 weights there, four times the size. Of linear layers the transposition
    goes into the weight as well. Rows of an embedding table are looked up before they become
    floating point, so that not all of the table does at every run.
    """
    constants = int8_file.constants(graph)
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)

    removed: set[str] = set()  # outputs of nodes that are not needed any more
    replaced: dict[str, list[onnx.NodeProto]] = {}  # what takes the place of the node of an output
    for quantize in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        if quantize.input[0] not in constants:
            continue
        weight, scale, zero_point = (
            onnx.numpy_helper.to_array(constants[name]) for name in quantize.input
        )
        axis = next((a.i for a in quantize.attribute if a.name == "axis"), 1)
        shape = [1] * weight.ndim
        if scale.ndim:
            shape[axis] = -1
        levels = np.rint(weight / scale.reshape(shape)) + zero_point.reshape(shape)
        limits = np.iinfo(zero_point.dtype)
        integers = levels.clip(limits.min, limits.max).astype(zero_point.dtype)
        (dequantize,) = consumers[quantize.output[0]]
        users = consumers[dequantize.output[0]]
        name = quantize.input[0]
        removed.update((quantize.output[0], dequantize.output[0]))
        for i, user in enumerate(users):
            base = name if i == 0 else f"{name}.{i}"
            result = user.output[0]
            if user.op_type == "Gather":
                tables = [integers] if scale.ndim == 0 else [integers, scale, zero_point]
                replaced[result] = _look_up(graph, base, tables, user, dequantize)
                continue
            stored = integers
            attributes: dict[str, Any] = {"axis": axis} if scale.ndim else {}
            if user.op_type == "Transpose":
                stored = integers.T
                attributes = {"axis": 1 - axis} if scale.ndim else {}
            else:
                result = dequantize.output[0]
            _add(graph, f"{base}.int8", np.ascontiguousarray(stored))
            inputs = [f"{base}.int8", *dequantize.input[1:]]
            replaced[result] = [
                onnx.helper.make_node(
                    "DequantizeLinear", inputs, [result], f"{base}.dequantize", **attributes
                )
            ]
    nodes = []
    for node in graph.node:
        output = node.output[0]
        if output in replaced:
            nodes += replaced[output]
        elif output not in removed:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)


def _keep_biases_apart(graph: onnx.GraphProto) -> None:
    """Shape the biases of linear layers [1, 1, N].

    ONNX Runtime makes a Gemm of a product and a bias of shape [N] before it looks for products to
    compute in INT8, and then does not find them: the file ran at half its speed.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    products = {name for node in graph.node if node.op_type == "MatMul" for name in node.output}
    for node in graph.node:
        if node.op_type == "Add" and products.intersection(node.input):
            for i, name in enumerate(node.input):
                if name in tensors and len(tensors[name].dims) == 1:
                    bias = onnx.numpy_helper.to_array(tensors[name])[None, None]
                    node.input[i] = _add(graph, f"{name}.apart", bias)
    _drop_unused(graph)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove initializers that no node reads."""
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _add(graph: onnx.GraphProto, name: str, array: np.ndarray) -> str:
    graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return name


def _look_up(
    graph: onnx.GraphProto,
    base: str,
    tables: list[np.ndarray],
    gather: onnx.NodeProto,
    dequantize: onnx.NodeProto,
) -> list[onnx.NodeProto]:
    """Rows of an INT8 table as floating point: of one scale, or of a scale and zero point a row.

    Args:
        tables: the integers [rows, K]; where each row has its own, scales and zero points [rows].
    """
    make, (result,) = onnx.helper.make_node, gather.output
    rows, ids = f"{base}.rows", gather.input[1]
    look_up = make("Gather", [_add(graph, f"{base}.int8", tables[0]), ids], [rows], f"{base}.look")
    if len(tables) == 1:
        inputs = [rows, *dequantize.input[1:]]
        return [look_up, make("DequantizeLinear", inputs, [result], f"{base}.dequantize")]
    _, scales, zero_points = tables
    factors = f"{base}.cast"
    nodes = [look_up, make("Cast", [rows], [factors], factors, to=onnx.TensorProto.FLOAT)]

    def of_rows(name: str, values: np.ndarray) -> str:
        """The values of the rows that are looked up."""
        column = _add(graph, f"{base}.{name}s", values.astype(np.float32)[:, None])
        nodes.append(make("Gather", [column, ids], [f"{base}.{name}"], f"{base}.{name}"))
        return f"{base}.{name}"

    if zero_points.any():  # of asymmetric ranges
        zero_point, factors = of_rows("zero_point", zero_points), f"{base}.subtract"
        nodes.append(make("Sub", [f"{base}.cast", zero_point], [factors], factors))
    scale = of_rows("scale", scales)
    return [*nodes, make("Mul", [factors, scale], [result], f"{base}.multiply")]
