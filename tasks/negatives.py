"""Windows of other paragraphs, read beside each question in training: --negative_windows.

They are hard: BM25 or an embedding model ranks their paragraphs high for the question. Paragraphs
that hold the text of one of its answers are left out. A question with all its windows is one
example, so a pass never splits it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os

import numpy as np
from torch import Tensor
from tqdm import tqdm

import squad_utils
from cli import UserError
from deploy.search import Embedder
from squad_utils import SquadData, Windows
from training.passes import BatchesByLength, as_tensors
from training.run import CHECKPOINTS, Run

RANKED = 50  # paragraphs ranked for each question, unless it needs more
BLOCK = 1024  # questions whose distances are computed at once
FILE = "negatives.npy"  # in CHECKPOINTS


# ------------------------------------------------------------------------------------------------
# Paragraphs that look like the right one


def check(args: argparse.Namespace) -> None:
    """Check the flags of negative windows.

    Raises:
        UserError: --model_emb has no windows to rank.
    """
    if getattr(args, "model_emb", None) and not args.negative_windows:
        raise UserError("--model_emb ranks paragraphs for --negative_windows, which is not given")


def rank_by_words(windows: Windows, count: int) -> np.ndarray:
    """The contexts that BM25 ranks highest for each question, int64 [questions, count].

    Words are the model's tokens.
    """
    import bm25s  # half a second, which no other training needs

    contexts, questions = windows.contexts, windows.questions
    ids = [contexts.ids[contexts.of(i)].tolist() for i in range(len(contexts.lengths))]
    highest = max(windows.contexts.ids.max(initial=0), windows.questions.ids.max(initial=0))
    index = bm25s.BM25()
    index.index((ids, {str(i): i for i in range(highest + 1)}), show_progress=False)
    scores = (
        index.get_scores_from_ids(questions.ids[questions.of(q)].tolist())
        for q in tqdm(range(len(questions.lengths)), "ranking paragraphs", disable=None)
    )
    return np.stack([np.argsort(-each, kind="stable")[:count] for each in scores])


def rank_by_vectors(data: SquadData, count: int, embedder: Embedder) -> np.ndarray:
    """The contexts nearest (L2) to each question, int64 [questions, count]."""
    contexts, questions = (
        np.stack([vector for _, vector in sorted(embedder.one_by_one(texts, length, bar))])
        for texts, length, bar in (
            (data.contexts, embedder.max_seq_length_c, "embedding contexts"),
            (data.questions, embedder.max_seq_length_q, "embedding questions"),
        )
    )
    halves = np.square(contexts).sum(axis=1) / 2  # |q - c|^2 orders contexts as |c|^2 / 2 - q c
    blocks = np.split(questions, range(BLOCK, len(questions), BLOCK))
    ranked = [np.argsort(halves - q @ contexts.T, axis=1, kind="stable")[:, :count] for q in blocks]
    return np.concatenate(ranked)


def without_answers(data: SquadData, ranked: np.ndarray, count: int) -> np.ndarray:
    """The first `count` ranked contexts that do not hold an answer, int64 [questions, count].

    A context holds an answer if it has the answer's text anywhere, whatever the case and the white
    space. -1 stands for each context that is missing. A question without an answer has none: any
    context might answer it.
    """

    def folded(text: str) -> str:
        return " ".join(text.casefold().split())

    contexts = [folded(text) for text in data.contexts]
    given = [[folded(text) for text in texts] for texts in data.all_answers]
    kept = np.full((len(ranked), count), -1)
    for q, answers in enumerate(given):
        if answers:
            free = (c for c in ranked[q] if not any(text in contexts[c] for text in answers))
            found = list(itertools.islice(free, count))
            kept[q, : len(found)] = found
    return kept


def choose(
    run: Run, data: SquadData, windows: Windows, count: int, embedder: Embedder | None
) -> np.ndarray:
    """The contexts of the negative windows, as `without_answers` returns them.

    The main process chooses them once. Other processes, and a run that continues, read its file.

    Raises:
        UserError: every context holds an answer to every question.
    """
    path = os.path.join(run.output_dir, CHECKPOINTS, FILE)
    if run.main and not os.path.exists(path):
        most = min(max(RANKED, 5 * count), len(data.contexts))
        run.say(f"choosing paragraphs for --negative_windows={count}")
        if embedder is None:
            ranked = rank_by_words(windows, most)
        else:
            ranked = rank_by_vectors(data, most, embedder)
        with open(f"{path}.tmp", "wb") as file:
            np.save(file, without_answers(data, ranked, count))
        os.replace(f"{path}.tmp", path)
    run.wait_for(path)
    chosen = np.load(path)
    lack = (chosen[data.answerable] < 0).any(axis=1).sum()
    if (chosen < 0).all():
        raise UserError(
            f"--negative_windows: of the paragraphs of {data.path} that look like the right one,"
            " each holds the answer; more paragraphs are needed"
        )
    if lack:
        run.say(
            f"--negative_windows: {lack:,} questions get fewer, since other paragraphs hold their"
            " answers"
        )
    return chosen


# ------------------------------------------------------------------------------------------------
# Batches


class GroupBatches(BatchesByLength):
    """Batches of questions, each with its own windows and those of other paragraphs.

    Attributes:
        rows: int32 [rows, 3], as `Windows.rows`: those of the file's windows, then the others.
        bounds, members: example i has the rows members[bounds[i]:bounds[i + 1]], its own first.
    """

    def __init__(
        self, windows: Windows, negatives: np.ndarray, room: np.ndarray, step_size: int, seed: int
    ) -> None:
        """Group the windows by question.

        Args:
            windows: of the training file.
            negatives: int64 [questions, N], contexts of the other windows; -1 for none.
            room: int64 [questions], the tokens of a context that fit beside each question. The
                window of a longer context begins at a token that the seed draws.
        """
        asks = np.isin(np.arange(len(room)), windows.question)
        question, nth = np.nonzero((negatives >= 0) & asks[:, None])
        context = negatives[question, nth]
        tokens = windows.contexts.lengths[context]
        length = np.minimum(tokens, room[question])
        shift = np.random.default_rng([seed, 4]).integers(0, tokens - length + 1)
        first = windows.contexts.bounds[context] + shift
        others = np.stack([question, first, length], axis=1).astype(np.int32)
        self.windows, self.rows = windows, np.concatenate([windows.rows, others])
        self.members = np.argsort(self.rows[:, 0], kind="stable")
        counts = np.bincount(self.rows[:, 0])
        counts = counts[counts > 0]
        self.bounds = np.concatenate([[0], np.cumsum(counts)])
        lengths = (windows.questions.lengths[self.rows[:, 0]] + self.rows[:, 2] + 3)[self.members]
        # A pass pads all rows to its longest.
        super().__init__(counts * np.maximum.reduceat(lengths, self.bounds[:-1]), step_size, seed)
        self._targets = functools.lru_cache(maxsize=1)(self._draw_targets)

    def _draw_targets(self, epoch: int) -> np.ndarray:
        # A stream of its own: the order of the windows must not depend on the answers.
        own = squad_utils.targets(self.windows, np.random.default_rng([self.seed, epoch, 1]))
        return np.pad(own, ((0, len(self.rows) - len(own)), (0, 0)))

    def batch(self, epoch: int, chosen: np.ndarray) -> dict[str, Tensor]:
        """The batch of a few questions.

        Returns:
            inputs [B, L]; `targets` [B, 2], as of `QaBatches`; and `groups` [len(chosen), G], the
            rows of each example, in which B stands for none.
        """
        each = [self.members[self.bounds[i] : self.bounds[i + 1]] for i in chosen]
        rows, sizes = np.concatenate(each), np.array([len(some) for some in each])
        groups = np.full((len(each), sizes.max()), len(rows))
        groups[np.arange(sizes.max()) < sizes[:, None]] = np.arange(len(rows))
        windows = self.windows
        arrays = squad_utils.rows_batch(
            self.rows[rows], windows.questions, windows.contexts.ids, windows.special
        )
        return as_tensors({**arrays, "targets": self._targets(epoch)[rows], "groups": groups})
