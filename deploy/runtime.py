"""An output folder's model.onnx, as it runs: in OpenVINO or ONNX Runtime, without torch.

Options are such that the numbers are PyTorch's on every CPU; a warning says where that costs speed.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cli import UserError, in_one_line, read_text, tell, warn
from deploy.cpu import this_cpu
from squad_utils import SpecialIds

RUNTIMES = ("auto", "openvino", "onnxruntime")
PRECISIONS = ("f32", "default")


@dataclass(frozen=True)
class Runtime:
    """What should run a file.

    Attributes:
        name: one of RUNTIMES; auto is OpenVINO where that is installed and computes exactly.
        precision: OpenVINO's; "default" is bf16 on CPUs that have it. ONNX Runtime has f32 alone.
    """

    name: str = "auto"
    precision: str = "f32"


# From int64 [1, L] inputs by name to the file's outputs, in their order.
Infer = Callable[[dict[str, np.ndarray]], tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class OnnxModel:
    """An exported model with what is needed to feed it.

    Attributes:
        path: of model.onnx.
        compile: gives the function that runs the file at a length.
        length: L that the file declares.
        arguments, metrics: what it was made with, and all that metrics.json tells.
        arithmetic: what it computes in; files that compute in the same give the same numbers.
    """

    path: str
    compile: Callable[[int], Infer]
    length: int
    tokenizer: Tokenizer
    special: SpecialIds
    arguments: dict[str, Any]
    metrics: dict[str, Any]
    arithmetic: str


def load_exported(
    folder: str, flag: str, kind: str, script: str, outputs: Sequence[str], runtime: Runtime
) -> OnnxModel:
    """Load model.onnx, tokenizer.json and metrics.json of an output folder.

    Args:
        flag: what the folder was given as.
        kind, script: what it should be, and what makes such folders.
        outputs: the names that the file's outputs should have.

    Raises:
        UserError: a file is missing or unreadable, or the model is of another kind.
    """
    installed = importlib.util.find_spec("openvino") is not None
    if runtime.name == "openvino" and not installed:
        raise UserError("--runtime=openvino: pip install openvino, or --runtime=onnxruntime")
    metrics_text = read_text(os.path.join(folder, "metrics.json"), flag)
    tokenizer_text = read_text(os.path.join(folder, "tokenizer.json"), flag)
    path = os.path.join(folder, "model.onnx")
    if not os.path.isfile(path):
        raise UserError(f"{flag}: {folder} has no model.onnx; {script} writes it at its end")
    with in_one_line(f"{flag}: {folder} does not load as {kind}"):
        metrics, tokenizer = json.loads(metrics_text), Tokenizer.from_str(tokenizer_text)
        arguments = metrics["arguments"]
        why, cure = _overflow(path)
        in_openvino = installed and (
            runtime.name == "openvino" or (runtime.name == "auto" and not why)
        )
        if in_openvino:
            opened = _openvino(path, runtime.precision, bool(why))
        else:
            opened = _onnxruntime(path, bool(why))
    if sorted(opened.outputs) != sorted(outputs):
        raise UserError(
            f"{flag}: {folder} is not {kind}: its outputs are {', '.join(opened.outputs)},"
            f" not {', '.join(outputs)}"
        )
    if why:
        now = "it runs in floating point, which is slower"
        if OVERFLOWS in opened.arithmetic:
            now = "its numbers may be wrong, which --runtime=onnxruntime avoids"
        warn(f"{flag} {folder}: {why}; {now}; {cure}")
    if in_openvino and runtime.precision == "f32" and this_cpu().has_bf16:
        tell(f"{flag} {folder} runs in f32; --runtime_precision=default is faster and less exact")
    cls, sep, pad = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
    if cls is None or sep is None or pad is None:
        raise UserError(f"{flag}: the tokenizer of {folder} lacks [CLS], [SEP] or [PAD]")
    return OnnxModel(
        path,
        opened.compile,
        opened.length,
        tokenizer,
        SpecialIds(cls, sep, pad),
        arguments,
        metrics,
        opened.arithmetic,
    )


def _overflow(path: str) -> tuple[str, str]:
    """`int8_file.overflow` of a file on this CPU."""
    if this_cpu().sums_exactly:
        return "", ""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"DequantizeLinear") < 0:  # parsing an FP32 file would take far longer
            return "", ""
    import onnx  # 0.2 s, which only INT8 files on such CPUs need

    from deploy import int8_file  # which reads onnx

    return int8_file.overflow(onnx.load(path), this_cpu())


OVERFLOWS = ", overflows"  # in `arithmetic`: integer sums that may be wrong


@dataclass(frozen=True)
class _Opened:
    """A file in a runtime: names of its outputs, declared length; the rest as in `OnnxModel`."""

    outputs: list[str]
    length: int
    compile: Callable[[int], Infer]
    arithmetic: str


def _openvino(path: str, precision: str, overflows: bool) -> _Opened:
    """Open a file in OpenVINO; in one that overflows, INT8 weights become FP32 ones."""
    import openvino  # need not be installed

    core = openvino.Core()
    arithmetic = "f32"
    if precision == "default":
        hint = core.get_property("CPU", "INFERENCE_PRECISION_HINT")
        arithmetic = hint.get_type_name()
    else:
        core.set_property("CPU", {"INFERENCE_PRECISION_HINT": openvino.Type.f32})
    source: str | bytes = path
    if overflows:
        import onnx  # 0.2 s, as above

        from deploy import int8_file  # which reads onnx

        loaded = onnx.load(path)
        source = int8_file.with_float_weights(loaded).SerializeToString()
        if int8_file.multiplies_activations(loaded):
            arithmetic += OVERFLOWS
    model = core.read_model(source)
    names = [each.any_name for each in model.outputs]

    def compile_at(length: int) -> Infer:
        model.reshape({each.any_name: [1, length] for each in model.inputs})
        compiled = core.compile_model(model, "CPU")

        def infer(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
            result = compiled(batch)
            return tuple(result[name] for name in names)

        return infer

    return _Opened(names, model.inputs[0].shape[1], compile_at, arithmetic)


def _onnxruntime(path: str, overflows: bool) -> _Opened:
    """Open a file in ONNX Runtime; one that overflows is computed in floating point."""
    import onnx  # 0.2 s, which OpenVINO does without
    import onnxruntime  # the same

    model = onnx.load(path)
    names = [each.name for each in model.graph.output]
    length = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim[1:]:
            if dim.dim_value == length:  # ONNX Runtime holds a file to the shape that it declares
                dim.dim_param = "length"
    options = onnxruntime.SessionOptions()
    if overflows:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return _Opened(names, length, lambda _: lambda batch: tuple(session.run(names, batch)), "f32")
