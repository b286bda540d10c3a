"""Whether model.onnx computes what PyTorch does, and what the runtimes of this machine make of it.

The verdict does not depend on the machine: the file is run without integer kernels. In INT8, sums
that differ in their last digit may round to neighbouring integers, which the layers behind them
multiply. So each layer of the file is given the integers that PyTorch has rounded to; those that
the file rounds to are counted where they differ.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from deploy import int8_file
from deploy.cpu import this_cpu

MAX_DIFFERENCE = 1e-3  # of an FP32 file's outputs, the largest
MAX_DEVIATION = 0.01  # of an INT8 file's outputs, on average, in their standard deviations
MAX_FLIPPED = 0.01  # share of roundings that may differ; some 1e-5 do
STRAYS = 0.1  # standard deviations: a runtime that is further off than this is told of

Feed = dict[str, np.ndarray]  # a file's inputs by name
Infer = Callable[[Feed], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Check:
    """What a check has found.

    Attributes:
        difference: between the outputs of PyTorch and of the file, computed exactly. In FP32 the
            largest; in INT8 the mean, in standard deviations, the roundings being PyTorch's.
        limit: of `difference`.
        flipped: share of an INT8 file's roundings of activations that are not PyTorch's.
        largest_pair: of an INT8 file's weights; see `int8_file.largest_pair`.
        runtimes: how far the outputs are from PyTorch's as a user runs the file on this machine:
            mean difference in standard deviations; infinite where a runtime cannot run it.
        cpu: the name and the instructions of this machine's CPU.
    """

    difference: float
    limit: float
    flipped: float
    largest_pair: int | None
    runtimes: dict[str, float]
    cpu: str

    @property
    def passed(self) -> bool:
        """False for outputs that are not finite as well."""
        return self.difference <= self.limit and self.flipped <= MAX_FLIPPED


def check_file(path: str, graph: nn.Module, feeds: Sequence[Feed], int8: bool) -> Check:
    """Compare a file with the PyTorch graph that it was exported from.

    Args:
        graph: in eval mode, in FP32 on the CPU; its forward takes a feed's arrays in their order.
            `per_token` tells whether its outputs are [B, L]: padding does not count then.
        feeds: real inputs, [1, L] each.
        int8: whether the graph rounds, by modules that have `integers_of`.
    """
    exact = run_exactly(path)
    declared: Any = graph.outputs  # an onnx_file.Outputs
    with torch.no_grad():
        expected = [[each.numpy() for each in graph(*_tensors(feed))] for feed in feeds]

    def deviation(infer: Infer) -> float:
        return _worst(
            _deviation(mine, theirs, feed, declared.per_token)
            for feed, outputs in zip(feeds, expected, strict=True)
            for mine, theirs in zip(outputs, infer(feed), strict=True)
        )

    runtimes = {"exact": deviation(exact)} if int8 else {}
    for name, load in _as_users_do(path):
        try:
            runtimes[name] = deviation(load())
        except Exception:  # whatever a runtime here raises: it is no fault of the file's
            runtimes[name] = float("inf")
    cpu = str(this_cpu())
    if not int8:
        difference = _largest(exact, feeds, expected)
        return Check(difference, MAX_DIFFERENCE, 0.0, None, runtimes, cpu)
    model = onnx.load(path)
    pair = int8_file.largest_pair(model)
    difference, flipped = _layer_by_layer(model, graph, feeds, expected)
    return Check(difference, MAX_DEVIATION, flipped, pair, runtimes, cpu)


def strays(check: Check) -> Iterator[tuple[str, float]]:
    """The runtimes of this machine that are far off, and how far: further than `STRAYS`, and than
    flipped roundings alone explain."""
    for name, deviation in check.runtimes.items():
        if name != "exact" and not deviation <= max(STRAYS, 3 * check.runtimes.get("exact", 0.0)):
            yield name, deviation


# ------------------------------------------------------------------------------------------------
# Differences


def _deviation(mine: np.ndarray, theirs: np.ndarray, feed: Feed, per_token: bool) -> float:
    """Mean absolute difference in standard deviations of `mine`; of tokens, without padding."""
    real = feed["attention_mask"].astype(bool) if per_token else np.ones(mine.shape, bool)
    return float(np.abs(mine - theirs)[real].mean() / (mine[real].std() or 1.0))  # 0: constant


def _largest(infer: Infer, feeds: Sequence[Feed], expected: list[list[np.ndarray]]) -> float:
    """The largest absolute difference."""
    return _worst(
        float(np.abs(mine - theirs).max())
        for feed, outputs in zip(feeds, expected, strict=True)
        for mine, theirs in zip(outputs, infer(feed), strict=True)
    )


def _worst(differences: Iterator[float]) -> float:
    """The largest; infinity where one is no number."""
    return max(float("inf") if np.isnan(each) else each for each in differences)


# ------------------------------------------------------------------------------------------------
# Ways to run a file


def run_exactly(model: str | bytes) -> Infer:
    """ONNX Runtime without integer kernels: what the file means, on any machine."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run(None, feed)


