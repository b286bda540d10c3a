"""Compare model.onnx with the PyTorch model, and run it in the runtimes of this machine.

The verdict does not depend on the machine: the file runs without integer kernels. In INT8, sums
that differ in their last digit may round to neighbouring integers, and later layers multiply the
difference. So each layer of the file gets the integers that PyTorch has rounded to, and the check
counts those integers that the file rounds otherwise.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from deploy import int8_file, runtime
from deploy.cpu import this_cpu

MAX_DIFFERENCE = 1e-3  # the largest difference allowed in an FP32 file's outputs
MAX_DEVIATION = 0.01  # the mean one allowed in an INT8 file's, in their standard deviations
MAX_FLIPPED = 0.01  # the share of roundings that may differ; about 1e-5 do
STRAYS = 0.1  # standard deviations; a runtime that is further off gets a warning

Feed = dict[str, np.ndarray]  # a file's inputs by name
Infer = Callable[[Feed], Sequence[np.ndarray]]
Difference = Callable[[np.ndarray, np.ndarray, Feed], float]  # of an output: mine, theirs


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        difference: between PyTorch's outputs and the file's, computed exactly. In FP32 the largest
            one; in INT8 the mean in standard deviations, with PyTorch's roundings.
        limit: the largest `difference` that is allowed.
        flipped: the share of an INT8 file's roundings of activations that differ from PyTorch's.
        largest_pair: of an INT8 file's weights; see `int8_file.largest_pair`.
        runtimes: the mean difference from PyTorch's outputs in each runtime of this machine, in
            standard deviations; infinite if a runtime cannot run the file.
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
        """Whether the file is right; it is not if an output is not finite."""
        return self.difference <= self.limit and self.flipped <= MAX_FLIPPED


def check_file(path: str, graph: nn.Module, feeds: Sequence[Feed], int8: bool) -> Check:
    """Compare a file with the PyTorch graph that it was exported from.

    Args:
        graph: in eval mode, in FP32 on the CPU; its forward takes a feed's arrays in their order.
            `outputs.per_token` says whether its outputs are [B, L]: padding then does not count.
        feeds: real inputs, [1, L] each.
        int8: whether the graph rounds, in modules that have `integers_of`.
    """
    exact = run_exactly(path)
    declared: Any = graph.outputs  # an onnx_file.Outputs
    with torch.no_grad():
        expected = [[each.numpy() for each in graph(*_tensors(feed))] for feed in feeds]

    def worst(infer: Infer, difference: Difference) -> float:
        return _worst(
            difference(mine, theirs, feed)
            for feed, outputs in zip(feeds, expected, strict=True)
            for mine, theirs in zip(outputs, infer(feed), strict=True)
        )

    deviation = functools.partial(_deviation, declared.per_token)
    runtimes = {"exact": worst(exact, deviation)} if int8 else {}
    for name, load in _as_users_do(path):
        try:
            runtimes[name] = worst(load(), deviation)
        except Exception:  # of any kind; the file may still be right
            runtimes[name] = float("inf")
    cpu = str(this_cpu())
    if not int8:
        largest = worst(exact, lambda mine, theirs, _: float(np.abs(mine - theirs).max()))
        return Check(largest, MAX_DIFFERENCE, 0.0, None, runtimes, cpu)
    model = onnx.load(path)
    pair = int8_file.largest_pair(model)
    difference, flipped = _layer_by_layer(model, graph, feeds, expected)
    return Check(difference, MAX_DEVIATION, flipped, pair, runtimes, cpu)


def rounds_alike(model: onnx.ModelProto, graph: nn.Module, feeds: Sequence[Feed]) -> bool:
    """Whether an INT8 file with operators of ONNX Runtime's own passes the check layer by layer.

    Its products are of integers on any machine, and exact unless the kernels here overflow.

    Args:
        graph, feeds: as in `check_file`.
    """
    with torch.no_grad():
        expected = [[each.numpy() for each in graph(*_tensors(feed))] for feed in feeds]
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    difference, flipped = _layer_by_layer(copied, graph, feeds, expected)
    return difference <= MAX_DEVIATION and flipped <= MAX_FLIPPED


def strays(check: Check) -> Iterator[tuple[str, float]]:
    """The runtimes of this machine that are far off, and how far.

    Far is further than `STRAYS`, and further than flipped roundings alone can explain.
    """
    for name, deviation in check.runtimes.items():
        if name != "exact" and not deviation <= max(STRAYS, 3 * check.runtimes.get("exact", 0.0)):
            yield name, deviation


# ------------------------------------------------------------------------------------------------
# Differences


def _deviation(per_token: bool, mine: np.ndarray, theirs: np.ndarray, feed: Feed) -> float:
    """Mean absolute difference in standard deviations of `mine`, without padding if per_token."""
    real = feed["attention_mask"].astype(bool) if per_token else np.ones(mine.shape, bool)
    return float(np.abs(mine - theirs)[real].mean() / (mine[real].std() or 1.0))  # 0: constant


def _worst(differences: Iterable[float]) -> float:
    """The largest difference; infinity if one is not a number."""
    return max(float("inf") if np.isnan(each) else each for each in differences)


# ------------------------------------------------------------------------------------------------
# Ways to run a file


def run_exactly(model: str | bytes) -> Infer:
    """The file in ONNX Runtime without integer kernels: the same numbers on any machine."""
    session = runtime.onnxruntime_session(model, runtime.WITHOUT_INTEGERS)
    return lambda feed: session.run(None, feed)


def _as_users_do(path: str) -> Iterator[tuple[str, Callable[[], Infer]]]:
    """The name of each way to run a file, and a function that loads the file.

    The ways are ONNX Runtime and, if it is installed, OpenVINO in its default precision and in f32.
    """

    def compiled(opened: runtime.Opened) -> Infer:
        return opened.compile(opened.length)

    yield "ONNX Runtime", lambda: compiled(runtime.in_onnxruntime(path, False))
    if importlib.util.find_spec("openvino") is not None:
        yield "OpenVINO", lambda: compiled(runtime.in_openvino(path, "default", False))
        yield "OpenVINO f32", lambda: compiled(runtime.in_openvino(path, "f32", False))


# ------------------------------------------------------------------------------------------------
# Layer by layer


def _layer_by_layer(
    model: onnx.ModelProto,
    graph: nn.Module,
    feeds: Sequence[Feed],
    expected: list[list[np.ndarray]],
) -> tuple[float, float]:
    """Run a file with PyTorch's integers as the input of each layer.

    Returns:
        the mean difference of its outputs, and the share of integers that it rounds otherwise.
    """
    declared: Any = graph.outputs  # an onnx_file.Outputs
    names = _take_integers_from_outside(model.graph)
    infer = run_exactly(model.SerializeToString())
    worst, flipped, count = 0.0, 0, 0
    for feed, outputs in zip(feeds, expected, strict=True):
        with _recorded(graph) as recorded, torch.no_grad():
            graph(*_tensors(feed))
        given = {_given(name): each for name, each in zip(names, recorded, strict=True)}
        found = infer({**feed, **given})
        pairs = zip(outputs, found, strict=False)  # integers follow the outputs
        worst = max(worst, _worst(_deviation(declared.per_token, *pair, feed) for pair in pairs))
        for name, rounded in zip(names, found[len(outputs) :], strict=True):
            flipped += int((given[_given(name)] != rounded).sum())
            count += rounded.size
    return worst, flipped / max(count, 1)


def _given(name: str) -> str:
    """The input in place of a QuantizeLinear's output `name`."""
    return f"{name}.given"


def _take_integers_from_outside(graph: onnx.GraphProto) -> list[str]:
    """Let the readers of quantized activations read new inputs; the activations become outputs.

    Returns:
        the names of the activations, in the order of the graph.
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
    """The integers to which the graph's modules round activations, in the order of their use."""
    integers: list[np.ndarray] = []

    # `module` has `integers_of`.
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
