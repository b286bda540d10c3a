"""Export to one ONNX file that OpenVINO and ONNX Runtime take as it is.

The file declares static shapes [1, max_seq_length], which model converters need. Nothing inside
depends on the shapes: the model is traced with dynamic axes, and the shapes are declared after.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import PreTrainedModel

from cli import UserError, warn
from deploy import int8_file, onnx_check, ort_file, runtime
from deploy.cpu import this_cpu
from deploy.onnx_check import Check
from squad_utils import INPUTS

QA_OUTPUTS = ("output_s", "output_e")
OPSET = 17  # the first with LayerNormalization; openvino-dev 2024.6 can read it
MASKED = -1e4  # added to the scores of padding: gives 0 after softmax, and is finite in FP16


@dataclass(frozen=True)
class Outputs:
    """The outputs of an exported file.

    Attributes:
        fields: their names in the model's output.
        names: their names in the file.
        per_token: whether they are [B, L]; the shape alone does not tell if L equals the width.
    """

    fields: tuple[str, ...]
    names: tuple[str, ...]
    per_token: bool


class ExportedGraph(nn.Module):
    """The computation in a file, from four int64 [B, L] inputs to the outputs of a model."""

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
    """The mask as one [B, 1, 1, L] term to add to the scores.

    OpenVINO fuses attention with such a term into one kernel. The library would build other nodes
    from a 2-D mask.
    """
    return (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * MASKED


def export_onnx(
    graph: ExportedGraph,
    path: str,
    batches: Sequence[dict[str, np.ndarray]],
    int8: bool = False,
) -> Check:
    """Write `graph` to `path`, declared [1, max_seq_length], and compare it with PyTorch.

    If the file does not pass the check, it is kept as `failed_path` instead. Beside an INT8 file,
    its form for ONNX Runtime alone is written as `runtime.ort_path`, if that passes too.

    Args:
        graph: the graph of a model in FP32 on the CPU.
        batches: real inputs [1, max_seq_length] for the comparison; they give the declared shapes.
        int8: whether the graph has quantizers.

    Returns:
        the result of the check.

    Raises:
        UserError: the file cannot be written.
    """
    # The exporter restores the wrapper's mode in all modules, and thereby their dropout.
    graph.eval()
    temporary = f"{path}.tmp"
    try:
        _trace(graph, temporary, batches[0])
        onnx.checker.check_model(temporary)
        feeds = [{name: batch[name] for name in INPUTS} for batch in batches]
        check = onnx_check.check_file(temporary, graph, feeds, int8)
        kept, other = (path, failed_path(path))[:: 1 if check.passed else -1]
        os.replace(temporary, kept)
        for old in (other, runtime.ort_path(path)):  # of an earlier export
            with contextlib.suppress(FileNotFoundError):
                os.remove(old)
        if int8 and check.passed:
            _write_for_onnxruntime(path, graph, feeds)
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


def _write_for_onnxruntime(path: str, graph: nn.Module, feeds: Sequence[onnx_check.Feed]) -> None:
    """Write `ort_file.converted` beside `path`, unless it computes something else."""
    model = ort_file.converted(onnx.load(path))
    if onnx_check.rounds_alike(model, graph, feeds):
        onnx.save(model, runtime.ort_path(path))
    else:
        warn(
            f"no {os.path.basename(runtime.ort_path(path))}: ONNX Runtime on this machine"
            f" ({this_cpu()}) computes it wrongly; it runs {os.path.basename(path)}"
        )


def failed_path(path: str) -> str:
    """The path of a file that does not pass its check: model.failed.onnx."""
    base, extension = os.path.splitext(path)
    return f"{base}.failed{extension}"


def describe_check(check: Check, output_dir: str) -> dict[str, Any]:
    """The entries of metrics.json about the file in an output folder and its check."""
    path = os.path.join(output_dir, "model.onnx")
    return {
        "onnx_bytes": os.path.getsize(path if check.passed else failed_path(path)),
        "onnx_check": {"passed": check.passed, **_finite(asdict(check))},
    }


def _finite(value: Any) -> Any:
    """The same value, with None for infinities and NaNs, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require(check: Check, output_dir: str) -> None:
    """Stop a run whose file did not pass its check; call this after all results are written.

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
    """Advice on a runtime that is far off."""
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
        warnings.simplefilter("ignore")  # about tracing: the check runs other inputs as well
        torch.onnx.export(
            graph,
            inputs,
            path,
            dynamo=False,  # this exporter keeps OpenVINO's attention pattern
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(graph.outputs.names),
            dynamic_axes=axes,
        )
    model = onnx.load(path)
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        _store_int8(model.graph)
        _split_products(model.graph)
        _keep_biases_apart(model.graph)
    for value in [*model.graph.input, *model.graph.output]:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            dim.Clear()
            dim.dim_value = size
    onnx.save(model, path)


def _store_int8(graph: onnx.GraphProto) -> None:
    """Store weights in front of QuantizeLinear as the INT8 integers that they are quantized to.

    The exporter leaves FP32 weights there, four times the size. The weight of a linear layer is
    stored transposed, without a Transpose. Rows of an embedding table are looked up before they
    become floating point, so that a run does not convert the whole table.
    """
    constants = int8_file.constants(graph)
    consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            consumers[name].append(node)
    replaced: dict[str, list[onnx.NodeProto]] = {}  # the output of a node -> nodes in its place
    for quantize in graph.node:
        if quantize.op_type == "QuantizeLinear" and quantize.input[0] in constants:
            (dequantize,) = consumers[quantize.output[0]]
            replaced |= {quantize.output[0]: [], dequantize.output[0]: []}
            tensors = [numpy_helper.to_array(constants[name]) for name in quantize.input]
            users = consumers[dequantize.output[0]]
            replaced |= _stored(graph, quantize, tensors, dequantize, users)
    int8_file.replace(graph, replaced)


def _stored(
    graph: onnx.GraphProto,
    quantize: onnx.NodeProto,
    tensors: Sequence[np.ndarray],
    dequantize: onnx.NodeProto,
    users: Sequence[onnx.NodeProto],
) -> dict[str, list[onnx.NodeProto]]:
    """Store one weight as integers, once per user.

    Args:
        tensors: the weight, its scale and its zero point.
        users: the nodes that read the output of `dequantize`.

    Returns:
        the nodes to put in place of others, by the outputs of these.
    """
    weight, scale, zero_point = tensors
    name = quantize.input[0]
    axis = next((a.i for a in quantize.attribute if a.name == "axis"), 1)
    shape = [1] * weight.ndim
    if scale.ndim:
        shape[axis] = -1
    levels = np.rint(weight / scale.reshape(shape)) + zero_point.reshape(shape)
    limits = np.iinfo(zero_point.dtype)
    integers = levels.clip(limits.min, limits.max).astype(zero_point.dtype)
    nodes: dict[str, list[onnx.NodeProto]] = {}
    for i, user in enumerate(users):
        base = name if i == 0 else f"{name}.{i}"
        if user.op_type == "Gather":
            tables = [integers] if scale.ndim == 0 else [integers, scale, zero_point]
            nodes[user.output[0]] = _look_up(graph, base, tables, user, dequantize)
            continue
        transposed = user.op_type == "Transpose"
        result = (user if transposed else dequantize).output[0]
        stored = np.ascontiguousarray(integers.T if transposed else integers)
        attributes: dict[str, Any] = (
            {"axis": 1 - axis if transposed else axis} if scale.ndim else {}
        )
        inputs = [_add(graph, f"{base}.int8", stored), *dequantize.input[1:]]
        nodes[result] = [
            onnx.helper.make_node(
                "DequantizeLinear", inputs, [result], f"{base}.dequantize", **attributes
            )
        ]
    return nodes


def _split_products(graph: onnx.GraphProto) -> None:
    """Make of an INT8 product that is cut into equal slices a product for each slice.

    Such is the product of query, key and value. Copying slices of its result takes runtimes longer
    than reading its integer inputs three times.
    """
    tensors = int8_file.constants(graph)
    makers = {name: node for node in graph.node for name in node.output}
    replaced: dict[str, list[onnx.NodeProto]] = {}  # the output of a slice -> nodes in its place
    for add in graph.node:
        product = next((makers[n] for n in add.input if n in makers and n not in tensors), None)
        weight = makers.get(product.input[1]) if product and product.op_type == "MatMul" else None
        biases = [name for name in add.input if name in tensors]
        if product is None or weight is None or add.op_type != "Add" or len(biases) != 1:
            continue
        if weight.op_type != "DequantizeLinear" or weight.input[0] not in tensors:
            continue
        readers = [node for node in graph.node if add.output[0] in node.input]
        slices = [node for node in readers if node.op_type == "Slice"]
        others = {node.op_type for node in readers} - {"Slice"}
        if len(slices) < 2 or others - {"Shape"}:
            continue
        shares = [
            np.split(array, len(slices), -1) if array.ndim else [array] * len(slices)
            for array in (numpy_helper.to_array(tensors[n]) for n in (*weight.input, *biases))
        ]
        for node, *arrays in zip(slices, *shares, strict=True):
            base = node.output[0]
            kinds = ("int8", "scale", "zero_point", "bias")
            names = [_add(graph, f"{base}.{k}", a) for k, a in zip(kinds, arrays, strict=True)]
            replaced[base] = [
                onnx.helper.make_node(kind, inputs, [output], output, **attributes)
                for kind, inputs, output, attributes in (
                    (weight.op_type, names[:3], f"{base}.dequantize", _attributes(weight)),
                    ("MatMul", [product.input[0], f"{base}.dequantize"], f"{base}.product", {}),
                    ("Add", [f"{base}.product", names[3]], base, {}),
                )
            ]
    int8_file.replace(graph, replaced)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def _keep_biases_apart(graph: onnx.GraphProto) -> None:
    """Give the biases of linear layers the shape [1, 1, N].

    ONNX Runtime joins a product and a bias of shape [N] to a Gemm before it looks for products to
    compute in INT8. It then finds none, and the file runs at half its speed.
    """
    tensors = int8_file.constants(graph)  # of equal biases all but one are an Identity
    products = {name for node in graph.node if node.op_type == "MatMul" for name in node.output}
    for node in graph.node:
        if node.op_type == "Add" and products.intersection(node.input):
            for i, name in enumerate(node.input):
                if name in tensors and len(tensors[name].dims) == 1:
                    bias = numpy_helper.to_array(tensors[name])[None, None]
                    node.input[i] = _add(graph, f"{name}.apart", bias)
    int8_file.replace(graph, {})


def _add(graph: onnx.GraphProto, name: str, array: np.ndarray) -> str:
    graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def _look_up(
    graph: onnx.GraphProto,
    base: str,
    tables: list[np.ndarray],
    gather: onnx.NodeProto,
    dequantize: onnx.NodeProto,
) -> list[onnx.NodeProto]:
    """The nodes that look up rows of an INT8 table and make them floating point.

    Args:
        tables: the integers [rows, K]; if each row has its own scale, also scales and zero points
            [rows].
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
        """Look up one value per row."""
        column = _add(graph, f"{base}.{name}s", values.astype(np.float32)[:, None])
        nodes.append(make("Gather", [column, ids], [f"{base}.{name}"], f"{base}.{name}"))
        return f"{base}.{name}"

    if zero_points.any():  # of asymmetric ranges
        zero_point, factors = of_rows("zero_point", zero_points), f"{base}.subtract"
        nodes.append(make("Sub", [f"{base}.cast", zero_point], [factors], factors))
    scale = of_rows("scale", scales)
    return [*nodes, make("Mul", [factors, scale], [result], f"{base}.multiply")]
