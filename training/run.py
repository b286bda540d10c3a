"""A run: its output folder, its log, and the signals that stop it.

A run belongs to one command. While it lasts, `checkpoints/` in its folder holds `run.json` (the
command's arguments) and the last two states. When it ends, `metrics.json` takes their place.
"""

from __future__ import annotations

import argparse
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

from cli import Interrupted, UserError, is_main_process, warn
from training.states import States, read_json, write_json

CHECKPOINTS = "checkpoints"
WAIT_SECONDS = 0.1  # between two looks for a file that the main process writes

# These arguments may differ when a run continues.
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
# And these while it is unfinished: accuracy control has its own check, once it has decided.
FREE_UNFINISHED = {"max_drop"}
# The files that a finished run leaves in its folder. --overwrite_output_dir removes only these and
# RUN_FOLDERS.
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
    "model.ort.onnx",
    "quantizers.json",
    "quantizers.safetensors",
    "state_maps.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
RUN_FOLDERS = (CHECKPOINTS, "tensorboard", "unmerged")


def check_output_dir(args: argparse.Namespace, arguments: Mapping[str, object]) -> str:
    """Check that this command may write to the folder, and print a line if it has finished there.

    Args:
        arguments: all that identifies this command: its flags, and hashes of its data.

    Returns:
        the state of this command's run in the folder: "new" (none), "unfinished" or "finished".

    Raises:
        UserError: the folder holds another command's run (the line names the arguments that
            differ), or other files that this run would overwrite; or it cannot be written to.
    """
    output_dir: str = args.output_dir
    try:
        os.makedirs(output_dir, exist_ok=True)
        probe = os.path.join(output_dir, f".write-test-{os.getpid()}")
        with open(probe, "w"):
            pass
        os.remove(probe)
    except OSError as error:
        raise UserError(f"--output_dir: cannot write to {output_dir}: {error.strerror}") from None
    if args.overwrite_output_dir:
        return "new"
    unfinished = os.path.join(output_dir, CHECKPOINTS, "run.json")
    finished = os.path.join(output_dir, "metrics.json")
    # A starting run removes metrics.json before it writes run.json. Both exist only if a run was
    # killed while it removed its states.
    for path, state in ((finished, "finished"), (unfinished, "unfinished")):
        if os.path.exists(path):
            written = read_json(path)
            earlier = written.get("arguments", {})
            free = {*FREE_ARGUMENTS}
            if state == "unfinished":
                free |= earlier.keys() & FREE_UNFINISHED  # absent in a run of an earlier version
            differing = [
                f"{key} was {shown(earlier, key)}, now {shown(arguments, key)}"
                for key in sorted(earlier.keys() | arguments.keys())
                if key not in free and earlier.get(key) != arguments.get(key)
            ]
            if differing:
                raise UserError(
                    f"--output_dir: {output_dir} holds the {state} run of another command"
                    f" ({'; '.join(differing)}); choose another folder or add"
                    " --overwrite_output_dir"
                )
            if state == "finished" and not _passed(written):
                continue  # its states are still there: export again
            if state == "finished" and is_main_process():
                print(f"{output_dir} is finished; --overwrite_output_dir runs this command again")
            return state
    present = [name for name in RUN_FILES if os.path.exists(os.path.join(output_dir, name))]
    if present:
        raise UserError(
            f"--output_dir: {output_dir} has files that this run did not write"
            f" ({', '.join(present[:3])}); choose another folder or add --overwrite_output_dir"
        )
    return "new"


def _passed(metrics: Mapping[str, object]) -> bool:
    """Whether the exported file passed its check, according to metrics.json."""
    check = metrics.get("onnx_check")
    return not isinstance(check, dict) or bool(check.get("passed", True))


