"""Tests of benchmarks/packing.py: its runs, what it runs again, its table."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import call, records

import bert_pack
import pack_and_distill
from benchmarks import packing
from benchmarks.packing import CONFIGURATIONS, EMBEDDINGS, QA
from bert.embedding import BertForEmbedding
from cli import UserError
from tasks import QaTask


def arguments(folder: Path, **others: Any) -> argparse.Namespace:
    values = {"model": "model", "squad_dev_data": "dev.json", "output_dir": str(folder)}
    values |= {"squad_train_data": "train.json"}
    values |= {"passes": 2.0, "seeds": "1,2", "only": None, "jobs": 2, "flags": ""}
    values |= {"pack_cfg": packing.PACK_CFG}
    return argparse.Namespace(**{**values, "minutes": float("inf"), **others})


def test_names_are_found_by_their_parts() -> None:
    assert packing.chosen(None, QA) == list(QA)
    assert packing.chosen("logits 0.1", QA) == ["logits 0.1"]  # not those at a temperature
    assert packing.chosen("the plan of --passes,logits 0.1 at T 4", QA) == [
        "the plan of --passes",
        "logits 0.1 at T 4",
    ]
    assert packing.chosen("0.3 at T", QA) == ["logits 0.3 at T 2", "logits 0.3 at T 4"]
    with pytest.raises(UserError, match="'logit 5' is in no name"):
        packing.chosen("logit 5", QA)
    with pytest.raises(UserError, match="'logits' is in no name; there are embeddings by"):
        packing.chosen("logits", EMBEDDINGS)


def configure(name: str, patch: pytest.MonkeyPatch) -> None:
    """Set the constants of a configuration until `patch` puts them back."""
    for each in ("plan_stages", "PASSES", "OUTPUTS_IN"):
        patch.setattr(pack_and_distill, each, getattr(pack_and_distill, each))
    packing.configure(pack_and_distill, CONFIGURATIONS[name])


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the constants of a configuration until the test ends."""
    return lambda name: configure(name, monkeypatch)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_each_configuration_has_flags_and_stages_that_there_are(
    name: str, configured: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path, only=name, seeds="7")
    (job,) = packing.make_jobs(args, "train.json", CONFIGURATIONS)
    assert repr(name) in job.command[2]
    monkeypatch.setattr("sys.argv", job.command[2:])
    configured(name)
    args = pack_and_distill.parse_arguments()
    assert args.seed == 7 and args.keep == "last"
    final = pack_and_distill.plan_stages(args, 6, QaTask)[-1]
    assert final.stage.name == "final" and final.outputs
    assert (sum(final.weights) == 0) == (name == "logits alone")
    shares = CONFIGURATIONS[name].shares
    cfg = bert_pack.parse_pack_cfg(args.pack_cfg)
    assert (cfg.hidden_size == 192) == ("shape" not in name or "of 192" in name)
    assert cfg.pack_emb and cfg.hidden_act == "orig"
    assert (args.eval_extra_contexts is None) == (name in QA)
    if shares is not None:
        assert sum(shares.values()) == pytest.approx(1)
        epochs = final.stage.num_epochs * (1 + args.extra_pairs)
        assert epochs == pytest.approx(2 * shares["final"])


def test_no_two_configurations_train_alike(tmp_path: Path) -> None:
    """A new default of --passes must not make two of them the same."""
    names: dict[str, str] = {}
    for name, configuration in CONFIGURATIONS.items():
        if configuration.shares is None:
            continue
        (job,) = packing.make_jobs(arguments(tmp_path, only=name, seeds="7"), "", CONFIGURATIONS)
        with pytest.MonkeyPatch.context() as patch:
            configure(name, patch)
            patch.setattr("sys.argv", job.command[2:])
            args = pack_and_distill.parse_arguments()
            plan = pack_and_distill.plan_stages(args, 6, QaTask)
        outputs = (args.logits_weight, args.logits_temperature, args.embedding_weight)
        trained = repr((plan, outputs, args.extra_pairs))
        assert names.setdefault(trained, name) == name


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
    names = packing.chosen(args.only, QA)
    rows: dict[str, Any] = {}
    packing.run_all(args, packing.make_jobs(args, "train.json", QA), rows, path)
    assert ran == [(name, seed) for seed in ("1", "2") for name in names]
    assert json.loads(path.read_text()) == rows
    ran.clear()
    packing.run_all(args, packing.make_jobs(args, "train.json", QA), rows, path)
    assert ran == [("states alone", "2")]
    ran.clear()
    late = arguments(tmp_path, only="states alone", minutes=-1.0)
    packing.run_all(late, packing.make_jobs(late, "train.json", QA), rows, path)
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
        "gops": 2.04,
        "seconds_a_step": 0.5,
        "by_step": [],
    }
    rows = {"states alone": {"1": row}, "logits 1": {"1": row, "2": {**row, "f1": 85.0}}}
    text = packing.table(rows, QA, str(dev), str(tmp_path / "teacher"), str(tmp_path)).splitlines()
    assert text[2].startswith("| states alone | 75.00 | 75.00 | 75.00 | 75.0% (")
    assert text[3] == "| logits 1 | 75.00, 85.00 | 80.00 | 75.00 | 80.0% | 2.04 | 0.500 |"


