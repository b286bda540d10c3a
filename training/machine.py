"""What a model becomes for the machine it trains on: half-precision teachers, compiled layers."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch import nn

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def in_half(teacher: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A copy of a teacher whose linear layers hold their weights in the run's half precision.

    Under autocast it gives what the teacher gives, to the bit, without casting its weights anew in
    each pass. The teacher itself where the run's precision is FP32.
    """
    dtype = HALF.get(accelerator.mixed_precision)
    if dtype is None:
        return teacher
    teacher = copy.deepcopy(teacher)
    for module in teacher.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return teacher


Compiled = list[tuple[nn.Module, Callable]]  # layers, and their compiled forward


def compiled_layers(model: nn.Module) -> Compiled:
    """The layers of an encoder, compiled: what lies between products is computed at one go.

    All layers share what is compiled, for any number and length of texts. Empty where nothing can
    be compiled: without Triton, and for layers that quantizers or gates reach into.
    """
    encoder = model.base_model
    layers = encoder.encoder.layer if hasattr(encoder, "encoder") else encoder.layers
    reached_into = hasattr(model, "__nncf_hooks") or any(
        module._forward_pre_hooks or module._forward_hooks
        for layer in layers
        for module in layer.modules()
    )
    if not importlib.util.find_spec("triton") or reached_into:
        return []
    torch._dynamo.config.suppress_errors = True  # what does not compile runs as it is
    compile_ = functools.partial(torch.compile, dynamic=True)
    return [(layer, compile_(layer.forward)) for layer in layers]


@contextlib.contextmanager
def running(compiled: Compiled | tuple[()] = ()) -> Iterator[None]:
    """Let layers run by their compiled forward, and backward passes add in a fixed order.

    A run that goes on from a saved state ends as one that was never stopped, to the bit.
    """
    for layer, forward in compiled:
        layer.forward = forward
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(True, warn_only=False)  # flash attention asks for this
    try:
        yield
    finally:
        for layer, _ in compiled:
            del layer.forward
        if torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(True, warn_only=warn_only)


def linear_weights(model: nn.Module) -> int:
    """Weights of all linear layers."""
    layers = (module for module in model.modules() if isinstance(module, nn.Linear))
    return sum(layer.weight.numel() for layer in layers)
