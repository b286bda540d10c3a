"""Windows of other paragraphs beside each question: which they are, and training with them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from calls import call, error_line, last_step, records, run_in_two, started, wait_for
from conftest import command_of
from transformers import BertForQuestionAnswering, BertTokenizerFast

import squad_utils
from bert.attention import fuse_attention
from squad_utils import SquadData, Windows
from tasks import negatives, qa
from tasks.negatives import GroupBatches
from training.passes import StepGradient

COUNT = 2  # windows of other paragraphs in these tests


@pytest.fixture(scope="module")
def data(sample: Path) -> SquadData:
    return squad_utils.load_squad(str(sample / "train-v1.1.json"), "--squad_train_data")


@pytest.fixture(scope="module")
def windows(tiny_bert: Path, data: SquadData) -> Windows:
    tokenizer = BertTokenizerFast.from_pretrained(tiny_bert)
    return qa.make_windows(data, tokenizer, 16, 64, 16, for_training=True)


@pytest.fixture(scope="module")
def batches(data: SquadData, windows: Windows) -> GroupBatches:
    ranked = negatives.rank_by_words(windows, 20)
    chosen = negatives.without_answers(data, ranked, COUNT)
    return GroupBatches(windows, chosen, 64 - 3 - windows.questions.lengths, 4, seed=0)


# ------------------------------------------------------------------------------------------------
# Paragraphs


def test_paragraphs_with_the_answers_text_are_left_out(tmp_path: Path) -> None:
    """In any case and white space, and inside words; the answers outside the context count too."""
    texts = ["it is New  york", "new\nYORK city", "renew yorkers", "the old york", "the old new"]
    asked = {"question": "?", "answers": [{"text": "New  york", "answer_start": 6}]}
    lost = {"question": "?", "answers": [{"text": "old", "answer_start": 0}]}
    qas = [{**asked, "id": "a"}, {**lost, "id": "b"}, {"question": "?", "id": "c", "answers": []}]
    paragraphs = [{"context": text, "qas": []} for text in texts]
    paragraphs[0]["qas"] = qas
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    data = squad_utils.load_squad(str(path), "--squad_train_data")
    ranked = np.array([[1, 4, 0, 2, 3], [3, 2, 4, 1, 0], [0, 1, 2, 3, 4]])
    kept = negatives.without_answers(data, ranked, 3)
    assert kept.tolist() == [[4, 3, -1], [2, 1, 0], [-1, -1, -1]]


def test_words_rank_the_right_paragraph_high(data: SquadData, windows: Windows) -> None:
    ranked = negatives.rank_by_words(windows, 5)
    assert ranked.shape == (len(data.ids), 5)
    own = np.array([data.contexts[i] for i in data.context_of])
    found = [text in [data.contexts[i] for i in row] for row, text in zip(ranked, own, strict=True)]
    assert np.mean(found) > 0.6


def test_vectors_rank_by_distance(data: SquadData) -> None:
    """By vectors of any length: that of the number of a text's letters, and its square."""

    def one_by_one(texts: list[str], max_length: int, _: str) -> list[tuple[int, np.ndarray]]:
        vectors = [np.array([len(text), len(text) ** 2], np.float64) / 1e3 for text in texts]
        return list(enumerate(vectors))[::-1]

    embedder = SimpleNamespace(one_by_one=one_by_one, max_seq_length_c=9, max_seq_length_q=9)
    ranked = negatives.rank_by_vectors(data, 3, embedder)
    lengths = np.array([len(text) for text in data.contexts], np.float64)
    for row, question in zip(ranked, data.questions, strict=True):
        gaps = np.hypot(lengths - len(question), lengths**2 - len(question) ** 2)
        assert gaps[row].tolist() == pytest.approx(np.sort(gaps)[:3].tolist())


# ------------------------------------------------------------------------------------------------
# Groups


def test_a_group_holds_a_questions_windows_and_others_without_its_answer(
    data: SquadData, windows: Windows, batches: GroupBatches
) -> None:
    targets = squad_utils.targets(windows, np.random.default_rng([0, 3, 1]))
    every = np.concatenate(batches.steps(3))
    assert sorted(every) == list(range(len(np.unique(windows.question))))
    assert np.bincount(windows.question).max() > 2  # some questions have several windows
    for example in every:
        batch = batches.batch(3, np.array([example]))
        mine = np.flatnonzero(windows.question == np.unique(windows.question)[example])
        question = windows.question[mine[0]]
        own = squad_utils.make_batch(windows, mine)["input_ids"]
        assert len(batch["targets"]) == len(mine) + COUNT
        assert batch["groups"].tolist() == [list(range(len(mine) + COUNT))]
        assert batch["input_ids"][: len(mine), : own.shape[1]].tolist() == own.tolist()
        assert batch["targets"].tolist() == targets[mine].tolist() + [[0, 0]] * COUNT
        assert batch["attention_mask"].sum(dim=1).max() * len(batch["targets"]) == int(
            batches.tokens(np.array([example]))[0]
        )
        for first, last in windows.answer_tokens[slice(*windows.answer_bounds[question:][:2])]:
            context = windows.contexts.of(windows.context_of[question])
            answer = windows.contexts.ids[context][first : last + 1].tolist()
            for row in batch["input_ids"][len(mine) :].tolist():
                assert not any(row[i : i + len(answer)] == answer for i in range(len(row)))


