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
        score: how probable it is among all spans of all texts read, and no answer; calibrated.
        probability: its probability in its window alone.
        no_answer: whether no answer in all texts read is more probable; None for a model that
            answers every question.
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
        temperature: of scores.
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
    temperature: float = 1.0
    tokens: Callable[[str], Tokens] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        # Several questions are often asked of one text.
        object.__setattr__(self, "tokens", functools.lru_cache(maxsize=1)(self._tokens))

    @property
    def room(self) -> int:
        """The tokens of a text that fit a window beside any question."""
        return self.length - self.max_query_length - 3

    def spans(
        self,
        texts: Sequence[str],
        question: str,
        top_k: int,
        log_odds: Sequence[float] | None = None,
    ) -> list[Span]:
        """The most probable spans of texts of any length, best first.

        They are the `top_k` best spans of each text that do not overlap. A text without tokens has
        none.

        Args:
            log_odds: what is known of each text beforehand, added to the log odds of its spans;
                None adds nothing.

        Raises:
            UserError: the model's logits are not finite.
        """
        asked = question_tokens(self.tokenizer, question, self.max_query_length, "the model")
        found: list[tuple[float, float, int, int, int]] = []
        total = -math.inf  # over the spans of all texts
        for i, text in enumerate(texts):
            tokens = self.tokens(text)
            if len(tokens.ids):
                spans, of_text = self._spans(tokens, asked, top_k)
                more = log_odds[i] if log_odds is not None else 0.0
                found += [(odds + more, p, begin, end, i) for odds, p, begin, end in spans]
                total = float(np.logaddexp(total, of_text + more / self.temperature))
        found.sort(key=lambda span: -span[0])
        no_answer = None
        if found and self.threshold is not None:  # by the best span
            no_answer = math.exp(min(-found[0][0], 700.0)) > self.threshold
        return [
            Span(
                text=i,
                start=begin,
                end=end,
                score=float(squad_utils.span_scores(odds, total, self.temperature)),
                probability=probability,
                no_answer=no_answer,
            )
            for odds, probability, begin, end, i in found
        ]

    def _tokens(self, text: str) -> Tokens:
        return squad_utils.tokenize(self.tokenizer, [text], True, "")

    def _spans(
        self, tokens: Tokens, asked: Tokens, count: int
    ) -> tuple[list[tuple[float, float, int, int]], float]:
        """The most probable spans of a text that do not overlap, best first.

        Returns:
            for each span its log odds against no answer, its probability in its window, and the
            characters where it begins and ends; and the sum over all spans, as `best_spans` has it.
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
        total = float(np.logaddexp.reduce([span[1] for span in best]))
        spans: list[tuple[float, float, int, int]] = []
        while len(spans) < count:
            w = int(np.argmax([span[0] for span in best]))
            odds, _, first, last = best[w]
            if not np.isfinite(odds):
                break
            begin, end = int(offsets[first, 0]), int(offsets[last, 1])
            spans.append((odds, _probability(windows, w, logits[w], first, last), begin, end))
            # Tokens may share a character.
            new = (offsets[:, 0] < end) & (offsets[:, 1] > begin)
            new[first : last + 1] = True
            taken |= new
            for w, each in enumerate(logits):
                if new[windows.first[w] : windows.first[w] + windows.length[w]].any():
                    best[w] = self._best(windows, w, each, taken)
        return spans, total

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

        It is the span's log odds against no answer, the sum over all spans as `best_spans` has it,
        and the first and last token in the text.
        """
        chosen = np.array([window])
        first, at = int(windows.first[window]), int(windows.context_at[window])
        length = int(windows.length[window])
        in_window = np.zeros((1, self.length), bool)
        in_window[0, at : at + length] = taken[first : first + length]
        start, end, odds, total = squad_utils.best_spans(
            *logits,
            windows.total_lengths[chosen],
            windows.context_at[chosen],
            self.max_answer_length,
            in_window,
            windows.own[chosen],
            self.temperature,
        )
        shift = first - at
        return float(odds[0]), float(total[0]), int(start[0]) + shift, int(end[0]) + shift


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
        model.settings.temperature,
    )


def _probability(
    windows: Windows, window: int, logits: tuple[np.ndarray, np.ndarray], first: int, last: int
) -> float:
    """The probability of a span in its window alone: of its start times that of its end."""
    shift = int(windows.context_at[window] - windows.first[window])
    log_prob = 0.0
    for values, at in zip(logits, (first, last), strict=True):
        real = values[0, : windows.total_lengths[window]].astype(np.float64)
        log_prob += real[at + shift] - np.logaddexp.reduce(real)
    return math.exp(log_prob)
