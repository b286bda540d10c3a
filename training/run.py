"""A run: the folder it owns, the states it can go on from, its log, the wish to stop it.

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
from typing import Any, NoReturn, TypedDict, cast

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from cli import Interrupted, UserError, warn

CHECKPOINTS = "checkpoints"


KEPT_STATES = 2


BEST = "best"  # in CHECKPOINTS: the weights that scored best so far


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


# ------------------------------------------------------------------------------------------------
# What stands in its JSON files
class Best(TypedDict):
    """The best weights kept so far: their stage, step and score."""

    stage: str
    step: int
    score: float


class ProgressState(TypedDict):
    """What `Progress` needs to go on: times, and the figures of steps since the last record."""

    seconds: float
    window_seconds: float
    window: list[dict[str, float]]


class DivergenceState(TypedDict):
    """The fields of `loop.Divergence`."""

    recent: list[float]
    good: float | None
    factor: float


class Position(TypedDict):
    """Where a state is in the run; `pass_tokens` of each process, as `StepGradient` has them."""

    stage: str
    step: int
    progress: ProgressState
    divergence: DivergenceState
    pass_tokens: list[int]


# ------------------------------------------------------------------------------------------------
# The folder
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
            written = _read_json(path)
            earlier = written.get("arguments", {})
            differing = [
                f"{key} was {earlier.get(key)!r}, now {arguments.get(key)!r}"
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


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError):
        return {}


def write_json(path: str, value: object) -> None:
    """Write JSON under a temporary name, then rename: the file is whole or it is not there."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def _sync_folder(path: str) -> None:
    """Bring a rename in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Run:
    """A run in progress: its folder, its saved states, its log, and the wish to stop it.

    Attributes:
        accelerator, output_dir: as given.
        main: whether this process writes and speaks.
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

    # -- the best checkpoint

    def keep_if_best(self, model: nn.Module, stage: str, step: int, score: float) -> None:
        """Keep the model's weights if its score is the best so far."""
        if not self.main:
            return
        best = self.best()
        if best is None or score > best["score"]:
            folder = os.path.join(self._checkpoints, BEST)
            shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
            os.makedirs(f"{folder}.tmp")
            state = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
            try:
                save_file(state, os.path.join(f"{folder}.tmp", "weights.safetensors"))
                record = {"stage": stage, "step": step, "score": score}
                write_json(os.path.join(f"{folder}.tmp", "position.json"), record)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"--output_dir: the best checkpoint cannot be kept in {folder} ({error}); the"
                    " same command again goes on from the saved state, and --keep=last needs no"
                    " room for it"
                ) from None
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(f"{folder}.tmp", folder)

    def best(self) -> Best | None:
        """`stage`, `step` and `score` of the best weights kept so far, or None."""
        found = _read_json(os.path.join(self._checkpoints, BEST, "position.json"))
        return cast(Best, found) if found else None

    def load_best(self, model: nn.Module) -> Best | None:
        """Give a model the weights of the best checkpoint, and say which that is."""
        self.accelerator.wait_for_everyone()
        best = self.best()
        if best:
            path = os.path.join(self._checkpoints, BEST, "weights.safetensors")
            model.load_state_dict(load_file(path))
            self.say(f"kept: {best['stage']}, step {best['step']}, the best on dev")
        return best

    # -- states

    def _states(self) -> list[str]:
        """Complete states, oldest first; a kill may leave parts of one that was being removed."""
        names = os.listdir(self._checkpoints) if os.path.isdir(self._checkpoints) else []
        return sorted(
            name
            for name in names
            if name.startswith("state-")
            and os.path.exists(os.path.join(self._checkpoints, name, "position.json"))
        )

    def save(self, position: Position) -> bool:
        """Save weights, optimizer, random generators and `position`; keep the last two states.

        The state is written under a temporary name, brought to the disk and renamed. If that
        fails (a full disk), the earlier states stay and the run goes on with a warning.
        """
        temporary = os.path.join(self._checkpoints, "saving")
        if self.main:
            shutil.rmtree(temporary, ignore_errors=True)
            os.makedirs(temporary)
        self.accelerator.wait_for_everyone()
        problem = None
        try:
            self.accelerator.save_state(temporary)
            if self.main:
                write_json(os.path.join(temporary, "position.json"), position)
                for name in os.listdir(temporary):
                    with open(os.path.join(temporary, name), "rb") as file:
                        os.fsync(file.fileno())
        except Exception as error:  # each file format has its own error for a full disk
            problem = (str(error).strip() or repr(error)).splitlines()[0]
        failed = torch.tensor([float(problem is not None)], device=self.accelerator.device)
        if self.accelerator.reduce(failed, reduction="sum").item():
            if self.main:
                shutil.rmtree(temporary, ignore_errors=True)
                free = shutil.disk_usage(self._checkpoints).free
                warn(
                    f"the state at step {position['step']} could not be saved in"
                    f" {self._checkpoints}, where {free / 1e6:,.0f} MB are free"
                    f" ({problem or 'another process failed'}); the one before it stays"
                )
            return False
        if self.main:
            states = self._states()
            number = int(states[-1].split("-")[1]) + 1 if states else 1
            os.rename(temporary, os.path.join(self._checkpoints, f"state-{number:06d}"))
            _sync_folder(self._checkpoints)
            for old in states[: len(states) + 1 - KEPT_STATES]:
                shutil.rmtree(os.path.join(self._checkpoints, old))
        self.accelerator.wait_for_everyone()
        return True

    def position(self, before: int = 0) -> Position | None:
        """The position of the newest state, or of one so many before it; None if there is none."""
        states = self._states()
        if len(states) <= before:
            return None
        path = os.path.join(self._checkpoints, states[-1 - before], "position.json")
        return cast(Position, _read_json(path))

    def drop_newest(self) -> None:
        """Remove the newest state: the one before it takes its place."""
        newest = os.path.join(self._checkpoints, self._states()[-1])
        self.accelerator.wait_for_everyone()  # until all have seen which that is
        if self.main:
            shutil.rmtree(newest)
        self.accelerator.wait_for_everyone()

    def restore(self) -> None:
        """Load the newest state into what the accelerator has prepared."""
        self.accelerator.load_state(os.path.join(self._checkpoints, self._states()[-1]))

    def forget_after(self, stage: str, step: int) -> None:
        """Drop log records of work that the restored state has not seen: it is done again."""
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
