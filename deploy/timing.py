"""How long files take on this machine: timed in turns, in each runtime. No torch."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import numpy as np

from cli import tell
from deploy.cpu import this_cpu
from squad_utils import INPUTS

# Name of a way to run a file -> runtime, OpenVINO's INFERENCE_PRECISION_HINT (None: its default).
WAYS = {
    "OpenVINO f32": ("openvino", "f32"),
    "OpenVINO default": ("openvino", None),
    "ONNX Runtime": ("onnxruntime", None),
}
# What has ask.py run a file so.
FLAGS = {
    "OpenVINO f32": "--runtime=openvino",
    "OpenVINO default": "--runtime=openvino --runtime_precision=default",
    "ONNX Runtime": "--runtime=onnxruntime",
}
SECONDS = 60.0  # that timing may take at the end of a stage, with loading
ROUNDS = 5
TURN, CALLS = 0.2, 5  # seconds and calls of a turn, whichever is less
REST = 0.1  # seconds before a turn: threads of the runtime that ran before may wait busily

Run = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)


def compiled(path: str, way: str, length: int) -> Run:
    """A function that runs a file once, at 1 x `length` tokens without padding.

    Args:
        path: an exported model.onnx, of whatever declared length.
        way: a key of WAYS.
    """
    row = np.arange(length, dtype=np.int64)[None]
    # Ids that every vocabulary has; the time does not depend on them.
    values = (row % 50, np.ones_like(row), (row > length // 4).astype(np.int64), row)
    feed = dict(zip(INPUTS, values, strict=True))
    runtime, precision = WAYS[way]
    if runtime == "openvino":
        import openvino  # need not be installed

        core = openvino.Core()
        model = core.read_model(path)
        model.reshape({each.any_name: [1, length] for each in model.inputs})
        config = {"PERFORMANCE_HINT": "LATENCY"}
        if precision:
            config["INFERENCE_PRECISION_HINT"] = precision
        request = core.compile_model(model, "CPU", config).create_infer_request()
        return lambda: request.infer(feed)
    import onnxruntime  # half a second, which a table of options does without

    options = onnxruntime.SessionOptions()
    # Else its threads take time from the runtime that has the next turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    declared = session.get_inputs()[0].shape[1]
    if declared != length:
        import onnx  # as onnxruntime

        loaded = onnx.load(path)
        for value in (*loaded.graph.input, *loaded.graph.output):
            for dim in value.type.tensor_type.shape.dim[1:]:
                if dim.dim_value == declared:
                    dim.dim_param = "length"
        session = onnxruntime.InferenceSession(
            loaded.SerializeToString(), options, providers=providers
        )
    return lambda: session.run(None, feed)


def milliseconds(
    runs: Mapping[Key, Run],
    rounds: int = ROUNDS,
    seconds: float = float("inf"),
    turn: float = TURN,
    calls: int = CALLS,
) -> dict[Key, float]:
    """Median milliseconds of a call of each. They take turns, so that all see the same machine.

    Args:
        seconds: after which no round begins that may not end in time; the first always ends.
        turn, calls: of a run in a round; at least one call.
    """
    end, longest = time.monotonic() + seconds, 0.0
    times: dict[Key, list[float]] = {key: [] for key in runs}
    for i in range(rounds):
        began = time.monotonic()
        if i and began + longest > end:
            break
        for key, run in runs.items():
            last = times[key][-1] if times[key] else 0.0
            time.sleep(min(REST, 5 * last))
            warm = _seconds(run, 1)  # of a run whose memory the others have driven out of caches
            count = max(1, int(min(calls, turn / max(warm, 1e-9))))
            times[key].append(_seconds(run, count))
        longest = max(longest, time.monotonic() - began)
    return {key: 1000 * statistics.median(each) for key, each in times.items()}


def _seconds(run: Run, count: int) -> float:
    """Seconds of a call, over `count` of them."""
    began = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - began) / count


def is_int8(path: str) -> bool:
    """Whether a file has quantizers; nothing is parsed."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"DequantizeLinear") >= 0


