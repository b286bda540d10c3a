"""A SQuAD file's questions asked of all its contexts: how well search and reader answer together.

No torch is needed.
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import squad_utils
from cli import UserError, tell
from deploy import squad_scores
from deploy.documents import Paragraph
from deploy.qa_model import QaModel
from deploy.reader import Reader, read
from deploy.search import Found, build_index

FOUND = (1, 5, 20)  # the numbers of paragraphs that figures of the search are about
READ = (1, 5, 20)  # the numbers of paragraphs that the reader reads


@dataclass(frozen=True)
class Asked:
    """Questions and the contexts to search.

    Attributes:
        questions: those with an answer.
        answers: the right answers to each question.
        own: the place in `contexts` of the context that each question is about.
        contexts: each once; those that differ only in white space are one. A context's start is
            where it would begin if all contexts stood one behind another.
    """

    questions: list[str]
    answers: list[list[str]]
    own: list[int]
    contexts: list[Paragraph]


class Read(NamedTuple):
    """Scores of answers in percent, and the milliseconds of a question, its search included."""

    f1: float
    exact_match: float
    ms: float


@dataclass(frozen=True)
class Figures:
    """What an evaluation finds.

    Attributes:
        search: one of `search.SEARCHES`.
        questions, contexts: how many.
        top: for each of FOUND, the percentage of questions whose own context is among the first.
        search_ms: median milliseconds of a search.
        read: for each of READ, the scores with so many paragraphs read; empty without a QA model.
        f1_given_right: F1 if the reader is given each question's own context, or None.
    """

    search: str
    questions: int
    contexts: int
    top: dict[int, float]
    search_ms: float
    read: dict[int, Read]
    f1_given_right: float | None

    def record(self) -> dict[str, object]:
        """For JSON."""
        return {
            "search": self.search,
            "questions": self.questions,
            "contexts": self.contexts,
            **{f"top_{count}": share for count, share in self.top.items()},
            "search_ms": self.search_ms,
            **{f"read_{count}": each._asdict() for count, each in self.read.items()},
            "f1_given_right": self.f1_given_right,
        }


def load(path: str, extra_path: str | None) -> Asked:
    """The questions of a SQuAD file, and its contexts with those of another file.

    Raises:
        UserError: as `load_squad`; no question has an answer.
    """
    data = squad_utils.load_squad(path, "--evaluate")
    extra = squad_utils.load_squad(extra_path, "--eval_extra_contexts") if extra_path else None
    place: dict[str, int] = {}
    contexts: list[Paragraph] = []
    start = 0
    for each in filter(None, (data, extra)):
        for text in each.contexts:
            if place.setdefault(" ".join(text.split()), len(contexts)) == len(contexts):
                contexts.append(Paragraph(text, each.path, 1, start))
                start += len(text) + 1
    answers = data.all_answers
    kept = [i for i, texts in enumerate(answers) if texts]
    if not kept:
        raise UserError(f"--evaluate: {path} has no question with an answer")
    if len(kept) < len(answers):
        tell(
            f"--evaluate: {len(answers) - len(kept)} of {len(answers)} questions have no answer and"
            " are not asked"
        )
    own = [place[" ".join(data.contexts[data.context_of[i]].split())] for i in kept]
    return Asked([data.questions[i] for i in kept], [answers[i] for i in kept], own, contexts)


def evaluate(asked: Asked, reader: Reader) -> Figures:
    """Figures of the reader's search and, with a QA model, of its answers."""
    index = build_index(asked.contexts, reader.searcher, reader.search)
    starts = [each.start for each in asked.contexts]
    ranks: list[float] = []
    seconds: list[float] = []
    scores: dict[int, list[Read]] = {count: [] for count in READ}
    given: list[Read] = []
    rows = zip(asked.questions, asked.answers, asked.own, strict=True)
    for question, right, own in tqdm(
        rows, desc="asking", unit=" questions", total=len(asked.questions)
    ):
        began = time.perf_counter()
        found = index.nearest(question, max(*FOUND, *READ))
        seconds.append(time.perf_counter() - began)
        # Parts of a long context count as that context.
        places = list(dict.fromkeys(bisect_right(starts, e.paragraph.start) - 1 for e in found))
        ranks.append(places.index(own) if own in places else np.inf)
        if reader.model is None:
            continue
        once = _reading_once(reader.model)
        for count in READ:  # so the time of each has that of those before it, which read for it
            text = _answer(once, found[:count], question)
            scores[count].append(_score(text, right, time.perf_counter() - began))
        text = _answer(once, [Found(asked.contexts[own], 1.0, None)], question)
        given.append(_score(text, right, 0.0))
    return Figures(
        index.method,
        len(ranks),
        len(starts),
        {n: 100 * float(np.mean(np.array(ranks) < n)) for n in FOUND},
        1000 * statistics.median(seconds),
        {count: _mean(each) for count, each in scores.items() if each},
        _mean(given).f1 if given else None,
    )


def _reading_once(model: QaModel) -> QaModel:
    """The same model, which remembers the logits of each window that it has read."""
    known: dict[bytes, tuple[np.ndarray, ...]] = {}

    def infer(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        key = batch["input_ids"].tobytes()
        if key not in known:
            known[key] = model.infer(batch)
        return known[key]

    return replace(model, infer=infer)


def _answer(model: QaModel, found: Sequence[Found], question: str) -> str:
    """The best answer in paragraphs, or "" if they have no token."""
    for span in read(model, found, question, 1):
        return found[span.text].paragraph.text[span.start : span.end]
    return ""


def _score(text: str, right: Sequence[str], seconds: float) -> Read:
    """The score of an answer by the right one that fits it best."""
    return Read(
        100 * max(squad_scores.f1(text, each) for each in right),
        100.0 * max(squad_scores.exact_match(text, each) for each in right),
        1000 * seconds,
    )


def _mean(scores: Sequence[Read]) -> Read:
    """Mean scores, and the median time."""
    f1, exact, times = zip(*scores, strict=True)
    return Read(statistics.mean(f1), statistics.mean(exact), statistics.median(times))


def table(figures: Figures) -> str:
    """Figures as text to read."""
    top = ", ".join(f"top {n} {share:.2f}%" for n, share in figures.top.items())
    lines = [
        f"search {figures.search}: {top} of {figures.questions:,} questions, among"
        f" {figures.contexts:,} contexts; {figures.search_ms:.1f} ms a question"
    ]
    if figures.f1_given_right is not None:
        lines.append(f"given the right context, the reader's F1 is {figures.f1_given_right:.2f}")
        lines.append(f"{'paragraphs read':>15}{'F1':>8}{'EM':>8}{'of that F1':>12}{'ms':>8}")
        for count, each in figures.read.items():
            given = figures.f1_given_right
            share = f"{each.f1 / given:.1%}" if given else "-"
            lines.append(
                f"{count:15}{each.f1:8.2f}{each.exact_match:8.2f}{share:>12}{each.ms:8.0f}"
            )
    return "\n".join(lines)
