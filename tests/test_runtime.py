"""Tests of INT8 files: whether their integer sums can overflow, and what then runs them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy import int8_file

node = helper.make_node


def model_of(
    nodes: list[onnx.NodeProto],
    tensors: dict[str, np.ndarray],
    inputs: dict[str, tuple[int, list[int | str]]],
    outputs: dict[str, list[int | str]],
) -> onnx.ModelProto:
    """A checked model; inputs are (type, shape) by name, outputs are float of a shape."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, *each) for name, each in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def linear(weight: np.ndarray, *, transposed: bool = False, gemm: bool = False) -> onnx.ModelProto:
    """x [1, in] in INT8 times a weight [in, out], stored as [out, in] if `transposed`."""
    stored = np.ascontiguousarray(weight.T) if transposed else weight
    nodes = [
        node("QuantizeLinear", ["x", "scale", "x_zero"], ["x_q"]),
        node("DequantizeLinear", ["x_q", "scale", "x_zero"], ["x_d"]),
        node("DequantizeLinear", ["w", "scale", "w_zero"], ["w_d"]),
    ]
    if gemm:
        nodes.append(node("Gemm", ["x_d", "w_d"], ["y"], transB=int(transposed)))
    else:
        if transposed:
            nodes.append(node("Transpose", ["w_d"], ["w_t"], perm=[1, 0]))
        nodes.append(node("MatMul", ["x_d", "w_t" if transposed else "w_d"], ["y"]))
    tensors = {
        "scale": np.float32(1),
        "x_zero": np.uint8(0),
        "w_zero": weight.dtype.type(128 if weight.dtype == np.uint8 else 0),
        "w": stored,
    }
    inputs = {"x": (TensorProto.FLOAT, [1, weight.shape[0]])}
    return model_of(nodes, tensors, inputs, {"y": [1, weight.shape[1]]})


# ------------------------------------------------------------------------------------------------
# What a file multiplies


@pytest.mark.parametrize("form", [{}, {"transposed": True}, {"gemm": True},
                                  {"transposed": True, "gemm": True}])  # fmt: skip
def test_pairs_are_neighbours_along_the_input_axis_of_one_channel(form: dict[str, bool]) -> None:
    """Each larger sum of this weight is of numbers that no kernel adds in 16 bits."""
    weight = np.array(  # [in, out]
        [[-60, 3], [50, 4], [127, -64], [1, 64], [-20, 5], [2, 90]], np.int8
    )
    assert int8_file.largest_pair(linear(weight, **form)) == 128
    weight[3, 0] = -2
    assert int8_file.largest_pair(linear(weight, **form)) == 129
    assert int8_file.may_saturate(linear(weight, **form))


def test_the_last_of_an_odd_number_of_inputs_counts_alone() -> None:
    weight = np.array([[1], [-100], [127]], np.int8)
    assert int8_file.largest_pair(linear(weight)) == 127
    assert not int8_file.may_saturate(linear(weight))
    assert int8_file.largest_pair(linear(np.array([[-128]], np.int8))) == 128
    assert int8_file.largest_pair(linear(np.full((4, 1), -128, np.int8))) == 256


def test_unsigned_weights_count_by_their_distance_from_128() -> None:
    weight = np.array([[128, 255], [0, 254]], np.uint8)
    assert int8_file.largest_pair(linear(weight)) == 127 + 126 + 0
    assert int8_file.largest_pair(linear(weight[:, :1])) == 128


def test_tables_that_are_looked_up_do_not_count() -> None:
    """Rows of a table at full range go as floating point into a product of small weights."""
    tensors = {
        "table": np.full((3, 4), 127, np.int8),
        "w": np.full((4, 2), 9, np.int8),
        "scale": np.float32(1),
    }
    look_up = [
        node("Gather", ["table", "ids"], ["rows"]),
        node("DequantizeLinear", ["rows", "scale"], ["x"]),
    ]
    inputs = {"ids": (TensorProto.INT64, [1])}
    only = model_of(look_up, {k: tensors[k] for k in ("table", "scale")}, inputs, {"x": [1, 4]})
    assert int8_file.largest_pair(only) is None
    assert not int8_file.may_saturate(only)
    product = [
        node("DequantizeLinear", ["w", "scale"], ["w_d"]),
        node("MatMul", ["x", "w_d"], ["y"]),
    ]
    both = model_of([*look_up, *product], tensors, inputs, {"y": [1, 2]})
    assert int8_file.largest_pair(both) == 18


def test_a_file_in_floating_point_has_no_pairs() -> None:
    weight = {"w": np.full((4, 2), 127, np.float32)}
    inputs = {"x": (TensorProto.FLOAT, [1, 4])}
    model = model_of([node("MatMul", ["x", "w"], ["y"])], weight, inputs, {"y": [1, 2]})
    assert int8_file.largest_pair(model) is None
    assert not int8_file.may_saturate(model)


@pytest.mark.parametrize("quantized", [("q", "k"), ("q",), ("k",), ()])
def test_a_product_of_two_activations_is_told_from_one_of_weights(
    quantized: tuple[str, ...],
) -> None:
    """Both factors in INT8 can overflow whatever the weights are; one in INT8 is no product."""
    nodes = []
    for name in quantized:
        nodes.append(node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"]))
        nodes.append(node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_d"]))
    query, key = (f"{name}_d" if name in quantized else name for name in ("q", "k"))
    nodes.append(node("Transpose", [key], ["k_t"], perm=[1, 0]))
    nodes.append(node("MatMul", [query, "k_t"], ["y"]))
    inputs = {name: (TensorProto.FLOAT, [2, 4]) for name in ("q", "k")}
    tensors = {"scale": np.float32(1), "zero": np.uint8(0)} if quantized else {}
    model = model_of(nodes, tensors, inputs, {"y": [2, 2]})
    assert int8_file.largest_pair(model) is None
    assert int8_file.multiplies_activations(model) == (len(quantized) == 2)
    assert int8_file.may_saturate(model) == (len(quantized) == 2)


def test_weights_are_no_activations() -> None:
    assert not int8_file.multiplies_activations(linear(np.ones((2, 2), np.int8)))
