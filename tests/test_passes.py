"""A step's gradient: shares of processes, passes that fit the memory, steps read later."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from calls import records, state_step
from conftest import run_flags
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cli import UserError, run_main
from training import loop, passes
from training.passes import Batches, StepGradient
from training.run import Run


class Rows(Batches):
    """Examples of 1 to 9 tokens, for a model of three weights; three steps an epoch."""

    lengths = np.random.default_rng(0).integers(1, 10, 48)

    def steps(self, epoch: int) -> list[np.ndarray]:
        return list(np.arange(48).reshape(3, 16))

    def tokens(self, chosen: np.ndarray) -> np.ndarray:
        return self.lengths[chosen]

    def batch(self, epoch: int, chosen: np.ndarray) -> dict[str, Tensor]:
        rows = np.random.default_rng(1).normal(size=(48, 3)).astype(np.float32)
        mask = np.arange(9) < self.lengths[chosen][:, None]
        return {
            "x": torch.from_numpy(rows[chosen]),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        }


def square(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"error": model(batch["x"])[:, 0].square()}


@given(
    count=st.integers(1, 48),
    world=st.integers(1, 9),
    size=st.integers(1, 50),
    pass_tokens=st.one_of(st.none(), st.integers(1, 400)),
)
def test_every_batch_size_is_shared_out_whole(
    count: int, world: int, size: int, pass_tokens: int | None
) -> None:
    """On any number of processes each example is in one pass, and no pass is over its limit."""
    found = []
    for rank in range(world):
        accelerator = SimpleNamespace(
            process_index=rank, num_processes=world, device=torch.device("cpu")
        )
        step = StepGradient(accelerator, nn.Linear(3, 1), Rows(), square, size)
        step.pass_tokens = pass_tokens
        mine = step._passes(np.arange(count))
        for examples in mine:
            if pass_tokens is None:
                assert len(examples) <= size
            elif len(examples) > 1:  # rows are as long as a multiple of 8
                longest = -(-Rows.lengths[examples].max() // 8) * 8
                assert len(examples) * longest <= pass_tokens
        found += [int(example) for examples in mine for example in examples]
    assert sorted(found) == list(range(count))


NO_ROOM = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),  # the driver's, for its own needs
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


@pytest.mark.parametrize("no_room", NO_ROOM, ids=["allocator", "driver", "cuBLAS"])
def test_a_pass_without_room_is_halved_and_the_step_is_whole(
    accelerator: Accelerator, capfd: pytest.CaptureFixture, no_room: RuntimeError
) -> None:
    """A card that holds five rows: the gradient is that of a card that holds all."""
    torch.manual_seed(0)
    model, chosen = nn.Linear(3, 1), np.arange(16)
    whole = StepGradient(accelerator, model, Rows(), square, 16)
    losses = whole(0, chosen)
    expected = model.weight.grad.clone()
    model.zero_grad()

    def small(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        result = square(model, batch)
        if small.calls and len(batch["x"]) > 5:  # in the middle of a step
            raise no_room
        small.calls += 1
        return result

    small.calls = 1
    step = StepGradient(accelerator, model, Rows(), small, 16)
    step.pass_tokens = 16 * 16
    found = step(0, chosen)
    assert torch.allclose(found, losses) and torch.allclose(model.weight.grad, expected)
    assert step.pass_tokens < 6 * 16
    assert "memory is full" in capfd.readouterr().err
    step.pass_tokens = 1

    def never(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        raise no_room

    step.loss_function = never
    with pytest.raises(UserError, match="does not hold the training of one example"):
        step(0, chosen)


@pytest.mark.parametrize("no_room", NO_ROOM, ids=["allocator", "driver", "cuBLAS"])
def test_no_room_outside_a_pass_is_one_line(
    capfd: pytest.CaptureFixture, no_room: RuntimeError
) -> None:
    def main() -> None:
        raise no_room

    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    assert stopped.value.code == 2
    assert re.fullmatch("error: the GPU's memory is full[^\n]*\n", capfd.readouterr().err)


def test_another_error_of_the_driver_is_not_taken_for_it() -> None:
    def main() -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    with pytest.raises(torch.AcceleratorError):
        run_main(main)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_before_it_is_read(
    accelerator: Accelerator, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's figures are read steps later: the weights must not have taken the bad one."""
    monkeypatch.setattr(loop.Training, "reads_now", lambda training: training.ends_epoch)
    run = Run(accelerator, run_flags(tmp_path), {}, "new")
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    weights: list[Tensor] = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        weights.append(model.weight.detach().clone())
        error = square(model, batch)["error"]
        if len(weights) == 5:
            error = error * float("nan")
            if what == "gradient":
                error = torch.where(error.isnan(), torch.ones_like(error), error)
        return {"error": error}

    stage = loop.Stage("test", 3, 1e-2, 16, 16)
    with pytest.raises(UserError, match="at step 5 of 9 "):
        loop.train(run, model, stage, Rows(), loss)
    run._lock_file.close()
    assert len(weights) == 6 and model.weight.isfinite().all()
    assert torch.equal(weights[4], weights[5]) and not torch.equal(weights[3], weights[4])
    assert not torch.equal(model.weight, weights[5])  # the step after it is taken
    assert state_step(tmp_path) == 3 and [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4]


def test_steps_that_are_read_together_share_their_time(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step here takes 20 ms, and three are read at once."""
    monkeypatch.setattr(loop.Training, "reads_now", lambda training: training.ends_epoch)
    run = Run(accelerator, run_flags(tmp_path), {}, "new")

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        time.sleep(0.02)
        return square(model, batch)

    stage = loop.Stage("test", 3, 1e-3, 16, 16)
    loop.train(run, nn.Linear(3, 1), stage, Rows(), loss)
    run._lock_file.close()
    found = records(tmp_path)
    assert [r["step"] for r in found] == list(range(1, 10))
    for record in found:  # 16 examples in 20 ms, or more on a busy machine
        assert record["examples_per_second"] < 16 / 0.02
    times = [record["seconds"] for record in found]
    assert times == sorted(times) and times[0] >= 0.02 and times[-1] >= 9 * 0.02
    for record in found:
        expected = record["seconds"] / record["step"] * (9 - record["step"])
        assert record["seconds_left"] == pytest.approx(expected)


def test_pass_tokens_are_those_of_the_processes_they_were_saved_by(
    accelerator: Accelerator,
) -> None:
    step = StepGradient(accelerator, nn.Linear(3, 1), Rows(), square, 4)
    assert step.all_pass_tokens() == [0]
    step.on_gpu = True
    step.set_pass_tokens([640])
    assert step.pass_tokens == 640 and step.all_pass_tokens() == [640]
    step.set_pass_tokens([320, 320])  # of another number of processes: measured anew
    assert step.pass_tokens == 640


def test_a_batch_goes_to_the_device_as_it_is() -> None:
    batch = Rows().batch(0, np.arange(3))
    moved = passes.to_device(batch, torch.device("cpu"))
    assert all(torch.equal(moved[name], tensor) for name, tensor in batch.items())
