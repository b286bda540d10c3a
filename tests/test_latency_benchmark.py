"""Tests of `benchmarks.latency`: its table, and a run with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import latency
from cli import UserError
from deploy import timing
from deploy.timing import WAYS


def row(milliseconds: float) -> dict[str, float]:
    """A file that takes the same time in each way."""
    return dict.fromkeys(WAYS, milliseconds)


def test_factors_are_over_the_first_and_over_fp32() -> None:
    results = {"mine": row(40), "mine, INT8": row(20), "small": row(16), "small, INT8": row(10)}
    results |= {"BERT-large": row(100), "h512": row(10), "h512, INT8": row(4)}
    lines = latency.table(results, dict.fromkeys(results, 1.0)).splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[-1] for line in lines[2:]}
    assert {name: cell.removesuffix(" |") for name, cell in cells.items()} == {
        "mine": "40.0",
        "mine, INT8": "20.0 (2.0 times)",
        "small": "16.0 (2.5 times)",
        "small, INT8": "10.0 (4.0 times, its FP32: 1.60)",
        "BERT-large": "100.0",
        "h512": "10.0 (10.0 times)",
        "h512, INT8": "4.0 (25.0 times, its FP32: 2.50)",
    }


def test_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    base = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(latency, "BASES", {"tiny": {**base, "intermediate_size": 64}})
    compiled = getattr(timing.compiled, "__wrapped__", timing.compiled)  # OpenVINO too
    monkeypatch.setattr(timing, "compiled", compiled)
    packed = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 16}
    monkeypatch.setattr(latency, "SHAPES", {"tiny": ("tiny", None), "h16": ("tiny", packed)})
    file = tmp_path / "latency.json"
    flags = ["--random=tiny,h16", "--rounds=1", f"--json={file}"]
    monkeypatch.setattr("sys.argv", ["latency", *flags])
    latency.main()
    results = json.loads(file.read_text())
    assert list(results) == ["tiny", "tiny, INT8", "h16", "h16, INT8"]
    assert all(list(each) == list(WAYS) and min(each.values()) > 0 for each in results.values())
    sizes = [float(line.split(" | ")[1]) for line in capsys.readouterr().out.splitlines()[-4:]]
    assert sizes[0] > 2 * sizes[1] and sizes[2] > 2 * sizes[3]


def test_unknown_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["latency", "--random=h193"])
    with pytest.raises(UserError, match="--random: 'h193' is none of BERT-small, h192, "):
        latency.main()
