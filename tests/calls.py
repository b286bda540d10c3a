"""Ways to call a script in tests: in this process, or as one that is watched while it runs."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch

from cli import run_main
from training import results

Process = subprocess.Popen[str] | fork_server.Forked


def call(command: list[str]) -> int:
    """Run `python <script>.py ...` in this process, which saves the imports; its exit code."""
    script = importlib.import_module(Path(command[1]).stem)
    earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command[1:])
        torch.set_num_threads(1)  # as many as `conftest.run` gives
        try:
            with pytest.raises(SystemExit) as stop:
                run_main(script.main)
        finally:
            torch.set_num_threads(threads)
            torch.set_flush_denormal(False)
            for number, handler in earlier.items():
                signal.signal(number, handler)
    return stop.value.code


@contextlib.contextmanager
def started(
    command: list[str], before: Callable[[], None] | None = None, fresh: bool = False
) -> Iterator[Process]:
    """A process that runs meanwhile; killed, with those it started, if the test fails.

    As with `conftest.run` a script is forked, unless it is to be `fresh` or has something to do
    `before` it starts.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if fork_server.is_script(command) and not (before or fresh):
        with contextlib.closing(fork_server.server().start(command, environment)) as forked:
            yield forked
        return
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=before,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, process.stderr):
            stream.close()


def run_in_two(command: list[str]) -> None:
    """Run a script in two processes, with the variables that torchrun gives them; both must end
    well. Torchrun itself is slow to start; what it does besides is in test_processes.py.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in ("0", "1"):
            environment = {
                **os.environ,
                **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            }
            process = fork_server.server().start(command, environment)
            processes.append(stack.enter_context(contextlib.closing(process)))
        for process in processes:
            _, stderr = process.communicate(timeout=240)
            assert process.wait() == 0, stderr


def wait_for(process: Process, condition: Callable[[], bool], timeout: float = 120) -> None:
    """Wait until the condition holds, which it must while the process still runs."""
    end = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"it ended too early: {process.communicate()}")
        if time.monotonic() > end:
            pytest.fail("what the test waits for does not come")
        time.sleep(0.002)


def records(output_dir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds so far: a running process may be writing the last line."""
    path = output_dir / "metrics.jsonl"
    written = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in written.splitlines(True) if line.endswith("\n")]


def last_step(output_dir: Path) -> int:
    """The last step that metrics.jsonl shows so far, of lines that are whole."""
    with contextlib.suppress(FileNotFoundError):
        for line in reversed((output_dir / "metrics.jsonl").read_text().splitlines()):
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(line)["step"]
    return 0


def states(output_dir: Path) -> list[str]:
    """The saved states, oldest first."""
    return sorted(path.name for path in (output_dir / "checkpoints").glob("state-*"))


def state_step(output_dir: Path) -> int:
    """The step of the newest state."""
    newest = output_dir / "checkpoints" / states(output_dir)[-1] / "position.json"
    return json.loads(newest.read_text())["step"]


def first_questions(source: Path, target: Path, count: int) -> None:
    """Write a SQuAD file with the first `count` questions of another."""
    root = json.loads(source.read_text())
    for article in root["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = paragraph["qas"][:count]
            count -= len(paragraph["qas"])
        article["paragraphs"] = [p for p in article["paragraphs"] if p["qas"]]
    root["data"] = [article for article in root["data"] if article["paragraphs"]]
    target.write_text(json.dumps(root))


def curves(folder: Path, score_names: dict[str, str]) -> list[str]:
    """Draw curves.png of a log; the names of its curves."""
    from matplotlib import pyplot as plt

    figures: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt, "close", figures.append)
        results.draw_curves(str(folder), score_names)
    (figure,) = figures
    plt.close(figure)
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def error_line(stderr: str) -> str:
    """The one line that stderr must be, but for warnings and notes: `error: ...`."""
    lines = [line for line in stderr.splitlines() if not line.startswith(("warning: ", "note: "))]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: "), stderr
    return lines[0]
