"""The part of INT8's range that weights may use, so that integer sums overflow on no CPU.

Without VNNI, integer kernels add two products of u8 and s8 in 16 bits, with saturation. The two
are neighbours along the input: 2i and 2i + 1. 255 x 127 x 2 does not fit; 255 x 128 does. So an
output channel is safe for any activations if |w(2i)| + |w(2i+1)| <= 128 holds for its integers.

The scale of the weights' quantizer keeps weights in their range: `hold` raises the scale if it is
too small for the weights. It is called in calibration and before each use, so it also holds for
saved models.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch
from nncf import Dataset
from nncf.common.graph import NNCFGraph
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.common.utils.backend import BackendType
from nncf.quantization.algorithms.algorithm import Algorithm
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from nncf.torch.quantization.layers import SymmetricQuantizer
from torch import Tensor, nn


class WeightRange(enum.StrEnum):
    """The integers that the weights of linear layers may be, in size.

    PAIRS: two neighbours sum to at most 128. HALF: each is at most 64. FULL: each is at most 127,
    which can overflow on CPUs without VNNI.
    """

    PAIRS = "pairs"
    HALF = "half"
    FULL = "full"


LARGEST = 127  # the integer of a weight that equals its quantizer's scale
LARGEST_HALF = 64
# A pair that sums to 127 before rounding sums to at most 128 after it.
LARGEST_PAIR = 127


@torch.no_grad()
def least_scale(weight: Tensor, weight_range: WeightRange) -> Tensor:
    """The least scale of each output channel, [N, 1], that keeps the weights in their range.

    Args:
        weight: [N, K], the weight of a linear layer with K inputs.
    """
    sizes = weight.abs()
    if weight_range == WeightRange.FULL:
        return sizes.new_zeros(len(sizes), 1)
    if weight_range == WeightRange.HALF:
        return sizes.amax(dim=1, keepdim=True) * (LARGEST / LARGEST_HALF)
    if sizes.shape[1] % 2:  # the last input has no neighbour
        sizes = nn.functional.pad(sizes, (0, 1))
    sums = sizes.unflatten(1, (-1, 2)).sum(dim=2)
    return sums.amax(dim=1, keepdim=True) * (LARGEST / LARGEST_PAIR)


@torch.no_grad()
def hold(quantizer: SymmetricQuantizer, weight: Tensor) -> None:
    """Raise the scale of a weights' quantizer, in place, to the least that its range allows.

    A second call changes nothing. An earlier use may still wait for its backward pass:
    `fake_quantize` does not save the scale for it.
    """
    if quantizer.weight_range == WeightRange.FULL:
        return
    with torch._C.DisableTorchFunction():  # NNCF would take this for a part of the model
        scale = quantizer._scale_param_storage
        least = least_scale(weight.detach(), quantizer.weight_range)
        if scale.numel() == 1:  # one scale for all channels
            least = least.amax()
        scale.copy_(torch.maximum(scale.abs(), least.reshape(scale.shape).to(scale)))


def hold_in_use(quantizer: SymmetricQuantizer, weight: Tensor, weight_range: WeightRange) -> None:
    """Hold the range of a weights' quantizer now; `fake_quantize` does so before each use."""
    if not quantizer.signed:  # all weights are positive, so NNCF has chosen u8
        quantizer.signed = True
    quantizer.weight_range = weight_range
    hold(quantizer, weight)


def use_seven_bits(quantizer: SymmetricQuantizer) -> None:
    """Let a quantizer of activations round to -64 .. 63, of which any two keep the pair rule.

    Values beyond its range are cut off.
    """
    quantizer.signed = True
    quantizer._half_range = quantizer._qspec.half_range = True
    quantizer.set_levels()


class HoldWeightRange(Algorithm):
    """A step of NNCF's calibration between fitting ranges and correcting biases.

    The correction compensates for the rounding of weights, so the final rounding must come first.
    """

    def __init__(self, hold_all: Callable[[nn.Module], None]) -> None:
        """`hold_all` is called with the model after it has got its quantizers."""
        self.hold_all = hold_all

    @property
    def available_backends(self) -> list[BackendType]:
        return [BackendType.TORCH]

    def get_statistic_points(
        self, model: GraphModelWrapper, graph: NNCFGraph
    ) -> StatisticPointsContainer:
        return StatisticPointsContainer()

    def apply(
        self,
        model: GraphModelWrapper,
        graph: NNCFGraph,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: Dataset | None = None,
    ) -> GraphModelWrapper:
        """Hold the range in `model`, NNCF's wrapper around the model and a sample."""
        self.hold_all(model.model)
        return model
