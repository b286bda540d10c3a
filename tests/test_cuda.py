"""On a CUDA GPU: every kind of run, losses as on a CPU, going on on another device."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from calls import call, last_step, records, state_step, states
from conftest import command_of
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]

RESUMED = (
    "--dropout=0.1",  # so that the state of the random generators matters
    "--num_train_epochs=3",
    "--total_train_batch_size=4",
    "--per_gpu_train_batch_size=2",
    "--save_minutes=0",
    "--keep=last",
)


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several GPUs a script would start others in the place of this process."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file for --nncf_config."""
    path = tmp_path_factory.mktemp("settings") / "nncf_config.json"
    path.write_text(json.dumps({"model_type": "transformer", "subset_size": 6}))
    return path


def on_gpu(command: list[str]) -> list[str]:
    """A command of conftest.py, all of which are for the CPU, for the GPU."""
    return [flag for flag in command if flag != "--no_cuda"]


def go(command: list[str]) -> int:
    """Run a command in this process on the device that it names, whatever ran before; exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()  # a stopped run's lock is let go with the run
    return call(command)


def stop(command: list[str], output_dir: Path) -> None:
    """Run a command until it has logged three steps, then send it SIGTERM."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            if last_step(output_dir) >= 3:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert go(command) == 128 + signal.SIGTERM
    finally:
        ended.set()
        watcher.join()
    assert states(output_dir) and not (output_dir / "metrics.json").exists()


def check(output_dir: Path, device: str = "cuda", precision: str = "fp32") -> None:
    """The run has finished on the device, with a file that has passed its check."""
    metrics = json.loads((output_dir / "metrics.json").read_text())
    assert metrics["device"] == device
    assert metrics["precision"] == precision
    assert metrics["onnx_check"]["passed"]
    assert (output_dir / "model.onnx").exists()


# ------------------------------------------------------------------------------------------------
# Every kind of run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_question_answering_ends_with_a_checked_file(
    precision: str, tiny_bert: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16 arithmetic")
    out = tmp_path / "out"
    flags = (f"--precision={precision}", "--num_train_epochs=1")
    assert go(on_gpu(command_of("train_qa", tiny_bert, few, out, *flags))) == 0, (
        capfd.readouterr().err
    )
    check(out, precision=precision)


def test_packed_and_quantized_models_end_with_checked_files(
    teacher: Path, few: Path, settings: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    packed, quantized = tmp_path / "packed", tmp_path / "quantized"
    command = command_of("pack_and_distill", teacher, few, packed, "--max_steps_per_stage=2")
    assert go(on_gpu(command)) == 0, capfd.readouterr().err
    check(packed)
    flags = (
        f"--nncf_config={settings}",
        "--supervision_weight=0.02",
        f"--model_teacher={teacher}",
        "--quantizer_epochs=0.5",
        "--num_train_epochs=0.5",
        "--keep=last",
    )
    command = command_of("train_qa", packed, few, quantized, *flags)
    assert go(on_gpu(command)) == 0, capfd.readouterr().err
    check(quantized)
    assert {record["stage"] for record in records(quantized)} >= {"ranges", "weights"}


def test_embeddings_end_with_a_checked_file(
    base: Path, sample: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    flags = ("--loss_cfg=triplet_num:1,in_batch:1", "--num_train_epochs=0.3")
    assert go(on_gpu(command_of("train_qcemb", base, sample, out, *flags))) == 0, (
        capfd.readouterr().err
    )
    check(out)


# ------------------------------------------------------------------------------------------------
# Against the CPU


def losses(output_dir: Path) -> list[float]:
    """The loss of each step, from the first."""
    return [record["loss"] for record in records(output_dir) if "evaluation" not in record]


def test_losses_of_the_first_steps_are_those_of_the_cpu(
    teacher: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    flags = ("--num_train_epochs=1", "--total_train_batch_size=4", "--learning_rate=1e-4")
    found = []
    for device in ("cuda", "cpu"):
        out = tmp_path / device
        command = command_of("train_qa", teacher, few, out, *flags)
        command = on_gpu(command) if device == "cuda" else command
        assert go(command) == 0, capfd.readouterr().err
        check(out, device)
        found.append(losses(out)[:5])
    assert len(set(found[0])) == 5
    assert found[0] == pytest.approx(found[1], rel=1e-3)


# ------------------------------------------------------------------------------------------------
# Stopped, and going on


@pytest.mark.parametrize("flags", [(), ("--dropout=0", "--precision=bf16")])
def test_stopped_on_the_gpu_it_ends_as_if_it_had_not_been(
    flags: tuple[str, ...],
    tiny_bert: Path,
    few: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert go(on_gpu(command_of("train_qa", tiny_bert, few, whole, *RESUMED, *flags))) == 0
    command = on_gpu(command_of("train_qa", tiny_bert, few, out, *RESUMED, *flags))
    stop(command, out)
    saved = state_step(out)
    assert 3 <= saved < len(losses(whole))
    capfd.readouterr()
    assert go(command) == 0
    assert f"going on from step {saved} of" in capfd.readouterr().out
    check(out, precision="bf16" if flags else "fp32")
    assert losses(out) == losses(whole)
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, out))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(("first", "then"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_stopped_on_one_device_it_goes_on_on_the_other(
    first: str, then: str, tiny_bert: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    command = command_of("train_qa", tiny_bert, few, out, *RESUMED)
    commands = {"cpu": command, "cuda": on_gpu(command)}
    stop(commands[first], out)
    saved = state_step(out)
    capfd.readouterr()
    assert go(commands[then]) == 0, capfd.readouterr().err
    assert f"going on from step {saved} of" in capfd.readouterr().out
    check(out, then)
    steps = [record["step"] for record in records(out) if "evaluation" not in record]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > saved
