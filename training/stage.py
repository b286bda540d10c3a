"""A stage of training: how long and how fast it trains, and how it is evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import nn


def linear_decay(step: int, total: int) -> float:
    """Factor of the learning rate: 1 at the start of a stage, 0 at its end."""
    return 1.0 - step / total


def warm_up(step: int, total: int, steps: int | None = None) -> float:
    """Factor of the learning rate: rising over `steps` steps, or over the first 1%; then 1."""
    return min(1.0, (step + 1) / (steps or max(1.0, total / 100)))


def warm_up_linear_decay(step: int, total: int, steps: int | None = None) -> float:
    """Factor of the learning rate: the warm-up above, times a linear fall to 0 at the end."""
    return warm_up(step, total, steps) * linear_decay(step, total)


class Evaluation(Protocol):
    """The figures of a model on the dev file, in percent."""

    def __call__(self, model: nn.Module, fp32: bool = False) -> dict[str, float]:
        """Evaluate the model; `fp32` computes in FP32, whatever the run's precision is."""


@dataclass(frozen=True)
class Stage:
    """How one stage trains: how long, how fast, and which weights are kept.

    Attributes:
        num_epochs: may be a fraction.
        total_batch_size: examples per optimisation step.
        micro_batch_size: examples per forward pass of one process on a CPU.
        schedule: from a step and the number of all steps to a factor of the learning rate.
        max_steps: the most steps, or None for no limit.
        goes_back: whether a diverging run goes back to its last good state, with half the
            learning rate, instead of stopping.
        keep: the figure by which the best weights are kept, or None; see States.keep_if_best.
        after_backward: called when a step's gradients are there, before they are used.
        number, count: this stage's place among the stages of the run.
        work_after: work of all later stages, in steps of this one, to estimate the time left.
    """

    name: str
    num_epochs: float
    learning_rate: float
    total_batch_size: int
    micro_batch_size: int
    schedule: Callable[[int, int], float] = linear_decay
    max_steps: int | None = None
    goes_back: bool = False
    keep: str | None = None
    after_backward: Callable[[], None] | None = None
    number: int = 1
    count: int = 1
    work_after: float = 0.0

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimisation steps of this stage."""
        steps = max(1, math.ceil(self.num_epochs * steps_per_epoch - 1e-9))
        return min(steps, self.max_steps or steps)
