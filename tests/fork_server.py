"""Runs scripts as `python script.py ...` does, but for the seconds that imports take.

A server has imported the libraries once and does nothing else. For each script it forks a process
that has its arguments, environment, files and signals as a new interpreter has them. A script
imports the project's own modules itself.

What this cannot show: how a script starts, variables that a library reads while it is imported
(OMP_NUM_THREADS, HF_HUB_OFFLINE), an import that a script has forgotten and the server has not,
and what depends on how strings are hashed, which is the same in all processes of a server. For
these there are real processes (`fresh` in `conftest.run` and `calls.started`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO, cast

# No onnxruntime: its import starts a thread, and threads do not live on in a forked process.
LIBRARIES = (
    "accelerate",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "nncf.torch",
    "numpy",
    "onnx",
    "safetensors.torch",
    "torch.distributed",
    "torch.onnx",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
)
MESSAGE_BYTES = 2**20  # more than a command and an environment have


# ------------------------------------------------------------------------------------------------
# The side of the tests


def text_file() -> TextIO:
    """A file without a name, that is gone once it is closed."""
    return cast(TextIO, tempfile.TemporaryFile("w+", encoding="utf-8"))


class ServerEnded(Exception):
    """The server answers no more."""


class Forked:
    """A script that the server runs, with what tests need of subprocess.Popen.

    Attributes:
        pid: the script's process, and its group; no other has the number until `close`.
        returncode: as subprocess has it, once the process is known to have ended.
    """

    def __init__(self, requests: socket.socket, command: list[str], environment: dict[str, str]):
        self.args = command
        self.returncode: int | None = None
        self._output = [text_file() for _ in range(2)]
        self._keeper, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {"argv": command[1:], "environment": environment, "folder": os.getcwd()}
        descriptors = [theirs.fileno(), *(file.fileno() for file in self._output)]
        socket.send_fds(requests, [json.dumps(request).encode()], descriptors)
        theirs.close()
        self.pid = self._number()

    def _number(self) -> int:
        answer = self._keeper.recv(MESSAGE_BYTES)
        if not answer:
            raise ServerEnded
        return int(answer)

    def poll(self) -> int | None:
        """The exit code, or None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(timeout=0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once the process has ended."""
        if self.returncode is None:
            self._keeper.settimeout(timeout)
            try:
                self.returncode = self._number()
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All of stdout and stderr, once the process has ended."""
        self.wait(timeout)
        for file in self._output:
            file.seek(0)
        stdout, stderr = (file.read() for file in self._output)
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def close(self) -> None:
        """Kill what still runs of it, and give the number of its process back."""
        for kill in (os.killpg, os.kill):  # at its very start it has no group yet
            with contextlib.suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)
        self.wait()
        self._keeper.close()
        for file in self._output:
            file.close()


class ForkServer:
    """The server, as the tests see it; it ends with `close`, or with their process."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = text_file()  # not our own stderr, which a test may read
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the tests
        )
        theirs.close()

    def start(self, command: list[str], environment: dict[str, str]) -> Forked:
        """Start `python script.py ...`."""
        try:
            return Forked(self._requests, command, environment)
        except (ServerEnded, BrokenPipeError, ConnectionResetError):
            self._process.wait()
            self._log.seek(0)
            raise ServerEnded(f"the fork server has ended: {self._log.read()}") from None

    def close(self) -> None:
        self._requests.close()
        self._process.wait()
        self._log.close()


def is_script(command: list[str]) -> bool:
    """Whether it is `python script.py ...`, which a server can run."""
    return command[0] == sys.executable and command[1].endswith(".py")


@functools.cache
def server() -> ForkServer:
    """The one of this process, which starts with its first script."""
    return ForkServer()


def close() -> None:
    """End the server, if there is one."""
    if server.cache_info().currsize:
        server().close()
        server.cache_clear()


# ------------------------------------------------------------------------------------------------
# The server


def load_libraries() -> None:
    """Import what scripts need, without starting a thread."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it is sent by a thread
    for name in LIBRARIES:
        importlib.import_module(name)
    threads = Path("/proc/self/task")
    assert threading.active_count() == 1
    assert not threads.exists() or len(list(threads.iterdir())) == 1
    sys.stdout.flush()
    gc.collect()
    gc.freeze()  # else collections in each script would go through all of that again


def time_in_one_runtime() -> None:
    """Let scripts time their file in ONNX Runtime alone; `timing.compiled.__wrapped__` is for all.

    OpenVINO takes longer to compile a tiny model than the model to train.
    """
    from deploy import timing  # which can be found once the script's folder is known

    compiled = timing.compiled

    @functools.wraps(compiled)
    def but_openvino(path: str, way: str, length: int) -> Callable[[], object]:
        if way != "ONNX Runtime":
            raise RuntimeError("left out in tests")
        return compiled(path, way, length)

    timing.compiled = but_openvino


def serve(requests: socket.socket) -> list[str]:
    """Fork a process for each request. Returns in that process alone, with its sys.argv."""
    keepers = 0
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 3)
        if not message:  # the tests have ended
            for _ in range(keepers):
                os.wait()
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            keep(socket.socket(fileno=descriptors[0]))
            return become(json.loads(message), *descriptors[1:])
        for descriptor in descriptors:
            os.close(descriptor)
        keepers += 1
        while keepers and os.waitpid(-1, os.WNOHANG)[0]:
            keepers -= 1


def keep(tests: socket.socket) -> None:
    """Fork the script's process, where this returns; tell the tests its number and exit code.

    The ended process stays a zombie until the tests have closed their side: a signal that they
    send late reaches no other process.
    """
    script = os.fork()
    if script == 0:
        tests.close()
        return
    tests.send(str(script).encode())
    end = os.waitid(os.P_PID, script, os.WEXITED | os.WNOWAIT)
    assert end is not None
    code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
    with contextlib.suppress(ConnectionError):  # the tests have ended
        tests.send(str(code).encode())
        tests.recv(1)
    os.waitpid(script, 0)
    os._exit(0)


def become(request: dict[str, Any], stdout: int, stderr: int) -> list[str]:
    """Make this process what a new interpreter is; its sys.argv."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    import numpy as np

    np.random.seed()  # Python's own generator does so itself
    return request["argv"]


def run_as_main(argv: list[str]) -> None:
    """Run a script as the main module of this process."""
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    if (Path(sys.path[0]) / "deploy").is_dir():  # a script of the project
        time_in_one_runtime()
    main = ModuleType("__main__")
    main.__file__ = argv[0]
    sys.modules["__main__"] = main
    code = compile(Path(argv[0]).read_bytes(), argv[0], "exec", dont_inherit=True)
    exec(code, main.__dict__)


if __name__ == "__main__":
    load_libraries()
    run_as_main(serve(socket.socket(fileno=int(sys.argv[1]))))
