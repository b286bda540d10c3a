"""Fake quantizers: NNCF's modules, ranges and checkpoints, with a forward and backward of our own.

A value is cut off at the ends of a range and rounded to the nearest level. The gradient is NNCF's:
it passes through values inside the range; the gradient of values outside goes to the ends of the
range.

In FP32 all figures equal those of NNCF's reference functions, but their computation differs: it is
in FP32 for inputs of any precision; it does not wait for a GPU, since the number of levels is a
Python number; and compiled functions take one pass over memory.
"""

from __future__ import annotations

import os
import shutil
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import torch
from nncf.torch.quantization.layers import AsymmetricQuantizer, BaseQuantizer, SymmetricQuantizer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import handle_torch_function, has_torch_function_unary

from cli import first_line, warn
from int8.weight_range import hold

# The number of values to compute on a CPU before compiling. They take about a minute, and the
# first compilation half a minute, so a short run does not wait for a compiler.
PLAIN_VALUES = 10_000_000_000
# Each kind of input (shape, dtype, training or not) has a compiled function of its own, up to so
# many. Torch's limit is 8; beyond it, functions run as plain operations.
KINDS = 64

# A fused multiplication and addition, or an inexact division, would give other bits. Not every
# version of torch has both options.
EXACT = ("emulate_precision_casts", "eager_numerics.division_rounding")

Levels = tuple[int, int]  # the lowest and the highest integer, e.g. -128 and 127


# ------------------------------------------------------------------------------------------------
# Ranges: from a quantizer's parameters to the low end and width


def symmetric_range(scale: Tensor, levels: Levels, eps: float) -> tuple[Tensor, Tensor]:
    """Low end and width of a range whose high end is |scale|, both in the shape of `scale`."""
    high = scale.abs() + eps
    low = high * (levels[0] / levels[1])
    return low, high - low


def asymmetric_range(
    low: Tensor, width: Tensor, levels: Levels, eps: float
) -> tuple[Tensor, Tensor]:
    """Low end and width of a range that is moved as little as needed to make 0 a level."""
    n = levels[1] - levels[0]
    high = (width.abs() + eps) + low
    low = torch.where(low > 0, 0.0, low)
    high = torch.where(high < 0, 0.0, high)
    zero = torch.round(-low * (n / (high - low)))
    new_low = torch.where(zero < n, zero / (zero - n) * high, low)
    new_high = torch.where(zero > 0, (zero - n) / zero * low, high)
    # Either end could move; the move that leaves the wider range is taken.
    first = (high - new_low > new_high - low).to(low.dtype)
    second = (1 - first).abs()
    final_low = first * new_low + second * low
    return final_low, second * new_high + first * high - final_low


# ------------------------------------------------------------------------------------------------
# The functions on values. The last bit depends on the operations and their order, which are NNCF's.


def round_values(values: Tensor, low: Tensor, width: Tensor, steps: Tensor) -> Tensor:
    """Values of any dtype, cut off and rounded to levels, in FP32.

    Args:
        low, width: low end and width of the range; they broadcast to `values`.
        steps: steps between levels per unit, (levels - 1) / width.
    """
    zero_point = torch.round(-low * steps)
    rounded = torch.minimum(torch.maximum(values.float(), low), low + width)
    rounded -= low
    rounded *= steps
    rounded -= zero_point
    rounded.round_()
    rounded /= steps
    return rounded


def round_to(
    values: Tensor, low: Tensor, width: Tensor, steps: Tensor, dtype: torch.dtype
) -> Tensor:
    """`round_values`, in `dtype`."""
    return round_values(values, low, width, steps).to(dtype)


