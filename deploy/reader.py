"""Answers from texts, by an exported QA model: what programs import, without torch.

model = reader.load("models/demo-qa")
for answer in model.answers(text, "Who designed the lighthouse?"):
    print(answer.text, answer.probability, text[answer.start : answer.end])
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from tokenizers import Tokenizer

import squad_utils
from cli import warn
from deploy.runtime import Infer, Runtime, load_exported
from deploy.search import Paragraph
from squad_utils import SpecialIds, SquadData, Tokens

SPANS_A_WINDOW = 20  # candidates from each window ...
SPANS_KEPT = 200  # ... and from the whole text, before overlapping ones are dropped
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[^a-z])|\n+")


@dataclass(frozen=True)
class Answer:
    """An answer in a text, which is `text` = the text's [start:end].

    Attributes:
        probability: that it has in its window.
        sentence: the sentence, or sentences, that hold it; where in them it begins is `offset`.
        no_answer: whether no answer is more probable; None for a model of SQuAD 1.1.
        source: the paragraph that the text is, if it is one of many, ...
        distance: ... and its distance from the question.
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
    """An exported model with what is needed to feed it and to read its answers.

    Attributes:
        infer: from inputs to start and end logits, [1, L] each.
        length: L, the tokens of a window.
        max_seq_length_q, doc_stride: what it was trained with.
        threshold: of the no-answer score, over which there is no answer; None for a model of
            SQuAD 1.1, which has one for every question.
    """

    infer: Infer
    tokenizer: Tokenizer
    special: SpecialIds
    length: int
    max_seq_length_q: int
    doc_stride: int
    threshold: float | None
    _last: dict[str, Tokens] = field(default_factory=dict)

    def tokens(self, text: str) -> Tokens:
        """The tokens of a text; those of the last one are kept for further questions."""
        if text not in self._last:
            self._last.clear()
            self._last[text] = squad_utils.tokenize(self.tokenizer, [text], True, "")
        return self._last[text]

    def answers(self, text: str, question: str, top_k: int = 3) -> list[Answer]:
        """The most probable answers in a text of any length that do not overlap, best first.

        There are none where the text has no tokens.
        """
        tokens = self.tokens(text)
        if not len(tokens.ids):
            return []
        spans = self._spans(tokens, text, question)
        if not spans:
            return []
        no_answer = None
        if self.threshold is not None:
            log_prob, log_none, *_ = spans[0]
            no_answer = math.exp(min(log_none - log_prob, 700.0)) > self.threshold
        best: list[Answer] = []
        for log_prob, _, begin, end in spans:
            if len(best) < top_k and all(end <= a.start or begin >= a.end for a in best):
                first, stop = sentence_around(text, begin, end)
                best.append(
                    Answer(
                        text[begin:end],
                        math.exp(log_prob),
                        begin,
                        end,
                        text[first:stop],
                        begin - first,
                        no_answer,
                    )
                )
        return best

    def answers_from(
        self, nearest: Sequence[tuple[Paragraph, float]], question: str, top_k: int = 3
    ) -> list[Answer]:
        """The most probable answers in paragraphs, each given with its distance, best first."""
        found = [
            replace(answer, source=paragraph, distance=distance)
            for paragraph, distance in nearest
            for answer in self.answers(paragraph.text, question, top_k)
        ]
        return sorted(found, key=lambda answer: -answer.probability)[:top_k]

    def _spans(
        self, tokens: Tokens, text: str, question: str
    ) -> list[tuple[float, float, int, int]]:
        """The most probable spans of a text, best first: log-probability, that of no answer in the
        same window, and where the span begins and ends."""
        data = SquadData("", [], [text], ["question"], [question], np.zeros(1, np.int32), [[]],
                         np.zeros(1, bool), True, "")  # fmt: skip
        asked = squad_utils.tokenize(self.tokenizer, [question], False, "")
        if asked.lengths[0] > self.max_seq_length_q:
            warn(
                f"the question has {asked.lengths[0]} tokens; the model sees the first"
                f" {self.max_seq_length_q}"
            )
        windows = squad_utils.cut_windows(
            data,
            tokens,
            squad_utils.truncate(asked, self.max_seq_length_q),
            self.special,
            self.length,
            self.doc_stride,
            for_training=False,
        )
        offsets = tokens.offsets_of(0)
        # One window at a time, and few spans of each: memory does not grow with their number.
        spans: list[tuple[float, float, int, int]] = []
        for window in range(len(windows)):
            chosen = np.array([window])
            arrays = squad_utils.make_batch(windows, chosen, pad_to=self.length)
            start_logits, end_logits = self.infer(arrays)
            at = windows.context_at[chosen]
            first, last, log_prob, no_answer = squad_utils.best_spans(
                start_logits, end_logits, windows.total_lengths[chosen], at, SPANS_A_WINDOW
            )
            shift = windows.first[window] - at[0]
            for i in np.flatnonzero(np.isfinite(log_prob[0])):
                begin = int(offsets[first[0, i] + shift, 0])
                end = int(offsets[last[0, i] + shift, 1])
                spans.append((float(log_prob[0, i]), float(no_answer[0]), begin, end))
            spans = heapq.nlargest(SPANS_KEPT, spans)
        return spans


def load(folder: str, runtime: Runtime | None = None) -> Reader:
    """Load the output folder of a QA model.

    Raises:
        UserError: as `load_exported`.
    """
    outputs = ["output_s", "output_e"]
    runtime = runtime or Runtime()
    model = load_exported(folder, "--model", "a QA model", "train_qa.py", outputs, runtime)
    return Reader(
        model.compile(model.length),
        model.tokenizer,
        model.special,
        model.length,
        model.arguments["max_seq_length_q"],
        model.arguments["doc_stride"],
        threshold=model.metrics.get("f1_threshold"),
    )


def sentence_around(text: str, start: int, end: int) -> tuple[int, int]:
    """Where the sentence (or sentences) that hold text[start:end] begin and end."""
    begin, stop = 0, len(text)
    for gap in SENTENCE_END.finditer(text):
        if gap.end() <= start:
            begin = gap.end()
        elif gap.start() >= end:
            stop = gap.start()
            break
    return begin, stop