@pytest.fixture
def embedder(teacher: Path, tmp_path: Path) -> Path:
    """The teacher's encoder with a new pooler."""
    folder = tmp_path / "embedder"
    shutil.copytree(teacher, folder)
    BertForEmbedding.from_pretrained(teacher).save_pretrained(folder)
    return folder


TINY = (
    "--no_cuda --precision=fp32 --max_seq_length_q=24 --max_seq_length_c=160 --doc_stride=64"
    " --pack_start=random --max_steps_per_stage=2 --log_steps=1"
)


def run_one(name: str, model: Path, data: Path, folder: Path) -> dict[str, Any]:
    """The row of a short run in this process, whose folder is in `folder`."""
    args = arguments(
        folder,
        only=name,
        seeds="1",
        model=str(model),
        squad_train_data=str(data / "train-v1.1.json"),
        squad_dev_data=str(data / "dev-v1.1.json"),
        pack_cfg="num_hidden_layers:1,num_attention_heads:2,hidden_size:16",
        flags=TINY,
    )
    (job,) = packing.make_jobs(args, args.squad_train_data, CONFIGURATIONS)
    assert call(["python", "pack_and_distill.py", *job.command[3:]]) == 0
    return packing.figures(job.folder)


@pytest.mark.slow
def test_a_run_of_it(
    teacher: Path, few: Path, configured: Callable[[str], None], tmp_path: Path
) -> None:
    """The logits alone are learned, and what it came to is found."""
    name = "logits alone"
    configured(name)
    row = run_one(name, teacher, few, tmp_path)
    assert [stage for stage, *_ in row["by_step"]] == ["teacher", "packed", "final", "merged"]
    steps = [record for record in records(tmp_path / "logits-alone-1") if "logits" in record]
    assert len(steps) == 2 and all(record["loss"] == record["logits"] > 0 for record in steps)
    dev = str(few / "dev-v1.1.json")
    text = packing.table({name: {"1": row}}, QA, dev, str(teacher), str(tmp_path))
    assert f"| {name} | {row['f1']:.2f} |" in text


@pytest.mark.slow
def test_a_run_of_it_for_embeddings(
    embedder: Path, sample: Path, configured: Callable[[str], None], tmp_path: Path
) -> None:
    """Dev's questions are searched among the contexts of both files."""
    name = "embeddings by final alone"
    configured(name)
    row = run_one(name, embedder, sample, tmp_path)
    assert [stage for stage, *_ in row["by_step"]] == ["teacher", "packed", "final", "merged"]
    assert row["top_5"] == row["by_step"][-1][2]
    metrics = json.loads((tmp_path / "embeddings-by-final-alone-1" / "metrics.json").read_text())
    texts = {
        paragraph["context"]
        for part in ("train", "dev")
        for article in json.loads((sample / f"{part}-v1.1.json").read_text())["data"]
        for paragraph in article["paragraphs"]
    }
    assert metrics["counts"]["dev_contexts"] + metrics["counts"]["extra_contexts"] == len(texts)


def test_the_table_of_embeddings_is_of_top_5(tmp_path: Path) -> None:
    """Before a run has finished too."""
    row = {"top_5": 90.0, "top_1": 80.0, "mrr": 85.0, "teacher_top_5": 96.0, "by_step": []}
    rows = {"embeddings by final alone": {"1": {**row, "gops": 4.72, "seconds_a_step": 0.1}}}
    folder = str(tmp_path)
    lines = [
        "| | top 5 by seed | top 5 | top 1 | MRR | of the teacher's top 5 | GOps | s a step |",
        "|---|---|---|---|---|---|---|---|",
        "| embeddings by final alone | 90.00 | 90.00 | 80.00 | 85.00 | 93.8% | 4.72 | 0.100 |",
    ]
    assert packing.table(rows, EMBEDDINGS, "dev.json", folder, folder).splitlines() == lines
    assert packing.table({}, EMBEDDINGS, "dev.json", folder, folder).splitlines() == lines[:2]
