"""Tests of pairs without labels: what is drawn, that none is of dev, and a run with them."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from calls import call, error_line, records, started, wait_for
from conftest import command_of
from test_distill import metrics, newest_stage
from transformers import AutoTokenizer

import squad_utils
from cli import UserError
from squad_utils import SquadData, Windows, load_squad
from tasks import extra_pairs, qa
from tasks.extra_pairs import ExtraBatches, Pool

WORDS = "the harbour was built of stone by masons who came from far away over the sea"


@pytest.fixture(scope="module")
def data(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> SquadData:
    """The sample's contexts, of which each article has but one, in articles of five."""
    path = tmp_path_factory.mktemp("articles") / "train.json"
    root = json.loads((sample / "train-v1.1.json").read_text())
    every = [paragraph for article in root["data"] for paragraph in article["paragraphs"]]
    root["data"] = [{"paragraphs": every[i : i + 5]} for i in range(0, len(every), 5)]
    path.write_text(json.dumps(root))
    return load_squad(str(path), "--squad_train_data")


@pytest.fixture(scope="module")
def make(tiny_bert: Path, data: SquadData) -> Callable[..., ExtraBatches]:
    """Batches of 8 with extra windows among plain texts, of at most 64 tokens."""

    def batches(*texts: str, number: int = 300, seed: int = 0) -> ExtraBatches:
        tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
        windows = qa.make_windows(data, tokenizer, 16, 64, 32, for_training=True)
        tokens = squad_utils.tokenize(tokenizer.backend_tokenizer, texts, False, "")
        room = 64 - 3 - windows.questions.lengths
        pool = Pool.of(data, windows, tokens, room)
        return ExtraBatches(windows, pool, number, 8, seed)

    return batches


def drawn(batches: ExtraBatches, epoch: int = 0) -> np.ndarray:
    """The extra windows of an epoch: question, text, first token in it, length."""
    rows = batches._rows(epoch)[len(batches.windows) :]
    text = np.searchsorted(batches.pool.bounds, rows[:, 1], side="right") - 1
    first = rows[:, 1] - batches.pool.bounds[text]
    return np.stack([rows[:, 0], text, first, rows[:, 2]], axis=1)


def test_windows_are_of_other_contexts_of_the_same_article(
    make: Callable[..., ExtraBatches], data: SquadData
) -> None:
    batches = make()
    article = np.repeat(range(len(data.articles)), [len(a["paragraphs"]) for a in data.articles])
    question, text, first, length = drawn(batches).T
    own = data.context_of[question]
    assert (text != own).all() and (article[text] == article[own]).all()
    # All of them come, and each question as often as others.
    assert len(set(zip(question, text, strict=True))) > 150
    assert np.ptp(np.bincount(question, minlength=len(data.questions))) <= 1
    tokens = batches.windows.contexts.lengths[text]
    room = batches.pool.room[question]
    assert (length == np.minimum(tokens, room)).all() and (first + length <= tokens).all()
    long = tokens > room
    assert len(set(first[long])) > 5 and not first[~long].any()


def test_half_of_the_windows_are_of_plain_texts(
    make: Callable[..., ExtraBatches], data: SquadData
) -> None:
    _, text, first, length = drawn(make(WORDS, f"{WORDS} " * 20)).T
    plain = text - len(data.contexts)
    assert set(plain[plain >= 0]) == {0, 1}
    assert 0.4 < np.mean(plain >= 0) < 0.6
    assert len(set(first[plain == 1])) > 20 and not first[plain == 0].any()
    assert length.min() > 0


def test_each_epoch_has_its_own_windows(make: Callable[..., ExtraBatches]) -> None:
    batches, again = make(WORDS), make(WORDS)
    # Another order of calls, as of a run that goes on: the same windows.
    found = {epoch: drawn(batches, epoch) for epoch in (2, 0, 1, 2)}
    for epoch in range(3):
        assert (drawn(again, epoch) == found[epoch]).all()
    pairs = [set(zip(*found[epoch].T[:2], strict=True)) for epoch in range(3)]
    for earlier, later in itertools.pairwise(pairs):
        assert len(earlier & later) < 0.7 * len(later)
    assert not (drawn(make(WORDS, seed=1)) == found[0]).all()


