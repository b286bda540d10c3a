"""The training loop that all stages share."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn

from cli import UserError, warn
from training import machine
from training.passes import COUNTS, Batches, LossFunction, StepGradient
from training.progress import Progress
from training.run import Run, summary
from training.states import DivergenceState, ProgressState

RECENT_STEPS = 20  # whose mean loss tells a divergence from a hard batch
DIVERGED = 1.5  # times the mean loss at the last good state
LOWEST_FACTOR = 2.0**-5  # of the learning rate: five returns in a row are enough
READ_SECONDS = 1.0  # between waits for a GPU's figures, to log, to save, to stop
READ_STEPS = 10  # the same where there are several


def linear_decay(step: int, total: int) -> float:
    """Factor of the learning rate: 1 at the start of a stage, 0 at its end."""
    return 1.0 - step / total


def constant_rate(step: int, total: int) -> float:
    """Factor of the learning rate: always 1."""
    return 1.0


def warm_up(step: int, total: int, steps: int | None = None) -> float:
    """Factor of the learning rate: rising over `steps` steps, or the first 1% of all; then 1."""
    return min(1.0, (step + 1) / (steps or max(1.0, total / 100)))


def warm_up_linear_decay(step: int, total: int, steps: int | None = None) -> float:
    """Factor of the learning rate: a warm-up as above, and a fall to 0 all along."""
    return warm_up(step, total, steps) * linear_decay(step, total)


class Evaluation(Protocol):
    """The figures of a model on the dev file, in percent."""

    def __call__(self, model: nn.Module, fp32: bool = False) -> dict[str, float]:
        """`fp32`: compute in FP32 whatever the run's precision is."""