def test_groups_of_other_sizes_are_filled_up(windows: Windows) -> None:
    """A question that gets fewer windows, and one that gets none."""
    chosen = np.full((len(windows.questions.lengths), 2), -1)
    chosen[windows.question[0]] = [0, 1]
    batches = GroupBatches(windows, chosen, 61 - windows.questions.lengths, 4, seed=0)
    sizes = np.bincount(windows.question)[np.unique(windows.question)]
    batch = batches.batch(0, np.array([0, 1]))
    rows = sizes[0] + 2 + sizes[1]
    assert len(batch["input_ids"]) == rows
    assert batch["groups"][0, : sizes[0] + 2].tolist() == list(range(sizes[0] + 2))
    filled = list(range(sizes[0] + 2, rows))
    assert batch["groups"][1].tolist() == filled + [rows] * (batch["groups"].shape[1] - len(filled))


def test_a_step_does_not_depend_on_the_micro_batch_size(
    accelerator: Accelerator, teacher: Path, tiny_bert: Path, batches: GroupBatches
) -> None:
    """7 questions in micro-batches of 1, 2, 3, 7 or 50: same losses, same gradient."""
    student, taught = (
        fuse_attention(BertForQuestionAnswering.from_pretrained(folder)).eval()
        for folder in (tiny_bert, teacher)
    )
    loss = qa.QaLoss(SimpleNamespace(accelerator=accelerator), taught, 0.5, 0.5)
    chosen = np.arange(7)
    found = []
    for size in (1, 2, 3, 7, 50):
        student.zero_grad()
        step = StepGradient(accelerator, student, batches, loss, size)
        values = step(0, chosen).tolist()
        sums = dict(zip(step.names, values, strict=True))
        gradient = torch.cat([p.grad.flatten() for p in student.parameters()])
        found.append((sums, gradient))
    assert set(found[0][0]) >= {"answer", "no_answer", "distillation", "hidden_states"}
    assert found[0][0]["no_answer"] > 1 and found[0][1].norm() > 1e-2
    for sums, gradient in found[1:]:
        for name in ("answer", "no_answer", "distillation", "hidden_states"):
            assert sums[name] == pytest.approx(found[0][0][name], abs=1e-5)
        assert (gradient - found[0][1]).norm() < 1e-4 * gradient.norm()


# ------------------------------------------------------------------------------------------------
# Whole runs

FLAGS = (
    f"--negative_windows={COUNT}",
    "--total_train_batch_size=8",
    "--per_gpu_train_batch_size=3",
    "--num_train_epochs=1.5",
    "--save_minutes=0",
)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tiny_bert: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Bit for bit; the deployed model knows no answer, and its scores have a temperature."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert call(command_of("train_qa", tiny_bert, few, whole, *FLAGS)) == 0
    command = command_of("train_qa", tiny_bert, few, killed, *FLAGS)
    with started(command) as process:
        wait_for(process, lambda: last_step(killed) >= 3)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert not (killed / "metrics.json").exists()
    capfd.readouterr()
    assert call(command) == 0
    assert "going on from step" in capfd.readouterr().out
    for name in ("model.safetensors", "predictions.json", "reader.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    settings = json.loads((whole / "reader.json").read_text())
    low, high = squad_utils.TEMPERATURES
    assert settings["null_threshold"] == 1.0 and low <= settings["temperature"] <= high


@pytest.mark.slow
def test_two_processes_and_a_teacher_train_as_one(
    teacher: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Groups go to processes whole, so the losses are those of one process, to rounding."""
    taught = (f"--model_teacher={teacher}", "--supervision_weight=0.1")
    flags = (*FLAGS, *taught, "--num_train_epochs=1")
    one, two = tmp_path / "one", tmp_path / "two"
    assert call(command_of("train_qa", teacher, few, one, *flags)) == 0, capfd.readouterr().err
    command = command_of("train_qa", teacher, few, two, *flags)
    run_in_two([word for word in command if word != "--no_cuda"])
    assert json.loads((two / "metrics.json").read_text())["processes"] == 2
    ours, theirs = (
        [
            record[name]
            for record in records(folder)
            if "loss" in record
            for name in ("answer", "no_answer", "distillation", "hidden_states")
        ]
        for folder in (one, two)
    )
    assert len(ours) == 4 * 4 and theirs == pytest.approx(ours, rel=1e-3)


@pytest.mark.slow
def test_int8_and_a_teacher_train_on_groups(
    teacher: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    settings = tmp_path / "nncf_config.json"
    settings.write_text(json.dumps({"model_type": "transformer", "subset_size": 8}))
    out = tmp_path / "out"
    taught = (f"--model_teacher={teacher}", "--supervision_weight=0.1")
    flags = (*FLAGS, *taught, f"--nncf_config={settings}", "--quantizer_epochs=0.3")
    command = command_of("train_qa", teacher, few, out, *flags, "--num_train_epochs=0.3")
    assert call(command) == 0, capfd.readouterr().err
    stages = {record["stage"] for record in records(out) if record.get("no_answer", 0) > 0}
    assert stages == {"ranges", "weights"}


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--model_emb=nowhere",), "--model_emb ranks paragraphs for --negative_windows, which is"),
        (("--model_emb=nowhere", "--negative_windows=1"), "--model_emb: no such folder: nowhere"),
    ],
)
def test_a_wrong_flag_is_a_line(
    tiny_bert: Path,
    few: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    flags: tuple[str, ...],
    message: str,
) -> None:
    assert call(command_of("train_qa", tiny_bert, few, tmp_path / "out", *flags)) == 2
    assert message in error_line(capfd.readouterr().err)
