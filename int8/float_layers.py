"""Layers of a quantized model back in floating point: the error of each, and the way back.

A layer is an operation that computes in INT8: a linear layer, an embedding table, a product of two
activations. Its quantizers and SmoothQuant's scales are hooks, so a layer without them computes in
floating point, in PyTorch and in the exported file, and stays so when it is saved and loaded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.function_hook.wrapper import get_hook_storage
from nncf.torch.quantization.layers import SQMultiply
from torch import Tensor, nn

from int8.quantizers import Operation, operations, quantizers


def int8_layers(model: nn.Module) -> list[Operation]:
    """The layers that compute in INT8, in their order."""
    return [operation for operation in operations(model) if operation.int8]


def put_back(model: nn.Module, name: str, fp32: nn.Module) -> None:
    """Let a layer compute in floating point from now on, with the weights that it has in `fp32`.

    A quantizer that other INT8 layers read too stays for them. So do SmoothQuant's scales if the
    layer shares them, since NNCF names the operations of all layers behind them by one of these;
    they are powers of two, so the layer still gives the same bits.
    """
    layers = int8_layers(model)
    (layer,) = [each for each in layers if each.name == name]
    in_use = {q for each in layers if each is not layer for q in each.quantizers.values()}
    storage = get_hook_storage(model)
    hooks = list(storage.named_hooks(remove_duplicate=False))
    values = _parameters(fp32, name)
    for hook, module in hooks:
        before_it = hook.startswith("pre_hooks.") and decode_hook_name(hook)[1] == layer.node
        shared = isinstance(module, SQMultiply) and sum(each is module for _, each in hooks) > 1
        if before_it and shared:
            del values[f"{name}.weight"]  # it stays scaled
        elif before_it or hook in set(layer.quantizers.values()) - in_use:
            storage.delete_hook(hook)
    _copy(model, values)


def round_nothing(model: nn.Module, fp32: nn.Module) -> dict[str, Tensor]:
    """Switch all quantizers of a model off, and give its layers the biases of `fp32`.

    Returns:
        the biases that calibration has made, by their names.
    """
    corrected = {}
    for layer in int8_layers(model):
        for name, value in _parameters(fp32, layer.name).items():
            if name.endswith(".bias"):
                corrected[name] = model.get_parameter(name).detach().clone()
                _copy(model, {name: value})
    for _, quantizer in quantizers(model):
        quantizer.forward = _unchanged
    return corrected


def each_alone(
    model: nn.Module, layers: list[Operation], fp32: nn.Module, corrected: dict[str, Tensor]
) -> Iterator[str]:
    """Let one layer after the other round its inputs and weights, and no other layer.

    Layers that share the quantizer of their input all round it.

    Args:
        model: after `round_nothing`, which has returned `corrected`.

    Yields:
        the name of the layer, while it rounds.
    """
    storage = get_hook_storage(model)
    for layer in layers:
        its = [storage.get_submodule(name) for name in layer.quantizers.values()]
        biases = {n: corrected[n] for n in _parameters(fp32, layer.name) if n in corrected}
        for quantizer in its:
            vars(quantizer).pop("forward", None)
        _copy(model, biases)
        yield layer.name
        for quantizer in its:
            quantizer.forward = _unchanged
        _copy(model, {name: fp32.get_parameter(name) for name in biases})


def relative_error(outputs: Tensor, reference: Tensor, kept: Tensor | None) -> float:
    """Root mean square of the error, in percent of the reference's standard deviation.

    Args:
        outputs, reference: of one shape.
        kept: bool, of that shape: the values that count; None for all.
    """
    if kept is not None:
        outputs, reference = outputs[kept], reference[kept]
    error = (outputs.double() - reference.double()).square().mean()
    return float(100 * (error / reference.double().var(correction=0)).sqrt())


def _unchanged(values: Tensor) -> Tensor:
    return values


def _parameters(model: nn.Module, layer: str) -> dict[str, Tensor]:
    """Weight and bias of a layer, by their full names; none of a product."""
    names = (f"{layer}.weight", f"{layer}.bias")
    return {name: value for name, value in model.named_parameters() if name in names}


@torch.no_grad()
def _copy(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)
