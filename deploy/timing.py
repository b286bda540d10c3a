"""The speed of files on this machine, timed in turns in each runtime. No torch."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import numpy as np

from cli import tell
from deploy import runtime
from deploy.cpu import this_cpu
from deploy.runtime import is_int8
from squad_utils import INPUTS

WAYS = {  # to run a file -> the flags of ask.py
    "OpenVINO f32": "--runtime=openvino",
    "OpenVINO default": "--runtime=openvino --runtime_precision=default",
    "ONNX Runtime": "--runtime=onnxruntime",
}
SECONDS = 60.0  # for the timing at the end of a stage, with loading
ROUNDS = 3
TURN, CALLS = 0.2, 5  # a turn ends after so many seconds or calls, whichever come first

Run = Callable[[], object]
Load = Callable[[], Run]
Key = TypeVar("Key", bound=Hashable)


def compiled(path: str, way: str, length: int) -> Run:
    """A function that runs a file once, at 1 x `length` tokens without padding.

    Args:
        path: an exported model.onnx, of any declared length; ONNX Runtime runs the file made for
            it, where there is one.
        way: a key of WAYS.
    """
    row = np.arange(length, dtype=np.int64)[None]
    # Every vocabulary has these ids, and the time does not depend on them.
    values = (row % 50, np.ones_like(row), (row > length // 4).astype(np.int64), row)
    feed = dict(zip(INPUTS, values, strict=True))
    if way != "ONNX Runtime":
        precision = way.removeprefix("OpenVINO ")
        run = runtime.in_openvino(path, precision, overflows=False).compile(length)
        return lambda: run(feed)
    path = runtime.for_onnxruntime(path)
    content, declared = runtime.with_any_length(path)
    session = runtime.onnxruntime_session(path if declared == length else content)
    return lambda: session.run(None, feed)


def time_files(
    paths: Mapping[str, str],
    length: int,
    rounds: int = ROUNDS,
    seconds: float = float("inf"),
    failed: Callable[[str, str, Exception], None] = lambda *_: None,
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each file at 1 x `length`, by way.

    Args:
        paths: the files by name.
        seconds: as in `milliseconds`.
        failed: called with name, way and error if a way cannot run a file; the result lacks it.
    """
    loads = {
        (name, way): functools.partial(compiled, path, way, length)
        for name, path in paths.items()
        for way in WAYS
    }
    found = milliseconds(loads, rounds, seconds, lambda key, error: failed(*key, error))
    return {name: {way: found[name, way] for way in WAYS if (name, way) in found} for name in paths}


def milliseconds(
    loads: Mapping[Key, Load],
    rounds: int = ROUNDS,
    seconds: float = float("inf"),
    failed: Callable[[Key, Exception], None] = lambda *_: None,
) -> dict[Key, float]:
    """Median milliseconds per call of each file.

    The files take turns, so that all see the same load of the machine. A turn loads its file and
    lets it go again: where several stay loaded, each takes longer, by up to 60%.

    Args:
        loads: each loads a file and returns a function that runs it once.
        seconds: no round begins that may end later than this, except the first.
        failed: called with key and error if loading or the first call fails; the result lacks it.
    """
    end, longest = time.monotonic() + seconds, 0.0
    times: dict[Key, list[float]] = {key: [] for key in loads}
    for i in range(rounds):
        began = time.monotonic()
        if i and began + longest > end:
            break
        for key in list(times):
            try:
                run = loads[key]()
                warm = _seconds(run, 1)
            except Exception as error:  # runtimes raise all kinds; or one is not installed
                failed(key, error)
                del times[key]
                continue
            count = max(1, int(min(CALLS, TURN / max(warm, 1e-9))))
            times[key].append(_seconds(run, count))
            del run
        longest = max(longest, time.monotonic() - began)
    return {key: 1000 * statistics.median(each) for key, each in times.items()}


def _seconds(run: Run, count: int) -> float:
    """Seconds per call, the mean of `count` calls."""
    began = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - began) / count


@dataclass(frozen=True)
class Deployed:
    """The speed of a folder's file, as metrics.json has it under `deployed`.

    Attributes:
        cpu, cores: the CPU of this machine with its instructions, and the number of its cores.
        tokens: the length of the window that was timed.
        milliseconds: by way; ways that do not run the file are left out.
        fp32: the same for the FP32 file that an INT8 file was made from; empty without such a file.
        fp32_folder: the folder of the FP32 file, or None.
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
    """Time an output folder's model.onnx, print the fastest way, and add both to its README.md.

    An INT8 file is timed beside the FP32 file of the model that it was made from.

    Args:
        student: the value of --model_student.
        length: the length of the window, in tokens.

    Returns:
        `Deployed` for metrics.json; None without a model.onnx, as after a failed check.
    """
    path = os.path.join(folder, "model.onnx")
    if not os.path.isfile(path):
        return None
    files, int8, other = {"file": path}, is_int8(path), os.path.join(student, "model.onnx")
    if int8 and os.path.isfile(other) and not is_int8(other):
        files["fp32"] = other
    found = time_files(files, length, seconds=SECONDS)  # the check has reported ways that fail
    rounded = {n: {way: round(ms, 3) for way, ms in each.items()} for n, each in found.items()}
    own, fp32 = rounded["file"], rounded.get("fp32", {})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    deployed = Deployed(
        str(this_cpu()),
        cores or 1,
        length,
        own,
        fp32,
        student if fp32 else None,
        fastest(own, fp32, int8, length),
    )
    tell(deployed.fastest)
    with open(os.path.join(folder, "README.md"), "a", encoding="utf-8") as card:
        card.write(card_section(deployed))
    return asdict(deployed)


def fastest(own: Mapping[str, float], fp32: Mapping[str, float], int8: bool, length: int) -> str:
    """A line that names the fastest way to run a file, and the ways in which INT8 does not pay.

    Args:
        own, fp32: milliseconds by way of the file, and of the FP32 file that it was made from.
    """
    if not own:
        return "no runtime on this machine runs the file"
    best = min(own, key=lambda way: own[way])
    line = (
        f"fastest here ({this_cpu()}): {best} ({WAYS[best]}),"
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
