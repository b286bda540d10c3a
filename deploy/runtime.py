"""Run an output folder's model.onnx in OpenVINO or ONNX Runtime, without torch.

The default options give PyTorch's numbers on every CPU; a warning says if that costs speed.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

import squad_utils
from cli import UserError, read_text, tell, warn
from deploy.cpu import this_cpu
from deploy.settings import REMEDY, Kind, Settings, read_settings
from squad_utils import Tokens

if TYPE_CHECKING:
    from onnxruntime import InferenceSession  # at run time, its import takes half a second

MODEL_FILE = "model.onnx"
RUNTIMES = ("auto", "openvino", "onnxruntime")
PRECISIONS = ("f32", "default")


@dataclass(frozen=True)
class Runtime:
    """The runtime that should run a file.

    Attributes:
        name: one of RUNTIMES; auto is OpenVINO if it is installed and computes the file exactly.
        precision: OpenVINO's; "default" is bf16 on CPUs that have it. ONNX Runtime has f32 alone.
    """

    name: str = "auto"
    precision: str = "f32"


# A function from int64 [1, L] inputs by name to the file's outputs, in their order.
Infer = Callable[[dict[str, np.ndarray]], tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class OnnxModel:
    """An exported model with its tokenizer and settings.

    Attributes:
        path: the path of model.onnx.
        compile: makes the function that runs the file at a length.
        arithmetic: the arithmetic of the runtime; the same arithmetic gives the same numbers.
    """

    path: str
    compile: Callable[[int], Infer]
    tokenizer: Tokenizer
    settings: Settings
    arithmetic: str


def load_exported(folder: str, flag: str, kind: Kind, runtime: Runtime) -> OnnxModel:
    """Load model.onnx, tokenizer.json and the settings of an output folder.

    Args:
        folder: the folder, or its model.onnx; ~ is the user's folder.
        flag: the flag that gave the folder, for messages.
        kind: the kind that the model should be.

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
    except Exception as error:  # the library raises no other kind
        raise UserError(f"{flag}: {tokenizer_path} is damaged ({error}); {REMEDY}") from None
    for each in (path, for_onnxruntime(path)):
        if not _is_whole(each):  # a runtime's own message is cryptic, or fills the screen
            raise UserError(f"{flag}: {each} is cut or damaged; {REMEDY}")
    try:
        why, cure = _overflow(path)
        by_openvino = installed and (
            runtime.name == "openvino" or (runtime.name == "auto" and not why)
        )
        if by_openvino:
            opened = in_openvino(path, runtime.precision, bool(why))
        else:
            opened = in_onnxruntime(path if why else for_onnxruntime(path), bool(why))
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
    if by_openvino and runtime.precision == "f32" and this_cpu().has_bf16:
        tell(f"{flag} {folder} runs in f32; --runtime_precision=default is faster and less exact")
    return OnnxModel(path, opened.compile, tokenizer, settings, opened.arithmetic)


def _is_whole(path: str) -> bool:
    """Whether a file is a complete ONNX model, judged by the lengths of its parts alone.

    The file is a list of fields. Each begins with a tag, which holds the field's number and kind;
    its value or its length follows: https://protobuf.dev/programming-guides/encoding.
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
                if field == 0 or kind not in (0, 2):  # ModelProto has no other kinds
                    return False
                length = number()
                fields.add(field)
                file.seek(length if kind == 2 else 0, os.SEEK_CUR)
        except (ValueError, OSError):  # the file ends within a number, or a length is nonsense
            return False
        return fields >= {7, 8} and file.tell() == size  # graph and opset_import


def ort_path(path: str) -> str:
    """The path of a file's form for ONNX Runtime alone: model.ort.onnx; see `ort_file`."""
    base, extension = os.path.splitext(path)
    return f"{base}.ort{extension}"


