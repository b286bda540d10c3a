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


def compiled_layers(model: nn.Module) -> list[tuple[nn.Module, Callable]]:
    """The encoder's layers and their compiled forward, which fuses what lies between products.

    All layers share what is compiled, for any number and length of texts. Empty where nothing can
    be compiled: without a GPU or Triton, and for layers that quantizers or gates reach into.
    """
    encoder = model.base_model
    layers = encoder.encoder.layer if hasattr(encoder, "encoder") else encoder.layers
    reached_into = hasattr(model, "__nncf_hooks") or any(
        module._forward_pre_hooks or module._forward_hooks
        for layer in layers
        for module in layer.modules()
    )
    if not torch.cuda.is_available() or not importlib.util.find_spec("triton") or reached_into:
        return []
    torch._dynamo.config.suppress_errors = True  # what does not compile runs as it is
    compile_ = functools.partial(torch.compile, dynamic=True)
    return [(layer, compile_(layer.forward)) for layer in layers]


@contextlib.contextmanager
def running(compiled: list[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Let layers run by their compiled forward."""
    for layer, forward in compiled:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, _ in compiled:
            del layer.forward