class Run:
    """A run in progress: its folder, its log, and the signals that stop it.

    Attributes:
        args: the flags.
        arguments: all that identifies the command, as `check_output_dir` compares it.
        main: whether this process writes and prints.
        states: from which the run can continue.
        stop_signal: the number of the signal that asked the run to stop, or 0.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: argparse.Namespace,
        arguments: Mapping[str, object],
        found: str,
    ) -> None:
        """Lock the folder; a new run removes what an earlier one left.

        Args:
            found: the result of `check_output_dir`.
        """
        self.accelerator, self.args, self.arguments = accelerator, args, arguments
        self.output_dir: str = args.output_dir
        self.main = accelerator.is_main_process
        self.stop_signal, self.started = 0, time.time()
        self._checkpoints = os.path.join(self.output_dir, CHECKPOINTS)
        self.states = States(accelerator, self._checkpoints, self.say)
        if self.main:
            self._lock()
            if found == "new":
                for name in RUN_FILES:
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(os.path.join(self.output_dir, name))
                for name in RUN_FOLDERS:
                    shutil.rmtree(os.path.join(self.output_dir, name), ignore_errors=True)
            os.makedirs(self._checkpoints, exist_ok=True)
            write_json(os.path.join(self._checkpoints, "run.json"), {"arguments": arguments})
        accelerator.wait_for_everyone()
        self._board = None
        if self.main and args.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter  # optional: may not be installed

            self._board = SummaryWriter(os.path.join(self.output_dir, "tensorboard"))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        mixed = self.accelerator.mixed_precision
        return "fp32" if mixed == "no" else mixed

    def machine(self) -> str:
        """Precision, processes and device, e.g. "bf16 on 1 x cpu"."""
        processes, device = self.accelerator.num_processes, self.accelerator.device.type
        return f"{self.precision} on {processes} x {device}"

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
        if self.stop_signal:  # the second signal: do not wait for the step or the save to end
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.stop_signal = number

    def stop_if_asked(self) -> None:
        """Call it between two batches where nothing needs saving (evaluation, export).

        Raises:
            Interrupted: Ctrl-C or SIGTERM came.
        """
        if self.stop_signal:
            self.interrupt(self.stop_signal, "stopped between steps; the last saved state stays")

    def wait_for(self, path: str) -> None:
        """Wait until the main process has written a file or folder, which may take long.

        A barrier would not do: process groups have a time limit, after which the run ends.

        Raises:
            Interrupted: Ctrl-C or SIGTERM came.
        """
        while not os.path.exists(path):
            self.stop_if_asked()
            time.sleep(WAIT_SECONDS)

    def interrupt(self, number: int, outcome: str) -> NoReturn:
        """Stop the run because of signal `number`; `outcome` says whether its state was saved."""
        name = signal.Signals(number).name
        without = ", without --overwrite_output_dir," if self.args.overwrite_output_dir else ""
        raise Interrupted(
            f"{name}: {outcome}. The same command again{without} goes on from there.", number
        )

    def say(self, text: str) -> None:
        """Print a line on the main process only, above the progress bar if there is one."""
        if self.main:
            with tqdm.external_write_mode(file=sys.stdout):
                print(text, flush=True)

    def log(self, record: Mapping[str, object]) -> None:
        """Append a record to metrics.jsonl (and tensorboard), on the main process only."""
        if not self.main:
            return
        path = os.path.join(self.output_dir, "metrics.jsonl")
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk must not end the training
            warn(f"a record of step {record['step']} is missing in {path}: {error.strerror}")
        if self._board:
            for key, value in record.items():
                if isinstance(value, float) and key != "epoch":
                    self._board.add_scalar(f"{record['stage']}/{key}", value, record["step"])
            self._board.flush()

    def evaluated(self, stage: str) -> dict[str, Any] | None:
        """The record of a stage's last evaluation, if the log has one."""
        records = reversed(read_log(self.output_dir))
        return next((r for r in records if r["stage"] == stage and "evaluation" in r), None)

    def evaluate_once(self, stage: str, evaluate: Callable[[], dict[str, float]]) -> None:
        """Log and print the figures of a model that is not training, unless the log has them."""
        if self.evaluated(stage) is None:
            figures = evaluate()
            self.accelerator.wait_for_everyone()  # all have now seen that there is no record
            self.log({"stage": stage, "step": 0, "epoch": 0.0, "evaluation": True, **figures})
            self.say(f"{stage}: {summary(figures)}")
            self.accelerator.wait_for_everyone()  # so that all can read the record

    def forget_after(self, stage: str, step: int) -> None:
        """Drop the log records of steps after the restored state: these steps are taken again."""
        path = os.path.join(self.output_dir, "metrics.jsonl")
        if self.main and os.path.exists(path):
            kept = [
                r
                for r in read_log(self.output_dir)
                if r["stage"] != stage or r["step"] < step + ("evaluation" not in r)
            ]
            with open(f"{path}.tmp", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in kept)
            os.replace(f"{path}.tmp", path)

    @contextlib.contextmanager
    def writing_results(self) -> Iterator[None]:
        """Around code that writes results: turn a full disk into one line; the states stay."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"--output_dir: the results cannot be written to {self.output_dir} ({error});"
                " the same command again goes on from the saved state"
            ) from None

    def finish(self, metrics: Mapping[str, object]) -> None:
        """Write metrics.json, which marks the run as finished, and remove its states.

        If the exported file failed its check, the states stay, so that it can be exported again.
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
    """The records of metrics.jsonl, if it exists; a last line that a kill cut off is left out."""
    records: list[dict[str, Any]] = []
    path = os.path.join(output_dir, "metrics.jsonl")
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def summary(figures: Mapping[str, float]) -> str:
    """Figures in one line: "F1 88.12, EM 80.45"."""
    names = {"f1": "F1", "exact_match": "EM"}
    keys = [*names, *(key for key in figures if key not in names)]
    return ", ".join(f"{names.get(key, key)} {figures[key]:.2f}" for key in keys if key in figures)