@dataclass(frozen=True)
class Deployed:
    """What metrics.json tells of the speed of a folder's file (`deployed`).

    Attributes:
        cpu, cores: of this machine, with the CPU's instructions.
        tokens: of the window that was timed.
        milliseconds: by way; a runtime that does not run the file is left out.
        fp32: the same of the FP32 file that an INT8 one was made from; empty where there is none.
        fp32_folder: of that file, or None.
        fastest: a line that names the fastest way.
    """

    cpu: str
    cores: int
    tokens: int
    milliseconds: dict[str, float]
    fp32: dict[str, float] = field(default_factory=dict)
    fp32_folder: str | None = None
    fastest: str = ""


def deliver(folder: str, student: str, length: int) -> dict[str, object] | None:
    """Time model.onnx of an output folder, tell the fastest way, and add both to its README.md.

    An INT8 file is timed beside the FP32 one of the model it was made from.

    Args:
        student: the value of --model_student.
        length: of the window, in tokens.

    Returns:
        `Deployed` for metrics.json; None without a model.onnx, as after a failed check.
    """
    path = os.path.join(folder, "model.onnx")
    if not os.path.isfile(path):
        return None
    end = time.monotonic() + SECONDS
    files, int8, other = {"file": path}, is_int8(path), os.path.join(student, "model.onnx")
    if int8 and os.path.isfile(other) and not is_int8(other):
        files["fp32"] = other
    runs: dict[tuple[str, str], Run] = {}
    for name, file in files.items():
        for way in WAYS:
            try:
                run = compiled(file, way, length)
                run()
            except Exception:  # whatever a runtime here raises: the check has told of it
                continue
            runs[name, way] = run
    found = milliseconds(runs, seconds=end - time.monotonic())
    table = {
        name: {way: round(found[name, way], 3) for way in WAYS if (name, way) in found}
        for name in ("file", "fp32")
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    deployed = Deployed(
        str(this_cpu()),
        cores or 1,
        length,
        table["file"],
        table["fp32"],
        student if table["fp32"] else None,
        fastest(table["file"], table["fp32"], int8, length),
    )
    tell(deployed.fastest)
    with open(os.path.join(folder, "README.md"), "a", encoding="utf-8") as card:
        card.write(card_section(deployed))
    return asdict(deployed)


def fastest(own: Mapping[str, float], fp32: Mapping[str, float], int8: bool, length: int) -> str:
    """The line that names the fastest way to run a file, and says where INT8 does not pay.

    Args:
        own, fp32: milliseconds by way, of the file and of the FP32 one that it was made from.
    """
    if not own:
        return "no runtime of this machine runs the file"
    best = min(own, key=lambda way: own[way])
    line = (
        f"fastest here ({this_cpu()}): {best} ({FLAGS[best]}),"
        f" {own[best]:.1f} ms for {length} tokens"
    )
    if not int8:
        return line
    if not fp32:
        return f"{line}; --model_student has no FP32 model.onnx to compare with"
    slower = [
        f"{way} ({own[way]:.1f} against {fp32[way]:.1f} ms)"
        for way in own
        if way in fp32 and own[way] > fp32[way]
    ]
    if slower:
        line += f"; INT8 is slower than FP32 in {', '.join(slower)}"
    other = min(fp32, key=lambda way: fp32[way])
    if fp32[other] < own[best]:
        return f"{line}; the FP32 file is faster, {fp32[other]:.1f} ms in {other}"
    return f"{line}; FP32 at best {fp32[other]:.1f} ms in {other}"


def card_section(deployed: Deployed) -> str:
    """A section of the model card, in Markdown."""
    rows = {"this file": deployed.milliseconds}
    if deployed.fp32:
        rows[f"FP32, `{deployed.fp32_folder}`"] = deployed.fp32
    lines = [
        "\n## Speed",
        f"Milliseconds for {deployed.tokens} tokens on {deployed.cores} cores of {deployed.cpu},"
        " medians of runs that took turns:\n",
        "| | " + " | ".join(WAYS) + " |",
        "|---" * (1 + len(WAYS)) + "|",
    ]
    for name, row in rows.items():
        cells = [f"{row[way]:.1f}" if way in row else "does not run" for way in WAYS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{deployed.fastest[0].upper()}{deployed.fastest[1:]}.", ""])
