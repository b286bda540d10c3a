"""Progress of a run while it trains: a bar or lines, and records in its log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from training.run import Run
from training.stage import Stage
from training.states import ProgressState

PLAIN_LINE_SECONDS = 30.0  # between two progress lines without a terminal


class Progress:
    """Shows progress by a bar on a terminal, else by plain lines now and then; writes the log."""

    def __init__(
        self, run: Run, stage: Stage, step: int, total: int, earlier: ProgressState | None
    ) -> None:
        """Begin at a step of `total`; `earlier` is the `state` at that step, if it was saved."""
        self.run, self.stage, self.total = run, stage, total
        self._line_at = time.monotonic()
        self._continue(step, earlier or {"seconds": 0.0, "window_seconds": 0.0, "window": []})
        terminal = run.main and sys.stderr.isatty()
        self._lines = run.main and not terminal
        self._name = stage.name
        if stage.count > 1:
            self._name = f"stage {stage.number}/{stage.count} {stage.name}"
        self._bar = tqdm(
            total=total, initial=step, desc=self._name, unit=" steps", disable=not terminal
        )

    def _continue(self, step: int, earlier: ProgressState) -> None:
        self.step = self._resumed_at_step = step
        self._began = self._step_ended = time.monotonic()
        self._paused_at: float | None = None
        self._earlier_seconds = earlier["seconds"]
        self._window: list[dict[str, float]] = earlier["window"]  # steps since the last record
        self._window_began = self._began - earlier["window_seconds"]

    def go_back(self, step: int, earlier: ProgressState) -> None:
        """Return to an earlier step, with the `state` that was saved there."""
        self._continue(step, earlier)
        self._bar.n = step
        self._bar.refresh()

    def state(self) -> ProgressState:
        """Times and figures with which a later part of the run continues the log."""
        now = self._paused_at or time.monotonic()
        return {
            "seconds": self.seconds(),
            "window_seconds": now - self._window_began,
            "window": self._window,
        }

    def seconds(self) -> float:
        """Seconds of training so far, with earlier parts of the run, without pauses."""
        return self._seconds_until(self._paused_at or time.monotonic())

    def _seconds_until(self, moment: float) -> float:
        return self._earlier_seconds + moment - self._began

    def pause(self) -> None:
        self._paused_at = time.monotonic()

    def resume(self) -> None:
        away = time.monotonic() - (self._paused_at or time.monotonic())
        self._began += away
        self._window_began += away
        self._step_ended += away
        self._paused_at = None

    def advance(
        self, sums: dict[str, float], epoch: float, learning_rate: float, later: int = 0
    ) -> None:
        """Count a step; after every log_steps steps and the last, write and show a record.

        Args:
            later: the number of steps after this one that have ended by now too. When each ended
                is not known: they share the time since the last step before them equally.
        """
        now = time.monotonic()
        ended = self._step_ended = self._step_ended + (now - self._step_ended) / (later + 1)
        self.step += 1
        self._bar.update()
        self._window.append(sums)
        if self.step % self.run.args.log_steps and self.step != self.total:
            return
        spent = max(ended - self._window_began, 1e-9)
        total = {key: sum(each[key] for each in self._window) for key in sums}
        losses = [key for key in sums if key not in ("tokens", "positions", "examples")]
        mean = {
            key: sum(each[key] * each["examples"] for each in self._window) / total["examples"]
            for key in losses
        }
        pace = (ended - self._began) / (self.step - self._resumed_at_step)
        left = pace * (self.total - self.step)
        left_all = left + pace * self.stage.work_after
        record = {
            "stage": self.stage.name,
            "step": self.step,
            "epoch": epoch,
            **mean,
            "learning_rate": learning_rate,
            "examples_per_second": total["examples"] / spent,
            "tokens_per_second": total["tokens"] / spent,
            "padding": 1 - total["tokens"] / total["positions"],
            "seconds": self._seconds_until(ended),
            "seconds_left": left,
            "seconds_left_all": left_all,
        }
        self.run.log(record)
        text = (
            f"loss {mean['loss']:.4g}, lr {learning_rate:.2e},"
            f" {record['tokens_per_second']:,.0f} tokens/s, padding {record['padding']:.1%}"
        )
        until = f"{tqdm.format_interval(left)} left"
        if self.stage.count > 1:
            until += f", {tqdm.format_interval(left_all)} for all stages"
            self._bar.set_postfix_str(f"{text}, {until}")
        else:
            self._bar.set_postfix_str(text)
        if self._lines and (now - self._line_at >= PLAIN_LINE_SECONDS or self.step == self.total):
            self._line_at = now
            print(f"{self._name} step {self.step}/{self.total}: {text}, {until}", flush=True)
        self._window, self._window_began = [], ended

    def close(self) -> None:
        self._bar.close()