def test_an_epoch_has_each_window_of_the_file_and_the_extra_ones(
    make: Callable[..., ExtraBatches],
) -> None:
    batches = make(number=50)
    count = len(batches.windows)
    for epoch in (0, 3):
        steps = batches.steps(epoch)
        assert len(steps) == -(-(count + 50) // 8)
        extra = count + 50 * epoch
        every = np.sort(np.concatenate(steps))
        assert every.tolist() == [*range(count), *range(extra, extra + 50)]
        for step in steps:
            tokens = batches.tokens(step)
            assert (np.diff(tokens) >= 0).all() and tokens.max() <= 64


def test_a_batch_is_of_the_windows_that_its_indices_name(
    make: Callable[..., ExtraBatches],
) -> None:
    batches = make(WORDS, number=40)
    windows: Windows = batches.windows
    count, epoch = len(windows), 2
    chosen = np.array([5, count + 40 * epoch + 7, count + 40 * epoch + 39, 0])
    batch = batches.batch(epoch, chosen)
    assert set(batch) == set(squad_utils.INPUTS)
    assert batch["attention_mask"].sum(dim=1).tolist() == batches.tokens(chosen).tolist()
    of_file = squad_utils.make_batch(windows, chosen[[0, 3]])
    for row, mine in zip(of_file["input_ids"], (0, 3), strict=True):
        length = min(len(row), batch["input_ids"].shape[1])
        assert batch["input_ids"][mine, :length].tolist() == row[:length].tolist()
    question, text, first, length = drawn(batches, epoch)[7]
    ids = batches.pool.ids[batches.pool.bounds[text] :][first : first + length]
    asked = windows.questions.ids[windows.questions.of(question)]
    expected = [windows.special.cls, *asked, windows.special.sep, *ids, windows.special.sep]
    assert batch["input_ids"][1, : len(expected)].tolist() == expected


def test_no_text_of_dev_is_read(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Neither a context, nor a paragraph with 13 words in a row of one."""
    dev = f"Long ago, {WORDS}. It stands still."
    near = (
        "So it is told: the Harbour was built, of stone, by masons (who came from far away) today."
    )
    other = "The lake was dug by hand, and masons who came from far away over the hills left it."
    texts = tmp_path / "texts.txt"
    texts.write_text(f"{dev}\n\n{near}\n\n{other}\n")
    assert extra_pairs.read_texts([str(texts)], [dev, "another context"]) == [other]
    assert "2 of 3 paragraphs are left out" in capfd.readouterr().err
    texts.write_text(dev)
    with pytest.raises(UserError, match="is text of --squad_dev_data"):
        extra_pairs.read_texts([str(texts)], [dev])


def test_articles_of_one_context_need_plain_texts(tiny_bert: Path, tmp_path: Path) -> None:
    context = {"context": WORDS, "qas": [{"id": "1", "question": "Who?", "answers": []}]}
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [context]}]}))
    data = load_squad(str(path), "--squad_train_data")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    windows = qa.make_windows(data, tokenizer, 16, 64, 32, for_training=True)
    with pytest.raises(UserError, match="has a second context; give --extra_texts"):
        extra_pairs.check_articles(data)
    room = np.array([40])
    text = squad_utils.tokenize(tokenizer.backend_tokenizer, [WORDS], False, "")
    rows = Pool.of(data, windows, text, room).draw(np.random.default_rng(0), 20)
    assert (rows[:, 1] == windows.contexts.bounds[-1]).all()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_windows(
    teacher: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text(f"{WORDS}\n\n{WORDS} {WORDS}\n")
    outs = [tmp_path / name for name in ("whole", "killed")]
    flags = ("--stages=final", "--num_train_epochs=2", "--extra_pairs=0.5", "--save_minutes=0",
             "--total_train_batch_size_for_tune=24", "--pack_start=random",
             f"--extra_texts={texts}")  # fmt: skip
    commands = [command_of("pack_and_distill", teacher, few, out, *flags) for out in outs]
    assert call(commands[0]) == 0, capfd.readouterr().err
    counts = metrics(outs[0])["counts"]
    assert counts["extra_windows"] == round(counts["train_windows"] / 2)
    steps = -(-(counts["train_windows"] + counts["extra_windows"]) // 24)
    assert records(outs[0])[-2]["step"] == 2 * steps
    with started(commands[1]) as process:
        wait_for(process, lambda: step_of(outs[1]) > steps + 1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
    assert newest_stage(outs[1]) == "final" and not (outs[1] / "metrics.json").exists()
    assert call(commands[1]) == 0, capfd.readouterr().err
    assert f"of {2 * steps}, saved in" in capfd.readouterr().out
    losses = [[r["loss"] for r in records(out) if "loss" in r] for out in outs]
    assert losses[0] == losses[1]
    weights = [(out / "unmerged" / "model.safetensors").read_bytes() for out in outs]
    assert weights[0] == weights[1]
    # Other texts are another run.
    texts.write_text(f"{WORDS} indeed\n")
    assert call(commands[1]) == 2
    assert "sha256_texts was" in error_line(capfd.readouterr().err)


def step_of(out: Path) -> int:
    trained = [r["step"] for r in records(out) if r["stage"] == "final"]
    return max(trained, default=0)


@pytest.mark.parametrize(
    "flag",
    ["--logits_weight=0.1", "--logits_temperature=1", "--extra_pairs=1", "--extra_texts=a.txt"],
)
def test_embeddings_take_no_flag_of_question_answering(
    flag: str, embedder: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert call(command_of("pack_and_distill", embedder, few, tmp_path / "out", flag)) == 2
    name = flag.partition("=")[0]
    assert f"{name} is for question answering" in error_line(capfd.readouterr().err)


def test_embeddings_ignore_the_default_weight_of_logits(
    embedder: Path, sample: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    flags = ("--stages=final", "--max_steps_per_stage=1", "--pack_start=random")
    assert call(command_of("pack_and_distill", embedder, sample, tmp_path / "out", *flags)) == 0, (
        capfd.readouterr().err
    )
    (trained,) = [r for r in records(tmp_path / "out") if "loss" in r]
    assert not {"logits", "embedding"} & trained.keys()


@pytest.fixture(scope="module")
def embedder(base: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT for embeddings, not trained."""
    import torch
    from transformers import AutoConfig

    from bert.embedding import BertForEmbedding

    folder = tmp_path_factory.mktemp("embedder") / "bert"
    torch.manual_seed(0)
    model = BertForEmbedding(AutoConfig.from_pretrained(base))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder
