"""Several processes train what one trains: the same losses, the same weights, the same answers."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from calls import first_questions, last_step, records, started, state_step, states, wait_for
from conftest import command_of, run
from safetensors.torch import load_file

from training import machine

# 2 micro-batches of 4 for each of 2 processes, 4 for one.
FLAGS = (
    "--num_train_epochs=1.3",
    "--max_seq_length_c=256",
    "--doc_stride=128",
    "--per_gpu_train_batch_size=4",
    "--total_train_batch_size=16",
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def in_several(command: list[str], count: int = 2) -> list[str]:
    """The command, launched in so many processes."""
    return [sys.executable, *TORCHRUN, f"--nproc_per_node={count}", *command[1:]]


def windows_of(output_dir: Path) -> int:
    return json.loads((output_dir / "metrics.json").read_text())["counts"]["train_windows"]


# Windows left over for the last step of an epoch: fewer than a micro-batch, so that one process
# has none; two micro-batches of unequal size.
LEFT_OVER = {"one process has none": (1, 4), "uneven": (5, 7)}


@pytest.fixture(scope="module", params=["one process has none", "uneven"])
def data(
    request: pytest.FixtureRequest,
    sample: Path,
    tiny_bert: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with data whose last step of an epoch is incomplete in the way of the name."""
    from transformers import AutoTokenizer

    from squad_utils import load_squad
    from tasks import qa

    folder = tmp_path_factory.mktemp("data")
    first_questions(sample / "dev-v1.1.json", folder / "dev-v1.1.json", 5)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    train = folder / "train-v1.1.json"
    low, high = LEFT_OVER[request.param]
    for count in range(44, 80):  # of five steps an epoch, at least
        first_questions(sample / "train-v1.1.json", train, count)
        windows = qa.make_windows(
            load_squad(str(train), ""), tokenizer, 24, 256, 128, for_training=True
        )
        if low <= len(windows) % 16 <= high:
            return folder
    raise AssertionError("no such number of questions")


@pytest.fixture(scope="module")
def alone(data: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run in one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    done = run(command_of("train_qa", tiny_bert, data, out, *FLAGS))
    assert done.returncode == 0, done.stderr
    return out


# A softmax does not change with a constant that is added to all its inputs, so the gradient of
# these is 0 (in FP64 under 1e-16; all others' is over 1e-7). In FP32 it is rounding, which Adam
# scales up to whole steps: these drift at random and change no answer.
NO_GRADIENT = (
    "qa_outputs.bias",
    "bert.encoder.layer.1.output.LayerNorm.bias",
    "bert.encoder.layer.0.attention.self.key.bias",
    "bert.encoder.layer.1.attention.self.key.bias",
)


def assert_close(output_dir: Path, alone: Path, count: int = 2) -> None:
    """The same training, but for the order in which numbers are summed."""
    mine, theirs = records(output_dir), records(alone)
    assert [(r["step"], "f1" in r) for r in mine] == [(r["step"], "f1" in r) for r in theirs]
    steps = [r["step"] for r in mine if "f1" not in r]
    assert steps == list(range(1, len(steps) + 1))
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == other.keys()
        keys = {"loss", "answer", "learning_rate", "f1", "exact_match"}
        # Padding is that of micro-batches: the same ones, unless a small step is shared by three.
        keys |= {"padding"} if count == 2 else set()
        for key in one.keys() & keys:
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-9), (key, one["step"])
    weights, expected = (load_file(f / "model.safetensors") for f in (output_dir, alone))
    assert weights.keys() == expected.keys()
    for name in weights.keys() - set(NO_GRADIENT):
        difference = (weights[name] - expected[name]).abs().max()
        assert difference < 1e-5, (name, difference)
    predictions, truth = (
        json.loads((folder / "predictions.json").read_text()) for folder in (output_dir, alone)
    )
    assert predictions == truth
    figures, right = (
        json.loads((folder / "metrics.json").read_text()) for folder in (output_dir, alone)
    )
    assert (figures["f1"], figures["exact_match"]) == (right["f1"], right["exact_match"])
    assert (figures["processes"], right["processes"]) == (count, 1)


@pytest.mark.parametrize(
    ("data", "count"), [("one process has none", 2), ("uneven", 3)], indirect=["data"]
)
def test_several_processes_are_as_one(
    count: int, data: Path, alone: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    """Three do not divide a step of 16 windows: one of them takes more than the others."""
    out = tmp_path / "out"
    done = run(in_several(command_of("train_qa", tiny_bert, data, out, *FLAGS), count))
    assert done.returncode == 0, done.stderr
    assert f"on {count} x cpu" in done.stdout
    assert done.stdout.count("after epoch 1:") == 1
    assert_close(out, alone, count)
    assert not (out / "checkpoints").exists() and not (out / ".lock").exists()


@pytest.mark.parametrize("data", ["uneven"], indirect=True)
def test_torchrun_is_stopped_and_goes_on(
    data: Path, alone: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = in_several(command_of("train_qa", tiny_bert, data, out, *FLAGS))
    with started(command) as process:
        wait_for(process, lambda: last_step(out) >= 1)
        os.kill(process.pid, signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert stderr.count("SIGTERM: saved at step") == 1
    assert len(states(out)) == 1
    saved = state_step(out)
    assert f"SIGTERM: saved at step {saved} of" in stderr

    done = run(command)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {saved} of" in done.stdout
    assert_close(out, alone)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What would have taken the place of this process."""
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: calls.append((path, arguments)))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["train_qa.py", "--output_dir=a b", "--seed=3"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    return calls


def test_all_gpus_are_used(executed: list[tuple[str, list[str]]]) -> None:
    assert machine.process_count(no_cuda=False) == 3
    machine.use_all_gpus(no_cuda=False)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    script = ["train_qa.py", "--output_dir=a b", "--seed=3"]
    assert executed == [(sys.executable, [*launch, *script])]


def test_nothing_is_launched_twice_nor_without_need(
    executed: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.use_all_gpus(no_cuda=True)
    assert machine.process_count(no_cuda=True) == 1
    for count in (0, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        machine.use_all_gpus(no_cuda=False)
        assert machine.process_count(no_cuda=False) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    machine.use_all_gpus(no_cuda=False)
    assert machine.process_count(no_cuda=False) == 2
    assert executed == []