def for_onnxruntime(path: str) -> str:
    """The file that ONNX Runtime runs fastest: model.ort.onnx where it is, else the file itself."""
    beside = ort_path(path)
    return beside if os.path.isfile(beside) else path


def is_int8(path: str) -> bool:
    """Whether a file has quantizers. It is not parsed, which would take far longer."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"DequantizeLinear") >= 0


def _overflow(path: str) -> tuple[str, str]:
    """`int8_file.overflow` of a file on this CPU."""
    if this_cpu().sums_exactly or not is_int8(path):
        return "", ""
    import onnx  # 0.2 s, which only INT8 files on such CPUs need

    from deploy import int8_file  # which reads onnx

    return int8_file.overflow(onnx.load(path), this_cpu())


OVERFLOWS = ", overflows"  # in `arithmetic`: integer sums may be wrong


@dataclass(frozen=True)
class Opened:
    """A file in a runtime.

    Attributes:
        outputs: the names of its outputs.
        length: the number of tokens per row that the file declares.
        compile, arithmetic: as in `OnnxModel`.
    """

    outputs: list[str]
    length: int
    compile: Callable[[int], Infer]
    arithmetic: str


def in_openvino(path: str, precision: str, overflows: bool) -> Opened:
    """Open a file in OpenVINO. If the file overflows, its INT8 weights become FP32 weights."""
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

    # Threads take turns: the model has one shape at a time, and a compiled model one request. A
    # request uses all cores anyway.
    turn = threading.Lock()

    def compile_at(length: int) -> Infer:
        with turn:
            model.reshape({each.any_name: [1, length] for each in model.inputs})
            compiled = core.compile_model(model, "CPU")

        def infer(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
            with turn:
                result = compiled(batch)
                return tuple(result[name] for name in names)

        return infer

    return Opened(names, model.inputs[0].shape[1], compile_at, arithmetic)


def in_onnxruntime(path: str, overflows: bool) -> Opened:
    """Open a file in ONNX Runtime. If the file overflows, it is computed in floating point."""
    model, length = with_any_length(path)
    session = onnxruntime_session(model, *([WITHOUT_INTEGERS] if overflows else []))
    names = [each.name for each in session.get_outputs()]
    # Its sums differ in their last digits, so now and then one rounds to another integer.
    arithmetic = "f32, ort" if path.endswith(ort_path(MODEL_FILE)) else "f32"
    return Opened(
        names, length, lambda _: lambda batch: tuple(session.run(names, batch)), arithmetic
    )


def with_any_length(path: str) -> tuple[bytes, int]:
    """A file that takes rows of any length, and the length that the file at `path` declares.

    ONNX Runtime refuses inputs of other shapes than the declared ones.
    """
    import onnx  # 0.2 s, which OpenVINO does not need

    model = onnx.load(path)
    length = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim[1:]:
            if dim.dim_value == length:
                dim.dim_param = "length"
    return model.SerializeToString(), length


WITHOUT_INTEGERS = "disable_quant_qdq"  # computes in floating point between quantizers


def onnxruntime_session(model: str | bytes, *settings: str) -> InferenceSession:
    """A session of ONNX Runtime on the CPU.

    Args:
        model: a path, or the content of a file.
        settings: settings of the session to switch on, by their names after "session.".
    """
    import onnxruntime  # half a second, which OpenVINO does not need

    options = onnxruntime.SessionOptions()
    for name in settings:
        options.add_session_config_entry(f"session.{name}", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def question_tokens(tokenizer: Tokenizer, question: str, limit: int, model: str) -> Tokens:
    """The first `limit` tokens of a question; a warning tells of more.

    Args:
        model: the name of the model in the warning.
    """
    tokens = squad_utils.tokenize(tokenizer, [question], False, "")
    if tokens.lengths[0] > limit:
        warn(f"the question has {tokens.lengths[0]} tokens; {model} sees the first {limit}")
    return squad_utils.truncate(tokens, limit)
