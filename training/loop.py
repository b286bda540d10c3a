"""The training loop that all stages share."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn

from cli import UserError, warn
from training.passes import COUNTS, Batches, LossFunction, StepGradient
from training.progress import Progress
from training.run import Run, summary

RECENT_STEPS = 20  # whose mean loss tells a divergence from a hard batch


DIVERGED = 1.5  # times the mean loss at the last good state


LOWEST_FACTOR = 2.0**-5  # of the learning rate: five returns in a row are enough


READ_SECONDS = 1.0  # between waits for a GPU's figures, to log, to save, to stop


READ_STEPS = 10  # the same where there are several


# ------------------------------------------------------------------------------------------------
# The loop
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
        good: their mean when the last state was saved; before there is one of so many steps, the
            first such mean of the stage.
        factor: of the learning rate, halved at each return.
    """

    recent: list[float] = field(default_factory=list)
    good: float | None = None
    factor: float = 1.0

    def found(self, loss: float) -> bool:
        """Take note of a step's loss; True if it is not finite, or if the mean is far over `good`.

        A mean counts once it is over RECENT_STEPS steps, here and as `good`: a few are a matter of
        luck, and of whether their texts are short or long.
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

    def mark_good(self) -> None:
        """Take the present state as the one to compare with from now on."""
        if len(self.recent) == RECENT_STEPS:
            self.good = sum(self.recent) / RECENT_STEPS


def train(
    run: Run,
    model: nn.Module,
    stage: Stage,
    batches: Batches,
    loss_function: LossFunction,
    evaluate: Callable[[nn.Module], dict[str, Any]] | None = None,
    after_backward: Callable[[], None] | None = None,
    before_step: Callable[[nn.Module, int, np.ndarray], None] | None = None,
    keep: str | None = None,
) -> None:
    """Train `model` in place for a stage, from the newest state of that stage if there is one.

    AdamW (eps 1e-8, no weight decay) over the parameters that require a gradient, gradient norm
    clipped to 1. A step's loss is the mean over all its examples, whatever their number and
    however they are spread over micro-batches and processes.

    Args:
        evaluate: called after each epoch and at the end; its figures are logged.
        before_step: called with the model, the step and the step's examples before its batches
            are made.
        keep: the figure by which the best weights are kept, or None; see Run.note.
        after_backward: called when a step's gradients are there, before they are used.

    Raises:
        UserError: the loss or the gradient is not finite (or, of a stage that goes back, again and
            again); the last state stays as it is.
        Interrupted: Ctrl-C or SIGTERM came; the state has been saved.
    """
    accelerator = run.accelerator
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(
        trained, lr=stage.learning_rate, eps=1e-8, weight_decay=0.0, fused=True
    )
    own_forward = vars(model).get("forward")  # of a model with quantizers
    # Not wrapped for several processes: a step sums its gradient over them once, at its end.
    wrapped = accelerator.prepare_model(model, evaluation_mode=True)
    optimizer = accelerator.prepare_optimizer(adamw)
    wrapped.train()
    steps_per_epoch = len(batches.steps(0))
    total_steps = stage.total_steps(steps_per_epoch)
    gradient = StepGradient(
        accelerator, wrapped, batches, loss_function, stage.micro_batch_size, total_steps
    )
    step, earlier = 0, None
    divergence = Divergence()
    position = run.position()
    if position and position["stage"] == stage.name:
        run.restore()
        step, earlier = position["step"], position["progress"]
        divergence = Divergence(**position["divergence"])
        gradient.set_pass_tokens(position.get("pass_tokens", []))
        where = f" of {stage.name}" if stage.count > 1 else ""
        run.say(f"going on from step {step} of {total_steps}{where}, saved in {run.output_dir}")
    else:
        _start_alike(accelerator, model)
    run.forget_after(stage.name, step)
    progress = Progress(run, stage, step, total_steps, earlier)

    def save() -> bool:
        divergence.mark_good()
        return run.save(
            {
                "stage": stage.name,
                "step": step,
                "progress": progress.state(),
                "divergence": vars(divergence),
                "pass_tokens": gradient.all_pass_tokens(),
            }
        )

    if stage.goes_back and earlier is None:
        save()  # so that there is always a state to go back to
    saved_at = read_at = time.monotonic()
    unread: list[UnreadStep] = []
    epoch_steps: tuple[int, list[np.ndarray]] = (-1, [])
    while True:
        if evaluate and (step == total_steps or (step > 0 and step % steps_per_epoch == 0)):
            progress.pause()
            with _own_forward(model, own_forward):
                figures = evaluate(model)
            record = {"stage": stage.name, "step": step, "epoch": step / steps_per_epoch}
            run.log({**record, "evaluation": True, **figures})
            if keep:
                run.note(model, stage.name, step, figures[keep])
            run.say(f"after epoch {step / steps_per_epoch:.4g}: {summary(figures)}")
            progress.resume()
            wrapped.train()
        if step == total_steps:
            break

        epoch, place = divmod(step, steps_per_epoch)
        if epoch_steps[0] != epoch:
            epoch_steps = epoch, batches.steps(epoch)
        chosen = epoch_steps[1][place]
        learning_rate = stage.learning_rate * stage.schedule(step, total_steps) * divergence.factor
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        if before_step:
            before_step(model, step, chosen)
        losses = gradient(epoch, chosen)
        if after_backward:
            after_backward()
        norm = accelerator.clip_grad_norm_(trained, 1.0)
        if accelerator.scaler is None:  # which skips a step of its own accord
            # Read by the fused optimizer, on the device: it leaves all as it is where this is 1.
            adamw.found_inf = (~(losses.sum() + norm).isfinite()).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=accelerator.device.type == "cpu")
        step += 1
        unread.append(UnreadStep(losses, norm, len(chosen), learning_rate))

        ended = step == total_steps or step % steps_per_epoch == 0
        if not (ended or _reads_now(accelerator, step, read_at)):
            continue
        read_at = time.monotonic()
        first, failed = step - len(unread), None
        for i, (sums, norm) in enumerate(read_steps(unread, gradient.names)):
            # In fp16 an infinite gradient is the scaler's business: it skips the step.
            scaled = accelerator.mixed_precision == "fp16"
            finite = math.isfinite(sums["loss"]) and (scaled or math.isfinite(norm))
            diverged = divergence.found(sums["loss"] if finite else math.nan)
            if not finite or (diverged and stage.goes_back):
                failed = first + i
                break
            progress.advance(sums, (first + i + 1) / steps_per_epoch, unread[i].learning_rate)
        unread = []
        if failed is not None:
            position = run.position()
            if position and position["stage"] == stage.name and position["step"] == failed:
                # The newest state is what has just failed: only one before it can help.
                position = run.position(before=1)
                if position and position["stage"] == stage.name and stage.goes_back:
                    run.drop_newest()
            there = stage.goes_back and position and position["stage"] == stage.name
            if not (there and divergence.factor > LOWEST_FACTOR):
                progress.close()
                saved = run.position()
                kept = f"the state of step {saved['step']}" if saved else "no state yet"
                raise UserError(
                    f"at step {failed + 1} of {total_steps} the loss is {sums['loss']:g} and the"
                    f" gradient norm {norm:g}; {run.output_dir} keeps {kept}."
                    " A smaller --learning_rate or --precision=fp32 may help"
                )
            good = "" if divergence.good is None else f", after {divergence.good:.4g}"
            warn(
                f"{stage.name}: at step {failed + 1} the loss is {sums['loss']:.4g}{good}; going"
                f" back to step {position['step']}, with {divergence.factor / 2:g} of the"
                " learning rate"
            )
            saved = position["divergence"]
            divergence = Divergence(
                recent=saved["recent"],
                good=divergence.good if saved["good"] is None else saved["good"],
                factor=divergence.factor / 2,
            )
            run.restore()
            step = position["step"]
            run.forget_after(stage.name, step)
            progress.go_back(step, position["progress"])
            continue

        due = time.monotonic() - saved_at >= run.save_seconds
        due, stop = _agree(accelerator, due, run.stop_signal)
        if due or stop or ended:
            saved = save()
            saved_at = time.monotonic()
        if stop:
            progress.close()
            run.interrupt(
                stop, f"{'saved' if saved else 'NOT SAVED'} at step {step} of {total_steps}"
            )
    progress.close()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    if own_forward is not None:
        model.forward = own_forward
    # Else `prepare` would take the model for prepared in the next stage, and not cast it.
    vars(model).pop("_is_accelerate_prepared", None)
    accelerator.free_memory()


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


def _reads_now(accelerator: Accelerator, step: int, read_at: float) -> bool:
    """Whether to wait for the figures of the last steps: the CPU runs ahead of a GPU in between."""
    if accelerator.device.type == "cpu":
        return True
    if accelerator.num_processes > 1:  # all at the same step, since they agree on what follows
        return step % READ_STEPS == 0
    return time.monotonic() - read_at >= READ_SECONDS


def _start_alike(accelerator: Accelerator, model: nn.Module) -> None:
    """Give all processes the main one's weights."""
    if accelerator.num_processes > 1:
        for tensor in model.state_dict().values():
            torch.distributed.broadcast(tensor, 0)


@contextlib.contextmanager
def _own_forward(model: nn.Module, own: Any) -> Iterator[None]:
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
