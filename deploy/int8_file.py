"""The integer products in an INT8 ONNX file, and whether their sums can overflow. No torch.

Integer kernels without VNNI (AVX2, early AVX-512) multiply u8 activations by s8 weights and add
two neighbouring products in 16 bits, with saturation: vpmaddubsw, Intel 64 and IA-32
Architectures Software Developer's Manual, volume 2. Neighbours lie along the input axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from deploy.cpu import Cpu

# The largest |w(2i)| + |w(2i+1)| that no activations can overflow: 255 x 128 = 32640 < 2^15.
PAIR_LIMIT = 128
# Operators that move numbers without changing them; runtimes carry INT8 through them.
MOVES = ("Identity", "Transpose", "Reshape")


def largest_pair(model: onnx.ModelProto) -> int | None:
    """The largest |w(2i)| + |w(2i+1)| of all INT8 weights in the file's products.

    Embedding tables do not count: their rows are looked up, never multiplied.

    Args:
        model: its INT8 weights are constants, and lead through DequantizeLinear, and possibly
            Transpose, to a factor of MatMul ([in, out] as the second factor) or Gemm.

    Returns:
        the largest sum over all output channels, in steps of the integers (0 to 256); pairs are
        neighbours along `in`, and an odd last input counts alone. None for a file without such
        weights.
    """
    sums = [
        _largest_pair_along_last(factor.weight)
        for factors in _products(model)
        for factor in factors
        if factor is not None and factor.weight is not None
    ]
    return max(sums, default=None)


def multiplies_activations(model: onnx.ModelProto) -> bool:
    """Whether a MatMul multiplies two INT8 activations of 8 bits each, such as queries and keys.

    Such products can overflow, and the rule for pairs of weights does not prevent it. A second
    factor of 7 bits, whose integers are at most 64 in size, cannot.
    """
    return any(
        first is not None
        and second is not None
        and first.weight is None
        and second.weight is None
        and 2 * second.largest > PAIR_LIMIT
        for first, second in _products(model)
    )


def overflow_causes(model: onnx.ModelProto) -> list[str]:
    """Why integer kernels that add two products in 16 bits can overflow; [] if they cannot."""
    causes = []
    if (largest_pair(model) or 0) > PAIR_LIMIT:
        causes.append("its INT8 weights use the full range")
    if multiplies_activations(model):
        causes.append("it multiplies activations of 8 bits")
    return causes


def overflow(model: onnx.ModelProto, cpu: Cpu) -> tuple[str, str]:
    """Why a file's numbers may be wrong on a CPU, and the remedy; two "" if they are right.

    On an unknown CPU, or one other than x86, the numbers may still be right.
    """
    causes = overflow_causes(model)
    if cpu.sums_exactly or not causes:
        return "", ""
    where = f"some integer kernels, and this CPU ({cpu.name}) has not been tried"
    if "avx2" in cpu.features:
        where = f"integer kernels without VNNI, and this CPU ({cpu.name}) has none"
    why = f"{' and '.join(causes)}, which can overflow in {where}"
    return why, "quantize again with weight_range pairs"


def with_float_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with its INT8 weights as FP32 constants, which take 4 times the space.

    OpenVINO then computes their products in floating point. It still multiplies two INT8
    activations as integers.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    values = constants(result.graph)
    for node in [each for each in result.graph.node if each.op_type == "DequantizeLinear"]:
        if all(name in values for name in node.input):
            feed = {name: numpy_helper.to_array(values[name]) for name in node.input}
            (weight,) = ReferenceEvaluator(node).run(None, feed)
            result.graph.initializer.append(
                numpy_helper.from_array(np.asarray(weight), node.output[0])
            )
            result.graph.node.remove(node)
    return result


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Constants by name, in all forms that exporters write: initializers, Constant, Identity."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            found[node.output[0]] = node.attribute[0].t
        elif node.op_type == "Identity" and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
    return found


def replace(graph: onnx.GraphProto, replaced: dict[str, list[onnx.NodeProto]]) -> None:
    """Put nodes in the place of others, and drop all that no output depends on.

    Args:
        replaced: the first output of a node -> nodes in its place.
    """
    nodes = [new for node in graph.node for new in replaced.get(node.output[0], [node])]
    needed, names = [], {output.name for output in graph.output}
    for node in reversed(nodes):
        if names.intersection(node.output):
            needed.append(node)
            names.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(needed))
    kept = [tensor for tensor in graph.initializer if tensor.name in names]
    del graph.initializer[:]
    graph.initializer.extend(kept)


@dataclass(frozen=True)
class _Factor:
    """A factor in INT8.

    Attributes:
        weight: int [out, in], with more axes in front or none; None for activations.
        largest: the largest size of an activation's integer.
    """

    weight: np.ndarray | None
    largest: int = 255


def _products(model: onnx.ModelProto) -> Iterator[tuple[_Factor | None, _Factor | None]]:
    """The two factors of every MatMul and Gemm; None for a factor in floating point."""
    values = constants(model.graph)
    makers = {name: node for node in model.graph.node for name in node.output}

    def constant(name: str) -> np.ndarray | None:
        """The value of a constant; None if `name` is not one."""
        return numpy_helper.to_array(values[name]) if name in values else None

    def largest(quantize: onnx.NodeProto | None) -> int:
        """The largest integer from a QuantizeLinear, by the limits of the Clip in front of it."""
        clip = makers.get(quantize.input[0]) if quantize is not None else None
        if quantize is None or clip is None or clip.op_type != "Clip" or len(clip.input) < 3:
            return 255
        low, high, scale = map(constant, (*clip.input[1:3], quantize.input[1]))
        zero = constant(quantize.input[2]) if len(quantize.input) > 2 else np.zeros(1)
        if low is None or high is None or scale is None or zero is None or np.any(zero):
            return 255
        return int(np.rint(max(abs(low.min()), abs(high.max())) / scale.min()))

    def factor(name: str, sums_over: int) -> _Factor | None:
        """The factor at the input `name`; the product sums over its axis `sums_over`."""
        moves: list[onnx.NodeProto] = []
        dequantized = False
        while name not in values and (maker := makers.get(name)) is not None:
            if maker.op_type == "DequantizeLinear":
                dequantized = True
            elif maker.op_type in MOVES:
                moves.append(maker)
            else:
                break
            name = maker.input[0]
        if not dequantized:
            return None
        if name not in values:
            return _Factor(None, largest(maker))
        weight = numpy_helper.to_array(values[name]).astype(np.int32)
        if values[name].data_type == onnx.TensorProto.UINT8:
            weight -= 128  # the same weights as INT8 with zero point 0
        for move in reversed(moves):
            if move.op_type == "Transpose":
                order = next((list(each.ints) for each in move.attribute), None)
                weight = weight.transpose(order)
        return _Factor(np.moveaxis(weight, max(sums_over, -weight.ndim), -1))

    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            flags = {
                each.name for each in node.attribute if each.name.startswith("trans") and each.i
            }
            yield (
                factor(node.input[0], -2 if "transA" in flags else -1),
                factor(node.input[1], -1 if "transB" in flags else -2),
            )


def _largest_pair_along_last(weight: np.ndarray) -> int:
    """The largest |w(2i)| + |w(2i+1)| along the last axis; an odd last weight counts alone."""
    sizes = np.abs(weight)
    sums = sizes[..., ::2].copy()
    sums[..., : sizes.shape[-1] // 2] += sizes[..., 1::2]
    return int(sums.max())
