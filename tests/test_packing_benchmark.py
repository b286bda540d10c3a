"""Tests of benchmarks/packing.py: its runs, what it runs again, its table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import call, records

import pack_and_distill
from benchmarks import packing
from benchmarks.packing import CONFIGURATIONS
from cli import UserError


def arguments(folder: Path, **others: Any) -> argparse.Namespace:
    values = {"model": "model", "squad_dev_data": "dev.json", "output_dir": str(folder)}
    values |= {"passes": 2.0, "seeds": "1,2", "only": None, "jobs": 2, "flags": "", "pack_cfg": ""}
    return argparse.Namespace(**{**values, "minutes": float("inf"), **others})


def test_names_are_found_by_their_parts() -> None:
    assert packing.chosen(None) == list(CONFIGURATIONS)
    assert packing.chosen("logits 0.1") == ["logits 0.1"]  # not those at a temperature
    assert packing.chosen("the plan of --passes,logits 0.1 at T 4") == [
        "the plan of --passes",
        "logits 0.1 at T 4",
    ]
    assert packing.chosen("0.3 at T") == ["logits 0.3 at T 2", "logits 0.3 at T 4"]
    with pytest.raises(UserError, match="'logit 5' is in no name"):
        packing.chosen("logit 5")


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the constants of a configuration until the test ends."""

    def set_constants(name: str) -> None:
        for each in ("plan_stages", "PASSES", "OUTPUTS_IN"):  # to be put back
            monkeypatch.setattr(pack_and_distill, each, getattr(pack_and_distill, each))
        packing.configure(pack_and_distill, CONFIGURATIONS[name])

    return set_constants


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_each_configuration_has_flags_and_stages_that_there_are(
    name: str, configured: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = packing.make_jobs(arguments(tmp_path, only=name, seeds="7"), "train.json")
    assert repr(name) in job.command[2]
    monkeypatch.setattr("sys.argv", job.command[2:])
    configured(name)
    args = pack_and_distill.parse_arguments()
    assert args.seed == 7 and args.keep == "last"
    final = pack_and_distill.plan_stages(args, 6)[-1]
    assert final.stage.name == "final" and final.outputs
    assert (sum(final.weights) == 0) == (name == "logits alone")
    shares = CONFIGURATIONS[name].shares
    if shares is not None:
        assert sum(shares.values()) == pytest.approx(1)
        epochs = final.stage.num_epochs * (1 + args.extra_pairs)
        assert epochs == pytest.approx(2 * shares["final"])


class Process:
    """A run that ends at once."""

    def __init__(self, code: int) -> None:
        self.returncode = code

    def poll(self) -> int:
        return self.returncode


def test_what_has_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that fails is; after the time that is given none starts."""
    ran: list[tuple[str, str]] = []
    fails = {("states alone", "2")}

    def start(job: packing.Job, jobs: int) -> Process:
        ran.append((job.name, job.seed))
        return Process(int((job.name, job.seed) in fails))

    monkeypatch.setattr(packing, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(packing, "start", start)
    monkeypatch.setattr(packing, "figures", lambda folder: {"f1": 50.0})
    args, path = arguments(tmp_path, only="states alone,logits 1"), tmp_path / "packing.json"
    names = packing.chosen(args.only)
    rows: dict[str, Any] = {}
    packing.run_all(args, packing.make_jobs(args, "train.json"), rows, path)
    assert ran == [(name, seed) for seed in ("1", "2") for name in names]
    assert json.loads(path.read_text()) == rows
    ran.clear()
    packing.run_all(args, packing.make_jobs(args, "train.json"), rows, path)
    assert ran == [("states alone", "2")]
    ran.clear()
    late = arguments(tmp_path, only="states alone", minutes=-1.0)
    packing.run_all(late, packing.make_jobs(late, "train.json"), rows, path)
    assert ran == []


def test_a_subset_is_of_whole_articles(sample: Path, tmp_path: Path) -> None:
    path = sample / "train-v1.1.json"
    every = json.loads(path.read_text())["data"]
    found = json.loads(Path(packing.subset(str(path), 30, tmp_path)).read_text())["data"]
    counts = [sum(len(p["qas"]) for p in a["paragraphs"]) for a in found]
    assert all(article in every for article in found) and len(found) < len(every)
    assert sum(counts) >= 30 > sum(counts[:-1])
    assert packing.subset(str(path), None, tmp_path) == str(path)


def test_the_interval_is_of_both_on_the_same_questions() -> None:
    rng = np.random.default_rng(0)
    teacher = rng.random(1000)
    assert packing.interval(0.9 * teacher, teacher) == pytest.approx((90, 90))
    low, high = packing.interval(np.where(rng.random(1000) < 0.9, teacher, 0), teacher)
    assert 86 < low < 89 and 91 < high < 94


def test_the_table_tells_how_much_is_kept(tmp_path: Path) -> None:
    def write(folder: Path, answers: list[str]) -> None:
        folder.mkdir()
        (folder / "predictions.json").write_text(
            json.dumps(dict(zip("abcd", answers, strict=True)))
        )

    qas = [{"id": key, "answers": [{"text": "one"}, {"text": "two words"}]} for key in "abcd"]
    dev = tmp_path / "dev.json"
    dev.write_text(json.dumps({"data": [{"paragraphs": [{"qas": qas}]}]}))
    write(tmp_path / "teacher", ["one"] * 4)
    write(tmp_path / "states-alone-1", ["one", "two words", "one", "none"])
    assert packing.scores(str(dev), tmp_path / "teacher").tolist() == [1, 1, 1, 1]
    assert packing.scores(str(dev), tmp_path / "states-alone-1").tolist() == [1, 1, 1, 0]
    row = {
        "f1": 75.0,
        "exact_match": 75.0,
        "teacher_f1": 100.0,
        "seconds_a_step": 0.5,
        "by_step": [],
    }
    rows = {"states alone": {"1": row}, "logits 1": {"1": row, "2": {**row, "f1": 85.0}}}
    text = packing.table(rows, str(dev), str(tmp_path / "teacher"), str(tmp_path)).splitlines()
    assert text[2].startswith("| states alone | 75.00 | 75.00 | 75.00 | 75.0% (")
    assert text[3] == "| logits 1 | 75.00, 85.00 | 80.00 | 75.00 | 80.0% | 0.500 |"


@pytest.mark.slow
def test_a_run_of_it(
    teacher: Path,
    few: Path,
    configured: Callable[[str], None],
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    """In this process: the logits alone are learned, and what it came to is found."""
    name, data = "logits alone", str(few / "train-v1.1.json")
    tiny = "--no_cuda --precision=fp32 --max_seq_length_q=24 --max_seq_length_c=160 --doc_stride=64"
    args = arguments(
        tmp_path,
        only=name,
        seeds="1",
        model=str(teacher),
        squad_dev_data=str(few / "dev-v1.1.json"),
        pack_cfg="num_hidden_layers:1,num_attention_heads:2,hidden_size:16",
        flags=f"{tiny} --pack_start=random --max_steps_per_stage=2 --log_steps=1",
    )
    (job,) = packing.make_jobs(args, data)
    configured(name)
    command = ["python", "pack_and_distill.py", *job.command[3:]]
    assert call(command) == 0, capfd.readouterr().err
    row = packing.figures(job.folder)
    assert [stage for stage, *_ in row["by_step"]] == ["teacher", "packed", "final", "merged"]
    steps = [record for record in records(job.folder) if "logits" in record]
    assert len(steps) == 2 and all(record["loss"] == record["logits"] > 0 for record in steps)
    text = packing.table({name: {"1": row}}, args.squad_dev_data, args.model, args.output_dir)
    assert f"| {name} | {row['f1']:.2f} |" in text
