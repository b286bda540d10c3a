"""Tests of span search and of answers over several windows against plain double loops."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

import squad_utils
from squad_utils import Answers, SquadData, Windows
from tasks import qa

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True)
CLOSE = 1e-9


def all_spans(
    start: list[float], end: list[float], context_at: int, most: int
) -> list[tuple[float, int, int]]:
    """(log odds against [CLS], first, last) of every span of a window, best first."""
    spans = []
    for i in range(context_at, len(start) - 1):
        for j in range(i, min(i + most, len(start) - 1)):
            spans.append((start[i] - start[0] + end[j] - end[0], i, j))
    return sorted(spans, key=lambda span: (-span[0], span[1], span[2]))


def log_sum(values: Iterable[float]) -> float:
    """The log of the sum of exp(value)."""
    values = list(values)
    highest = max(values, default=0.0)
    total = math.fsum(math.exp(value - highest) for value in values)
    return highest + math.log(total) if total else -math.inf


@st.composite
def window_batch(draw: st.DrawFn, logit: st.SearchStrategy[float]) -> dict:
    """Logits of a few windows [CLS] question [SEP] context [SEP] with any padding behind."""
    shapes = draw(
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), min_size=1, max_size=4)
    )
    lengths = [question + context + 3 for question, context in shapes]
    width = max(lengths) + draw(st.integers(0, 6))
    rows = st.lists(logit, min_size=width, max_size=width)
    return {
        "start": [draw(rows) for _ in shapes],
        "end": [draw(rows) for _ in shapes],
        "lengths": lengths,
        "context_at": [question + 2 for question, _ in shapes],
    }


def search(
    batch: dict, most: int, taken: list[list[bool]] | None = None, temperature: float = 1.0
) -> tuple[np.ndarray, ...]:
    return squad_utils.best_spans(
        np.array(batch["start"], np.float32),
        np.array(batch["end"], np.float32),
        np.array(batch["lengths"]),
        np.array(batch["context_at"]),
        most,
        None if taken is None else np.array(taken),
        temperature=temperature,
    )


def rows_of(batch: dict) -> list[tuple[list[float], list[float], int]]:
    """Each window's start and end logits without padding, and where its context begins."""
    return [
        (start[:length], end[:length], at)
        for start, end, length, at in zip(
            batch["start"], batch["end"], batch["lengths"], batch["context_at"], strict=True
        )
    ]


# ------------------------------------------------------------------------------------------------
# One window


@PROPERTY
@given(
    batch=window_batch(st.floats(-20, 20, width=32)),
    most=st.integers(1, 15),
    temperature=st.floats(0.25, 4),
    data=st.data(),
)
def test_the_span_is_that_of_the_double_loop(
    batch: dict, most: int, temperature: float, data: st.DataObject
) -> None:
    """The best span that holds no taken position, its log odds, and the sum over all such spans."""
    width = len(batch["start"][0])
    positions = st.lists(st.booleans(), min_size=width, max_size=width)
    taken = [data.draw(positions) for _ in batch["start"]]
    first, last, odds, total = search(batch, most, taken, temperature)
    assert first.shape == last.shape == odds.shape == (len(batch["lengths"]),)
    for b, (start, end, at) in enumerate(rows_of(batch)):
        spans = {(i, j): p for p, i, j in all_spans(start, end, at, most)
                 if not any(taken[b][i : j + 1])}  # fmt: skip
        assert np.isneginf(odds[b]) == (not spans)
        if spans:
            assert odds[b] == pytest.approx(max(spans.values()), abs=CLOSE)
            assert spans[first[b], last[b]] == pytest.approx(odds[b], abs=CLOSE)
        expected = log_sum(value / temperature for value in spans.values())
        assert total[b] == pytest.approx(expected, abs=CLOSE)