@dataclass(frozen=True)
class Stage:
    """How long and how fast one stage trains.

    Attributes:
        num_epochs: may be a fraction.
        total_batch_size: examples of one optimisation step.
        micro_batch_size: examples of one forward pass of one process.
        schedule: factor of the learning rate at a step of so many.
        max_steps: an end before num_epochs, or None.
        goes_back: whether a diverging run goes back to its last good state, with half the
            learning rate, instead of stopping.
        number, count: this stage's place among those of the run.
        work_after: work of the stages after it, in steps of this one, to tell the time left.
    """

    name: str
    num_epochs: float
    learning_rate: float
    total_batch_size: int
    micro_batch_size: int
    schedule: Callable[[int, int], float] = linear_decay
    max_steps: int | None = None
    goes_back: bool = False
    number: int = 1
    count: int = 1
    work_after: float = 0.0

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimisation steps of this stage."""
        steps = max(1, math.ceil(self.num_epochs * steps_per_epoch - 1e-9))
        return min(steps, self.max_steps or steps)


@dataclass
class Divergence:
    """Whether the loss still is what it was at the last good state, or near it.

    Attributes:
        recent: losses of the last RECENT_STEPS steps at most.
        good: the lowest of their means at the states saved so far; before the first, the first
            mean of the stage. It never rises: else a slow divergence would raise it at every save.
        factor: of the learning rate, halved at each return.
    """

    recent: list[float] = field(default_factory=list)
    good: float | None = None
    factor: float = 1.0

    def found(self, loss: float) -> bool:
        """Take note of a step's loss; True if it is not finite, or if the mean is far over `good`.

        Only means over RECENT_STEPS steps are compared: shorter ones depend too much on which
        texts came.
        """
        if not math.isfinite(loss):
            return True
        self.recent = [*self.recent, loss][-RECENT_STEPS:]
        if len(self.recent) < RECENT_STEPS:
            return False
        mean = sum(self.recent) / RECENT_STEPS
        if self.good is None:
            self.good = mean
        return mean > DIVERGED * self.good

    def state(self) -> DivergenceState:
        """Its fields, for a saved state."""
        return {"recent": self.recent, "good": self.good, "factor": self.factor}

    def mark_good(self) -> None:
        """Compare with the present state from now on, if none before it was better."""
        if len(self.recent) == RECENT_STEPS:
            mean = sum(self.recent) / RECENT_STEPS
            self.good = mean if self.good is None else min(self.good, mean)


class Training:
    """A stage under way: what its steps need, and where it is.

    Attributes:
        step: optimisation steps done.
        gradient: leaves a step's gradient in the parameters.
        divergence: whether the loss is still what it was.
        unread: steps whose figures are still on the device.
    """

    def __init__(
        self, run: Run, model: nn.Module, stage: Stage, batches: Batches, loss: LossFunction
    ) -> None:
        """Prepare the optimizer, and go on from the newest state if it is of this stage."""
        self.run, self.model, self.stage, self.batches = run, model, stage, batches
        self.accelerator = accelerator = run.accelerator
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.adamw = torch.optim.AdamW(
            self.trained, lr=stage.learning_rate, eps=1e-8, weight_decay=0.0, fused=True
        )
        self.own_forward = vars(model).get("forward")  # of a model with quantizers
        # Not wrapped for several processes: a step sums its gradient over them once, at its end.
        accelerator.prepare_model(model, evaluation_mode=True)
        self.optimizer = accelerator.prepare_optimizer(self.adamw)
        model.train()
        self.steps_per_epoch = len(batches.steps(0))
        self.total_steps = stage.total_steps(self.steps_per_epoch)
        self.gradient = StepGradient(
            accelerator, model, batches, loss, stage.micro_batch_size, self.total_steps
        )
        self.step, self.divergence = 0, Divergence()
        self.unread: list[UnreadStep] = []
        self.epoch_steps: tuple[int, list[np.ndarray]] = (-1, [])
        self.saved_at = self.read_at = time.monotonic()
        self._resume()

    def _resume(self) -> None:
        """Take up the newest state if it is of this stage; else start alike on all processes."""
        run, stage = self.run, self.stage
        machine.part_generators(self.accelerator)  # a state has those of the processes that it had
        earlier: ProgressState | None = None
        position = run.states.position()
        if position and position["stage"] == stage.name:
            run.states.restore()
            self.step, earlier = position["step"], position["progress"]
            self.divergence = Divergence(**position["divergence"])
            self.gradient.set_pass_tokens(position.get("pass_tokens", []))
            where = f" of {stage.name}" if stage.count > 1 else ""
            run.say(
                f"going on from step {self.step} of {self.total_steps}{where}, saved in"
                f" {run.output_dir}"
            )
        elif self.accelerator.num_processes > 1:
            for tensor in self.model.state_dict().values():
                torch.distributed.broadcast(tensor, 0)
        run.forget_after(stage.name, self.step)
        self.progress = Progress(run, stage, self.step, self.total_steps, earlier)
        if stage.goes_back and earlier is None:
            self.save()  # so that there is always a state to go back to

    @property
    def ends_epoch(self) -> bool:
        """Whether the steps done end an epoch, or the stage."""
        return self.step == self.total_steps or (
            self.step > 0 and self.step % self.steps_per_epoch == 0
        )

    def save(self) -> bool:
        """Save a state; False where that fails."""
        self.divergence.mark_good()
        self.saved_at = time.monotonic()
        return self.run.states.save(
            {
                "stage": self.stage.name,
                "step": self.step,
                "progress": self.progress.state(),
                "divergence": self.divergence.state(),
                "pass_tokens": self.gradient.all_pass_tokens(),
            }
        )

    def evaluate(self, evaluation: Evaluation, keep: str | None) -> None:
        """Log the figures of the model as it is; keep its weights if they are the best."""
        run, epoch = self.run, self.step / self.steps_per_epoch
        self.progress.pause()
        with _own_forward(self.model, self.own_forward):
            figures = evaluation(self.model)
        record = {"stage": self.stage.name, "step": self.step, "epoch": epoch}
        run.log({**record, "evaluation": True, **figures})
        if keep:
            run.states.keep_if_best(self.model, self.stage.name, self.step, figures[keep])
        run.say(f"after epoch {epoch:.4g}: {summary(figures)}")
        self.progress.resume()
        self.model.train()

    def take_step(self, after_backward: Callable[[], None] | None) -> None:
        """One optimisation step; its figures stay on the device."""
        stage, step = self.stage, self.step
        epoch, place = divmod(step, self.steps_per_epoch)
        if self.epoch_steps[0] != epoch:
            self.epoch_steps = epoch, self.batches.steps(epoch)
        chosen = self.epoch_steps[1][place]
        rate = stage.learning_rate * stage.schedule(step, self.total_steps) * self.divergence.factor
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.batches.prepare(self.model, step, chosen)
        losses = self.gradient(epoch, chosen)
        if after_backward:
            after_backward()
        norm = self.accelerator.clip_grad_norm_(self.trained, 1.0)
        if self.accelerator.scaler is None:  # which skips a step of its own accord
            # Read by the fused optimizer, on the device: it leaves all as it is where this is 1.
            failed = (~(losses.sum() + norm).isfinite()).float()
            self.adamw.found_inf = failed  # type: ignore[attr-defined]  # torch does not tell
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.gradient.gradients_stay)
        self.step += 1
        self.unread.append(UnreadStep(losses, norm, len(chosen), rate))

    def reads_now(self) -> bool:
        """Whether to wait for the figures of the last steps: a GPU is let run ahead in between."""
        if self.ends_epoch or self.accelerator.device.type == "cpu":
            return True
        if self.accelerator.num_processes > 1:  # all at the same step, since they agree next
            return self.step % READ_STEPS == 0
        return time.monotonic() - self.read_at >= READ_SECONDS

    def read(self) -> bool:
        """Log the figures of the unread steps; False if one failed and the stage went back.

        Raises:
            UserError: one failed, and the stage does not go back, or not any further.
        """
        self.read_at, unread, self.unread = time.monotonic(), self.unread, []
        first = self.step - len(unread)
        # In fp16 an infinite gradient is the scaler's business: it skips the step.
        scaled = self.accelerator.mixed_precision == "fp16"
        for i, (sums, norm) in enumerate(read_steps(unread, self.gradient.names)):
            finite = math.isfinite(sums["loss"]) and (scaled or math.isfinite(norm))
            diverged = self.divergence.found(sums["loss"] if finite else math.nan)
            if not finite or (diverged and self.stage.goes_back):
                self._go_back(first + i, sums["loss"], norm)
                return False
            epoch = (first + i + 1) / self.steps_per_epoch
            self.progress.advance(sums, epoch, unread[i].learning_rate)
        return True

    def _go_back(self, failed: int, loss: float, norm: float) -> None:
        """To the last good state before the step `failed`, with half the learning rate.

        Raises:
            UserError: there is none, it is not to be, or it has been done often enough.
        """
        run, stage = self.run, self.stage
        position = run.states.position()
        if position and position["stage"] == stage.name and position["step"] == failed:
            # The newest state is what has just failed: only one before it can help.
            position = run.states.position(before=1)
            if position and position["stage"] == stage.name and stage.goes_back:
                run.states.drop_newest()
        there = stage.goes_back and position and position["stage"] == stage.name
        if not position or not there or self.divergence.factor <= LOWEST_FACTOR:
            self.progress.close()
            saved = run.states.position()
            kept = f"the state of step {saved['step']}" if saved else "no state yet"
            raise UserError(
                f"at step {failed + 1} of {self.total_steps} the loss is {loss:g} and the"
                f" gradient norm {norm:g}; {run.output_dir} keeps {kept}."
                " A smaller --learning_rate or --precision=fp32 may help"
            )
        good, factor = self.divergence.good, self.divergence.factor / 2
        after = "" if good is None else f", after {good:.4g}"
        warn(
            f"{stage.name}: at step {failed + 1} the loss is {loss:.4g}{after}; going back to step"
            f" {position['step']}, with {factor:g} of the learning rate"
        )
        then = position["divergence"]
        good = good if then["good"] is None else then["good"]
        # What led here is forgiven: else the next step alone would be judged by it.
        most = math.inf if good is None else good
        recent = [min(loss, most) for loss in then["recent"]]
        self.divergence = Divergence(recent=recent, good=good, factor=factor)
        run.states.restore()
        self.step = position["step"]
        run.forget_after(stage.name, self.step)
        self.progress.go_back(self.step, position["progress"])

    def close(self) -> None:
        """Give the model back as it was, for the next stage."""
        self.progress.close()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.own_forward is not None:
            self.model.forward = self.own_forward
        # Else `prepare` would take the model for prepared in the next stage, and not cast it.
        vars(self.model).pop("_is_accelerate_prepared", None)
        self.accelerator.free_memory()


def train(
    run: Run,
    model: nn.Module,
    stage: Stage,
    batches: Batches,
    loss: LossFunction,
    evaluation: Evaluation | None = None,
    after_backward: Callable[[], None] | None = None,
    keep: str | None = None,
) -> None:
    """Train `model` in place for a stage, from the newest state of that stage if there is one.

    AdamW (eps 1e-8, no weight decay) over the parameters that require a gradient, gradient norm
    clipped to 1. A step's loss is the mean over all its examples, whatever their number and
    however they are spread over micro-batches and processes.

    Args:
        evaluation: called after each epoch and at the end; its figures are logged.
        after_backward: called when a step's gradients are there, before they are used.
        keep: the figure by which the best weights are kept, or None; see States.keep_if_best.

    Raises:
        UserError: the loss or the gradient is not finite (or, of a stage that goes back, again and
            again); the last state stays as it is.
        Interrupted: Ctrl-C or SIGTERM came; the state has been saved.
    """
    training = Training(run, model, stage, batches, loss)
    while True:
        if evaluation and training.ends_epoch:
            training.evaluate(evaluation, keep)
        if training.step == training.total_steps:
            break
        training.take_step(after_backward)
        if not training.reads_now() or not training.read():
            continue
        due = time.monotonic() - training.saved_at >= run.save_seconds
        due, stop = _agree(run.accelerator, due, run.stop_signal)
        if due or stop or training.ends_epoch:
            saved = training.save()
        if stop:
            training.progress.close()
            word = "saved" if saved else "NOT SAVED"
            run.interrupt(stop, f"{word} at step {training.step} of {training.total_steps}")
    training.close()


@dataclass(frozen=True)
class UnreadStep:
    """A step whose figures may still be on their way from the device.

    Attributes:
        losses: float64, as `StepGradient` returns them.
        norm: of the gradient.
    """

    losses: Tensor
    norm: Tensor
    examples: int
    learning_rate: float


def read_steps(steps: list[UnreadStep], names: list[str]) -> list[tuple[dict[str, float], float]]:
    """The mean of each named loss, of their sum ("loss") and the counts of each step, and the norm
    of its gradient; waits for the device once."""
    rows = torch.stack([torch.cat([each.losses, each.norm.double()[None]]) for each in steps])
    read = []
    for each, (*values, norm) in zip(steps, rows.tolist(), strict=True):
        sums = dict(zip(names, values, strict=True))
        sums["loss"] = sum(value for name, value in sums.items() if name not in COUNTS)
        read.append(({**sums, "examples": float(each.examples)}, norm))
    return read


@contextlib.contextmanager
def _own_forward(model: nn.Module, own: Callable[..., object] | None) -> Iterator[None]:
    """The model without accelerate's casts around its forward: an evaluation has its own precision.

    Args:
        own: the forward that the model itself had as an attribute, or None.
    """
    cast = vars(model).pop("forward", None)
    if own is not None:
        model.forward = own
    try:
        yield
    finally:
        if cast is not None:
            model.forward = cast


def _agree(accelerator: Accelerator, due: bool, stop: int) -> tuple[bool, int]:
    """One decision for all processes: save when the main one says so, stop when any is asked."""
    if accelerator.num_processes == 1:
        return due, stop
    wish = torch.tensor([float(due and accelerator.is_main_process), float(stop)])
    wishes = accelerator.gather(wish.to(accelerator.device)[None])
    due, stop = wishes.amax(dim=0).tolist()
    return bool(due), int(stop)
