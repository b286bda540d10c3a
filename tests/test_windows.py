"""Tests of windows, targets, batches and step plans against a slow, plain reimplementation."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForQuestionAnswering, BertTokenizerFast

import squad_utils
from cli import UserError
from squad_utils import SquadData, Windows
from tasks import qa

FLAG = "--squad_train_data"
CHUNKS = [
    *("The", "cat", "in", "1999", "naïve", "CAFÉ", "cafe\u0301", "İstanbul", "straße", "ﬁn"),
    *("東京", "中", "文abc", "한글", "ภาษาไทย", "क्षि", "🙂", "👩‍👩‍👧", "a\u00adb", "x\x00y"),
    *("x" * 30, "y" * 150, "don't", "3.14%", "(U.S.)", "—", "…", "\u0301", "\ufeff", "\u200b"),
    *("", " ", "  ", "\n", "\t\r\n", "\u00a0", "\u3000", "[SEP]", "[CLS]"),
]
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


# ------------------------------------------------------------------------------------------------
# The slow way


def slow_starts(context_length: int, room: int, stride: int) -> list[int]:
    """First context token of every window."""
    starts = [0]
    while starts[-1] + room < context_length:
        starts.append(min(starts[-1] + min(stride, room), context_length - room))
    return starts


def slow_offsets(
    tokenizer: BertTokenizerFast, text: str, offsets: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Offsets of tokens with the marks behind them, and all else that the normaliser drops."""
    normalizer = tokenizer.backend_tokenizer.normalizer

    def belongs(char: str) -> bool:
        return normalizer.normalize_str(char) == "" or unicodedata.category(char) in ("Mn", "Me")

    longer = []
    for begin, end in offsets:
        while end < len(text) and belongs(text[end]):
            end += 1
        longer.append((begin, end))
    return longer


def slow_span(offsets: list[tuple[int, int]], start: int, text: str) -> tuple[int, int] | None:
    """First and last token that share a character with an answer; None if there is no such."""
    answer = set(range(start, start + len(text)))
    sharing = [t for t, (a, b) in enumerate(offsets) if answer & set(range(a, b))]
    return (sharing[0], sharing[-1]) if sharing else None


def slow_windows(
    tokenizer: BertTokenizerFast, data: SquadData, max_q: int, max_c: int, stride: int
) -> list[dict[str, Any]]:
    """Every window: `question`, `ids`, `types`, and `targets`, one for each answer."""
    plain = tokenizer.backend_tokenizer
    windows = []
    for q, question in enumerate(data.questions):
        asked = plain.encode(question, add_special_tokens=False).ids[:max_q]
        text = data.contexts[data.context_of[q]]
        context = plain.encode(text, add_special_tokens=False)
        offsets = slow_offsets(tokenizer, text, context.offsets)
        found = [slow_span(offsets, *answer) for answer in data.answers[q]]
        spans = [span for span in found if span]
        room = max_c - 3 - len(asked)
        for start in slow_starts(len(context.ids), room, stride):
            part = context.ids[start : start + room]
            head = [tokenizer.cls_token_id, *asked, tokenizer.sep_token_id]
            inside = [start <= s[0] and s[1] < start + len(part) for s in spans]
            shift = len(head) - start
            windows.append(
                {
                    "question": q,
                    "ids": [*head, *part, tokenizer.sep_token_id],
                    "types": [0] * len(head) + [1] * (len(part) + 1),
                    "targets": [
                        (span[0] + shift, span[1] + shift) if ok else (0, 0)
                        for span, ok in zip(spans, inside, strict=True)
                    ]
                    or [(0, 0)],
                }
            )
    return windows


# ------------------------------------------------------------------------------------------------
# Random data


