"""A run: the folder it owns, its log, the wish to stop it.

A run belongs to one command. From its start until its end, `checkpoints/` in its folder holds
`run.json` (the command's arguments) and the last two states; `metrics.json` takes their place.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm import tqdm

from cli import Interrupted, UserError, warn
from training.states import States, read_json, write_json

CHECKPOINTS = "checkpoints"
WAIT_SECONDS = 0.1  # between looks at whether the main process has written something


# Arguments that may change between the start of a run and its continuation.
FREE_ARGUMENTS = (
    "output_dir",
    "overwrite_output_dir",
    "save_minutes",
    "log_steps",
    "report_to",
    "per_gpu_train_batch_size",
    "per_gpu_eval_batch_size",
    "no_cuda",
)


# What a finished run leaves in its folder; --overwrite_output_dir removes these and nothing else.
RUN_FILES = (
    "metrics.json",
    "reader.json",
    "metrics.jsonl",
    "curves.png",
    "predictions.json",
    "no_answer_scores.json",
    "README.md",
    "config.json",
    "model.safetensors",
    "model.onnx",
    "model.failed.onnx",
    "quantizers.json",
    "quantizers.safetensors",
    "state_maps.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


RUN_FOLDERS = (CHECKPOINTS, "tensorboard", "unmerged")


def check_output_dir(output_dir: str, arguments: Mapping[str, object], overwrite: bool) -> str:
    """Whether this command may write there, and what it finds: "new", "unfinished", "finished".

    Args:
        arguments: all that tells this command from another: its flags, and hashes of its data.

    Raises:
        UserError: the folder holds another command's run (names the arguments that differ) or
            other files this run would write over; or it cannot be written to.
    """
    try:
        os.makedirs(output_dir, exist_ok=True)
        probe = os.path.join(output_dir, f".write-test-{os.getpid()}")
        with open(probe, "w"):
            pass
        os.remove(probe)
    except OSError as error:
        raise UserError(f"--output_dir: cannot write to {output_dir}: {error.strerror}") from None
    if overwrite:
        return "new"
    unfinished = os.path.join(output_dir, CHECKPOINTS, "run.json")
    finished = os.path.join(output_dir, "metrics.json")
    # A run that starts removes the metrics before it writes run.json; one that was killed while it
    # removed its states has both.
    for path, state in ((finished, "finished"), (unfinished, "unfinished")):
        if os.path.exists(path):
            written = read_json(path)
            earlier = written.get("arguments", {})
            differing = [
                f"{key} was {shown(earlier, key)}, now {shown(arguments, key)}"
                for key in sorted(earlier.keys() | arguments.keys())
                if key not in FREE_ARGUMENTS and earlier.get(key) != arguments.get(key)
            ]
            if not differing and state == "finished" and not _passed(written):
                continue  # its states are still there
            if not differing:
                return state
            raise UserError(
                f"--output_dir: {output_dir} holds the {state} run of another command"
                f" ({'; '.join(differing)}); choose another folder or add --overwrite_output_dir"
            )
    present = [name for name in RUN_FILES if os.path.exists(os.path.join(output_dir, name))]
    if present:
        raise UserError(
            f"--output_dir: {output_dir} has files that this run did not write"
            f" ({', '.join(present[:3])}); choose another folder or add --overwrite_output_dir"
        )
    return "new"


def _passed(metrics: Mapping[str, object]) -> bool:
    """Whether the exported file has passed its check, by what metrics.json tells."""
    check = metrics.get("onnx_check")
    return not isinstance(check, dict) or bool(check.get("passed", True))


class Run:
    """A run in progress: its folder, its log, and the wish to stop it.

    Attributes:
        accelerator, output_dir: as given.
        main: whether this process writes and speaks.
        states: what the run can go on from.
        stop_signal: the number of the signal that asked the run to stop, or 0.
        overwrite: whether the command, given again, would start from nothing.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str,
        arguments: Mapping[str, object],
        state: str,
        save_minutes: float,
        log_steps: int,
        report_to: str,
    ) -> None:
        """`state` is what `check_output_dir` found. A new run clears what an old one left."""
        self.accelerator, self.output_dir = accelerator, output_dir
        self.main = accelerator.is_main_process
        self.save_seconds, self.log_steps = 60 * save_minutes, log_steps
        self.stop_signal = 0
        self.arguments = arguments
        self.overwrite = bool(arguments.get("overwrite_output_dir"))
        self.started = time.time()
        self._checkpoints = os.path.join(output_dir, CHECKPOINTS)
        self.states = States(accelerator, self._checkpoints, self.say)
        if self.main:
            self._lock()
            if state == "new":
                for name in RUN_FILES:
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(os.path.join(output_dir, name))
                for name in RUN_FOLDERS:
                    shutil.rmtree(os.path.join(output_dir, name), ignore_errors=True)
            os.makedirs(self._checkpoints, exist_ok=True)
            write_json(os.path.join(self._checkpoints, "run.json"), {"arguments": arguments})
        accelerator.wait_for_everyone()
        self._board = None
        if self.main and report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter  # which need not be installed

            self._board = SummaryWriter(os.path.join(output_dir, "tensorboard"))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        return {"no": "fp32"}.get(
            self.accelerator.mixed_precision, self.accelerator.mixed_precision
        )

    def machine(self) -> str:
        """What it computes on, e.g. "bf16 on 1 x cpu"."""
        return (
            f"{self.precision} on {self.accelerator.num_processes} x {self.accelerator.device.type}"
        )

    def _lock(self) -> None:
        # Held until the process ends, however it ends.
        self._lock_file = open(os.path.join(self.output_dir, ".lock"), "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--output_dir: another process is writing to {self.output_dir}"
            ) from None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.stop_signal:  # asked twice: do not wait for the step or the save to end
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.stop_signal = number

    def stop_if_asked(self) -> None:
        """Between two batches where nothing is to be saved (evaluation, export).

        Raises:
            Interrupted: Ctrl-C or SIGTERM came.
        """
        if self.stop_signal:
            self.interrupt(self.stop_signal, "stopped between steps; the last saved state stays")

    def wait_for(self, path: str) -> None:
        """Wait until the main process has written something that takes it long.

        A barrier would end the run after a while: process groups have a time limit.

        Raises:
            Interrupted: Ctrl-C or SIGTERM came.
        """
        while not os.path.exists(path):
            self.stop_if_asked()
            time.sleep(WAIT_SECONDS)

    def interrupt(self, number: int, what: str) -> NoReturn:
        """Stop the run because of a signal, telling what became of its state."""
        name = signal.Signals(number).name
        command = "The same command again"
        if self.overwrite:
            command += ", without --overwrite_output_dir,"
        raise Interrupted(f"{name}: {what}. {command} goes on from there.", number)

    def say(self, text: str) -> None:
        """Print a line, on the main process alone, above the progress bar if there is one."""
        if self.main:
            with tqdm.external_write_mode(file=sys.stdout):
                print(text, flush=True)

    def log(self, record: Mapping[str, object]) -> None:
        """Append a record to metrics.jsonl (and tensorboard), on the main process alone."""
        if not self.main:
            return
        path = os.path.join(self.output_dir, "metrics.jsonl")
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk may get room again: training is worth more
            warn(f"a record of step {record['step']} is missing in {path}: {error.strerror}")
        if self._board:
            for key, value in record.items():
                if isinstance(value, float) and key != "epoch":
                    self._board.add_scalar(f"{record['stage']}/{key}", value, record["step"])
            self._board.flush()

    def evaluated(self, stage: str) -> dict[str, Any] | None:
        """The record of a stage's last evaluation, if the log has one."""
        found = None
        for record in read_log(self.output_dir):
            if record["stage"] == stage and "evaluation" in record:
                found = record
        return found

    def evaluate_once(self, stage: str, evaluate: Callable[[], dict[str, float]]) -> None:
        """Log and say the figures of what does not train, unless an earlier part of the run has."""
        if self.evaluated(stage) is None:
            figures = evaluate()
            self.accelerator.wait_for_everyone()  # until all have seen that there is no record
            self.log({"stage": stage, "step": 0, "epoch": 0.0, "evaluation": True, **figures})
            self.say(f"{stage}: {summary(figures)}")
            self.accelerator.wait_for_everyone()  # so that all can read the record

    def forget_after(self, stage: str, step: int) -> None:
        """Drop the log records of steps after the restored state: they are done again."""
        path = os.path.join(self.output_dir, "metrics.jsonl")
        if self.main and os.path.exists(path):
            records = read_log(self.output_dir)
            kept = [
                r
                for r in records
                if r["stage"] != stage or r["step"] < step + ("evaluation" not in r)
            ]
            with open(f"{path}.tmp", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in kept)
            os.replace(f"{path}.tmp", path)

    @contextlib.contextmanager
    def writing_results(self) -> Iterator[None]:
        """Around what writes the results: a full disk is one line, and the states stay."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"--output_dir: the results cannot be written to {self.output_dir} ({error});"
                " the same command again goes on from the saved state"
            ) from None

    def finish(self, metrics: Mapping[str, object]) -> None:
        """Write metrics.json, which marks the run as finished, and remove its states.

        Where the exported file has not passed its check the states stay, to export it again.
        """
        if self.main:
            write_json(os.path.join(self.output_dir, "metrics.json"), metrics)
            if _passed(metrics):
                shutil.rmtree(self._checkpoints)
            if self._board:
                self._board.close()
            self._lock_file.close()
            os.remove(os.path.join(self.output_dir, ".lock"))


def shown(arguments: Mapping[str, object], key: str) -> str:
    """The value of an argument; "absent" if its version does not have it."""
    return repr(arguments[key]) if key in arguments else "absent"


def read_log(output_dir: str) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, if there is one; a last line that a kill cut is left out."""
    records: list[dict[str, Any]] = []
    path = os.path.join(output_dir, "metrics.jsonl")
    if not os.path.exists(path):
        return records
    with open(path, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def summary(figures: Mapping[str, float]) -> str:
    """A line of figures: "F1 88.12, EM 80.45"."""
    names = {"f1": "F1", "exact_match": "EM"}
    keys = [*names, *(key for key in figures if key not in names)]
    return ", ".join(f"{names.get(key, key)} {figures[key]:.2f}" for key in keys if key in figures)
