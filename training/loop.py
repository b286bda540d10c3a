"""The training loop: it takes the steps of a stage, saves states, and goes back if it diverges."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn

from cli import UserError, warn
from int8 import quantizers
from training import machine
from training.passes import COUNTS, Batches, LossFunction, StepGradient
from training.progress import Progress
from training.run import Run, summary
from training.stage import Evaluation, Stage
from training.states import ProgressState

RECENT_STEPS = 20  # the loss is compared as the mean of so many steps
DIVERGED = 1.5  # a run diverges at so many times the mean loss of the last good state
LOWEST_FACTOR = 2.0**-5  # factor of the learning rate after five returns; then the run ends
READ_SECONDS = 1.0  # between two waits for a GPU, to log its figures, to save, to stop
READ_STEPS = 10  # steps between two such waits of several GPUs


@dataclass
class Divergence:
    """Compares the loss with that of the last good state.

    Attributes:
        recent: losses of at most the last RECENT_STEPS steps.
        good: the lowest mean loss at any saved state; before the first, the stage's first mean.
            A trained model's loss rises with the learning rate, which is no divergence. So the
            first mean after the rise takes its place, once. Otherwise it never rises: else a slow
            divergence would raise it at each save.
        factor: of the learning rate, halved at each return.
        full_rate: the highest learning rate so far, without the factor.
        steps_since: steps after the first one at that rate.
    """

    recent: list[float] = field(default_factory=list)
    good: float | None = None
    factor: float = 1.0
    full_rate: float = 0.0
    steps_since: int = 0

    def found(self, loss: float, rate: float) -> bool:
        """Add a step's loss; True if it is not finite, or if the mean is far over `good`.

        Compare only means over RECENT_STEPS steps; shorter ones depend too much on which texts
        came.

        Args:
            rate: the step's learning rate.
        """
        if not math.isfinite(loss):
            return True
        whole_rate = rate / self.factor
        self.steps_since = 0 if whole_rate > self.full_rate else self.steps_since + 1
        self.full_rate = max(self.full_rate, whole_rate)
        self.recent = [*self.recent, loss][-RECENT_STEPS:]
        if len(self.recent) < RECENT_STEPS:
            return False
        mean = sum(self.recent) / RECENT_STEPS
        if self.good is None:
            self.good = mean
        diverged = mean > DIVERGED * self.good
        if self.steps_since == RECENT_STEPS and not diverged:
            self.good = mean
        return diverged

    def mark_good(self) -> None:
        """Compare with the present state from now on, unless an earlier one was better."""
        if len(self.recent) == RECENT_STEPS:
            mean = sum(self.recent) / RECENT_STEPS
            self.good = mean if self.good is None else min(self.good, mean)


class Training:
    """A stage in progress: its optimizer, its position, and the steps it takes.

    Attributes:
        step: optimisation steps done.
        gradient: leaves a step's gradient in the parameters.
        divergence: compares the loss with earlier ones.
        unread: steps whose figures are still on the device.
    """

    def __init__(
        self, run: Run, model: nn.Module, stage: Stage, batches: Batches, loss: LossFunction
    ) -> None:
        """Prepare the optimizer; continue from the newest state if it belongs to this stage."""
        self.run, self.model, self.stage, self.batches = run, model, stage, batches
        self.accelerator = accelerator = run.accelerator
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.adamw = torch.optim.AdamW(
            self.trained, lr=stage.learning_rate, eps=1e-8, weight_decay=0.0, fused=True
        )
        self.own_forward = vars(model).get("forward")  # only a model with quantizers has one
        quantizers.take_relative_steps(self.adamw, model)
        # No wrapper for several processes: each step sums its gradient over them once, at its end.
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
        """Load the newest state if it belongs to this stage; else start alike on all processes."""
        run, stage = self.run, self.stage
        machine.part_generators(self.accelerator)  # before a state restores those it has saved
        earlier: ProgressState | None = None
        position = run.states.position()
        if position and position["stage"] == stage.name:
            run.states.restore()
            self.step, earlier = position["step"], position["progress"]
            self.divergence = Divergence(**position["divergence"])
            self.gradient.set_pass_tokens(position["pass_tokens"])
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
            self.save()  # there must always be a state to go back to

    @property
    def ends_epoch(self) -> bool:
        """Whether the steps done end an epoch, or the stage."""
        return self.step == self.total_steps or (
            self.step > 0 and self.step % self.steps_per_epoch == 0
        )

    def save(self) -> bool:
        """Save a state; False if that fails."""
        self.divergence.mark_good()
        self.saved_at = time.monotonic()
        return self.run.states.save(
            {
                "stage": self.stage.name,
                "step": self.step,
                "progress": self.progress.state(),
                "divergence": asdict(self.divergence),
                "pass_tokens": self.gradient.all_pass_tokens(),
            }
        )

    def evaluate(self, evaluation: Evaluation) -> None:
        """Evaluate the model and log the figures; keep its weights if they are the best so far."""
        run, epoch = self.run, self.step / self.steps_per_epoch
        self.progress.pause()
        with _own_forward(self.model, self.own_forward):
            figures = evaluation(self.model)
        record = {"stage": self.stage.name, "step": self.step, "epoch": epoch}
        run.log({**record, "evaluation": True, **figures})
        if self.stage.keep:
            score = figures[self.stage.keep]
            run.states.keep_if_best(self.model, self.stage.name, self.step, score)
        run.say(f"after epoch {epoch:.4g}: {summary(figures)}")
        self.progress.resume()
        self.model.train()

    def take_step(self) -> None:
        """Take an optimisation step; its figures stay on the device."""
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
        if stage.after_backward:
            stage.after_backward()
        norm = self.accelerator.clip_grad_norm_(self.trained, 1.0)
        if self.accelerator.scaler is None:  # a scaler skips such steps by itself
            # The fused optimizer reads this on the device, and skips the step if it is 1.
            failed = (~(losses.sum() + norm).isfinite()).float()
            self.adamw.found_inf = failed  # type: ignore[attr-defined]  # torch does not declare it
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.gradient.gradients_stay)
        self.step += 1
        self.unread.append(UnreadStep(losses, norm, len(chosen), rate))

    def reads_now(self) -> bool:
        """Whether to wait for the figures of the last steps; between two waits a GPU runs ahead."""
        if self.ends_epoch or self.accelerator.device.type == "cpu":
            return True
        if self.accelerator.num_processes > 1:  # they exchange figures, so they stop at one step
            return self.step % READ_STEPS == 0
        return time.monotonic() - self.read_at >= READ_SECONDS

    def read(self) -> bool:
        """Log the figures of the unread steps; False if a step failed and the stage went back.

        Raises:
            UserError: a step failed, and the stage cannot go back, or went back too often.
        """
        self.read_at, unread, self.unread = time.monotonic(), self.unread, []
        first = self.step - len(unread)
        # In fp16 the scaler skips a step with an infinite gradient.
        scaled = self.accelerator.mixed_precision == "fp16"
        for i, (sums, norm) in enumerate(read_steps(unread, self.gradient.names)):
            finite = math.isfinite(sums["loss"]) and (scaled or math.isfinite(norm))
            loss = sums["loss"] if finite else math.nan
            diverged = self.divergence.found(loss, unread[i].learning_rate)
            if not finite or (diverged and self.stage.goes_back):
                self._go_back(first + i, sums["loss"], norm)
                return False
            epoch = (first + i + 1) / self.steps_per_epoch
            later = len(unread) - i - 1
            self.progress.advance(sums, epoch, unread[i].learning_rate, later)
        return True

    def _go_back(self, failed: int, loss: float, norm: float) -> None:
        """Return to the last good state before the step `failed`, with half the learning rate.

        Raises:
            UserError: there is no such state, the stage does not go back, or it did so too often.
        """
        run, stage = self.run, self.stage
        position = run.states.position()
        if position and position["stage"] == stage.name and position["step"] == failed:
            # The step from the newest state failed: only an earlier state can help.
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
        then = Divergence(**position["divergence"])
        # Cap the losses that led here: else they would fail the very next step.
        recent = [loss if then.good is None else min(loss, then.good) for loss in then.recent]
        self.divergence = replace(then, recent=recent, factor=factor)
        run.states.restore()
        self.step = position["step"]
        run.forget_after(stage.name, self.step)
        self.progress.go_back(self.step, position["progress"])

    def close(self) -> None:
        """Undo what accelerate changed in the model, for the next stage."""
        self.progress.close()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.own_forward is not None:
            self.model.forward = self.own_forward
        # Else `prepare_model` would not cast the model in the next stage.
        vars(self.model).pop("_is_accelerate_prepared", None)
        self.accelerator.free_memory()


def train(
    run: Run,
    model: nn.Module,
    stage: Stage,
    batches: Batches,
    loss: LossFunction,
    evaluation: Evaluation | None = None,
) -> None:
    """Train `model` in place for a stage, from the newest state of that stage if there is one.

    AdamW (eps 1e-8, no weight decay) updates the parameters that require a gradient; the gradient
    norm is clipped to 1. A step's loss is the mean over all its examples, however they are spread
    over passes and processes.

    Args:
        evaluation: called after each epoch and at the end; its figures are logged.

    Raises:
        UserError: the loss or the gradient is not finite (again and again, if the stage goes
            back); the last state is kept.
        Interrupted: Ctrl-C or SIGTERM came; the state has been saved.
    """
    training = Training(run, model, stage, batches, loss)
    while True:
        if evaluation and training.ends_epoch:
            training.evaluate(evaluation)
        if training.step == training.total_steps:
            break
        training.take_step()
        if not training.reads_now() or not training.read():
            continue
        due = time.monotonic() - training.saved_at >= 60 * run.args.save_minutes
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
    """A step whose figures may still be on the device.

    Attributes:
        losses: float64, as `StepGradient` returns them.
        norm: the gradient's norm.
    """

    losses: Tensor
    norm: Tensor
    examples: int
    learning_rate: float


def read_steps(steps: list[UnreadStep], names: list[str]) -> list[tuple[dict[str, float], float]]:
    """Read the figures of several steps with one wait for the device.

    Returns:
        per step: the mean of each named loss, their sum "loss", and the counts; the gradient norm.
    """
    rows = torch.stack([torch.cat([each.losses, each.norm.double()[None]]) for each in steps])
    read = []
    for each, (*values, norm) in zip(steps, rows.tolist(), strict=True):
        sums = dict(zip(names, values, strict=True))
        sums["loss"] = sum(value for name, value in sums.items() if name not in COUNTS)
        read.append(({**sums, "examples": float(each.examples)}, norm))
    return read


@contextlib.contextmanager
def _own_forward(model: nn.Module, own: Callable[..., object] | None) -> Iterator[None]:
    """Take accelerate's casts off the model's forward: an evaluation chooses its own precision.

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
    """Agree on one decision: save when the main process says so, stop when any is asked to."""
    if accelerator.num_processes == 1:
        return due, stop
    wish = torch.tensor([float(due and accelerator.is_main_process), float(stop)])
    wishes = accelerator.gather(wish.to(accelerator.device)[None])
    due, stop = wishes.amax(dim=0).tolist()
    return bool(due), int(stop)
