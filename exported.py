"""An output folder's exported model, as it runs: in OpenVINO or ONNX Runtime, without torch."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cli_utils import UserError, read_text
from squad_utils import SpecialIds

RUNTIMES = ("auto", "openvino", "onnxruntime")

# From int64 [1, L] inputs by name to the file's outputs, in their order.
Infer = Callable[[dict[str, np.ndarray]], tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Exported:
    """An exported model with what is needed to feed it.

    Attributes:
        path: of model.onnx.
        compile: gives the function that runs the file at a length.
        length: L that the file declares.
        arguments, metrics: what it was made with, and all that metrics.json tells.
    """

    path: str
    compile: Callable[[int], Infer]
    length: int
    tokenizer: Tokenizer
    special: SpecialIds
    arguments: dict[str, Any]
    metrics: dict[str, Any]


def load_exported(
    folder: str, flag: str, kind: str, script: str, outputs: Sequence[str], runtime: str
) -> Exported:
    """Load model.onnx, tokenizer.json and metrics.json of an output folder.

    Args:
        flag: what the folder was given as.
        kind, script: what it should be, and what makes such folders.
        outputs: the names that the file's outputs should have.
        runtime: one of RUNTIMES; auto is OpenVINO where that is installed.

    Raises:
        UserError: a file is missing or unreadable, or the model is of another kind.
    """
    installed = importlib.util.find_spec("openvino") is not None
    if runtime == "openvino" and not installed:
        raise UserError("--runtime=openvino: pip install openvino, or --runtime=onnxruntime")
    metrics_text = read_text(os.path.join(folder, "metrics.json"), flag)
    tokenizer_text = read_text(os.path.join(folder, "tokenizer.json"), flag)
    path = os.path.join(folder, "model.onnx")
    if not os.path.isfile(path):
        raise UserError(f"{flag}: {folder} has no model.onnx; {script} writes it at its end")
    try:
        metrics, tokenizer = json.loads(metrics_text), Tokenizer.from_str(tokenizer_text)
        arguments = metrics["arguments"]
        opened = _openvino if installed and runtime != "onnxruntime" else _onnxruntime
        found, length, compile_at = opened(path)
    except Exception as error:  # tokenizers' and ONNX Runtime's own errors are plain Exceptions
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{flag}: {folder} does not load as {kind}: {reason}") from None
    if sorted(found) != sorted(outputs):
        raise UserError(
            f"{flag}: {folder} is not {kind}: its outputs are {', '.join(found)},"
            f" not {', '.join(outputs)}"
        )
    ids = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
    return Exported(path, compile_at, length, tokenizer, SpecialIds(*ids), arguments, metrics)


def _openvino(path: str) -> tuple[list[str], int, Callable[[int], Infer]]:
    """Names of the outputs, the declared length, and what compiles the file at a length."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    names = [each.any_name for each in model.outputs]

    def compile_at(length: int) -> Infer:
        model.reshape({each.any_name: [1, length] for each in model.inputs})
        compiled = core.compile_model(model, "CPU")

        def infer(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
            result = compiled(batch)
            return tuple(result[name] for name in names)

        return infer

    return names, model.inputs[0].shape[1], compile_at


def _onnxruntime(path: str) -> tuple[list[str], int, Callable[[int], Infer]]:
    """The same."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    names = [each.name for each in model.graph.output]
    length = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim[1:]:
            if dim.dim_value == length:  # ONNX Runtime holds a file to the shape that it declares
                dim.dim_param = "length"
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return names, length, lambda _: lambda batch: tuple(session.run(names, batch))