def gradients(
    grad: Tensor, values: Tensor, low: Tensor, width: Tensor, steps: Tensor, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the values, and each value's share in the gradients of low end and width.

    Args:
        grad: the gradient of the rounded values.
        floor: how far the lowest level moves if the highest level moves by 1.
    """
    grad, values = grad.float(), values.float()
    moved = round_values(values, low, width, steps)
    moved -= values
    moved *= torch.reciprocal(width)
    above, below, outside, inside = _masks(values, low, width)
    moved *= inside
    moved += above
    moved += below * floor
    # grad comes first: the results get its memory layout, which decides how their sums round.
    return grad * inside, grad * outside, grad * moved


def only_inside(grad: Tensor, values: Tensor, low: Tensor, width: Tensor) -> Tensor:
    """The gradient of the values, for a range that does not train."""
    inside = _masks(values.float(), low, width)[-1]
    inside *= grad.float()
    return inside


def _masks(values: Tensor, low: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1 or 0 for values above a range, below it, outside it and inside it.

    They are FP32, since a CPU multiplies by bools at a third of the speed.
    """
    above, below = torch.empty_like(values), torch.empty_like(values)
    torch.gt(values, low + width, out=above)
    torch.lt(values, low, out=below)
    outside = above + below
    return above, below, outside, 1 - outside


def sum_like(parts: Tensor, parameter: Tensor) -> Tensor:
    """The gradient of a parameter, in its shape: the sum of all values' shares."""
    for dim, size in enumerate(parameter.shape):
        if size == 1:
            parts = parts.sum(dim, keepdim=True)
    return parts.sum_to_size(parameter.shape)


def gradient_sums(
    grad: Tensor, values: Tensor, low: Tensor, width: Tensor, steps: Tensor, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the values, of the low end and of the width."""
    inside, at_low, at_width = gradients(grad, values, low, width, steps, floor)
    return inside, sum_like(at_low, low), sum_like(at_width, low)


# ------------------------------------------------------------------------------------------------
# Compilation where it pays


Rest = ParamSpec("Rest")  # arguments of a function after its first
Result = TypeVar("Result")


class _Compiled(Generic[Rest, Result]):
    """A function that is compiled for a GPU at once, and for a CPU after PLAIN_VALUES values.

    On a CPU the compiled and the plain function give the same bits. So a run stays the same if it
    resumes in another process, or on a machine without a compiler.
    """

    values_seen = 0  # by all such functions on a CPU
    failed = False

    def __init__(self, function: Callable[Concatenate[Tensor, Rest], Result]) -> None:
        self.function = function
        self.compiled: Callable[Concatenate[Tensor, Rest], Result] | None = None

    def __call__(self, values: Tensor, *args: Rest.args, **named: Rest.kwargs) -> Result:
        if not self._pays(values):
            return self.function(values, *args, **named)
        try:
            if self.compiled is None:
                known = torch._inductor.list_options()
                options: dict[str, str | int | bool | Callable[..., object]] = {
                    name: True for name in EXACT if name in known
                }
                compile_function: Any = torch.compile  # its types lack recompile_limit
                self.compiled = compile_function(
                    self.function, dynamic=True, options=options, recompile_limit=KINDS
                )
            return self.compiled(values, *args, **named)
        except Exception as error:  # compilers raise all kinds; the plain function is right
            _Compiled.failed = True
            warn(f"quantizers run as plain operations, which is slower: {first_line(error)}")
            return self.function(values, *args, **named)

    @staticmethod
    def _pays(values: Tensor) -> bool:
        if _Compiled.failed or torch.compiler.is_compiling():
            return False
        if values.device.type == "cpu" and _Compiled.values_seen < PLAIN_VALUES:
            _Compiled.values_seen += values.numel()
            return False
        return values.device.type == "cuda" or (values.device.type == "cpu" and _has_compiler())


def _has_compiler() -> bool:
    """Whether the C++ compiler that torch.compile calls is installed."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(os.environ.get("CXX", default)) is not None


_round_to, _gradients = _Compiled(round_to), _Compiled(gradients)
_only_inside, _gradient_sums = _Compiled(only_inside), _Compiled(gradient_sums)


@dataclass(frozen=True)
class Rounding:
    """How to round values.

    Attributes:
        levels, eps: the quantizer's.
        dtype: the dtype of the result.
        known: the result if it has been computed before, else None.
    """

    levels: Levels
    eps: float
    dtype: torch.dtype
    known: Tensor | None


class FakeQuantize(torch.autograd.Function):
    """Round values to the levels of a range, with gradients for values and range."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rounding: Rounding, *parameters: Tensor) -> Tensor:
        """Round values of any shape.

        Args:
            parameters: the scale of a symmetric range, or low end and width of an asymmetric one;
                they broadcast to the values.
        """
        levels, eps = rounding.levels, rounding.eps
        if len(parameters) == 1:
            low, width = symmetric_range(parameters[0], levels, eps)
        else:
            low, width = asymmetric_range(parameters[0], parameters[1], levels, eps)
        steps = (levels[1] - levels[0]) / width
        ctx.levels = levels
        # The parameters themselves may be raised before the backward pass.
        ctx.save_for_backward(values, low, width, steps, torch.sign(parameters[-1]))
        if rounding.known is not None:
            return rounding.known.detach()
        (flat,) = _flat(low, values)
        return _round_to(flat, low, width, steps, rounding.dtype).view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, low, width, steps, sign = ctx.saved_tensors
        needs_values, _, *needs_range = ctx.needs_input_grad
        grads, inputs = _flat(low, grad, values)
        of_values: Tensor | None = None
        of_range: list[Tensor | None] = [None] * len(needs_range)
        if any(needs_range):
            floor = ctx.levels[0] / ctx.levels[1]
            if values.device.type == "cuda":
                of_values, *sums = _gradient_sums(grads, inputs, low, width, steps, floor)
            else:
                of_values, *parts = _gradients(grads, inputs, low, width, steps, floor)
                parts = parts[-len(needs_range) :]  # a symmetric range has one parameter
                sums = [sum_like(part.view_as(values), low) for part in parts]
            of_range = [*sums[:-1], sums[-1] * sign][-len(needs_range) :]
        elif needs_values:
            of_values = _only_inside(grads, inputs, low, width)
        if of_values is not None and needs_values:
            of_values = of_values.view_as(values).to(values.dtype)
        else:
            of_values = None
        return of_values, None, *of_range


def _flat(low: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Tensors as vectors if all values have one range; one compiled function then serves all
    shapes."""
    detached = [each.detach() for each in tensors]
    if low.numel() == 1 and all(each.is_contiguous() for each in detached):
        return [each.view(-1) for each in detached]
    return detached


# ------------------------------------------------------------------------------------------------
# Under NNCF's modules


# NNCF knows the next two functions by their names, and by the parameters among their arguments.
def symmetric_quantize(x: Tensor, scale: Tensor, rounding: Rounding) -> Tensor:
    """Round values to a symmetric range."""
    if has_torch_function_unary(x):
        return handle_torch_function(symmetric_quantize, (x,), x, scale, rounding)
    return FakeQuantize.apply(x, rounding, scale)


def asymmetric_quantize(x: Tensor, low: Tensor, width: Tensor, rounding: Rounding) -> Tensor:
    """Round values to an asymmetric range."""
    if has_torch_function_unary(x):
        return handle_torch_function(asymmetric_quantize, (x,), x, low, width, rounding)
    return FakeQuantize.apply(x, rounding, low, width)


@dataclass(frozen=True)
class Known:
    """A weight as last rounded. The rounding is valid while `_state` gives the same `state`."""

    rounded: Tensor
    state: tuple[object, ...]


_known: weakref.WeakKeyDictionary[nn.Module, Known] = weakref.WeakKeyDictionary()
# A fused optimizer step changes weights without changing their versions.
register_optimizer_step_post_hook(lambda *_: _known.clear())


def quantize(
    quantizer: BaseQuantizer, x: Tensor, execute_traced_op_as_identity: bool = False
) -> Tensor:
    """Replace `quantize` in NNCF's symmetric and asymmetric quantizers.

    The result is in FP32, or under autocast in autocast's dtype, to which a matrix product would
    convert it.

    On a CPU a weight is rounded only after it has changed, however many passes a step has. On a
    GPU it is rounded in each pass, since a CUDA graph may have recorded the pass.
    """
    if execute_traced_op_as_identity:
        return x
    with torch._C.DisableTorchFunction():  # NNCF would take this for a part of the model
        weight = isinstance(x, nn.Parameter)
        # Embedding tables are weights without a range to hold: their rows are not multiplied.
        held = weight and hasattr(quantizer, "weight_range")
        dtype = _autocast_dtype(x.device.type) if held or not weight else torch.float32
        keeps = weight and x.device.type == "cpu" and not torch.is_inference_mode_enabled()
        known = _known.get(quantizer) if keeps else None
        if known is not None and known.state != _state(quantizer, x, dtype):
            known = None
        if held and known is None:
            hold(quantizer, x)
    earlier = None if known is None else known.rounded
    rounding = Rounding(quantizer.levels_in_use, quantizer.eps, dtype, earlier)
    if isinstance(quantizer, SymmetricQuantizer):
        rounded = symmetric_quantize(x, quantizer.scale, rounding)
    else:
        rounded = asymmetric_quantize(x, quantizer.input_low, quantizer.input_range, rounding)
    if keeps and known is None:
        with torch._C.DisableTorchFunction():
            _known[quantizer] = Known(rounded.detach(), _state(quantizer, x, dtype))
    return rounded


def _state(quantizer: BaseQuantizer, x: Tensor, dtype: torch.dtype) -> tuple[object, ...]:
    """The state on which the rounding of a weight depends. Each change of a tensor raises its
    version, except by a fused optimizer step."""
    versions = [(each.data_ptr(), each._version) for each in (x, *quantizer.parameters())]
    return (*versions, quantizer.levels_in_use, dtype)


def _autocast_dtype(device: str) -> torch.dtype:
    """The dtype of matrix products."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.float32


def _remembering(set_levels: Callable[[BaseQuantizer], None]) -> Callable[[BaseQuantizer], None]:
    """NNCF's `set_levels`, which is called when levels change; it now also stores them as Python
    numbers."""

    def set_and_remember(quantizer: BaseQuantizer) -> None:
        set_levels(quantizer)
        quantizer.levels_in_use = (quantizer.level_low, quantizer.level_high)

    return set_and_remember


REPLACED = {}  # NNCF's own functions, for comparisons
for _kind in (SymmetricQuantizer, AsymmetricQuantizer):
    REPLACED[_kind] = _kind.quantize
    _kind.set_levels = _remembering(_kind.set_levels)
    _kind.quantize = quantize
    _kind._forward_impl = quantize  # NNCF's reads buffers to see if it is enabled or traced by jit
