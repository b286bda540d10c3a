"""An exported QA model: the most probable spans of texts, without torch.

Programs that ask import deploy/reader.py, which stands on this module.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

import squad_utils
from cli import UserError
from deploy.runtime import Infer, Runtime, load_exported, question_tokens
from deploy.settings import QA
from squad_utils import SpecialIds, SquadData, Tokens, Windows


@dataclass(frozen=True)
class Span:
    """A span of a text that may be an answer.

    Attributes:
        text: the text's place among those that were read.
        start, end: its place in that text, in code points.
        score: how sure the model is, 0 to 1; it compares between texts.
        probability: its probability in its window.
        no_answer: whether it is more probable that there is no answer; None for a SQuAD 1.1 model.
    """

    text: int
    start: int
    end: int
    score: float
    probability: float
    no_answer: bool | None


@dataclass(frozen=True)
class QaModel:
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
    tokens: Callable[[str], Tokens] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        # Several questions are often asked of one text.
        object.__setattr__(self, "tokens", functools.lru_cache(maxsize=1)(self._tokens))

    @property
    def room(self) -> int:
        """The tokens of a text that fit a window beside any question."""
        return self.length - self.max_query_length - 3

    def spans(self, texts: Sequence[str], question: str, top_k: int) -> list[Span]:
        """The most probable spans of texts of any length, best first.

        They are the `top_k` best spans of each text that do not overlap. A text without tokens has
        none.

        Raises:
            UserError: the model's logits are not finite.
        """
        asked = question_tokens(self.tokenizer, question, self.max_query_length, "the model")
        found: list[Span] = []
        for i, text in enumerate(texts):
            tokens = self.tokens(text)
            spans = self._spans(tokens, asked, top_k) if len(tokens.ids) else []
            no_answer = None
            if spans and self.threshold is not None:  # by the best span
                no_answer = math.exp(min(spans[0][1] - spans[0][0], 700.0)) > self.threshold
            for log_prob, _, begin, end in spans:
                probability = math.exp(log_prob)
                found.append(Span(i, begin, end, probability, probability, no_answer))
        return sorted(found, key=lambda span: -span.score)

    def _tokens(self, text: str) -> Tokens:
        return squad_utils.tokenize(self.tokenizer, [text], True, "")

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


def load(folder: str, runtime: Runtime) -> QaModel:
    """Load the output folder of a QA model.

    Raises:
        UserError: as `load_exported`.
    """
    model = load_exported(folder, "--model", QA, runtime)
    lengths = model.settings.lengths
    return QaModel(
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
