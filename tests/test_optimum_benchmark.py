"""Test of benchmarks/optimum_int8.py: both tools calibrate on the same windows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import command_of
from transformers import AutoTokenizer

import train_qa
from benchmarks.optimum_int8 import calibration_windows
from tasks.qa import QaTask


def test_it_takes_the_windows_that_a_run_of_the_script_takes(
    teacher: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--max_seq_length_q=64", "--max_seq_length_c=384", "--seed=42")
    monkeypatch.setattr("sys.argv", command_of("train_qa", teacher, few, tmp_path, *flags)[1:])
    task = QaTask(train_qa.parse_arguments())
    task.tokenize(AutoTokenizer.from_pretrained(teacher))
    expected = list(task.calibration(4))
    found = list(calibration_windows(str(teacher), str(few / "train-v1.1.json"), 4))
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
