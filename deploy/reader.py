"""Answers from texts, by an exported QA model: the module for programs to import, without torch.

model = reader.load("models/demo-qa")
for answer in model.answers(text, "Who designed the lighthouse?"):
    print(answer.text, answer.probability, text[answer.start : answer.end])
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from tokenizers import Tokenizer

import squad_utils
from cli import UserError
from deploy.documents import SENTENCE_END, Paragraph
from deploy.runtime import Infer, Runtime, load_exported, question_tokens
from deploy.search import Found
from deploy.settings import QA
from squad_utils import SpecialIds, SquadData, Tokens, Windows

# The log odds of a paragraph against one whose search score is lower by 1. On questions of SQuAD's
# train file F1 is about the same for 1.5 to 3, and lower for less (docs/embeddings.md).
SEARCH_WEIGHT = 2.0


@dataclass(frozen=True)
class Answer:
    """An answer in a text.

    Attributes:
        text: the answer, in the text's own words.
        probability: its probability in its window.
        start, end: its place in the given text, or in the whole file if the text is a paragraph
            of one; in code points.
        sentence: the sentence or sentences that contain it.
        offset: where it begins in `sentence`.
        no_answer: whether it is more probable that there is no answer; None for a SQuAD 1.1 model.
        source: the paragraph that it comes from, if there are many; else None.
        distance: the distance of that paragraph from the question, or None.
    """

    text: str
    probability: float
    start: int
    end: int
    sentence: str
    offset: int
    no_answer: bool | None = None
    source: Paragraph | None = None
    distance: float | None = None


@dataclass(frozen=True)
class Reader:
    """An exported QA model with its tokenizer and settings.

    Attributes:
        folder: its folder, for messages.
        infer: the function from inputs to start and end logits, [1, L] each.
        length: L, the tokens of a window.
        max_query_length, doc_stride: the values in its training.
        max_answer_length: the most tokens of an answer.
        threshold: a no-answer score above it means that there is no answer; None for a SQuAD 1.1
            model, which answers every question.
    """

    folder: str
    infer: Infer
    tokenizer: Tokenizer
    special: SpecialIds
    length: int
    max_query_length: int
    doc_stride: int
    max_answer_length: int
    threshold: float | None
    _last: dict[str, Tokens] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """The most tokens of a text that fit one window, whatever the question."""
        return self.length - self.max_query_length - 3  # [CLS] question [SEP] text [SEP]

    def tokens(self, text: str) -> Tokens:
        """The tokens of a text; the last text's tokens are kept for further questions."""
        if text not in self._last:
            self._last.clear()
            self._last[text] = squad_utils.tokenize(self.tokenizer, [text], True, "")
        return self._last[text]

    def answers(self, text: str, question: str, top_k: int = 3) -> list[Answer]:
        """The most probable answers in a text of any length that do not overlap, best first.

        A text without tokens has no answers.

        Raises:
            UserError: the model's logits are not finite.
        """
        return [answer for _, answer in self._answers(text, self._question(question), top_k)]

    def answers_from(self, found: Sequence[Found], question: str, top_k: int = 3) -> list[Answer]:
        """The best answers in paragraphs that a search has found, best first.

        Answers are ordered by their odds against no answer in their window, times the odds that
        the search gives to their paragraph. Those that overlap in a file, as in parts of a long
        paragraph, count once.
        """
        asked = self._question(question)
        answers = [
            (
                odds + SEARCH_WEIGHT * score,
                replace(
                    answer,
                    start=answer.start + paragraph.start,
                    end=answer.end + paragraph.start,
                    source=paragraph,
                    distance=distance,
                ),
            )
            for paragraph, score, distance in found
            for odds, answer in self._answers(paragraph.text, asked, top_k)
        ]
        best: list[Answer] = []
        for _, answer in sorted(answers, key=lambda each: -each[0]):
            if len(best) < top_k and not any(_overlap(answer, each) for each in best):
                best.append(answer)
        return best

    def _question(self, question: str) -> Tokens:
        return question_tokens(self.tokenizer, question, self.max_query_length, "the model")

    def _answers(self, text: str, asked: Tokens, top_k: int) -> list[tuple[float, Answer]]:
        """`answers` to a question that is given as tokens, each with its log odds against no answer
        in its window."""
        tokens = self.tokens(text)
        spans = self._spans(tokens, asked, top_k) if len(tokens.ids) else []
        no_answer = None
        if spans and self.threshold is not None:  # by the best span
            no_answer = math.exp(min(spans[0][1] - spans[0][0], 700.0)) > self.threshold
        answers = []
        for log_prob, none, begin, end in spans:
            first, stop = sentence_around(text, begin, end)
            answer = Answer(
                text[begin:end],
                math.exp(log_prob),
                begin,
                end,
                text[first:stop],
                begin - first,
                no_answer,
            )
            answers.append((log_prob - none, answer))
        return answers

    def _spans(
        self, tokens: Tokens, asked: Tokens, count: int
    ) -> list[tuple[float, float, int, int]]:
        """The most probable spans of a text that do not overlap, best first.

        Each is the log-probability of the span, that of no answer in the same window, and the
        characters where the span begins and ends.
        """
        data = SquadData("", [], [""], ["question"], [""], np.zeros(1, np.int32), [[]],
                         np.zeros(1, bool), True, "")  # fmt: skip
        windows = squad_utils.cut_windows(
            data, (tokens, asked), self.special, self.length, self.doc_stride, for_training=False
        )
        offsets = tokens.offsets_of(0)
        taken = np.zeros(len(offsets), bool)
        logits = [self._logits(windows, window) for window in range(len(windows))]
        best = [self._best(windows, w, each, taken) for w, each in enumerate(logits)]
        spans: list[tuple[float, float, int, int]] = []
        while len(spans) < count:
            log_prob, no_answer, first, last = max(best, key=lambda span: span[0])
            if not np.isfinite(log_prob):
                break
            begin, end = int(offsets[first, 0]), int(offsets[last, 1])
            spans.append((log_prob, no_answer, begin, end))
            # Tokens may share a character.
            new = (offsets[:, 0] < end) & (offsets[:, 1] > begin)
            new[first : last + 1] = True
            taken |= new
            for w, each in enumerate(logits):
                if new[windows.first[w] : windows.first[w] + windows.length[w]].any():
                    best[w] = self._best(windows, w, each, taken)
        return spans

    def _logits(self, windows: Windows, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Start and end logits of a window, float32 [1, L]."""
        arrays = squad_utils.make_batch(windows, np.array([window]), pad_to=self.length)
        start, end = self.infer(arrays)
        real = slice(int(windows.total_lengths[window]))
        if not (np.isfinite(start[0, real]).all() and np.isfinite(end[0, real]).all()):
            raise UserError(f"--model: {self.folder} gives numbers that are not finite")
        return start, end

    def _best(
        self,
        windows: Windows,
        window: int,
        logits: tuple[np.ndarray, np.ndarray],
        taken: np.ndarray,
    ) -> tuple[float, float, int, int]:
        """The most probable span of a window without taken tokens.

        It is the log-probability of the span, that of no answer, and the first and last token in
        the text.
        """
        chosen = np.array([window])
        first, at = int(windows.first[window]), int(windows.context_at[window])
        length = int(windows.length[window])
        in_window = np.zeros((1, self.length), bool)
        in_window[0, at : at + length] = taken[first : first + length]
        start, end, log_prob, no_answer = squad_utils.best_spans(
            *logits,
            windows.total_lengths[chosen],
            windows.context_at[chosen],
            self.max_answer_length,
            in_window,
        )
        shift = first - at
        return float(log_prob[0]), float(no_answer[0]), int(start[0]) + shift, int(end[0]) + shift


def load(folder: str, runtime: Runtime | None = None) -> Reader:
    """Load the output folder of a QA model.

    Raises:
        UserError: as `load_exported`.
    """
    model = load_exported(folder, "--model", QA, runtime or Runtime())
    lengths = model.settings.lengths
    return Reader(
        os.path.dirname(model.path),
        model.compile(lengths["max_seq_length"]),
        model.tokenizer,
        model.settings.special,
        lengths["max_seq_length"],
        lengths["max_query_length"],
        lengths["doc_stride"],
        lengths["max_answer_length"],
        model.settings.null_threshold,
    )


def _overlap(one: Answer, other: Answer) -> bool:
    """Whether two answers from paragraphs share characters of a file."""
    assert one.source is not None and other.source is not None
    same = one.source.path == other.source.path
    return same and one.start < other.end and other.start < one.end


def sentence_around(text: str, start: int, end: int) -> tuple[int, int]:
    """Where the sentence or sentences around text[start:end] begin and end."""
    begin, stop = 0, len(text)
    for gap in SENTENCE_END.finditer(text):
        if gap.end() <= start:
            begin = gap.end()
        elif gap.start() >= end:
            stop = gap.start()
            break
    return begin, stop
