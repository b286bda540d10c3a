"""Pairs without labels: a question with another context of its article, or with a plain text.

The errors of hidden states and logits need no answer, so a question can go with any text. Each
epoch draws new pairs, from the seed and the epoch alone, so that a run that continues draws the
same.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

import squad_utils
from cli import UserError, tell
from deploy.documents import read_paragraphs
from squad_utils import SquadData, Tokens, Windows
from training.passes import Batches, as_tensors

TEXT_SHARE = 0.5  # share of the pairs with a plain text, if there are plain texts
SHARED_WORDS = 13  # words in a row that mark a dev text, as for GPT-3 (Brown et al., 2020, app. C)


# ------------------------------------------------------------------------------------------------
# Plain texts


def read_texts(paths: Sequence[str], dev_contexts: Sequence[str]) -> list[str]:
    """The paragraphs of --extra_texts, without those that share text with the dev contexts.

    Raises:
        UserError: a path cannot be read, or no paragraph is left.
    """
    flag = "--extra_texts"
    texts = [each.text for each in read_paragraphs(paths, flag)]
    known = {run for context in dev_contexts for run in word_runs(context)}
    kept = [text for text in texts if known.isdisjoint(word_runs(text))]
    if not kept:
        raise UserError(f"{flag}: all of {', '.join(paths)} is text of --squad_dev_data")
    if len(kept) < len(texts):
        tell(
            f"{flag}: {len(texts) - len(kept):,} of {len(texts):,} paragraphs are left out: they"
            f" share {SHARED_WORDS} words in a row with --squad_dev_data"
        )
    return kept


def word_runs(text: str) -> Iterator[str]:
    """All runs of SHARED_WORDS words; a text with fewer words is one run."""
    words = re.findall(r"\w+", text.lower())
    for first in range(max(1, len(words) - SHARED_WORDS + 1)):
        yield " ".join(words[first : first + SHARED_WORDS])


# ------------------------------------------------------------------------------------------------
# A window is three integers: the question, the first token of the text, the length of the text


def contexts_of_articles(data: SquadData) -> np.ndarray:
    """The number of contexts of each article, int64 [articles]."""
    return np.array([len(article["paragraphs"]) for article in data.articles], np.int64)


def check_articles(data: SquadData) -> None:
    """Check that there are pairs to draw even without plain texts.

    Raises:
        UserError: no question's article has a second context.
    """
    sizes = contexts_of_articles(data)
    if np.repeat(sizes, sizes)[data.context_of].max() < 2:
        raise UserError(
            f"--extra_pairs: no article of {data.path} has a second context; give --extra_texts"
        )


@dataclass(frozen=True)
class Pool:
    """The questions and texts of pairs. Texts are the file's contexts, then the plain texts.

    Attributes:
        ids, bounds: tokens of all texts, int32; text i is ids[bounds[i]:bounds[i + 1]].
        questions: int64, the questions that can be drawn.
        own: int64 [all questions], the context of each question.
        begin, count: int64 [contexts], the first context of each context's article, and the number
            of its contexts.
        room: int64 [all questions], the tokens of text that fit beside each question.
    """

    ids: np.ndarray
    bounds: np.ndarray
    questions: np.ndarray
    own: np.ndarray
    begin: np.ndarray
    count: np.ndarray
    room: np.ndarray

    @classmethod
    def of(cls, data: SquadData, windows: Windows, texts: Tokens, room: np.ndarray) -> Pool:
        """The pool of a file and of plain texts, if any; see `check_articles`.

        Args:
            windows: the file's windows, whose tokens the pool takes.
            room: as the attribute.
        """
        sizes = contexts_of_articles(data)
        count = np.repeat(sizes, sizes)
        questions = np.arange(len(data.questions))
        if not len(texts.lengths):
            questions = questions[count[data.context_of] > 1]
        contexts = windows.contexts
        return cls(
            ids=np.concatenate([contexts.ids, texts.ids]),
            bounds=np.concatenate([contexts.bounds, contexts.bounds[-1] + texts.bounds[1:]]),
            questions=questions,
            own=data.context_of.astype(np.int64),
            begin=np.repeat(np.cumsum(sizes) - sizes, sizes),
            count=count,
            room=room,
        )

    def draw(self, rng: np.random.Generator, number: int) -> np.ndarray:
        """Draw `number` windows, int64 [number, 3], from all questions equally often.

        A window has another context of the question's article. If there are plain texts, TEXT_SHARE
        of the windows have one instead, and so do questions without another context. If the text is
        longer than the room beside the question, the window begins at a random token.
        """
        asked = np.resize(rng.permutation(self.questions), number)
        own, contexts = self.own[asked], len(self.count)
        begin, count = self.begin[own], self.count[own]
        text = begin + (own - begin + rng.integers(1, np.maximum(count, 2))) % count
        if plain := len(self.bounds) - 1 - contexts:
            instead = (rng.random(number) < TEXT_SHARE) | (count == 1)
            text = np.where(instead, contexts + rng.integers(0, plain, number), text)
        all_tokens = self.bounds[text + 1] - self.bounds[text]
        length = np.minimum(all_tokens, self.room[asked])
        first = self.bounds[text] + rng.integers(0, all_tokens - length + 1)
        return np.stack([asked, first, length], axis=1)


class ExtraBatches(Batches):
    """Batches of the file's windows and of windows that each epoch draws; without targets.

    The file's windows have indices 0 .. N - 1, and extra window j of an epoch has index
    N + number x epoch + j, which tells the epoch. All windows of a step belong to one epoch.
    """

    def __init__(
        self, windows: Windows, pool: Pool, number: int, step_size: int, seed: int
    ) -> None:
        """Each epoch draws `number` windows from the pool."""
        self.windows, self.pool, self.number = windows, pool, number
        self.step_size, self.seed = step_size, seed
        first = windows.contexts.bounds[windows.context_of[windows.question]] + windows.first
        rows = np.stack([windows.question, first, windows.length], axis=1)
        self.of_file = rows.astype(np.int32)
        self._rows = functools.lru_cache(maxsize=1)(self._draw_rows)

    def _draw_rows(self, epoch: int) -> np.ndarray:
        """All windows of an epoch, int32 [N + number, 3]."""
        # A stream of its own, apart from those of the order and of the answers.
        drawn = self.pool.draw(np.random.default_rng([self.seed, epoch, 2]), self.number)
        return np.concatenate([self.of_file, drawn.astype(np.int32)])

    def _lengths(self, rows: np.ndarray) -> np.ndarray:
        return self.windows.questions.lengths[rows[:, 0]] + rows[:, 2] + 3

    def _chosen(self, chosen: np.ndarray) -> np.ndarray:
        """The windows of a step, [len(chosen), 3]."""
        extra = np.maximum(chosen - len(self.of_file), 0)
        epoch = int(extra.max()) // self.number
        return self._rows(epoch)[chosen - epoch * self.number * (chosen >= len(self.of_file))]

    def steps(self, epoch: int) -> list[np.ndarray]:
        lengths = self._lengths(self._rows(epoch))
        steps = squad_utils.plan_steps(lengths, self.step_size, self.seed, epoch)
        extra = len(self.of_file)
        return [step + epoch * self.number * (step >= extra) for step in steps]

    def tokens(self, chosen: np.ndarray) -> np.ndarray:
        return self._lengths(self._chosen(chosen))

    def batch(self, epoch: int, chosen: np.ndarray) -> dict[str, Tensor]:
        """Inputs [B, L]."""
        questions, rows = self.windows.questions, []
        for question, first, length in self._chosen(chosen):
            asked = questions.ids[questions.of(question)]
            rows.append((asked, self.pool.ids[first : first + length]))
        return as_tensors(squad_utils.token_rows(rows, self.windows.special))
