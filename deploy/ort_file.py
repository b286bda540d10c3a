"""model.ort.onnx: an INT8 file as ONNX Runtime computes it fastest, beside model.onnx. No torch.

It has the integers of model.onnx, with two kinds of operations written otherwise:
- Each INT8 product is one operator of ONNX Runtime's own (MatMulIntegerToFloat), with its bias. Of
  standard operators the runtime makes it only if no other fusion comes first.
- LayerNormalization, whose kernel is scalar, is MeanVarianceNormalization, a product and a sum.
"""

from __future__ import annotations

import onnx
from onnx import helper, numpy_helper

from deploy import int8_file

DOMAIN = "com.microsoft"


def converted(model: onnx.ModelProto) -> onnx.ModelProto:
    """The file for ONNX Runtime alone.

    Args:
        model: an INT8 file as `onnx_file` writes it.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    constants = int8_file.constants(graph)
    makers = {name: node for node in graph.node for name in node.output}
    replaced: dict[str, list[onnx.NodeProto]] = {}  # the output of a node -> nodes in its place
    for node in graph.node:
        if node.op_type == "LayerNormalization":
            replaced[node.output[0]] = _normalization(node)
        if node.op_type == "MatMul" and _is_integer(node, makers, constants):
            last, bias = node, ""
            readers = [each for each in graph.node if node.output[0] in each.input]
            if [each.op_type for each in readers] == ["Add"]:
                (name,) = (each for each in readers[0].input if each != node.output[0])
                if name in constants:
                    flat = numpy_helper.to_array(constants[name]).reshape(-1)
                    last, bias = readers[0], f"{name}.flat"
                    graph.initializer.append(numpy_helper.from_array(flat, bias))
            replaced[last.output[0]] = [_product(makers, node, bias, last.output[0])]
    int8_file.replace(graph, replaced)
    result.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return result


def _is_integer(
    node: onnx.NodeProto,
    makers: dict[str, onnx.NodeProto],
    constants: dict[str, onnx.TensorProto],
) -> bool:
    """Whether a MatMul has a quantized activation and an INT8 weight as its factors."""
    factors = [makers.get(name) for name in node.input]
    if any(each is None or each.op_type != "DequantizeLinear" for each in factors):
        return False
    quantized, weight = (each.input[0] for each in factors if each is not None)
    return quantized not in constants and weight in constants


def _product(
    makers: dict[str, onnx.NodeProto], node: onnx.NodeProto, bias: str, output: str
) -> onnx.NodeProto:
    """A MatMul of integers and the sum with its bias [out] as one node; a bias "" is none."""
    activation, weight = (makers[name].input for name in node.input)
    pairs = (name for pair in zip(activation, weight, strict=True) for name in pair)
    name = f"{output}.product"
    return helper.make_node("MatMulIntegerToFloat", [*pairs, bias], [output], name, domain=DOMAIN)


def _normalization(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """LayerNormalization over the last of three axes, as operators with vector kernels."""
    values, gain, bias = node.input
    (result,) = node.output[:1]
    normal, scaled = f"{result}.normal", f"{result}.scaled"
    return [
        helper.make_node("MeanVarianceNormalization", [values], [normal], normal, axes=[2]),
        helper.make_node("Mul", [normal, gain], [scaled], scaled),
        helper.make_node("Add", [scaled, bias], [result], f"{result}.shifted"),
    ]
