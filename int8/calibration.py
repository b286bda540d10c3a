"""Calibration: insert NNCF's quantizers into a model, with ranges fitted to samples."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import nncf.torch
import torch
from nncf.quantization.algorithms.pipeline import Pipeline
from nncf.quantization.algorithms.post_training import algorithm as post_training
from nncf.quantization.algorithms.smooth_quant.algorithm import SmoothQuant
from nncf.scopes import get_ignored_node_names_from_subgraph
from nncf.tensor import Tensor as NncfTensor
from torch import Tensor, nn
from transformers import PreTrainedModel

from cli import UserError, in_one_line
from int8.quantizers import Operation, _graph, fix_scales, hold_weight_range, operations
from int8.settings import NncfConfig
from int8.weight_range import HoldWeightRange, WeightRange

# The errors of nncf.quantize for settings that its torch backend does not support.
REFUSALS = (
    ValueError,
    nncf.InternalError,
    nncf.ParameterNotSupportedError,
    nncf.ValidationError,
)
SAMPLES_IN_MEMORY = 8  # between two calls of `_return_free_memory`, each some 30 ms


def check_scope(config: NncfConfig, model: nn.Module) -> None:
    """Check that every part of ignored_scope matches something in the model.

    Names and patterns may be those of modules. All parts become NNCF's names of operations.

    Raises:
        UserError: a part matches nothing.
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
                known = [o.kind if key == "types" else o.name for o in all_operations]
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
        samples: inputs [1, max_seq_length_c] each, padded as at run time.
        before_each: called before each sample, in each of NNCF's passes over the samples.

    Raises:
        UserError: NNCF does not support these settings for PyTorch models.
    """

    number = itertools.count()

    def inputs(sample: dict[str, Tensor]) -> dict[str, Tensor]:
        before_each()
        if next(number) % SAMPLES_IN_MEMORY == 0:
            _return_free_memory()
        return sample

    arguments = {**config.arguments, "subset_size": len(samples)}
    refused = in_one_line(f"--nncf_config: {config.path}: NNCF refuses it", REFUSALS)
    with refused, torch.no_grad(), _holding(config.weight_range), _powers_of_two():
        model = nncf.quantize(model.eval(), nncf.Dataset(list(samples), inputs), **arguments)
        hold_weight_range(model, config.weight_range)
        fix_scales(model)
    return model


def _return_free_memory() -> None:
    """Give the memory that is free in the heap back to the system, where the C library can.

    NNCF keeps some small tensors per sample. The heap places them where large activations were, so
    the next sample's do not fit there: the process would grow by all activations of each sample.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _holding(weight_range: WeightRange) -> Iterator[None]:
    """Let nncf.quantize hold the weights' range before it corrects biases."""
    make_pipeline = post_training.create_ptq_pipeline

    def with_range(**arguments: object) -> Pipeline:
        pipeline = make_pipeline(**arguments)
        hold_all = functools.partial(hold_weight_range, weight_range=weight_range)
        pipeline.pipeline_steps[-1].insert(1, HoldWeightRange(hold_all))  # 0 fits the ranges
        return pipeline

    with mock.patch.object(post_training, "create_ptq_pipeline", with_range):
        yield


@contextlib.contextmanager
def _powers_of_two() -> Iterator[None]:
    """Let SmoothQuant round its scales to powers of two, whose products and quotients are exact."""
    calculate = SmoothQuant._calculate_scale_and_ratio

    def rounded(
        activations: NncfTensor, weights: NncfTensor, alpha: float
    ) -> tuple[NncfTensor, float]:
        scales, ratio = calculate(activations, weights, alpha)
        return NncfTensor(nearest_power_of_two(scales.data)), ratio

    with mock.patch.object(SmoothQuant, "_calculate_scale_and_ratio", staticmethod(rounded)):
        yield


def nearest_power_of_two(scales: Tensor) -> Tensor:
    """For each positive number, the power of two with the nearest logarithm."""
    mantissa = torch.frexp(scales).mantissa  # 0.5 to 1, times a power of two
    above = scales / mantissa  # exact, as the quotient is a power of two
    return torch.where(mantissa < 0.5**0.5, above / 2, above)