@PROPERTY
@given(batch=window_batch(st.sampled_from([0.0, 1.0])), most=st.integers(1, 15))
def test_of_equal_spans_the_first_wins(batch: dict, most: int) -> None:
    """Where several spans have the same best logits, the one that starts, then ends, first."""
    first, last, odds, _ = search(batch, most)
    for b, (start, end, at) in enumerate(rows_of(batch)):
        spans = all_spans(start, end, at, most)
        assert np.isneginf(odds[b]) == (not spans)
        if spans:
            assert (first[b], last[b]) == spans[0][1:]


def test_padding_question_and_special_tokens_are_never_chosen() -> None:
    """High logits outside the context neither win nor take probability."""
    start, end = np.zeros((1, 8), np.float32), np.zeros((1, 8), np.float32)
    start[0, [0, 1, 2, 5, 6]] = 5.0  # [CLS], question, [SEP], last [SEP], padding
    end[0, [0, 1, 2, 5, 7]] = 5.0
    start[0, 4], end[0, 4] = 1.0, 1.0
    first, last, odds, total = squad_utils.best_spans(start, end, np.array([6]), np.array([3]))
    assert (first[0], last[0]) == (4, 4)
    assert odds[0] == pytest.approx(2 - 10)
    assert total[0] == pytest.approx(-10 + math.log(math.exp(2) + math.exp(1) + 1))


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_stay_finite(sign: int) -> None:
    start = sign * np.array([[0.0, 0, 3e4, -3e4, 0]], np.float32)
    _, _, odds, total = squad_utils.best_spans(start, start, np.array([5]), np.array([2]))
    assert odds[0] == 6e4 and total[0] == pytest.approx(6e4)
    assert squad_utils.span_scores(odds, total, 1.0)[0] == pytest.approx(1)
    assert squad_utils.span_scores(-odds, -total, 0.25)[0] == 0


# ------------------------------------------------------------------------------------------------
# Several windows


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> BertTokenizerFast:
    return BertTokenizerFast.from_pretrained(tiny_bert)


def load(path: Path, asked: list[tuple[str, list[str]]]) -> SquadData:
    """Data of (context, questions) without answers; ids are q0, q1, ..."""
    listed, number = [], 0
    for context, questions in asked:
        qas = []
        for question in questions:
            qas.append({"id": f"q{number}", "question": question, "answers": []})
            number += 1
        listed.append({"context": context, "qas": qas})
    path.write_text(json.dumps({"data": [{"paragraphs": listed}]}), encoding="utf-8")
    return squad_utils.load_squad(str(path), "--squad_dev_data")