@pytest.fixture(scope="session")
def tokenizer(tiny_bert: Path) -> BertTokenizerFast:
    return BertTokenizerFast.from_pretrained(tiny_bert)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that every example writes anew."""
    return tmp_path_factory.mktemp("windows") / "data.json"


def load(path: Path, paragraphs: Sequence[tuple[str, list[tuple[str, list]]]]) -> SquadData:
    """Data of (context, [(question, [(answer_start, text), ...]), ...]); ids are q0, q1, ..."""
    listed, number = [], 0
    for context, asked in paragraphs:
        qas = []
        for question, answers in asked:
            given = [{"answer_start": start, "text": text} for start, text in answers]
            qas.append({"id": f"q{number}", "question": question, "answers": given})
            number += 1
        listed.append({"context": context, "qas": qas})
    path.write_text(json.dumps({"data": [{"title": "", "paragraphs": listed}]}), encoding="utf-8")
    return squad_utils.load_squad(str(path), FLAG)


def texts(most: int) -> st.SearchStrategy[str]:
    """Texts of up to `most` chunks: words of many scripts, spaces, now and then any characters."""
    chunk = st.sampled_from(CHUNKS) | st.text(max_size=6)
    return st.lists(chunk, max_size=most).flatmap(
        lambda chunks: st.sampled_from([" ", "", "  "]).map(lambda gap: gap.join(chunks))
    )


@st.composite
def paragraph(draw: st.DrawFn) -> tuple[str, list[tuple[str, list[tuple[int, str]]]]]:
    """A context, whose words often repeat, and questions with 0 to 4 answers anywhere in it."""
    context = draw(texts(25)) * draw(st.sampled_from([1, 1, 3]))
    asked = []
    for _ in range(draw(st.integers(1, 3))):
        answers = []
        for _ in range(draw(st.integers(0, 4)) if context.strip() else 0):
            start = draw(st.integers(0, len(context) - 1))
            end = draw(st.integers(start + 1, min(len(context), start + 40)))
            if context[start:end].strip():
                answers.append((start, context[start:end]))
        asked.append((draw(texts(12)), answers))
    return context, asked


paragraphs = st.lists(paragraph(), min_size=1, max_size=3)


def make(
    tokenizer: BertTokenizerFast, data: SquadData, max_q: int, max_c: int, stride: int, **kwargs
) -> Windows:
    kwargs.setdefault("for_training", False)
    return qa.make_windows(data, tokenizer, max_q, max_c, stride, **kwargs)


# ------------------------------------------------------------------------------------------------
# Windows and targets


@PROPERTY
@given(
    parts=paragraphs, max_q=st.integers(1, 12), room=st.integers(1, 30), stride=st.integers(1, 40)
)
def test_windows_are_those_of_the_slow_way(
    tokenizer: BertTokenizerFast, scratch: Path, parts: list, max_q: int, room: int, stride: int
) -> None:
    """Every window has the ids, token types and mask of the rules, in the order of questions."""
    data = load(scratch, parts)
    max_c = max_q + 3 + room
    windows = make(tokenizer, data, max_q, max_c, stride)
    expected = slow_windows(tokenizer, data, max_q, max_c, stride)
    assert windows.question.tolist() == [each["question"] for each in expected]
    assert windows.total_lengths.tolist() == [len(each["ids"]) for each in expected]
    assert windows.total_lengths.max() <= max_c
    batch = squad_utils.make_batch(windows, np.arange(len(windows)))
    for row, each in enumerate(expected):
        pad = batch["input_ids"].shape[1] - len(each["ids"])
        ids = each["ids"] + [tokenizer.pad_token_id] * pad
        assert batch["input_ids"][row].tolist() == ids
        assert batch["token_type_ids"][row].tolist() == each["types"] + [0] * pad
        assert batch["attention_mask"][row].tolist() == [1] * len(each["ids"]) + [0] * pad
        real = batch["position_ids"][row, : len(each["ids"])]
        assert real.tolist() == list(range(len(each["ids"])))


@PROPERTY
@given(
    parts=paragraphs,
    max_q=st.integers(1, 6),
    room=st.integers(1, 30),
    stride=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_targets_are_one_answer_of_the_slow_way(
    tokenizer: BertTokenizerFast,
    scratch: Path,
    parts: list,
    max_q: int,
    room: int,
    stride: int,
    seed: int,
) -> None:
    """All windows of a question point at the same one of its answers, (0, 0) where it is cut."""
    data = load(scratch, parts)
    max_c = max_q + 3 + room
    windows = make(tokenizer, data, max_q, max_c, stride)
    found = squad_utils.targets(windows, np.random.default_rng(seed))
    assert found.shape == (len(windows), 2) and found.dtype == np.int64
    expected = slow_windows(tokenizer, data, max_q, max_c, stride)
    for q in range(len(data.ids)):
        mine = [tuple(found[w]) for w in np.flatnonzero(windows.question == q)]
        of_answers = zip(*(e["targets"] for e in expected if e["question"] == q), strict=True)
        assert mine in [list(each) for each in of_answers]


@PROPERTY
@given(
    context=st.integers(0, 300),
    asked=st.integers(0, 20),
    room=st.integers(1, 100),
    stride=st.integers(1, 130),
)
def test_windows_cover_the_context(
    tokenizer: BertTokenizerFast, scratch: Path, context: int, asked: int, room: int, stride: int
) -> None:
    """Starts are those of the slow way, and no context token is left out."""
    data = load(scratch, [("a " * context, [("b " * asked, [])])])
    windows = make(tokenizer, data, 20, asked + 3 + room, stride)
    assert windows.first.tolist() == slow_starts(context, room, stride)
    covered = {
        t for f, n in zip(windows.first, windows.length, strict=True) for t in range(f, f + n)
    }
    assert covered == set(range(context))
    assert (windows.length == min(context, room)).all()


def test_a_window_written_out(tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    """[CLS] a b [SEP] c d e [SEP], then d e f, then e f g: moved back to the context's end."""
    data = load(tmp_path / "d.json", [("c d e f g", [("a b z", [(4, "e f")])])])
    windows = make(tokenizer, data, 2, 8, 1)
    batch = squad_utils.make_batch(windows, np.arange(len(windows)))
    rows = [" ".join(tokenizer.convert_ids_to_tokens(row)) for row in batch["input_ids"]]
    assert rows == [
        "[CLS] a b [SEP] c d e [SEP]",
        "[CLS] a b [SEP] d e f [SEP]",
        "[CLS] a b [SEP] e f g [SEP]",
    ]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 3
    found = squad_utils.targets(windows, np.random.default_rng(0))
    assert found.tolist() == [[0, 0], [5, 6], [4, 5]]
    assert make(tokenizer, data, 2, 8, 3).first.tolist() == [0, 2]


