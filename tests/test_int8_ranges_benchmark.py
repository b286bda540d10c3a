"""Tests of benchmarks/int8_ranges.py: its settings, its commands, its table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from calls import call
from conftest import FLAGS, command_of

import train_qa
from benchmarks import int8_ranges
from cli import UserError
from int8.settings import read_nncf_config


def arguments(model: Path, **others: str) -> argparse.Namespace:
    values = {"models": str(model), "squad_train_data": "train.json", "squad_dev_data": "dev.json"}
    values |= {"settings": ",".join(int8_ranges.SETTINGS), "seeds": "1,2", "flags": "", **others}
    values["nncf_config"] = str(int8_ranges.ROOT / "nncf_config.json")
    return argparse.Namespace(
        **values, questions=None, ranges=0.25, weights=0.5, learning_rate=1e-4
    )


def test_each_variant_is_a_run_of_the_script_with_settings_that_there_are(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = int8_ranges.make_jobs(arguments(teacher), tmp_path)
    assert len({job.folder for job in jobs}) == len(jobs) == 2 * len(int8_ranges.SETTINGS)
    for job in jobs:
        monkeypatch.setattr("sys.argv", job.command[2:])
        args = train_qa.parse_arguments()
        assert args.max_drop == 100 and args.num_train_epochs == 0.5
        assert not read_nncf_config(args.nncf_config).without_effect
    with pytest.raises(UserError, match="'half' is none of given"):
        int8_ranges.make_jobs(arguments(teacher, settings="half"), tmp_path)


def test_the_table_tells_each_phase_the_least_gain_and_its_error(tmp_path: Path) -> None:
    """FP32 answers two of four questions right, a run one of these and a third: gains 0 0 -1 1.
    The folder of the second run is gone."""
    texts = ["one", "two", "six", "ten"]
    qas = [{"id": text, "answers": [{"text": text}]} for text in texts]
    dev, model = tmp_path / "dev.json", tmp_path / "model"
    dev.write_text(json.dumps({"data": [{"paragraphs": [{"qas": qas}]}]}))
    named = {"arguments": {"squad_dev_data": str(dev), "model_student": str(model)}}
    for folder, right in ((model, {"one", "six"}), (tmp_path / "reader-given-1", {"one", "ten"})):
        folder.mkdir()
        answers = {text: text if text in right else "no" for text in texts}
        (folder / "predictions.json").write_text(json.dumps(answers))
        (folder / "metrics.json").write_text(json.dumps(named))

    def run(*scores: float) -> dict[str, dict[str, dict[str, float]]]:
        phases = zip(int8_ranges.PHASES, scores, strict=False)
        return {"phases": {phase: {"f1": score} for phase, score in phases}}

    rows = {"reader, given": {"1": run(70, 69, 69.5, 69.2), "2": run(70, 68, 69.5, 70.5)}}
    error = f"{100 * 0.5**0.5 / 4**0.5:.2f}"  # of a mean over 4 questions
    assert int8_ranges.table(rows, ("f1", "mrr"), tmp_path).splitlines()[-1] == (
        f"| reader, given | 70.00 | 69.00, 68.00 | 69.50, 69.50 | 69.20, 70.50 | +0.20 | {error} |"
    )


@pytest.mark.slow
def test_a_run_of_it(teacher: Path, few: Path, tmp_path: Path) -> None:
    """The row is that of metrics.json, by phases."""
    args = arguments(teacher, settings="given", seeds="1", flags=" ".join(FLAGS))
    (job,) = int8_ranges.make_jobs(args, tmp_path)
    small = tmp_path / "small.json"
    small.write_text(json.dumps({"model_type": "transformer", "subset_size": 4}))
    flags = [*job.command[3:], f"--nncf_config={small}"]
    assert call(command_of("train_qa", teacher, few, job.folder, *flags[4:])) == 0
    row = int8_ranges.figures(job.folder)
    assert list(row["phases"]) == list(int8_ranges.PHASES)
    assert row["f1"] == row["phases"]["weights"]["f1"]
    assert row["phases"]["ranges"]["steps"] > 0
