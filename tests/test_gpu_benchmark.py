"""Tests of benchmarks/gpu.py: its counts of operations, and what it measures again."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, gpu_timing
from benchmarks.gpu_timing import TINY, Bench, RandomBatches
from cli import UserError
from tasks.qa import forward
from training.machine import linear_weights


@pytest.fixture
def bench() -> Bench:
    return Bench(argparse.Namespace(dry_run=True), TINY, "cpu", "fp32", {})


def counted(encoder: nn.Module, batch: dict[str, torch.Tensor], backward: bool) -> int:
    """The operations of matrix products that torch counts in a pass."""
    with FlopCounterMode(display=False) as counter:
        states = forward(encoder, batch).last_hidden_state
        if backward:
            states.sum().backward()
    return counter.get_total_flops()


def test_all_windows_have_the_same_length_and_an_answer() -> None:
    batches = RandomBatches(TINY, steps=3, step_size=4)
    steps = batches.steps(0)
    assert [len(step) for step in steps] == [4, 4, 4]
    batch = batches.batch(0, steps[2])
    assert batch["input_ids"].shape == (4, TINY.length)
    assert batch["attention_mask"].all()
    assert set(batches.tokens(steps[2])) == {TINY.length}
    assert (batch["targets"][:, 0] > gpu_timing.QUESTION).all()
    assert (batch["targets"][:, 1] < TINY.length - 1).all()


@pytest.mark.parametrize("factor", [2, 6])
def test_operations_of_a_window_are_those_that_torch_counts(bench: Bench, factor: int) -> None:
    batch = RandomBatches(TINY, 1, 1).batch(0, torch.arange(1).numpy())
    model = bench.student().requires_grad_(True)  # with frozen embeddings one product is left out
    assert counted(model.bert, batch, factor == 6) == gpu_timing.work_of_bert(TINY, factor)


def test_operations_of_a_packed_model_are_those_that_torch_counts(bench: Bench) -> None:
    batch = RandomBatches(TINY, 1, 1).batch(0, torch.arange(1).numpy())
    bert = bench.packed(merged=True).bert
    weights = linear_weights(bert)
    assert counted(bert, batch, backward=True) == gpu_timing.work_of_packed(TINY, weights)


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> dict[str, Any]:
    """A dry run of the parts as they are patched; the figures in its file."""
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "0" if name.startswith("CUDA") else "1")  # and back afterwards
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", f"--output_dir={folder}", *flags])
    gpu.main()
    return json.loads((folder / "gpu.json").read_text())["parts"]


def test_it_goes_on_with_what_is_missing_or_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []

    def works(bench: Bench) -> dict[str, Any]:
        calls.append("works")
        return {"dense_teraflops": 1.0}

    def fails(bench: Bench) -> dict[str, Any]:
        calls.append("fails")
        raise ValueError("no such kernel")

    parts = {"peak": gpu.Part(works, 1), "int8": gpu.Part(fails, 1), "trainer": gpu.Part(works, 1)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    first = run(monkeypatch, tmp_path)
    assert calls == ["works", "fails", "works"]
    assert first["int8"]["error"].endswith("ValueError: no such kernel")
    assert "no such kernel" in (tmp_path / "gpu.md").read_text()
    second = run(monkeypatch, tmp_path)
    assert calls == ["works", "fails", "works", "fails"]
    assert second["trainer"] == first["trainer"]


def test_figures_of_two_machines_are_not_mixed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    part = gpu.Part(lambda bench: {"dense_teraflops": 1.0}, 1)
    monkeypatch.setattr(gpu, "PARTS", {"peak": part})
    run(monkeypatch, tmp_path)
    monkeypatch.setattr(gpu, "describe_machine", lambda args: {"card": "another"})
    with pytest.raises(UserError, match="card another"):
        run(monkeypatch, tmp_path)


def test_it_stops_before_a_part_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    part = gpu.Part(lambda bench: {"dense_teraflops": 1.0}, 1)
    long = gpu.Part(lambda bench: {}, 1e9)
    monkeypatch.setattr(gpu, "PARTS", {"peak": part, "int8": long, "trainer": part})
    assert list(run(monkeypatch, tmp_path, "--minutes=1e6")) == ["peak"]
    assert "int8 takes about" in capfd.readouterr().err
