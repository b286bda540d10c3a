"""The states from which a run can continue, and the best weights so far.

A state is written under a temporary name, synced to the disk and renamed, so it is either whole or
absent. The last two states stay.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from typing import Any, TypedDict, cast

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cli import UserError, first_line, warn

KEPT_STATES = 2
BEST = "best"  # the folder of the best weights, beside the states


class Best(TypedDict):
    """The stage, step and score of the best weights so far."""

    stage: str
    step: int
    score: float


class ProgressState(TypedDict):
    """The state of a `Progress`: times, and the figures of the steps since the last record."""

    seconds: float
    window_seconds: float
    window: list[dict[str, float]]


class Position(TypedDict):
    """The place of a state in the run.

    `divergence` has the fields of `loop.Divergence`, `pass_tokens` is
    `StepGradient.all_pass_tokens`.
    """

    stage: str
    step: int
    progress: ProgressState
    divergence: dict[str, Any]
    pass_tokens: list[int]


def read_json(path: str) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError):
        return {}


def write_json(path: str, value: object) -> None:
    """Write JSON under a temporary name, then rename: the file is either whole or absent."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def _sync_folder(path: str) -> None:
    """Sync a rename in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class States:
    """Saves and loads the states in a folder.

    Attributes:
        say: prints a line.
        main: whether this process writes.
    """

    def __init__(self, accelerator: Accelerator, folder: str, say: Callable[[str], None]) -> None:
        self.accelerator, self.folder, self.say = accelerator, folder, say
        self.main = accelerator.is_main_process

    def keep_if_best(self, model: nn.Module, stage: str, step: int, score: float) -> None:
        """Keep the model's weights if its score is the best so far."""
        best = self.best()
        if not self.main or (best and score <= best["score"]):
            return
        folder = os.path.join(self.folder, BEST)
        shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
        os.makedirs(f"{folder}.tmp")
        state = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
        try:
            save_file(state, os.path.join(f"{folder}.tmp", "weights.safetensors"))
            record = {"stage": stage, "step": step, "score": score}
            write_json(os.path.join(f"{folder}.tmp", "position.json"), record)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"--output_dir: the best checkpoint cannot be kept in {folder} ({error}); the same"
                " command again goes on from the saved state, and --keep=last needs no room for it"
            ) from None
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(f"{folder}.tmp", folder)

    def best(self) -> Best | None:
        """The stage, step and score of the best weights so far, or None."""
        found = read_json(os.path.join(self.folder, BEST, "position.json"))
        return cast(Best, found) if found else None

    def load_best(self, model: nn.Module) -> None:
        """Load the best weights, if any, into the model, and print their stage and step."""
        self.accelerator.wait_for_everyone()
        if best := self.best():
            model.load_state_dict(load_file(os.path.join(self.folder, BEST, "weights.safetensors")))
            self.say(f"kept: {best['stage']}, step {best['step']}, the best on dev")

    def _states(self) -> list[str]:
        """Complete states, oldest first; a kill may leave parts of a state under removal."""
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return sorted(
            name
            for name in names
            if name.startswith("state-")
            and os.path.exists(os.path.join(self.folder, name, "position.json"))
        )

    def save(self, position: Position) -> bool:
        """Save weights, optimizer, random generators and `position`; keep the last two states.

        If that fails (a full disk), the earlier states stay and the run continues with a warning.

        Returns:
            whether the state was saved.
        """
        temporary = os.path.join(self.folder, "saving")
        if self.main:
            shutil.rmtree(temporary, ignore_errors=True)
            os.makedirs(temporary)
        self.accelerator.wait_for_everyone()
        problem = ""
        try:
            self.accelerator.save_state(temporary)
            if self.main:
                write_json(os.path.join(temporary, "position.json"), position)
                for name in os.listdir(temporary):
                    with open(os.path.join(temporary, name), "rb") as file:
                        os.fsync(file.fileno())
        except Exception as error:  # each file format has its own error for a full disk
            problem = first_line(error)
        failed = torch.tensor([float(bool(problem))], device=self.accelerator.device)
        if self.accelerator.reduce(failed, reduction="sum").item():
            if self.main:
                shutil.rmtree(temporary, ignore_errors=True)
                free = shutil.disk_usage(self.folder).free
                left = "there is no earlier state, so a run that stops now starts anew"
                if self._states():
                    left = "the one before it stays"
                warn(
                    f"the state at step {position['step']} could not be saved in"
                    f" {self.folder}, where {free / 1e6:,.0f} MB are free"
                    f" ({problem or 'another process failed'}); {left}"
                )
            return False
        if self.main:
            states = self._states()
            number = int(states[-1].split("-")[1]) + 1 if states else 1
            os.rename(temporary, os.path.join(self.folder, f"state-{number:06d}"))
            _sync_folder(self.folder)
            for old in states[: len(states) + 1 - KEPT_STATES]:
                shutil.rmtree(os.path.join(self.folder, old))
        self.accelerator.wait_for_everyone()
        return True

    def position(self, before: int = 0) -> Position | None:
        """The position of the newest state, or of the state `before` places earlier, or None."""
        states = self._states()
        if len(states) <= before:
            return None
        path = os.path.join(self.folder, states[-1 - before], "position.json")
        return cast(Position, read_json(path))

    def drop_newest(self) -> None:
        """Remove the newest state: the state before it becomes the newest."""
        newest = os.path.join(self.folder, self._states()[-1])
        self.accelerator.wait_for_everyone()  # all have now listed the states
        if self.main:
            shutil.rmtree(newest)
        self.accelerator.wait_for_everyone()

    def restore(self) -> None:
        """Load the newest state into the objects that the accelerator has prepared."""
        self.accelerator.load_state(os.path.join(self.folder, self._states()[-1]))