def _as_users_do(path: str) -> Iterator[tuple[str, Callable[[], Infer]]]:
    """Each runtime with its own settings, by name, and what loads the file in it; OpenVINO where it
    is installed, in f32 too."""

    def in_onnxruntime() -> Infer:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda feed: session.run(None, feed)

    def in_openvino(settings: dict[str, str]) -> Infer:
        import openvino  # which need not be installed

        compiled = openvino.Core().compile_model(path, "CPU", settings)
        return lambda feed: list(compiled(feed).values())

    yield "ONNX Runtime", in_onnxruntime
    if importlib.util.find_spec("openvino") is not None:
        yield "OpenVINO", lambda: in_openvino({})
        yield "OpenVINO f32", lambda: in_openvino({"INFERENCE_PRECISION_HINT": "f32"})


# ------------------------------------------------------------------------------------------------
# Layer by layer


def _layer_by_layer(
    model: onnx.ModelProto,
    graph: nn.Module,
    feeds: Sequence[Feed],
    expected: list[list[np.ndarray]],
) -> tuple[float, float]:
    """The mean difference of the outputs where PyTorch's integers are given to each layer, and the
    share of integers that the file rounds otherwise."""
    declared: Any = graph.outputs  # an onnx_file.Outputs
    names = _take_integers_from_outside(model.graph)
    infer = run_exactly(model.SerializeToString())
    worst, flipped, count = 0.0, 0, 0
    for feed, outputs in zip(feeds, expected, strict=True):
        with _recorded(graph) as recorded, torch.no_grad():
            graph(*_tensors(feed))
        given = {_given(name): each for name, each in zip(names, recorded, strict=True)}
        found = infer({**feed, **given})
        for mine, theirs in zip(outputs, found, strict=False):
            worst = max(worst, _worst(iter([_deviation(mine, theirs, feed, declared.per_token)])))
        for name, rounded in zip(names, found[len(outputs) :], strict=True):
            flipped += int((given[_given(name)] != rounded).sum())
            count += rounded.size
    return worst, flipped / max(count, 1)


def _given(name: str) -> str:
    """The input that takes the place of the output `name` of a QuantizeLinear."""
    return f"{name}.given"


def _take_integers_from_outside(graph: onnx.GraphProto) -> list[str]:
    """Let what reads quantized activations read inputs instead; the quantized become outputs.

    Returns:
        the names of the outputs of QuantizeLinear, in the order of the graph.
    """
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            kinds[node.output[0]] = node.attribute[0].t.data_type
        if node.op_type == "Identity":
            kinds[node.output[0]] = kinds.get(node.input[0])
    names = [node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"]
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            kind = kinds[node.input[2]]
            value = onnx.helper.make_tensor_value_info(_given(node.output[0]), kind, None)
            graph.input.append(value)
            graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], kind, None))
        else:
            for i, name in enumerate(node.input):
                if name in names:
                    node.input[i] = _given(name)
    return names


@contextmanager
def _recorded(graph: nn.Module) -> Iterator[list[np.ndarray]]:
    """The integers that the graph's modules round activations to, in the order of their use."""
    integers: list[np.ndarray] = []

    # `module` is one with `integers_of`.
    def record(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if not isinstance(inputs[0], nn.Parameter):
            integers.append(module.integers_of(output))

    hooks = [
        module.register_forward_hook(record)
        for module in graph.modules()
        if hasattr(module, "integers_of")
    ]
    try:
        yield integers
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(feed: Feed) -> list[torch.Tensor]:
    return [torch.from_numpy(each) for each in feed.values()]
