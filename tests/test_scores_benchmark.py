"""The benchmark of scores: its figures by hand, and that it goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import scores
from squad_utils import SpecialIds, Tokens, Windows


def test_calibration_error_by_hand() -> None:
    """In bins of a tenth: two answers are in one bin, two in another."""
    shown, right = np.array([0.2, 0.25, 0.95, 1.0]), np.array([True, False, True, True])
    expected = 100 * (abs(0.45 - 1) + abs(1.95 - 2)) / 4
    assert scores.calibration_error(shown, right) == pytest.approx(expected)


def test_separation_by_hand() -> None:
    """Of 4 pairs, two are in order and one is equal, which counts half."""
    found = scores.separation(np.array([2.0, 5.0]), np.array([2.0, 4.0]))
    assert found == pytest.approx(100 * 2.5 / 4)


@pytest.mark.parametrize("kept", [0, 7, 40, 41, 10_000])
def test_reading_goes_on_after_the_last_whole_window(kept: int, tmp_path: Path) -> None:
    """Whatever a stop has left of the file, the logits are the same, and none is computed twice."""
    count, lengths = 6, [4, 5, 6, 7, 8, 9]
    contexts = Tokens(np.arange(sum(lengths)), np.cumsum([0, *lengths]), None)
    questions = Tokens(np.full(count, 99), np.arange(count + 1), None)
    windows = Windows(
        contexts, questions, np.arange(count), np.arange(count), np.zeros(count, int),
        np.array(lengths), np.zeros(count + 1, int), np.zeros((0, 2), int), SpecialIds(1, 2, 0),
    )  # fmt: skip
    calls: list[int] = []

    def compile_at(length: int) -> Callable[..., tuple[np.ndarray, ...]]:
        def infer(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
            assert batch["input_ids"].shape == (1, length)
            calls.append(length)
            return batch["input_ids"] * 1.5, batch["input_ids"] * 2.5

        return infer

    settings = SimpleNamespace(lengths={"max_seq_length": 20})
    model = SimpleNamespace(compile=compile_at, settings=settings, path="model.onnx")
    path = tmp_path / "logits"
    whole = scores.read_logits(model, windows, str(path))
    assert [part.shape for part in whole] == [(2, length + 4) for length in lengths]
    assert whole[1][0].tolist() == (1.5 * np.array([1, 99, 2, *range(4, 9), 2])).tolist()
    assert set(calls) == {16, 20 if max(lengths) + 4 > 16 else 16}
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    ends = np.cumsum(windows.total_lengths) * 8
    calls.clear()
    again = scores.read_logits(model, windows, str(path))
    assert len(calls) == (ends > kept).sum()
    assert path.read_bytes() == content
    assert all((a == b).all() for a, b in zip(again, whole, strict=True))