def feed(answers: Answers, windows: Windows, logits: np.ndarray, order: np.ndarray, size: int):
    """Give the windows' logits [windows, 2, L] in batches of `size`, padded as a model's."""
    for at in range(0, len(order), size):
        chosen = order[at : at + size]
        longest = -(-int(windows.total_lengths[chosen].max()) // 8) * 8
        answers.add(chosen, logits[chosen, 0, :longest], logits[chosen, 1, :longest])


@pytest.fixture(scope="module")
def many(tokenizer: BertTokenizerFast, sample: Path) -> tuple[SquadData, Windows, np.ndarray]:
    """The sample's development file in short windows, with random logits."""
    data = squad_utils.load_squad(str(sample / "dev-v1.1.json"), "--squad_dev_data")
    windows = qa.make_windows(data, tokenizer, 12, 60, 20, for_training=False)
    logits = np.random.default_rng(0).normal(0, 4, (len(windows), 2, 64)).astype(np.float32)
    return data, windows, logits


def test_answers_are_those_of_the_double_loop(
    tokenizer: BertTokenizerFast, many: tuple[SquadData, Windows, np.ndarray]
) -> None:
    """The best span over all of a question's windows, cut from the text, with its score; no answer
    over it. A span in several windows counts once."""
    data, windows, logits = many
    assert np.bincount(windows.question).max() > 3
    answers = Answers(data, windows)
    feed(answers, windows, logits, np.arange(len(windows)), 7)
    texts, scores = answers.texts(), answers.no_answer_scores()
    probabilities = answers.scores(2.5)
    assert list(texts) == list(scores) == data.ids
    for q, name in enumerate(data.ids):
        context = data.contexts[data.context_of[q]]
        offsets = tokenizer.backend_tokenizer.encode(context, add_special_tokens=False).offsets
        spans: dict[tuple[int, int], tuple[int, float]] = {}
        for w in np.flatnonzero(windows.question == q):
            start, end = logits[w, :, : windows.total_lengths[w]].astype(float).tolist()
            at, begin = int(windows.context_at[w]), int(windows.first[w])
            for odds, i, j in all_spans(start, end, at, 30):
                around = min(i - at, at + int(windows.length[w]) - 1 - j)
                span = (i - at + begin, j - at + begin)
                if around > spans.get(span, (-1, 0))[0]:  # counts where it has most around it
                    spans[span] = around, odds
        odds, (i, j) = max((odds, span) for span, (_, odds) in spans.items())
        assert texts[name] == context[offsets[i][0] : offsets[j][1]]
        assert answers.odds[q] == pytest.approx(odds, abs=CLOSE)
        assert scores[name] == pytest.approx(math.exp(-odds), rel=CLOSE)
        every = [0.0, *(each / 2.5 for _, each in spans.values())]
        assert probabilities[q] == pytest.approx(math.exp(odds / 2.5 - log_sum(every)), rel=CLOSE)


def test_the_order_of_windows_does_not_matter(
    many: tuple[SquadData, Windows, np.ndarray],
) -> None:
    """Any order, any batch size, shared among two processes in any way: the same answers."""
    data, windows, logits = many
    expected = Answers(data, windows)
    feed(expected, windows, logits, np.arange(len(windows)), 16)
    rng = np.random.default_rng(1)
    for size in (1, 5, 32):
        order = rng.permutation(len(windows))
        halves = []
        for half in np.split(order, [len(order) // 3]):
            halves.append(Answers(data, windows))
            feed(halves[-1], windows, logits, half, size)
        for some in halves[1].batches:
            halves[0].add(*some)
        assert halves[0].texts() == expected.texts()
        assert halves[0].no_answer_scores() == pytest.approx(expected.no_answer_scores(), rel=CLOSE)
        assert halves[0].scores(0.5) == pytest.approx(expected.scores(0.5), rel=CLOSE)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_of_equal_windows_the_first_wins(
    tokenizer: BertTokenizerFast, tmp_path: Path, order: list[int]
) -> None:
    data = load(tmp_path / "d.json", [("b c d e f", ["a"])])
    windows = qa.make_windows(data, tokenizer, 4, 7, 1, for_training=False)
    assert windows.first.tolist() == [0, 1, 2]
    answers = Answers(data, windows)
    logits = np.zeros((3, 2, 8), np.float32)
    logits[:, :, 4] = 1.0  # the second context token of each window
    feed(answers, windows, logits, np.array(order), 1)
    assert answers.texts() == {"q0": "c"}


# ------------------------------------------------------------------------------------------------
# Temperature


@pytest.mark.parametrize("true", [0.5, 1.0, 2.0])
def test_the_temperature_that_made_the_answers_right_is_found(true: float) -> None:
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 2, 20_000)
    right = rng.random(len(odds)) < 1 / (1 + np.exp(-odds / true))
    found = squad_utils.fit_temperature(
        lambda temperature: squad_utils.span_scores(odds, odds / temperature, temperature), right
    )
    assert found == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize("right", [True, False])
def test_a_temperature_stays_in_its_limits(right: bool) -> None:
    """Even if all answers are right, or all wrong."""
    odds = np.array([3.0, 5.0])
    found = squad_utils.fit_temperature(
        lambda temperature: squad_utils.span_scores(odds, odds / temperature, temperature),
        np.array([right, right]),
    )
    assert squad_utils.TEMPERATURES[0] <= found <= squad_utils.TEMPERATURES[1]


# ------------------------------------------------------------------------------------------------
# The text


def answer_text(
    tokenizer: BertTokenizerFast, folder: Path, context: str, first: str, last: str
) -> str:
    """The answer when the logits peak at the tokens where the words `first`, `last` stand."""
    data = load(folder / "d.json", [(context, ["?"])])
    windows = qa.make_windows(data, tokenizer, 4, 384, 128, for_training=False)
    offsets = windows.contexts.offsets.tolist()
    logits = np.zeros((1, 2, 384), np.float32)
    at = windows.context_at[0]
    begin, end = context.index(first), context.index(last) + len(last)
    logits[0, 0, at + next(t for t, (a, b) in enumerate(offsets) if b > begin)] = 20.0
    logits[0, 1, at + max(t for t, (a, b) in enumerate(offsets) if a < end)] = 20.0
    answers = Answers(data, windows)
    feed(answers, windows, logits, np.array([0]), 1)
    return answers.texts()["q0"]


@pytest.mark.parametrize(
    "context,first,last,expected",
    [
        ("At the Café  CRÈME, Paris", "Café", "CRÈME", "Café  CRÈME"),
        ("the U.S. (New\n York) did", "U", ")", "U.S. (New\n York)"),
        ("an İstanbul straße x", "İstanbul", "straße", "İstanbul straße"),
        ("in 東京 today", "東", "京", "東京"),
        ("a 👩‍👩‍👧 b", "👩", "b", "👩‍👩‍👧 b"),
        ("at the cafe\u0301s now", "cafe", "s", "cafe\u0301s"),  # e + combining accent
    ],
)
def test_answers_are_cut_from_the_original_text(
    tokenizer: BertTokenizerFast, tmp_path: Path, context: str, first: str, last: str, expected: str
) -> None:
    """Case, accents, spacing and punctuation are the context's."""
    assert answer_text(tokenizer, tmp_path, context, first, last) == expected


def test_a_combining_accent_at_the_end_is_kept(
    tokenizer: BertTokenizerFast, tmp_path: Path
) -> None:
    """The tokenizer drops combining accents; an answer that ends in one is not cut before it."""
    text = answer_text(tokenizer, tmp_path, "at the cafe\u0301 now", "cafe", "cafe")
    assert text == "cafe\u0301"


@pytest.mark.parametrize("context", ["", " \n\t "])
def test_an_empty_context_has_no_answer(
    tokenizer: BertTokenizerFast, tmp_path: Path, context: str
) -> None:
    """No span at all: the answer is "", and no answer is infinitely more probable, as a number."""
    data = load(tmp_path / "d.json", [(context, ["a"]), ("b", ["a"])])
    windows = qa.make_windows(data, tokenizer, 4, 16, 4, for_training=False)
    answers = Answers(data, windows)
    feed(answers, windows, np.zeros((2, 2, 8), np.float32), np.arange(2), 2)
    assert answers.texts() == {"q0": "", "q1": "b"}
    scores = answers.no_answer_scores()
    assert scores["q0"] > 1e300 and math.isfinite(scores["q0"])
    assert scores["q1"] == 1.0


def test_no_answer_score_written_out(tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    """[CLS] a [SEP] b c [SEP]: the ratio of exp(2 + 1) at [CLS] to exp(3 + 2) at "b c" is e^-2."""
    data = load(tmp_path / "d.json", [("b c", ["a"])])
    windows = qa.make_windows(data, tokenizer, 4, 16, 4, for_training=False)
    answers = Answers(data, windows)
    start, end = [2.0, 9, 9, 3, 0, 9, 50, 50], [1.0, 9, 9, 1, 2, 9, 50, 50]
    answers.add(np.array([0]), np.array([start]), np.array([end]))
    assert answers.texts() == {"q0": "b c"}
    assert answers.no_answer_scores() == {"q0": pytest.approx(math.exp(-2))}
