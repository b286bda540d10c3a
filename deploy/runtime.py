"""An output folder's model.onnx, as it runs: in OpenVINO or ONNX Runtime, without torch.

Options are such that the numbers are PyTorch's on every CPU; a warning says where that costs speed.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from cli import UserError, read_text, tell, warn
from deploy.cpu import this_cpu
from deploy.settings import REMEDY, Kind, Settings, read_settings

MODEL_FILE = "model.onnx"
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
        arithmetic: what it computes in; files that compute in the same give the same numbers.
    """

    path: str
    compile: Callable[[int], Infer]
    tokenizer: Tokenizer
    settings: Settings
    arithmetic: str


def load_exported(folder: str, flag: str, kind: Kind, runtime: Runtime) -> OnnxModel:
    """Load model.onnx, tokenizer.json and the settings of an output folder.

    Args:
        folder: it, or its model.onnx; ~ is the user's folder.
        flag: what the folder was given as.
        kind: what it should be.

    Raises:
        UserError: a file is missing or unreadable, or the model is of another kind.
    """
    installed = importlib.util.find_spec("openvino") is not None
    if runtime.name == "openvino" and not installed:
        raise UserError("--runtime=openvino: pip install openvino, or --runtime=onnxruntime")
    folder = os.path.expanduser(folder)
    if os.path.basename(folder) == MODEL_FILE and os.path.isfile(folder):
        folder = os.path.dirname(folder) or "."
    if not os.path.isdir(folder):
        raise UserError(f"{flag}: no such folder: {folder}")
    path = os.path.join(folder, MODEL_FILE)
    if not os.path.isfile(path):
        raise UserError(f"{flag}: {folder} has no {MODEL_FILE}; {kind.script} writes it at its end")
    tokenizer_path = os.path.join(folder, "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_str(read_text(tokenizer_path, flag))
    except UserError:
        raise
    except Exception as error:  # the library has no other kind
        raise UserError(f"{flag}: {tokenizer_path} is damaged ({error}); {REMEDY}") from None
    if not _is_whole(path):  # of which a runtime tells little, or a screenful
        raise UserError(f"{flag}: {path} is cut or damaged; {REMEDY}")
    try:
        why, cure = _overflow(path)
        in_openvino = installed and (
            runtime.name == "openvino" or (runtime.name == "auto" and not why)
        )
        if in_openvino:
            opened = _openvino(path, runtime.precision, bool(why))
        else:
            opened = _onnxruntime(path, bool(why))
    except Exception as error:  # a runtime's own errors are plain Exceptions
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = next(
            (each for each in lines if not each.startswith("Exception from")), repr(error)
        )
        raise UserError(f"{flag}: {path} does not load: {reason}; if damaged, {REMEDY}") from None
    if sorted(opened.outputs) != sorted(kind.outputs):
        raise UserError(
            f"{flag}: {folder} is not {kind.name}: its outputs are {', '.join(opened.outputs)},"
            f" not {', '.join(kind.outputs)}"
        )
    settings = read_settings(folder, flag, kind, tokenizer, opened.length)
    if why:
        now = "it runs in floating point, which is slower"
        if OVERFLOWS in opened.arithmetic:
            now = "its numbers may be wrong, which --runtime=onnxruntime avoids"
        warn(f"{flag} {folder}: {why}; {now}; {cure}")
    if in_openvino and runtime.precision == "f32" and this_cpu().has_bf16:
        tell(f"{flag} {folder} runs in f32; --runtime_precision=default is faster and less exact")
    return OnnxModel(path, opened.compile, tokenizer, settings, opened.arithmetic)


def _is_whole(path: str) -> bool:
    """Whether a file is an ONNX model up to its end, by the lengths of its parts alone.

    It is a list of fields, each a tag with its number and kind, and then its value or its length:
    https://protobuf.dev/programming-guides/encoding.
    """
    size, fields = os.path.getsize(path), set()
    with open(path, "rb") as file:

        def number() -> int:
            value, shift, more = 0, 0, True
            while more:
                (byte,) = file.read(1)
                value |= (byte & 127) << shift
                shift, more = shift + 7, byte > 127
            return value

        try:
            while file.tell() < size:
                field, kind = divmod(number(), 8)
                if field == 0 or kind not in (0, 2):  # ModelProto has no others
                    return False
                length = number()
                fields.add(field)
                file.seek(length if kind == 2 else 0, os.SEEK_CUR)
        except (ValueError, OSError):  # it ends within a number, or a length is nonsense
            return False
        return fields >= {7, 8} and file.tell() == size  # graph and opset_import


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