def test_every_answer_is_drawn(tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    """Over many draws each of three answers comes about a third of the time, and nothing else."""
    answers = [(0, "a"), (4, "c d"), (10, "f")]
    data = load(tmp_path / "d.json", [("a b c d e f", [("?", answers), ("!", [])])])
    windows = make(tokenizer, data, 4, 32, 8)
    rng = np.random.default_rng(0)
    drawn = [tuple(map(tuple, squad_utils.targets(windows, rng).tolist())) for _ in range(300)]
    assert {answered for answered, _ in drawn} == {(3, 3), (5, 6), (8, 8)}
    assert {unanswerable for _, unanswerable in drawn} == {(0, 0)}
    counts = [sum(d[0] == span for d in drawn) for span in ((3, 3), (5, 6), (8, 8))]
    assert min(counts) > 60


def test_an_answer_inside_words_takes_the_whole_tokens(
    tokenizer: BertTokenizerFast, tmp_path: Path
) -> None:
    """An answer that begins and ends inside tokens, and among repeats, is found by its place."""
    unknown = "東" + "q" * 150  # a character of its own, then one [UNK] of 150 letters
    context = f"a a {unknown} a"
    data = load(tmp_path / "d.json", [(context, [("?", [(2, "a 東qq")])])])
    windows = make(tokenizer, data, 4, 32, 8)
    assert squad_utils.targets(windows, np.random.default_rng(0)).tolist() == [[4, 6]]


def test_no_room_is_a_user_error(tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    """A question that leaves no context token names itself and the length that is needed."""
    data = load(tmp_path / "d.json", [("a b", [("c", []), ("c d e f", [])])])
    with pytest.raises(UserError, match=r"4 tokens \(q1\): at least 8 is needed"):
        make(tokenizer, data, 64, 7, 4)
    assert len(make(tokenizer, data, 64, 8, 4)) == 1 + 2


# ------------------------------------------------------------------------------------------------
# Misplaced answers, broken text


def test_misplaced_answers_are_left_out(
    tokenizer: BertTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One warning with count and first ids; a question that lost all answers is not learnt."""
    given = [
        [(0, "a")],
        [(1, "a")],  # the only one, misplaced
        [(3, "b"), (2, "b")],  # one of two misplaced
        [(1, " ")],  # blank, which is none
        [(4, "cd")],  # over the context's end
        [(-1, "c")],
        [],
    ]
    data = load(tmp_path / "d.json", [("a b c", [("?", answers) for answers in given])])
    warning = capsys.readouterr().err
    assert (
        warning.count("\n") == 2
        and "2 of 7 questions have no answer (first ids: q3, q6)" in warning
    )
    assert "4 answers" in warning and "q1, q2, q4)" in warning and "3 questions lose" in warning
    assert data.answers == [[(0, "a")], [], [(2, "b")], [], [], [], []]
    train = make(tokenizer, data, 8, 32, 8, for_training=True)
    assert train.question.tolist() == [0, 2, 3, 6]
    found = squad_utils.targets(train, np.random.default_rng(0))
    assert found.tolist() == [[3, 3], [4, 4], [0, 0], [0, 0]]
    dev = make(tokenizer, data, 8, 32, 8, for_training=False)
    assert dev.question.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert squad_utils.targets(dev, np.random.default_rng(0))[[1, 3, 4, 5]].tolist() == [[0, 0]] * 4


def test_right_answers_give_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(tmp_path / "d.json", [("a 👩‍👩‍👧 b", [("?", [(8, "b")])])])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("context,question", [("a \ud83d b", "?"), ("a b", "\udc00?")])
def test_half_a_surrogate_pair_is_a_user_error(tmp_path: Path, context: str, question: str) -> None:
    """JSON can carry half a character (a cut emoji), which no tokenizer takes."""
    with pytest.raises(UserError, match=r"data\[0\]\.paragraphs\[0\]"):
        load(tmp_path / "d.json", [(context, [(question, [])])])


# ------------------------------------------------------------------------------------------------
# Batches


@pytest.fixture(scope="module")
def windows(tokenizer: BertTokenizerFast, sample: Path) -> Windows:
    """Of the sample's development file, of many lengths."""
    data = squad_utils.load_squad(str(sample / "dev-v1.1.json"), FLAG)
    return make(tokenizer, data, 24, 100, 32)


def test_storage_and_batch_types(windows: Windows) -> None:
    """Stored as int32, batches int64, all of one shape; a batch is its own memory."""
    stored = [windows.question, windows.first, windows.length, windows.answer_tokens]
    stored += [windows.contexts.ids, windows.questions.ids, windows.contexts.offsets]
    assert {array.dtype for array in stored} == {np.dtype(np.int32)}
    batch = squad_utils.make_batch(windows, np.arange(3))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
    assert len({array.shape for array in batch.values()}) == 1
    batch["position_ids"][0, 0] = 7
    assert batch["position_ids"][1, 0] == 0


def test_padding_rounds_up_to_a_multiple_of_8(windows: Windows) -> None:
    """Each window alone is padded by less than 8; pad_to pads to just that, with equal tokens."""
    for w in range(len(windows)):
        total = windows.total_lengths[w]
        alone = squad_utils.make_batch(windows, np.array([w]))
        assert alone["input_ids"].shape == (1, (total + 7) // 8 * 8)
        padded = squad_utils.make_batch(windows, np.array([w]), pad_to=100)
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            assert padded[name].shape == (1, 100)
            assert (padded[name][0, :total] == alone[name][0, :total]).all()
        assert padded["attention_mask"].sum() == total


def test_rounding_up_stays_within_the_models_positions(
    tokenizer: BertTokenizerFast, tmp_path: Path
) -> None:
    """A model of 20 positions takes windows of 20 tokens, though 20 is no multiple of 8."""
    data = load(tmp_path / "d.json", [("a " * 50, [("b", [])])])
    cut = make(tokenizer, data, 4, 20, 8)
    assert cut.total_lengths.max() == 20
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=20,
    )
    arrays = squad_utils.make_batch(cut, np.arange(len(cut)))
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    outputs = qa.forward(BertForQuestionAnswering(config), batch)
    assert outputs.start_logits.isfinite().all()


# ------------------------------------------------------------------------------------------------
# Steps


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return [step.tolist() for step in a] == [step.tolist() for step in b]


@PROPERTY
@given(
    lengths=st.lists(st.integers(4, 50), max_size=400),
    step_size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
)
def test_steps_have_each_window_once(
    lengths: list[int], step_size: int, seed: int, epoch: int
) -> None:
    """Every step has step_size windows but the last, the rest; the same call, the same plan."""
    array = np.array(lengths, np.int64)
    steps = squad_utils.plan_steps(array, step_size, seed, epoch)
    assert sorted(w for step in steps for w in step.tolist()) == list(range(len(lengths)))
    whole, rest = divmod(len(lengths), step_size)
    assert [len(step) for step in steps] == [step_size] * whole + [rest] * bool(rest)
    assert all((np.diff(array[step]) >= 0).all() for step in steps)
    assert same(steps, squad_utils.plan_steps(array, step_size, seed, epoch))


def test_steps_differ_by_seed_and_epoch() -> None:
    """Other seeds and epochs give other orders, also where seed + epoch is the same."""
    lengths = np.arange(2000) % 300 + 20
    plans = [
        squad_utils.plan_steps(lengths, 8, seed, epoch)
        for seed, epoch in ((1, 0), (1, 1), (2, 0), (0, 1), (0, 2))
    ]
    for i, plan in enumerate(plans):
        assert not any(same(plan, other) for other in plans[:i])


@pytest.mark.parametrize("step_size", [8, 32])
def test_little_is_padding(step_size: int) -> None:
    """On lengths like SQuAD's under 5 % of a step's positions are padding, rounding included."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(150), 0.4, 20_000), 30, 384).astype(np.int64)
    padded = real = 0
    for step in squad_utils.plan_steps(lengths, step_size, 42, 0):
        padded += len(step) * (-(-int(lengths[step].max()) // 8) * 8)
        real += int(lengths[step].sum())
    assert 1 - real / padded < 0.05


def test_long_windows_come_at_any_time() -> None:
    """The lengths of a step say nothing about the next one's, nor do they rise over an epoch."""
    lengths = np.arange(16_000) % 300 + 20
    steps = squad_utils.plan_steps(lengths, 8, 0, 0)
    means = np.array([lengths[step].mean() for step in steps])
    assert np.std(means) > 50
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.1
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.1


def test_the_draw_of_answers_leaves_the_order(tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    """QaBatches: the same order with and without answers; targets differ between epochs."""
    many = [("a b c d " * 8, [("?", [(0, "a"), (2, "b"), (4, "c")]) for _ in range(40)])]
    none = [("a b c d " * 8, [("?", []) for _ in range(40)])]
    batches = [
        qa.QaBatches(make(tokenizer, load(tmp_path / "d.json", parts), 4, 48, 8), 8, 3)
        for parts in (many, none)
    ]
    assert same(batches[0].steps(1), batches[1].steps(1))
    chosen = np.arange(40)
    targets = [batches[0].batch(epoch, chosen)["targets"].tolist() for epoch in (0, 1, 0)]
    assert targets[0] == targets[2] != targets[1]
    part = batches[0].batch(1, chosen[5:9])["targets"].tolist()
    assert part == targets[1][5:9]
